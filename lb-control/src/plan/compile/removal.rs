//! What has to go: entries, and what nobody accounts for.

use std::collections::{BTreeSet, HashSet};

use lb_common::abi::ServiceName;

use super::{Batch, Compiler, REFUSING, Region, Round, name::wide};
use crate::{
    model::ServiceKey,
    ports::{MapOp, Vip},
};

impl Compiler {
    /// Plans the removal of an entry: first nothing leads to it, then it is emptied, then its
    /// name goes, so that an agent that dies in between finds what is left to do.
    pub(super) fn plan_removal(&mut self, key: &ServiceKey, round: &mut Round<'_>) {
        let Some(mut entry) = self.entries.remove(key) else { return };
        entry.removed = true;
        let seats = std::mem::take(&mut entry.backends);
        entry.leaving.extend(seats.into_values().map(|seat| seat.index));
        entry.retiring.extend(entry.region.take());
        entry.slots.clear();
        entry.table_of = None;
        self.steps.remove(key);
        self.waiting.remove(key);
        entry.settled_ranges = None;
        let index = entry.index;
        let vip = Vip::new(key.vip, key.port, key.protocol.number());
        let mut batch = Batch { owner: Some(key.clone()), ..Batch::default() };
        if self.claims.get(&vip) == Some(key) {
            self.claims.remove(&vip);
        }
        if self.claims.contains_key(&vip) {
            // Another entry takes it over, and has it by then.
            batch.requires.extend(round.vip_batch.get(&vip));
        } else if self.actual.vips.get(&vip) == Some(&index) {
            batch.ops.push(MapOp::DeleteVip { vip });
        }
        // Even if it is empty already: this is what gives back its regions.
        if self.actual.service(index) != REFUSING || !entry.retiring.is_empty() {
            batch.ops.push(MapOp::SetService { index, value: REFUSING });
        }
        self.forget_clients(index, &mut batch.ops);
        self.plan_leaving(&mut entry, &mut batch);
        batch.ops.push(MapOp::ClearServiceCounters { index });
        batch.ops.push(MapOp::SetServiceName { index, value: Box::new(ServiceName::default()) });
        self.owners.insert(index, key.clone());
        self.entries.insert(key.clone(), entry);
        round.delta.batches.push(batch);
    }

    /// Plans the removal of everything that belongs to no entry: remains of an agent that died, or
    /// written by hand.
    pub(super) fn plan_strays(&self, round: &mut Round<'_>) {
        let mut batch = Batch::default();
        let mut vips: Vec<Vip> = self.actual.vips.keys().copied().collect();
        vips.retain(|vip| !self.claims.contains_key(vip) && !self.is_being_removed(vip, round));
        vips.sort_by_key(|vip| (vip.socket(), vip.protocol()));
        batch.ops.extend(vips.into_iter().map(|vip| MapOp::DeleteVip { vip }));
        let is_stray = |index: &u32| !self.owners.contains_key(index);
        for (index, value) in self.actual.services.iter().filter(|(index, _)| is_stray(index)) {
            if *value != REFUSING {
                batch.ops.push(MapOp::SetService { index: *index, value: REFUSING });
            }
        }
        self.forget_stray_clients(is_stray, &mut batch.ops);
        let seated: HashSet<u32> = self
            .entries
            .values()
            .flat_map(|entry| {
                entry.backends.values().map(|seat| seat.index).chain(entry.leaving.iter().copied())
            })
            .collect();
        for index in self.actual.backends.keys().filter(|index| !seated.contains(index)) {
            if !self.actual.is_free(*index) {
                batch.ops.extend(self.free(*index));
            }
        }
        for (index, value) in self.actual.names.iter().filter(|(index, _)| is_stray(index)) {
            if *value != ServiceName::default() {
                batch.ops.push(MapOp::ClearServiceCounters { index: *index });
                batch.ops.push(MapOp::SetServiceName { index: *index, value: Box::default() });
            }
        }
        if !batch.ops.is_empty() {
            round.delta.batches.push(batch);
        }
    }

    /// Whether a removal in this round deletes the VIP already.
    fn is_being_removed(&self, vip: &Vip, round: &Round<'_>) -> bool {
        let owner = self.actual.vips.get(vip).and_then(|index| self.owners.get(index));
        owner.is_some_and(|key| {
            !round.desired.entries.contains_key(key)
                && Vip::new(key.vip, key.port, key.protocol.number()) == *vip
        })
    }

    /// Gives back source addresses that no backend names, in the maps or in what is desired.
    pub(super) fn retire_snat(&mut self, round: &Round<'_>) {
        let until = round.now + self.settings.grace;
        let named: BTreeSet<Region> = self
            .actual
            .backends
            .values()
            .map(|backend| Region { first: backend.snat_first.into(), count: backend.snat_count.into() })
            .collect();
        let wanted: BTreeSet<Vec<[u8; 16]>> = round
            .paths
            .values()
            .map(|path| path.snat.iter().map(|address| wide(*address)).collect())
            .collect();
        self.snat.retain(until, |list, region| named.contains(&region) || wanted.contains(list));
    }
}
