//! Health checks of backends: who is asked, and what follows from the answers.

use super::Agent;
use crate::app::live::Health;
use crate::model::{BackendHealth, ObjectRef, ServiceReport};
use crate::plan::{Effects, Verdict};
use crate::probe::Verdicts;

impl Agent {
    /// What is found out about backends, for [`Self::probed`]; to be taken once.
    pub fn verdicts(&mut self) -> Option<Verdicts> {
        self.probes.verdicts()
    }

    /// Has those asked who are to be asked from now on, and no others.
    pub(super) fn ask(&self, effects: &Effects) {
        for target in &effects.targets {
            self.probes.ask(target.clone(), self.planner.asked_for(target).cloned());
        }
    }

    /// Takes over who works from now on and who does not.
    pub async fn probed(&mut self, verdicts: Vec<Verdict>) {
        let effects = self.planner.health(verdicts);
        self.untold.extend(effects.reports.iter().cloned());
        self.follow(&effects).await;
    }

    /// Tells the cluster how many backends of a Service work.
    pub(super) fn tell_health(&mut self, service: &ObjectRef) {
        let report = self.planner.plan().reports.get(service);
        let health = report.and_then(|report| {
            let counts = report.health.as_ref()?;
            let uid = self.planner.objects().services.get(service)?.api.uid.clone();
            let (healthy, unhealthy) = (counts.healthy, counts.unhealthy);
            Some(Health { uid, healthy, unhealthy, example: example(report) })
        });
        self.live.health(service, health);
    }
}

/// A backend that does not work, and why.
fn example(report: &ServiceReport) -> Option<(std::net::SocketAddr, String)> {
    let mut backends = report.ports.iter().flat_map(|port| &port.backends);
    backends.find_map(|backend| {
        let why = backend.health.as_ref().and_then(BackendHealth::failure)?;
        Some((backend.address, why.to_owned()))
    })
}
