//! ICMP errors about packets that were translated: translated by their quote, both ways, so that
//! path MTU discovery and "unreachable" work through the load balancer (RFC 5508, section 4).

use super::Verdict;
use super::checksum::{self, TTL_DECREMENT, fold, replaced};
use super::egress::is_ours;
use super::emit;
use super::ip::{IpFamily, IpHeader};
use super::parse::{Ip, Parse, Part};
use super::platform::{Packet, Tables};
use super::scratch::Scratch;
use super::slow::{Way, find_hop, is_for_another_hook, leave_to_tc};
use super::wire::{Icmp, Ipv4, Tcp, Udp};
use crate::abi::{DropReason, Flow, FlowFlags, IPPROTO_TCP, IPPROTO_UDP};

/// Whether a type is an error message about a packet: destination unreachable, time exceeded,
/// parameter problem; packet too big (RFC 792, RFC 4443).
#[inline(always)]
fn is_error<F: IpFamily>(kind: u8) -> bool {
    if F::VERSION == 4 { matches!(kind, 3 | 11 | 12) } else { matches!(kind, 1..=4) }
}

/// Translates an ICMP error about a flow; passes everything else.
#[inline(always)]
pub fn translate<D: Tables<F>, F: Parse>(datapath: &D, scratch: &mut Scratch<F::Address>) -> Verdict {
    if !read_quote::<D, F>(datapath, scratch) {
        return Verdict::Pass;
    }
    let packet = datapath.packet();
    let Scratch { parsed, quote, key, hop, mtu, .. } = scratch;
    let Some(mut flow) = datapath.established(key).or_else(|| datapath.transient(key)) else {
        return Verdict::Pass;
    };
    if quote.l4 + size_of::<Udp>() > parsed.ip.end {
        return Verdict::drop(datapath, DropReason::BadIcmpQuote);
    }
    if is_for_another_hook(datapath, &flow) {
        return Verdict::Pass;
    }
    if parsed.ip.hops_left <= 1 && !flow.is_local() {
        // No ICMP error about an ICMP error (RFC 1122, section 3.2.2).
        return Verdict::drop(datapath, DropReason::TtlExpired);
    }
    match find_hop::<D, F>(datapath, &mut flow, hop, mtu) {
        Way::Found => {}
        Way::Gone => return Verdict::drop(datapath, DropReason::BackendGone),
        Way::Elsewhere => return leave_to_tc(datapath),
    }
    if hop.ifindex == 0 && !flow.is_local() {
        return Verdict::drop(datapath, DropReason::NoNeighbour);
    }
    let edits = flow.status.flags & (FlowFlags::EDIT_SEQUENCE | FlowFlags::REPLY) == FlowFlags::EDIT_SEQUENCE;
    if edits && edit_sequence(packet, &parsed.ip, quote.l4, flow.timestamp_delta).is_none() {
        return Verdict::drop(datapath, DropReason::EditFailed);
    }
    if edit::<_, F>(packet, &parsed.ip, quote, &flow).is_none() {
        return Verdict::drop(datapath, DropReason::EditFailed);
    }
    if !flow.is_local() {
        datapath.add_to_sum(F::hop_in_sum());
    }
    datapath.count_forwarded(flow.service, flow.backend, flow.is_reply(), packet.length() as u64);
    if flow.is_local() { Verdict::Deliver } else { emit::send(datapath, &parsed.link, hop) }
}

/// Translates an ICMP error about a client's packet to a backend on this node, on its way out of the
/// node; passes everything else.
#[inline(always)]
pub fn translate_reply<D: Tables<F>, F: Parse>(datapath: &D, scratch: &mut Scratch<F::Address>) -> Verdict {
    if !read_quote::<D, F>(datapath, scratch) {
        return Verdict::Pass;
    }
    let Scratch { parsed, quote, key, .. } = scratch;
    let Some(flow) = datapath.established(key).or_else(|| datapath.transient(key)) else {
        return Verdict::Pass;
    };
    if !is_ours(&flow) {
        return Verdict::Pass;
    }
    if quote.l4 + size_of::<Udp>() > parsed.ip.end {
        return Verdict::drop(datapath, DropReason::BadIcmpQuote);
    }
    if edit::<_, F>(datapath.packet(), &parsed.ip, quote, &flow).is_none() {
        return Verdict::drop(datapath, DropReason::EditFailed);
    }
    datapath.count_forwarded(flow.service, flow.backend, true, datapath.packet().length() as u64);
    Verdict::Deliver
}

/// Reads the packet that an ICMP error quotes into `quote`, and the tuple of its answers into `key`;
/// false if it is no error, or about something that we do not handle.
#[inline(always)]
fn read_quote<D: Tables<F>, F: Parse>(datapath: &D, scratch: &mut Scratch<F::Address>) -> bool {
    let packet = datapath.packet();
    let Scratch { parsed, quote, key, .. } = scratch;
    let Some(icmp) = packet.at::<Icmp>(parsed.ip.l4) else { return false };
    if parsed.ip.part != Part::Whole || !is_error::<F>(icmp.kind[0]) {
        return false;
    }
    quote.l3 = parsed.ip.l4 + size_of::<Icmp>();
    if !F::parse(packet, false, quote)
        || matches!(quote.part, Part::Later(_))
        || !matches!(quote.protocol, IPPROTO_TCP | IPPROTO_UDP)
        || quote.source != parsed.ip.destination
    {
        return false;
    }
    let Some(ports) = packet.at::<Udp>(quote.l4) else { return false };
    // The error travels against the packet that it quotes, like that packet's answer.
    key.source = quote.destination;
    key.destination = quote.source;
    key.source_port = ports.destination_port;
    key.destination_port = ports.source_port;
    key.protocol = u32::from(quote.protocol);
    true
}

/// Edits the sequence number of a quoted segment of a backend, whose number the client has seen with
/// `delta` added. Whoever does not find it among those that it has sent does not believe the error (RFC
/// 5927, section 4.1). On its own for the sake of the stack.
#[inline(never)]
fn edit_sequence<P: Packet, A>(packet: P, ip: &Ip<A>, quoted_l4: usize, delta: u32) -> Option<()> {
    let field = packet.at::<[u8; 4]>(quoted_l4 + 4)?;
    let old = *field;
    let new = u32::from_be_bytes(old).wrapping_sub(delta).to_be_bytes();
    *field = new;
    let change = replaced(&old, &new);
    let mut total = change;
    if quoted_l4 + size_of::<Tcp>() <= ip.end
        && let Some(tcp) = packet.at::<Tcp>(quoted_l4)
    {
        let before = tcp.checksum;
        checksum::apply(&mut tcp.checksum, fold(change));
        total += replaced(&before, &tcp.checksum);
    }
    checksum::apply(&mut packet.at::<Icmp>(ip.l4)?.checksum, fold(total));
    Some(())
}

/// Edits the quote, the outer header, and the ICMP checksum, which covers the quote and in IPv6 the
/// outer addresses too.
#[inline(never)]
pub fn edit<P: Packet, F: IpFamily>(
    packet: P,
    ip: &Ip<F::Address>,
    quote: &Ip<F::Address>,
    flow: &Flow<F::Address>,
) -> Option<()> {
    let mut change = edit_quote::<P, F>(packet, ip, quote, flow)?;
    // Towards or from a backend on this node the sender keeps its address: unlike with full NAT,
    // everybody on that way can be answered. Only the backend itself goes by the VIP.
    let keeps = flow.is_local() && ip.source != quote.destination;
    let source = if keeps { &ip.source } else { &flow.new_source };
    let outer = F::replaced(&ip.source, source) + F::replaced(&ip.destination, &flow.new_destination);
    let header = packet.at::<F::Header>(ip.l3)?;
    header.readdress(source, &flow.new_destination);
    // On this node the stack takes the hop off.
    let (hops, hop_delta) = if flow.is_local() { (0, 0) } else { (1, u32::from(TTL_DECREMENT)) };
    header.spend(hops, fold(outer + hop_delta));
    if F::VERSION == 6 {
        change += outer;
    }
    checksum::apply(&mut packet.at::<Icmp>(ip.l4)?.checksum, fold(change));
    Some(())
}

/// Edits the quoted packet into the one that the receiver of the error has sent. Gives what that
/// adds to the ICMP checksum.
#[inline(always)]
fn edit_quote<P: Packet, F: IpFamily>(
    packet: P,
    ip: &Ip<F::Address>,
    quote: &Ip<F::Address>,
    flow: &Flow<F::Address>,
) -> Option<u32> {
    let addresses =
        F::replaced(&quote.source, &flow.new_destination) + F::replaced(&quote.destination, &flow.new_source);
    let mut change = addresses;
    packet.at::<F::Header>(quote.l3)?.readdress(&flow.new_destination, &flow.new_source);
    if F::VERSION == 4 {
        let field = &mut packet.at::<Ipv4>(quote.l3)?.checksum;
        let old = *field;
        checksum::apply(field, fold(addresses));
        change += replaced(&old, field);
    }
    let ports = packet.at::<Udp>(quote.l4)?;
    let ports_change = replaced(&ports.source_port, &flow.new_destination_port)
        + replaced(&ports.destination_port, &flow.new_source_port);
    ports.source_port = flow.new_destination_port;
    ports.destination_port = flow.new_source_port;
    change += ports_change;
    // The checksum of TCP lies beyond the eight bytes that a quote must have.
    let offset = quote.l4 + if quote.protocol == IPPROTO_TCP { 16 } else { 6 };
    if offset + 2 <= ip.end
        && let Some(field) = packet.at::<[u8; 2]>(offset)
    {
        let old = *field;
        if quote.protocol == IPPROTO_TCP {
            checksum::apply(field, fold(addresses + ports_change));
        } else {
            checksum::apply_udp(field, fold(addresses + ports_change));
        }
        change += replaced(&old, field);
    }
    Some(change)
}
