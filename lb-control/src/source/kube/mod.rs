//! The Kubernetes API as a source: watches that become changes of `model` types.

mod backoff;
mod connect;
mod follow;
mod keep;
pub mod kinds;
mod known;
mod lenient;
mod merge;
mod names;
mod reflect;
mod version;
mod words;

use std::{fmt, time::Duration};

pub use backoff::Backoff;
pub use connect::{Access, ConnectError, Connection, connect};
pub use follow::watch;
pub use known::Known;

pub use super::Update;
pub use crate::model::causes;

/// Why it makes no sense to go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fatal(pub String);

impl fmt::Display for Fatal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Fatal {}

/// How long to wait for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// A watch that says nothing for so long is begun anew. Bookmarks come about every minute.
    pub idle: Duration,
    /// Wait after a first failure.
    pub shortest_wait: Duration,
    /// Wait after many failures.
    pub longest_wait: Duration,
    /// Between two looks for optional kinds.
    pub discovery: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(150),
            shortest_wait: Duration::from_secs(1),
            longest_wait: Duration::from_secs(30),
            discovery: Duration::from_secs(30),
        }
    }
}
