//! Which Service has which addresses.
//!
//! Adopts what is in use first, then what was published, then serves explicit requests, then
//! chooses: pools that are for somebody special first, then by priority, then name; of a pool the
//! lowest free address. Nothing is ever renumbered unless its own Service asks for something else,
//! and even then it keeps what it has until it can have that.
//!
//! [`Ipam`] keeps all this up to date at the cost of what changed: free addresses are intervals,
//! and whoever waits is in an index by what it waits for.

mod decide;
mod engine;
mod free;
mod holders;
mod pools;
pub mod reason;
mod report;
mod rotate;
mod waiting;
mod wishes;

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

pub use engine::Ipam;
pub use report::PoolReport;
use waiting::Wait;

use crate::model::{ObjectChange, ObjectRef, Pool, Problem, Service};

/// Addresses by Service. Also what an agent finds in the maps after its restart.
pub type Holdings = BTreeMap<ObjectRef, Vec<IpAddr>>;

/// What is decided for all Services alike.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Whether Services without a `loadBalancerClass` are ours.
    pub default_class: bool,
    /// Whether a Service may request an address that no pool has. Right where whoever writes
    /// Services also owns the node's addresses, as with files.
    pub outside_pools: bool,
    /// Whether the addresses of a Service that is no longer ours stay with it until
    /// [`Ipam::released`] says that nobody serves them any more. Otherwise they are free at once.
    pub deferred_release: bool,
}

/// What became of a Service's wish.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assigned {
    /// Its addresses, IPv4 first unless `ipFamilies` says otherwise, each with its pool if any.
    pub addresses: Vec<(IpAddr, Option<String>)>,
    /// Why there are not more of them, or none.
    pub problems: Vec<Problem>,
    /// Whether waiting may help: an address may become free. Otherwise somebody must act.
    pub can_wait: bool,
    /// Why, in CamelCase, as in the [`reason`] module; empty if there is nothing to say.
    pub reason: &'static str,
}

/// The decision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allocation {
    /// For every Service that is ours.
    pub services: BTreeMap<ObjectRef, Assigned>,
    /// What is wrong with pools.
    pub problems: Vec<Problem>,
}

impl Allocation {
    /// The addresses, as input for the next decision.
    #[must_use]
    pub fn holdings(&self) -> Holdings {
        let some = self.services.iter().filter(|(_, assigned)| !assigned.addresses.is_empty());
        some.map(|(object, assigned)| {
            (object.clone(), assigned.addresses.iter().map(|(address, _)| *address).collect())
        })
        .collect()
    }
}

/// Why a Service does not get what it wishes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Refusal {
    reason: &'static str,
    field: Option<String>,
    message: String,
    can_wait: bool,
    /// What may help.
    waits: Vec<Wait>,
}

impl Refusal {
    /// Somebody must act.
    fn fixed(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, field: None, message: message.into(), can_wait: false, waits: Vec::new() }
    }

    fn waiting(reason: &'static str, message: impl Into<String>) -> Self {
        Self { can_wait: true, ..Self::fixed(reason, message) }
    }

    fn field(mut self, field: &str) -> Self {
        self.field = (!field.is_empty()).then(|| field.to_owned());
        self
    }

    fn until(mut self, waits: Vec<Wait>) -> Self {
        self.waits = waits;
        self
    }
}

/// Decides anew.
#[must_use]
pub fn allocate(
    services: &BTreeMap<ObjectRef, Arc<Service>>,
    pools: &BTreeMap<String, Arc<Pool>>,
    current: &Holdings,
    options: Options,
) -> Allocation {
    let mut ipam = Ipam::new(options);
    ipam.adopt(current.clone());
    for (key, pool) in pools {
        ipam.change(&ObjectChange::Pool(key.clone(), Some(Arc::clone(pool))));
    }
    for (object, service) in services {
        ipam.change(&ObjectChange::Service(object.clone(), Some(Arc::clone(service))));
    }
    ipam.settle();
    let services = ipam.all().map(|(object, assigned)| (object.clone(), assigned.clone())).collect();
    Allocation { services, problems: ipam.problems().to_vec() }
}

#[cfg(test)]
mod costs;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod sequences;
#[cfg(test)]
mod steps;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod world;
