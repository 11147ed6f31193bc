//! What all workers share.

use std::sync::{
    OnceLock,
    atomic::{
        AtomicBool, AtomicUsize,
        Ordering::{Relaxed, SeqCst},
    },
};

use tokio::{runtime::Handle, sync::Notify};

use super::{Settings, limits::Limits};

/// Up to so many connections are a few.
const FEW: usize = 8;

/// What all workers share.
#[derive(Debug)]
pub struct Shared {
    /// What the proxy was told.
    pub settings: Settings,
    /// How much it may have open.
    pub limits: Limits,
    /// Connections that there are.
    pub open: AtomicUsize,
    /// Those of each worker.
    pub loads: Box<[AtomicUsize]>,
    /// The runtimes of the workers, once all have started.
    pub handles: OnceLock<Vec<Handle>>,
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
        let loads = (0..settings.threads()).map(|_| AtomicUsize::new(0)).collect();
        Self {
            loads,
            handles: OnceLock::new(),
            settings,
            limits,
            open: AtomicUsize::new(0),
            is_over: AtomicBool::new(false),
            is_draining: AtomicBool::new(false),
            has_ended: Notify::new(),
        }
    }

    /// The worker that serves a connection that `worker` has accepted: itself, unless another one has far
    /// less to do. A few connections may be as many streams of bulk, and are shared out evenly; of many it
    /// is not worth it, since waking another thread costs as much as a small exchange.
    #[must_use]
    pub fn place(&self, worker: usize) -> usize {
        let load = |worker: &usize| self.loads[*worker].load(Relaxed);
        let own = load(&worker);
        let idlest = (0..self.loads.len()).min_by_key(load).unwrap_or(worker);
        let least = load(&idlest);
        let is_uneven = if own <= FEW { own > least } else { own > 2 * least };
        if is_uneven { idlest } else { worker }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_shared_out() {
        let settings = Settings { workers: 2, ..Settings::default() };
        let limits = Limits::of(1_024, &settings);
        let shared = Shared::new(settings, limits);
        for (loads, place) in [
            ([0, 0], 0),
            ([1, 0], 1),
            ([1, 1], 0),
            ([2, 1], 1),
            ([9, 8], 0),
            ([16, 8], 0),
            ([17, 8], 1),
            ([0, 5], 0),
        ] {
            shared.loads.iter().zip(loads).for_each(|(load, count)| load.store(count, Relaxed));
            assert_eq!(shared.place(0), place, "{loads:?}");
        }
    }
}
