//! How an entry's connections are spread over its backends: the slots, and the flags that say how they
//! are read. Both change in one step, with the flip of the Service entry.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use lb_common::abi::ServiceFlags;

use super::{Batch, Compiler, Entry, Round};
use crate::{
    model::{DesiredBackend, DesiredEntry, Scheduler, ServiceKey, SlowStart},
    plan::{
        maglev,
        slots::{MAXIMUM_WEIGHTED_SLOTS, slot_order},
    },
    ports::MapOp,
};

/// A backend that takes new connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Taker {
    address: SocketAddr,
    weight: u32,
    index: u32,
}

impl Compiler {
    /// Takes note of backends that come to others, and of when their shares grow.
    pub(super) fn plan_steps(
        &mut self,
        key: &ServiceKey,
        desired: &DesiredEntry,
        entry: &mut Entry,
        now: Duration,
    ) {
        let takers = desired.backends.iter().filter(|(_, backend)| backend.takes_connections());
        let length = growth(desired);
        entry.ramps.update(takers.map(|(address, _)| *address), length, now);
        match entry.ramps.next_step(length, now) {
            Some(at) => drop(self.steps.insert(key.clone(), at)),
            None => drop(self.steps.remove(key)),
        }
    }

    /// Slots go to a fresh region, which the Service entry flips to.
    pub(super) fn plan_slots(
        &mut self,
        key: &ServiceKey,
        desired: &DesiredEntry,
        entry: &mut Entry,
        batch: &mut Batch,
        round: &mut Round<'_>,
    ) {
        let takers: Vec<Taker> = entry
            .backends
            .iter()
            .map(|(address, seat)| (*address, desired.backends[address], seat.index))
            .filter(|(_, backend, _)| backend.takes_connections())
            .map(|(address, backend, index)| {
                let factor = entry.ramps.factor(&address, growth(desired), round.now);
                Taker { address, weight: backend.weight * factor, index }
            })
            .collect();
        let is_settled = desired.scheduler == Scheduler::Maglev && entry.table_of.as_ref() == Some(&takers);
        if !is_settled {
            self.spread(key, desired.scheduler, takers, entry, round);
        }
        if let Some(region) = entry.region
            && self.actual.slots(region.first, region.count) != Some(&entry.slots)
        {
            batch.ops.push(MapOp::SetSlots { first: region.first, backends: entry.slots.clone() });
        }
    }

    /// Finds room for the slots that a scheduler asks for, or makes do with fewer.
    fn spread(
        &mut self,
        key: &ServiceKey,
        scheduler: Scheduler,
        takers: Vec<Taker>,
        entry: &mut Entry,
        round: &mut Round<'_>,
    ) {
        entry.table_of = None;
        self.waiting.remove(key);
        if scheduler == Scheduler::Maglev {
            let size = maglev::size(takers.len());
            // Asked before the table is computed, which takes long.
            let may_fit = size as usize == entry.slots.len() || self.slot_regions.has_room(size, round.now);
            if may_fit && self.seat(entry, lookup_table(&takers), ServiceFlags::MAGLEV, round.now) {
                entry.table_of = Some(takers);
                return;
            }
            self.waiting.insert(key.clone(), size);
            let text = format!(
                "the map slots ({} entries) has no room for the lookup table of {key} ({} slots): its \
                 connections go in turn; use the scheduler maglev for fewer Services",
                self.limits.slots, size,
            );
            round.makes_do(key, text);
        }
        let (slots, flags) = match scheduler {
            Scheduler::LeastConnections => {
                (takers.iter().map(|taker| taker.index).collect(), ServiceFlags::LEAST_CONNECTIONS)
            }
            Scheduler::RoundRobin | Scheduler::Maglev => (in_turn(&takers), 0),
        };
        if !self.seat(entry, slots, flags, round.now) {
            let text = format!(
                "the map slots is full ({} entries): connections of {key} are not spread as they should be",
                self.limits.slots
            );
            round.short_of(key, text);
            make_do(entry, &takers);
        }
    }

    /// Gives an entry these slots; says whether there is room.
    fn seat(&mut self, entry: &mut Entry, wanted: Vec<u32>, scheduling: u8, now: Duration) -> bool {
        if wanted != entry.slots {
            let count = u32::try_from(wanted.len()).unwrap_or(u32::MAX);
            let fresh = if count == 0 { None } else { self.slot_regions.allocate(count, now) };
            if fresh.is_some() || count == 0 {
                entry.retiring.extend(entry.region);
                entry.region = fresh;
            } else if scheduling & entry.scheduling & ServiceFlags::MAGLEV == 0
                || wanted.len() != entry.slots.len()
            {
                return false;
            }
            // Without room for a second one, a table changes in place: every word of either is right.
            entry.slots = wanted;
        }
        entry.scheduling = scheduling;
        true
    }
}

/// How slowly the shares of new backends grow. In a lookup table they do not: it would be another one on
/// each node, and with each step.
fn growth(desired: &DesiredEntry) -> Option<SlowStart> {
    desired.slow_start.filter(|_| desired.scheduler != Scheduler::Maglev)
}

/// A backend with the weight that the kernel compares by, if it does.
pub(super) fn compared_weight(
    desired: &DesiredEntry,
    entry: &Entry,
    address: SocketAddr,
    now: Duration,
) -> DesiredBackend {
    let mut backend = desired.backends[&address];
    if desired.scheduler == Scheduler::LeastConnections {
        backend.weight *= entry.ramps.factor(&address, growth(desired), now);
    }
    backend
}

/// Slots for connections that go in turn.
fn in_turn(takers: &[Taker]) -> Vec<u32> {
    let weights: Vec<u32> = takers.iter().map(|taker| taker.weight).collect();
    let order = slot_order(&weights, MAXIMUM_WEIGHTED_SLOTS);
    order.into_iter().map(|taker| takers[taker].index).collect()
}

fn lookup_table(takers: &[Taker]) -> Vec<u32> {
    let backends: Vec<_> = takers.iter().map(|taker| (taker.address, taker.weight)).collect();
    maglev::table(&backends).into_iter().map(|taker| takers[taker].index).collect()
}

/// Without room for a fresh region, backends that have gone are replaced in the slots that there
/// are: one word each, so that packets see valid slots at every moment.
fn make_do(entry: &mut Entry, takers: &[Taker]) {
    let active: BTreeSet<u32> = takers.iter().map(|taker| taker.index).collect();
    let mut others = takers.iter().map(|taker| taker.index).cycle();
    for slot in &mut entry.slots {
        if !active.contains(slot)
            && let Some(other) = others.next()
        {
            *slot = other;
        }
    }
}
