//! A lab of network namespaces: a client, an edge node and backends behind it.
//!
//! ```text
//! client ──[router]── uplink edge lan ── switch ──┬── b1
//!                                                 ├── b2
//! ```
//!
//! The client and the backends reach everything else by the edge, as their default route. In a
//! one-armed lab the client and the edge's `uplink` are plugged into the switch, too.

pub mod agent;
mod control_group;
mod extra_client;
mod extra_edge;
pub mod manifest;
mod netns;
pub mod registry;
pub mod relay;
mod topology;
pub mod wire;
pub(crate) mod xdp_pass;

pub use agent::{Agent, Seat, in_kernel, is_proxied, wait_for};
pub use control_group::ControlGroup;
pub use extra_client::{ExtraClient, UPLINK_2};
pub use extra_edge::ExtraEdge;
pub use netns::{Namespace, Process};
pub use topology::{HOST, Lab, Lan, Options, POD, VIPS_V4, VIPS_V6};

/// Whether namespaces and BPF programs can be made. Tests call it first and return when it is
/// false; `cargo xtask ci` takes the printed line for a failure.
#[must_use]
pub fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("SKIP: needs root for network namespaces and BPF");
    }
    root
}
