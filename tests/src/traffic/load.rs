//! Many short connections.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, anyhow};

use super::client::{self, Tally};
use crate::lab::{Namespace, wait_for};

/// What came of the requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Who answered, how often.
    pub answers: Tally,
    /// What went wrong, how often.
    pub errors: BTreeMap<String, usize>,
}

/// Threads that make HTTP requests, each on a connection of its own, up to a number or until they
/// are stopped.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    started: AtomicU64,
    done: AtomicU64,
    report: Mutex<Report>,
    pause: Duration,
}

impl Load {
    /// Starts; `most` bounds the number of connections.
    #[must_use]
    pub fn start(from: &Arc<Namespace>, to: SocketAddr, threads: usize, most: u64) -> Self {
        Self::start_paced(from, to, threads, most, Duration::ZERO)
    }

    /// As [`Self::start`], each thread with a pause after each request.
    #[must_use]
    pub fn start_paced(
        from: &Arc<Namespace>,
        to: SocketAddr,
        threads: usize,
        most: u64,
        pause: Duration,
    ) -> Self {
        let shared = Arc::new(Shared { pause, ..Shared::default() });
        let start = |_| {
            let (shared, from) = (Arc::clone(&shared), Arc::clone(from));
            thread::spawn(move || from.enter(|| shared.run(to, most)))
        };
        let threads = (0..threads).map(start).collect();
        Self { shared, threads }
    }

    /// Waits until that many more requests have come to an end, well or not.
    ///
    /// # Errors
    /// When it takes too long.
    pub fn wait_requests(&self, more: u64) -> Result<()> {
        let goal = self.shared.done.load(Ordering::Relaxed) + more;
        let reached = || Ok((self.shared.done.load(Ordering::Relaxed) >= goal).then_some(()));
        wait_for("requests under load", reached)
    }

    /// Waits until all of `most` are made, and tells what came of them.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or a thread panicked.
    pub fn finish(self) -> Result<Report> {
        for thread in self.threads {
            thread.join().map_err(|_| anyhow!("a client's thread panicked"))?.context("load")?;
        }
        Ok(self.shared.report.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// Makes no more requests, and tells what came of those made.
    ///
    /// # Errors
    /// As [`Self::finish`].
    pub fn stop(self) -> Result<Report> {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.finish()
    }
}

impl Shared {
    fn run(&self, to: SocketAddr, most: u64) {
        while !self.stop.load(Ordering::Relaxed) && self.started.fetch_add(1, Ordering::Relaxed) < most {
            let result = client::http_name(to);
            let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
            match result {
                Ok(name) => *report.answers.entry(name).or_default() += 1,
                Err(error) => *report.errors.entry(error.to_string()).or_default() += 1,
            }
            drop(report);
            self.done.fetch_add(1, Ordering::Relaxed);
            // The rate, not a condition to wait for.
            thread::sleep(self.pause);
        }
    }
}
