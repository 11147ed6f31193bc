//! Indices and regions of the maps, and how long what is given back must rest.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// Until when an index or region rests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rest {
    Until(Duration),
    /// Until somebody says that nothing refers to it any more.
    UntilTold,
}

/// Elements of an array map, lowest first.
#[derive(Clone, Debug)]
pub(super) struct Indices {
    capacity: u32,
    first: u32,
    /// From here on, nothing was ever used.
    fresh: u32,
    free: BTreeSet<u32>,
    resting: BTreeMap<u32, Rest>,
}

impl Indices {
    pub fn new(first: u32, capacity: u32) -> Self {
        Self { capacity, first, fresh: first, free: BTreeSet::new(), resting: BTreeMap::new() }
    }

    pub fn allocate(&mut self, now: Duration) -> Option<u32> {
        if let Some(index) = self.free.pop_first() {
            return Some(index);
        }
        if self.fresh < self.capacity {
            self.fresh += 1;
            return Some(self.fresh - 1);
        }
        // Only when there is nothing else: what has rested longest enough is found by looking.
        let rested: Vec<u32> = self
            .resting
            .iter()
            .filter(|(_, rest)| matches!(rest, Rest::Until(until) if *until <= now))
            .map(|(index, _)| *index)
            .collect();
        self.release(&rested);
        self.free.pop_first()
    }

    /// Takes an index out of those that can be allocated.
    pub fn reserve(&mut self, index: u32) {
        while self.fresh <= index && self.fresh < self.capacity {
            self.free.insert(self.fresh);
            self.fresh += 1;
        }
        self.free.remove(&index);
        self.resting.remove(&index);
    }

    /// Gives an index back, to be used again later.
    pub fn retire(&mut self, index: u32, rest: Rest) {
        if (self.first..self.capacity).contains(&index) {
            self.reserve(index);
            self.resting.insert(index, rest);
        }
    }

    /// Ends the rest of these.
    pub fn release(&mut self, indices: &[u32]) {
        for index in indices {
            if self.resting.remove(index).is_some() {
                self.free.insert(*index);
            }
        }
    }

    pub fn resting(&self) -> impl Iterator<Item = (u32, Rest)> {
        self.resting.iter().map(|(index, rest)| (*index, *rest))
    }
}

/// Consecutive elements of an array map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Region {
    pub first: u32,
    pub count: u32,
}

/// Regions of an array map, first fit.
#[derive(Clone, Debug)]
pub(super) struct Regions {
    /// First element to length; neighbours are merged.
    free: BTreeMap<u32, u32>,
    resting: Vec<(Duration, Region)>,
}

impl Regions {
    pub fn new(capacity: u32) -> Self {
        let free = if capacity > 0 { BTreeMap::from([(0, capacity)]) } else { BTreeMap::new() };
        Self { free, resting: Vec::new() }
    }

    pub fn allocate(&mut self, count: u32, now: Duration) -> Option<Region> {
        let (ended, resting) =
            std::mem::take(&mut self.resting).into_iter().partition(|(until, _)| *until <= now);
        self.resting = resting;
        for (_, region) in Vec::<(Duration, Region)>::from(ended) {
            self.insert(region);
        }
        let (first, length) =
            self.free.iter().find(|(_, length)| **length >= count).map(|(a, b)| (*a, *b))?;
        self.free.remove(&first);
        if length > count {
            self.free.insert(first + count, length - count);
        }
        Some(Region { first, count })
    }

    /// Takes a region out of those that can be allocated; false if any of it is taken already.
    pub fn reserve(&mut self, region: Region) -> bool {
        let Some((first, length)) = self.free.range(..=region.first).next_back().map(|(a, b)| (*a, *b))
        else {
            return false;
        };
        let Some(end) = region.first.checked_add(region.count) else { return false };
        if end > first + length {
            return false;
        }
        self.free.remove(&first);
        if region.first > first {
            self.free.insert(first, region.first - first);
        }
        if first + length > end {
            self.free.insert(end, first + length - end);
        }
        true
    }

    /// Gives a region back, to be used again after `until`.
    pub fn retire(&mut self, region: Region, until: Duration) {
        if region.count > 0 {
            self.resting.push((until, region));
        }
    }

    /// When the next region has rested.
    pub fn next_rested(&self) -> Option<Duration> {
        self.resting.iter().map(|(until, _)| *until).min()
    }

    fn insert(&mut self, region: Region) {
        let (mut first, mut count) = (region.first, region.count);
        if let Some((before, length)) = self.free.range(..first).next_back().map(|(a, b)| (*a, *b))
            && before + length == first
        {
            self.free.remove(&before);
            (first, count) = (before, count + length);
        }
        if let Some(length) = self.free.remove(&(region.first + region.count)) {
            count += length;
        }
        self.free.insert(first, count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(100);
    const LATER: Duration = Duration::from_secs(102);

    #[test]
    fn regions_are_merged_and_rest() {
        let mut regions = Regions::new(10);
        let a = regions.allocate(4, NOW).unwrap();
        let b = regions.allocate(4, NOW).unwrap();
        assert_eq!(regions.allocate(4, NOW), None);
        regions.retire(a, LATER);
        regions.retire(b, LATER);
        assert_eq!(regions.allocate(4, NOW), None);
        assert_eq!(regions.next_rested(), Some(LATER));
        assert_eq!(regions.allocate(10, LATER), Some(Region { first: 0, count: 10 }));
    }

    #[test]
    fn reserved_regions_do_not_overlap() {
        let mut regions = Regions::new(10);
        assert!(regions.reserve(Region { first: 3, count: 4 }));
        assert!(!regions.reserve(Region { first: 6, count: 1 }));
        assert!(!regions.reserve(Region { first: 0, count: 4 }));
        assert!(!regions.reserve(Region { first: 9, count: 2 }));
        assert!(!regions.reserve(Region { first: 9, count: u32::MAX }));
        assert!(regions.reserve(Region { first: 7, count: 3 }));
        assert_eq!(regions.allocate(3, NOW), Some(Region { first: 0, count: 3 }));
        assert_eq!(regions.allocate(1, NOW), None);
    }

    #[test]
    fn indices_rest() {
        let mut indices = Indices::new(1, 4);
        indices.reserve(2);
        assert_eq!(
            [indices.allocate(NOW), indices.allocate(NOW), indices.allocate(NOW)],
            [Some(1), Some(3), None]
        );
        indices.retire(1, Rest::Until(LATER));
        indices.retire(3, Rest::UntilTold);
        assert_eq!(indices.allocate(NOW), None);
        assert_eq!([indices.allocate(LATER), indices.allocate(LATER)], [Some(1), None]);
        indices.release(&[2, 3]);
        assert_eq!([indices.allocate(LATER), indices.allocate(LATER)], [Some(3), None]);
    }
}
