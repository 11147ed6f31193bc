//! Decides again when something changed.

use std::collections::{BTreeMap, BTreeSet};

use super::{Allocation, Assigned, Holdings, Options, allocate};
use crate::model::{ObjectChange, ObjectRef, Objects, Problem};

/// Who has which address.
pub struct Ipam {
    options: Options,
    objects: Objects,
    holdings: Holdings,
    allocation: Allocation,
    dirty: bool,
}

impl Ipam {
    /// Knows nothing yet.
    #[must_use]
    pub fn new(options: Options) -> Self {
        Self {
            options,
            objects: Objects::default(),
            holdings: BTreeMap::new(),
            allocation: Allocation::default(),
            dirty: true,
        }
    }

    /// Who has which address before the first decision.
    pub fn adopt(&mut self, holdings: Holdings) {
        self.holdings.extend(holdings);
    }

    /// Takes note of a change.
    pub fn change(&mut self, change: &ObjectChange) {
        if matches!(change, ObjectChange::Service(..) | ObjectChange::Pool(..)) {
            self.dirty |= self.objects.apply(change.clone());
        }
    }

    /// Decides; the Services of which something is other than before.
    pub fn settle(&mut self) -> BTreeSet<ObjectRef> {
        if !std::mem::take(&mut self.dirty) {
            return BTreeSet::new();
        }
        let new = allocate(&self.objects.services, &self.objects.pools, &self.holdings, self.options);
        let old = std::mem::replace(&mut self.allocation, new);
        self.holdings = self.allocation.holdings();
        let new = &self.allocation.services;
        let gone = old.services.keys().filter(|object| !new.contains_key(*object));
        let other = new.iter().filter(|(object, one)| old.services.get(*object) != Some(one));
        gone.chain(other.map(|(object, _)| object)).cloned().collect()
    }

    /// What a Service has; `None` if it is not ours.
    #[must_use]
    pub fn assigned(&self, service: &ObjectRef) -> Option<&Assigned> {
        self.allocation.services.get(service)
    }

    /// Who has which address now.
    #[must_use]
    pub fn holdings(&self) -> Holdings {
        self.allocation.holdings()
    }

    /// What is wrong with pools.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.allocation.problems
    }
}
