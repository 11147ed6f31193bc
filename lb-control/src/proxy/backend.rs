//! A backend, as all workers share it.

use std::{
    net::SocketAddr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use super::counts::BackendCounts;
use crate::plan::Ejection;

/// A backend of one entry.
#[derive(Debug)]
pub struct Backend {
    /// Address and port.
    pub address: SocketAddr,
    open: AtomicU64,
    connections: AtomicU64,
    failures: AtomicU64,
    is_gone: AtomicBool,
    /// Whether `ejection` has anything to say.
    is_failing: AtomicBool,
    ejection: Mutex<Ejection>,
}

impl Backend {
    /// One without connections.
    #[must_use]
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            open: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            is_gone: AtomicBool::new(false),
            is_failing: AtomicBool::new(false),
            ejection: Mutex::default(),
        }
    }

    /// Counts a connection that is there, or about to be.
    pub fn opens(&self) {
        self.open.fetch_add(1, Relaxed);
    }

    /// Counts one less.
    pub fn closes(&self) {
        self.open.fetch_sub(1, Relaxed);
    }

    /// Connections that there are.
    #[must_use]
    pub fn open(&self) -> u64 {
        self.open.load(Relaxed)
    }

    /// It has accepted a connection.
    pub fn succeeded(&self) {
        self.took();
        self.answers();
    }

    /// It has got a session, and does not know.
    pub fn took(&self) {
        self.connections.fetch_add(1, Relaxed);
    }

    /// It is there.
    pub fn answers(&self) {
        if self.is_failing.load(Relaxed) {
            self.with_ejection(Ejection::succeeded);
            self.is_failing.store(false, Relaxed);
        }
    }

    /// Something was sent to it, as since `since`, without an answer and without trouble. Gives from when on
    /// that counts.
    #[must_use]
    pub fn met_no_trouble(&self, since: Duration, now: Duration) -> Duration {
        if !self.is_failing.load(Relaxed) {
            return since;
        }
        let (since, is_clear) = self.with_ejection(|one| (one.met_no_trouble(since, now), one.is_clear()));
        if is_clear {
            self.is_failing.store(false, Relaxed);
        }
        since
    }

    /// It has not accepted a connection.
    pub fn failed(&self, now: Duration) {
        self.failures.fetch_add(1, Relaxed);
        self.with_ejection(|ejection| ejection.failed(now));
        self.is_failing.store(true, Relaxed);
    }

    /// Whether a connection may go there; if it had failed, this may be the one that tries again.
    #[must_use]
    pub fn admits(&self, now: Duration) -> bool {
        !self.is_failing.load(Relaxed) || self.with_ejection(|ejection| ejection.admits(now))
    }

    /// Whether new connections avoid it. Asking changes nothing, unlike [`Self::admits`].
    #[must_use]
    pub fn is_out(&self, now: Duration) -> bool {
        self.is_failing.load(Relaxed) && self.with_ejection(|ejection| ejection.is_out(now))
    }

    /// How many connects in a row have failed, if new connections have avoided it for at least so long.
    #[must_use]
    pub fn failures_of_long(&self, least: Duration, now: Duration) -> Option<u32> {
        self.is_failing
            .load(Relaxed)
            .then(|| self.with_ejection(|ejection| ejection.failures_of_long(least, now)))
            .flatten()
    }

    /// Connections to it are to be reset.
    pub fn goes(&self) {
        self.is_gone.store(true, Relaxed);
    }

    /// Whether connections to it are to be reset.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.is_gone.load(Relaxed)
    }

    /// What was counted.
    #[must_use]
    pub fn counts(&self, now: Duration) -> BackendCounts {
        BackendCounts {
            address: self.address,
            connections: self.connections.load(Relaxed),
            open: self.open(),
            connect_failures: self.failures.load(Relaxed),
            ejected: self.is_out(now),
        }
    }

    fn with_ejection<T>(&self, what: impl FnOnce(&mut Ejection) -> T) -> T {
        what(&mut self.ejection.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_never_answers_is_trusted_again_after_a_while() {
        let backend = Backend::new(([192, 0, 2, 1], 9).into());
        let at = Duration::from_secs;
        let before = backend.met_no_trouble(at(1), at(9));
        assert_eq!(before, at(1));
        (0..3).for_each(|_| backend.failed(at(10)));
        // Who sent before sends on.
        let since = backend.met_no_trouble(before, at(10));
        assert!(backend.is_out(at(10)) && !backend.admits(at(10)));
        assert_eq!(since, at(10), "what was sent before says nothing");
        let since = backend.met_no_trouble(since, at(11));
        assert_eq!(backend.met_no_trouble(since, at(16)), at(11));
        assert!(!backend.is_out(at(10)) && backend.admits(at(10)), "nothing is held against it");
    }
}
