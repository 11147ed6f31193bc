//! Which backends new connections avoid, because none came about lately.

use std::time::Duration;

/// After so many failed connects in a row a backend is avoided.
const FAILURES: u32 = 3;
/// For how long at first; each time it fails again, for twice as long.
const FIRST: Duration = Duration::from_secs(1);
/// For how long at most.
const LONGEST: Duration = Duration::from_secs(30);

/// What is known of the connects to one backend. Times are since any fixed moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ejection {
    failures: u32,
    times: u32,
    until: Duration,
    is_tried: bool,
}

impl Ejection {
    /// Takes note that a connect failed.
    pub fn failed(&mut self, now: Duration) {
        self.failures = self.failures.saturating_add(1);
        // Connects that began before it was ejected tell nothing new.
        if self.failures < FAILURES || (self.is_out(now) && !self.is_tried) {
            return;
        }
        let time = FIRST.saturating_mul(1 << self.times.min(16)).min(LONGEST);
        (self.until, self.is_tried) = (now + time, false);
        self.times = self.times.saturating_add(1);
    }

    /// Takes note that a connect succeeded: nothing is held against the backend any more.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// Whether connections avoid it.
    #[must_use]
    pub fn is_out(&self, now: Duration) -> bool {
        self.failures >= FAILURES && now < self.until
    }

    /// Whether a connection may go there. Once its time is over a single one may try, and the others
    /// only if nobody knows how that went after the shortest time.
    pub fn admits(&mut self, now: Duration) -> bool {
        if self.failures < FAILURES {
            return true;
        }
        if now < self.until {
            return false;
        }
        (self.until, self.is_tried) = (now + FIRST, true);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn failing(times: u32) -> Ejection {
        let mut ejection = Ejection::default();
        (0..times).for_each(|_| ejection.failed(at(0)));
        ejection
    }

    #[test]
    fn three_failures_in_a_row() {
        assert!(failing(2).admits(at(0)));
        let mut out = failing(3);
        assert!(out.is_out(at(999)) && !out.admits(at(999)));
        let mut interrupted = failing(2);
        interrupted.succeeded();
        interrupted.failed(at(0));
        assert!(interrupted.admits(at(0)));
        out.succeeded();
        assert!(out.admits(at(0)));
    }

    #[test]
    fn one_tries_first() {
        let mut out = failing(3);
        assert!(out.admits(at(1_000)));
        assert!(!out.admits(at(1_000)), "a second one while the first is under way");
        assert!(out.admits(at(2_000)), "nothing was heard of the first");
        out.failed(at(2_100));
        assert!(!out.admits(at(4_099)));
        assert!(out.admits(at(4_100)), "two seconds later");
    }

    #[test]
    fn it_takes_longer_each_time_up_to_a_limit() {
        let (mut out, mut now, mut waits) = (failing(3), at(0), Vec::new());
        for _ in 0..7 {
            waits.push((out.until - now).as_secs());
            now = out.until;
            assert!(out.admits(now));
            out.failed(now);
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 30, 30]);
    }

    #[test]
    fn late_news_of_old_connects_count_once() {
        let mut out = failing(100);
        assert!(!out.is_out(at(1_000)));
        assert!(out.admits(at(1_000)));
    }
}
