//! Decides again when objects change, at the cost of what changed.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    decide::{Plan, decide, unclaimed},
    ipam::{Holdings, Options},
    resolve::resolve,
};
use crate::model::{EndpointSlice, ObjectRef, Objects};

/// Keeps the last decision, and renews it.
pub struct Planner {
    options: Options,
    objects: Objects,
    plan: Plan,
    holdings: Holdings,
}

impl Planner {
    /// `holdings` is who has which address now: see [`Compiler::holdings`](super::Compiler::holdings).
    #[must_use]
    pub fn new(options: Options, holdings: Holdings) -> Self {
        Self { options, objects: Objects::default(), plan: Plan::default(), holdings }
    }

    /// The last decision.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Decides anew; the Services that the data plane has to do something else for than before.
    /// Objects that are the same `Arc` as before are taken to be unchanged.
    pub fn update(&mut self, objects: Objects) -> BTreeSet<ObjectRef> {
        let old = std::mem::replace(&mut self.objects, objects);
        let allocation_stands =
            same(&old.services, &self.objects.services) && same(&old.pools, &self.objects.pools);
        if allocation_stands { self.endpoints_changed(&old) } else { self.anything_changed() }
    }

    fn anything_changed(&mut self) -> BTreeSet<ObjectRef> {
        let plan = decide(&self.objects, &self.holdings, self.options);
        self.holdings = plan.allocation.holdings();
        let old = std::mem::replace(&mut self.plan, plan).desired.entries;
        let new = &self.plan.desired.entries;
        let gone = old.keys().filter(|key| !new.contains_key(key));
        let differ = new.iter().filter(|(key, entry)| old.get(key) != Some(entry)).map(|(key, _)| key);
        gone.chain(differ).map(|key| key.service.clone()).collect()
    }

    fn endpoints_changed(&mut self, old: &Objects) -> BTreeSet<ObjectRef> {
        let changed = touched(old, &self.objects);
        for object in &changed {
            let Some(assigned) = self.plan.allocation.services.get(object) else { continue };
            let slices = self.objects.slices.values().map(Arc::as_ref);
            let slices: Vec<_> = slices.filter(|slice| belongs(slice, object)).collect();
            let (entries, report) = resolve(&self.objects.services[object], &slices, assigned);
            // Addresses and ports are the same: only backends differ.
            self.plan.desired.entries.extend(entries);
            self.plan.reports.insert(object.clone(), report);
        }
        if !changed.is_empty() {
            self.plan.problems.clone_from(&self.plan.allocation.problems);
            self.plan.problems.extend(unclaimed(&self.objects));
        }
        changed.into_iter().filter(|object| self.plan.reports.contains_key(object)).collect()
    }
}

fn service_of(slice: &EndpointSlice) -> Option<ObjectRef> {
    Some(ObjectRef::new(slice.object.namespace.clone(), slice.service.clone()?))
}

fn belongs(slice: &EndpointSlice, service: &ObjectRef) -> bool {
    slice.service.as_ref() == Some(&service.name) && slice.object.namespace == service.namespace
}

/// Services some of whose slices are others than before. A slice that belongs to none is told
/// apart by an empty name.
fn touched(old: &Objects, new: &Objects) -> BTreeSet<ObjectRef> {
    let mut touched = BTreeSet::new();
    let mut touch = |slice: &EndpointSlice| {
        touched.insert(service_of(slice).unwrap_or_default());
    };
    // Mostly the same slices in the same order. The same `Arc` has the same name: nothing to compare.
    let lockstep = old.slices.len() == new.slices.len()
        && old.slices.iter().zip(&new.slices).all(|((key, a), (other, b))| {
            let same = Arc::ptr_eq(a, b);
            if !same && key == other {
                touch(a);
                touch(b);
            }
            same || key == other
        });
    if lockstep {
        return touched;
    }
    for (key, slice) in &old.slices {
        match new.slices.get(key) {
            Some(other) if Arc::ptr_eq(slice, other) => {}
            other => {
                touch(slice);
                if let Some(other) = other {
                    touch(other);
                }
            }
        }
    }
    for (key, slice) in &new.slices {
        if !old.slices.contains_key(key) {
            touch(slice);
        }
    }
    touched
}

/// Whether all objects are the same. The same `Arc` has the same name.
fn same<K, V>(old: &BTreeMap<K, Arc<V>>, new: &BTreeMap<K, Arc<V>>) -> bool {
    old.len() == new.len() && old.values().zip(new.values()).all(|(a, b)| Arc::ptr_eq(a, b))
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::{
        model::{Endpoint, EndpointPort, Family, Protocol},
        plan::testing::{pool, service},
    };

    fn slice(name: u8, service: Option<u8>, endpoints: &[u8]) -> EndpointSlice {
        let endpoint = |last: &u8| Endpoint {
            ready: *last < 5,
            terminating: *last > 6,
            ..Endpoint::ready([10, 0, 0, *last].into())
        };
        EndpointSlice {
            object: ObjectRef::new("default", format!("slice{name}")),
            place: None,
            service: service.map(|number| format!("s{number}")),
            family: Some(Family::V4),
            ports: vec![EndpointPort { name: "80-TCP".into(), protocol: Protocol::Tcp, port: 8080 }],
            endpoints: endpoints.iter().map(endpoint).collect(),
            weight: None,
        }
    }

    proptest! {
        /// Step by step comes to the same as all at once, and names every Service that differs.
        #[test]
        fn as_if_decided_from_scratch(
            steps in vec((0..4u8, 0..4u8, proptest::option::of(0..4u8), vec(0..9u8, 0..4)), 1..12)
        ) {
            let options = Options { default_class: true, outside_pools: true, deferred_release: false };
            let mut planner = Planner::new(options, Holdings::new());
            let mut objects = Objects::default();
            objects.pools.insert("p".into(), Arc::new(pool("p 192.0.2.0/24")));
            for (what, number, other, endpoints) in steps {
                let service = service(&format!("s{number}"));
                let slice = slice(number, other, &endpoints);
                match what {
                    0 => drop(objects.services.insert(service.object.clone(), service.into())),
                    1 => drop(objects.services.remove(&service.object)),
                    2 => drop(objects.slices.insert(slice.object.clone(), slice.into())),
                    _ => drop(objects.slices.remove(&slice.object)),
                }
                let before = planner.plan().clone();
                let changed = planner.update(objects.clone());
                let whole = decide(&objects, &before.allocation.holdings(), options);
                prop_assert_eq!(planner.plan(), &whole);
                for key in before.desired.entries.keys().chain(whole.desired.entries.keys()) {
                    let differs = before.desired.entries.get(key) != whole.desired.entries.get(key);
                    prop_assert!(!differs || changed.contains(&key.service), "{key}");
                }
            }
        }
    }
}
