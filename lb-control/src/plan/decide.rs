//! Objects to desired state, all at once.

use std::collections::{BTreeMap, HashMap};

use super::{
    ipam::{self, Allocation, Holdings, Options},
    resolve::resolve,
};
use crate::model::{Desired, EndpointSlice, ObjectRef, Objects, Problem, ServiceReport};

/// What is to be done, and what people are told.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// For the data plane.
    pub desired: Desired,
    /// For people: every Service that is ours.
    pub reports: BTreeMap<ObjectRef, ServiceReport>,
    /// Who has which address; [`Allocation::holdings`] is input of the next decision.
    pub allocation: Allocation,
    /// What is wrong with objects that no Service answers for.
    pub problems: Vec<Problem>,
}

/// Decides. `current` is who has which address now: from the last decision, or at start from the
/// maps ([`Compiler::holdings`](super::Compiler::holdings)).
#[must_use]
pub fn decide(objects: &Objects, current: &Holdings, options: Options) -> Plan {
    let allocation = ipam::allocate(&objects.services, &objects.pools, current, options);
    let mut slices: HashMap<(&str, &str), Vec<&EndpointSlice>> = HashMap::new();
    for slice in objects.slices.values() {
        if let Some(service) = &slice.service {
            slices.entry((&slice.object.namespace, service)).or_default().push(slice);
        }
    }
    let mut plan = Plan::default();
    for (object, assigned) in &allocation.services {
        let slices = slices.get(&(object.namespace.as_str(), object.name.as_str()));
        let slices = slices.map(Vec::as_slice).unwrap_or_default();
        let (entries, report) = resolve(&objects.services[object], slices, assigned);
        for (key, entry) in entries {
            plan.desired.vips.entry(key.vip).or_default().insert(object.clone());
            plan.desired.entries.insert(key, entry);
        }
        plan.reports.insert(object.clone(), report);
    }
    plan.problems.clone_from(&allocation.problems);
    plan.problems.extend(unclaimed(objects));
    plan.allocation = allocation;
    plan
}

/// Slices that say of no Service that they are its.
pub(super) fn unclaimed(objects: &Objects) -> impl Iterator<Item = Problem> {
    objects.slices.values().filter(|slice| slice.service.is_none()).map(|slice| {
        let text = "has no label kubernetes.io/service-name, and so belongs to no Service";
        let mut problem =
            Problem::warning(text).about("EndpointSlice", &slice.object).field("metadata.labels");
        problem.place.clone_from(&slice.place);
        problem
    })
}
