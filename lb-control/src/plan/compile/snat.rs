//! Source addresses towards backends: lists of them, each in consecutive elements.

use std::{collections::BTreeMap, time::Duration};

use super::alloc::{Region, Regions};

/// Lists of source addresses and where they are.
pub(super) struct Snat {
    lists: BTreeMap<Vec<[u8; 16]>, Region>,
    regions: Regions,
}

impl Snat {
    pub fn new(capacity: u32) -> Self {
        // Backends name them with 16 bits.
        Self { lists: BTreeMap::new(), regions: Regions::new(capacity.min(u32::from(u16::MAX))) }
    }

    /// Where a list is, or is to be; `None` if there is no room.
    pub fn place(&mut self, list: &[[u8; 16]], now: Duration) -> Option<Region> {
        if let Some(region) = self.lists.get(list) {
            return Some(*region);
        }
        let region = self.regions.allocate(u32::try_from(list.len()).ok()?, now)?;
        self.lists.insert(list.to_vec(), region);
        Some(region)
    }

    /// Takes over a list from the maps; nothing if it is out of bounds or overlaps another.
    pub fn adopt(&mut self, list: Vec<[u8; 16]>, region: Region) {
        if !self.lists.contains_key(&list) && self.regions.reserve(region) {
            self.lists.insert(list, region);
        }
    }

    /// Gives back the lists that are not in use.
    pub fn retain(&mut self, until: Duration, in_use: impl Fn(&[[u8; 16]], Region) -> bool) {
        let unused = self.lists.extract_if(.., |list, region| !in_use(list, *region));
        for (_, region) in unused {
            self.regions.retire(region, until);
        }
    }

    pub fn next_rested(&self) -> Option<Duration> {
        self.regions.next_rested()
    }
}
