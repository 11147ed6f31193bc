//! Who holds which address.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use crate::model::{ObjectRef, Service};

/// Who holds which address.
#[derive(Default)]
pub(super) struct Holders<'a> {
    by_address: HashMap<IpAddr, BTreeMap<&'a ObjectRef, &'a Service>>,
    by_sharing_key: HashMap<&'a str, BTreeSet<IpAddr>>,
}

impl<'a> Holders<'a> {
    pub fn hold(&mut self, address: IpAddr, service: &'a Service) {
        self.by_address.entry(address).or_default().insert(&service.object, service);
        if let Some(key) = &service.sharing_key {
            self.by_sharing_key.entry(key).or_default().insert(address);
        }
    }

    pub fn release(&mut self, address: IpAddr, service: &Service) {
        let Some(holders) = self.by_address.get_mut(&address) else { return };
        holders.remove(&service.object);
        if holders.is_empty() {
            self.by_address.remove(&address);
            if let Some(addresses) =
                service.sharing_key.as_deref().and_then(|key| self.by_sharing_key.get_mut(key))
            {
                addresses.remove(&address);
            }
        }
    }

    pub fn is_held(&self, address: IpAddr) -> bool {
        self.by_address.contains_key(&address)
    }

    /// Addresses of the Services with a sharing key.
    pub fn shared_by(&self, key: &str) -> impl Iterator<Item = IpAddr> {
        self.by_sharing_key.get(key).into_iter().flatten().copied()
    }

    /// Why a Service cannot hold an address beside those who do. Sharing takes consent on both
    /// sides, which the key is, and no port in common.
    pub fn conflict(&self, address: IpAddr, service: &Service) -> Option<String> {
        for other in self.by_address.get(&address)?.values().filter(|other| other.object != service.object) {
            if service.sharing_key.is_none() || service.sharing_key != other.sharing_key {
                return Some(format!(
                    "{address} is held by Service {}; both need the same value of the annotation {} to share it",
                    other.object,
                    crate::model::ANNOTATION_SHARING,
                ));
            }
            let ports = service.ports.iter();
            let mut same = ports.filter(|port| {
                other.ports.iter().any(|theirs| (theirs.port, theirs.protocol) == (port.port, port.protocol))
            });
            if let Some(port) = same.next() {
                return Some(format!(
                    "{address} is shared with Service {}, which has port {}/{} too; only different ports can share",
                    other.object, port.port, port.protocol,
                ));
            }
        }
        None
    }
}
