//! Objects that come and go, in lines of text, for tests.

use std::{collections::BTreeMap, sync::Arc};

use super::*;
use crate::{
    model::Namespace,
    plan::testing::{labels, object, pool, service},
};

/// What there is, beside an [`Ipam`] that was told of it change by change.
pub struct World {
    pub options: Options,
    pub services: BTreeMap<ObjectRef, Arc<Service>>,
    pub pools: BTreeMap<String, Arc<Pool>>,
    pub namespaces: BTreeMap<String, Arc<Namespace>>,
    pub ipam: Ipam,
}

impl World {
    pub fn new(options: Options) -> Self {
        let (services, pools, namespaces) = Default::default();
        Self { options, services, pools, namespaces, ipam: Ipam::new(options) }
    }

    /// `+ SERVICE`, `- SERVICE`, `pool POOL`, `-pool NAME`, `namespace NAME LABELS`,
    /// `released SERVICE`, `adopt SERVICE ADDRESSES`: see [`crate::plan::testing`].
    pub fn tell(&mut self, text: &str) {
        let (verb, rest) = text.split_once(' ').unwrap();
        match verb {
            "+" => {
                let service = Arc::new(service(rest));
                self.services.insert(service.object.clone(), Arc::clone(&service));
                self.ipam.change(&ObjectChange::Service(service.object.clone(), Some(service)));
            }
            "-" => {
                self.services.remove(&object(rest));
                self.ipam.change(&ObjectChange::Service(object(rest), None));
            }
            "pool" => {
                let pool = Arc::new(pool(rest));
                self.pools.insert(pool.key(), Arc::clone(&pool));
                self.ipam.change(&ObjectChange::Pool(pool.key(), Some(pool)));
            }
            "-pool" => {
                self.pools.remove(rest);
                self.ipam.change(&ObjectChange::Pool(rest.into(), None));
            }
            "namespace" => {
                let (name, text) = rest.split_once(' ').unwrap_or((rest, ""));
                let namespace = Arc::new(Namespace { name: name.into(), labels: labels(text) });
                self.namespaces.insert(name.into(), Arc::clone(&namespace));
                self.ipam.change(&ObjectChange::Namespace(name.into(), Some(namespace)));
            }
            "released" => self.ipam.released(&object(rest)),
            "adopt" => {
                let (name, addresses) = rest.split_once(' ').unwrap();
                let addresses = addresses.split(',').map(|text| text.parse().unwrap()).collect();
                self.ipam.adopt([(object(name), addresses)].into());
            }
            _ => panic!("{text}"),
        }
    }

    /// A new one that was told of everything at once, and of who has what.
    pub fn restarted(&self) -> Ipam {
        let mut ipam = Ipam::new(self.options);
        ipam.adopt(self.ipam.holdings());
        for (name, namespace) in &self.namespaces {
            ipam.change(&ObjectChange::Namespace(name.clone(), Some(Arc::clone(namespace))));
        }
        for (object, service) in &self.services {
            ipam.change(&ObjectChange::Service(object.clone(), Some(Arc::clone(service))));
        }
        for (key, pool) in &self.pools {
            ipam.change(&ObjectChange::Pool(key.clone(), Some(Arc::clone(pool))));
        }
        ipam.settle();
        ipam
    }

    /// `name address(pool)… [reason] !problem…` for every Service, then problems of pools.
    pub fn lines(&self) -> Vec<String> {
        let lines = self.ipam.all().map(|(object, assigned)| {
            let mut line = match object.namespace.as_str() {
                "default" => object.name.clone(),
                _ => object.to_string(),
            };
            for (address, pool) in &assigned.addresses {
                line += &format!(" {address}({})", pool.as_deref().unwrap_or("-"));
            }
            if !assigned.reason.is_empty() {
                line += &format!(" {}", assigned.reason);
            }
            for problem in &assigned.problems {
                line += &format!(" !{}", problem.message);
            }
            line
        });
        lines.chain(self.ipam.problems().iter().map(|problem| format!("!{}", problem.message))).collect()
    }
}
