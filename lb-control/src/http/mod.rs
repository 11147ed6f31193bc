//! The agent's API on a Unix socket: JSON over HTTP/1.1, for `pointsman status` and for probes.
//!
//! | path | answer |
//! |---|---|
//! | `GET /v1/status` | a [`StatusView`] |
//! | `GET /v1/flows?service=&backend=&client=&state=&limit=` | a [`FlowsView`]; see [`FlowFilter`] |
//! | `GET /v1/drops` | a [`DropsView`] |
//! | `GET /healthz` | 200 for as long as the agent does its work, else 503 |
//! | `GET /readyz` | 200 once the datapath is in place, else 503 |
//!
//! A TCP port has `/metrics`, `/healthz` and `/readyz`: see [`serve_port`].
//!
//! An error is a status of 400 or more and a sentence as text.
//!
//! [`FlowsView`]: crate::view::FlowsView
//! [`FlowFilter`]: crate::view::FlowFilter
//! [`DropsView`]: crate::view::DropsView

pub mod client;
mod health_ports;
mod server;
mod socket;
mod tcp;
#[cfg(test)]
mod tests;

use anyhow::{Result, bail};

use crate::view::{DropView, FlowView, StatusView};

pub use health_ports::{Check, HealthPorts, HealthProblems};
pub use server::{serve, serve_port};
pub use socket::bind;
pub use tcp::listen;

/// Where the agent listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/pointsman/pointsman.sock";

/// Somebody who can tell about the agent and the datapath. May block: maps are read.
///
/// # Errors
/// Every function: when something cannot be read; the error names it.
pub trait Inspect: Send + Sync {
    /// The agent, devices, Services and problems.
    fn status(&self) -> Result<StatusView>;
    /// All flows.
    fn flows(&self) -> Result<Vec<FlowView>>;
    /// All drop reasons, in the order of their numbers.
    fn drops(&self) -> Result<Vec<DropView>>;
    /// Whether packets are forwarded by the current configuration.
    fn ready(&self) -> bool;
    /// Whether the agent still does its work, however well; false asks for a restart.
    fn alive(&self) -> bool {
        true
    }
    /// The media type of metrics, and their text; only an agent has any.
    fn metrics(&self) -> Result<(&'static str, String)> {
        bail!("no agent runs: there are no metrics")
    }
}
