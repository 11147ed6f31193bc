//! Asks backends whether they work.
//!
//! When, and what follows from the answers, is decided by [`Probing`]; here are the connections. They
//! come from the node's own address, as the proxy's do, and leave nothing behind: each is ended by a
//! reset, so neither side keeps it in TIME_WAIT.

mod answer;
mod counts;
mod question;

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::{
    StreamExt,
    future::{AbortHandle, abortable},
    stream::FuturesUnordered,
};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, sleep_until},
};

use crate::{
    model::{CheckTarget, ObjectRef},
    plan::{Answer, Probe, Probing, Verdict},
};

pub use counts::{Counts, Outcome};

/// So many questions are open at a time. With backends that do not answer at all, the interval grows
/// instead, of whoever has many of them ([`Probing::start`]).
const AT_ONCE: usize = 256;

/// Asks backends. Nobody is asked any more when this is dropped.
pub struct Probes {
    asks: mpsc::UnboundedSender<(CheckTarget, Option<ObjectRef>)>,
    verdicts: Option<Verdicts>,
    counts: Arc<Counts>,
    task: JoinHandle<()>,
}

/// What is found out.
pub struct Verdicts(mpsc::UnboundedReceiver<Verdict>);

impl Verdicts {
    /// Waits until somebody stands otherwise than before, and tells all who do.
    pub async fn next(&mut self) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        if self.0.recv_many(&mut verdicts, usize::MAX).await == 0 {
            std::future::pending().await
        }
        verdicts
    }
}

impl Probes {
    /// Asks nobody yet. Must be called within a tokio runtime.
    #[must_use]
    pub fn start() -> Self {
        let (asks, asked) = mpsc::unbounded_channel();
        let (verdicts, told) = mpsc::unbounded_channel();
        let counts = Arc::new(Counts::default());
        let task = tokio::spawn(run(asked, verdicts, Arc::clone(&counts)));
        Self { asks, verdicts: Some(Verdicts(told)), counts, task }
    }

    /// Has somebody asked from now on, for a Service: one of those that want it; `None`: no more.
    pub fn ask(&self, target: CheckTarget, service: Option<ObjectRef>) {
        // The other end goes with this one.
        let _ = self.asks.send((target, service));
    }

    /// What is found out, for whoever takes it first.
    pub fn verdicts(&mut self) -> Option<Verdicts> {
        self.verdicts.take()
    }

    /// What became of all questions.
    #[must_use]
    pub fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.counts)
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(
    mut asks: mpsc::UnboundedReceiver<(CheckTarget, Option<ObjectRef>)>,
    verdicts: mpsc::UnboundedSender<Verdict>,
    counts: Arc<Counts>,
) {
    let started = Instant::now();
    let mut probing = Probing::default();
    let mut open = FuturesUnordered::new();
    let mut ends: HashMap<CheckTarget, AbortHandle> = HashMap::new();
    loop {
        while let Some(probe) = probing.start(started.elapsed(), AT_ONCE - open.len()) {
            let target = probe.target.clone();
            let (question, end) = abortable(question(probe));
            ends.insert(target, end);
            open.push(question);
        }
        let due = probing.next_due(AT_ONCE - open.len());
        let verdict = tokio::select! {
            ask = asks.recv() => match ask {
                Some((target, Some(service))) => {
                    probing.ask(&target, &service, started.elapsed());
                    None
                }
                Some((target, None)) => {
                    // Nobody waits for the answer, and others may for the place.
                    ends.remove(&target).inspect(AbortHandle::abort);
                    probing.forget(&target)
                }
                None => return,
            },
            Some(answer) = open.next() => {
                let Ok((probe, outcome)) = answer else { continue };
                ends.remove(&probe.target);
                counts.count(&outcome);
                probing.finish(&probe, outcome.into(), started.elapsed())
            }
            () = until(due, started) => None,
        };
        if let Some(verdict) = verdict {
            // The other end goes first only when the agent leaves.
            let _ = verdicts.send(verdict);
        }
    }
}

async fn question(probe: Probe) -> (Probe, Outcome) {
    let outcome = question::ask(&probe.target).await;
    (probe, outcome)
}

async fn until(due: Option<Duration>, started: Instant) {
    match due {
        Some(due) => sleep_until(started + due).await,
        None => std::future::pending().await,
    }
}

impl From<Outcome> for Answer {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Healthy => Self::Good,
            Outcome::NotAsked => Self::Unknown,
            bad => Self::Bad(bad.to_string().into()),
        }
    }
}

#[cfg(test)]
mod tests;
