//! Free addresses of a pool, as intervals: the lowest one is found without looking at those that
//! are held, and a pool costs as much as is held of it, however large it is.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::model::{Family, Pool};

/// An address as a number, which only means something beside its family.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn address(family: Family, number: u128) -> Option<IpAddr> {
    Some(match family {
        Family::V4 => IpAddr::V4(u32::try_from(number).ok()?.into()),
        Family::V6 => IpAddr::V6(number.into()),
    })
}

/// A pool's ranges of a family as intervals in order, disjoint and never adjacent.
fn merged(pool: &Pool, family: Family) -> Vec<(u128, u128)> {
    let ranges = pool.ranges.iter().filter(|range| range.family() == family);
    let mut ranges: Vec<_> = ranges.map(|range| (number(range.first()), number(range.last()))).collect();
    ranges.sort_unstable();
    let mut merged: Vec<(u128, u128)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    merged
}

/// A pool's addresses as intervals in order, from the first to the last.
pub(super) fn intervals(pool: &Pool) -> Vec<(IpAddr, IpAddr)> {
    let of = |family| {
        let merged = merged(pool, family).into_iter();
        merged.filter_map(move |(first, last)| Some((address(family, first)?, address(family, last)?)))
    };
    of(Family::V4).chain(of(Family::V6)).collect()
}

/// Free addresses of one family of one pool.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Free {
    family: Family,
    /// Whether .0 and .255 are not for choice.
    avoid_buggy: bool,
    /// First to last, disjoint, never adjacent.
    intervals: BTreeMap<u128, u128>,
    /// Where intervals begin that have something to choose.
    useful: BTreeSet<u128>,
    /// How many there are to choose.
    count: u128,
}

impl Free {
    /// All addresses of the family that the pool has.
    pub fn new(pool: &Pool, family: Family) -> Self {
        let avoid_buggy = pool.avoid_buggy_ips && family == Family::V4;
        let mut free =
            Self { family, avoid_buggy, intervals: BTreeMap::new(), useful: BTreeSet::new(), count: 0 };
        for (first, last) in merged(pool, family) {
            free.insert(first, last);
        }
        free.count = free.intervals.iter().fold(0, |sum: u128, (first, last)| {
            let all = (last - first).saturating_add(1);
            sum.saturating_add(if avoid_buggy { all - buggy(*first, *last) } else { all })
        });
        free
    }

    /// Somebody holds the address now. Without effect if somebody did before.
    pub fn take(&mut self, address: IpAddr) {
        let number = number(address);
        let Some((&first, &last)) = self.intervals.range(..=number).next_back() else { return };
        if last < number {
            return;
        }
        self.remove(first);
        if first < number {
            self.insert(first, number - 1);
        }
        if number < last {
            self.insert(number + 1, last);
        }
        if self.may_choose(number) {
            self.count -= 1;
        }
    }

    /// Nobody holds the address any more, which is one of the pool's. Without effect if nobody did.
    pub fn give(&mut self, address: IpAddr) {
        let number = number(address);
        let (mut first, mut last) = (number, number);
        if let Some((&before, &end)) = self.intervals.range(..=number).next_back() {
            if end >= number {
                return;
            }
            if end + 1 == number {
                self.remove(before);
                first = before;
            }
        }
        let next = number.checked_add(1);
        if let Some((next, end)) = next.and_then(|next| Some((next, *self.intervals.get(&next)?))) {
            self.remove(next);
            last = end;
        }
        self.insert(first, last);
        if self.may_choose(number) {
            self.count = self.count.saturating_add(1);
        }
    }

    /// The lowest address to choose.
    pub fn lowest(&self) -> Option<IpAddr> {
        let first = *self.useful.first()?;
        address(self.family, self.choice(first, *self.intervals.get(&first)?)?)
    }

    /// How many addresses there are to choose.
    pub fn count(&self) -> u64 {
        u64::try_from(self.count).unwrap_or(u64::MAX)
    }

    fn insert(&mut self, first: u128, last: u128) {
        self.intervals.insert(first, last);
        if self.choice(first, last).is_some() {
            self.useful.insert(first);
        }
    }

    fn remove(&mut self, first: u128) {
        self.intervals.remove(&first);
        self.useful.remove(&first);
    }

    /// The first one to choose of an interval. Of three in a row, one is neither .0 nor .255.
    fn choice(&self, first: u128, last: u128) -> Option<u128> {
        (first..=last.min(first.saturating_add(2))).find(|number| self.may_choose(*number))
    }

    fn may_choose(&self, number: u128) -> bool {
        !self.avoid_buggy || !matches!(number & 0xff, 0 | 0xff)
    }
}

/// How many addresses from the first to the last end in .0 or .255.
fn buggy(first: u128, last: u128) -> u128 {
    let below = |number: u128| number / 256 * 2 + u128::from(!number.is_multiple_of(256));
    below(last + 1) - below(first)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::plan::testing::pool;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_size_of_a_pool_costs_nothing() {
        for (text, family, count, first) in [
            ("p 0.0.0.0/0", Family::V4, 1 << 32, "0.0.0.0"),
            ("p 0.0.0.0/0 buggy", Family::V4, (1 << 32) - (2 << 24), "0.0.0.1"),
            ("p 10.0.0.0/8 buggy", Family::V4, (1 << 24) - (2 << 16), "10.0.0.1"),
            ("p 10.0.0.255-10.0.1.0 buggy", Family::V4, 0, ""),
            ("p 10.0.0.9-10.0.0.9 10.0.0.1-10.0.0.9", Family::V4, 9, "10.0.0.1"),
            ("p 10.0.0.9/32 2001:db8::/64", Family::V6, u64::MAX, "2001:db8::"),
            ("p ::/0", Family::V6, u64::MAX, "::"),
        ] {
            let free = Free::new(&pool(text), family);
            assert_eq!(free.count(), count, "{text}");
            assert_eq!(free.lowest(), (!first.is_empty()).then(|| ip(first)), "{text}");
            assert!(free.intervals.len() <= 1, "{text}");
        }
    }

    #[test]
    fn the_ends_of_the_number_line() {
        let mut free = Free::new(&pool("p ::/0"), Family::V6);
        let last = ip("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff");
        for address in [ip("::"), last] {
            free.take(address);
            free.take(address);
        }
        assert_eq!(free.lowest(), Some(ip("::1")));
        for address in [last, ip("::"), last] {
            free.give(address);
        }
        assert_eq!(free.intervals, [(0, u128::MAX)].into());
    }

    proptest! {
        /// As if every address was looked at.
        #[test]
        fn as_by_counting(
            avoid in any::<bool>(),
            ranges in vec((240..270u16, 0..9u16), 1..4),
            steps in vec((any::<bool>(), 240..280u16), 0..40),
        ) {
            let address = |number: u16| IpAddr::from([10, 0, (number >> 8) as u8, (number & 0xff) as u8]);
            let text: Vec<_> = ranges
                .iter()
                .map(|(first, more)| format!("{}-{}", address(*first), address(first + more)))
                .collect();
            let pool = pool(&format!("p {} {}", text.join(" "), if avoid { "buggy" } else { "" }));
            let mut free = Free::new(&pool, Family::V4);
            let mut model: BTreeSet<IpAddr> = (240..290).map(address).filter(|a| pool.contains(*a)).collect();
            for (take, number) in steps {
                let address = address(number);
                if take {
                    free.take(address);
                    model.remove(&address);
                } else if pool.contains(address) {
                    free.give(address);
                    model.insert(address);
                }
                let choice: Vec<_> = model.iter().filter(|address| pool.may_choose(**address)).collect();
                prop_assert_eq!(free.lowest(), choice.first().map(|address| **address));
                prop_assert_eq!(free.count(), choice.len() as u64);
            }
        }
    }
}
