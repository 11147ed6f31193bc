//! A new connection: which backend, which source port, and the two entries.

use core::num::NonZeroU32;

use super::Verdict;
use super::ip::IpFamily;
use super::pair::{copy_flow, copy_hop, is_peer, set_peer_key, set_up, set_way_back, turn};
use super::platform::{Datapath, InsertFailed, Tables};
use super::scratch::Scratch;
use super::slow::leave_to_tc;
use super::snat::{self, Fit, History};
use super::tcp_options::{self, Timestamp};
use super::{client, emit, refuse, schedule};
use crate::abi::{
    Backend, DropReason, FlowFlags, FlowState, FlowStatus, IPPROTO_TCP, NextHop, Service, ServiceFlags,
    idle_ticks,
};

/// Gives a packet that begins a connection to the Service with the index `service` a backend, and
/// forwards it. If it is to be refused, `scratch.refusal` says so.
#[inline(always)]
#[expect(clippy::too_many_lines, reason = "one decision after the other, over the same scratch")]
pub fn begin<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
    service: u32,
    entry: Service,
) -> Verdict {
    if entry.slot_count() == 0 {
        scratch.refusal =
            refuse::connection::<D, F>(datapath, &scratch.parsed, service, DropReason::NoBackend);
        return Verdict::Pass;
    }
    scratch.service = entry;
    let mut index = choose::<D, F>(datapath, scratch, service);
    if scratch.handshake.flag != 0 && datapath.backend(index).is_none_or(Backend::is_local) {
        // Nobody edits numbers on the way of a backend on this node. The first one was elsewhere when the
        // cookie was given out.
        index = datapath.slot(entry.first_slot).unwrap_or(0);
        if scratch.affinity.backend != 0 {
            scratch.affinity.backend = index;
        }
    }
    let index = datapath.forget(&mut scratch.cursor, index as usize) as u32;
    let Some(backend) = datapath.backend(index) else {
        return Verdict::drop(datapath, DropReason::BadSlot);
    };
    if index == 0 || backend.state == 0 || backend.family != F::VERSION {
        return Verdict::drop(datapath, DropReason::BadSlot);
    }
    let local = if backend.is_local() { FlowFlags::LOCAL } else { 0 };
    if local != 0 && scratch.handshake.flag != 0 {
        scratch.refusal =
            refuse::connection::<D, F>(datapath, &scratch.parsed, service, DropReason::BackendGone);
        return Verdict::Pass;
    }
    scratch.hop.ifindex = 0;
    if local == 0 {
        find_next_hop::<D, F>(datapath, backend, &mut scratch.hop);
    }
    if scratch.hop.ifindex == 0 && local == 0 {
        // No entry is made: the client's retransmission takes its turn with the next backend. Where it
        // is not in turn, no other was in reach.
        return Verdict::drop(datapath, DropReason::NoNeighbour);
    }
    if local == 0 && emit::is_too_big(backend.mtu, emit::largest_on_wire(datapath, &scratch.parsed)) {
        scratch.refusal = refuse::too_big::<F>(backend.mtu);
        return Verdict::Pass;
    }
    let state =
        if scratch.parsed.ip.protocol == IPPROTO_TCP { FlowState::SynSent } else { FlowState::UdpUnreplied };
    scratch.flow.backend = index;
    scratch.flow.service = service;
    scratch.flow.last_seen = datapath.now();
    scratch.flow.status = FlowStatus {
        state: state as u8,
        flags: FlowFlags::REPLY
            | scratch.handshake.edits()
            | if local == 0 { for_tc(datapath) } else { local },
        epoch: 0,
    };
    scratch.out.destination = F::from_wide(&backend.address);
    scratch.out.destination_port = backend.port;
    scratch.out.protocol = scratch.key.protocol;
    let timestamp_delta = match claim_port::<D, F>(datapath, scratch, backend) {
        Ok(delta) => delta,
        Err(reason) => return Verdict::drop(datapath, reason),
    };
    if datapath.established(&scratch.peer_key).is_some() {
        // Between being asked for and being claimed the port got a flow of another CPU's, which is past its
        // handshake already. The client sends its packet again.
        datapath.remove_transient(&scratch.peer_key);
        return Verdict::drop(datapath, DropReason::SnatPortsExhausted);
    }
    let Scratch { parsed, key, out, flow, handshake, .. } = scratch;
    set_up::<F>(flow, key, out);
    flow.set_initial_sequence(parsed.transport.sequence);
    flow.status.flags =
        local | handshake.edits() | if timestamp_delta == 0 { 0 } else { FlowFlags::EDIT_TIMESTAMPS };
    flow.generation = backend.generation;
    // One of the two is 0.
    flow.timestamp_delta = timestamp_delta.wrapping_add(handshake.delta);
    flow.mark = if state == FlowState::UdpUnreplied {
        flow.last_seen
    } else {
        handshake.cookie.wrapping_sub(handshake.delta)
    };
    if datapath.insert_transient(key, flow).is_err() {
        datapath.remove_transient(&scratch.peer_key);
        return Verdict::drop(datapath, DropReason::TableFull);
    }
    datapath.count_new_flow(service, index);
    if scratch.service.has(ServiceFlags::LEAST_CONNECTIONS) {
        datapath.flow_opened(index);
    }
    if scratch.affinity.backend != 0 {
        scratch.affinity.generation = scratch.flow.generation;
        scratch.affinity.last_used = scratch.flow.last_seen;
        datapath.insert_affinity(&scratch.affinity_key, &scratch.affinity);
    }
    if !backend.takes_packets(datapath.sends_by_any_device()) {
        // The packet goes on as the first one of a flow that is known.
        return leave_to_tc(datapath);
    }
    emit::forward::<D, F>(datapath, &scratch.parsed, &scratch.flow, &scratch.hop, &mut scratch.cursor)
}

/// What a reply entry is marked with for the way that its client's packets come in by.
#[inline(always)]
pub fn for_tc<D: Datapath>(datapath: &D) -> u8 {
    if datapath.sends_by_any_device() { FlowFlags::TC } else { 0 }
}

/// The index of the backend that is to have the flow. `affinity.backend` says what to remember once
/// it does; 0 for nothing.
///
/// The Service entry comes by `scratch.service`, and this is a function of its own: of the ways through
/// it, the verifier need not follow each to the end of the program.
#[inline(never)]
fn choose<D: Tables<F>, F: IpFamily>(datapath: &D, scratch: &mut Scratch<F::Address>, service: u32) -> u32 {
    let entry = scratch.service;
    let Some(count) = NonZeroU32::new(entry.slot_count()) else { return 0 };
    scratch.affinity.backend = 0;
    if entry.has(ServiceFlags::MAGLEV) {
        let slot = schedule::by_client::<F>(&scratch.key, entry);
        let index = datapath.slot(entry.first_slot.wrapping_add(slot)).unwrap_or(0);
        if is_in_reach::<D, F>(datapath, &mut scratch.hop, index) {
            return index;
        }
        return schedule::next_in_reach(datapath, &mut scratch.best, entry.first_slot, slot, count, index);
    }
    let sticks = entry.has(ServiceFlags::AFFINITY);
    if sticks {
        let index = client::remembered::<D, F>(datapath, scratch, service);
        if index != 0 && is_in_reach::<D, F>(datapath, &mut scratch.hop, index) {
            return index;
        }
    }
    let index = if entry.has(ServiceFlags::LEAST_CONNECTIONS) {
        schedule::least_connections(datapath, &mut scratch.best, service, entry.first_slot, count)
    } else {
        schedule::in_turn(datapath, service, entry.first_slot, count)
    };
    if sticks {
        scratch.affinity.backend = index;
    }
    index
}

/// Whether a way to a backend is known, which is left in `hop`. One that is not there is left to the
/// caller.
#[inline(always)]
fn is_in_reach<D: Tables<F>, F: IpFamily>(datapath: &D, hop: &mut NextHop, index: u32) -> bool {
    let Some(backend) = datapath.backend(index) else { return true };
    if backend.is_local() {
        return true;
    }
    find_next_hop::<D, F>(datapath, backend, hop);
    hop.ifindex != 0
}

/// The way to a backend: what the agent keeps current or, until it has, what the kernel knows.
#[inline(always)]
pub fn find_next_hop<D: Tables<F>, F: IpFamily>(datapath: &D, backend: &Backend, hop: &mut NextHop) {
    copy_hop(hop, &backend.next_hop);
    if hop.ifindex == 0 {
        let source = datapath.snat_address(u32::from(backend.snat_first)).unwrap_or([0; 16]);
        if let Some(found) = datapath.route(&F::from_wide(&source), &F::from_wide(&backend.address)) {
            copy_hop(hop, &found);
        }
    }
}

/// Finds a source address and port towards the backend, inserts the reply entry under `peer_key`,
/// and completes `out`. Gives what has to be added to the client's timestamps.
///
/// Towards a backend on this node that is the client's own address, and its own port unless the
/// backend knows the tuple from elsewhere: by another VIP or port of a Service, or directly.
#[inline(always)]
fn claim_port<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
    backend: &Backend,
) -> Result<u32, DropReason> {
    let config = datapath.config().ok_or(DropReason::NoSnatAddress)?;
    let is_local = backend.is_local();
    if backend.snat_count == 0 && !is_local {
        return Err(DropReason::NoSnatAddress);
    }
    let hash = snat::client_hash::<F>(&scratch.key.source);
    // Before the loop, and in memory: the verifier would follow each of its paths in each turn.
    let Scratch { parsed, cursor, timestamp, flow, .. } = scratch;
    set_way_back(datapath, &parsed.link, &mut flow.next_hop);
    *timestamp = if parsed.ip.protocol == IPPROTO_TCP {
        tcp_options::timestamp(datapath, cursor, parsed.ip.l4, &parsed.transport)
    } else {
        Timestamp::default()
    };
    for attempt in 0..snat::ATTEMPTS {
        scratch.out.source_port = snat::candidate(config, scratch.key.source_port, hash, attempt);
        if is_local {
            scratch.out.source = scratch.key.source;
            if attempt == 0 {
                scratch.out.source_port = scratch.key.source_port;
            }
        } else {
            let count = u32::from(backend.snat_count).max(1);
            let index = u32::from(backend.snat_first) + hash.wrapping_add(attempt) % count;
            let address = datapath.snat_address(index).ok_or(DropReason::NoSnatAddress)?;
            scratch.out.source = F::from_wide(&address);
        }
        turn(&mut scratch.peer_key, &scratch.out);
        let Scratch { key, peer_key, out, flow, handshake, .. } = scratch;
        // Replies leave with the client's own tuple turned around.
        turn(out, key);
        set_up::<F>(flow, peer_key, out);
        turn(out, peer_key);
        flow.timestamp_delta = handshake.delta;
        flow.mark = handshake.cookie;
        flow.next_hop.ifindex = datapath.ingress_device();
        // Both tables are asked right after each other, so that the processor need not wait twice; and
        // before the insertion, which would push another flow out first, for nothing.
        if datapath.established(peer_key).is_some() {
            continue;
        }
        if let Some(old) = datapath.transient(peer_key) {
            if let Some(delta) = take_over::<D, F>(datapath, scratch, old, attempt) {
                return Ok(delta);
            }
            continue;
        }
        match datapath.insert_new_transient(peer_key, flow) {
            Ok(()) => return Ok(0),
            Err(InsertFailed::Full) => return Err(DropReason::TableFull),
            // Another CPU was faster. That is rare, and the client sends its packet again: going on would be
            // one more path for the verifier to follow from each turn into the next.
            Err(InsertFailed::Exists) => return Err(DropReason::SnatPortsExhausted),
        }
    }
    Err(DropReason::SnatPortsExhausted)
}

/// Takes over the port of a flow that has ended, if the backend will accept a new connection on it.
#[inline(always)]
fn take_over<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
    mut old: D::FlowRef,
    attempt: u32,
) -> Option<u32> {
    let before = old.status;
    let history = History {
        status: before,
        idle: idle_ticks(scratch.flow.last_seen, old.last_seen),
        timeout: datapath.timeout(old.state()),
        mark: old.mark,
    };
    let Scratch { parsed, peer_key, out, flow, timestamp, .. } = scratch;
    let delta = match snat::fit(&history, attempt, *timestamp, parsed.transport.sequence) {
        Fit::No => return None,
        Fit::Yes => 0,
        // Nobody edits them on the way of a backend on this node. On its own port a client is told
        // by the backend itself.
        Fit::ShiftTimestamps(_) if flow.is_local() && attempt == 0 => 0,
        Fit::ShiftTimestamps(_) if flow.is_local() => return None,
        Fit::ShiftTimestamps(delta) => delta,
    };
    let kept = flow.status.flags & (FlowFlags::LOCAL | FlowFlags::TC | FlowFlags::EDIT_SEQUENCE);
    flow.status.flags = FlowFlags::REPLY | kept | if delta == 0 { 0 } else { FlowFlags::EDIT_TIMESTAMPS };
    flow.status.epoch = before.epoch.wrapping_add(1);
    // One of the two is 0: connections with cookies have no timestamps.
    flow.timestamp_delta = flow.timestamp_delta.wrapping_add(delta);
    // Another CPU may want the same port: the status word decides who gets it.
    if !datapath.replace_status(&mut old.status, before, flow.status) {
        return None;
    }
    // What is left of the old client's entry would lead its stray segments into the new connection.
    set_peer_key(out, &old, peer_key.protocol);
    if datapath.transient(out).is_some_and(|client| is_peer::<F>(peer_key, &client)) {
        datapath.remove_transient(out);
    }
    turn(out, peer_key);
    copy_flow(&mut old, flow);
    Some(delta)
}
