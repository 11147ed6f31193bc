//! What the proxy counts.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use crate::model::ServiceKey;

/// Why a connection, or a session, was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// No backend takes connections.
    NoBackend,
    /// No backend that was tried accepted the connection.
    ConnectFailed,
    /// The client is in none of the source ranges.
    SourceRange,
    /// The client opens more connections than it may.
    ConnectionRate,
    /// There are as many connections as there may be.
    TooMany,
    /// There are no file descriptors left.
    Descriptors,
    /// There are no local ports left for connections to the backends.
    LocalPorts,
    /// The address that connections to the backends are to come from is not on this node.
    SourceMissing,
    /// The kernel does not allow connections from the client's address.
    Transparent,
    /// It came from a VIP of ours (UDP): two Services that answer whatever comes would never stop.
    OwnAddress,
    /// It made room for a newer one (UDP), since there are as many sessions as there may be.
    Displaced,
}

impl Refusal {
    /// All.
    pub const ALL: [Self; 11] = [
        Self::NoBackend,
        Self::ConnectFailed,
        Self::SourceRange,
        Self::ConnectionRate,
        Self::TooMany,
        Self::Descriptors,
        Self::LocalPorts,
        Self::SourceMissing,
        Self::Transparent,
        Self::OwnAddress,
        Self::Displaced,
    ];

    /// As metrics and status have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoBackend => "no_backend",
            Self::ConnectFailed => "connect_failed",
            Self::SourceRange => "source_range",
            Self::ConnectionRate => "connection_rate",
            Self::TooMany => "too_many_connections",
            Self::Descriptors => "no_file_descriptors",
            Self::LocalPorts => "no_local_ports",
            Self::SourceMissing => "snat_address_missing",
            Self::Transparent => "transparent_not_allowed",
            Self::OwnAddress => "from_own_address",
            Self::Displaced => "displaced",
        }
    }
}

/// What was counted of a frontend since it was first served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrontendCounts {
    /// Which.
    pub key: ServiceKey,
    /// Connections (TCP) that a backend accepted, or sessions (UDP) that one was chosen for.
    pub accepted: u64,
    /// Those that there are.
    pub open: u64,
    /// Those that were refused, by reason: all of [`Refusal::ALL`].
    pub refused: Vec<(Refusal, u64)>,
    /// Bytes from clients.
    pub bytes_in: u64,
    /// Bytes to clients.
    pub bytes_out: u64,
    /// Of each backend.
    pub backends: Vec<BackendCounts>,
}

impl FrontendCounts {
    /// The sum with what was counted before it was served anew.
    #[must_use]
    pub fn after(mut self, earlier: Self) -> Self {
        self.accepted += earlier.accepted;
        self.bytes_in += earlier.bytes_in;
        self.bytes_out += earlier.bytes_out;
        for ((_, count), (_, before)) in self.refused.iter_mut().zip(earlier.refused) {
            *count += before;
        }
        for before in earlier.backends {
            match self.backends.iter_mut().find(|backend| backend.address == before.address) {
                Some(backend) => {
                    backend.connections += before.connections;
                    backend.connect_failures += before.connect_failures;
                }
                None => self.backends.push(before),
            }
        }
        self
    }
}

/// What was counted of a backend since it became one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendCounts {
    /// Address and port.
    pub address: SocketAddr,
    /// Connections or sessions that it was chosen for and took.
    pub connections: u64,
    /// Those that there are.
    pub open: u64,
    /// Connects that failed.
    pub connect_failures: u64,
    /// Whether new connections avoid it, because connects failed.
    pub ejected: bool,
}

/// Counters of one entry; each worker has its own, so that CPUs do not fight for cache lines.
#[derive(Debug)]
pub struct EntryCounters {
    shards: Box<[Shard]>,
    refused: [AtomicU64; Refusal::ALL.len()],
}

/// Counters of one worker.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Shard {
    /// Connections that came.
    pub begun: AtomicU64,
    /// Those of them that got a backend.
    pub accepted: AtomicU64,
    /// Those that ended, with a backend or without.
    pub ended: AtomicU64,
    /// Bytes from clients.
    pub bytes_in: AtomicU64,
    /// Bytes to clients.
    pub bytes_out: AtomicU64,
}

impl EntryCounters {
    /// Counters at zero.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        Self {
            shards: (0..workers).map(|_| Shard::default()).collect(),
            refused: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// Those of a worker.
    #[must_use]
    pub fn shard(&self, worker: usize) -> &Shard {
        &self.shards[worker]
    }

    /// Counts a refusal.
    pub fn refuse(&self, why: Refusal) {
        self.refused[why as usize].fetch_add(1, Relaxed);
    }

    /// Connections that there are.
    #[must_use]
    pub fn open(&self) -> u64 {
        // What ended is read first: a connection that comes and goes in between must not make it negative.
        let ended = self.sum(|shard| &shard.ended);
        self.sum(|shard| &shard.begun).saturating_sub(ended)
    }

    /// All of it, without the backends.
    #[must_use]
    pub fn read(&self, key: &ServiceKey) -> FrontendCounts {
        FrontendCounts {
            key: key.clone(),
            open: self.open(),
            accepted: self.sum(|shard| &shard.accepted),
            refused: Refusal::ALL.map(|why| (why, self.refused[why as usize].load(Relaxed))).into(),
            bytes_in: self.sum(|shard| &shard.bytes_in),
            bytes_out: self.sum(|shard| &shard.bytes_out),
            backends: Vec::new(),
        }
    }

    fn sum(&self, of: impl Fn(&Shard) -> &AtomicU64) -> u64 {
        self.shards.iter().map(|shard| of(shard).load(Relaxed)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_counted_where_their_names_are() {
        for (index, why) in Refusal::ALL.into_iter().enumerate() {
            assert_eq!(why as usize, index);
            assert!(why.name().bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'));
        }
    }

    #[test]
    fn the_documentation_explains_each() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/proxy.md");
        let text = std::fs::read_to_string(path).unwrap();
        for why in Refusal::ALL {
            let row = format!("| `{}` | ", why.name());
            assert_eq!(text.matches(&row).count(), 1, "{row}");
        }
    }
}
