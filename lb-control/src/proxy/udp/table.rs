//! Sessions: who sends to which entry, how long they have been idle, who goes when there are too many.
//!
//! No clock and no sockets: `now` is the time since any fixed moment, and never goes back.

use std::{collections::HashMap, hash::Hash, time::Duration};

/// How long a session lives without traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Until its backend has answered.
    pub unreplied: Duration,
    /// From then on.
    pub replied: Duration,
}

/// How much of a session has been seen: which list it is in. Who floods with made-up addresses never gets
/// beyond [`Stage::Replied`], so those go first when there are too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The client has sent.
    Unreplied,
    /// The backend has answered.
    Replied,
    /// And the client has sent again: it gets what is sent to it.
    Proven,
}

/// Names a session, and no other that has its place later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token {
    place: u32,
    generation: u32,
}

impl Token {
    /// The topmost bit of its number is never set.
    const GENERATIONS: u32 = u32::MAX >> 1;
}

impl From<Token> for u64 {
    fn from(token: Token) -> Self {
        Self::from(token.generation) << 32 | Self::from(token.place)
    }
}

impl From<u64> for Token {
    fn from(number: u64) -> Self {
        Self { place: number as u32, generation: (number >> 32) as u32 }
    }
}

const NONE: u32 = u32::MAX;

#[derive(Debug)]
struct Place<K, T> {
    generation: u32,
    last_used: Duration,
    stage: Stage,
    older: u32,
    newer: u32,
    session: Option<(K, T)>,
}

/// The least recently used first.
#[derive(Clone, Copy, Debug)]
struct List {
    oldest: u32,
    newest: u32,
}

/// A bounded number of sessions, by key.
#[derive(Debug)]
pub struct Sessions<K, T> {
    bound: usize,
    timeouts: Timeouts,
    places: Vec<Place<K, T>>,
    free: Vec<u32>,
    by_key: HashMap<K, u32>,
    lists: [List; 3],
}

impl<K: Clone + Eq + Hash, T> Sessions<K, T> {
    /// None yet. There are never more than `bound` (at least 1).
    #[must_use]
    pub fn new(bound: usize, timeouts: Timeouts) -> Self {
        let bound = bound.clamp(1, NONE as usize - 1);
        let empty = List { oldest: NONE, newest: NONE };
        Self {
            bound,
            timeouts,
            places: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::new(),
            lists: [empty; 3],
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Whether one more would push out another.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.len() >= self.bound
    }

    /// The session of a key.
    #[must_use]
    pub fn find(&self, key: &K) -> Option<Token> {
        self.by_key.get(key).map(|&place| self.token(place))
    }

    /// A session.
    #[must_use]
    pub fn get(&self, token: Token) -> Option<&(K, T)> {
        let place = self.places.get(token.place as usize)?;
        place.session.as_ref().filter(|_| place.generation == token.generation)
    }

    /// A session, to change.
    pub fn get_mut(&mut self, token: Token) -> Option<&mut T> {
        let place = self.places.get_mut(token.place as usize)?;
        let is_it = place.generation == token.generation;
        place.session.as_mut().filter(|_| is_it).map(|(_, session)| session)
    }

    /// How much of it has been seen.
    #[must_use]
    pub fn stage(&self, token: Token) -> Option<Stage> {
        self.get(token).map(|_| self.places[token.place as usize].stage)
    }

    /// A session that begins. The key must have none, and there must be [room](Self::is_full).
    pub fn insert(&mut self, key: K, session: T, now: Duration) -> Token {
        debug_assert!(!self.is_full() && !self.by_key.contains_key(&key));
        let place = self.free.pop().unwrap_or_else(|| {
            let (generation, stage) = (0, Stage::Unreplied);
            let (last_used, session) = (now, None);
            self.places.push(Place { generation, last_used, stage, older: NONE, newer: NONE, session });
            self.places.len() as u32 - 1
        });
        self.by_key.insert(key.clone(), place);
        let it = &mut self.places[place as usize];
        (it.session, it.last_used) = (Some((key, session)), now);
        self.append(place, Stage::Unreplied);
        self.token(place)
    }

    /// The client has sent.
    pub fn client_sent(&mut self, token: Token, now: Duration) {
        let next = match self.stage(token) {
            None => return,
            Some(Stage::Unreplied) => Stage::Unreplied,
            Some(Stage::Replied | Stage::Proven) => Stage::Proven,
        };
        self.used(token.place, next, now);
    }

    /// The backend has sent.
    pub fn backend_sent(&mut self, token: Token, now: Duration) {
        let next = match self.stage(token) {
            None => return,
            Some(Stage::Unreplied | Stage::Replied) => Stage::Replied,
            Some(Stage::Proven) => Stage::Proven,
        };
        self.used(token.place, next, now);
    }

    /// Ends a session.
    pub fn remove(&mut self, token: Token) -> Option<(K, T)> {
        self.get(token)?;
        self.unlink(token.place);
        let place = &mut self.places[token.place as usize];
        place.generation = (place.generation + 1) & Token::GENERATIONS;
        let session = place.session.take();
        self.free.push(token.place);
        if let Some((key, _)) = &session {
            self.by_key.remove(key);
        }
        session
    }

    /// A session that has been idle for too long.
    #[must_use]
    pub fn expired(&self, now: Duration) -> Option<Token> {
        let oldest = [Stage::Unreplied, Stage::Replied, Stage::Proven].into_iter();
        let is_over = |place: &u32| now >= self.deadline(*place);
        oldest
            .map(|stage| self.lists[stage as usize].oldest)
            .find(|place| *place != NONE && is_over(place))
            .map(|place| self.token(place))
    }

    /// Who goes first when there are too many: the longest idle of those whose client may be made up, else
    /// of all.
    #[must_use]
    pub fn oldest(&self) -> Option<Token> {
        let oldest = |stage: Stage| Some(self.lists[stage as usize].oldest).filter(|place| *place != NONE);
        let beginners = [oldest(Stage::Unreplied), oldest(Stage::Replied)].into_iter().flatten();
        let first = beginners.min_by_key(|place| self.places[*place as usize].last_used);
        first.or_else(|| oldest(Stage::Proven)).map(|place| self.token(place))
    }

    /// All of them, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (Token, &K, &T)> {
        let used = (0u32..).zip(&self.places).filter_map(|(at, place)| Some((at, place.session.as_ref()?)));
        used.map(|(at, (key, session))| (self.token(at), key, session))
    }

    fn token(&self, place: u32) -> Token {
        Token { place, generation: self.places[place as usize].generation }
    }

    fn deadline(&self, place: u32) -> Duration {
        let place = &self.places[place as usize];
        let timeout = match place.stage {
            Stage::Unreplied => self.timeouts.unreplied,
            Stage::Replied | Stage::Proven => self.timeouts.replied,
        };
        place.last_used + timeout
    }

    fn used(&mut self, place: u32, stage: Stage, now: Duration) {
        let it = &mut self.places[place as usize];
        it.last_used = now;
        // With few sessions it often is the newest already.
        if it.stage != stage || it.newer != NONE {
            self.unlink(place);
            self.append(place, stage);
        }
    }

    fn unlink(&mut self, place: u32) {
        let Place { older, newer, stage, .. } = self.places[place as usize];
        let list = &mut self.lists[stage as usize];
        match older {
            NONE => list.oldest = newer,
            _ => self.places[older as usize].newer = newer,
        }
        match newer {
            NONE => list.newest = older,
            _ => self.places[newer as usize].older = older,
        }
    }

    fn append(&mut self, place: u32, stage: Stage) {
        let list = &mut self.lists[stage as usize];
        let older = std::mem::replace(&mut list.newest, place);
        match older {
            NONE => list.oldest = place,
            _ => self.places[older as usize].newer = place,
        }
        let it = &mut self.places[place as usize];
        (it.stage, it.older, it.newer) = (stage, older, NONE);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn sessions(bound: usize) -> Sessions<u32, char> {
        Sessions::new(bound, Timeouts { unreplied: seconds(30), replied: seconds(120) })
    }

    #[test]
    fn idle_sessions_end() {
        let mut sessions = sessions(9);
        let a = sessions.insert(1, 'a', seconds(0));
        let b = sessions.insert(2, 'b', seconds(1));
        assert_eq!((sessions.expired(seconds(29)), sessions.expired(seconds(30))), (None, Some(a)));
        sessions.backend_sent(a, seconds(2));
        assert_eq!((sessions.expired(seconds(30)), sessions.expired(seconds(31))), (None, Some(b)));
        sessions.client_sent(b, seconds(5));
        assert_eq!(sessions.expired(seconds(34)), None, "unreplied, but in use");
        assert_eq!(sessions.expired(seconds(35)), Some(b));
        assert_eq!(sessions.remove(b), Some((2, 'b')));
        assert_eq!((sessions.expired(seconds(121)), sessions.expired(seconds(122))), (None, Some(a)));
        sessions.client_sent(a, seconds(100));
        assert_eq!((sessions.expired(seconds(219)), sessions.expired(seconds(220))), (None, Some(a)));
        assert_eq!(sessions.stage(a), Some(Stage::Proven));
        sessions.remove(a);
        assert_eq!((sessions.len(), sessions.oldest()), (0, None));
    }

    #[test]
    fn made_up_clients_go_before_those_that_get_answers() {
        let mut sessions = sessions(9);
        let [a, b, c, d] = [1, 2, 3, 4].map(|key| sessions.insert(key, 'x', seconds(key.into())));
        sessions.backend_sent(a, seconds(5));
        sessions.client_sent(a, seconds(6));
        sessions.backend_sent(b, seconds(7));
        sessions.client_sent(d, seconds(9));
        sessions.client_sent(a, seconds(10));
        let mut order = Vec::new();
        while let Some(token) = sessions.oldest() {
            order.push(token);
            sessions.remove(token);
        }
        assert_eq!(order, [c, b, d, a]);
    }

    #[test]
    fn a_token_names_no_later_session() {
        let mut sessions = sessions(1);
        let first = sessions.insert(1, 'a', seconds(0));
        assert!(sessions.is_full());
        sessions.remove(first);
        let second = sessions.insert(1, 'b', seconds(0));
        assert_ne!(first, second);
        assert_eq!(sessions.get(first), None);
        assert_eq!(sessions.remove(first), None);
        sessions.backend_sent(first, seconds(1));
        assert_eq!(sessions.stage(second), Some(Stage::Unreplied));
        assert_eq!(sessions.find(&1), Some(second));
        assert_eq!(Token::from(u64::from(second)), second);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u32),
        Client(u32),
        Backend(u32),
        Remove(u32),
        Expire,
    }

    fn step() -> impl Strategy<Value = Step> {
        let key = 0u32..12;
        prop_oneof![
            key.clone().prop_map(Step::Insert),
            key.clone().prop_map(Step::Client),
            key.clone().prop_map(Step::Backend),
            key.prop_map(Step::Remove),
            Just(Step::Expire),
        ]
    }

    proptest! {
        /// Against a list that is searched.
        #[test]
        fn as_a_plain_list(steps in prop::collection::vec((step(), 0u64..20), 1..200)) {
            let mut sessions = sessions(8);
            // Key, stage, last used.
            let mut plain: Vec<(u32, Stage, u64)> = Vec::new();
            let mut now = 0;
            for (step, pause) in steps {
                // Never two at one time, so that the order is that of the times.
                now += pause + 1;
                match step {
                    Step::Insert(key) if plain.iter().all(|one| one.0 != key) => {
                        if sessions.is_full() {
                            let (key, _) = sessions.remove(sessions.oldest().unwrap()).unwrap();
                            let class = |stage: Stage| stage == Stage::Proven;
                            let first = plain.iter().min_by_key(|one| (class(one.1), one.2)).unwrap().0;
                            prop_assert_eq!(key, first);
                            plain.retain(|one| one.0 != key);
                        }
                        sessions.insert(key, 'x', seconds(now));
                        plain.push((key, Stage::Unreplied, now));
                    }
                    Step::Client(key) | Step::Insert(key) => {
                        let Some(token) = sessions.find(&key) else { continue };
                        sessions.client_sent(token, seconds(now));
                        let one = plain.iter_mut().find(|one| one.0 == key).unwrap();
                        one.1 = if one.1 == Stage::Unreplied { Stage::Unreplied } else { Stage::Proven };
                        one.2 = now;
                    }
                    Step::Backend(key) => {
                        let Some(token) = sessions.find(&key) else { continue };
                        sessions.backend_sent(token, seconds(now));
                        let one = plain.iter_mut().find(|one| one.0 == key).unwrap();
                        one.1 = if one.1 == Stage::Proven { Stage::Proven } else { Stage::Replied };
                        one.2 = now;
                    }
                    Step::Remove(key) => {
                        if let Some(token) = sessions.find(&key) {
                            sessions.remove(token);
                        }
                        plain.retain(|one| one.0 != key);
                    }
                    Step::Expire => {
                        while let Some(token) = sessions.expired(seconds(now)) {
                            sessions.remove(token);
                        }
                        let limit = |stage| if stage == Stage::Unreplied { 30 } else { 120 };
                        plain.retain(|one| now < one.2 + limit(one.1));
                    }
                }
                let mut keys: Vec<_> = sessions.iter().map(|(_, key, _)| *key).collect();
                keys.sort_unstable();
                let mut expected: Vec<_> = plain.iter().map(|one| one.0).collect();
                expected.sort_unstable();
                prop_assert_eq!(keys, expected);
                for (key, stage, _) in &plain {
                    prop_assert_eq!(sessions.stage(sessions.find(key).unwrap()), Some(*stage));
                }
            }
        }
    }
}
