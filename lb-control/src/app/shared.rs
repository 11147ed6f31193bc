//! What the agent tells whoever asks on the socket: what it has decided, with the counters of the
//! maps.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use anyhow::Result;
use tokio::time::Instant;

use super::metrics;
use crate::dataplane::collect::Sweep;
use crate::dataplane::{Counters, PinDirectory};
use crate::http::Inspect;
use crate::inspect::{
    Frontends, MapReading, PinnedMaps, add_proxied, collect_backends, collect_proxied, overlay,
};
use crate::model::{ObjectRef, Problem, ServiceReport};
use crate::plan::{CookiePhase, Fill};
use crate::probe::Counts;
use crate::proxy::{FrontendCounts, Reader, Totals};
use crate::telemetry::metrics::{CONTENT_TYPE, Recorder, Samples, table};
use crate::view::{
    AgentView, BackendView, DeviceView, DropView, FlowTableView, FlowView, ProblemView, ServedBy,
    ServiceView, StatusView,
};

/// What the agent has decided and done.
#[derive(Clone, Default)]
pub struct Published {
    /// Services.
    pub reports: BTreeMap<ObjectRef, Arc<ServiceReport>>,
    /// What is wrong and belongs to no Service.
    pub problems: Vec<Problem>,
    /// Backends to which no way is known, and why.
    pub unreachable: BTreeMap<IpAddr, String>,
    /// Devices with the program.
    pub devices: Vec<DeviceView>,
    /// Counts updates of the source.
    pub generation: u64,
    /// When the last one was taken into use.
    pub reloaded: Option<Instant>,
    /// How much is wrong, by what it was tried for.
    pub problem_counts: BTreeMap<&'static str, usize>,
    /// How many addresses are on the link device.
    pub placed: usize,
    /// How many addresses each pool can give out.
    pub pools: BTreeMap<String, f64>,
    /// The flow tables at the last sweep.
    pub flows: Option<Flows>,
    /// What the datapath does about SYN cookies.
    pub cookies: CookiePhase,
    /// What the proxy was told.
    pub frontends: Frontends,
    /// The agent has been asked to end, and serves for as long as its connections last.
    pub is_ending: bool,
}

impl Published {
    /// Whether packets are forwarded by the current configuration, and go on to be.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.generation > 0 && !self.devices.is_empty() && !self.is_ending
    }
}

/// How full the flow tables are.
#[derive(Clone, Default)]
pub struct Flows {
    /// Flows that are established.
    pub established: usize,
    /// Flows that begin or end.
    pub transient: usize,
    /// Of them, those that belong to the established ones, whose table is full.
    pub unprotected: usize,
    /// The tables, by their name.
    pub tables: BTreeMap<&'static str, Fill>,
}

/// After so long without a turn, the agent's loop is stuck. A turn comes every ten seconds at least,
/// and the longest that one may take is that of the first configuration.
const STUCK: Duration = Duration::from_secs(90);

/// What the agent shares with those who ask.
pub struct Shared {
    started: Instant,
    /// When the loop began its last turn, in milliseconds since the start.
    turned: AtomicU64,
    /// What is counted where it happens.
    pub recorder: Recorder,
    counters: Counters,
    /// What became of health checks.
    probes: Arc<Counts>,
    metrics_per_backend: bool,
    /// Held while metrics are read: more than one reader at a time would only be slower.
    scrape: Mutex<()>,
    maps: PinnedMaps,
    /// What the proxy counts, while there is one.
    proxy: RwLock<Option<Reader>>,
    published: RwLock<Published>,
}

impl Shared {
    /// Nothing is decided yet.
    #[must_use]
    pub fn new(pins: &PinDirectory, metrics_per_backend: bool, probes: Arc<Counts>) -> Self {
        Self {
            started: Instant::now(),
            turned: AtomicU64::new(0),
            recorder: Recorder::default(),
            counters: Counters::new(pins.clone()),
            probes,
            metrics_per_backend,
            scrape: Mutex::default(),
            maps: PinnedMaps::new(pins.clone()),
            proxy: RwLock::default(),
            published: RwLock::default(),
        }
    }

    /// The agent's loop begins another turn.
    pub fn turn(&self) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.turned.store(now, Ordering::Relaxed);
    }

    /// From now on, this tells what the proxy counts; `None`: there is none.
    pub fn proxied(&self, reader: Option<Reader>) {
        *self.proxy.write().unwrap_or_else(PoisonError::into_inner) = reader;
    }

    fn proxy_counts(&self) -> Option<(Vec<FrontendCounts>, Totals)> {
        let reader = self.proxy.read().unwrap_or_else(PoisonError::into_inner).clone();
        reader.map(|reader| (reader.counts(), reader.totals()))
    }

    /// Takes over how full the flow tables are.
    pub fn swept(&self, sweep: &Sweep) {
        self.recorder.forgot(sweep.forgotten);
        let flows = Flows {
            established: sweep.established,
            transient: sweep.kept - sweep.established,
            unprotected: sweep.unprotected,
            tables: sweep.tables.clone(),
        };
        self.publish(|published| published.flows = Some(flows));
    }

    /// Changes what was decided.
    pub fn publish(&self, change: impl FnOnce(&mut Published)) {
        change(&mut self.published.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// What metrics are made of, with the reports apart. The agent waits for this, so it copies
    /// no report.
    fn snapshot(&self) -> (Published, Vec<Arc<ServiceReport>>) {
        let published = self.published.read().unwrap_or_else(PoisonError::into_inner);
        let reports = published.reports.values().cloned().collect();
        let rest = Published {
            reports: BTreeMap::new(),
            problems: Vec::new(),
            unreachable: BTreeMap::new(),
            devices: published.devices.clone(),
            generation: published.generation,
            reloaded: published.reloaded,
            problem_counts: published.problem_counts.clone(),
            placed: published.placed,
            pools: published.pools.clone(),
            flows: published.flows.clone(),
            cookies: published.cookies,
            frontends: Frontends::new(),
            is_ending: published.is_ending,
        };
        (rest, reports)
    }

    /// Takes over what is to be said about Services; nothing about those that are gone.
    pub fn tell<'a>(&self, reports: impl Iterator<Item = (&'a ObjectRef, Option<&'a Arc<ServiceReport>>)>) {
        self.publish(|published| {
            for (object, report) in reports {
                match report {
                    Some(report) => drop(published.reports.insert(object.clone(), Arc::clone(report))),
                    None => drop(published.reports.remove(object)),
                }
            }
        });
    }
}

impl Inspect for Shared {
    fn status(&self) -> Result<StatusView> {
        let mut view = if self.maps.is_there() { self.maps.status()? } else { StatusView::default() };
        let published = self.published.read().unwrap_or_else(PoisonError::into_inner).clone();
        view.agent = Some(AgentView {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: self.started.elapsed().as_secs(),
            config_generation: published.generation,
            last_reload_seconds_ago: published.reloaded.map(|at| at.elapsed().as_secs()),
        });
        view.devices = published.devices.clone();
        view.problems = published.problems.iter().map(problem).collect();
        view.flow_tables = published.flows.iter().flat_map(|flows| &flows.tables).map(flow_table).collect();
        view.services = services(view.services, &published, &self.proxy_counts().unwrap_or_default().0);
        Ok(view)
    }

    fn flows(&self) -> Result<Vec<FlowView>> {
        if self.maps.is_there() { self.maps.flows() } else { Ok(Vec::new()) }
    }

    fn drops(&self) -> Result<Vec<DropView>> {
        if self.maps.is_there() { self.maps.drops() } else { Ok(Vec::new()) }
    }

    fn ready(&self) -> bool {
        self.published.read().unwrap_or_else(PoisonError::into_inner).is_ready()
    }

    fn alive(&self) -> bool {
        let turned = Duration::from_millis(self.turned.load(Ordering::Relaxed));
        !is_stuck(self.started.elapsed(), turned)
    }

    fn metrics(&self) -> Result<(&'static str, String)> {
        let _one = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        let mut samples = Samples::default();
        let (published, reports) = self.snapshot();
        metrics::collect(&published, &reports, &mut samples);
        samples.plain(&table::UPTIME, self.started.elapsed().as_secs_f64());
        metrics::health(&reports, &self.probes, self.metrics_per_backend, &mut samples);
        self.recorder.collect(&mut samples);
        if self.maps.is_there() {
            MapReading::new(&self.counters, self.metrics_per_backend)?.collect(&mut samples);
        } else {
            let published = self.published.read().unwrap_or_else(PoisonError::into_inner);
            collect_backends(&published.frontends, &mut samples);
        }
        if let Some(counts) = self.proxy_counts() {
            collect_proxied(&counts.0, &counts.1, self.metrics_per_backend, &mut samples);
        }
        Ok((CONTENT_TYPE, samples.text()?))
    }
}

/// By the time now, and when the last turn began.
fn is_stuck(now: Duration, turned: Duration) -> bool {
    now.saturating_sub(turned) > STUCK
}

fn flow_table((name, fill): (&&'static str, &Fill)) -> FlowTableView {
    FlowTableView { table: (*name).to_owned(), entries: fill.entries as u64, room: u64::from(fill.room) }
}

fn problem(problem: &Problem) -> ProblemView {
    let subject = match (&problem.place, &problem.object) {
        (Some(place), _) => place.to_string(),
        (None, Some(object)) => format!("{} {object}", problem.kind),
        (None, None) => "agent".to_owned(),
    };
    ProblemView { subject, message: Problem { place: None, ..problem.clone() }.to_string() }
}

/// The Services as they were decided, with what the maps know of them.
fn services(
    in_maps: Vec<ServiceView>,
    published: &Published,
    proxied: &[FrontendCounts],
) -> Vec<ServiceView> {
    let reports: Vec<_> = published.reports.values().map(|report| report.as_ref().clone()).collect();
    let mut all = overlay(&reports, in_maps);
    add_proxied(&mut all, &published.frontends, proxied);
    for service in &mut all {
        // Where the proxy serves, the kernel finds the way, and says when there is none.
        let forwarded = service.ports.iter_mut().filter(|port| port.served_by == ServedBy::Kernel);
        for backend in forwarded.flat_map(|port| &mut port.backends) {
            explain(backend, published);
        }
        let unreachable: BTreeSet<_> = service
            .ports
            .iter()
            .flat_map(|port| &port.backends)
            .filter(|backend| !backend.next_hop_resolved && !backend.next_hop.is_empty())
            .map(|backend| backend.next_hop.clone())
            .collect();
        service.problems.extend(unreachable);
    }
    all
}

fn explain(backend: &mut BackendView, published: &Published) {
    if let Some(text) = published.unreachable.get(&backend.address) {
        backend.next_hop_resolved = false;
        backend.next_hop.clone_from(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_does_not_turn_is_stuck() {
        let second = Duration::from_secs;
        assert!(!is_stuck(second(100), second(10)));
        assert!(is_stuck(second(101), second(10)));
        assert!(!is_stuck(second(10), second(11)), "it turned meanwhile");
    }

    #[test]
    fn each_turn_is_a_sign_of_life() {
        let shared = Shared::new(&PinDirectory::new(std::path::Path::new("/nowhere")), false, Arc::default());
        shared.turned.store(u64::MAX, Ordering::Relaxed);
        shared.turn();
        assert!(shared.turned.load(Ordering::Relaxed) < 60_000, "it is the time since the start");
        assert!(shared.alive() && !shared.ready());
        assert!(
            shared.metrics().unwrap().1.contains("pointsman_ready 0.0"),
            "without maps there is less to tell"
        );
    }
}
