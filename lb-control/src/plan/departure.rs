//! Which agents have gone for good, by what becomes of their Leases.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::election::Record;

/// Watches agents go that were asked to. Their Leases are judged by the changes that are seen, never
/// by the times that are written in them.
#[derive(Clone, Debug, Default)]
pub struct Departures {
    seen: BTreeMap<String, (Record, Duration)>,
    left: BTreeSet<String>,
    /// When that was.
    looked: Duration,
}

impl Departures {
    /// All Leases of agents as they are now, by node.
    pub fn observe(&mut self, leases: BTreeMap<String, Record>, now: Duration) {
        self.looked = now;
        let is_gone = |node: &String| leases.get(node).is_none_or(|lease| lease.holder.is_empty());
        let left: Vec<_> = self.seen.keys().filter(|node| is_gone(node)).cloned().collect();
        for node in left {
            self.seen.remove(&node);
            self.left.insert(node);
        }
        for (node, lease) in leases.into_iter().filter(|(_, lease)| !lease.holder.is_empty()) {
            self.left.remove(&node);
            match self.seen.get(&node) {
                Some((seen, _)) if *seen == lease => {}
                _ => drop(self.seen.insert(node, (lease, now))),
            }
        }
    }

    /// Whether somebody may still go who has not.
    #[must_use]
    pub fn is_to_be_awaited(&self, now: Duration) -> bool {
        self.seen.values().any(|(lease, since)| now < *since + lease.duration)
    }

    /// Whether the Lease of a node had run out when it was last looked at.
    #[must_use]
    pub fn has_run_out(&self, node: &str) -> bool {
        self.seen.get(node).is_some_and(|(lease, since)| self.looked >= *since + lease.duration)
    }

    /// Those who were seen to go.
    #[must_use]
    pub fn left(&self) -> &BTreeSet<String> {
        &self.left
    }

    /// Those who have not said that they have let go of everything: what they served may be there.
    #[must_use]
    pub fn unheard(&self) -> BTreeSet<String> {
        self.seen.keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn lease(holder: &str, renewed: u64) -> Record {
        let renewed = renewed.to_string();
        Record { holder: holder.into(), renewed, duration: seconds(15), ends: false }
    }

    fn observed(departures: &mut Departures, leases: &[(&str, Record)], now: u64) -> bool {
        let leases = leases.iter().map(|(node, lease)| ((*node).to_owned(), lease.clone())).collect();
        departures.observe(leases, seconds(now));
        departures.is_to_be_awaited(seconds(now))
    }

    #[test]
    fn who_deletes_its_lease_or_gives_it_back_has_left() {
        let mut departures = Departures::default();
        let given_back = ("c", lease("", 1));
        let here = [("a", lease("a", 1)), ("b", lease("b", 1)), given_back.clone()];
        assert!(observed(&mut departures, &here, 1));
        assert!(observed(&mut departures, &[("b", lease("b", 1)), given_back.clone()], 2));
        assert!(departures.left().contains("a") && !departures.left().contains("b"));
        assert!(!observed(&mut departures, &[("b", lease("", 2)), given_back], 3));
        assert!(departures.left().contains("b") && departures.unheard().is_empty());
    }

    #[test]
    fn who_is_silent_is_not_waited_for_and_told() {
        let mut departures = Departures::default();
        assert!(observed(&mut departures, &[("a", lease("a", 1))], 100));
        assert!(observed(&mut departures, &[("a", lease("a", 1))], 114));
        assert!(!observed(&mut departures, &[("a", lease("a", 1))], 115));
        assert_eq!(departures.unheard(), ["a".to_owned()].into());
        assert!(departures.has_run_out("a") && !departures.has_run_out("b"));
        assert!(observed(&mut departures, &[("a", lease("a", 2))], 116), "it is back");
        assert!(!departures.has_run_out("a"));
    }

    #[test]
    fn who_comes_back_has_not_left() {
        let mut departures = Departures::default();
        assert!(observed(&mut departures, &[("a", lease("a", 1))], 1));
        assert!(!observed(&mut departures, &[], 2));
        assert!(observed(&mut departures, &[("a", lease("a", 3))], 3));
        assert!(departures.left().is_empty());
    }
}
