//! The two entries of a flow: how one follows from the other, and how both move together between
//! the table of established flows and that of flows that begin or end.

use super::cache;
use super::checksum::{TTL_DECREMENT, fold, replaced};
use super::ip::IpFamily;
use super::new_flow::for_tc;
use super::parse::Link;
use super::platform::{Datapath, Packet, Tables};
use super::scratch::Scratch;
use super::wire::{Ethernet, copy_mac};
use crate::abi::{Flow, FlowFlags, FlowKey, FlowState, IPPROTO_UDP, NextHop, Tick};

/// Sets an entry up: its edit follows from the tuple that comes in and the one that goes out.
#[inline(never)]
pub fn set_up<F: IpFamily>(
    flow: &mut Flow<F::Address>,
    key: &FlowKey<F::Address>,
    out: &FlowKey<F::Address>,
) {
    let addresses = F::replaced(&key.source, &out.source) + F::replaced(&key.destination, &out.destination);
    let ports =
        replaced(&key.source_port, &out.source_port) + replaced(&key.destination_port, &out.destination_port);
    flow.new_source = out.source;
    flow.new_destination = out.destination;
    flow.new_source_port = out.source_port;
    flow.new_destination_port = out.destination_port;
    flow.l3_checksum_delta = if F::VERSION == 4 { fold(addresses + u32::from(TTL_DECREMENT)) } else { 0 };
    flow.l4_checksum_delta = fold(addresses + ports);
    flow.next_hop.ifindex = 0;
    flow.timestamp_delta = 0;
    flow.generation = 0;
    flow.mark = 0;
}

/// Copies a next hop field by field: as a whole it would be a call of `memmove`, which on BPF is a
/// loop over bytes.
#[inline(always)]
pub fn copy_hop(to: &mut NextHop, from: &NextHop) {
    to.ifindex = from.ifindex;
    copy_mac(&mut to.destination_mac, &from.destination_mac);
    copy_mac(&mut to.source_mac, &from.source_mac);
    to.vlan = u32::from_ne_bytes(from.vlan).to_ne_bytes();
}

/// Copies an entry field by field, for the same reason.
#[inline(always)]
pub fn copy_flow<A: Copy>(to: &mut Flow<A>, from: &Flow<A>) {
    to.new_source = from.new_source;
    to.new_destination = from.new_destination;
    to.new_source_port = from.new_source_port;
    to.new_destination_port = from.new_destination_port;
    to.l3_checksum_delta = from.l3_checksum_delta;
    to.l4_checksum_delta = from.l4_checksum_delta;
    copy_hop(&mut to.next_hop, &from.next_hop);
    to.backend = from.backend;
    to.service = from.service;
    to.last_seen = from.last_seen;
    to.status = from.status;
    to.generation = from.generation;
    to.timestamp_delta = from.timestamp_delta;
    to.mark = from.mark;
}

/// Copies a tuple turned around: what the other direction sends out.
#[inline(always)]
pub fn turn<A: Copy>(to: &mut FlowKey<A>, from: &FlowKey<A>) {
    to.source = from.destination;
    to.destination = from.source;
    to.source_port = from.destination_port;
    to.destination_port = from.source_port;
    to.protocol = from.protocol;
}

/// Sets a key to that of the other direction of a flow.
#[inline(always)]
pub fn set_peer_key<A: Copy>(to: &mut FlowKey<A>, flow: &Flow<A>, protocol: u32) {
    to.source = flow.new_destination;
    to.destination = flow.new_source;
    to.source_port = flow.new_destination_port;
    to.destination_port = flow.new_source_port;
    to.protocol = protocol;
}

/// Whether an entry found under the other direction's key really belongs to this flow, and not to a
/// later one on the same ports.
#[inline(always)]
pub fn is_peer<F: IpFamily>(key: &FlowKey<F::Address>, peer: &Flow<F::Address>) -> bool {
    peer.new_source == key.destination
        && peer.new_destination == key.source
        && peer.new_source_port == key.destination_port
        && peer.new_destination_port == key.source_port
}

/// Sets a next hop to the way back to whoever sent the packet at hand: its own way, turned around.
#[inline(always)]
pub fn set_way_back<D: Datapath>(datapath: &D, link: &Link, hop: &mut NextHop) {
    hop.ifindex = datapath.ingress_device();
    hop.vlan = link.vlan;
    if let Some(ethernet) = datapath.packet().head::<Ethernet>() {
        copy_mac(&mut hop.destination_mac, &ethernet.source);
        copy_mac(&mut hop.source_mac, &ethernet.destination);
    }
}

/// A power of two of ticks, as its logarithm: about a second.
const ASK_AGAIN: u32 = 6;

/// Where the kernel knew no way to the client, lets the next packet of a reply entry ask anew, once a
/// second: nobody tells that the client's gateway has been found since. To be called before `last_seen`
/// becomes `now`.
#[inline(always)]
pub fn ask_again<A>(flow: &mut Flow<A>, now: Tick) {
    if flow.status.flags & FlowFlags::OLD_WAY != 0 && (flow.last_seen ^ now) >> ASK_AGAIN != 0 {
        flow.generation = 0;
    }
}

/// Builds the lost entry of the other direction, with the key `peer_key`, anew. For a reply entry,
/// the way back must be in `flow.next_hop` of the scratch: the packet at hand was edited already.
#[inline(always)]
pub fn rebuild_peer<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
    flow: &Flow<F::Address>,
) {
    let Scratch { key, peer_key, out, flow: peer, .. } = scratch;
    turn(out, key);
    set_up::<F>(peer, peer_key, out);
    peer.backend = flow.backend;
    peer.service = flow.service;
    peer.last_seen = flow.last_seen;
    peer.status = flow.status;
    peer.status.flags = (peer.status.flags ^ FlowFlags::REPLY) & !(FlowFlags::TC | FlowFlags::OLD_WAY);
    peer.timestamp_delta = flow.timestamp_delta;
    // With a SYN cookie: what each of them knows of it, until the handshake is over.
    let begins = matches!(flow.state(), FlowState::SynSent | FlowState::SynReceived);
    if begins && flow.status.flags & FlowFlags::EDIT_SEQUENCE != 0 {
        peer.mark = if flow.is_reply() {
            flow.mark.wrapping_sub(flow.timestamp_delta)
        } else {
            flow.mark.wrapping_add(flow.timestamp_delta)
        };
    }
    if flow.is_reply() {
        peer.set_initial_sequence(0);
        // Of the endpoint that sent the packet, not of a later one with its index.
        peer.generation = match datapath.backend(flow.backend) {
            Some(backend)
                if F::from_wide(&backend.address) == key.source && backend.port == key.source_port =>
            {
                backend.generation
            }
            _ => 0,
        };
        if key.protocol == u32::from(IPPROTO_UDP) {
            peer.mark = flow.last_seen;
        }
    } else {
        peer.next_hop.ifindex = datapath.ingress_device();
        peer.status.flags |= for_tc(datapath);
    }
}

/// Moves both entries to the table of established flows. When that is full they stay where they
/// are: the flow works, but gives way to younger ones.
#[inline(always)]
pub fn promote<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    key: &FlowKey<F::Address>,
    flow: &Flow<F::Address>,
    peer_key: &FlowKey<F::Address>,
    peer: &Flow<F::Address>,
) {
    // The reply entry has to be there first: no packet may reach the backend that cannot return.
    let (reply_key, reply, client_key, client) =
        if flow.is_reply() { (key, flow, peer_key, peer) } else { (peer_key, peer, key, flow) };
    if datapath.insert_established(reply_key, reply).is_err() {
        return;
    }
    if datapath.insert_established(client_key, client).is_err() {
        datapath.remove_established(reply_key);
        // A reply may have come by meanwhile.
        cache::forget::<D, F>(datapath, reply_key);
        return;
    }
    datapath.remove_transient(reply_key);
    datapath.remove_transient(client_key);
}

/// Moves both entries to the table of flows that begin or end.
#[inline(always)]
pub fn demote<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    key: &FlowKey<F::Address>,
    flow: &Flow<F::Address>,
    peer_key: &FlowKey<F::Address>,
    peer: &Flow<F::Address>,
) {
    if datapath.insert_transient(key, flow).is_ok() && datapath.insert_transient(peer_key, peer).is_ok() {
        datapath.remove_established(key);
        datapath.remove_established(peer_key);
        cache::forget::<D, F>(datapath, key);
        cache::forget::<D, F>(datapath, peer_key);
    }
}

/// How long a UDP session must go on before it counts as established: as in nf_conntrack
/// (net/netfilter/nf_conntrack_proto_udp.c), 2 s, so that a lone question and answer never costs
/// the move.
const UDP_STREAM_AFTER: Tick = crate::abi::ticks_from_seconds(2);

/// Whether a UDP session has become a stream.
#[inline(always)]
pub fn is_stream<A>(flow: &Flow<A>, now: Tick) -> bool {
    !flow.is_reply()
        && flow.state() == FlowState::UdpReplied
        && now.wrapping_sub(flow.mark) >= UDP_STREAM_AFTER
}
