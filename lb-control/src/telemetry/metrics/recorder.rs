//! What is counted where it happens, because nothing else remembers it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

use super::samples::{Samples, labels};
use super::table;

/// How a write to the Kubernetes API went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// It is done.
    Done,
    /// Somebody else changed the object meanwhile, or owns what was to be written (409).
    Conflict,
    /// It is not allowed, or not valid (other 4xx).
    Refused,
    /// It could not be carried out: no answer, or 5xx.
    Failed,
}

impl Outcome {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Done, Self::Conflict, Self::Refused, Self::Failed];

    /// The value of the label.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Conflict => "conflict",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }

    /// By the HTTP status of an answer.
    #[must_use]
    pub const fn of_status(status: u16) -> Self {
        match status {
            200..=299 => Self::Done,
            409 => Self::Conflict,
            400..=499 => Self::Refused,
            _ => Self::Failed,
        }
    }
}

/// Counts. Any thread may count and read at any time.
#[derive(Debug)]
pub struct Recorder {
    updates: AtomicU64,
    durations: Histogram,
    resyncs: AtomicU64,
    repairs: AtomicU64,
    forgotten: AtomicU64,
    leader: AtomicBool,
    writes: Mutex<BTreeMap<(&'static str, &'static str, Outcome), u64>>,
}

impl Default for Recorder {
    fn default() -> Self {
        Self {
            updates: AtomicU64::new(0),
            // From half a millisecond to sixteen seconds.
            durations: Histogram::new(exponential_buckets(0.000_5, 2.0, 16)),
            resyncs: AtomicU64::new(0),
            repairs: AtomicU64::new(0),
            forgotten: AtomicU64::new(0),
            leader: AtomicBool::new(false),
            writes: Mutex::default(),
        }
    }
}

impl Recorder {
    /// A batch of changes was taken up.
    pub fn updated(&self) {
        self.updates.fetch_add(1, Ordering::Relaxed);
    }

    /// The maps have what was taken up, so long after it was.
    pub fn in_maps(&self, took: Duration) {
        self.durations.observe(took.as_secs_f64());
    }

    /// The maps were compared with what they should contain, and differed by so many operations.
    pub fn resynced(&self, repairs: usize) {
        self.resyncs.fetch_add(1, Ordering::Relaxed);
        self.repairs.fetch_add(repairs as u64, Ordering::Relaxed);
    }

    /// A sweep took so many flows out of the tables.
    pub fn forgot(&self, flows: usize) {
        self.forgotten.fetch_add(flows as u64, Ordering::Relaxed);
    }

    /// Whether this agent is the elected writer from now on.
    pub fn leads(&self, leader: bool) {
        self.leader.store(leader, Ordering::Relaxed);
    }

    /// Something was written to the Kubernetes API, or not. `verb` and `resource` as in RBAC:
    /// `patch`, `services/status`.
    pub fn api_write(&self, verb: &'static str, resource: &'static str, outcome: Outcome) {
        let mut writes = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        *writes.entry((verb, resource, outcome)).or_default() += 1;
    }

    /// Adds everything that was counted.
    pub fn collect(&self, samples: &mut Samples) {
        let none = labels([]);
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        samples.count(&table::SOURCE_UPDATES, &none, read(&self.updates));
        samples.distribution(&table::UPDATE_DURATION, self.durations.clone());
        samples.count(&table::RESYNCS, &none, read(&self.resyncs));
        samples.count(&table::RESYNC_REPAIRS, &none, read(&self.repairs));
        samples.count(&table::FLOWS_FORGOTTEN, &none, read(&self.forgotten));
        samples.plain(&table::LEADER, f64::from(u8::from(self.leader.load(Ordering::Relaxed))));
        let writes = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        for ((verb, resource, outcome), count) in writes.iter() {
            samples.count(&table::API_WRITES, &labels([verb, resource, outcome.name()]), *count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_is_told() {
        let recorder = Recorder::default();
        recorder.updated();
        recorder.in_maps(Duration::from_millis(3));
        recorder.resynced(4);
        recorder.resynced(0);
        recorder.forgot(9);
        recorder.leads(true);
        for status in [200, 201, 409, 403, 503, 0] {
            recorder.api_write("patch", "services/status", Outcome::of_status(status));
        }
        let mut samples = Samples::default();
        recorder.collect(&mut samples);
        let text = samples.text().unwrap();
        let writes = "pointsman_api_writes_total{verb=\"patch\",resource=\"services/status\",outcome=";
        for line in [
            "pointsman_source_updates_total 1".to_owned(),
            "pointsman_update_apply_seconds_count 1".to_owned(),
            "pointsman_update_apply_seconds_sum 0.003".to_owned(),
            "pointsman_resyncs_total 2".to_owned(),
            "pointsman_resync_repairs_total 4".to_owned(),
            "pointsman_flows_forgotten_total 9".to_owned(),
            "pointsman_leader 1.0".to_owned(),
            format!("{writes}\"done\"}} 2"),
            format!("{writes}\"conflict\"}} 1"),
            format!("{writes}\"refused\"}} 1"),
            format!("{writes}\"failed\"}} 2"),
        ] {
            assert!(text.lines().any(|found| found == line), "{line}:\n{text}");
        }
    }
}
