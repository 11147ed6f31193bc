//! One Service entry: what it should contain against what it does.

use std::net::SocketAddr;

use lb_common::abi::{Backend, BackendFlags, BackendState, Service};

use super::{
    Batch, Compiler, Entry, Region, Round, Seat, clients,
    name::{service_name, version, wide},
    spread::compared_weight,
};
use crate::{
    model::{DesiredBackend, DesiredEntry, Problem, Role, ServiceKey},
    ports::{MapOp, Vip},
};

impl Round<'_> {
    /// Says that a Service does not get all it needs.
    pub(super) fn short_of(&mut self, key: &ServiceKey, message: String) {
        self.short = true;
        self.delta.problems.push(Problem::error(message).about("Service", &key.service));
    }

    /// Says that a Service gets all it needs, but not all it asks for. That is no reason to try again
    /// soon: [`Compiler::next_step`] tells when there may be room.
    pub(super) fn makes_do(&mut self, key: &ServiceKey, message: String) {
        self.delta.problems.push(Problem::warning(message).about("Service", &key.service));
    }
}

impl Compiler {
    /// Plans what an entry needs.
    pub(super) fn plan_entry(&mut self, key: &ServiceKey, desired: &DesiredEntry, round: &mut Round<'_>) {
        let vip = Vip::new(key.vip, key.port, key.protocol.number());
        if let Some(owner) = self.claims.get(&vip)
            && owner != key
            && round.desired.entries.contains_key(owner)
        {
            let text = format!("{vip} is already served for Service {}", owner.service);
            round.short_of(key, text);
            return;
        }
        let Some(mut entry) = self.take_entry(key, round) else { return };
        let mut batch = Batch { owner: Some(key.clone()), ..Batch::default() };
        let mut afterwards = Vec::new();

        self.seat_backends(key, desired, &mut entry, round);
        self.plan_steps(key, desired, &mut entry, round.now);
        for (address, seat) in &entry.backends {
            let backend = compared_weight(desired, &entry, *address, round.now);
            let value = self.backend_value(key, &entry, (*address, *seat), backend, &mut batch, round);
            let actual = self.actual.backend(seat.index);
            if value == actual {
                continue;
            }
            let op = MapOp::SetBackend { index: seat.index, value };
            // What takes new connections now may not stop before the slots name it no more.
            let stops = backend.role == Role::Terminating
                && BackendState::from_raw(actual.state) == BackendState::Active
                && value.generation == actual.generation;
            if stops { afterwards.push(op) } else { batch.ops.push(op) }
        }
        self.plan_slots(key, desired, &mut entry, &mut batch, round);
        afterwards.append(&mut self.plan_clients(key, desired, &mut entry, &mut batch, round));
        let name = service_name(key, &desired.port_name);
        if self.actual.name(entry.index) != name {
            batch.ops.push(MapOp::SetServiceName { index: entry.index, value: Box::new(name) });
        }
        let Region { first, count } = entry.region.unwrap_or(Region { first: 0, count: 0 });
        let flags = clients::flags(desired) | entry.scheduling | self.proxied.flags(key, desired);
        let flipped = Service::new(first, count, flags);
        if self.actual.service(entry.index) != flipped {
            batch.ops.push(MapOp::SetService { index: entry.index, value: flipped });
        }
        self.plan_vip(key, vip, entry.index, &mut batch, round);
        batch.ops.append(&mut afterwards);
        self.plan_leaving(&mut entry, &mut batch);

        self.owners.insert(entry.index, key.clone());
        self.entries.insert(key.clone(), entry);
        if !batch.ops.is_empty() {
            round.delta.batches.push(batch);
        }
    }

    /// The entry that there is, or a new one.
    fn take_entry(&mut self, key: &ServiceKey, round: &mut Round<'_>) -> Option<Entry> {
        if let Some(mut entry) = self.entries.remove(key) {
            entry.removed = false;
            return Some(entry);
        }
        let Some(index) = self.service_indices.allocate(round.now) else {
            let text = format!(
                "the map services is full ({} entries): {key} is not served; remove Services or raise the limit",
                self.limits.services
            );
            round.short_of(key, text);
            return None;
        };
        Some(Entry { index, ..Entry::default() })
    }

    /// Gives seats to new backends and takes them from those that have gone.
    fn seat_backends(
        &mut self,
        key: &ServiceKey,
        desired: &DesiredEntry,
        entry: &mut Entry,
        round: &mut Round<'_>,
    ) {
        let gone = entry.backends.extract_if(.., |address, _| !desired.backends.contains_key(address));
        entry.leaving.extend(gone.map(|(_, seat)| seat.index));
        let mut missing = 0;
        for address in desired.backends.keys() {
            if entry.backends.contains_key(address) {
                continue;
            }
            let Some(index) = self.backend_indices.allocate(round.now) else {
                missing += 1;
                continue;
            };
            let generation = self.actual.backend(index).generation.max(1);
            entry.backends.insert(*address, Seat { index, generation });
        }
        if missing > 0 {
            let text = format!(
                "the map backends is full ({} entries): {missing} of {} backends of {key} take no connections",
                self.limits.backends,
                desired.backends.len()
            );
            round.short_of(key, text);
        }
    }

    fn backend_value(
        &mut self,
        key: &ServiceKey,
        entry: &Entry,
        (address, seat): (SocketAddr, Seat),
        desired: DesiredBackend,
        batch: &mut Batch,
        round: &mut Round<'_>,
    ) -> Backend {
        let paths = round.paths;
        let path = paths.get(&address.ip());
        let is_local = desired.local || path.is_some_and(|path| path.is_local);
        // The stack finds the way, and the client keeps its address.
        let path = path.filter(|_| !is_local);
        let snat: Vec<_> =
            path.map(|path| path.snat.iter().map(|address| wide(*address)).collect()).unwrap_or_default();
        let snat = self.place_snat(key, &snat, batch, round);
        Backend {
            address: wide(address.ip()),
            port: address.port().to_be_bytes(),
            state: match desired.role {
                Role::Active => BackendState::Active,
                Role::Terminating => BackendState::Terminating,
            } as u8
                | if path.is_some_and(|path| path.is_for_tc) { Backend::FOR_TC } else { 0 },
            family: version(address.ip()),
            generation: seat.generation,
            service: entry.index,
            snat_first: u16::try_from(snat.first).unwrap_or_default(),
            snat_count: u16::try_from(snat.count).unwrap_or_default(),
            next_hop: path.and_then(|path| path.next_hop).unwrap_or_default(),
            weight: desired.weight,
            flags: if is_local { BackendFlags::LOCAL } else { 0 },
            reserved: 0,
            // Larger ones than the field holds are no limit.
            mtu: path.and_then(|path| u16::try_from(path.mtu).ok()).unwrap_or_default(),
            reserved_end: [0; 4],
        }
    }

    /// Makes sure that source addresses are there before a backend names them.
    fn place_snat(
        &mut self,
        key: &ServiceKey,
        list: &[[u8; 16]],
        batch: &mut Batch,
        round: &mut Round<'_>,
    ) -> Region {
        let nothing = Region { first: 0, count: 0 };
        if list.is_empty() {
            return nothing;
        }
        let Some(region) = self.snat.place(list, round.now) else {
            let limit = self.limits.snat_addresses;
            round.short_of(
                key,
                format!("the map snat_addresses is full ({limit} entries): use fewer source addresses"),
            );
            return nothing;
        };
        let mine = round.delta.batches.len();
        for (index, address) in (region.first..).zip(list) {
            if self.actual.snat_address(index) == *address {
                continue;
            }
            let writer = *round.snat_batch.entry(index).or_insert_with(|| {
                batch.ops.push(MapOp::SetSnatAddress { index, address: *address });
                mine
            });
            if writer != mine && !batch.requires.contains(&writer) {
                batch.requires.push(writer);
            }
        }
        region
    }

    fn plan_vip(&mut self, key: &ServiceKey, vip: Vip, index: u32, batch: &mut Batch, round: &mut Round<'_>) {
        self.claims.insert(vip, key.clone());
        match self.actual.vips.get(&vip) {
            Some(actual) if *actual == index => return,
            Some(_) => {}
            None => {
                let (map, used, limit) = match vip {
                    Vip::V4(_) => ("vips_v4", self.actual.vips_v4, self.limits.vips_v4),
                    Vip::V6(_) => {
                        ("vips_v6", self.actual.vips.len() - self.actual.vips_v4, self.limits.vips_v6)
                    }
                };
                let planned = round.vip_batch.keys().filter(|other| !self.actual.vips.contains_key(other));
                let same = |other: &&Vip| matches!(other, Vip::V4(_)) == matches!(vip, Vip::V4(_));
                // Counting is dear, so only near the end.
                let near = used + round.vip_batch.len() >= limit as usize;
                if near && used + planned.filter(same).count() >= limit as usize {
                    let text = format!("the map {map} is full ({limit} entries): {key} is not served");
                    round.short_of(key, text);
                    return;
                }
            }
        }
        round.vip_batch.insert(vip, round.delta.batches.len());
        batch.ops.push(MapOp::SetVip { vip, service: index });
    }

    /// Frees the backends that nothing leads to any more.
    pub(super) fn plan_leaving(&self, entry: &mut Entry, batch: &mut Batch) {
        entry.leaving.retain(|index| !self.actual.is_free(*index));
        for index in &entry.leaving {
            batch.ops.extend(self.free(*index));
        }
    }

    /// A freed backend has another generation: a flow that names it is not one of the next.
    pub(super) fn free(&self, index: u32) -> [MapOp; 2] {
        let generation = self.actual.backend(index).generation.wrapping_add(1).max(1);
        let value = Backend { generation, ..Backend::default() };
        [MapOp::SetBackend { index, value }, MapOp::ClearBackendCounters { index }]
    }
}
