//! Every request that came, for tests that compare them with a role or count them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::Serialize;

use super::call::{Call, Verb};

/// A request as it was answered.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Request {
    /// What was to be done.
    pub verb: Verb,
    /// Empty for the core group.
    pub group: String,
    /// E.g. `services`.
    pub resource: String,
    /// Empty for the object itself.
    pub subresource: String,
    /// Empty for cluster-scoped objects and for all namespaces.
    pub namespace: String,
    /// Of the object; empty for lists.
    pub name: String,
    /// Who asked, e.g. `system:serviceaccount:a:b`.
    pub user: String,
    /// What asked, e.g. `kubectl/v1.36.0`.
    pub user_agent: String,
    /// The parameters, as they came.
    pub field_manager: String,
    /// HTTP status of the answer; 0 when there was none.
    pub code: u16,
    /// Whether anything was different afterwards.
    pub changed: bool,
}

impl Request {
    /// Of a request that is not answered yet.
    #[must_use]
    pub fn new(call: &Call, user: &str) -> Self {
        Self {
            verb: call.verb,
            group: call.group.clone(),
            resource: call.plural.clone(),
            subresource: call.subresource.clone(),
            namespace: call.namespace.clone(),
            name: call.name.clone(),
            user: user.to_owned(),
            user_agent: call.user_agent.clone(),
            field_manager: call.query.get("fieldManager").to_owned(),
            code: 0,
            changed: false,
        }
    }

    /// `services`, or `services/status`.
    #[must_use]
    pub fn full_resource(&self) -> String {
        match self.subresource.as_str() {
            "" => self.resource.clone(),
            subresource => format!("{}/{subresource}", self.resource),
        }
    }
}

/// The requests so far, and the watches that are open.
#[derive(Debug, Default)]
pub struct Record {
    requests: Mutex<Vec<Request>>,
    watches: Arc<Mutex<BTreeMap<(String, String), usize>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Record {
    /// Writes a request down.
    pub fn push(&self, request: Request) {
        lock(&self.requests).push(request);
    }

    /// All requests so far.
    #[must_use]
    pub fn all(&self) -> Vec<Request> {
        lock(&self.requests).clone()
    }

    /// Forgets them.
    pub fn clear(&self) {
        lock(&self.requests).clear();
    }

    /// Counts a watch for as long as what is returned lives.
    #[must_use]
    pub fn open_watch(&self, resource: &str, user: &str) -> OpenWatch {
        let key = (resource.to_owned(), user.to_owned());
        *lock(&self.watches).entry(key.clone()).or_default() += 1;
        OpenWatch { watches: self.watches.clone(), key }
    }

    /// How many watches of a resource are open.
    #[must_use]
    pub fn watches(&self, resource: &str) -> usize {
        lock(&self.watches).iter().filter(|((of, _), _)| of == resource).map(|(_, count)| count).sum()
    }
}

/// A watch that is open.
#[derive(Debug)]
pub struct OpenWatch {
    watches: Arc<Mutex<BTreeMap<(String, String), usize>>>,
    key: (String, String),
}

impl Drop for OpenWatch {
    fn drop(&mut self) {
        if let Some(count) = lock(&self.watches).get_mut(&self.key) {
            *count -= 1;
        }
    }
}
