//! What this node serves right now, told to whoever publishes it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use tokio::sync::mpsc;

use crate::model::{Few, ObjectRef};

/// An address, and the Services that it serves from now on.
pub type Served = (IpAddr, Few<ObjectRef>);

/// What is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// From now on it counts what is not told, too: the data plane has looked at everything once.
    Begun,
    /// What an address serves from now on.
    Serves(Served),
    /// Why this node cannot serve any address from now on; `None`: it can.
    Unfit(Option<String>),
    /// How packets are forwarded from now on.
    Forwards(Forwarding),
    /// A Service that this node has an address of, but cannot serve as it is; `None`: no longer so.
    Lacks(ObjectRef, Option<Lack>),
    /// How many backends of a Service work, when that is other than before; `None`: nobody asks any more.
    Health(ObjectRef, Option<Health>),
    /// How many backends of a Service the proxy does not avoid, when that is other than before; `None`: it
    /// does not serve it any more.
    Avoids(ObjectRef, Option<Health>),
    /// Which tables of established flows are nearly full, when that are others than before.
    NearlyFull(BTreeSet<&'static str>),
}

/// How many backends of a Service work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// The identity of the Service, which Events name.
    pub uid: String,
    /// How many do.
    pub healthy: usize,
    /// How many do not.
    pub unhealthy: usize,
    /// One that does not, and why.
    pub example: Option<(SocketAddr, String)>,
}

/// How packets are forwarded on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forwarding {
    /// By device: `eth0=xdp-native,vxlan0=tc`; `None` as long as there is no device.
    pub ways: Option<String>,
    /// Why, where it is not the fastest way or was not chosen by the agent.
    pub reason: Option<String>,
}

/// Why a Service is not served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lack {
    /// The identity of the Service, which Events name.
    pub uid: String,
    /// For people.
    pub why: String,
}

/// Tells what is other than before.
pub struct Live {
    has_begun: bool,
    told: BTreeMap<IpAddr, Few<ObjectRef>>,
    unfit: Option<String>,
    forwarding: Forwarding,
    lacking: BTreeMap<ObjectRef, Lack>,
    /// How many backends do not work, of Services that have such.
    unhealthy: BTreeMap<ObjectRef, usize>,
    /// Services with backends that the proxy avoids.
    avoided: BTreeMap<ObjectRef, Health>,
    nearly_full: BTreeSet<&'static str>,
    /// Nobody listens if there is no cluster.
    listener: Option<mpsc::UnboundedSender<Told>>,
}

impl Live {
    /// Tells nobody.
    #[must_use]
    pub fn untold() -> Self {
        Self {
            has_begun: false,
            told: BTreeMap::new(),
            unfit: None,
            forwarding: Forwarding::default(),
            lacking: BTreeMap::new(),
            unhealthy: BTreeMap::new(),
            avoided: BTreeMap::new(),
            nearly_full: BTreeSet::new(),
            listener: None,
        }
    }

    /// With the other end.
    #[must_use]
    pub fn channel() -> (Self, mpsc::UnboundedReceiver<Told>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self { listener: Some(sender), ..Self::untold() }, receiver)
    }

    /// Addresses that serve something.
    pub fn addresses(&self) -> impl Iterator<Item = &IpAddr> {
        self.told.keys()
    }

    /// Everything has been looked at once.
    pub fn begins(&mut self) {
        if let Some(listener) = self.listener.as_ref().filter(|_| !self.has_begun) {
            let _ = listener.send(Told::Begun);
        }
        self.has_begun = true;
    }

    /// Nothing is served any more.
    pub fn ends(&mut self) {
        for address in std::mem::take(&mut self.told).into_keys() {
            if let Some(listener) = &self.listener {
                let _ = listener.send(Told::Serves((address, Few::default())));
            }
        }
    }

    /// Why this node cannot serve any address from now on; `None`: it can.
    pub fn is_unfit(&mut self, why: Option<String>) {
        if let Some(listener) = self.listener.as_ref().filter(|_| self.unfit != why) {
            let _ = listener.send(Told::Unfit(why.clone()));
        }
        self.unfit = why;
    }

    /// How packets are forwarded from now on.
    pub fn forwards(&mut self, forwarding: Forwarding) {
        if let Some(listener) = self.listener.as_ref().filter(|_| self.forwarding != forwarding) {
            let _ = listener.send(Told::Forwards(forwarding.clone()));
        }
        self.forwarding = forwarding;
    }

    /// All tables of established flows that are nearly full.
    pub fn nearly_full(&mut self, tables: &BTreeSet<&'static str>) {
        if self.nearly_full == *tables {
            return;
        }
        self.nearly_full.clone_from(tables);
        if let Some(listener) = &self.listener {
            let _ = listener.send(Told::NearlyFull(tables.clone()));
        }
    }

    /// All Services that cannot be served; those of which that is news are told.
    pub fn lacks(&mut self, lacking: BTreeMap<ObjectRef, Lack>) {
        if let Some(listener) = &self.listener {
            for (service, lack) in
                lacking.iter().filter(|(service, lack)| self.lacking.get(service) != Some(lack))
            {
                let _ = listener.send(Told::Lacks(service.clone(), Some(lack.clone())));
            }
            for service in self.lacking.keys().filter(|service| !lacking.contains_key(*service)) {
                let _ = listener.send(Told::Lacks(service.clone(), None));
            }
        }
        self.lacking = lacking;
    }

    /// How many backends of a Service work from now on; `None` if nobody asks any more. That all work is
    /// told only after some did not.
    pub fn health(&mut self, service: &ObjectRef, health: Option<Health>) {
        let unhealthy = health.as_ref().map_or(0, |health| health.unhealthy);
        let before = match unhealthy {
            0 => self.unhealthy.remove(service),
            _ => self.unhealthy.insert(service.clone(), unhealthy),
        };
        let is_news = before.unwrap_or(0) != unhealthy || health.is_none() && before.is_some();
        if let Some(listener) = self.listener.as_ref().filter(|_| is_news) {
            let _ = listener.send(Told::Health(service.clone(), health));
        }
    }

    /// All Services with backends that the proxy avoids; those of which that is news are told, and those
    /// that have none any more, if the proxy still serves them.
    pub fn avoids(&mut self, avoided: BTreeMap<ObjectRef, Health>, serves: impl Fn(&ObjectRef) -> bool) {
        let before = std::mem::replace(&mut self.avoided, avoided);
        let Some(listener) = &self.listener else { return };
        for (service, health) in &self.avoided {
            if before.get(service).is_none_or(|before| before.unhealthy != health.unhealthy) {
                let _ = listener.send(Told::Avoids(service.clone(), Some(health.clone())));
            }
        }
        for (service, health) in before {
            if !self.avoided.contains_key(&service) {
                let healthy = health.healthy + health.unhealthy;
                let well = Health { healthy, unhealthy: 0, example: None, ..health };
                let well = serves(&service).then_some(well);
                let _ = listener.send(Told::Avoids(service, well));
            }
        }
    }

    /// What an address serves from now on.
    pub fn is_now(&mut self, address: IpAddr, services: Few<ObjectRef>) {
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
        let _ = listener.send(Told::Serves((address, services)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_other_than_before_is_told() {
        let (mut live, mut told) = Live::channel();
        let address = IpAddr::from([192, 0, 2, 1]);
        let web: Few<_> = [ObjectRef::new("default", "web")].into();
        live.is_now(address, Few::default());
        assert!(told.try_recv().is_err());
        live.is_now(address, web.clone());
        live.is_now(address, web.clone());
        assert_eq!(told.try_recv(), Ok(Told::Serves((address, web))));
        live.is_now(address, Few::default());
        assert_eq!(told.try_recv(), Ok(Told::Serves((address, Few::default()))));
        assert!(told.try_recv().is_err() && live.addresses().next().is_none());
    }

    #[test]
    fn how_many_backends_work_is_told_when_it_changes() {
        let (mut live, mut told) = Live::channel();
        let web = ObjectRef::new("default", "web");
        let health = |healthy, unhealthy| {
            let example = (unhealthy > 0).then(|| (([10, 0, 0, 1], 80).into(), "HTTP 503".to_owned()));
            Health { uid: "u".into(), healthy, unhealthy, example }
        };
        live.health(&web, Some(health(2, 0)));
        assert!(told.try_recv().is_err(), "nobody ever failed");
        live.health(&web, Some(health(1, 1)));
        live.health(&web, Some(health(2, 1)));
        assert_eq!(told.try_recv(), Ok(Told::Health(web.clone(), Some(health(1, 1)))));
        assert!(told.try_recv().is_err());
        live.health(&web, Some(health(3, 0)));
        assert_eq!(told.try_recv(), Ok(Told::Health(web.clone(), Some(health(3, 0)))));
        live.health(&web, Some(health(1, 2)));
        live.health(&web, None);
        live.health(&web, Some(health(3, 0)));
        assert_eq!(told.try_recv(), Ok(Told::Health(web.clone(), Some(health(1, 2)))));
        assert_eq!(told.try_recv(), Ok(Told::Health(web.clone(), None)));
        assert!(told.try_recv().is_err(), "nobody asked meanwhile");
    }

    #[test]
    fn which_backends_are_avoided_is_told_when_it_changes() {
        let (mut live, mut told) = Live::channel();
        let web = ObjectRef::new("default", "web");
        let health = |unhealthy, failures| {
            let example = Some((([10, 0, 0, 1], 80).into(), format!("{failures} in a row")));
            Health { uid: "u".into(), healthy: 3 - unhealthy, unhealthy, example }
        };
        let of = |unhealthy, failures| BTreeMap::from([(web.clone(), health(unhealthy, failures))]);
        live.avoids(of(1, 5), |_| true);
        live.avoids(of(1, 6), |_| true);
        live.avoids(of(2, 7), |_| true);
        live.avoids(BTreeMap::new(), |_| true);
        live.avoids(BTreeMap::new(), |_| true);
        live.avoids(of(1, 5), |_| true);
        live.avoids(BTreeMap::new(), |_| false);
        let well = Health { healthy: 3, unhealthy: 0, example: None, ..health(1, 5) };
        for expected in [Some(health(1, 5)), Some(health(2, 7)), Some(well), Some(health(1, 5)), None] {
            assert_eq!(told.try_recv(), Ok(Told::Avoids(web.clone(), expected)));
        }
        assert!(told.try_recv().is_err());
    }

    #[test]
    fn how_packets_are_forwarded_is_told_once() {
        let (mut live, mut told) = Live::channel();
        let forwarding = Forwarding { ways: Some("eth0=tc".into()), reason: Some("eth0: …".into()) };
        live.forwards(Forwarding::default());
        live.forwards(forwarding.clone());
        live.forwards(forwarding.clone());
        assert_eq!(told.try_recv(), Ok(Told::Forwards(forwarding)));
        live.forwards(Forwarding::default());
        assert_eq!(told.try_recv(), Ok(Told::Forwards(Forwarding::default())));
        assert!(told.try_recv().is_err());
    }

    #[test]
    fn which_tables_are_nearly_full_is_told_once() {
        let (mut live, mut told) = Live::channel();
        let (none, one) = (BTreeSet::new(), BTreeSet::from(["flows_v4"]));
        for tables in [&none, &one, &one, &none, &none] {
            live.nearly_full(tables);
        }
        assert_eq!(told.try_recv(), Ok(Told::NearlyFull(one)));
        assert_eq!(told.try_recv(), Ok(Told::NearlyFull(none)));
        assert!(told.try_recv().is_err());
    }

    #[test]
    fn what_is_lacking_is_told_again_when_it_was_there_meanwhile() {
        let (mut live, mut told) = Live::channel();
        let web = ObjectRef::new("default", "web");
        let lack = |why: &str| Lack { uid: "u".into(), why: why.into() };
        let lacking = |why: &str| BTreeMap::from([(web.clone(), lack(why))]);
        live.lacks(lacking("full"));
        live.lacks(lacking("full"));
        assert_eq!(told.try_recv(), Ok(Told::Lacks(web.clone(), Some(lack("full")))));
        assert!(told.try_recv().is_err(), "the same again is no news");
        live.lacks(lacking("fuller"));
        assert_eq!(told.try_recv(), Ok(Told::Lacks(web.clone(), Some(lack("fuller")))));
        live.lacks(BTreeMap::new());
        assert_eq!(told.try_recv(), Ok(Told::Lacks(web.clone(), None)));
        live.lacks(lacking("fuller"));
        assert_eq!(told.try_recv(), Ok(Told::Lacks(web.clone(), Some(lack("fuller")))));
    }
}
