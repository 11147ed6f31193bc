//! What the agent knows and does, one step at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lb_common::abi::Config;
use tokio::time::Instant;
use tracing::{error, info, warn};

use super::Settings;
use super::shared::{Published, Shared};
use crate::dataplane::collect::Sweep;
use crate::dataplane::{Devices, Kernel as Programs, KernelMaps, PinDirectory, PinLock};
use crate::model::{ObjectRef, Problem};
use crate::net::next_hops::{NextHops, Resolution};
use crate::net::{Change, Kernel as Network, addresses};
use crate::plan::{self, Compiler, Path, Paths, Planner, Scope, ipam};
use crate::ports::MapStore;
use crate::source::file::Snapshot;

/// How soon something that failed is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// The agent.
pub struct Agent {
    settings: Settings,
    started: Instant,
    network: Network,
    next_hops: NextHops,
    pins: PinDirectory,
    /// Keeps other agents away from the pins.
    _lock: PinLock,
    programs: Programs,
    maps: KernelMaps,
    devices: Devices,
    compiler: Compiler,
    planner: Planner,
    config: Config,
    /// Whether something has happened that may have moved the way back to clients.
    routes_changed: bool,
    /// Whether the maps are not yet as they should be, or that is not known.
    maps_incomplete: bool,
    retry_at: Option<Instant>,
    /// Problems of the configuration, and of carrying it out.
    source_problems: Vec<Problem>,
    problems: Vec<Problem>,
    reported: BTreeSet<String>,
    shared: Arc<Shared>,
    generation: u64,
    reloaded: Option<Instant>,
}

impl Agent {
    /// Loads the programs and adopts what an earlier agent has left. Nothing is removed yet.
    pub async fn start(settings: &Settings) -> Result<(Self, Arc<Shared>)> {
        let network = Network::connect()?;
        check_device(&network, &settings.link_device).await?;
        let pins = PinDirectory::new(&settings.pin_directory);
        pins.prepare()?;
        let lock = pins.lock()?;
        let programs = Programs::load(&pins, &settings.sizes)?;
        let maps = KernelMaps::from_pins(&pins)?;
        let mut compiler = Compiler::adopt(&maps, plan::Settings::default())?;
        // Whatever the maps say, next hops may be others by now.
        let config = first_config(settings, maps.config()?)?;
        let options = ipam::Options { default_class: true, outside_pools: true, deferred_release: false };
        let planner = Planner::new(options, compiler.holdings());
        compiler.reload(&maps)?;
        let shared = Arc::new(Shared::new(&pins));
        let agent = Self {
            settings: settings.clone(),
            started: Instant::now(),
            next_hops: NextHops::new(network.clone()),
            network,
            devices: Devices::new(pins.clone(), settings.mode),
            pins,
            _lock: lock,
            programs,
            maps,
            compiler,
            planner,
            config,
            routes_changed: false,
            maps_incomplete: true,
            retry_at: None,
            source_problems: Vec::new(),
            problems: Vec::new(),
            reported: BTreeSet::new(),
            shared: Arc::clone(&shared),
            generation: 0,
            reloaded: None,
        };
        Ok((agent, shared))
    }

    /// Where the pins are.
    pub fn pins(&self) -> &PinDirectory {
        &self.pins
    }

    /// When to call [`Self::retry`].
    pub fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Takes a configuration into use.
    pub async fn configure(&mut self, snapshot: &Snapshot) {
        self.source_problems.clone_from(&snapshot.problems);
        let changed = self.planner.update(snapshot.objects.clone());
        self.reloaded = Some(Instant::now());
        let first = self.generation == 0;
        self.generation += 1;
        let services = self.planner.plan().reports.len();
        info!(
            services,
            changed = changed.len(),
            generation = self.generation,
            "configuration is taken into use"
        );
        self.converge(if first { None } else { Some(changed) }).await;
    }

    /// Takes note of a change of the network, which [`Self::network_changed`] will look at.
    pub fn note(&mut self, change: Change) {
        // Neighbours change their state all the time; whether their address did is seen later.
        self.routes_changed |= change == Change::Topology;
    }

    /// Looks at the network anew.
    pub async fn network_changed(&mut self) {
        self.converge(Some(BTreeSet::new())).await;
    }

    /// Compares the maps themselves with what they should contain, and repairs them.
    pub async fn resync(&mut self) {
        if let Err(error) = self.compiler.reload(&self.maps) {
            error!("resync: {error:#}");
            return;
        }
        self.converge(None).await;
    }

    /// Tries again what could not be done.
    pub async fn retry(&mut self) {
        self.retry_at = None;
        self.converge(None).await;
    }

    /// Takes note of which backends flows still refer to.
    pub fn swept(&mut self, sweep: &Sweep) {
        let freed: Vec<_> = self
            .compiler
            .freed_backends()
            .into_iter()
            .filter(|index| !sweep.backends.contains(index))
            .collect();
        self.compiler.flows_purged(&freed);
    }

    /// Does whatever is to be done: `changed` are the Services that changed, `None` means all and
    /// everything.
    async fn converge(&mut self, changed: Option<BTreeSet<ObjectRef>>) {
        // All that is tried below says anew what is wrong with it; map writes do so only for what they
        // look at, and so look at everything until nothing is wrong.
        self.problems.clear();
        self.retry_at = None;
        let backends = self.planner.plan().desired.backend_addresses();
        let mut everything = changed.is_none() || self.maps_incomplete;
        match self.next_hops.refresh(&backends).await {
            Ok(refreshed) => {
                everything |= refreshed.backends;
                self.routes_changed |= refreshed.neighbours;
            }
            Err(error) => {
                // What is not known must not look gone: everything stays as it is.
                self.maps_incomplete = true;
                self.trouble("network", &error);
                self.publish();
                return;
            }
        }
        if std::mem::take(&mut self.routes_changed) {
            self.config.route_generation = self.config.route_generation.wrapping_add(1).max(1);
        }
        self.attach();
        self.write_maps(if everything { None } else { changed.as_ref() });
        // Last: whoever sees the address finds it served.
        self.place_addresses().await;
        self.publish();
    }

    /// Attaches the program wherever packets of clients or backends come in.
    fn attach(&mut self) {
        let mut wanted = BTreeMap::new();
        let link = self.next_hops.links().iter().find(|(_, link)| link.name == self.settings.link_device);
        match link {
            // Frames of a VLAN device come in by the one below.
            Some((index, link)) => {
                let below = link.vlan.and(link.parent);
                let index = below.unwrap_or(*index);
                if let Some(link) = self.next_hops.links().get(&index) {
                    wanted.insert(index, link.name.clone());
                }
            }
            None => {
                let error = anyhow::anyhow!(
                    "the link device {} is gone; its VIPs come back with it",
                    self.settings.link_device
                );
                self.trouble("device", &error);
            }
        }
        for found in self.next_hops.resolutions().values() {
            // Whether or not the next hop is known right now: replies of connections come in by it.
            if let Some((index, name)) = &found.device {
                wanted.insert(*index, name.clone());
            }
        }
        for (index, name) in &wanted {
            if let Err(error) = self.attach_one(*index, name) {
                self.trouble(name, &error);
            }
        }
        let keep: Vec<_> = wanted.into_keys().collect();
        let gone: Vec<_> = self
            .devices
            .attached()
            .map(|found| found.ifindex)
            .filter(|index| !keep.contains(index))
            .collect();
        for index in gone {
            if let Err(error) = self.maps.forbid_device(index) {
                self.trouble("devices", &error);
            }
        }
        if let Err(error) = self.devices.keep_only(&keep) {
            self.trouble("devices", &error);
        }
    }

    fn attach_one(&mut self, index: u32, name: &str) -> Result<()> {
        let on_device = self.next_hops.links().get(&index).and_then(|link| link.xdp_program);
        self.devices.check(index, on_device);
        // Redirection first: the program may need it with the first packet.
        self.maps.allow_device(index)?;
        self.devices.attach(self.programs.entry_program()?, index, name)?;
        Ok(())
    }

    /// Writes what differs.
    fn write_maps(&mut self, changed: Option<&BTreeSet<ObjectRef>>) {
        let now = self.started.elapsed();
        let paths = paths(self.next_hops.resolutions(), &self.settings.snat_addresses);
        let scope = changed.map_or(Scope::All, Scope::Services);
        let desired = &self.planner.plan().desired;
        let delta = self.compiler.reconcile(desired, &paths, &self.config, scope, now);
        let failures = plan::apply(&delta, &mut self.maps, &mut self.compiler, now);
        self.maps_incomplete = !delta.problems.is_empty() || !failures.is_empty() || delta.retry_at.is_some();
        self.problems.extend(delta.problems);
        if let Some(at) = delta.retry_at {
            self.retry_by(self.started + at);
        }
        for failure in failures {
            let owner = failure.owner.as_ref().map_or_else(|| "maps".to_owned(), ToString::to_string);
            self.trouble(&owner, &failure.error);
        }
    }

    /// Puts the VIPs on the link device, and takes those off that nobody needs.
    async fn place_addresses(&mut self) {
        let device = self.next_hops.links().iter().find(|(_, link)| link.name == self.settings.link_device);
        let Some((index, _)) = device else { return };
        let wanted: BTreeSet<_> = self.planner.plan().desired.vips.keys().copied().collect();
        match addresses::reconcile(self.network.handle(), *index, &wanted).await {
            Ok(changes) => {
                for address in changes.foreign {
                    let text = format!(
                        "the VIP {address} is on this node already, and not by us: it is served, and stays when we leave"
                    );
                    self.problems.push(Problem::warning(text));
                }
            }
            Err(error) => self.trouble("addresses", &error),
        }
    }

    /// Takes note of something that failed and will be tried again.
    fn trouble(&mut self, about: &str, error: &anyhow::Error) {
        self.problems.push(Problem::error(format!("{about}: {error:#}")));
        self.retry_by(Instant::now() + RETRY);
    }

    fn retry_by(&mut self, moment: Instant) {
        self.retry_at = Some(self.retry_at.map_or(moment, |at| at.min(moment)));
    }

    /// Tells the log and whoever asks.
    fn publish(&mut self) {
        let plan = self.planner.plan();
        let all: Vec<_> =
            self.source_problems.iter().chain(&plan.problems).chain(&self.problems).cloned().collect();
        let reports = plan.reports.values().flat_map(|report| &report.problems);
        let texts: BTreeSet<_> = all.iter().chain(reports).map(ToString::to_string).collect();
        for text in texts.difference(&self.reported) {
            warn!("{text}");
        }
        self.reported = texts;
        self.shared.publish(Published {
            reports: plan.reports.clone(),
            problems: all,
            resolutions: self.next_hops.resolutions().clone(),
            devices: self.devices.attached().cloned().collect(),
            generation: self.generation,
            reloaded: self.reloaded,
        });
    }

    /// Makes what is in place stay until another agent comes, however late.
    ///
    /// # Errors
    /// When an address could not be kept.
    pub async fn hand_over(&self) -> Result<()> {
        let wanted: Vec<_> = self.planner.plan().desired.vips.keys().copied().collect();
        addresses::keep(self.network.handle(), &wanted).await
    }

    /// Takes everything back.
    ///
    /// # Errors
    /// When something could not be removed; the rest is removed all the same.
    pub async fn withdraw(mut self) -> Result<()> {
        let mut failed = Vec::new();
        let links = self.network.links().await.unwrap_or_default();
        let device = links.iter().find(|(_, link)| link.name == self.settings.link_device);
        let index = device.map_or(0, |(index, _)| *index);
        if let Err(error) = addresses::reconcile(self.network.handle(), index, &BTreeSet::new()).await {
            failed.push(error);
        }
        if let Err(error) = self.devices.keep_only(&[]) {
            failed.push(error);
        }
        self.next_hops.release().await;
        if let Err(error) = self.pins.remove() {
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

async fn check_device(network: &Network, name: &str) -> Result<()> {
    let links = network.links().await?;
    if links.values().any(|link| link.name == name) {
        return Ok(());
    }
    let others: Vec<_> =
        links.values().filter(|link| !link.is_loopback).map(|link| link.name.as_str()).collect();
    bail!("--link-device {name}: there is no such device; this node has: {}", others.join(", "))
}

/// The settings of the datapath to begin with. The route generation goes on where an earlier agent
/// stopped: its flows carry it.
fn first_config(settings: &Settings, earlier: Option<Config>) -> Result<Config> {
    let (first, last) = settings.snat_ports;
    let count = last
        .checked_sub(first)
        .and_then(|count| count.checked_add(1))
        .filter(|_| first > 0)
        .with_context(|| {
            format!("--snat-ports {first}-{last}: the first port must be at least 1 and not above the last")
        })?;
    let generation = earlier.map_or(0, |config| config.route_generation).wrapping_add(1).max(1);
    Ok(Config {
        route_generation: generation,
        snat_port_first: first,
        snat_port_count: count,
        ..Config::default()
    })
}

/// The ways to backends for the compiler.
fn paths(resolutions: &BTreeMap<IpAddr, Resolution>, chosen: &[IpAddr]) -> Paths {
    let one = |(backend, found): (&IpAddr, &Resolution)| {
        let mut snat: Vec<_> =
            chosen.iter().filter(|one| one.is_ipv4() == backend.is_ipv4()).copied().collect();
        if snat.is_empty() {
            snat.extend(found.source);
        }
        (*backend, Path { next_hop: found.next_hop, snat })
    };
    resolutions.iter().map(one).collect()
}
