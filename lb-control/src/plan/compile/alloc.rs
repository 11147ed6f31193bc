//! Indices and regions of the maps, and how long what is given back must rest.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
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
    /// Those of them that rest until a time, by that time.
    timed: BTreeSet<(Duration, u32)>,
}

impl Indices {
    pub fn new(first: u32, capacity: u32) -> Self {
        Self {
            capacity,
            first,
            fresh: first,
            free: BTreeSet::new(),
            resting: BTreeMap::new(),
            timed: BTreeSet::new(),
        }
    }

    pub fn allocate(&mut self, now: Duration) -> Option<u32> {
        if let Some(index) = self.free.pop_first() {
            return Some(index);
        }
        if self.fresh < self.capacity {
            self.fresh += 1;
            return Some(self.fresh - 1);
        }
        // Only when there is nothing else: the longer it rests, the better.
        let (_, index) = self.timed.first().copied().filter(|(until, _)| *until <= now)?;
        self.end_rest(index);
        Some(index)
    }

    /// Takes an index out of those that can be allocated.
    pub fn reserve(&mut self, index: u32) {
        while self.fresh <= index && self.fresh < self.capacity {
            self.free.insert(self.fresh);
            self.fresh += 1;
        }
        self.free.remove(&index);
        self.end_rest(index);
    }

    fn end_rest(&mut self, index: u32) -> bool {
        let rest = self.resting.remove(&index);
        if let Some(Rest::Until(until)) = rest {
            self.timed.remove(&(until, index));
        }
        rest.is_some()
    }

    /// Gives an index back, to be used again later.
    pub fn retire(&mut self, index: u32, rest: Rest) {
        if (self.first..self.capacity).contains(&index) {
            self.reserve(index);
            self.resting.insert(index, rest);
            if let Rest::Until(until) = rest {
                self.timed.insert((until, index));
            }
        }
    }

    /// Ends the rest of these.
    pub fn release(&mut self, indices: &[u32]) {
        for index in indices {
            if self.end_rest(*index) {
                self.free.insert(*index);
            }
        }
    }

    pub fn resting(&self) -> impl Iterator<Item = u32> {
        self.resting.keys().copied()
    }

    /// When the next index has rested.
    pub fn next_rested(&self) -> Option<Duration> {
        self.timed.first().map(|(until, _)| *until)
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
    /// In the order of time, which only goes forward.
    resting: VecDeque<(Duration, Region)>,
}

impl Regions {
    pub fn new(capacity: u32) -> Self {
        let free = if capacity > 0 { BTreeMap::from([(0, capacity)]) } else { BTreeMap::new() };
        Self { free, resting: VecDeque::new() }
    }

    pub fn allocate(&mut self, count: u32, now: Duration) -> Option<Region> {
        self.end_rests(now);
        let (first, length) =
            self.free.iter().find(|(_, length)| **length >= count).map(|(a, b)| (*a, *b))?;
        self.free.remove(&first);
        if length > count {
            self.free.insert(first + count, length - count);
        }
        Some(Region { first, count })
    }

    /// Whether a region of this length can be allocated.
    pub fn has_room(&mut self, count: u32, now: Duration) -> bool {
        self.end_rests(now);
        count == 0 || self.free.values().any(|length| *length >= count)
    }

    fn end_rests(&mut self, now: Duration) {
        while let Some((until, region)) = self.resting.front().copied()
            && until <= now
        {
            self.resting.pop_front();
            self.insert(region);
        }
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
            self.resting.push_back((until, region));
        }
    }

    /// When the next region has rested.
    pub fn next_rested(&self) -> Option<Duration> {
        self.resting.front().map(|(until, _)| *until)
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
        assert!(regions.has_room(2, NOW) && !regions.has_room(3, NOW));
        assert!(Regions::new(0).has_room(0, NOW));
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
