//! Services that request each other's addresses.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use super::{
    engine::Ipam,
    holders::compatible,
    wishes::{Wish, wish},
};
use crate::model::{ObjectRef, Service};

/// More Services than this do not change places in one step: somebody made a mistake.
const LARGEST: usize = 16;

impl Ipam {
    /// Nobody lets go of an address before it has the one that it requests. Where Services request
    /// each other's, that would be for ever; they change places instead. These are the Service and
    /// all that have to move for it, with what each requests; `None` if one of them cannot.
    pub(super) fn rotation(&mut self, first: &ObjectRef) -> Option<Vec<(Arc<Service>, Vec<IpAddr>)>> {
        let mut movers: BTreeMap<ObjectRef, (Arc<Service>, Vec<IpAddr>)> = BTreeMap::new();
        let mut open = vec![first.clone()];
        while let Some(object) = open.pop() {
            self.steps += 1;
            if movers.contains_key(&object) {
                continue;
            }
            let service = Arc::clone(self.ours.get(&object)?);
            let Ok(Wish::Addresses(addresses)) = wish(&service) else { return None };
            let held = self.held.get(&object).map(Vec::as_slice).unwrap_or_default();
            self.permit(&service, &addresses, held).ok()?;
            for address in &addresses {
                for rival in self.holders.rivals(*address, &service) {
                    open.push(rival.clone());
                    if movers.len() + open.len() > LARGEST {
                        return None;
                    }
                }
            }
            movers.insert(object, (service, addresses));
        }
        let movers: Vec<_> = movers.into_values().collect();
        let clash = movers.iter().enumerate().any(|(index, (one, mine))| {
            movers[..index].iter().any(|(other, theirs)| {
                mine.iter().any(|address| theirs.contains(address)) && !compatible(one, other)
            })
        });
        (!clash).then_some(movers)
    }
}
