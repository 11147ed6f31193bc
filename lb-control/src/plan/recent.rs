//! What is remembered of clients, without growing with their number.

use std::{collections::HashMap, hash::Hash, time::Duration};

/// A map that forgets what was not written lately: when it is half full, or for long enough, the older half
/// goes. Times are since any fixed moment.
#[derive(Debug)]
pub struct Recent<K, V> {
    half: usize,
    young: HashMap<K, V>,
    old: HashMap<K, V>,
    /// When the older half became that.
    turned: Duration,
}

impl<K: Eq + Hash, V: Copy> Recent<K, V> {
    /// A map of at most `capacity` entries, which is at least 2.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let half = (capacity / 2).max(1);
        Self { half, young: HashMap::new(), old: HashMap::new(), turned: Duration::ZERO }
    }

    /// What was written last.
    #[must_use]
    pub fn get(&self, key: &K) -> Option<V> {
        self.young.get(key).or_else(|| self.old.get(key)).copied()
    }

    /// Writes, and is sure to remember at least half as many others that were written after it.
    pub fn insert(&mut self, key: K, value: V, now: Duration) {
        self.insert_among(usize::MAX, key, value, now);
    }

    /// As [`Self::insert`], while there is room for so many entries only. If it has more, the older half goes
    /// first.
    pub fn insert_among(&mut self, most: usize, key: K, value: V, now: Duration) {
        let half = self.half.min((most / 2).max(1));
        if self.young.len() >= half && !self.young.contains_key(&key) {
            self.turn(now);
        }
        self.young.insert(key, value);
    }

    /// Forgets what was last written more than twice as long ago as `time`, and keeps what was written within
    /// it. To be called every now and then.
    pub fn age(&mut self, time: Duration, now: Duration) {
        if !self.is_empty() && now.saturating_sub(self.turned) >= time {
            self.turn(now);
        }
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        (self.young, self.old) = (HashMap::new(), HashMap::new());
    }

    /// The number of entries; one that was written again may count twice.
    #[must_use]
    pub fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }

    /// Whether nothing is remembered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn turn(&mut self, now: Duration) {
        self.old = std::mem::take(&mut self.young);
        self.turned = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_half_goes() {
        let mut recent = Recent::new(8);
        for number in 0u32..100 {
            recent.insert(number, number, Duration::ZERO);
            assert!(recent.len() <= 8);
            for before in number.saturating_sub(3)..=number {
                assert_eq!(recent.get(&before), Some(before));
            }
            assert!(number < 8 || recent.get(&(number - 8)).is_none());
        }
    }

    #[test]
    fn what_is_written_again_stays() {
        let mut recent = Recent::new(4);
        for number in 0..100 {
            recent.insert(number, number, Duration::ZERO);
            recent.insert(1_000, number, Duration::ZERO);
        }
        assert_eq!(recent.get(&1_000), Some(99));
    }

    #[test]
    fn with_room_for_few_the_older_halves_go() {
        let mut recent = Recent::new(64);
        (0..64u32).for_each(|number| recent.insert(number, number, Duration::ZERO));
        assert_eq!(recent.len(), 64);
        for number in 64..100 {
            recent.insert_among(8, number, number, Duration::ZERO);
            for before in number.saturating_sub(3).max(64)..=number {
                assert_eq!(recent.get(&before), Some(before));
            }
        }
        assert!(recent.len() <= 8, "{}", recent.len());
    }

    #[test]
    fn what_is_old_goes() {
        let at = Duration::from_secs;
        // Written at any time, it stays for ten seconds, and not for twenty.
        for written in 100..120 {
            let mut recent = Recent::new(64);
            for now in 100..150 {
                if now <= written {
                    recent.insert(1, 0, at(now));
                }
                if now == written {
                    recent.insert(0, 0, at(now));
                }
                recent.age(at(10), at(now));
                let is_there = recent.get(&0).is_some();
                assert!(!(written..written + 10).contains(&now) || is_there, "{written} {now}");
                assert!(now < written + 20 || recent.is_empty(), "{written} {now}");
            }
        }
        let mut recent = Recent::new(64);
        recent.insert(0, 0, at(200));
        recent.clear();
        assert!(recent.is_empty());
    }
}
