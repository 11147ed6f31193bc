//! Which of a Service's backends a new connection gets.

use core::num::{NonZeroU32, NonZeroU64};

use super::ip::IpFamily;
use super::platform::Datapath;
use super::tcp_state;
use crate::abi::{Backend, Flow, FlowKey, FlowState, Service, ServiceFlags};

/// The backend that is next in turn, exact over all CPUs; 0 if there is none.
#[inline(always)]
pub fn in_turn<D: Datapath>(datapath: &D, service: u32, first_slot: u32, count: NonZeroU32) -> u32 {
    let slot = (datapath.next_turn(service) % NonZeroU64::from(count)) as u32;
    datapath.slot(first_slot.wrapping_add(slot)).unwrap_or(0)
}

/// The slot in a lookup table of a client. It depends on nothing that differs from node to node: all
/// give a connection to the same backend.
///
/// With session affinity a client's address decides alone, so nothing need be remembered.
#[inline(always)]
#[must_use]
pub fn by_client<F: IpFamily>(key: &FlowKey<F::Address>, entry: Service) -> u32 {
    let mut hash = F::hash(&key.source);
    if !entry.has(ServiceFlags::AFFINITY) {
        let [a, b] = key.source_port;
        let [c, d] = key.destination_port;
        hash = mix(mix(hash, u32::from_be_bytes([a, b, c, d])), key.protocol);
    }
    scale(finish(hash), entry.slot_count())
}

/// So many slots are compared for a connection: all of a Service that has no more.
pub const COMPARED: u32 = 16;

/// What a backend counts for that no way is known to: it comes after all others, or it would get
/// every connection for never having any.
const OUT_OF_REACH: u32 = 1 << 30;

/// The best backend so far. It lies in memory, so that the verifier need not follow who was best when.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Best {
    backend: u32,
    weight: u32,
    flows: u32,
    /// A slot for [`Datapath::forget`].
    count: usize,
}

/// Of a lookup table, the backend of the next slot after `place` to which a way is known; `index`, which is
/// that of the place itself, if there is none among as many as are [`COMPARED`]. It depends on the client
/// as the place does.
#[inline(always)]
pub fn next_in_reach<D: Datapath>(
    datapath: &D,
    best: &mut Best,
    first_slot: u32,
    place: u32,
    count: NonZeroU32,
    index: u32,
) -> u32 {
    best.backend = index;
    for number in 1..=COMPARED {
        let slot = place.wrapping_add(number) % count;
        let other = datapath.slot(first_slot.wrapping_add(slot)).unwrap_or(0);
        if datapath.backend(other).is_some_and(is_in_reach) {
            best.backend = other;
            break;
        }
    }
    best.backend
}

/// Whether the agent knows a way to a backend.
#[inline(always)]
fn is_in_reach(backend: &Backend) -> bool {
    backend.is_local() || backend.next_hop.ifindex != 0
}

/// The backend with the fewest open flows for its weight, counting the one that it would get. Of several,
/// the next in turn. Of more slots than are [`COMPARED`], the next in turn and others that lie at a distance
/// from each other that is different each time. 0 if there is none.
#[inline(always)]
pub fn least_connections<D: Datapath>(
    datapath: &D,
    best: &mut Best,
    service: u32,
    first_slot: u32,
    count: NonZeroU32,
) -> u32 {
    let turn = datapath.next_turn(service);
    let mut place = (turn % NonZeroU64::from(count)) as u32;
    let count = count.get();
    let stride = if count <= COMPARED { 1 } else { 1 + scale(finish(turn as u32), count - 1) };
    *best = Best { weight: 1, flows: u32::MAX, ..Best::default() };
    for number in 0..COMPARED {
        // A number that says nothing of `count`: else there would be a path for each that it could be.
        if number as usize >= datapath.forget(&mut best.count, count as usize) {
            break;
        }
        let index = datapath.slot(first_slot.wrapping_add(place)).unwrap_or(0);
        place += stride;
        if place >= count {
            place -= count;
        }
        let Some(backend) = datapath.backend(index) else { continue };
        let flows = if is_in_reach(backend) { open(datapath, index) } else { OUT_OF_REACH };
        let weight = backend.weight.max(1);
        // Fractions compared without dividing.
        if u64::from(flows + 1) * u64::from(best.weight) < (u64::from(best.flows) + 1) * u64::from(weight) {
            (best.backend, best.weight, best.flows) = (index, weight, flows);
        }
    }
    best.backend
}

#[inline(always)]
fn open<D: Datapath>(datapath: &D, backend: u32) -> u32 {
    let flows = datapath.open_flows(backend);
    // Flows that end without having been counted make it negative.
    if flows < OUT_OF_REACH { flows } else { 0 }
}

/// Takes note that a flow goes from one state to another: its backend may have one less. Says whether
/// that was counted, which it must not be twice.
#[inline(always)]
pub fn changes<D: Datapath, A>(datapath: &D, flow: &Flow<A>, next: FlowState) -> bool {
    let ends = tcp_state::is_over(next)
        && !tcp_state::is_over(flow.state())
        && datapath.service(flow.service).is_some_and(|entry| entry.has(ServiceFlags::LEAST_CONNECTIONS));
    if ends {
        datapath.flow_ended(flow.backend);
    }
    ends
}

/// Takes a word into a hash: multiplicative, by the golden ratio.
#[inline(always)]
#[must_use]
pub fn mix(hash: u32, word: u32) -> u32 {
    let mixed = (hash ^ word).wrapping_mul(0x9e37_79b1);
    mixed ^ (mixed >> 15)
}

/// Lets every bit of a hash depend on all others: the finalizer of MurmurHash3.
#[inline(always)]
fn finish(mut hash: u32) -> u32 {
    hash = (hash ^ (hash >> 16)).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ (hash >> 13)).wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

/// Brings a hash into the range below `count`.
#[inline(always)]
fn scale(hash: u32, count: u32) -> u32 {
    ((u64::from(hash) * u64::from(count)) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{AddressFamily, V4, V6};

    const TABLE: u32 = 1_021;

    fn key<A>(source: A, destination: A, port: u16) -> FlowKey<A> {
        FlowKey {
            source_port: port.to_be_bytes(),
            destination_port: [0, 80],
            protocol: 6,
            source,
            destination,
        }
    }

    fn slot<F: IpFamily>(client: &[u8; 16], port: u16, flags: u8) -> u32 {
        let address = F::from_wide(client);
        by_client::<F>(&key(address, address, port), Service::new(0, TABLE, flags))
    }

    /// How far the fullest of ten tenths of the table is above the average, in percent, for tuples
    /// that differ in one place.
    fn worst_share(slots: impl Iterator<Item = u32>) -> usize {
        let (mut tenths, mut all) = ([0usize; 10], 0);
        for slot in slots {
            assert!(slot < TABLE);
            tenths[(slot * 10 / TABLE) as usize] += 1;
            all += 1;
        }
        tenths.into_iter().max().unwrap() * 1_000 / all - 100
    }

    #[test]
    fn neighbours_are_spread() {
        let v4 = |number: u32| V4::to_wide(&(0x0a00_0000 + number).to_be_bytes());
        let v6 = |number: u64, at: usize| {
            let mut wide = [0x20; 16];
            wide[at..at + 8].copy_from_slice(&number.to_be_bytes());
            V6::to_wide(&wide)
        };
        let ports = 1_024..=u16::MAX;
        assert!(worst_share(ports.clone().map(|port| slot::<V4>(&v4(1), port, 4))) < 4, "ports");
        assert!(worst_share(ports.map(|port| slot::<V6>(&v6(1, 8), port, 4))) < 4, "ports");
        for flags in [4, 4 | 2] {
            assert!(worst_share((0..60_000).map(|number| slot::<V4>(&v4(number), 40_000, flags))) < 4);
            for at in [0, 2, 8] {
                let all = (0..60_000).map(|number| slot::<V6>(&v6(number, at), 40_000, flags));
                assert!(worst_share(all) < 4, "{at}");
            }
        }
    }

    /// Nodes of other versions and byte orders must agree: these numbers never change.
    #[test]
    fn the_same_everywhere() {
        let v4 = V4::to_wide(&[198, 51, 100, 7]);
        let v6 = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
        let v4 = [(40_000, 4), (40_001, 4), (40_000, 6), (40_001, 6)]
            .map(|(port, flags)| slot::<V4>(&v4, port, flags));
        let v6 = [(40_000, 4), (40_001, 4), (40_000, 6), (40_001, 6)]
            .map(|(port, flags)| slot::<V6>(&v6, port, flags));
        assert_eq!((v4, v6), ([551, 323, 124, 124], [812, 426, 499, 499]));
    }
}
