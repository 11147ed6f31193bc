//! What the agent tells whoever asks on the socket: what it has decided, with the counters of the
//! maps.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError, RwLock};

use anyhow::Result;
use tokio::time::Instant;

use crate::dataplane::collect::Sweep;
use crate::dataplane::{Attachment, Mode, PinDirectory};
use crate::http::Inspect;
use crate::inspect::PinnedMaps;
use crate::model::{ObjectRef, Problem, ServiceReport, ServiceState as Reported};
use crate::net::next_hops::Resolution;
use crate::view::{
    AgentView, AttachMode, BackendView, DeviceView, DropView, FlowView, ProblemView, ServiceState, ServiceView,
    StatusView,
};

/// What the agent has decided and done.
#[derive(Clone, Default)]
pub struct Published {
    /// Services.
    pub reports: BTreeMap<ObjectRef, ServiceReport>,
    /// What is wrong and belongs to no Service.
    pub problems: Vec<Problem>,
    /// The ways to backends.
    pub resolutions: BTreeMap<IpAddr, Resolution>,
    /// Devices with the program.
    pub devices: Vec<Attachment>,
    /// Counts configurations.
    pub generation: u64,
    /// When the last one was taken into use.
    pub reloaded: Option<Instant>,
}

/// What the agent shares with those who ask.
pub struct Shared {
    started: Instant,
    maps: Mutex<PinnedMaps>,
    published: RwLock<Published>,
    sweep: RwLock<Sweep>,
}

impl Shared {
    /// Nothing is decided yet.
    ///
    /// # Errors
    /// When the pinned maps cannot be opened.
    pub fn new(pins: &PinDirectory) -> Result<Self> {
        Ok(Self {
            started: Instant::now(),
            maps: Mutex::new(PinnedMaps::open(pins)?),
            published: RwLock::default(),
            sweep: RwLock::default(),
        })
    }

    /// Replaces what was decided.
    pub fn publish(&self, published: Published) {
        *self.published.write().unwrap_or_else(PoisonError::into_inner) = published;
    }

    /// Replaces what the last sweep has found.
    pub fn swept(&self, sweep: &Sweep) {
        sweep.clone_into(&mut self.sweep.write().unwrap_or_else(PoisonError::into_inner));
    }

    fn maps(&self) -> std::sync::MutexGuard<'_, PinnedMaps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inspect for Shared {
    fn status(&self) -> Result<StatusView> {
        let mut view = self.maps().status()?;
        let published = self.published.read().unwrap_or_else(PoisonError::into_inner).clone();
        view.agent = Some(AgentView {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: self.started.elapsed().as_secs(),
            config_generation: published.generation,
            last_reload_seconds_ago: published.reloaded.map(|at| at.elapsed().as_secs()),
        });
        view.devices = published.devices.iter().map(device).collect();
        view.problems = published.problems.iter().map(problem).collect();
        view.services = services(view.services, &published);
        Ok(view)
    }

    fn flows(&self) -> Result<Vec<FlowView>> {
        self.maps().flows()
    }

    fn drops(&self) -> Result<Vec<DropView>> {
        self.maps().drops()
    }

    fn ready(&self) -> bool {
        let published = self.published.read().unwrap_or_else(PoisonError::into_inner);
        published.generation > 0 && !published.devices.is_empty()
    }
}

fn device(attachment: &Attachment) -> DeviceView {
    DeviceView {
        device: attachment.name.clone(),
        mode: match attachment.mode {
            Mode::Native => AttachMode::XdpNative,
            Mode::Generic => AttachMode::XdpGeneric,
        },
        program_id: attachment.program_id,
    }
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
fn services(in_maps: Vec<ServiceView>, published: &Published) -> Vec<ServiceView> {
    let mut known: BTreeMap<_, _> =
        in_maps.into_iter().map(|view| ((view.namespace.clone(), view.name.clone()), view)).collect();
    let mut all = Vec::with_capacity(published.reports.len());
    for (object, report) in &published.reports {
        let key = (object.namespace.clone(), object.name.clone());
        let ports = known.remove(&key).map(|view| view.ports).unwrap_or_default();
        let mut view = ServiceView {
            namespace: key.0,
            name: key.1,
            state: state(report.state),
            vips: report.vips.iter().map(|vip| vip.address).collect(),
            pool: report.vips.iter().find_map(|vip| vip.pool.clone()),
            ports,
            problems: report.problems.iter().map(ToString::to_string).collect(),
        };
        for backend in view.ports.iter_mut().flat_map(|port| &mut port.backends) {
            explain(backend, published);
        }
        let ways = view.ports.iter().flat_map(|port| &port.backends);
        let unreachable: std::collections::BTreeSet<_> = ways
            .filter(|backend| !backend.next_hop_resolved && !backend.next_hop.is_empty())
            .map(|backend| backend.next_hop.clone())
            .collect();
        view.problems.extend(unreachable);
        all.push(view);
    }
    // Entries that are on their way out of the maps.
    all.extend(known.into_values().map(|view| ServiceView { state: ServiceState::Draining, ..view }));
    all.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    all
}

fn explain(backend: &mut BackendView, published: &Published) {
    if let Some(text) = published.resolutions.get(&backend.address).and_then(|found| found.problem.as_ref()) {
        backend.next_hop_resolved = false;
        backend.next_hop.clone_from(text);
    }
}

fn state(reported: Reported) -> ServiceState {
    match reported {
        Reported::Pending => ServiceState::Pending,
        Reported::Active => ServiceState::Active,
        Reported::NoBackends => ServiceState::NoBackends,
        Reported::Failed => ServiceState::Failed,
    }
}
