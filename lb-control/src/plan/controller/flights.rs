//! What is on its way to the API server, and when to look again.
//!
//! At most one command per object is on its way, and until the watch shows what it did nothing
//! more is decided about that object: everything else would be decided by what is known to be old.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use super::{Command, Outcome, index::Sets};
use crate::model::{Few, ObjectRef};

/// For how long to wait for the watch to show what was done. It may never do so: if somebody
/// else's change came right after ours and the watch skipped to that.
const SHOWN_WITHIN: Duration = Duration::from_secs(5);
/// The first pause after a failure; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// The object that a command writes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    Service(ObjectRef),
    Address(IpAddr),
    Pool(String),
}

impl Key {
    /// `None` for Events, which nothing waits for.
    pub fn of(command: &Command) -> Option<Self> {
        match command {
            Command::CreateVirtualIp { address, .. }
            | Command::UpdateVirtualIp { address, .. }
            | Command::DeleteVirtualIp { address, .. }
            | Command::SetVirtualIpStatus { address, .. } => Some(Self::Address(*address)),
            Command::AddFinalizers { service, .. }
            | Command::RemoveFinalizers { service, .. }
            | Command::ApplyServiceStatus { service, .. }
            | Command::SetExternalIps { service, .. } => Some(Self::Service(service.clone())),
            Command::SetPoolStatus { pool, .. } => Some(Self::Pool(pool.clone())),
            Command::Event { .. } => None,
        }
    }
}

/// How long to pause after so many failures in a row.
pub(super) fn pause(failures: u32) -> Duration {
    let factor = 1_u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX);
    FIRST_PAUSE.saturating_mul(factor).min(LONGEST_PAUSE)
}

struct Flight {
    command: Command,
    /// Said once it is known to be done.
    events: Vec<Command>,
    /// When to give up waiting for the watch, once it is done.
    shown_by: Option<Duration>,
}

struct Pause {
    until: Duration,
    failures: u32,
    /// Whether a change of the object ends it.
    ends_by_change: bool,
}

/// Commands on their way, pauses after failures, and timers.
#[derive(Default)]
pub(super) struct Flights {
    open: BTreeMap<Key, Flight>,
    pauses: BTreeMap<Key, Pause>,
    timers: BTreeSet<(Duration, Key)>,
    /// The earliest of them that somebody [asked for](Self::wake), of each object.
    wakes: BTreeMap<Key, Duration>,
    /// Services that a VirtualIP may name by now, though no watch has shown it.
    promised: BTreeMap<IpAddr, Few<ObjectRef>>,
    promised_to: Sets<ObjectRef, IpAddr>,
    /// Services that such a promise is over for.
    concerned: BTreeSet<ObjectRef>,
}

impl Flights {
    /// Whether an address may be given to a Service by now, though no watch has shown it.
    pub fn is_promised(&self, service: &ObjectRef) -> bool {
        self.promised_to.count(service) > 0
    }

    /// Services for which that is over, since the last call.
    pub fn concerned(&mut self) -> BTreeSet<ObjectRef> {
        std::mem::take(&mut self.concerned)
    }

    fn promise(&mut self, command: &Command) {
        if let Command::CreateVirtualIp { address, services, .. }
        | Command::UpdateVirtualIp { address, services, .. } = command
        {
            self.break_promise(&Key::Address(*address));
            for service in services {
                self.promised_to.insert(service, *address);
            }
            self.promised.insert(*address, services.clone());
        }
    }

    fn break_promise(&mut self, key: &Key) {
        let Key::Address(address) = key else { return };
        for service in self.promised.remove(address).unwrap_or_default() {
            self.promised_to.remove(&service, address);
            self.concerned.insert(service);
        }
    }

    /// Whether nothing is to be decided about an object now. It is named by [`due`](Self::due) or
    /// by the return of another function here when that is over.
    pub fn is_busy(&self, key: &Key, now: Duration) -> bool {
        self.open.contains_key(key) || self.pauses.get(key).is_some_and(|pause| pause.until > now)
    }

    /// A command is given out.
    pub fn start(&mut self, command: &Command, events: Vec<Command>) {
        self.promise(command);
        if let Some(key) = Key::of(command) {
            self.open.insert(key, Flight { command: command.clone(), events, shown_by: None });
        }
    }

    /// Whether this command is on its way.
    pub fn has(&self, key: &Key, command: &Command) -> bool {
        self.open.get(key).is_some_and(|flight| flight.command == *command)
    }

    /// How many commands are on their way.
    pub fn count(&self) -> usize {
        self.open.len()
    }

    /// The command on its way for an object.
    pub fn command(&self, key: &Key) -> Option<&Command> {
        self.open.get(key).map(|flight| &flight.command)
    }

    /// It is done; the watch has to show it. Returns the Events to tell.
    pub fn arrived(&mut self, key: &Key, is_shown: bool, now: Duration) -> Vec<Command> {
        self.pauses.remove(key);
        if is_shown {
            self.break_promise(key);
            return self.open.remove(key).map(|flight| flight.events).unwrap_or_default();
        }
        let Some(flight) = self.open.get_mut(key) else { return Vec::new() };
        flight.shown_by = Some(now + SHOWN_WITHIN);
        self.timers.insert((now + SHOWN_WITHIN, key.clone()));
        std::mem::take(&mut flight.events)
    }

    /// It failed. `retry_at_once`: what is known of the object is newer than the command.
    pub fn failed(&mut self, key: &Key, outcome: &Outcome, retry_at_once: bool, now: Duration) {
        self.open.remove(key);
        // Without an answer it may have arrived all the same; the watch shows that before long.
        if retry_at_once || !matches!(outcome, Outcome::Failed(_)) {
            self.break_promise(key);
        }
        let failures = self.pauses.get(key).map_or(0, |pause| pause.failures) + 1;
        let until = if retry_at_once { now } else { now + pause(failures) };
        let ends_by_change = matches!(outcome, Outcome::Conflict(_) | Outcome::Gone);
        self.pauses.insert(key.clone(), Pause { until, failures, ends_by_change });
        self.timers.insert((until, key.clone()));
    }

    /// The object changed. `is_shown` says whether it is now as a command wants it. Returns Events.
    pub fn observe(&mut self, key: &Key, is_shown: impl Fn(&Command) -> bool, now: Duration) -> Vec<Command> {
        if let Some(pause) = self.pauses.get_mut(key).filter(|pause| pause.ends_by_change) {
            pause.until = pause.until.min(now);
        }
        if self.open.get(key).is_some_and(|flight| is_shown(&flight.command)) {
            self.pauses.remove(key);
            self.break_promise(key);
            return self.open.remove(key).map(|flight| flight.events).unwrap_or_default();
        }
        Vec::new()
    }

    /// Look at an object again then, or earlier if that was asked for before: whoever looks asks again.
    pub fn wake(&mut self, key: Key, at: Duration) {
        if self.wakes.get(&key).is_none_or(|before| at < *before) {
            self.timers.insert((at, key.clone()));
            self.wakes.insert(key, at);
        }
    }

    /// Objects to look at again.
    pub fn due(&mut self, now: Duration) -> Vec<Key> {
        let mut keys = Vec::new();
        while self.timers.first().is_some_and(|(at, _)| *at <= now) {
            let Some((at, key)) = self.timers.pop_first() else { break };
            if self.wakes.get(&key).is_some_and(|wake| *wake <= at) {
                self.wakes.remove(&key);
            }
            if self.open.get(&key).and_then(|flight| flight.shown_by).is_some_and(|by| by <= now) {
                self.open.remove(&key);
            }
            if !self.open.contains_key(&key) {
                self.break_promise(&key);
            }
            keys.push(key);
        }
        keys
    }

    /// How many timers there are.
    #[cfg(test)]
    pub fn timers(&self) -> usize {
        self.timers.len()
    }

    /// When [`due`](Self::due) has something to say at the earliest.
    pub fn next_due(&self) -> Option<Duration> {
        self.timers.first().map(|(at, _)| *at)
    }
}
