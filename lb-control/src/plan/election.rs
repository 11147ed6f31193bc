//! Who holds a Lease: one of many candidates, or an agent its own.
//!
//! Clocks of different nodes are never compared. A holder counts its time from before it sent a
//! renewal that succeeded; a rival counts from when it saw that renewal, which is later. So the
//! holder gives up before anybody may follow, as long as clocks run at about the same speed: within
//! [`Timing::give_up`] to [`Timing::duration`] there is room for a third.

use std::time::Duration;

/// How long a Lease lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// For how long others leave a holder alone that does not renew.
    pub duration: Duration,
    /// For how long a holder counts itself as such without having renewed.
    pub give_up: Duration,
    /// How often it renews.
    pub renew: Duration,
    /// How often others look.
    pub retry: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            duration: Duration::from_secs(15),
            give_up: Duration::from_secs(10),
            renew: Duration::from_secs(5),
            retry: Duration::from_secs(2),
        }
    }
}

/// A Lease as it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Who holds it; empty once it was given up.
    pub holder: String,
    /// The time that was written last; only that it changes means something.
    pub renewed: String,
    /// For how long its holder asks to be left alone.
    pub duration: Duration,
    /// Whether its holder asks all candidates to end for good.
    pub ends: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Write our name and the time.
    Write,
    /// Leave it alone.
    Leave,
}

/// One who would like to hold a Lease.
#[derive(Clone, Debug)]
pub struct Candidate {
    identity: String,
    timing: Timing,
    /// What was seen last, and since when it stands there.
    seen: Option<(Record, Duration)>,
    held_until: Option<Duration>,
    has_looked: bool,
    ends: bool,
}

impl Candidate {
    /// Holds nothing yet. No other candidate may have the same identity.
    #[must_use]
    pub fn new(identity: impl Into<String>, timing: Timing) -> Self {
        Self {
            identity: identity.into(),
            timing,
            seen: None,
            held_until: None,
            has_looked: false,
            ends: false,
        }
    }

    /// The Lease was read; `None` if there is none.
    pub fn observe(&mut self, record: Option<&Record>, now: Duration) -> Step {
        let is_first = !std::mem::replace(&mut self.has_looked, true);
        if self.ends {
            return Step::Leave;
        }
        let Some(record) = record else {
            self.seen = None;
            return Step::Write;
        };
        let since = match &self.seen {
            Some((seen, since)) if seen == record => *since,
            // What stands there at the first look may have been asked of those who were here before us.
            _ if record.ends && !is_first => {
                self.ends = true;
                self.held_until = None;
                return Step::Leave;
            }
            _ => {
                self.seen = Some((record.clone(), now));
                now
            }
        };
        let is_free = record.holder.is_empty() || record.holder == self.identity;
        if !is_free {
            // It may have been taken from us while we slept.
            self.held_until = None;
        }
        if is_free || now >= since + record.duration { Step::Write } else { Step::Leave }
    }

    /// Whether a holder has asked all candidates to end, in our time.
    #[must_use]
    pub fn ends(&self) -> bool {
        self.ends
    }

    /// Our name was written, by a request that was sent at `sent`.
    pub fn wrote(&mut self, sent: Duration) {
        self.held_until = Some(sent + self.timing.give_up);
    }

    /// Somebody else was faster.
    pub fn lost(&mut self) {
        self.held_until = None;
    }

    /// Whether the Lease is ours.
    #[must_use]
    pub fn holds(&self, now: Duration) -> bool {
        self.held_until.is_some_and(|until| now < until)
    }

    /// Until when it is ours unless it is renewed.
    #[must_use]
    pub fn held_until(&self) -> Option<Duration> {
        self.held_until
    }

    /// How long to wait before the Lease is looked at again.
    #[must_use]
    pub fn pause(&self, now: Duration) -> Duration {
        if self.holds(now) { self.timing.renew } else { self.timing.retry }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn a_holder_is_left_alone_until_it_is_silent_for_its_duration() {
        let mut candidate = Candidate::new("b", Timing::default());
        let record = |renewed: &str| Record {
            holder: "a".into(),
            renewed: renewed.into(),
            duration: seconds(15),
            ends: false,
        };
        assert_eq!(candidate.observe(Some(&record("1")), seconds(100)), Step::Leave);
        assert_eq!(candidate.observe(Some(&record("1")), seconds(114)), Step::Leave);
        assert_eq!(candidate.observe(Some(&record("2")), seconds(114)), Step::Leave);
        assert_eq!(candidate.observe(Some(&record("2")), seconds(128)), Step::Leave);
        assert_eq!(candidate.observe(Some(&record("2")), seconds(129)), Step::Write);
        assert!(!candidate.holds(seconds(129)), "it is ours when it is written");
        candidate.wrote(seconds(129));
        assert!(candidate.holds(seconds(138)) && !candidate.holds(seconds(139)));
    }

    #[test]
    fn what_nobody_holds_is_taken_at_once() {
        let mut candidate = Candidate::new("b", Timing::default());
        assert_eq!(candidate.observe(None, seconds(1)), Step::Write);
        let given_up = Record { duration: seconds(15), ..Record::default() };
        assert_eq!(candidate.observe(Some(&given_up), seconds(1)), Step::Write);
        let ours = Record { holder: "b".into(), ..given_up };
        assert_eq!(candidate.observe(Some(&ours), seconds(1)), Step::Write, "after a restart");
    }

    #[test]
    fn who_is_asked_to_end_does_so_but_not_those_who_come_later() {
        let record = |renewed: &str| Record {
            holder: "cleanup".into(),
            renewed: renewed.into(),
            duration: seconds(60),
            ends: true,
        };
        let mut leader = Candidate::new("a", Timing::default());
        assert_eq!(leader.observe(None, seconds(1)), Step::Write);
        leader.wrote(seconds(1));
        assert_eq!(leader.observe(Some(&record("1")), seconds(5)), Step::Leave);
        assert!(leader.ends() && !leader.holds(seconds(5)));
        assert_eq!(leader.observe(None, seconds(500)), Step::Leave, "for good");

        // The next installation finds what the last uninstallation has left.
        let mut next = Candidate::new("a", Timing::default());
        assert_eq!(next.observe(Some(&record("1")), seconds(6)), Step::Leave);
        assert_eq!(next.observe(Some(&record("1")), seconds(65)), Step::Leave);
        assert!(!next.ends());
        assert_eq!(next.observe(Some(&record("1")), seconds(66)), Step::Write);

        // It goes on: who was restarted meanwhile is meant as well.
        let mut restarted = Candidate::new("a", Timing::default());
        restarted.observe(Some(&record("1")), seconds(6));
        restarted.observe(Some(&record("2")), seconds(8));
        assert!(restarted.ends());
    }

    /// One candidate in the simulation: its clock, and the request that it has under way.
    struct Simulated {
        candidate: Candidate,
        /// Its clock: an offset, and so many thousandths of real time.
        offset: Duration,
        speed: u32,
        next: Duration,
        /// When the answer arrives, what was read and when it was sent.
        write: Option<(Duration, u64, Duration)>,
    }

    impl Simulated {
        fn clock(&self, real: Duration) -> Duration {
            self.offset + real * self.speed / 1_000
        }
    }

    proptest! {
        /// Whatever clocks show, and however long requests take or whether they get lost: never
        /// two at a time believe to hold it, and it does not stay without a holder for long.
        #[test]
        fn there_is_one_holder(
            clocks in vec((0..1_000_000u64, 950..1_050u32), 2..4),
            chances in vec((0..3_000u64, 0..10u8), 400),
        ) {
            let timing = Timing::default();
            let mut all: Vec<_> = clocks.iter().enumerate().map(|(number, (offset, speed))| Simulated {
                candidate: Candidate::new(format!("c{number}"), timing),
                offset: Duration::from_millis(*offset),
                speed: *speed,
                next: Duration::from_millis(number as u64 * 100),
                write: None,
            }).collect();
            let (mut lease, mut version): (Option<Record>, u64) = (None, 0);
            let mut chances = chances.into_iter().cycle();
            let mut last_held = Duration::ZERO;
            for step in 0..6_000u64 {
                let now = Duration::from_millis(step * 50);
                for one in &mut all {
                    let clock = one.clock(now);
                    if let Some((at, read, sent)) = one.write {
                        if now >= at {
                            one.write = None;
                            // The server compares versions.
                            if read == version {
                                version += 1;
                                lease = Some(Record {
                                    holder: one.candidate.identity.clone(),
                                    renewed: version.to_string(),
                                    duration: timing.duration,
                                    ends: false,
                                });
                                one.candidate.wrote(sent);
                            } else {
                                one.candidate.lost();
                            }
                            one.next = now + one.candidate.pause(clock) * 1_000 / one.speed;
                        }
                    } else if now >= one.next {
                        let (delay, luck) = chances.next().unwrap();
                        one.next = now + timing.retry;
                        if luck > 0 && one.candidate.observe(lease.as_ref(), clock) == Step::Write {
                            one.write = Some((now + Duration::from_millis(delay), version, clock));
                        } else if luck > 0 {
                            one.next = now + one.candidate.pause(clock) * 1_000 / one.speed;
                        }
                    }
                }
                let holders = all.iter().filter(|one| one.candidate.holds(one.clock(now))).count();
                prop_assert!(holders <= 1, "{holders} at {now:?}");
                if holders == 1 {
                    last_held = now;
                }
                prop_assert!(now - last_held < Duration::from_secs(60), "nobody since {last_held:?}");
            }
        }
    }
}
