//! Everything but the packets in the middle of an established flow: connections that begin and
//! end, ICMP, fragments, VLAN tags, options, refusals.

use super::emit::{self, Parsed};
use super::ip::IpFamily;
use super::pair::{
    ask_again, copy_hop, demote, is_peer, is_stream, promote, rebuild_peer, set_peer_key, set_way_back,
};
use super::parse::{self, Parse, Part, Transport};
use super::platform::{Datapath, Tables};
use super::progress::{Mark, Packed, Progress};
use super::scratch::Scratch;
use super::tcp_options;
use super::tcp_state::{self, Step};
use super::wire::{ETHER_TYPE_IPV4, ETHER_TYPE_IPV6, TCP_ACK, TCP_RST, TCP_SYN};
use super::{Verdict, cache, cookie, fragment, icmp, new_flow, refuse, schedule, segment};
use crate::abi::{
    DropReason, Flow, FlowFlags, FlowKey, FlowState, IPPROTO_TCP, IPPROTO_UDP, NextHop, SynCookies,
    idle_ticks,
};

/// What the slow path says of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slow {
    /// The verdict.
    Done(Verdict),
    /// It is of no flow that is known: [`unknown`](super::unknown) decides.
    Unknown,
    /// The same, and it may bring a SYN cookie back or be answered with one: [`cookie`](super::cookie())
    /// decides.
    Cookie,
    /// It is of a flow that began with a SYN cookie: [`follow_cookie`] decides.
    FollowCookie,
}

/// What [`known`] says of a packet of a flow that began with a SYN cookie, unless it is asked about those.
const OF_COOKIE: usize = usize::MAX;

/// Decides about any packet of a family that is not of an unknown flow. Packets of other kinds are
/// passed.
#[inline(always)]
pub fn slow<D: Tables<F>, F: Parse>(datapath: &D) -> Slow {
    const PASS: Slow = Slow::Done(Verdict::Pass);
    let (Some(link), Some(scratch)) = (datapath.link(), datapath.scratch()) else {
        return PASS;
    };
    let expected = if F::VERSION == 4 { ETHER_TYPE_IPV4 } else { ETHER_TYPE_IPV6 };
    if link.ether_type != expected {
        return PASS;
    }
    datapath.pull(parse::REACH);
    scratch.parsed.link = link;
    scratch.parsed.ip.l3 = link.l3;
    if !F::parse(datapath.packet(), true, &mut scratch.parsed.ip) {
        return PASS;
    }
    if let Part::Later(identification) = scratch.parsed.ip.part {
        return Slow::Done(fragment::later::<D, F>(datapath, scratch, identification));
    }
    if scratch.parsed.ip.protocol == F::ICMP {
        return Slow::Done(icmp::translate::<D, F>(datapath, scratch));
    }
    let Scratch { parsed, key, .. } = scratch;
    if !parse::transport(datapath.packet(), &parsed.ip, &mut parsed.transport) {
        return PASS;
    }
    key.source = parsed.ip.source;
    key.destination = parsed.ip.destination;
    key.source_port = parsed.transport.source_port;
    key.destination_port = parsed.transport.destination_port;
    key.protocol = u32::from(parsed.ip.protocol);
    decide::<D, F, false>(datapath, scratch)
}

/// Decides about a packet for which [`slow`] said [`Slow::FollowCookie`]: a program of its own, which is
/// there only where cookies are in use. The paths through what stands in for either side would be too many
/// for the verifiers of older kernels, beside all others.
#[inline(always)]
pub fn follow_cookie<D: Tables<F>, F: IpFamily>(datapath: &D) -> Slow {
    datapath.scratch().map_or(Slow::Done(Verdict::Pass), |scratch| decide::<D, F, true>(datapath, scratch))
}

#[inline(always)]
fn decide<D: Tables<F>, F: IpFamily, const COOKIES: bool>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
) -> Slow {
    scratch.refusal = refuse::NOTHING;
    let known = known::<D, F, COOKIES>(datapath, scratch);
    let known = datapath.forget(&mut scratch.verdict, known);
    let refusal = scratch.refusal;
    let refusal = datapath.forget(&mut scratch.refusal, refusal);
    if refusal != refuse::NOTHING {
        return Slow::Done(refuse::carry_out::<D, F>(datapath, &scratch.parsed, refusal));
    }
    if known == OF_COOKIE {
        return Slow::FollowCookie;
    }
    if known == 0 {
        let asks = scratch.parsed.ip.protocol == IPPROTO_TCP
            && datapath.config().is_some_and(|config| config.syn_cookies != SynCookies::OFF);
        return if asks { Slow::Cookie } else { Slow::Unknown };
    }
    remember_first::<D, F>(datapath, scratch, known);
    Slow::Done(Verdict::unpack(known))
}

/// If the packet is the first fragment of a datagram and goes out, the others are to follow it.
#[inline(always)]
pub fn remember_first<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
    packed: usize,
) {
    if let Part::First(identification) = scratch.parsed.ip.part
        && Verdict::goes_out(packed)
    {
        fragment::remember::<D, F>(datapath, scratch, identification);
    }
}

/// What is to happen to a packet of a known flow, packed, or `scratch.refusal`; 0 if the flow is over
/// and the packet begins another; [`OF_COOKIE`].
#[inline(always)]
#[expect(clippy::too_many_lines, reason = "one decision after the other, over the same scratch")]
fn known<D: Tables<F>, F: IpFamily, const COOKIES: bool>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
) -> usize {
    let Scratch {
        parsed,
        key,
        peer_key,
        hop,
        mtu,
        cursor,
        verdict: kept,
        flow: rebuilt,
        segment: replacement,
        ..
    } = scratch;
    let (mut flow, established) = match datapath.established(key) {
        Some(flow) => (flow, true),
        None => match datapath.transient(key) {
            Some(flow) => (flow, false),
            None => return 0,
        },
    };
    if is_for_another_hook(datapath, &flow) {
        return Verdict::Pass.pack();
    }
    if !established
        && (!flow.is_reply() || parsed.ip.protocol == IPPROTO_TCP)
        && is_half_of_another::<D, F>(datapath, key, peer_key, &flow)
    {
        if flow.is_reply() {
            // As the client would answer it, which waits for another backend's SYN-ACK.
            scratch.refusal = refuse::connection::<D, F>(datapath, parsed, flow.service, DropReason::NoFlow);
            return Verdict::Pass.pack();
        }
        return 0;
    }
    if !COOKIES && flow.status.flags & FlowFlags::EDIT_SEQUENCE != 0 {
        return OF_COOKIE;
    }
    let now = datapath.now();
    let state = flow.state();
    let is_tcp = parsed.ip.protocol == IPPROTO_TCP;
    let next = if is_tcp {
        let answers = answers_syn_ack(parsed, &flow);
        match tcp_state::step(state, believed(parsed, &flow, state), flow.is_reply(), answers) {
            Step::Stay => state,
            Step::To(next) => next,
            Step::Renew => return renew::<D, F>(datapath, scratch, &mut flow, established),
        }
    } else if flow.is_reply() {
        FlowState::UdpReplied
    } else {
        if idle_ticks(now, flow.last_seen) > datapath.timeout(state) {
            return renew::<D, F>(datapath, scratch, &mut flow, established);
        }
        state
    };
    // One path from here on, not one for each state: the verifier would follow them all.
    let progress = Progress { established, state, next }.forget(datapath, cursor);
    if parsed.ip.hops_left <= 1 && !flow.is_local() {
        scratch.refusal = refuse::expired::<F>();
        return Verdict::Pass.pack();
    }
    let way = find_hop::<D, F>(datapath, &mut flow, hop, mtu);
    if way == Way::Elsewhere {
        return leave_to_tc(datapath).pack();
    }
    if way == Way::Gone {
        // The backend is gone. A UDP session goes on with another one; TCP has to be told.
        if parsed.ip.protocol == IPPROTO_TCP && parsed.transport.flags & (TCP_SYN | TCP_ACK) != TCP_SYN {
            scratch.refusal =
                refuse::connection::<D, F>(datapath, parsed, flow.service, DropReason::BackendGone);
            return Verdict::Pass.pack();
        }
        return renew::<D, F>(datapath, scratch, &mut flow, progress.established());
    }
    if COOKIES && flow.status.flags & FlowFlags::EDIT_SEQUENCE != 0 {
        let done = cookie::stand_in::<D, F>(datapath, parsed, &mut flow, replacement);
        match datapath.forget(cursor, done as usize) as u32 {
            cookie::GO_ON => {}
            cookie::REPLACE if segment::replace::<D, F>(datapath, parsed, replacement).is_some() => {}
            cookie::RENEW => return renew::<D, F>(datapath, scratch, &mut flow, established),
            cookie::REFUSE => {
                scratch.refusal =
                    refuse::connection::<D, F>(datapath, parsed, flow.service, DropReason::NoFlow);
                return Verdict::Pass.pack();
            }
            _ => return Verdict::drop(datapath, DropReason::EditFailed).pack(),
        }
    }
    if emit::is_too_big(*mtu, emit::largest_on_wire(datapath, parsed)) {
        scratch.refusal = refuse::too_big::<F>(*mtu);
        return Verdict::Pass.pack();
    }
    ask_again(&mut flow, now);
    flow.last_seen = now;
    // The packet is edited, and may be moved, before the entries follow it: what they need of it is
    // kept.
    if !flow.is_reply() {
        set_way_back(datapath, &parsed.link, &mut rebuilt.next_hop);
    }
    let left = if parsed.ip.protocol == IPPROTO_TCP {
        mark_of(datapath, cursor, parsed, &flow, progress.next())
    } else {
        Mark::NONE
    };
    let left = left.forget(datapath, cursor);
    let verdict = emit::forward::<D, F>(datapath, parsed, &flow, hop, cursor);
    if let Verdict::Drop = verdict {
        // What does not arrive changes nothing.
        return verdict.pack();
    }
    let kept = datapath.forget(kept, verdict.pack());
    // Established flows need their other half only when something happens to them.
    if progress.matters() {
        follow::<D, F>(datapath, scratch, &mut flow, progress, left);
    }
    kept
}

/// Leaves a packet that is for a backend that only TC can send to, untouched. Without TC the stack would
/// answer it, which has nobody at the VIP.
#[inline(always)]
pub fn leave_to_tc<D: Datapath>(datapath: &D) -> Verdict {
    if datapath.config().is_some_and(|config| config.has_tc != 0) {
        Verdict::Pass
    } else {
        Verdict::drop(datapath, DropReason::NoDevice)
    }
}

/// Whether packets of a flow are translated elsewhere: replies of backends on this node where they
/// leave it, and replies that XDP may not be able to send, in TC.
#[inline(always)]
pub fn is_for_another_hook<D: Datapath, A>(datapath: &D, flow: &Flow<A>) -> bool {
    if flow.status.flags & FlowFlags::TC != 0 && !datapath.sends_by_any_device() {
        // Or TC was taken off since: XDP can send by all devices that are left.
        return datapath.config().is_some_and(|config| config.has_tc != 0);
    }
    flow.is_local() && flow.is_reply()
}

/// Whether the other direction of an entry belongs to another flow by now, into which packets of this one
/// would get. Of a client's entry, the least recently used table has forgotten the reply entry that kept
/// its source port. Of a reply entry, which stays as its port's history, the client has begun another
/// connection on the same ports, and has another backend.
#[inline(always)]
pub fn is_half_of_another<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    key: &FlowKey<F::Address>,
    peer_key: &mut FlowKey<F::Address>,
    flow: &Flow<F::Address>,
) -> bool {
    set_peer_key(peer_key, flow, key.protocol);
    match datapath.transient(peer_key).or_else(|| datapath.established(peer_key)) {
        Some(peer) => !is_peer::<F>(key, &peer),
        None => false,
    }
}

/// The control bits of a segment; none of an RST that its backend will not believe.
#[inline(always)]
fn believed<A>(parsed: &Parsed<A>, flow: &Flow<A>, state: FlowState) -> u8 {
    let Transport { flags, sequence, .. } = parsed.transport;
    if flags & TCP_RST == 0 || flow.is_reply() {
        return flags;
    }
    let is_credible = match state {
        FlowState::SynSent | FlowState::SynReceived => {
            tcp_state::is_credible_in_handshake(sequence, flow.initial_sequence())
        }
        _ => !tcp_state::is_established(state) || tcp_state::is_credible_reset(sequence, flow.mark),
    };
    if is_credible { flags } else { 0 }
}

/// Whether a client's segment acknowledges the backend's SYN-ACK.
#[inline(always)]
fn answers_syn_ack<A>(parsed: &Parsed<A>, flow: &Flow<A>) -> bool {
    parsed.transport.flags & (TCP_ACK | TCP_RST) == TCP_ACK
        && tcp_state::acknowledges(cookie::acknowledged(parsed, flow), flow.mark)
}

/// Forgets an established flow, so that the packet can begin a new one. A transient one is replaced,
/// and its reply entry tells the next user of the port about its past.
#[inline(always)]
fn renew<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
    flow: &mut Flow<F::Address>,
    established: bool,
) -> usize {
    if schedule::changes(datapath, flow, FlowState::Free) {
        // The packet may be refused, and leave the entry to the next one.
        flow.status.state = FlowState::Free as u8;
    }
    if established {
        set_peer_key(&mut scratch.peer_key, flow, scratch.key.protocol);
        datapath.remove_established(&scratch.peer_key);
        datapath.remove_established(&scratch.key);
        cache::forget::<D, F>(datapath, &scratch.peer_key);
        cache::forget::<D, F>(datapath, &scratch.key);
    } else if datapath.config().is_some_and(|config| config.syn_cookies != SynCookies::OFF) {
        // The SYN may be answered with a cookie and replace nothing: what brings the cookie back must not
        // be taken for a segment of the old connection.
        datapath.remove_transient(&scratch.key);
    }
    0
}

/// Carries a packet's effect over to both entries, and moves them where they belong.
#[inline(always)]
pub fn follow<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
    flow: &mut Flow<F::Address>,
    progress: Packed<Progress>,
    mark: Packed<Mark>,
) {
    let (established, next, mark) = (progress.established(), progress.next(), mark.unpack());
    set_peer_key(&mut scratch.peer_key, flow, scratch.key.protocol);
    let mut peer = match find::<D, F>(datapath, &scratch.peer_key, established) {
        Some(peer) if is_peer::<F>(&scratch.key, &peer) => peer,
        // The ports serve another flow by now.
        Some(_) => return,
        None if !established && matches!(next, FlowState::TimeWait | FlowState::Reset) => return,
        None => {
            // The least recently used table has forgotten one half: a flow must not limp.
            rebuild_peer::<D, F>(datapath, scratch, flow);
            let _ = if established {
                datapath.insert_established(&scratch.peer_key, &scratch.flow)
            } else {
                datapath.insert_transient(&scratch.peer_key, &scratch.flow)
            };
            let Some(peer) = find::<D, F>(datapath, &scratch.peer_key, established) else { return };
            peer
        }
    };
    if progress.changes() {
        schedule::changes(datapath, flow, next);
        // Only then: another CPU may have gone on with the flow.
        flow.status.state = next as u8;
        peer.status.state = next as u8;
    }
    if !flow.is_reply() && scratch.parsed.ip.protocol == IPPROTO_TCP && tcp_state::is_established(next) {
        flow.mark = scratch.parsed.transport.sequence;
    }
    // Both halves are in use as long as one is: whoever looks for a free port sees the reply's only.
    peer.last_seen = flow.last_seen;
    if mark.is_set {
        peer.mark = mark.value;
        peer.timestamp_delta = flow.timestamp_delta;
        peer.status.flags = (peer.status.flags & !FlowFlags::MARK_IS_TIMESTAMP) | mark.flag;
    }
    let belongs = if scratch.parsed.ip.protocol == IPPROTO_UDP {
        established || is_stream(flow, datapath.now())
    } else {
        tcp_state::is_established(next)
    };
    if belongs && !established {
        promote::<D, F>(datapath, &scratch.key, flow, &scratch.peer_key, &peer);
    } else if !belongs && established {
        demote::<D, F>(datapath, &scratch.key, flow, &scratch.peer_key, &peer);
    }
}

#[inline(always)]
fn find<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    key: &FlowKey<F::Address>,
    established: bool,
) -> Option<D::FlowRef> {
    if established { datapath.established(key) } else { datapath.transient(key) }
}

/// What later decisions need to know of a segment: the backend's initial sequence number for the
/// check of the handshake, and the client's last timestamp, as the backend sees it, for the next
/// flow on the port.
#[inline(always)]
pub fn mark_of<D: Datapath, A>(
    datapath: &D,
    cursor: &mut usize,
    parsed: &Parsed<A>,
    flow: &Flow<A>,
    next: FlowState,
) -> Mark {
    let transport = &parsed.transport;
    if flow.is_reply() {
        let is_syn_ack = next == FlowState::SynReceived && transport.flags & TCP_SYN != 0;
        return Mark { is_set: is_syn_ack, flag: 0, value: transport.sequence };
    }
    if !matches!(next, FlowState::ClientClosed | FlowState::TimeWait) {
        return Mark::NONE;
    }
    let timestamp = tcp_options::timestamp(datapath, cursor, parsed.ip.l4, transport);
    if timestamp.is_set {
        let value = timestamp.value.wrapping_add(flow.timestamp_delta);
        return Mark { is_set: true, flag: FlowFlags::MARK_IS_TIMESTAMP, value };
    }
    let payload = parsed.ip.end.saturating_sub(parsed.ip.l4 + transport.header_length) as u32;
    Mark { is_set: true, flag: 0, value: transport.sequence.wrapping_add(payload).wrapping_add(1) }
}

/// What is known of the way of a flow's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The next hop was found or, if its `ifindex` is 0, is the stack's to find or is not known.
    Found,
    /// The backend is gone.
    Gone,
    /// Another program can send there, and this one cannot: it gets the packet untouched.
    Elsewhere,
}

/// Finds the next hop of a flow's packets, and how large they may be.
#[inline(always)]
pub fn find_hop<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    flow: &mut Flow<F::Address>,
    hop: &mut NextHop,
    mtu: &mut u16,
) -> Way {
    if !flow.is_reply() {
        let Some(backend) = datapath.backend(flow.backend) else { return Way::Gone };
        if backend.generation != flow.generation || backend.state == 0 {
            return Way::Gone;
        }
        if !backend.takes_packets(datapath.sends_by_any_device()) {
            return Way::Elsewhere;
        }
        *mtu = 0;
        if flow.is_local() {
            // The stack finds it.
            hop.ifindex = 0;
        } else {
            *mtu = backend.mtu;
            new_flow::find_next_hop::<D, F>(datapath, backend, hop);
        }
        return Way::Found;
    }
    *mtu = 0;
    let mut generation = 0;
    if let Some(config) = datapath.config() {
        generation = config.route_generation;
        *mtu = config.client_mtu;
    }
    if flow.generation != generation {
        // Clients behind a VLAN tag are answered the way they came: the kernel's answer names the
        // VLAN device, not the tag.
        if u32::from_ne_bytes(flow.next_hop.vlan) == 0 {
            if let Some(found) = datapath.route(&flow.new_source, &flow.new_destination) {
                copy_hop(&mut flow.next_hop, &found);
                flow.status.flags &= !FlowFlags::OLD_WAY;
            } else {
                // With the generation left as it was, every packet would come here until there is one.
                flow.status.flags |= FlowFlags::OLD_WAY;
            }
        }
        // Last: with it, other CPUs take the way for the current one.
        flow.generation = generation;
    }
    copy_hop(hop, &flow.next_hop);
    Way::Found
}
