//! What the agent knows and does, one step at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use lb_common::abi::Config;
use tokio::time::Instant;
use tracing::{debug, error, info};

use super::handover::Predecessor;
use super::live::Live;
use super::shared::Shared;
use super::start::check_device;
use super::trouble::{Area, Trouble};
use super::{DatapathPolicy, Settings};
use crate::dataplane::PinDirectory;
use crate::dataplane::collect::Sweep;
use crate::http::{HealthPorts, HealthProblems, Inspect};
use crate::model::{ObjectRef, Problem, Severity};
use crate::net::next_hops::{Ask, NextHops, Refreshed};
use crate::net::{Change, Kernel as Network, addresses};
use crate::plan::ipam::{self, Ipam};
use crate::plan::{
    self, Addressing, Compiler, CookiePhase, Effects, FlowTableWatch, Leaving, Paths, Planner, Scope,
};
use crate::probe::Probes;
use crate::source::Update;

mod cookies;
mod health;
mod hooks;
mod kernel_path;
mod placing;
mod proxied;
mod telling;

use kernel_path::{Begin, KernelPath};
use proxied::ProxyPath;
use telling::Placed;

/// How soon something that failed is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// The agent.
pub struct Agent {
    settings: Settings,
    started: Instant,
    network: Network,
    next_hops: NextHops,
    /// What it has in the kernel; `None` where the proxy does without.
    kernel: Option<KernelPath>,
    /// What the userspace proxy serves.
    proxied: ProxyPath,
    planner: Planner,
    config: Config,
    /// What the datapath is to do about SYN cookies, if it can.
    cookies: CookiePhase,
    paths: Paths,
    /// Devices that are kept although nothing leads by them any more.
    leaving: Leaving,
    /// Whether something has happened that may have moved the way back to clients.
    routes_changed: bool,
    /// Whether routes to backends may be others than before.
    ask_routes: bool,
    /// Whether the network could be read.
    network_known: bool,
    /// Whether the maps are not yet as they should be, or that is not known.
    maps_incomplete: bool,
    retry_at: Option<Instant>,
    trouble: Trouble,
    /// Tables of flows that were said to be nearly full.
    flow_tables: FlowTableWatch,
    /// Services of which something else is to be said, once it is done.
    untold: BTreeSet<ObjectRef>,
    /// Services that the maps do not have as they should be, and why.
    unserved: BTreeMap<ObjectRef, String>,
    /// Which VIPs are on the link device.
    placed: Placed,
    live: Live,
    shared: Arc<Shared>,
    generation: u64,
    reloaded: Option<Instant>,
    health_ports: HealthPorts,
    /// Who asks the backends whether they work.
    probes: Probes,
    /// Since when there is an update that the maps do not have yet.
    updating: Option<Instant>,
    /// Whether what is written next is what the comparison with the maps asked for.
    resyncing: bool,
}

impl Agent {
    /// Loads the programs and adopts what an earlier agent has left. Nothing is removed yet.
    /// `predecessor`: the agent that this one has taken over from.
    pub async fn start(
        settings: &Settings,
        live: Live,
        predecessor: Option<Predecessor>,
    ) -> Result<(Self, Arc<Shared>)> {
        let network = Network::connect()?;
        check_device(&network, &settings.link_device).await?;
        let pins = PinDirectory::new(&settings.pin_directory);
        let (kernel, Begin { config, cookies }, no_kernel) = KernelPath::begin(&pins, settings)?;
        let addressing = if settings.follows_cluster() {
            Addressing::Follows
        } else {
            let options = ipam::Options {
                default_class: settings.default_class,
                outside_pools: true,
                deferred_release: false,
            };
            let mut ipam = Ipam::new(options);
            ipam.adopt(kernel.as_ref().map(|kernel| kernel.compiler.holdings()).unwrap_or_default());
            Addressing::Decides(Box::new(ipam))
        };
        let planner = Planner::new(settings.default_class, settings.node.clone(), addressing);
        let mut leaving = Leaving::default();
        if let Some(kernel) = &kernel {
            leaving = kernel.adopt_devices(leaving)?;
        }
        let probes = Probes::start();
        let shared = Arc::new(Shared::new(&pins, settings.metrics_per_backend, probes.counts()));
        let agent = Self {
            settings: settings.clone(),
            started: Instant::now(),
            next_hops: NextHops::new(network.clone(), settings.devices_of_clients()),
            network,
            kernel,
            proxied: ProxyPath::new(no_kernel, predecessor),
            planner,
            config,
            cookies,
            paths: Paths::new(),
            leaving,
            routes_changed: false,
            ask_routes: false,
            network_known: false,
            maps_incomplete: true,
            retry_at: None,
            trouble: Trouble::default(),
            flow_tables: FlowTableWatch::default(),
            untold: BTreeSet::new(),
            unserved: BTreeMap::new(),
            placed: Placed::None,
            live,
            shared: Arc::clone(&shared),
            generation: 0,
            reloaded: None,
            health_ports: HealthPorts::start(Arc::clone(&shared) as Arc<dyn Inspect>),
            probes,
            updating: None,
            resyncing: false,
        };
        Ok((agent, shared))
    }

    /// Where the pins are, if there are any.
    pub fn pins(&self) -> Option<&PinDirectory> {
        self.kernel.as_ref().map(|kernel| &kernel.pins)
    }

    /// What is wrong with the ports of health checks, for [`Self::health_troubled`].
    pub fn health_problems(&self) -> HealthProblems {
        self.health_ports.problems()
    }

    /// Takes note of what is wrong with them.
    pub fn health_troubled(&mut self, problems: Vec<Problem>) {
        self.trouble.replace(Area::HealthChecks, problems);
        self.publish();
    }

    /// When to call [`Self::retry`].
    pub fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Takes what a source tells into use.
    pub async fn update(&mut self, update: Update) {
        if let Some(problems) = update.problems {
            self.trouble.replace(Area::Source, problems);
        }
        if !update.synced {
            return self.publish();
        }
        self.updating.get_or_insert_with(Instant::now);
        self.shared.recorder.updated();
        let count = update.changes.len();
        let effects = self.planner.apply(update.changes);
        self.untold.extend(effects.reports.iter().cloned());
        self.ask(&effects);
        let problems = self.planner.plan().problems.clone();
        self.trouble.replace(Area::Objects, problems);
        let pools = self.planner.objects().pools.values();
        let pools = pools.map(|pool| (pool.name.clone(), pool.size())).collect();
        self.shared.publish(|published| published.pools = pools);
        let planner = &self.planner;
        for gone in self.next_hops.know(&effects.backends, |address| planner.is_local(address)) {
            self.paths.remove(&gone);
        }
        let first = self.generation == 0;
        self.reloaded = Some(Instant::now());
        self.generation += 1;
        debug!(changes = count, services = effects.services.len(), "what the source told is taken into use");
        if first {
            info!(services = self.planner.plan().reports.len(), "the first configuration is complete");
            self.converge(Ask::Neighbours).await;
        } else {
            self.follow(&effects).await;
        }
        for service in &effects.health_checks {
            let check = self.planner.plan().health_checks.get(service);
            self.health_ports.answer(service, check.map(|check| (check.port, check.endpoints)));
        }
    }

    /// Takes note of a change of the network, which [`Self::network_changed`] will look at.
    pub fn note(&mut self, change: Change) {
        // Neighbours change their state all the time; whether their address did is seen later.
        self.routes_changed |= change == Change::Topology;
        self.ask_routes |= change != Change::Neighbour;
    }

    /// Looks at the network anew.
    pub async fn network_changed(&mut self) {
        if self.generation == 0 {
            return self.hold().await;
        }
        self.look_around(Ask::Neighbours).await;
        self.finish_proxied();
    }

    /// Compares the maps themselves with what they should contain, and repairs them.
    pub async fn resync(&mut self) {
        if self.generation == 0 {
            return self.hold().await;
        }
        if let Some(kernel) = &mut self.kernel {
            if let Err(error) = kernel.compiler.reload(&kernel.maps) {
                error!("resync: {error:#}");
                return;
            }
            kernel.sockets.recheck();
        }
        self.resyncing = true;
        self.converge(Ask::Sample).await;
    }

    /// Tries again what could not be done.
    pub async fn retry(&mut self) {
        self.retry_at = None;
        if self.generation == 0 {
            return self.hold().await;
        }
        self.converge(Ask::Neighbours).await;
    }

    /// When backends that start slowly are to get more connections, or Services may get the lookup tables
    /// that there was no room for. While something else is wrong, what
    /// is done about that does it.
    pub fn step_at(&self) -> Option<Instant> {
        let can_step = !self.maps_incomplete && self.network_known;
        let compiler = self.kernel.as_ref().map(|kernel| &kernel.compiler);
        let steps = [compiler.and_then(Compiler::next_step), self.proxied.frontends.next_step()];
        steps.into_iter().flatten().min().filter(|_| can_step).map(|at| self.started + at)
    }

    /// Gives backends that start slowly more connections, and Services their lookup tables.
    pub fn step(&mut self) {
        let now = self.started.elapsed();
        let mut due = self.proxied.frontends.take_due(now);
        due.extend(self.kernel.as_mut().map(|kernel| kernel.compiler.take_due(now)).unwrap_or_default());
        self.write_maps(Some(&due));
        self.publish();
    }

    /// Keeps what an earlier agent has left for as long as nobody has said what is wanted: the API
    /// server may be away.
    async fn hold(&mut self) {
        self.trouble.clear(Area::Addresses);
        if let Err(error) = addresses::renew(self.network.handle()).await {
            self.fail(Area::Addresses, "addresses", &error);
        }
        self.publish();
    }

    /// Takes note of which backends flows still refer to.
    pub fn swept(&mut self, sweep: &Sweep) {
        if let Some(KernelPath { compiler, .. }) = &mut self.kernel {
            let freed = compiler.freed_backends().into_iter();
            let freed: Vec<_> = freed.filter(|index| !sweep.backends.contains_key(index)).collect();
            compiler.flows_purged(&freed);
        }
        self.shared.swept(sweep);
        if self.settings.datapath == DatapathPolicy::Proxy && sweep.kept == 0 && self.is_proxied() {
            self.leave_kernel();
        }
        // While the maps may lead by devices that are left, these stay.
        if !self.maps_incomplete && self.leaving.swept(&sweep.sources) {
            self.leave_unused();
        }
        let problems = self.flow_tables.look(&sweep.tables);
        self.live.nearly_full(self.flow_tables.nearly_full());
        self.trouble.replace(Area::Flows, problems);
        self.publish();
    }

    /// Does what some Services ask for, at the cost of those.
    async fn follow(&mut self, effects: &Effects) {
        if self.maps_incomplete || !self.network_known {
            return self.converge(Ask::Neighbours).await;
        }
        let planner = &self.planner;
        self.next_hops.follow(&effects.backends, |address| planner.is_local(address)).await;
        let moved = if self.needs_hooks(&effects.backends) { self.attach() } else { BTreeSet::new() };
        self.take_paths(effects.backends.union(&moved));
        if moved.is_empty() {
            self.write_maps(Some(&effects.services));
        } else {
            let others = self.planner.services_behind(&moved);
            self.write_maps(Some(&effects.services.union(&others).cloned().collect()));
        }
        if self.kernel.as_ref().is_some_and(KernelPath::has_exits) {
            self.leave_exits();
        }
        self.attach_sockets();
        if !effects.vips.is_empty() {
            // Last: whoever sees the address finds it served.
            self.place_addresses(Some(&effects.vips)).await;
        }
        self.report_live(effects);
        self.publish();
    }

    /// Does everything: all that is tried says anew what is wrong with it.
    async fn converge(&mut self, ask: Ask) {
        self.retry_at = None;
        self.maps_incomplete = true;
        self.look_around(ask).await;
    }

    /// Reads the state of the network, and carries on from there.
    async fn look_around(&mut self, ask: Ask) {
        let ask = if std::mem::take(&mut self.ask_routes) { Ask::Routes } else { ask };
        let refreshed = match self.next_hops.refresh(ask).await {
            Ok(refreshed) => refreshed,
            Err(error) => {
                // What is not known must not look gone: everything stays as it is.
                self.network_known = false;
                self.ask_routes |= ask == Ask::Routes;
                self.fail(Area::Network, "network", &error);
                return self.publish();
            }
        };
        let was_known = std::mem::replace(&mut self.network_known, true);
        if was_known && ask == Ask::Neighbours && refreshed == Refreshed::default() && self.is_settled() {
            return;
        }
        self.trouble.clear(Area::Network);
        self.routes_changed |= refreshed.neighbours;
        if std::mem::take(&mut self.routes_changed) {
            self.config.route_generation = self.config.route_generation.wrapping_add(1).max(1);
        }
        self.find_filters().await;
        let moved = self.attach();
        let backends: BTreeSet<_> = refreshed.backends.union(&moved).copied().collect();
        self.take_paths(&backends);
        if self.must_wait() {
            self.maps_incomplete = true;
            return self.hold().await;
        }
        let services = self.planner.services_behind(&backends);
        self.write_maps(if self.maps_incomplete { None } else { Some(&services) });
        self.leave_exits();
        self.attach_sockets();
        self.place_addresses(None).await;
        self.retire_previous();
        self.has_taken_over();
        self.report_all_live();
        self.live.begins();
        self.publish();
    }

    /// Whether everything is done and in place, as far as that is known without looking.
    fn is_settled(&self) -> bool {
        !self.maps_incomplete && self.placed == Placed::All && self.retry_at.is_none()
    }

    /// Writes what differs: for some Services, or everything.
    fn write_maps(&mut self, changed: Option<&BTreeSet<ObjectRef>>) {
        let changed = if self.decide_proxied() { None } else { changed };
        let closing = self.open_proxied(changed);
        self.write_kernel_maps(changed);
        self.close_proxied(closing);
    }

    fn write_kernel_maps(&mut self, changed: Option<&BTreeSet<ObjectRef>>) {
        let now = self.started.elapsed();
        let scope = changed.map_or(Scope::All, Scope::Services);
        let (delta, failures) = match &mut self.kernel {
            Some(KernelPath { compiler, maps, .. }) => {
                let desired = &self.planner.plan().desired;
                let delta = compiler.reconcile(desired, &self.paths, &self.config, scope, now);
                let failures = plan::apply(&delta, maps, compiler, now);
                (delta, failures)
            }
            None => Default::default(),
        };
        if let Some(since) = self.updating.take() {
            self.shared.recorder.in_maps(since.elapsed());
        }
        if std::mem::take(&mut self.resyncing) {
            self.shared.recorder.resynced(delta.ops().count());
        }
        // What is short at one Service keeps no other from being followed: `retry_at` sees to it.
        self.maps_incomplete = !failures.is_empty();
        match changed {
            None => {
                self.trouble.clear(Area::Maps);
                self.unserved.clear();
            }
            Some(services) => {
                self.trouble.forget(Area::Maps, services);
                self.unserved.retain(|service, _| !services.contains(service));
            }
        }
        // What the proxy serves does not need the maps. One that makes do with something else is served.
        let is_needed = !self.is_proxied();
        let short = delta.problems.iter().filter(|problem| problem.severity == Severity::Error && is_needed);
        let short = short.filter_map(|problem| {
            let service = problem.object.clone()?;
            Some((service, problem.message.clone()))
        });
        let failed = failures.iter().filter(|_| is_needed).filter_map(|failure| {
            let service = failure.owner.as_ref()?.service.clone();
            Some((service, format!("{:#}", failure.error)))
        });
        self.unserved.extend(short.chain(failed));
        let refused = self.proxied.failed.iter().map(|(key, why)| (key.service.clone(), why.clone()));
        self.unserved.extend(refused);
        self.trouble.extend(Area::Maps, delta.problems);
        if let Some(at) = delta.retry_at {
            self.retry_by(self.started + at);
        }
        for failure in failures {
            let owner = failure.owner.as_ref().map_or_else(|| "maps".to_owned(), ToString::to_string);
            self.fail(Area::Maps, &owner, &failure.error);
        }
    }

    /// Takes note of something that failed and will be tried again.
    fn fail(&mut self, area: Area, about: &str, error: &anyhow::Error) {
        self.trouble.extend(area, [Problem::error(format!("{about}: {error:#}"))]);
        self.retry_by(Instant::now() + RETRY);
    }

    fn retry_by(&mut self, moment: Instant) {
        self.retry_at = Some(self.retry_at.map_or(moment, |at| at.min(moment)));
    }

    /// Makes what is in place stay until another agent comes, however late.
    ///
    /// # Errors
    /// When an address could not be kept.
    pub async fn hand_over(&self) -> Result<()> {
        if let Some(kernel) = &self.kernel {
            kernel.lock.give_back()?;
        }
        if self.settings.follows_cluster() {
            // Others may be given the addresses when this node stays away: they must not stay for ever.
            return Ok(());
        }
        let wanted: Vec<_> = self.planner.plan().desired.vips.keys().copied().collect();
        addresses::keep(self.network.handle(), &wanted).await
    }

    /// Takes everything back.
    ///
    /// # Errors
    /// When something could not be removed; the rest is removed all the same.
    pub async fn withdraw(mut self) -> Result<()> {
        let mut failed = Vec::new();
        // Even if something stays behind: this node is not to be relied on.
        let mut live = std::mem::replace(&mut self.live, Live::untold());
        // On no device any more, those that are not named by now among them.
        let (no_device, none_wanted) = (BTreeSet::new(), BTreeSet::new());
        let handle = self.network.handle();
        match addresses::reconcile(handle, &no_device, self.next_hops.links(), &none_wanted).await {
            Ok(done) => failed.extend(done.refused.into_iter().map(|(_, error)| anyhow::Error::msg(error))),
            Err(error) => failed.push(error),
        }
        let mut kernel = self.kernel.take();
        if let Some(kernel) = &mut kernel {
            failed.extend(kernel.detach());
        }
        live.ends();
        self.next_hops.release().await;
        if let Some(kernel) = kernel
            && let Err(error) = kernel.pins.remove()
        {
            failed.push(error);
        }
        match failed.into_iter().reduce(|all, error| all.context(format!("{error:#}"))) {
            Some(error) => Err(error.context("leaving: not everything could be removed")),
            None => {
                info!("VIPs, programs and maps are removed");
                Ok(())
            }
        }
    }
}
