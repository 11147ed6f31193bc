//! Decides again when objects change.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{Allocation, Assigned, Holdings, Options, PoolReport, allocate};
use crate::model::{ObjectChange, ObjectRef, Pool, Problem, Service};

/// Who has which address, kept up to date.
pub struct Ipam {
    options: Options,
    services: BTreeMap<ObjectRef, Arc<Service>>,
    pools: BTreeMap<String, Arc<Pool>>,
    holdings: Holdings,
    decision: Allocation,
}

impl Ipam {
    /// Nobody has anything.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let (services, pools, holdings, decision) = Default::default();
        Self { options, services, pools, holdings, decision }
    }

    /// Who has which address before the first decision: by VirtualIPs, or by the maps of an agent
    /// that died.
    pub fn adopt(&mut self, holdings: Holdings) {
        self.holdings.extend(holdings);
    }

    /// Takes over a change of a Service, Pool or Namespace; others do not matter here. What comes
    /// of it is decided by [`settle`](Self::settle).
    pub fn change(&mut self, change: &ObjectChange) {
        match change {
            ObjectChange::Service(key, Some(service)) if !service.api.deleting => {
                self.services.insert(key.clone(), Arc::clone(service));
            }
            ObjectChange::Service(key, _) => drop(self.services.remove(key)),
            ObjectChange::Pool(key, Some(pool)) => drop(self.pools.insert(key.clone(), Arc::clone(pool))),
            ObjectChange::Pool(key, None) => drop(self.pools.remove(key)),
            _ => {}
        }
    }

    /// Decides what is open; the Services whose [`Assigned`] is other than before, or gone.
    pub fn settle(&mut self) -> BTreeSet<ObjectRef> {
        let new = allocate(&self.services, &self.pools, &self.holdings, self.options);
        self.holdings = new.holdings();
        let old = std::mem::replace(&mut self.decision, new).services;
        let new = &self.decision.services;
        let all = old.keys().chain(new.keys());
        all.filter(|key| old.get(key) != new.get(key)).cloned().collect()
    }

    /// Nobody serves the addresses of this Service any more, which is no longer ours: they may go
    /// to others. Says nothing about a Service that is ours.
    pub fn released(&mut self, service: &ObjectRef) {
        let _ = service;
    }

    /// What became of a Service's wish; `None` if it is not ours.
    #[must_use]
    pub fn assigned(&self, service: &ObjectRef) -> Option<&Assigned> {
        self.decision.services.get(service)
    }

    /// What became of the wishes of all Services that are ours.
    pub fn all(&self) -> impl Iterator<Item = (&ObjectRef, &Assigned)> {
        self.decision.services.iter()
    }

    /// Who has which address, with those who are no longer ours and have not let go.
    #[must_use]
    pub fn holdings(&self) -> Holdings {
        self.holdings.clone()
    }

    /// What is wrong with pools.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.decision.problems
    }

    /// The state of every pool, by [`Pool::key`].
    #[must_use]
    pub fn pool_reports(&self) -> Vec<PoolReport> {
        self.pools.keys().map(|key| PoolReport { key: key.clone(), ..PoolReport::default() }).collect()
    }
}
