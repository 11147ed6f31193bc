//! What may go wrong with an API server, on demand.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::call::{Call, Verb};

/// Which requests a fault meets. What is empty meets all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Filter {
    /// E.g. `list`.
    pub verb: String,
    /// E.g. `services`; `services/status` is the subresource alone.
    pub resource: String,
    /// E.g. `pointsman-test`.
    pub namespace: String,
    /// Of the object.
    pub name: String,
    /// Whose requests: the user name, or the beginning of the user agent.
    pub user: String,
}

impl Filter {
    /// All requests with a verb for a resource; either may be empty.
    #[must_use]
    pub fn of(verb: &str, resource: &str) -> Self {
        Self { verb: verb.into(), resource: resource.into(), ..Self::default() }
    }

    /// Whether it meets a request.
    #[must_use]
    pub fn meets(&self, call: &Call, user: &str) -> bool {
        let full = format!("{}/{}", call.plural, call.subresource);
        let is = |wanted: &str, given: &str| wanted.is_empty() || wanted == given;
        is(&self.verb, call.verb.as_str())
            && (is(&self.resource, &call.plural) || self.resource == full)
            && is(&self.namespace, &call.namespace)
            && is(&self.name, &call.name)
            && (is(&self.user, user) || call.user_agent.starts_with(&self.user))
    }
}

/// What happens to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Effect {
    /// It is answered with an error.
    #[serde(rename_all = "camelCase")]
    Error {
        /// HTTP status, e.g. 500.
        code: u16,
        /// Seconds, for `Retry-After`.
        #[serde(default)]
        retry_after: Option<u32>,
    },
    /// It is answered later.
    #[serde(rename_all = "camelCase")]
    Delay {
        /// How much later.
        milliseconds: u64,
    },
    /// Nothing comes, while the connection stays open. A watch that is open falls silent too, and
    /// goes on when the fault is lifted.
    Stall,
    /// The connection is closed without an answer; the request is not executed.
    Drop,
    /// It is executed, and the connection is closed without an answer.
    DropAfter,
}

#[derive(Clone, Debug)]
struct Fault {
    id: u64,
    filter: Filter,
    effect: Effect,
    /// How many requests more it meets; `None`: until it is lifted.
    left: Option<u32>,
}

/// The faults that are set.
#[derive(Debug, Default)]
pub struct Faults(Mutex<Set>);

#[derive(Debug, Default)]
struct Set {
    last_id: u64,
    faults: Vec<Fault>,
    closes: Vec<Filter>,
}

impl Faults {
    fn set(&self) -> MutexGuard<'_, Set> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets a fault for the next `times` requests, or until it is lifted; gives its number.
    pub fn add(&self, filter: Filter, effect: Effect, times: Option<u32>) -> u64 {
        let mut set = self.set();
        set.last_id += 1;
        let id = set.last_id;
        set.faults.push(Fault { id, filter, effect, left: times });
        id
    }

    /// Lifts a fault.
    pub fn lift(&self, id: u64) {
        self.set().faults.retain(|fault| fault.id != id);
    }

    /// Lifts all faults.
    pub fn clear(&self) {
        self.set().faults.clear();
    }

    /// How often a fault with a number of times will still strike; 0 when it is over.
    #[must_use]
    pub fn left(&self, id: u64) -> u32 {
        let set = self.set();
        set.faults.iter().find(|fault| fault.id == id).and_then(|fault| fault.left).unwrap_or_default()
    }

    /// Closes the watches that are open and meet the filter.
    pub fn close_watches(&self, filter: Filter) {
        self.set().closes.push(filter);
    }

    /// How many orders to close watches there were.
    #[must_use]
    pub fn closes(&self) -> u64 {
        self.set().closes.len() as u64
    }

    /// Whether a watch that began after `closes` orders has to end.
    #[must_use]
    pub fn closed_since(&self, closes: u64, call: &Call, user: &str) -> bool {
        let set = self.set();
        let seen = usize::try_from(closes).unwrap_or(usize::MAX);
        set.closes.iter().skip(seen).any(|filter| filter.meets(call, user))
    }

    /// Whether an open watch is silent.
    #[must_use]
    pub fn stalls(&self, call: &Call, user: &str) -> bool {
        let set = self.set();
        set.faults.iter().any(|fault| fault.effect == Effect::Stall && fault.filter.meets(call, user))
    }

    /// What happens to a request that comes now. Silence of watches is not counted here: they are
    /// accepted and then stall.
    #[must_use]
    pub fn strike(&self, call: &Call, user: &str) -> Vec<Effect> {
        let mut set = self.set();
        let mut effects = Vec::new();
        for fault in &mut set.faults {
            let silent_watch = call.verb == Verb::Watch && fault.effect == Effect::Stall;
            if !silent_watch && fault.left != Some(0) && fault.filter.meets(call, user) {
                effects.push(fault.effect.clone());
                fault.left = fault.left.map(|left| left - 1);
            }
        }
        set.faults.retain(|fault| fault.left != Some(0));
        effects
    }
}

/// How long a request is held that stalls: longer than any client waits.
pub const STALL: Duration = Duration::from_secs(3600);
