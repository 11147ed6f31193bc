//! Which Events are told: the same one not again and again, and of one object not too many.

use std::{collections::HashMap, time::Duration};

use crate::plan::controller::{EventTarget, Topic};

/// The same Event is not told again within this time.
const QUIET: Duration = Duration::from_secs(600);
/// As client-go's EventSourceObjectSpamFilter: so many Events of one object at once…
const BURST: u32 = 25;
/// …and one more each time this has gone by.
const REFILL: Duration = Duration::from_secs(300);
/// Objects and Events that are remembered at most.
const MAXIMUM: usize = 4_096;

/// What becomes of an Event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is told.
    Tell,
    /// It was told a short while ago.
    Known,
    /// There were too many of its object.
    TooMany,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    left: u32,
    since: Duration,
}

/// Remembers what was told.
#[derive(Debug, Default)]
pub struct Events {
    told: HashMap<(EventTarget, String, String), Duration>,
    buckets: HashMap<EventTarget, Bucket>,
}

impl Events {
    /// Whether an Event is to be told now.
    pub fn admit(&mut self, about: &EventTarget, reason: &str, note: &str, now: Duration) -> Verdict {
        self.forget(now);
        let key = (about.clone(), reason.to_owned(), note.to_owned());
        // What is out of date may not have been forgotten yet.
        if self.told.get(&key).is_some_and(|at| now - *at < QUIET) {
            return Verdict::Known;
        }
        let bucket = self.buckets.entry(about.clone()).or_insert(Bucket { left: BURST, since: now });
        let refills = (now - bucket.since).as_secs() / REFILL.as_secs();
        let refills = u32::try_from(refills).unwrap_or(BURST);
        if refills > 0 {
            bucket.left = bucket.left.saturating_add(refills).min(BURST);
            bucket.since += REFILL * refills;
        }
        if bucket.left == 0 {
            return Verdict::TooMany;
        }
        bucket.left -= 1;
        if let Some(topic) = Topic::of(reason) {
            // What was told of it before is no longer the last word.
            self.told.retain(|(other, reason, _), _| other != about || Topic::of(reason) != Some(topic));
        }
        self.told.insert(key, now);
        Verdict::Tell
    }

    /// It did not arrive after all: whoever comes up with it again tells it.
    pub fn not_told(&mut self, about: &EventTarget, reason: &str, note: &str) {
        self.told.remove(&(about.clone(), reason.to_owned(), note.to_owned()));
    }

    /// Keeps the memory bounded.
    fn forget(&mut self, now: Duration) {
        if self.told.len() >= MAXIMUM || self.told.values().next().is_some_and(|at| now - *at >= QUIET) {
            self.told.retain(|_, at| now - *at < QUIET);
        }
        if self.told.len() >= MAXIMUM {
            self.told.clear();
        }
        if self.buckets.len() >= MAXIMUM {
            self.buckets.retain(|_, bucket| bucket.left < BURST && now - bucket.since < REFILL * BURST);
        }
        if self.buckets.len() >= MAXIMUM {
            self.buckets.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ObjectRef;

    const fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn service(name: &str) -> EventTarget {
        EventTarget::service(&ObjectRef::new("default", name), "u")
    }

    #[test]
    fn the_same_is_told_again_after_a_while() {
        let mut events = Events::default();
        let mut admit = |note: &str, at| events.admit(&service("web"), "R", note, seconds(at));
        assert_eq!(admit("a", 0), Verdict::Tell);
        assert_eq!(admit("a", 599), Verdict::Known);
        assert_eq!(admit("b", 599), Verdict::Tell);
        assert_eq!(admit("a", 600), Verdict::Tell);
    }

    /// Else the newest Event would say that all is well while it is not.
    #[test]
    fn what_was_so_before_something_else_was_told_is_news() {
        let mut events = Events::default();
        let mut admit =
            |reason: &str, note: &str, at| events.admit(&service("web"), reason, note, seconds(at));
        for (at, reason, note) in [
            (0, "BackendsUnhealthy", "1 of 3"),
            (20, "BackendsHealthy", "all 3"),
            (40, "BackendsUnhealthy", "1 of 3"),
            (60, "BackendsUnhealthy", "2 of 3"),
            (80, "BackendsUnhealthy", "1 of 3"),
        ] {
            assert_eq!(admit(reason, note, at), Verdict::Tell, "{at}");
        }
        assert_eq!(admit("NodeCannotServe", "full", 81), Verdict::Tell, "something else");
        assert_eq!(admit("BackendsUnhealthy", "1 of 3", 82), Verdict::Known);
    }

    #[test]
    fn what_did_not_arrive_is_told_again() {
        let mut events = Events::default();
        let web = service("web");
        assert_eq!(events.admit(&web, "R", "a", seconds(0)), Verdict::Tell);
        events.not_told(&web, "R", "a");
        assert_eq!(events.admit(&web, "R", "a", seconds(1)), Verdict::Tell);
        assert_eq!(events.admit(&web, "R", "a", seconds(2)), Verdict::Known);
    }

    #[test]
    fn one_object_does_not_flood_the_others_out() {
        let mut events = Events::default();
        let told = (0..100).filter(|number| {
            events.admit(&service("web"), "R", &number.to_string(), seconds(1)) == Verdict::Tell
        });
        assert_eq!(told.count(), BURST as usize);
        assert_eq!(events.admit(&service("dns"), "R", "x", seconds(1)), Verdict::Tell);
        assert_eq!(events.admit(&service("web"), "R", "later", seconds(300)), Verdict::TooMany);
        assert_eq!(events.admit(&service("web"), "R", "later", seconds(301)), Verdict::Tell);
        assert_eq!(events.admit(&service("web"), "R", "later still", seconds(302)), Verdict::TooMany);
    }

    #[test]
    fn memory_is_bounded() {
        let mut events = Events::default();
        for number in 0..20_000 {
            events.admit(&service(&format!("s{number}")), "R", "n", seconds(number / 10));
        }
        assert!(events.told.len() <= MAXIMUM && events.buckets.len() <= MAXIMUM);
    }
}
