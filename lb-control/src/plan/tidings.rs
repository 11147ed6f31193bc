//! When an agent tells what its own node sees of a Service, or how the node itself is.
//!
//! What was told last is what people read, so it must not stay untrue. And it must not be too much: states
//! are gathered for a moment before they are told, and what changes again and again is told at growing
//! intervals, always as it is by then. With that an agent stays below what is allowed for one object
//! (`publish::events`). What did not arrive is told again.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::controller::{Command, Topic};
use crate::model::ObjectRef;

/// For so long counts are gathered: of many backends that fail at once, the first would be told alone.
const GATHER: Duration = Duration::from_secs(3);
/// Between what is told and what is told next of the same topic…
const SHORTEST: Duration = Duration::from_secs(10);
/// …which doubles up to this, as long as it does not rest for twice as long.
const LONGEST: Duration = Duration::from_secs(300);
/// What did not arrive is tried again after so long, at the earliest.
const RETRY: Duration = Duration::from_secs(30);
/// That all is well again is remembered for so long after it was told: it may turn out not to have arrived.
const EXPIRY: Duration = Duration::from_secs(600);

type Key = (ObjectRef, Topic);

#[derive(Debug, PartialEq, Eq)]
enum Told {
    Nothing,
    This(Command),
    /// Nobody knows what was told last, since something did not arrive.
    Unknown,
}

#[derive(Debug)]
struct State {
    event: Command,
    told: Told,
    told_at: Duration,
    /// The time after `told_at` in which nothing is told.
    pause: Duration,
    /// When it is looked at again.
    due: Option<Duration>,
}

impl State {
    fn is_news(&self) -> bool {
        match &self.told {
            Told::Nothing => is_bad(&self.event),
            // However many there are by now: all is well.
            Told::This(told) => *told != self.event && (is_bad(told) || is_bad(&self.event)),
            Told::Unknown => true,
        }
    }
}

/// Remembers what was told, and what is to be. Times are since any fixed moment.
#[derive(Debug, Default)]
pub struct Tidings {
    states: BTreeMap<Key, State>,
    due: BTreeSet<(Duration, Key)>,
}

impl Tidings {
    /// Something stands otherwise than before: `event` says how, and is told when it is time. That all is
    /// well is told only after it was told that it is not.
    pub fn news(&mut self, about: &ObjectRef, topic: Topic, event: Command, now: Duration) {
        let key = (about.clone(), topic);
        let state = self.states.entry(key.clone()).or_insert_with(|| State {
            event: event.clone(),
            told: Told::Nothing,
            told_at: Duration::ZERO,
            pause: Duration::ZERO,
            due: None,
        });
        let was_news = state.due.is_some() && state.is_news();
        state.event = event;
        let due = match (was_news, state.is_news()) {
            (true, true) => state.due,
            (false, true) => {
                let gather = if topic.is_counted() { GATHER } else { Duration::ZERO };
                Some((now + gather).max(state.told_at + state.pause))
            }
            (_, false) if state.told == Told::Nothing => return self.over(about, topic),
            (_, false) => rest(state),
        };
        self.look_at(key, due);
    }

    /// This node has nothing to say about it any more.
    pub fn over(&mut self, about: &ObjectRef, topic: Topic) {
        let key = (about.clone(), topic);
        self.look_at(key.clone(), None);
        self.states.remove(&key);
    }

    /// An Event did not arrive, or was too much.
    pub fn not_told(&mut self, event: &Command, now: Duration) {
        let Command::Event { about, reason, .. } = event else { return };
        let Some(topic) = Topic::of(reason) else { return };
        let key = (about.object.clone(), topic);
        // What was told since then takes its place.
        let is_last = |state: &&mut State| matches!(&state.told, Told::This(told) if told == event);
        let Some(state) = self.states.get_mut(&key).filter(is_last) else { return };
        state.told = Told::Unknown;
        let due = now + RETRY.max(state.pause);
        self.look_at(key, Some(due));
    }

    /// Events that are to be told now.
    pub fn take_due(&mut self, now: Duration) -> Vec<Command> {
        let mut events = Vec::new();
        while self.next_due().is_some_and(|due| due <= now)
            && let Some((_, key)) = self.due.pop_first()
        {
            let Some(state) = self.states.get_mut(&key) else { continue };
            state.due = None;
            if !state.is_news() {
                self.states.remove(&key);
                continue;
            }
            let rested = now.saturating_sub(state.told_at) >= state.pause * 2;
            state.pause = if rested { SHORTEST } else { (state.pause * 2).min(LONGEST) };
            state.told_at = now;
            state.told = Told::This(state.event.clone());
            events.push(state.event.clone());
            let due = rest(state);
            self.look_at(key, due);
        }
        events
    }

    /// When there is something to tell, or to forget.
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        self.due.first().map(|(due, _)| *due)
    }

    fn look_at(&mut self, key: Key, due: Option<Duration>) {
        let Some(state) = self.states.get_mut(&key) else { return };
        if let Some(before) = std::mem::replace(&mut state.due, due) {
            self.due.remove(&(before, key.clone()));
        }
        self.due.extend(due.map(|due| (due, key)));
    }
}

/// When a state is forgotten of which nothing is to be told: not while something is wrong.
fn rest(state: &State) -> Option<Duration> {
    (!is_bad(&state.event)).then_some(state.told_at + EXPIRY)
}

fn is_bad(event: &Command) -> bool {
    matches!(event, Command::Event { warning: true, .. })
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::plan::controller::EventTarget;

    const fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn web() -> ObjectRef {
        ObjectRef::new("default", "web")
    }

    /// That so many backends fail.
    fn event(unhealthy: u32) -> Command {
        let (bad, good) = Topic::Health.reasons();
        let reason = if unhealthy > 0 { bad } else { good.unwrap() };
        Command::Event {
            about: EventTarget::service(&web(), "u"),
            warning: unhealthy > 0,
            reason: reason.to_owned(),
            note: unhealthy.to_string(),
        }
    }

    /// Counts that are told, with when, until nothing is due any more.
    fn rest_of(tidings: &mut Tidings) -> Vec<(u64, Command)> {
        let mut told = Vec::new();
        while let Some(due) = tidings.next_due() {
            told.extend(tidings.take_due(due).into_iter().map(|event| (due.as_secs(), event)));
        }
        told
    }

    /// What is told of a story of `(second, how many fail)`.
    fn story(news: &[(u64, u32)]) -> Vec<(u64, Command)> {
        let (mut tidings, mut told) = (Tidings::default(), Vec::new());
        for (at, unhealthy) in news {
            while let Some(due) = tidings.next_due().filter(|due| *due <= seconds(*at)) {
                told.extend(tidings.take_due(due).into_iter().map(|event| (due.as_secs(), event)));
            }
            tidings.news(&web(), Topic::Health, event(*unhealthy), seconds(*at));
        }
        told.extend(rest_of(&mut tidings));
        told
    }

    #[test]
    fn what_stays_so_is_told_once() {
        for (news, told) in [
            (&[(100, 1)][..], &[(103, 1)][..]),
            (&[(100, 1), (101, 2), (102, 3)], &[(103, 3)]),
            // Gone before it was told; and that all is well is no news of its own.
            (&[(100, 1), (101, 0)], &[]),
            (&[(100, 0)], &[]),
            (&[(100, 1), (200, 0), (300, 1)], &[(103, 1), (203, 0), (303, 1)]),
            // Once more the same, after something else.
            (&[(100, 1), (120, 2), (140, 1)], &[(103, 1), (123, 2), (143, 1)]),
            (&[(100, 1), (104, 2), (105, 1)], &[(103, 1)]),
            // What it is by then.
            (&[(100, 1), (104, 0), (105, 2), (106, 0)], &[(103, 1), (113, 0)]),
        ] {
            let told: Vec<_> = told.iter().map(|(at, unhealthy)| (*at, event(*unhealthy))).collect();
            assert_eq!(story(news), told, "{news:?}");
        }
    }

    /// Of many that fail one by one, and come back one by one.
    #[test]
    fn the_last_state_is_told_however_much_happens() {
        let up = (1..=1_000).map(|number| (u64::from(number), number));
        let down = (1..=1_000).map(|number| (u64::from(1_000 + number), 1_000 - number));
        let told = story(&up.chain(down).collect::<Vec<_>>());
        assert_eq!(told.last(), Some(&(2_114, event(0))));
        assert!(told.len() < 15, "{}", told.len());
        let gaps: Vec<_> = told.windows(2).map(|two| two[1].0 - two[0].0).collect();
        assert_eq!(gaps[..7], [10, 20, 40, 80, 160, 300, 300]);
    }

    #[test]
    fn what_did_not_arrive_is_told_as_it_is_by_then() {
        let mut tidings = Tidings::default();
        tidings.news(&web(), Topic::Health, event(1), seconds(0));
        let told = tidings.take_due(seconds(3));
        tidings.news(&web(), Topic::Health, event(0), seconds(20));
        let healthy = tidings.take_due(seconds(23));
        assert_eq!(healthy, [event(0)]);
        tidings.not_told(&told[0], seconds(24));
        assert!(rest_of(&mut tidings).is_empty(), "the newer one arrived");

        tidings.news(&web(), Topic::Health, event(1), seconds(2_000));
        tidings.take_due(seconds(2_003));
        tidings.news(&web(), Topic::Health, event(0), seconds(2_100));
        let healthy = tidings.take_due(seconds(2_103));
        tidings.not_told(&healthy[0], seconds(2_110));
        assert_eq!(tidings.next_due(), Some(seconds(2_140)));
        assert_eq!(rest_of(&mut tidings), [(2_140, event(0))]);
        assert!(tidings.states.is_empty() && tidings.due.is_empty());
    }

    #[test]
    fn what_is_over_is_told_no_more() {
        let mut tidings = Tidings::default();
        tidings.news(&web(), Topic::Health, event(1), seconds(0));
        tidings.over(&web(), Topic::Health);
        assert_eq!((tidings.next_due(), tidings.states.len()), (None, 0));
        tidings.news(&web(), Topic::Serving, event(1), seconds(5));
        assert_eq!(tidings.take_due(seconds(5)).len(), 1, "nothing is gathered");
        assert_eq!(tidings.next_due(), None);
    }

    proptest! {
        /// Whatever happens: in the end the last state was told, unless nothing ever was; never too much.
        #[test]
        fn what_was_told_last_is_true(steps in vec((0..200u64, 0..3u32), 1..60)) {
            let mut now = 1_000;
            let mut news = Vec::new();
            for (wait, unhealthy) in steps {
                now += wait;
                news.push((now, unhealthy));
            }
            let told = story(&news);
            let last = news.last().map_or(0, |(_, unhealthy)| *unhealthy);
            match told.last() {
                Some((_, told)) => prop_assert_eq!(told, &event(last)),
                None => prop_assert_eq!(last, 0),
            }
            prop_assert!(told.windows(2).all(|two| two[1].0 - two[0].0 >= SHORTEST.as_secs()));
        }
    }
}
