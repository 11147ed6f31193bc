//! Which backends new connections avoid, because none came about lately.

use std::time::Duration;

/// After so many failed connects in a row a backend is avoided.
const FAILURES: u32 = 3;
/// For how long at first; each time it fails again, for twice as long.
const FIRST: Duration = Duration::from_secs(1);
/// For how long at most.
const LONGEST: Duration = Duration::from_secs(30);
/// What is sent without an answer for so long, and meets no trouble, gets there. It takes the kernel three
/// seconds to find that nobody has an address (arp(7): three requests, one each second); until then
/// everything seems to be sent.
const SILENCE_IS_CONSENT: Duration = Duration::from_secs(5);

/// What is known of the connects to one backend. Times are since any fixed moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ejection {
    failures: u32,
    times: u32,
    until: Duration,
    is_tried: bool,
    last: Duration,
    /// When it was ejected first.
    since: Duration,
}

impl Ejection {
    /// Takes note that a connect failed.
    pub fn failed(&mut self, now: Duration) {
        (self.failures, self.last) = (self.failures.saturating_add(1), now);
        // Connects that began before it was ejected tell nothing new.
        if self.failures < FAILURES || (self.is_out(now) && !self.is_tried) {
            return;
        }
        if self.times == 0 {
            self.since = now;
        }
        let time = FIRST.saturating_mul(1 << self.times.min(16)).min(LONGEST);
        (self.until, self.is_tried) = (now + time, false);
        self.times = self.times.saturating_add(1);
    }

    /// Takes note that a connect succeeded: nothing is held against the backend any more.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// Takes note that something was sent to the backend, as since `since`, and has met no trouble. Gives
    /// from when on that counts: what was sent before the last failure says nothing.
    pub fn met_no_trouble(&mut self, since: Duration, now: Duration) -> Duration {
        if self.failures > 0 && since <= self.last {
            return now;
        }
        if now.saturating_sub(since) >= SILENCE_IS_CONSENT {
            self.succeeded();
        }
        since
    }

    /// Whether nothing is held against the backend.
    #[must_use]
    pub fn is_clear(&self) -> bool {
        self.failures == 0
    }

    /// Whether connections avoid it.
    #[must_use]
    pub fn is_out(&self, now: Duration) -> bool {
        self.failures >= FAILURES && now < self.until
    }

    /// How many connects in a row have failed, if connections have avoided it for at least so long, and
    /// another one that was tried meanwhile has failed, too.
    #[must_use]
    pub fn failures_of_long(&self, least: Duration, now: Duration) -> Option<u32> {
        (self.times > 1 && now.saturating_sub(self.since) >= least).then_some(self.failures)
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

    /// Of a host that has died: what is sent to it meets no trouble for three seconds.
    #[test]
    fn traffic_alone_clears_nothing() {
        let (mut dead, mut since) = (Ejection::default(), at(0));
        for failure in [10_000, 13_000, 16_000] {
            for now in (failure - 3_000..failure).step_by(100) {
                since = dead.met_no_trouble(since, at(now));
            }
            dead.failed(at(failure));
        }
        assert!(dead.is_out(at(16_999)));
        assert_eq!(dead.met_no_trouble(since, at(16_100)), at(16_100), "it counts from there");
        assert!(dead.is_out(at(16_999)));
    }

    /// One that never answers, and is there again.
    #[test]
    fn traffic_without_trouble_for_long_clears_all() {
        let (mut silent, mut since) = (failing(3), at(0));
        for now in (1_000..6_000).step_by(500) {
            since = silent.met_no_trouble(since, at(now));
            assert!(!silent.is_clear());
        }
        assert_eq!(silent.met_no_trouble(since, at(6_000)), at(1_000));
        assert!(silent.is_clear());
        assert_eq!(silent.met_no_trouble(since, at(99_000)), since);
    }

    #[test]
    fn who_is_out_for_long_failed_again() {
        let mut out = failing(3);
        assert_eq!(out.failures_of_long(at(10_000), at(60_000)), None, "nobody tried meanwhile");
        assert!(out.admits(at(60_000)));
        out.failed(at(60_000));
        assert_eq!(out.failures_of_long(at(60_001), at(60_000)), None);
        assert_eq!(out.failures_of_long(at(60_000), at(60_000)), Some(4));
        out.succeeded();
        assert_eq!(out.failures_of_long(at(0), at(90_000)), None);
    }

    #[test]
    fn late_news_of_old_connects_count_once() {
        let mut out = failing(100);
        assert!(!out.is_out(at(1_000)));
        assert!(out.admits(at(1_000)));
    }
}
