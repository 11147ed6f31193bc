//! When backends are asked whether they work, and what follows from their answers.
//!
//! Whoever is new counts as healthy until he has failed often enough: an agent that starts knows
//! nothing, and must not refuse everybody. Questions are spread over the interval by a hash of whom
//! they are for, so that many backends are not asked at once, also not after a restart. So many questions
//! may be open at a time; a Service gets of that no more than a part of what is left, so that those of
//! backends that let one wait for long do not keep others' from being asked.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use crate::model::{CheckTarget, ObjectRef};

/// Until a backend has answered well for the first time, it is asked again so soon after a failure: one
/// that does not work when the agent starts would get connections for all of the intervals.
const SOON: Duration = Duration::from_secs(1);

/// A Service has so many questions open at most for each that may still be opened. With one Service that
/// takes all it can there is room for a third of all questions, with `n` of them for one in `2n + 1`.
const SHARE: usize = 2;

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
    /// One of the Services that it is asked for.
    service: ObjectRef,
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
    queues: HashMap<ObjectRef, Queue>,
    /// The first of each queue.
    first: BTreeSet<(Duration, ObjectRef)>,
    runs: u64,
}

/// Those who are asked for a Service.
#[derive(Debug, Default)]
struct Queue {
    /// Those without an open question.
    due: BTreeSet<(Duration, CheckTarget)>,
    /// Open questions.
    open: usize,
}

impl Probing {
    /// Has somebody asked from now on, for a Service: one of those that want it.
    pub fn ask(&mut self, target: &CheckTarget, service: &ObjectRef, now: Duration) {
        if self.targets.contains_key(target) {
            return;
        }
        let next = turn(target, now);
        let (service, standing) = (service.clone(), Standing::Healthy { failures: 0 });
        self.with_queue(&service, |queue| queue.due.insert((next, target.clone())));
        self.targets.insert(target.clone(), State { service, next, run: None, is_known: false, standing });
    }

    /// Asks somebody no more. If he did not work, that is taken back: word of it may still be on its
    /// way when he is asked anew. A question that is open does not count any more.
    pub fn forget(&mut self, target: &CheckTarget) -> Option<Verdict> {
        let state = self.targets.remove(target)?;
        self.with_queue(&state.service, |queue| match state.run {
            Some(_) => queue.open -= 1,
            None => drop(queue.due.remove(&(state.next, target.clone()))),
        });
        matches!(state.standing, Standing::Unhealthy { .. }).then(|| (target.clone(), None))
    }

    /// When somebody is to be asked next, of those without an open question, if there may be so many more.
    #[must_use]
    pub fn next_due(&self, room: usize) -> Option<Duration> {
        self.next(room).map(|(at, _)| *at)
    }

    fn next(&self, room: usize) -> Option<&(Duration, ObjectRef)> {
        let has_share = |queue: &Queue| queue.open < room.saturating_mul(SHARE);
        self.first.iter().find(|(_, service)| self.queues.get(service).is_some_and(has_share))
    }

    /// Somebody who is to be asked now, if there may be so many more questions; those who have waited
    /// longest come first.
    pub fn start(&mut self, now: Duration, room: usize) -> Option<Probe> {
        let (_, service) = self.next(room).filter(|(at, _)| *at <= now)?.clone();
        let (_, target) = self.with_queue(&service, |queue| {
            queue.open += 1;
            queue.due.pop_first()
        })?;
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
        let (next, service) = (state.next, state.service.clone());
        self.with_queue(&service, |queue| {
            queue.open -= 1;
            queue.due.insert((next, target.clone()))
        });
        news.map(|why| (target.clone(), why))
    }

    /// Changes a queue, which is there as long as there is something in it.
    fn with_queue<T>(&mut self, service: &ObjectRef, change: impl FnOnce(&mut Queue) -> T) -> T {
        let queue = self.queues.entry(service.clone()).or_default();
        let first = |queue: &Queue| queue.due.first().map(|(at, _)| *at);
        let before = first(queue);
        let result = change(queue);
        let after = first(queue);
        if queue.due.is_empty() && queue.open == 0 {
            self.queues.remove(service);
        }
        if before != after {
            if let Some(at) = before {
                self.first.remove(&(at, service.clone()));
            }
            self.first.extend(after.map(|at| (at, service.clone())));
        }
        result
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

    const ROOM: usize = 100;

    fn target(last: u8, check: &str) -> CheckTarget {
        let address = ([10, 0, 0, last], 80).into();
        CheckTarget { address, check: Arc::new(check.parse().unwrap()), header: ClientAddress::Path }
    }

    /// Whoever is asked in these tests is asked for this one.
    fn web() -> ObjectRef {
        ObjectRef::new("default", "web")
    }

    const fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    /// Asks one backend again and again; `+` for good answers, `0` for unknown ones, others are the
    /// reasons of bad ones. Gives what is told after each: `+`, a reason, or `.` for nothing.
    fn story(check: &str, answers: &str) -> String {
        let mut probing = Probing::default();
        probing.ask(&target(1, check), &web(), Duration::ZERO);
        let mut one = |answer: char| {
            let now = probing.next_due(ROOM).unwrap();
            let probe = probing.start(now, ROOM).unwrap();
            assert_eq!(probing.start(now + seconds(1_000), ROOM), None, "one question at a time");
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
        probing.ask(&target(1, "tcp interval=1m unhealthy=3"), &web(), Duration::ZERO);
        let mut then = |answer: Answer| {
            let now = probing.next_due(ROOM).unwrap();
            let probe = probing.start(now, ROOM).unwrap();
            probing.finish(&probe, answer, now);
            probing.next_due(ROOM).unwrap() - now
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
        probing.ask(&target, &web(), Duration::ZERO);
        let now = probing.next_due(ROOM).unwrap();
        let probe = probing.start(now, ROOM).unwrap();
        assert_eq!(probing.forget(&target), None);
        probing.ask(&target, &web(), now);
        assert_eq!(probing.finish(&probe, Answer::Bad("late".into()), now), None);
        let now = probing.next_due(ROOM).unwrap();
        let probe = probing.start(now, ROOM).unwrap();
        let bad = probing.finish(&probe, Answer::Bad("x".into()), now);
        assert_eq!(bad, Some((target.clone(), Some("x".into()))));
        assert_eq!(probing.forget(&target), Some((target.clone(), None)), "what was said is taken back");
        assert!(probing.is_empty() && probing.next_due(ROOM).is_none() && probing.forget(&target).is_none());
    }

    /// Of a Service whose backends let one wait for minutes.
    #[test]
    fn one_service_does_not_keep_the_others_waiting() {
        const PLACES: usize = 30;
        let mut probing = Probing::default();
        let slow = ObjectRef::new("default", "slow");
        for last in 0..100 {
            probing.ask(&target(last, "tcp interval=5m timeout=5m"), &slow, Duration::ZERO);
        }
        let now = seconds(300);
        let mut open = Vec::new();
        while let Some(probe) = probing.start(now, PLACES - open.len()) {
            open.push(probe);
        }
        assert_eq!(open.len(), 20, "two thirds");
        let room = PLACES - open.len();
        assert_eq!(probing.next_due(room), None, "the others of it wait for its first ones");
        for last in 0..100 {
            probing.ask(&target(last, "tcp interval=1s"), &web(), now);
        }
        let due = probing.next_due(room).unwrap();
        assert!(due > now && due <= now + seconds(1), "{due:?}");
        let now = now + seconds(1);
        let mut asked = BTreeSet::new();
        while asked.len() < 100 {
            let probe = probing.start(now, room).expect("somebody who waits");
            assert!(probe.target.check.interval == seconds(1) && asked.insert(probe.target.address));
            probing.finish(&probe, Answer::Good, now);
        }
        // Whoever is forgotten gives his place back.
        probing.forget(&open[0].target);
        assert_eq!(probing.start(now, room + 1).unwrap().target.check, open[0].target.check);
        for last in 0..100 {
            probing.forget(&target(last, "tcp interval=5m timeout=5m"));
            probing.forget(&target(last, "tcp interval=1s"));
        }
        assert!(probing.is_empty() && probing.queues.is_empty() && probing.first.is_empty());
    }

    proptest! {
        /// However late questions are asked and answered: everybody has either an open one or a time
        /// for the next, is asked once in an interval, and what was told last is how he stands.
        #[test]
        fn nobody_is_lost(steps in vec((0..6u8, 0..4u8, 0..3_000u64), 1..200)) {
            let services = [web(), ObjectRef::new("default", "dns")];
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
                        probing.ask(&target, &services[usize::from(number) % 2], now);
                        None
                    }
                    1 => probing.forget(&target),
                    2 | 3 => {
                        let probe = probing.start(now, ROOM);
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
                    let queue = &probing.queues[&state.service];
                    let waits = queue.due.contains(&(state.next, target.clone()));
                    prop_assert!(waits != state.run.is_some());
                    prop_assert!(!waits || state.next <= now + target.check.interval);
                    let fails = matches!(state.standing, Standing::Unhealthy { .. });
                    prop_assert_eq!(fails, told.contains_key(target));
                }
                let first = |(service, queue): (&ObjectRef, &Queue)| {
                    Some((queue.due.first()?.0, service.clone()))
                };
                prop_assert_eq!(&probing.queues.iter().filter_map(first).collect::<BTreeSet<_>>(), &probing.first);
                let open: usize = probing.queues.values().map(|queue| queue.open).sum();
                let waiting: usize = probing.queues.values().map(|queue| queue.due.len()).sum();
                prop_assert_eq!(open, probing.targets.values().filter(|state| state.run.is_some()).count());
                prop_assert_eq!(open + waiting, probing.len());
                prop_assert!(told.keys().all(|target| probing.targets.contains_key(target)));
            }
        }
    }
}
