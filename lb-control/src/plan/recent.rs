//! What is remembered of clients, without growing with their number.

use std::{collections::HashMap, hash::Hash};

/// A map that forgets what was not written lately: when it is half full, the older half goes.
#[derive(Debug)]
pub struct Recent<K, V> {
    half: usize,
    young: HashMap<K, V>,
    old: HashMap<K, V>,
}

impl<K: Eq + Hash, V: Copy> Recent<K, V> {
    /// A map of at most `capacity` entries, which is at least 2.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { half: (capacity / 2).max(1), young: HashMap::new(), old: HashMap::new() }
    }

    /// What was written last.
    #[must_use]
    pub fn get(&self, key: &K) -> Option<V> {
        self.young.get(key).or_else(|| self.old.get(key)).copied()
    }

    /// Writes, and is sure to remember at least half as many others that were written after it.
    pub fn insert(&mut self, key: K, value: V) {
        if self.young.len() >= self.half && !self.young.contains_key(&key) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, value);
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_half_goes() {
        let mut recent = Recent::new(8);
        for number in 0u32..100 {
            recent.insert(number, number);
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
            recent.insert(number, number);
            recent.insert(1_000, number);
        }
        assert_eq!(recent.get(&1_000), Some(99));
    }
}
