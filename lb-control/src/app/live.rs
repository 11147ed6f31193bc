//! What this node serves right now, told to whoever publishes it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use tokio::sync::mpsc;

use crate::model::ObjectRef;

/// An address, and the Services that it serves from now on.
pub type Served = (IpAddr, BTreeSet<ObjectRef>);

/// Tells what is other than before.
pub struct Live {
    told: BTreeMap<IpAddr, BTreeSet<ObjectRef>>,
    /// Nobody listens if there is no cluster.
    listener: Option<mpsc::UnboundedSender<Served>>,
}

impl Live {
    /// Tells nobody.
    #[must_use]
    pub fn untold() -> Self {
        Self { told: BTreeMap::new(), listener: None }
    }

    /// With the other end.
    #[must_use]
    pub fn channel() -> (Self, mpsc::UnboundedReceiver<Served>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self { told: BTreeMap::new(), listener: Some(sender) }, receiver)
    }

    /// Addresses that serve something.
    pub fn addresses(&self) -> impl Iterator<Item = &IpAddr> {
        self.told.keys()
    }

    /// Nothing is served any more.
    pub fn ends(&mut self) {
        for address in std::mem::take(&mut self.told).into_keys() {
            if let Some(listener) = &self.listener {
                let _ = listener.send((address, BTreeSet::new()));
            }
        }
    }

    /// What an address serves from now on.
    pub fn is_now(&mut self, address: IpAddr, services: BTreeSet<ObjectRef>) {
        let Some(listener) = &self.listener else { return };
        let before = self.told.get(&address);
        if before.map_or(services.is_empty(), |before| *before == services) {
            return;
        }
        if services.is_empty() {
            self.told.remove(&address);
        } else {
            self.told.insert(address, services.clone());
        }
        // The other end goes first only when the agent leaves.
        let _ = listener.send((address, services));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_other_than_before_is_told() {
        let (mut live, mut told) = Live::channel();
        let address = IpAddr::from([192, 0, 2, 1]);
        let web: BTreeSet<_> = [ObjectRef::new("default", "web")].into();
        live.is_now(address, BTreeSet::new());
        assert!(told.try_recv().is_err());
        live.is_now(address, web.clone());
        live.is_now(address, web.clone());
        assert_eq!(told.try_recv(), Ok((address, web)));
        live.is_now(address, BTreeSet::new());
        assert_eq!(told.try_recv(), Ok((address, BTreeSet::new())));
        assert!(told.try_recv().is_err() && live.addresses().next().is_none());
    }
}
