//! How much the proxy may have open.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use tracing::warn;

use super::Settings;

/// A connection has a socket to the client and one to the backend.
pub const DESCRIPTORS_EACH: usize = 2;
/// One of so many file descriptors may be an end of a pipe.
const SHARE_OF_PIPES: usize = 16;
/// One of so many file descriptors may be a listening socket that is there for speed only.
const SHARE_OF_LISTENERS: usize = 16;

/// Fewer file descriptors than this are few: a thousand connections or so.
const FEW_DESCRIPTORS: usize = 4_096;

/// How much the proxy may have open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// File descriptors of the process.
    pub descriptors: usize,
    /// TCP connections, as long as nothing but they needs file descriptors.
    pub connections: usize,
    /// File descriptors for connections, and for sockets at VIPs.
    pub sockets: usize,
    /// Pipes of one worker.
    pub pipes: usize,
    /// As long as there are no more listening sockets than this, each worker may get its own.
    pub own_listeners: usize,
}

impl Limits {
    /// With so many file descriptors for the process. At least one connection is allowed.
    #[must_use]
    pub fn of(descriptors: usize, settings: &Settings) -> Self {
        let pipes = descriptors / SHARE_OF_PIPES / 2;
        let sockets = descriptors.saturating_sub(settings.reserved_descriptors + 2 * pipes);
        let possible = (sockets / DESCRIPTORS_EACH).max(1);
        Self {
            descriptors,
            connections: settings.max_connections.map_or(possible, |wanted| wanted.min(possible)),
            sockets,
            pipes: pipes / settings.threads(),
            own_listeners: descriptors / SHARE_OF_LISTENERS,
        }
    }

    /// What is to be said if there are few.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let Self { descriptors, connections, .. } = self;
        (*descriptors < FEW_DESCRIPTORS).then(|| {
            format!(
                "the proxy has room for {connections} connections only, since the agent may open no more than \
                 {descriptors} files: raise the hard limit of open files (LimitNOFILE= of the service or of the \
                 container runtime)"
            )
        })
    }

    /// How many TCP connections there may be while there are so many other sockets. At least one.
    #[must_use]
    pub fn connections_beside(&self, others: usize) -> usize {
        self.connections.min(self.sockets.saturating_sub(others) / DESCRIPTORS_EACH).max(1)
    }
}

/// Raises the soft limit of open files to the hard one, and gives it. Where that fails it stays as it is,
/// and the log says so.
#[must_use]
pub fn raise_descriptors() -> usize {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1_024 };
    let mut limit = hard;
    if soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        limit = soft;
        warn!("the limit of open files stays at {soft}, and cannot be raised to {hard}: {error}");
    }
    usize::try_from(limit).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_descriptors_are_told() {
        let problem = |descriptors| Limits::of(descriptors, &Settings::default()).problem();
        assert_eq!(problem(4_096), None);
        let problem = problem(1_024).unwrap();
        assert!(problem.contains("room for 224 connections") && problem.contains("1024 files"), "{problem}");
    }

    #[test]
    fn shares() {
        let settings = Settings { workers: 2, ..Settings::default() };
        let limits = Limits::of(20_000, &settings);
        assert_eq!((limits.pipes, limits.own_listeners), (312, 1_250));
        assert_eq!(limits.sockets, 20_000 - 512 - 1_250);
        assert_eq!(limits.connections, limits.sockets / 2);
        assert_eq!(limits.connections_beside(0), limits.connections);
        assert_eq!(limits.connections_beside(10_000), (limits.sockets - 10_000) / 2);
        assert_eq!(limits.connections_beside(19_000), 1, "rather one than none");
        assert_eq!(Limits::of(64, &settings).connections, 1);
        let few = Settings { max_connections: Some(7), ..settings };
        let limits = Limits::of(20_000, &few);
        assert_eq!((limits.connections, limits.connections_beside(10_000)), (7, 7));
    }
}
