//! Lookup tables that nodes agree on without talking to each other.
//!
//! D. Eisenbud and others, "Maglev: A Fast and Reliable Software Network Load Balancer" (NSDI 2016),
//! section 3.4: each backend prefers the places of a table in an order of its own, and they take turns
//! to occupy the place that they like best of those that are left. When one goes, the others keep most
//! of their places.

use std::net::SocketAddr;

/// Sizes of tables. Primes, so that every stride visits every place. Few, because with the size all
/// places change.
const SIZES: [u32; 4] = [1_021, 4_093, 16_381, LARGEST];
/// The largest table.
const LARGEST: u32 = 65_537;
/// Places for each backend, unless the table would be too large: then shares differ by up to 1 %.
const PLACES_EACH: usize = 100;

/// The number of places for a number of backends that take connections. One needs no table.
#[must_use]
pub fn size(backends: usize) -> u32 {
    if backends <= 1 {
        return u32::try_from(backends).unwrap_or(1);
    }
    let wanted = backends.saturating_mul(PLACES_EACH);
    SIZES.into_iter().find(|size| *size as usize >= wanted).unwrap_or(LARGEST)
}

/// The table: indices into `backends`, which are addresses with their weights.
///
/// It depends on addresses, ports and weights, and not on the order: nodes that know of the same
/// backends have the same. A weight of 0 gets no place, all others get at least one as long as there are
/// no more backends than places; equal weights get numbers of places that differ by one at most.
#[must_use]
pub fn table(backends: &[(SocketAddr, u32)]) -> Vec<usize> {
    let heaviest = backends.iter().map(|(_, weight)| *weight).max().unwrap_or(0);
    let mut seekers: Vec<Seeker> = Vec::new();
    let used: Vec<usize> = (0..backends.len()).filter(|index| backends[*index].1 > 0).collect();
    let size = size(used.len());
    seekers.extend(used.into_iter().map(|index| Seeker::new(index, backends[index], heaviest, size)));
    // Who is before whom in a turn must not depend on who asks.
    seekers.sort_by_key(|seeker| backends[seeker.backend].0);
    let mut places = vec![None; size as usize];
    let mut left = places.len();
    while left > 0 {
        for seeker in &mut seekers {
            if left > 0 && seeker.has_turn(heaviest) {
                seeker.occupy(&mut places);
                left -= 1;
            }
        }
    }
    places.into_iter().flatten().collect()
}

/// A backend that looks for places.
struct Seeker {
    backend: usize,
    weight: u32,
    /// What it has saved up; a turn costs the heaviest weight.
    credit: u32,
    /// The place that it likes best of those that it has not tried.
    next: u32,
    /// From one place to the one that it likes second best.
    stride: u32,
    size: u32,
}

impl Seeker {
    fn new(backend: usize, (address, weight): (SocketAddr, u32), heaviest: u32, size: u32) -> Self {
        let below = |hash: u64, limit: u32| u32::try_from(hash % u64::from(limit.max(1))).unwrap_or(0);
        Self {
            backend,
            weight,
            // Everybody has the first turn.
            credit: heaviest - weight,
            next: below(hash(address, 1), size),
            stride: below(hash(address, 2), size.saturating_sub(1)) + 1,
            size,
        }
    }

    fn has_turn(&mut self, heaviest: u32) -> bool {
        self.credit += self.weight;
        let has = self.credit >= heaviest;
        self.credit -= if has { heaviest } else { 0 };
        has
    }

    fn occupy(&mut self, places: &mut [Option<usize>]) {
        loop {
            let place = &mut places[self.next as usize];
            self.next = (self.next + self.stride) % self.size;
            if place.is_none() {
                *place = Some(self.backend);
                return;
            }
        }
    }
}

/// A hash of a backend's address and port, the same on every machine and in every version.
fn hash(address: SocketAddr, seed: u64) -> u64 {
    let ip = match address {
        SocketAddr::V4(v4) => v4.ip().to_ipv6_mapped(),
        SocketAddr::V6(v6) => *v6.ip(),
    };
    let ip = u128::from(ip);
    let words = [(ip >> 64) as u64, ip as u64, u64::from(address.port())];
    words.into_iter().fold(scramble(seed), |hash, word| scramble(hash ^ word))
}

/// A step of SplitMix64 (Steele, Lea and Flood, 2014).
fn scramble(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::{collection::btree_map, prelude::*, sample::select};

    use super::*;

    fn addresses(weights: &BTreeMap<u16, u32>) -> Vec<(SocketAddr, u32)> {
        let address = |number: u16| {
            let [a, b] = number.to_be_bytes();
            let v4 = !number.is_multiple_of(3);
            if v4 { ([10, 0, a, b], 8080).into() } else { ([0xfd00, 0, 0, 0, 0, 0, 1, number], 8080).into() }
        };
        weights.iter().map(|(number, weight)| (address(*number), *weight)).collect()
    }

    fn owners(backends: &[(SocketAddr, u32)]) -> Vec<SocketAddr> {
        table(backends).into_iter().map(|index| backends[index].0).collect()
    }

    fn equal(count: std::ops::Range<usize>) -> impl Strategy<Value = BTreeMap<u16, u32>> {
        btree_map(any::<u16>(), Just(1), count)
    }

    #[test]
    fn sizes() {
        assert_eq!(
            [0, 1, 2, 10, 11, 40, 41, 163, 164, 655, 100_000].map(size),
            [0, 1, 1_021, 1_021, 4_093, 4_093, 16_381, 16_381, LARGEST, LARGEST, LARGEST]
        );
        for size in SIZES {
            assert!((2..size).take_while(|factor| factor * factor <= size).all(|factor| size % factor != 0));
        }
    }

    #[test]
    fn few_or_none() {
        let backends = addresses(&BTreeMap::from([(1, 0), (2, 7), (3, 0)]));
        assert_eq!(table(&backends), [1]);
        assert!(table(&backends[..1]).is_empty());
        assert!(table(&[]).is_empty());
    }

    /// Nodes of other versions must agree: these numbers never change.
    #[test]
    fn the_same_in_every_version() {
        let table = table(&addresses(&BTreeMap::from([(1, 1), (2, 1), (4, 2), (6, 1)])));
        assert_eq!(table[..12], [2, 0, 2, 2, 3, 1, 0, 2, 2, 3, 2, 0]);
    }

    #[test]
    fn a_full_table_is_no_trouble() {
        let all = addresses(&(0..u16::MAX).map(|number| (number, 1)).collect());
        let owners: BTreeSet<_> = owners(&all).into_iter().collect();
        assert_eq!(owners.len(), all.len());
    }

    /// Of the connections of those that stay, few move when one goes, or comes: 3 % on the average. In
    /// single sets of few backends, two that like the same places can make it ten times that.
    #[test]
    fn others_stay() {
        for count in [3, 5, 10, 20, 40] {
            let sets = 40;
            let mut shares = 0.0;
            for set in 0..sets {
                let first = set * 97;
                let before = addresses(&(first..first + count).map(|number| (number, 1)).collect());
                let (gone, after) = before.split_first().unwrap();
                let (before, after) = (owners(&before), owners(after));
                assert_eq!(before.len(), after.len());
                let stay = before.iter().zip(&after).filter(|(before, _)| **before != gone.0);
                let moved = stay.clone().filter(|(before, after)| before != after).count();
                shares += moved as f64 / stay.count() as f64;
            }
            let average = shares / f64::from(sets);
            assert!(average < 0.04, "{average} of {count} backends");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn order_is_nothing((sorted, shuffled) in btree_map(any::<u16>(), 0..9u32, 1..30).prop_flat_map(|all| {
            let all = addresses(&all);
            (Just(all.clone()), Just(all).prop_shuffle())
        })) {
            prop_assert_eq!(owners(&sorted), owners(&shuffled));
        }

        #[test]
        fn equal_weights_are_even(weights in equal(1..60)) {
            let backends = addresses(&weights);
            let mut places = vec![0; backends.len()];
            table(&backends).into_iter().for_each(|index| places[index] += 1);
            prop_assert!(places.iter().max().unwrap() - places.iter().min().unwrap() <= 1);
        }

        #[test]
        fn weights_are_kept(weights in btree_map(any::<u16>(), select(vec![0u32, 1, 2, 5, 100, 256]), 1..20)) {
            let backends = addresses(&weights);
            let table = table(&backends);
            let total: u32 = weights.values().sum();
            for (index, (_, weight)) in backends.iter().enumerate() {
                let places = table.iter().filter(|other| **other == index).count();
                prop_assert_eq!(places > 0, *weight > 0);
                let exact = f64::from(*weight) * table.len() as f64 / f64::from(total.max(1));
                // The first turn is everybody's, whatever they weigh.
                prop_assert!((places as f64 - exact).abs() <= 2.0 + backends.len() as f64 * exact / table.len().max(1) as f64,
                    "{places} places of weight {weight}, exactly {exact}");
            }
        }
    }
}
