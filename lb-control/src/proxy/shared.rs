//! What all workers share.

use std::sync::atomic::{
    AtomicBool, AtomicUsize,
    Ordering::{Relaxed, SeqCst},
};

use tokio::sync::Notify;

use super::{Settings, limits::Limits};

/// What all workers share.
#[derive(Debug)]
pub struct Shared {
    /// What the proxy was told.
    pub settings: Settings,
    /// How much it may have open.
    pub limits: Limits,
    /// Connections that there are.
    pub open: AtomicUsize,
    /// All connections are to be reset.
    pub is_over: AtomicBool,
    /// Somebody waits for the last connection to end.
    pub is_draining: AtomicBool,
    /// Told when it has.
    pub has_ended: Notify,
}

impl Shared {
    /// Without connections.
    #[must_use]
    pub fn new(settings: Settings, limits: Limits) -> Self {
        Self {
            settings,
            limits,
            open: AtomicUsize::new(0),
            is_over: AtomicBool::new(false),
            is_draining: AtomicBool::new(false),
            has_ended: Notify::new(),
        }
    }

    /// Counts a connection less.
    pub fn closes(&self) {
        if self.open.fetch_sub(1, SeqCst) == 1 && self.is_draining.load(SeqCst) {
            self.has_ended.notify_one();
        }
    }

    /// Connections that there are.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open.load(Relaxed)
    }
}
