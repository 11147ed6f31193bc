//! Decisions. Pure: no clock, no I/O; time is an argument.
//!
//! [`Planner`] turns objects into what the data plane has to do and what people are told;
//! [`Compiler`] turns that into map operations.

mod compile;
pub mod controller;
mod cpu_use;
pub mod departure;
pub mod doctor;
mod ejection;
pub mod election;
mod flood_watch;
mod flow_tables;
mod frontend;
mod health;
pub mod ipam;
mod leaving;
pub mod maglev;
pub mod ownership;
mod planner;
mod probing;
pub mod proxy_header;
mod recent;
mod resolve;
mod slots;
mod slow_start;
#[cfg(test)]
pub(crate) mod testing;
mod tidings;
pub mod unreachable;

pub use compile::name;
pub use compile::{Batch, Compiler, Delta, Failure, Path, Paths, Proxied, Scope, Settings, apply};
pub use cpu_use::CpuUse;
pub use ejection::Ejection;
pub use flood_watch::{CookiePhase, CookiePolicy, FloodWatch, HalfOpen, Handshakes};
pub use flow_tables::{Fill, FlowTableWatch};
pub use frontend::{Frontend, FrontendBackend, Frontends, Wanted};
pub use health::HealthCheck;
pub use leaving::Leaving;
pub use planner::{Addressing, Effects, Plan, Planner};
pub use probing::{Answer, Probe, Probing, Verdict};
pub use recent::Recent;
pub use resolve::{Here, Resolved, Unhealthy, resolve};
pub use slots::{MAXIMUM_WEIGHTED_SLOTS, slot_order};
pub use tidings::Tidings;
