//! What the userspace proxy serves: everything where the kernel has no way, and the Services that ask for
//! it.
//!
//! A change-over loses no connection because of its order. To the proxy: its listeners open, then the
//! maps let new connections pass to the stack; those that the datapath has go on. Back: the maps take
//! new connections again and still let segments pass that begin nothing, and the listeners close when
//! the proxy has no connection left.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::time::Instant;
use tracing::{info, warn};

use super::kernel_path::NoKernel;
use super::telling::Placed;
use super::{Agent, RETRY};
use crate::app::DatapathPolicy;
use crate::app::handover::{Given, Predecessor};
use crate::app::live::Health;
use crate::app::trouble::Area;
use crate::model::{Desired, ObjectRef, Problem, Protocol, ServiceKey};
use crate::plan::{Frontends, Proxied, Wanted};
use crate::proxy::{Avoided, Inherited, Lent, Limits, Proxy, Reader, Settings};
use crate::view::{AttachMode, DeviceView};

/// How soon a port is tried again that could not be listened on: somebody else has it.
const RETRY_LISTENER: Duration = Duration::from_secs(30);
/// How long it may take an agent that has taken over to serve.
const FIRST_CONFIGURATION: Duration = Duration::from_secs(60);

/// How long the agent before this one goes on accepting for what could not be served at once.
const SECOND_TRIES: Duration = Duration::from_secs(10);
/// Backends that the proxy avoids for so long are told of: others may be back in a moment.
const LONG_AVOIDED: Duration = Duration::from_secs(10);

/// How soon a way in the kernel is tried again, while the proxy serves.
pub(super) const RETRY_KERNEL: Duration = Duration::from_secs(10);

/// The proxy, and what it was told.
#[derive(Default)]
pub(super) struct ProxyPath {
    /// Its workers; none while there is nothing to do.
    pub(super) proxy: Option<Proxy>,
    pub(super) frontends: Frontends,
    /// Why it serves everything; `None` if it does not.
    pub(super) why: Option<String>,
    /// What is counted, also of proxies that there were: counters must not fall.
    pub(super) counted: Reader,
    /// Entries that it cannot serve, and why.
    pub(super) failed: BTreeMap<ServiceKey, String>,
    /// That there is no way in the kernel at all.
    pub(super) no_kernel: Option<NoKernel>,
    /// Why no program could be attached to the link device.
    pub(super) link_refused: Option<Refused>,
    /// Listening sockets of the agent before this one.
    pub(super) inherited: Vec<Inherited>,
    /// It waits until this one serves.
    pub(super) predecessor: Option<Predecessor>,
    /// When it need not wait any longer, once this one has tried to serve everything.
    serves_by: Option<Instant>,
    /// What that one still has connections of, and for how long it may.
    pub(super) elsewhere: Option<(BTreeSet<(SocketAddr, Protocol)>, Instant)>,
}

/// What has come of attaching to the link device. Each attempt loads programs, and a driver may reset its
/// device for it, which looks like a change of the network: so it is not tried at each of those.
#[derive(Clone)]
pub(super) struct Refused {
    index: u32,
    why: String,
    until: Instant,
}

impl ProxyPath {
    /// Whether to try the link device, by its index: not right after it was refused.
    pub(super) fn may_attach(&self, index: u32) -> bool {
        self.link_refused.as_ref().is_none_or(|one| one.index != index || Instant::now() >= one.until)
    }

    /// With what the agent before this one has given.
    pub(super) fn new(no_kernel: Option<NoKernel>, mut predecessor: Option<Predecessor>) -> Self {
        let inherited = predecessor.as_mut().map(|one| std::mem::take(&mut one.sockets)).unwrap_or_default();
        let theirs: BTreeSet<_> = inherited.iter().map(|one| (one.address, one.protocol)).collect();
        let elsewhere = predecessor.as_ref().filter(|_| !theirs.is_empty());
        // It does not begin to end before this one serves.
        let elsewhere = elsewhere.map(|one| (theirs, Instant::now() + one.drain + FIRST_CONFIGURATION));
        Self { no_kernel, inherited, predecessor, elsewhere, ..Self::default() }
    }

    /// The sockets at VIPs, to hand over, whether or not this agent has come to use them.
    fn sockets(&self) -> Vec<Lent> {
        let own = self.proxy.as_ref().map(Proxy::sockets).unwrap_or_default();
        own.into_iter().chain(self.inherited.iter().map(Inherited::lend)).collect()
    }

    /// Entries of the kernel of which a proxy still has connections, be it this agent's or that of the
    /// one before.
    fn finishing(&self, desired: &Desired) -> BTreeSet<ServiceKey> {
        let own = self.frontends.all().filter(|(_, wanted)| matches!(wanted, Wanted::Finish(_)));
        let mut all: BTreeSet<_> = own.map(|(key, _)| key.clone()).collect();
        if let Some((theirs, _)) = &self.elsewhere {
            let is_theirs =
                |key: &&ServiceKey| theirs.contains(&(SocketAddr::new(key.vip, key.port), key.protocol));
            all.extend(desired.entries.keys().filter(is_theirs).cloned());
        }
        all
    }
}

impl Agent {
    /// Why the proxy is to serve everything.
    fn why_proxied(&self) -> Option<String> {
        match self.settings.datapath {
            DatapathPolicy::Proxy => Some("by --datapath".to_owned()),
            DatapathPolicy::Only(_) => None,
            DatapathPolicy::Auto => {
                let path = &self.proxied;
                let no_kernel = path.no_kernel.as_ref().map(|no_kernel| &no_kernel.why);
                no_kernel.or_else(|| Some(&path.link_refused.as_ref()?.why)).cloned()
            }
        }
    }

    /// Takes note that no program could be attached to the link device, now or lately.
    pub(super) fn leave_to_proxy(&mut self, device: &str, index: u32, error: Option<&anyhow::Error>) {
        if let Some(error) = error {
            let until = Instant::now() + RETRY_KERNEL;
            self.proxied.link_refused = Some(Refused { index, why: format!("{error:#}"), until });
        }
        let Some(Refused { why, until, .. }) = self.proxied.link_refused.clone() else { return };
        let text = format!("{device}: {why}; the userspace proxy serves instead, which takes more CPU");
        self.trouble.extend(Area::Devices, [Problem::warning(text)]);
        self.retry_by(until);
    }

    /// Takes note of what the proxy is to serve, and says whether every entry has to be looked at for it.
    pub(super) fn decide_proxied(&mut self) -> bool {
        let why = self.why_proxied();
        let is_other = why.is_some() != self.proxied.why.is_some();
        match (&why, is_other) {
            (Some(why), true) => info!("the userspace proxy serves: {why}"),
            (None, true) => info!("the kernel forwards again; the proxy finishes what it has"),
            _ => {}
        }
        self.proxied.why = why;
        is_other
    }

    /// Opens what the proxy is to serve, of some Services or all; gives what it is to close when the maps
    /// are written.
    pub(super) fn open_proxied(
        &mut self,
        services: Option<&BTreeSet<ObjectRef>>,
    ) -> Vec<(ServiceKey, Wanted)> {
        let path = &mut self.proxied;
        let wanted = Proxied { all: path.why.is_some(), finishing: BTreeSet::new() };
        let proxy = path.proxy.as_ref();
        let news = path.frontends.follow(
            &self.planner.plan().desired,
            services,
            |_, entry| wanted.serves(entry),
            |key| proxy.is_some_and(|proxy| proxy.connections(key) > 0),
            self.started.elapsed(),
        );
        let (gone, open): (Vec<_>, Vec<_>) =
            news.into_iter().partition(|(_, wanted)| *wanted == Wanted::Gone);
        self.clear_proxied(services);
        self.tell_proxy(open);
        if let Some((_, until)) = self.proxied.elsewhere {
            if Instant::now() >= until {
                self.proxied.elsewhere = None;
            } else {
                self.retry_by(until);
            }
        }
        let finishing = self.proxied.finishing(&self.planner.plan().desired);
        if let Some(kernel) = &mut self.kernel {
            kernel.compiler.leave_to_proxy(Proxied { finishing, ..wanted });
        }
        gone
    }

    /// Closes what is the kernel's, or nobody's.
    pub(super) fn close_proxied(&mut self, gone: Vec<(ServiceKey, Wanted)>) {
        self.tell_proxy(gone);
        let entries = &self.planner.plan().desired.entries;
        self.proxied.counted.forget(|key| !entries.contains_key(key));
        if self.proxied.frontends.is_empty() && self.proxied.proxy.take().is_some() {
            self.trouble.clear(Area::Proxy);
        }
    }

    /// Everything that is wanted was tried. If it is served, the agent before this one need not serve, and
    /// what it has given and nobody wants is closed; else it goes on accepting for a while.
    pub(super) fn has_taken_over(&mut self) {
        if self.proxied.predecessor.is_none() {
            return;
        }
        if !self.serves_all() {
            let now = Instant::now();
            let until = *self.proxied.serves_by.get_or_insert(now + SECOND_TRIES);
            if now < until {
                return self.retry_by(until.min(now + RETRY));
            }
            warn!("not everything can be served, and the agent before this one no longer waits for it");
        }
        self.proxied.inherited.clear();
        if let Some(proxy) = &mut self.proxied.proxy {
            proxy.forget_inherited();
        }
        if let Some(predecessor) = self.proxied.predecessor.take() {
            predecessor.we_serve();
        }
    }

    /// Whether nothing that is wanted is missing.
    fn serves_all(&self) -> bool {
        let is_told = !self.maps_incomplete && !self.proxied.frontends.has_undone();
        is_told && self.unserved.is_empty() && self.placed == Placed::All && self.is_met()
    }

    /// Looks whether connections of entries that the kernel has taken over have ended.
    pub(super) fn finish_proxied(&mut self) {
        let all = self.proxied.frontends.all();
        let finishing = all.filter(|(_, wanted)| matches!(wanted, Wanted::Finish(_)));
        let services: BTreeSet<_> = finishing.map(|(key, _)| key.service.clone()).collect();
        if !services.is_empty() && !self.maps_incomplete {
            self.write_maps(Some(&services));
            self.publish();
        }
    }

    fn clear_proxied(&mut self, services: Option<&BTreeSet<ObjectRef>>) {
        match services {
            None => {
                self.trouble.clear(Area::Proxy);
                self.proxied.failed.clear();
                self.tell_limits();
            }
            Some(services) => {
                self.trouble.forget(Area::Proxy, services);
                self.proxied.failed.retain(|key, _| !services.contains(&key.service));
            }
        }
    }

    fn tell_proxy(&mut self, news: Vec<(ServiceKey, Wanted)>) {
        if news.is_empty() {
            return;
        }
        self.shared.publish(|published| {
            for (key, wanted) in &news {
                match wanted {
                    Wanted::Gone => drop(published.frontends.remove(key)),
                    wanted => drop(published.frontends.insert(key.clone(), wanted.clone())),
                }
            }
        });
        let was_there = self.proxied.proxy.is_some();
        let failures = match self.proxy() {
            // It waits for its workers now and then.
            Ok(proxy) => tokio::task::block_in_place(|| proxy.apply(news)),
            Err(error) => {
                for (key, _) in &news {
                    self.proxied.frontends.tell_again(key);
                }
                return self.fail(Area::Proxy, "the proxy", &error);
            }
        };
        if let Some(proxy) = self.proxied.proxy.as_ref().filter(|_| !was_there) {
            let Limits { descriptors, connections, .. } = proxy.limits();
            info!(open_files = descriptors, connections, "the proxy works; so many it may have at most");
            self.tell_limits();
        }
        for (key, error) in failures {
            let text = format!("{key}: {error:#}");
            self.proxied.frontends.tell_again(&key);
            self.trouble.extend(Area::Proxy, [Problem::error(text.clone()).about("Service", &key.service)]);
            self.proxied.failed.insert(key, text);
            self.retry_by(Instant::now() + RETRY_LISTENER);
        }
    }

    /// Tells the cluster which backends the proxy has avoided for long.
    pub fn tell_avoided(&mut self) {
        let frontends = &self.proxied.frontends;
        let is_served = |key: &ServiceKey| matches!(frontends.wanted(key), Some(Wanted::Serve(_)));
        let services = &self.planner.objects().services;
        let avoided = self.proxied.counted.avoided(LONG_AVOIDED, is_served).into_iter();
        let health = avoided.filter_map(|(service, Avoided { count, all, example: (backend, failures) })| {
            let uid = services.get(&service)?.api.uid.clone();
            let example = Some((backend, format!("the last {failures} connects failed")));
            Some((service, Health { uid, healthy: all - count, unhealthy: count, example }))
        });
        let serves = |service: &ObjectRef| {
            frontends.all().any(|(key, wanted)| key.service == *service && matches!(wanted, Wanted::Serve(_)))
        };
        self.live.avoids(health.collect(), serves);
    }

    /// Says if the proxy may have few connections only.
    fn tell_limits(&mut self) {
        let problem = self.proxied.proxy.as_ref().and_then(|proxy| proxy.limits().problem());
        self.trouble.extend(Area::Proxy, problem.map(Problem::warning));
    }

    /// The proxy, which is started when it is first needed.
    fn proxy(&mut self) -> Result<&mut Proxy> {
        let path = &mut self.proxied;
        if path.proxy.is_none() {
            let counted = path.counted.clone();
            let settings =
                Settings { sources: self.settings.snat_addresses.clone(), ..self.settings.proxy.clone() };
            let mut proxy =
                Proxy::start_counting(settings, counted).context("starting the proxy's workers")?;
            proxy.inherit(std::mem::take(&mut path.inherited));
            self.shared.proxied(Some(proxy.reader()));
            path.proxy = Some(proxy);
        }
        path.proxy.as_mut().context("the proxy is gone")
    }

    /// Whether the proxy serves the whole node.
    pub fn is_proxied(&self) -> bool {
        self.proxied.why.is_some()
    }

    /// The listening sockets, for whoever takes over.
    pub fn sockets(&self) -> Vec<Lent> {
        self.proxied.sockets()
    }

    /// Another agent has these listening sockets, and takes over if they are those that there are.
    ///
    /// # Errors
    /// When there are others by now, or fewer. Then everything is as before.
    pub fn has_heir(&self, given: &Given) -> Result<()> {
        // What was opened meanwhile it could not open while this agent has it, and clients would be refused
        // when that ends. What was closed meanwhile was shut down, which nobody can undo.
        ensure!(
            given.has(&self.sockets())?,
            "ports were opened or closed while it took those that there were; it asks again"
        );
        self.proxied.proxy.as_ref().inspect(|proxy| proxy.has_heir());
        Ok(())
    }

    /// How many connections the proxy has; sessions of UDP have no end to wait for.
    pub fn connections(&self) -> usize {
        self.proxied.proxy.as_ref().map_or(0, Proxy::open_connections)
    }

    /// How long they may go on when the agent is asked to end.
    pub fn drain(&self) -> Duration {
        self.settings.drain
    }

    /// What is left when everything else is given away.
    pub fn into_proxy(mut self) -> Option<Proxy> {
        self.take_proxy()
    }

    /// Takes the proxy out, to end it.
    pub fn take_proxy(&mut self) -> Option<Proxy> {
        self.proxied.proxy.take()
    }

    /// Goes on without programs in the kernel, once nothing needs those that an earlier agent has left.
    pub(super) fn leave_kernel(&mut self) {
        let Some(mut kernel) = self.kernel.take() else { return };
        let mut failed = kernel.detach();
        failed.extend(kernel.pins.remove().err());
        for error in failed {
            warn!("leaving the kernel: {error:#}");
        }
        info!("the programs that an earlier agent has left are removed: no connection needs them any more");
    }

    /// The link device, if the proxy serves it.
    pub(super) fn proxied_device(&self) -> Option<DeviceView> {
        self.link_index()?;
        let reason = Some(self.proxied.why.clone()?);
        let device = self.settings.link_device.clone();
        Some(DeviceView { device, mode: AttachMode::Proxy, reason, program_id: None })
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::Arc;

    use super::*;

    /// An agent may be followed before it has started its proxy.
    #[test]
    fn what_is_inherited_is_handed_on() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let inherited = Inherited { address, protocol: Protocol::Tcp, socket: Arc::new(listener.into()) };
        let path = ProxyPath { inherited: vec![inherited], ..ProxyPath::default() };
        assert_eq!(path.sockets().iter().map(|one| one.address).collect::<Vec<_>>(), [address]);
    }
}
