//! Maps that are not empty: of an agent that was here before, or changed by hand.

use std::{collections::BTreeSet, net::SocketAddr};

use anyhow::Result;
use lb_common::abi::{Backend, BackendState, ServiceFlags};

use super::{
    Actual, Compiler, Entry, Region, Rest, Seat, Settings,
    name::{narrow, parse},
};
use crate::ports::{MapStore, Vip};

impl Compiler {
    /// Takes over maps: whoever is named there keeps index, backends and slots. What makes no
    /// sense is left to [`reconcile`](Self::reconcile) with [`Scope::All`](super::Scope::All).
    ///
    /// # Errors
    /// When the maps cannot be read.
    pub fn adopt(store: &dyn MapStore, settings: Settings) -> Result<Self> {
        let mut compiler = Self::new(store.limits(), settings);
        compiler.actual = Actual::read(store, compiler.limits, &[])?;
        compiler.adopt_entries();
        compiler.adopt_backends();
        compiler.adopt_slots();
        compiler.adopt_snat();
        compiler.adopt_claims();
        Ok(compiler)
    }

    /// Reads the maps again, to find what others changed in them. Indices stay as they are.
    ///
    /// # Errors
    /// When the maps cannot be read.
    pub fn reload(&mut self, store: &dyn MapStore) -> Result<()> {
        let regions = self.entries.values().filter_map(|entry| entry.region);
        let regions: Vec<_> = regions.map(|region| (region.first, region.count)).collect();
        self.actual = Actual::read(store, self.limits, &regions)?;
        self.entries.values_mut().for_each(|entry| entry.settled_ranges = None);
        self.reserve_strays();
        Ok(())
    }

    fn adopt_entries(&mut self) {
        let mut found: Vec<_> =
            self.actual.names.iter().filter_map(|(index, name)| Some((parse(name)?, *index))).collect();
        // Of several with one name, the one that the VIP leads to.
        found.sort_by_key(|(key, index)| {
            let vip = Vip::new(key.vip, key.port, key.protocol.number());
            (self.actual.vips.get(&vip) != Some(index), *index)
        });
        for (key, index) in found {
            if !self.entries.contains_key(&key) {
                self.service_indices.reserve(index);
                self.owners.insert(index, key.clone());
                self.entries.insert(key, Entry { index, ..Entry::default() });
            }
        }
    }

    fn adopt_backends(&mut self) {
        let in_slots = self.backends_in_slots();
        let mut found: Vec<(u32, Backend)> =
            self.actual.backends.iter().map(|(i, value)| (*i, *value)).collect();
        // Of several with one address, the one that takes connections.
        found.sort_by_key(|(index, _)| (!in_slots.contains(index), *index));
        for (index, backend) in found {
            if BackendState::from_raw(backend.state) == BackendState::Free {
                // Flows from before may still name it.
                if backend.generation != 0 {
                    self.backend_indices.retire(index, Rest::UntilTold);
                }
                continue;
            }
            let address = narrow(backend.address, backend.family);
            let entry = self.owners.get(&backend.service).and_then(|key| self.entries.get_mut(key));
            if let (Some(address), Some(entry), true) = (address, entry, index != 0) {
                let address = SocketAddr::new(address, u16::from_be_bytes(backend.port));
                let seat = Seat { index, generation: backend.generation };
                entry.backends.entry(address).or_insert(seat);
            }
        }
        self.reserve_strays();
    }

    /// Indices that are in use for whatever reason are not given to others before they are freed.
    fn reserve_strays(&mut self) {
        for index in self.actual.backends.keys() {
            if !self.actual.is_free(*index) {
                self.backend_indices.reserve(*index);
            }
        }
        let named = self.actual.names.iter().filter(|(_, name)| **name != Default::default());
        for index in named.map(|(index, _)| index) {
            self.service_indices.reserve(*index);
        }
    }

    fn backends_in_slots(&self) -> BTreeSet<u32> {
        let services = self.actual.services.values();
        let slots =
            services.filter_map(|service| self.actual.slots(service.first_slot, service.slot_count()));
        slots.flatten().copied().collect()
    }

    fn adopt_slots(&mut self) {
        for entry in self.entries.values_mut() {
            let service = self.actual.service(entry.index);
            let region = Region { first: service.first_slot, count: service.slot_count() };
            let Some(slots) = self.actual.slots(region.first, region.count) else { continue };
            if region.count > 0 && self.slot_regions.reserve(region) {
                entry.region = Some(region);
                entry.slots = slots.to_vec();
                entry.scheduling = service.flags() & ServiceFlags::SCHEDULING;
            }
        }
    }

    fn adopt_snat(&mut self) {
        let named: BTreeSet<Region> = self
            .actual
            .backends
            .values()
            .filter(|backend| backend.snat_count > 0)
            .map(|backend| Region { first: backend.snat_first.into(), count: backend.snat_count.into() })
            .collect();
        for region in named {
            let (first, count) = (region.first as usize, region.count as usize);
            if let Some(list) = self.actual.snat_addresses.get(first..first + count) {
                self.snat.adopt(list.to_vec(), region);
            }
        }
    }

    fn adopt_claims(&mut self) {
        for (key, entry) in &self.entries {
            let vip = Vip::new(key.vip, key.port, key.protocol.number());
            if self.actual.vips.get(&vip) == Some(&entry.index) {
                self.claims.insert(vip, key.clone());
            }
        }
    }
}
