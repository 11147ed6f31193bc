//! Desired state as the proxy serves it.
//!
//! What the compiler is for the kernel's maps, this is for the proxy: it says for each entry which
//! backend takes which turn, and tells only what is other than before.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use lb_common::abi::ConnectionLimit;

use super::{
    maglev,
    slots::{MAXIMUM_WEIGHTED_SLOTS, slot_order},
    slow_start::Ramps,
};
use crate::model::{ClientAddress, Desired, DesiredEntry, ObjectRef, Role, Scheduler, ServiceKey, SlowStart};

/// One port of one VIP, as the proxy serves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// Which.
    pub key: ServiceKey,
    /// All backends, by address: also those that only keep what they have.
    pub backends: Vec<FrontendBackend>,
    /// Indices of `backends`. With [`Scheduler::RoundRobin`] connections take them in turn; with
    /// [`Scheduler::Maglev`] it is a lookup table; with [`Scheduler::LeastConnections`] it is each
    /// backend that takes connections, once. Empty if nobody does: then connections are refused.
    pub slots: Vec<u32>,
    /// How `slots` are read.
    pub scheduler: Scheduler,
    /// Who may connect; empty for everybody.
    pub source_ranges: Arc<[IpNet]>,
    /// For how long after its last new connection a client gets the same backend.
    pub affinity: Option<Duration>,
    /// How many connections a client may open.
    pub connection_limit: Option<ConnectionLimit>,
    /// How backends learn who the client is.
    pub client_address: ClientAddress,
}

/// A backend of a [`Frontend`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrontendBackend {
    /// Address and port.
    pub address: SocketAddr,
    /// Share of new connections relative to the others, for comparisons; with a slow start it grows.
    pub weight: u32,
    /// How it takes part.
    pub role: Role,
    /// Whether it runs on this node.
    pub local: bool,
}

/// What the proxy is to do about an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Listen, and serve what comes.
    Serve(Arc<Frontend>),
    /// Go on with the connections that there are: new ones are the kernel's.
    Finish(Arc<Frontend>),
    /// Nothing: connections that there are end.
    Gone,
}

impl Wanted {
    /// What it is about, unless it is to go.
    #[must_use]
    pub fn frontend(&self) -> Option<&Arc<Frontend>> {
        match self {
            Self::Serve(frontend) | Self::Finish(frontend) => Some(frontend),
            Self::Gone => None,
        }
    }
}

/// For how long an entry that the kernel has taken over is finished at least: a lost segment of a handshake
/// comes again after one and after three seconds (`TCP_TIMEOUT_INIT`, include/net/tcp.h).
const LAST_ONES: Duration = Duration::from_secs(5);

/// What the proxy was told last.
#[derive(Debug, Default)]
pub struct Frontends {
    told: BTreeMap<ServiceKey, Wanted>,
    /// Told, and not done: to be told again.
    again: BTreeSet<ServiceKey>,
    /// Since when entries are the kernel's, of which the proxy has, or may still get, connections.
    finishing: BTreeMap<ServiceKey, Duration>,
    ramps: BTreeMap<ServiceKey, Ramps>,
    /// When the next share of a backend grows, by entry.
    steps: BTreeMap<ServiceKey, Duration>,
}

impl Frontends {
    /// What is other than before, for some Services or all. `is_ours` says which entries the proxy
    /// serves, `has_connections` which of the others it still has connections of. `now` is the time
    /// since any fixed moment.
    pub fn follow(
        &mut self,
        desired: &Desired,
        services: Option<&BTreeSet<ObjectRef>>,
        is_ours: impl Fn(&ServiceKey, &DesiredEntry) -> bool,
        has_connections: impl Fn(&ServiceKey) -> bool,
        now: Duration,
    ) -> Vec<(ServiceKey, Wanted)> {
        let concerned = |key: &ServiceKey| services.is_none_or(|services| services.contains(&key.service));
        let mut keys: BTreeSet<ServiceKey> = self.told.keys().filter(|key| concerned(key)).cloned().collect();
        match services {
            None => keys.extend(desired.entries.keys().cloned()),
            Some(services) => {
                let entries = services.iter().flat_map(|service| desired.entries_of(service));
                keys.extend(entries.map(|(key, _)| key.clone()));
            }
        }
        let mut news = Vec::new();
        for key in keys {
            let entry = desired.entries.get(&key);
            let before = self.told.get(&key);
            // Whoever has begun to connect gets some time, also where there is no connection yet.
            let is_recent = self.finishing.get(&key).is_some_and(|since| now < *since + LAST_ONES);
            let wanted = match entry {
                Some(entry) if is_ours(&key, entry) => {
                    Wanted::Serve(self.frontend(&key, entry, desired, now))
                }
                Some(entry)
                    if matches!(before, Some(Wanted::Serve(_)))
                        || before.is_some() && (is_recent || has_connections(&key)) =>
                {
                    Wanted::Finish(self.frontend(&key, entry, desired, now))
                }
                _ => Wanted::Gone,
            };
            if matches!(wanted, Wanted::Finish(_)) {
                self.finishing.entry(key.clone()).or_insert(now);
            } else {
                self.finishing.remove(&key);
            }
            if wanted == Wanted::Gone {
                self.ramps.remove(&key);
                self.steps.remove(&key);
                self.again.remove(&key);
                if self.told.remove(&key).is_some() {
                    news.push((key, wanted));
                }
            } else if self.again.remove(&key) || self.told.get(&key) != Some(&wanted) {
                self.told.insert(key.clone(), wanted.clone());
                news.push((key, wanted));
            }
        }
        news
    }

    /// What the proxy was told about an entry.
    #[must_use]
    pub fn wanted(&self, key: &ServiceKey) -> Option<&Wanted> {
        self.told.get(key)
    }

    /// All that it was told.
    pub fn all(&self) -> impl Iterator<Item = (&ServiceKey, &Wanted)> {
        self.told.iter()
    }

    /// Whether it has nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.told.is_empty()
    }

    /// Tells what is wanted of an entry once more, because it could not be done.
    pub fn tell_again(&mut self, key: &ServiceKey) {
        if self.told.contains_key(key) {
            self.again.insert(key.clone());
        }
    }

    /// Whether something of what was told could not be done.
    #[must_use]
    pub fn has_undone(&self) -> bool {
        !self.again.is_empty()
    }

    /// When the share of a backend that starts slowly grows next.
    #[must_use]
    pub fn next_step(&self) -> Option<Duration> {
        self.steps.values().copied().min()
    }

    /// The Services of which a share grows now: to be followed, and not named again before.
    pub fn take_due(&mut self, now: Duration) -> BTreeSet<ObjectRef> {
        self.steps.extract_if(.., |_, at| *at <= now).map(|(key, _)| key.service).collect()
    }

    fn frontend(
        &mut self,
        key: &ServiceKey,
        entry: &DesiredEntry,
        desired: &Desired,
        now: Duration,
    ) -> Arc<Frontend> {
        let length = growth(entry);
        let ramps = self.ramps.entry(key.clone()).or_default();
        let takers = entry.backends.iter().filter(|(_, backend)| backend.takes_connections());
        ramps.update(takers.map(|(address, _)| *address), length, now);
        match ramps.next_step(length, now) {
            Some(at) => drop(self.steps.insert(key.clone(), at)),
            None => drop(self.steps.remove(key)),
        }
        let backends: Vec<_> = entry
            .backends
            .iter()
            .map(|(address, backend)| FrontendBackend {
                address: *address,
                // A VIP as a backend would be the proxy itself, which would connect to itself without end.
                weight: if desired.vips.contains_key(&address.ip()) {
                    0
                } else {
                    backend.weight.saturating_mul(ramps.factor(address, length, now))
                },
                role: backend.role,
                local: backend.local,
            })
            .collect();
        Arc::new(Frontend {
            key: key.clone(),
            slots: slots(&backends, entry.scheduler),
            backends,
            scheduler: entry.scheduler,
            source_ranges: Arc::clone(&entry.source_ranges),
            affinity: entry.affinity.map(|seconds| Duration::from_secs(seconds.into())),
            connection_limit: entry.connection_limit,
            client_address: entry.client_address,
        })
    }
}

/// How slowly the shares of new backends grow. In a lookup table they do not: it would be another one on
/// each node, and with each step.
fn growth(entry: &DesiredEntry) -> Option<SlowStart> {
    entry.slow_start.filter(|_| entry.scheduler != Scheduler::Maglev)
}

fn slots(backends: &[FrontendBackend], scheduler: Scheduler) -> Vec<u32> {
    let takes = |backend: &FrontendBackend| backend.role == Role::Active && backend.weight > 0;
    let takers: Vec<u32> =
        (0u32..).zip(backends).filter(|(_, one)| takes(one)).map(|(index, _)| index).collect();
    let of = |taker: usize| takers[taker];
    let backend = |index: &u32| backends[*index as usize];
    match scheduler {
        Scheduler::LeastConnections => takers,
        Scheduler::RoundRobin => {
            let weights: Vec<u32> = takers.iter().map(|index| backend(index).weight).collect();
            slot_order(&weights, MAXIMUM_WEIGHTED_SLOTS).into_iter().map(of).collect()
        }
        Scheduler::Maglev => {
            let weights: Vec<_> =
                takers.iter().map(backend).map(|backend| (backend.address, backend.weight)).collect();
            maglev::table(&weights).into_iter().map(of).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::compile::testing::{desired, key};

    const NOBODY: fn(&ServiceKey) -> bool = |_| false;
    const EVERYBODY: fn(&ServiceKey) -> bool = |_| true;

    fn all(frontends: &mut Frontends, text: &str, now: u64) -> Vec<String> {
        let news = frontends.follow(&desired(text), None, |_, _| true, NOBODY, Duration::from_secs(now));
        news.iter().map(|(key, wanted)| show(key, wanted)).collect()
    }

    /// `serve NAME: .BACKEND…` in the order of the slots.
    fn show(key: &ServiceKey, wanted: &Wanted) -> String {
        let Some(frontend) = wanted.frontend() else { return format!("gone {}", key.service.name) };
        let verb = if matches!(wanted, Wanted::Serve(_)) { "serve" } else { "finish" };
        let last = |index: &u32| match frontend.backends[*index as usize].address {
            SocketAddr::V4(address) => format!(" .{}", address.ip().octets()[3]),
            SocketAddr::V6(address) => address.to_string(),
        };
        format!("{verb} {}:{}", key.service.name, frontend.slots.iter().map(last).collect::<String>())
    }

    #[test]
    fn only_what_is_new_is_told() {
        let mut frontends = Frontends::default();
        assert_eq!(all(&mut frontends, "a 1 80: .1 .2*2\nb 1 81: .3~", 0), ["serve a: .2 .1 .2", "serve b:"]);
        assert_eq!(all(&mut frontends, "a 1 80: .1 .2*2\nb 1 81: .3~", 1), [""; 0]);
        assert_eq!(all(&mut frontends, "a 1 80: .1\nb 1 81: .3~", 2), ["serve a: .1"]);
        assert_eq!(all(&mut frontends, "b 1 81: .3*0", 3), ["gone a", "serve b:"]);
        frontends.tell_again(&key("b 1 81"));
        assert!(frontends.has_undone());
        assert_eq!(all(&mut frontends, "b 1 81: .3*0", 4), ["serve b:"]);
        assert!(!frontends.has_undone());
    }

    #[test]
    fn some_services_leave_the_others_alone() {
        let mut frontends = Frontends::default();
        all(&mut frontends, "a 1 80: .1\nb 1 81: .3", 0);
        let some = BTreeSet::from([key("b 1 81").service]);
        let now = Duration::ZERO;
        let news = frontends.follow(&desired("b 1 81: .4"), Some(&some), |_, _| true, NOBODY, now);
        assert_eq!(news.iter().map(|(key, wanted)| show(key, wanted)).collect::<Vec<_>>(), ["serve b: .4"]);
        assert!(frontends.wanted(&key("a 1 80")).is_some());
    }

    #[test]
    fn what_goes_to_the_kernel_is_finished_first() {
        let mut frontends = Frontends::default();
        let text = "a 1 80: .1";
        all(&mut frontends, text, 0);
        let mut then = |has: fn(&ServiceKey) -> bool, now: u64| {
            let now = Duration::from_secs(now);
            let news = frontends.follow(&desired(text), None, |_, _| false, has, now);
            news.iter().map(|(key, wanted)| show(key, wanted)).collect::<Vec<_>>()
        };
        // Whether or not it has any right now.
        assert_eq!(then(NOBODY, 10), ["finish a: .1"]);
        // Who is about to connect has some time, however often somebody looks.
        assert_eq!(then(NOBODY, 10), [""; 0]);
        assert_eq!(then(NOBODY, 14), [""; 0]);
        assert_eq!(then(EVERYBODY, 15), [""; 0]);
        assert_eq!(then(NOBODY, 16), ["gone a"]);
        // What it never had it need not finish.
        assert_eq!(then(EVERYBODY, 16), [""; 0]);
    }

    #[test]
    fn a_vip_is_no_backend() {
        let mut wanted = desired("a 1 80: .1 .2");
        wanted.vips.insert("10.0.0.2".parse().unwrap(), Default::default());
        let mut frontends = Frontends::default();
        let news = frontends.follow(&wanted, None, |_, _| true, NOBODY, Duration::ZERO);
        assert_eq!(news.iter().map(|(key, wanted)| show(key, wanted)).collect::<Vec<_>>(), ["serve a: .1"]);
    }

    #[test]
    fn schedulers_and_slow_starts() {
        let mut frontends = Frontends::default();
        assert_eq!(all(&mut frontends, "a 1 80: !least-connections .1 .2*2 .3*0", 0), ["serve a: .1 .2"]);
        all(&mut frontends, "a 1 80: !maglev .1 .2", 0);
        let Some(Wanted::Serve(table)) = frontends.wanted(&key("a 1 80")) else { panic!() };
        assert_eq!(table.slots.len(), maglev::size(2) as usize);
        all(&mut frontends, "a 1 80: %10s .1", 0);
        all(&mut frontends, "a 1 80: %10s .1 .2", 5);
        assert_eq!(frontends.next_step(), Some(Duration::from_secs(6)));
        let Some(Wanted::Serve(growing)) = frontends.wanted(&key("a 1 80")) else { panic!() };
        assert_eq!(growing.backends.iter().map(|backend| backend.weight).collect::<Vec<_>>(), [10, 1]);
        assert_eq!(frontends.take_due(Duration::from_secs(6)), BTreeSet::from([key("a 1 80").service]));
        all(&mut frontends, "a 1 80: %10s .1 .2", 20);
        assert_eq!(frontends.next_step(), None);
    }
}
