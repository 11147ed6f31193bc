//! What the status of a pool says.

use std::{collections::BTreeMap, time::Duration};

use super::{Command, Controller, EventTarget, flights::Key};
use crate::{
    model::{Condition, PoolOrigin},
    plan::ipam::PoolReport,
};

/// The status of a pool is written once in such a time at most.
const AT_MOST_EVERY: Duration = Duration::from_secs(5);

/// What was written to pools.
#[derive(Default)]
pub(super) struct PoolStatuses {
    /// Whether reports may be other than before.
    pub is_dirty: bool,
    written: BTreeMap<String, (PoolReport, Duration)>,
    /// Pools that are set aside, of which an Event has told, and what they overlap.
    aside: BTreeMap<String, String>,
    /// When a status that was held back is due.
    due: Option<Duration>,
}

impl PoolStatuses {
    pub fn next_due(&self) -> Option<Duration> {
        self.due
    }
}

impl Controller {
    /// Statuses of pools that are due.
    pub(super) fn pool_steps(&mut self, now: Duration) -> Vec<Command> {
        let is_due = self.pools.due.is_some_and(|due| due <= now);
        if !is_due && !std::mem::take(&mut self.pools.is_dirty) {
            return Vec::new();
        }
        self.pools.is_dirty = false;
        self.pools.due = None;
        let Some(ipam) = &self.ipam else { return Vec::new() };
        let reports = ipam.pool_reports();
        let mut commands = self.overlaps(&reports);
        self.pools.written.retain(|key, _| self.objects.pools.contains_key(key));
        for report in reports {
            let pool = self.objects.pools.get(&report.key);
            // The status of MetalLB's pools is MetalLB's.
            let Some(pool) = pool.filter(|pool| pool.origin == PoolOrigin::Pointsman) else { continue };
            let written = self.pools.written.get(&report.key);
            let key = Key::Pool(report.key.clone());
            if written.is_some_and(|(old, _)| *old == report) || self.flights.is_busy(&key, now) {
                continue;
            }
            if let Some(due) = written.map(|(_, at)| *at + AT_MOST_EVERY).filter(|due| *due > now) {
                self.pools.due = Some(self.pools.due.map_or(due, |other| other.min(due)));
                continue;
            }
            let command = Command::SetPoolStatus {
                pool: pool.key(),
                assigned: report.assigned,
                available: report.available,
                conditions: vec![condition(&report)],
            };
            self.pools.written.insert(report.key.clone(), (report, now));
            self.flights.start(&command, Vec::new());
            commands.push(command);
        }
        commands
    }

    /// An Event for each pool that is set aside anew, or for another: the status of MetalLB's pools
    /// cannot tell.
    fn overlaps(&mut self, reports: &[PoolReport]) -> Vec<Command> {
        let aside = reports.iter().filter_map(|it| Some((it.key.clone(), it.overlaps.clone()?)));
        let told = std::mem::replace(&mut self.pools.aside, aside.collect());
        let new = self.pools.aside.iter().filter(|(key, other)| told.get(*key) != Some(*other));
        let event = |(key, other): (&String, &String)| {
            Some(Command::Event {
                about: EventTarget::pool(self.objects.pools.get(key)?),
                warning: true,
                reason: "Overlapping".into(),
                note: set_aside(other),
            })
        };
        new.filter_map(event).collect()
    }

    /// A status was not written.
    pub(super) fn pool_failed(&mut self, pool: &str) {
        self.pools.written.remove(pool);
    }
}

fn set_aside(other: &str) -> String {
    format!("set aside: it overlaps {other}; change one of them")
}

fn condition(report: &PoolReport) -> Condition {
    let (ready, reason, message) = if let Some(other) = &report.overlaps {
        ("False", "Overlapping", set_aside(other))
    } else if report.draining {
        ("True", "Draining", "Services keep addresses that they would not get today".into())
    } else if report.disabled {
        ("True", "Disabled", "gives out nothing more; what is in use stays".into())
    } else {
        ("True", "Ready", "gives out addresses".into())
    };
    Condition {
        kind: "Ready".into(),
        status: ready.into(),
        reason: reason.into(),
        message,
        observed_generation: 0,
    }
}
