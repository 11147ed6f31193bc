//! What the agent tells whoever asks on the socket: what it has decided, with the counters of the
//! maps.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::Result;
use tokio::time::Instant;

use crate::dataplane::{Attachment, Mode, PinDirectory};
use crate::http::Inspect;
use crate::inspect::{PinnedMaps, overlay};
use crate::model::{ObjectRef, Problem, ServiceReport};
use crate::view::{
    AgentView, AttachMode, BackendView, DeviceView, DropView, FlowView, ProblemView, ServiceView, StatusView,
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
    pub devices: Vec<Attachment>,
    /// Counts updates of the source.
    pub generation: u64,
    /// When the last one was taken into use.
    pub reloaded: Option<Instant>,
}

/// What the agent shares with those who ask.
pub struct Shared {
    started: Instant,
    maps: PinnedMaps,
    published: RwLock<Published>,
}

impl Shared {
    /// Nothing is decided yet.
    #[must_use]
    pub fn new(pins: &PinDirectory) -> Self {
        Self { started: Instant::now(), maps: PinnedMaps::new(pins.clone()), published: RwLock::default() }
    }

    /// Changes what was decided.
    pub fn publish(&self, change: impl FnOnce(&mut Published)) {
        change(&mut self.published.write().unwrap_or_else(PoisonError::into_inner));
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
        let mut view = self.maps.status()?;
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
        self.maps.flows()
    }

    fn drops(&self) -> Result<Vec<DropView>> {
        self.maps.drops()
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
    let reports: Vec<_> = published.reports.values().map(|report| report.as_ref().clone()).collect();
    let mut all = overlay(&reports, in_maps);
    for service in &mut all {
        for backend in service.ports.iter_mut().flat_map(|port| &mut port.backends) {
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
