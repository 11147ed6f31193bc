//! When backends are asked whether they work, and what follows from their answers.
//!
//! Whoever is new counts as healthy until he has failed often enough: an agent that starts knows
//! nothing, and must not refuse everybody. Questions are spread over the interval by a hash of whom
//! they are for, so that many backends are not asked at once, also not after a restart.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use crate::model::CheckTarget;

/// Until a backend has answered well for the first time, it is asked again so soon after a failure: one
/// that does not work when the agent starts would get connections for all of the intervals.
const SOON: Duration = Duration::from_secs(1);

/// A question that is to be asked now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Whom, and how.
    pub target: CheckTarget,
    /// Tells it from others.
    run: u64,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It works.
    Good,
    /// It does not; why.
    Bad(Arc<str>),
    /// It could not be asked, for a reason that lies here.
    Unknown,
}

/// Whom it is about, and why it does not work; `None` if it does.
pub type Verdict = (CheckTarget, Option<Arc<str>>);

#[derive(Debug)]
struct State {
    next: Duration,
    /// The question that is open.
    run: Option<u64>,
    /// Whether it has answered well once, or failed often enough.
    is_known: bool,
    standing: Standing,
}

#[derive(Debug)]
enum Standing {
    Healthy { failures: u8 },
    Unhealthy { why: Arc<str>, successes: u8 },
}

/// Remembers who is asked when, and how they stand. Times are since any fixed moment.
#[derive(Debug, Default)]
pub struct Probing {
    targets: HashMap<CheckTarget, State>,
    /// Those without an open question.
    due: BTreeSet<(Duration, CheckTarget)>,
    runs: u64,
}

impl Probing {
    /// Has somebody asked from now on.
    pub fn ask(&mut self, target: &CheckTarget, now: Duration) {
        if self.targets.contains_key(target) {
            return;
        }
        let next = turn(target, now);
        let standing = Standing::Healthy { failures: 0 };
        self.targets.insert(target.clone(), State { next, run: None, is_known: false, standing });
        self.due.insert((next, target.clone()));
    }

    /// Asks somebody no more. If he did not work, that is taken back: word of it may still be on its
    /// way when he is asked anew.
    pub fn forget(&mut self, target: &CheckTarget) -> Option<Verdict> {
        let state = self.targets.remove(target)?;
        self.due.remove(&(state.next, target.clone()));
        matches!(state.standing, Standing::Unhealthy { .. }).then(|| (target.clone(), None))
    }

    /// When somebody is to be asked next, of those without an open question.
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        self.due.first().map(|(at, _)| *at)
    }

    /// Somebody who is to be asked now; those who have waited longest come first.
    pub fn start(&mut self, now: Duration) -> Option<Probe> {
        if self.next_due()? > now {
            return None;
        }
        let (_, target) = self.due.pop_first()?;
        let state = self.targets.get_mut(&target)?;
        self.runs += 1;
        state.run = Some(self.runs);
        Some(Probe { target, run: self.runs })
    }

    /// Takes over what became of a question. Gives what is other than before.
    pub fn finish(&mut self, probe: &Probe, answer: Answer, now: Duration) -> Option<Verdict> {
        let target = &probe.target;
        let state = self.targets.get_mut(target).filter(|state| state.run == Some(probe.run))?;
        state.run = None;
        let news = state.take(target, answer);
        let is_new = !state.is_known && matches!(state.standing, Standing::Healthy { failures: 1.. });
        let turn = turn(target, now);
        state.next = if is_new { turn.min(now + SOON) } else { turn };
        self.due.insert((state.next, target.clone()));
        news.map(|why| (target.clone(), why))
    }

    /// How many are asked.
    #[must_use]
    pub fn len(&self) -> usize {
        self.targets.len()
    }

    /// Whether nobody is asked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }
}

impl State {
    /// Gives how it stands if that is news.
    fn take(&mut self, target: &CheckTarget, answer: Answer) -> Option<Option<Arc<str>>> {
        match (&mut self.standing, answer) {
            (_, Answer::Unknown) => None,
            (Standing::Healthy { failures }, Answer::Good) => {
                *failures = 0;
                self.is_known = true;
                None
            }
            (Standing::Healthy { failures }, Answer::Bad(why)) => {
                *failures += 1;
                (*failures >= target.check.unhealthy).then(|| {
                    self.is_known = true;
                    self.standing = Standing::Unhealthy { why: Arc::clone(&why), successes: 0 };
                    Some(why)
                })
            }
            (Standing::Unhealthy { successes, .. }, Answer::Good) => {
                *successes += 1;
                (*successes >= target.check.healthy).then(|| {
                    self.standing = Standing::Healthy { failures: 0 };
                    None
                })
            }
            (Standing::Unhealthy { why: old, successes }, Answer::Bad(why)) => {
                *successes = 0;
                let is_other = *old != why;
                old.clone_from(&why);
                is_other.then_some(Some(why))
            }
        }
    }
}

/// The next moment after `now` at which somebody has his turn.
fn turn(target: &CheckTarget, now: Duration) -> Duration {
    let interval = nanoseconds(target.check.interval).max(1);
    let (phase, now) = (hash(target) % interval, nanoseconds(now));
    let since = (now % interval + (interval - phase)) % interval;
    Duration::from_nanos(now + (interval - since))
}

/// FNV-1a, which is not much for its high bits when only the last byte differs; so they are mixed as
/// MurmurHash3 ends.
fn hash(target: &CheckTarget) -> u64 {
    let text = format!("{} {}", target.address, target.check);
    let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325, fnv);
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^ (hash >> 33)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::model::ClientAddress;

    fn target(last: u8, check: &str) -> CheckTarget {
        let address = ([10, 0, 0, last], 80).into();
        CheckTarget { address, check: Arc::new(check.parse().unwrap()), header: ClientAddress::Path }
    }

    const fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    /// Asks one backend again and again; `+` for good answers, `0` for unknown ones, others are the
    /// reasons of bad ones. Gives what is told after each: `+`, a reason, or `.` for nothing.
    fn story(check: &str, answers: &str) -> String {
        let mut probing = Probing::default();
        probing.ask(&target(1, check), Duration::ZERO);
        let mut one = |answer: char| {
            let now = probing.next_due().unwrap();
            let probe = probing.start(now).unwrap();
            assert_eq!(probing.start(now + seconds(1_000)), None, "one question at a time");
            let answer = match answer {
                '+' => Answer::Good,
                '0' => Answer::Unknown,
                why => Answer::Bad(why.to_string().into()),
            };
            match probing.finish(&probe, answer, now) {
                None => ".".to_owned(),
                Some((_, None)) => "+".to_owned(),
                Some((_, Some(why))) => why.to_string(),
            }
        };
        answers.chars().map(&mut one).collect()
    }

    #[test]
    fn so_many_in_a_row() {
        for (check, answers, told) in [
            ("tcp", "+++", "..."),
            ("tcp", "xxx", "..x"),
            ("tcp", "xx+xxx", ".....x"),
            ("tcp", "xx0x", "...x"),
            ("tcp", "xxx++", "..x.+"),
            ("tcp", "xxx+x++", "..x...+"),
            ("tcp", "xxx+0+", "..x..+"),
            ("tcp", "xxxyyx", "..xy.x"),
            ("tcp", "xxx++xxx", "..x.+..x"),
            ("tcp healthy=1 unhealthy=1", "x+x+", "x+x+"),
            ("tcp healthy=3", "xxx+++", "..x..+"),
        ] {
            assert_eq!(story(check, answers), told, "{check}: {answers}");
        }
    }

    #[test]
    fn each_has_its_turn_in_the_interval() {
        let mut turns = BTreeSet::new();
        for last in 0..=255 {
            let target = target(last, "tcp");
            let first = turn(&target, Duration::ZERO);
            assert!(first > Duration::ZERO && first <= seconds(5));
            assert_eq!(turn(&target, first), first + seconds(5));
            assert_eq!(turn(&target, first - Duration::from_nanos(1)), first);
            assert_eq!(turn(&target, first + seconds(12)), first + seconds(15));
            turns.insert(first.as_millis() / 500);
        }
        assert_eq!(turns.len(), 10, "all over the interval");
    }

    #[test]
    fn whoever_is_new_and_fails_is_asked_again_soon() {
        let mut probing = Probing::default();
        probing.ask(&target(1, "tcp interval=1m unhealthy=3"), Duration::ZERO);
        let mut then = |answer: Answer| {
            let now = probing.next_due().unwrap();
            let probe = probing.start(now).unwrap();
            probing.finish(&probe, answer, now);
            probing.next_due().unwrap() - now
        };
        let bad = || Answer::Bad("x".into());
        assert!(then(bad()) <= SOON && then(bad()) <= SOON);
        // Known to be unhealthy: from its next turn on, once in an interval.
        then(bad());
        assert_eq!(then(bad()), seconds(60));
        then(Answer::Good);
        assert_eq!(then(Answer::Good), seconds(60));
        assert_eq!(then(bad()), seconds(60), "it worked once");
    }

    #[test]
    fn who_is_forgotten_begins_anew() {
        let mut probing = Probing::default();
        let target = target(1, "tcp unhealthy=1");
        probing.ask(&target, Duration::ZERO);
        let now = probing.next_due().unwrap();
        let probe = probing.start(now).unwrap();
        assert_eq!(probing.forget(&target), None);
        probing.ask(&target, now);
        assert_eq!(probing.finish(&probe, Answer::Bad("late".into()), now), None);
        let now = probing.next_due().unwrap();
        let probe = probing.start(now).unwrap();
        let bad = probing.finish(&probe, Answer::Bad("x".into()), now);
        assert_eq!(bad, Some((target.clone(), Some("x".into()))));
        assert_eq!(probing.forget(&target), Some((target.clone(), None)), "what was said is taken back");
        assert!(probing.is_empty() && probing.next_due().is_none() && probing.forget(&target).is_none());
    }

    proptest! {
        /// However late questions are asked and answered: everybody has either an open one or a time
        /// for the next, is asked once in an interval, and what was told last is how he stands.
        #[test]
        fn nobody_is_lost(steps in vec((0..6u8, 0..4u8, 0..3_000u64), 1..200)) {
            let checks = ["tcp interval=1s", "tcp interval=2s unhealthy=1", "http healthy=1"];
            let mut probing = Probing::default();
            let mut open: Vec<Probe> = Vec::new();
            let mut told: HashMap<CheckTarget, Arc<str>> = HashMap::new();
            let mut now = Duration::ZERO;
            for (what, number, wait) in steps {
                now += Duration::from_millis(wait);
                let target = target(number, checks[usize::from(number) % 3]);
                let news = match what {
                    0 => {
                        probing.ask(&target, now);
                        None
                    }
                    1 => probing.forget(&target),
                    2 | 3 => {
                        let probe = probing.start(now);
                        if let Some(probe) = probe {
                            open.retain(|other| other.target != probe.target);
                            open.push(probe);
                        }
                        None
                    }
                    _ if open.is_empty() => None,
                    _ => {
                        let probe = open.remove(0);
                        let answer = if what == 4 { Answer::Good } else { Answer::Bad("x".into()) };
                        probing.finish(&probe, answer, now)
                    }
                };
                match news {
                    Some((target, Some(why))) => drop(told.insert(target, why)),
                    Some((target, None)) => prop_assert!(told.remove(&target).is_some()),
                    None => {}
                }
                for (target, state) in &probing.targets {
                    let waits = probing.due.contains(&(state.next, target.clone()));
                    prop_assert!(waits != state.run.is_some());
                    prop_assert!(!waits || state.next <= now + target.check.interval);
                    let fails = matches!(state.standing, Standing::Unhealthy { .. });
                    prop_assert_eq!(fails, told.contains_key(target));
                }
                prop_assert!(probing.due.len() <= probing.len());
                prop_assert!(told.keys().all(|target| probing.targets.contains_key(target)));
            }
        }
    }
}
