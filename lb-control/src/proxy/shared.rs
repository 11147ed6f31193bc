//! What all workers share.

use std::sync::{
    Arc, OnceLock,
    atomic::{
        AtomicBool, AtomicU64, AtomicUsize,
        Ordering::{Relaxed, SeqCst},
    },
};

use tokio::{runtime::Handle, sync::Notify};

use super::{
    Settings,
    clients::Room,
    limits::{DESCRIPTORS_EACH, Limits},
    memory::Memory,
};

/// Up to so many connections are a few.
const FEW: usize = 8;

/// What all workers share.
#[derive(Debug)]
pub struct Shared {
    /// What the proxy was told.
    pub settings: Settings,
    /// How much it may have open.
    pub limits: Limits,
    /// What connections hold.
    pub memory: Arc<Memory>,
    /// What entries remember of clients.
    pub clients: Arc<Room>,
    /// Connections that there are.
    pub open: AtomicUsize,
    /// Listening sockets (TCP) that there are.
    pub listeners: AtomicUsize,
    /// Sockets at VIPs (UDP) that there are.
    pub ways: AtomicUsize,
    /// Sessions (UDP) that there are.
    pub sessions: AtomicUsize,
    /// How often a connection had to wait, to be accepted or to get a socket to its backend, because there was
    /// no file descriptor, or no memory.
    pub shortages: AtomicU64,
    /// Datagrams that were not passed on, from clients and to clients.
    pub lost: [AtomicU64; 2],
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
            memory: Arc::new(Memory::new(settings.max_buffers)),
            clients: Arc::default(),
            handles: OnceLock::new(),
            settings,
            limits,
            open: AtomicUsize::new(0),
            listeners: AtomicUsize::new(0),
            ways: AtomicUsize::new(0),
            sessions: AtomicUsize::new(0),
            shortages: AtomicU64::new(0),
            lost: [AtomicU64::new(0), AtomicU64::new(0)],
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

    /// How many connections there may be, beside the sockets at VIPs and of sessions.
    #[must_use]
    pub fn most_connections(&self) -> usize {
        self.limits.connections_beside(self.at_vips() + self.sessions.load(Relaxed))
    }

    /// How many more sessions there may be, beside the connections that there are.
    #[must_use]
    pub fn left_for_sessions(&self) -> usize {
        let all = self.limits.connections_beside(self.at_vips()) * DESCRIPTORS_EACH;
        all.saturating_sub(self.open() * DESCRIPTORS_EACH + self.sessions.load(Relaxed))
    }

    /// Whether so many more sockets at VIPs leave the rest of the agent its file descriptors.
    #[must_use]
    pub fn has_room_at_vips(&self, more: usize) -> bool {
        self.at_vips() + more <= self.limits.sockets
    }

    fn at_vips(&self) -> usize {
        self.listeners.load(Relaxed) + self.ways.load(Relaxed)
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
