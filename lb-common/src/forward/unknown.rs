//! Packets of no known flow: connections begin here, or are refused.

use super::emit::Parsed;
use super::pair::{is_peer, set_peer_key};
use super::platform::{Datapath, Packet, Tables};
use super::slow::remember_first;
use super::wire::{Ethernet, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};
use super::{Verdict, client, cookie as syn_cookie, new_flow, refuse};
use super::{cookie::Handshake, ip::IpFamily, scratch::Scratch};
use crate::abi::{DropReason, IPPROTO_TCP, IPPROTO_UDP, Service, ServiceFlags};

/// Decides about a packet for which [`slow`](super::slow) said [`Slow::Unknown`](super::Slow::Unknown): it
/// has left what it found out in the scratch.
#[inline(always)]
pub fn unknown<D: Tables<F>, F: IpFamily>(datapath: &D) -> Verdict {
    decide::<D, F, false>(datapath)
}

/// The same for [`Slow::Cookie`](super::Slow::Cookie).
#[inline(always)]
pub fn cookie<D: Tables<F>, F: IpFamily>(datapath: &D) -> Verdict {
    decide::<D, F, true>(datapath)
}

#[inline(always)]
fn decide<D: Tables<F>, F: IpFamily, const COOKIES: bool>(datapath: &D) -> Verdict {
    let Some(scratch) = datapath.scratch() else { return Verdict::Pass };
    let Scratch { parsed, key, vip, .. } = scratch;
    vip.address = key.destination;
    vip.port = key.destination_port;
    vip.protocol = parsed.ip.protocol;
    let Some(service) = datapath.vip(vip) else { return Verdict::Pass };
    if !F::may_be_answered(&parsed.ip.source) || is_group_addressed(datapath) {
        // Nobody could get an answer there; the kernel drops it as a martian.
        return Verdict::Pass;
    }
    if parsed.ip.protocol == IPPROTO_UDP {
        // From one VIP to another: two Services that answer whatever comes would never stop.
        vip.address = key.source;
        vip.port = key.source_port;
        if datapath.vip(vip).is_some() {
            return Verdict::Pass;
        }
    }
    let Some(entry) = datapath.service(service) else {
        return Verdict::drop(datapath, DropReason::BadSlot);
    };
    if entry.has(ServiceFlags::PROXIED | ServiceFlags::PROXY_FINISHES)
        && is_left_to_the_proxy(entry, &scratch.parsed)
    {
        // Before the source ranges, which the listener has, too: who is connected is not asked again.
        forget_ended::<D, F>(datapath, scratch);
        return Verdict::Pass;
    }
    if entry.has(ServiceFlags::SOURCE_RANGES) && !client::is_allowed::<D, F>(datapath, scratch, service) {
        // Before any refusal: whoever may not connect does not learn that anybody is here.
        return Verdict::drop(datapath, DropReason::SourceNotAllowed);
    }
    scratch.refusal = refuse::NOTHING;
    scratch.handshake = Handshake::default();
    let step = step::<D, F, COOKIES>(datapath, scratch, service, entry);
    let step = datapath.forget(&mut scratch.cursor, step);
    if step == ANSWERED {
        return Verdict::Transmit;
    }
    if step == FAILED {
        return Verdict::drop(datapath, DropReason::EditFailed);
    }
    let verdict = if step != BEGIN {
        Verdict::Pass
    } else if entry.has(ServiceFlags::CONNECTION_RATE)
        && !client::is_below_limit::<D, F>(datapath, scratch, service)
    {
        datapath.count_refused(service);
        Verdict::drop(datapath, DropReason::ConnectionRate)
    } else {
        new_flow::begin::<D, F>(datapath, scratch, service, entry)
    };
    let verdict = datapath.forget(&mut scratch.verdict, verdict.pack());
    let refusal = scratch.refusal;
    let refusal = datapath.forget(&mut scratch.refusal, refusal);
    if refusal != refuse::NOTHING {
        return refuse::carry_out::<D, F>(datapath, &scratch.parsed, refusal);
    }
    remember_first::<D, F>(datapath, scratch, verdict);
    Verdict::unpack(verdict)
}

/// Whether the stack gets the packet, of a Service that the proxy serves or has served.
#[inline(always)]
fn is_left_to_the_proxy<A>(entry: Service, parsed: &Parsed<A>) -> bool {
    entry.has(ServiceFlags::PROXIED)
        || parsed.ip.protocol == IPPROTO_TCP && parsed.transport.flags & HANDSHAKE != TCP_SYN
}

/// A flow that has ended leaves its entries behind for a while. If its client's port begins a connection to
/// the proxy, they must not lead its segments to the backend that the flow had.
#[inline(always)]
fn forget_ended<D: Tables<F>, F: IpFamily>(datapath: &D, scratch: &mut Scratch<F::Address>) {
    let Scratch { parsed, key, out, .. } = scratch;
    if parsed.ip.protocol == IPPROTO_TCP
        && parsed.transport.flags & HANDSHAKE == TCP_SYN
        && let Some(old) = datapath.transient(key)
    {
        set_peer_key(out, &old, key.protocol);
        if datapath.transient(out).is_some_and(|peer| is_peer::<F>(key, &peer)) {
            datapath.remove_transient(out);
        }
        datapath.remove_transient(key);
    }
}

/// The flags that tell a segment that begins a connection from others.
const HANDSHAKE: u8 = TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN;

/// What is to be done with a packet to a VIP. Numbers, not an enumeration, for the kernel's verifier.
const REFUSED: usize = 0;
const BEGIN: usize = 1;
const ANSWERED: usize = 2;
const FAILED: usize = 3;

#[inline(always)]
fn step<D: Tables<F>, F: IpFamily, const COOKIES: bool>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
    service: u32,
    entry: Service,
) -> usize {
    if scratch.parsed.ip.hops_left <= 1 {
        scratch.refusal = refuse::expired::<F>();
        return REFUSED;
    }
    if scratch.parsed.ip.protocol != IPPROTO_TCP {
        return BEGIN;
    }
    let begins = scratch.parsed.transport.flags & HANDSHAKE == TCP_SYN;
    if !COOKIES {
        if begins {
            return BEGIN;
        }
        scratch.refusal = refuse::connection::<D, F>(datapath, &scratch.parsed, service, DropReason::NoFlow);
        return REFUSED;
    }
    let done = if begins {
        syn_cookie::answer::<D, F>(datapath, scratch, entry)
    } else {
        syn_cookie::accept::<D, F>(datapath, scratch)
    };
    match datapath.forget(&mut scratch.cursor, done as usize) as u32 {
        syn_cookie::GO_ON => BEGIN,
        syn_cookie::ANSWERED => ANSWERED,
        syn_cookie::REFUSE => {
            let reason = DropReason::SynCookieInvalid;
            scratch.refusal = refuse::connection::<D, F>(datapath, &scratch.parsed, service, reason);
            REFUSED
        }
        _ => FAILED,
    }
}

/// Whether the frame was sent to many: a connection never is.
#[inline(always)]
fn is_group_addressed<D: Datapath>(datapath: &D) -> bool {
    datapath.packet().head::<Ethernet>().is_none_or(|ethernet| ethernet.destination[0] & 1 != 0)
}
