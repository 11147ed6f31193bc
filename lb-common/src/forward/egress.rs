//! Packets that leave the node: the replies of backends on this node get the VIP as their source.
//! Everything else passes untouched.
//!
//! The client's packets have been handed to the node's stack (`Verdict::Deliver`), so the replies
//! come out of it, routed to the client. The hop, the way and the Ethernet header are the stack's.

use super::emit::Parsed;
use super::fragment;
use super::icmp;
use super::ip::{IpFamily, IpHeader};
use super::parse::{self, Parse, Part};
use super::platform::{ChecksumChange, Datapath, Packet, Tables};
use super::progress::{Mark, Progress};
use super::scratch::Scratch;
use super::slow::{follow, is_half_of_another, mark_of};
use super::tcp_state::{self, Step};
use super::wire::{ETHER_TYPE_IPV4, ETHER_TYPE_IPV6, TCP_RST, TCP_SYN, Udp};
use super::{Verdict, pair};
use crate::abi::{DropReason, Flow, FlowFlags, FlowState, IPPROTO_TCP, Tick, idle_ticks};

/// Decides about a packet of a family on its way out of the node.
#[inline(always)]
pub fn egress<D: Tables<F>, F: Parse>(datapath: &D) -> Verdict {
    let (Some(link), Some(scratch)) = (datapath.link(), datapath.scratch()) else {
        return Verdict::Pass;
    };
    let expected = if F::VERSION == 4 { ETHER_TYPE_IPV4 } else { ETHER_TYPE_IPV6 };
    if link.ether_type != expected {
        return Verdict::Pass;
    }
    scratch.parsed.link = link;
    scratch.parsed.ip.l3 = link.l3;
    if !F::parse(datapath.packet(), true, &mut scratch.parsed.ip) {
        return Verdict::Pass;
    }
    if let Part::Later(identification) = scratch.parsed.ip.part {
        return later::<D, F>(datapath, scratch, identification);
    }
    if scratch.parsed.ip.protocol == F::ICMP {
        datapath.pull(parse::REACH);
        return icmp::translate_reply::<D, F>(datapath, scratch);
    }
    let Scratch { parsed, key, .. } = scratch;
    if !parse::transport(datapath.packet(), &parsed.ip, &mut parsed.transport) {
        return Verdict::Pass;
    }
    key.source = parsed.ip.source;
    key.destination = parsed.ip.destination;
    key.source_port = parsed.transport.source_port;
    key.destination_port = parsed.transport.destination_port;
    key.protocol = u32::from(parsed.ip.protocol);
    reply::<D, F>(datapath, scratch)
}

/// Whether an entry is one whose packets are translated here.
#[inline(always)]
pub fn is_ours<A>(flow: &Flow<A>) -> bool {
    const LOCAL_REPLY: u8 = FlowFlags::LOCAL | FlowFlags::REPLY;
    flow.status.flags & (LOCAL_REPLY | FlowFlags::FOREIGN) == LOCAL_REPLY
}

#[inline(always)]
fn reply<D: Tables<F>, F: IpFamily>(datapath: &D, scratch: &mut Scratch<F::Address>) -> Verdict {
    let Scratch { parsed, key, peer_key, cursor, .. } = scratch;
    let (mut flow, established) = match datapath.established(key) {
        Some(flow) => (flow, true),
        None => match datapath.transient(key) {
            Some(flow) => (flow, false),
            None => return Verdict::Pass,
        },
    };
    if !is_ours(&flow) {
        return Verdict::Pass;
    }
    let now = datapath.now();
    let state = flow.state();
    let is_tcp = parsed.ip.protocol == IPPROTO_TCP;
    let next = if is_tcp {
        if is_foreign(state, parsed.transport.flags) {
            leave_alone::<D, F>(datapath, scratch, &mut flow, now);
            return Verdict::Pass;
        }
        if !established && is_half_of_another::<D, F>(datapath, key, peer_key, &flow) {
            return Verdict::drop(datapath, DropReason::NoFlow);
        }
        match tcp_state::step(state, parsed.transport.flags, true, false) {
            Step::To(next) => next,
            Step::Stay | Step::Renew => state,
        }
    } else {
        if idle_ticks(now, flow.last_seen) > datapath.timeout(state) {
            // What the endpoint sends there so much later is no answer.
            return Verdict::Pass;
        }
        FlowState::UdpReplied
    };
    // One path from here on, not one for each state: the verifier would follow them all.
    let progress = Progress { established, state, next }.forget(datapath, cursor);
    if flow.last_seen != now {
        flow.last_seen = now;
    }
    let left = if parsed.ip.protocol == IPPROTO_TCP {
        mark_of(datapath, cursor, parsed, &flow, progress.next())
    } else {
        Mark::NONE
    };
    let left = left.forget(datapath, cursor);
    let verdict = translate::<D, F>(datapath, parsed, &flow);
    if progress.matters() {
        follow::<D, F>(datapath, scratch, &mut flow, progress, left);
    }
    remember_first::<D, F>(datapath, scratch, verdict);
    verdict
}

/// Whether a segment shows that the backend has another connection with the client's tuple, one that
/// does not come by a VIP: it does not answer the SYN, or it answers one that did not come by us.
#[inline(always)]
fn is_foreign(state: FlowState, flags: u8) -> bool {
    match state {
        FlowState::SynSent => flags & (TCP_SYN | TCP_RST) == 0,
        FlowState::TimeWait | FlowState::Reset => flags & TCP_SYN != 0,
        _ => false,
    }
}

/// Keeps off a tuple that is another connection's. The client's next SYN finds no entry of its own,
/// this one in use, and takes another port.
#[inline(always)]
fn leave_alone<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
    flow: &mut Flow<F::Address>,
    now: Tick,
) {
    pair::set_peer_key(&mut scratch.peer_key, flow, scratch.key.protocol);
    datapath.remove_transient(&scratch.peer_key);
    flow.status.state = FlowState::Established as u8;
    flow.status.flags |= FlowFlags::FOREIGN;
    flow.last_seen = now;
}

/// Edits addresses, ports and checksums.
#[inline(always)]
fn translate<D: Datapath, F: IpFamily>(
    datapath: &D,
    parsed: &Parsed<F::Address>,
    flow: &Flow<F::Address>,
) -> Verdict {
    let ip = &parsed.ip;
    let bytes = datapath.packet().length() as u64;
    if !matches!(ip.part, Part::Later(_)) {
        let change = ChecksumChange::of_tuple::<F>(ip.l4, &parsed.key(), flow);
        if datapath.add_to_checksum(change).is_err() {
            return Verdict::drop(datapath, DropReason::EditFailed);
        }
        let Some(header) = datapath.packet().at::<Udp>(ip.l4) else {
            return Verdict::drop(datapath, DropReason::EditFailed);
        };
        header.source_port = flow.new_source_port;
        header.destination_port = flow.new_destination_port;
    }
    let Some(header) = datapath.packet().at::<F::Header>(ip.l3) else {
        return Verdict::drop(datapath, DropReason::EditFailed);
    };
    header.deliver(&flow.new_source, &flow.new_destination, flow.l3_checksum_delta);
    datapath.count_forwarded(flow.service, flow.backend, true, bytes);
    Verdict::Deliver
}

#[inline(always)]
fn remember_first<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
    verdict: Verdict,
) {
    if let (Part::First(identification), Verdict::Deliver) = (scratch.parsed.ip.part, verdict) {
        fragment::remember::<D, F>(datapath, scratch, identification);
    }
}

/// A later fragment, by the flow of its first one.
#[inline(always)]
fn later<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
    identification: [u8; 4],
) -> Verdict {
    let Some(flow) = fragment::find::<D, F>(datapath, scratch, identification) else { return Verdict::Pass };
    if !is_ours(&flow) {
        return Verdict::Pass;
    }
    translate::<D, F>(datapath, &scratch.parsed, &flow)
}
