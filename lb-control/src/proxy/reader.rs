//! What the proxy counts, for those who ask beside it.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

use super::{clock, counts::FrontendCounts, entry::Entry};
use crate::model::ServiceKey;

/// Tells what the proxy counts, from other threads.
#[derive(Clone, Debug, Default)]
pub struct Reader(Arc<RwLock<BTreeMap<ServiceKey, Arc<Entry>>>>);

impl Reader {
    /// What was counted.
    #[must_use]
    pub fn counts(&self) -> Vec<FrontendCounts> {
        let entries = self.0.read().unwrap_or_else(PoisonError::into_inner).clone();
        let now = clock::now();
        entries.values().map(|entry| entry.counts(now)).collect()
    }

    /// Takes an entry in, or out.
    pub(super) fn has(&self, key: &ServiceKey, entry: Option<&Arc<Entry>>) {
        let mut entries = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match entry {
            Some(entry) => drop(entries.insert(key.clone(), Arc::clone(entry))),
            None => drop(entries.remove(key)),
        }
    }
}
