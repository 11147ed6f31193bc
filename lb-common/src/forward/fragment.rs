//! Fragments: the first one has the ports and decides; the others follow it.
//!
//! A later fragment that overtakes its first one cannot be told from one that is not ours, and is
//! passed to the kernel, which drops it; the sender's retransmission takes care of it.

use super::Verdict;
use super::checksum;
use super::emit;
use super::ip::IpFamily;
use super::parse::{Ip, Part};
use super::platform::{Packet, Tables};
use super::scratch::Scratch;
use super::slow::{Way, find_hop, is_for_another_hook, leave_to_tc};
use super::wire::{Ipv4, Ipv6Extension};
use crate::abi::{DropReason, Tick, idle_ticks, ticks_from_seconds};

/// How long the other fragments may take: net.ipv4.ipfrag_time.
const LIFETIME: Tick = ticks_from_seconds(30);

/// Identification that a fragment leaves with. Clients that share a source address must not share
/// identifications (RFC 6864), or the receiver mixes up their datagrams; each client's own stay
/// distinct.
#[inline(always)]
fn translated<F: IpFamily>(ip: &Ip<F::Address>, identification: [u8; 4]) -> [u8; 4] {
    let hash = F::sum(&ip.source).wrapping_mul(0x9e37_79b1);
    let mixed = u32::from_be_bytes(identification) ^ (hash >> 16);
    mixed.to_be_bytes()
}

#[inline(always)]
fn set_key<F: IpFamily>(scratch: &mut Scratch<F::Address>, identification: [u8; 4]) {
    scratch.fragment_key.source = scratch.parsed.ip.source;
    scratch.fragment_key.destination = scratch.parsed.ip.destination;
    scratch.fragment_key.identification = identification;
    scratch.fragment_key.protocol = u32::from(scratch.parsed.ip.protocol);
}

/// Remembers which flow the first fragment of a datagram belongs to.
#[inline(always)]
pub fn remember<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
    identification: [u8; 4],
) {
    set_key::<F>(scratch, identification);
    scratch.fragment.flow = scratch.key;
    scratch.fragment.created = datapath.now();
    datapath.insert_fragment(&scratch.fragment_key, &scratch.fragment);
}

/// Replaces the identification of a fragment. Gives what that adds to the sum of the packet.
#[inline(always)]
pub fn edit_identification<P: Packet, F: IpFamily>(packet: P, ip: &Ip<F::Address>) -> u32 {
    let (Part::First(identification) | Part::Later(identification)) = ip.part else { return 0 };
    let new = translated::<F>(ip, identification);
    if F::VERSION == 4 {
        if let Some(header) = packet.at::<Ipv4>(ip.l3) {
            let change = checksum::fold(checksum::replaced(&header.identification, &[new[2], new[3]]));
            header.identification = [new[2], new[3]];
            checksum::apply(&mut header.checksum, change);
        }
    } else if let Some(header) = packet.at::<Ipv6Extension>(ip.fragment_header) {
        header.identification = new;
        return checksum::replaced(&identification, &new);
    }
    0
}

/// The flow of a later fragment, if its first one is known and not too old.
#[inline(always)]
pub fn find<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
    identification: [u8; 4],
) -> Option<D::FlowRef> {
    set_key::<F>(scratch, identification);
    let first = datapath.fragment(&scratch.fragment_key)?;
    if idle_ticks(datapath.now(), first.created) > LIFETIME {
        return None;
    }
    datapath.established(&first.flow).or_else(|| datapath.transient(&first.flow))
}

/// Forwards a later fragment, by the flow of its first one.
#[inline(always)]
pub fn later<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
    identification: [u8; 4],
) -> Verdict {
    set_key::<F>(scratch, identification);
    let Some(first) = datapath.fragment(&scratch.fragment_key) else { return Verdict::Pass };
    let now = datapath.now();
    if idle_ticks(now, first.created) > LIFETIME {
        return Verdict::drop(datapath, DropReason::FragmentWithoutFirst);
    }
    let Some(mut flow) = datapath.established(&first.flow).or_else(|| datapath.transient(&first.flow)) else {
        return Verdict::drop(datapath, DropReason::FragmentWithoutFirst);
    };
    if is_for_another_hook(datapath, &flow) {
        return Verdict::Pass;
    }
    if scratch.parsed.ip.hops_left <= 1 && !flow.is_local() {
        // Only the first fragment is answered (RFC 792).
        return Verdict::drop(datapath, DropReason::TtlExpired);
    }
    flow.last_seen = now;
    match find_hop::<D, F>(datapath, &mut flow, &mut scratch.hop, &mut scratch.mtu) {
        Way::Found => {}
        Way::Gone => return Verdict::drop(datapath, DropReason::BackendGone),
        Way::Elsewhere => return leave_to_tc(datapath),
    }
    if emit::is_too_big(scratch.mtu, datapath.largest_on_wire(scratch.parsed.ip.l3, 0)) {
        // Only the first one is answered, here too.
        return Verdict::drop(datapath, DropReason::TooBig);
    }
    emit::forward::<D, F>(datapath, &scratch.parsed, &flow, &scratch.hop, &mut scratch.cursor)
}
