//! Real TCP and UDP through a lab: servers on the backends, clients that count what goes wrong.

pub mod bulk;
pub mod client;
pub mod flood;
pub mod herd;
mod http;
pub mod load;
mod pattern;
pub mod ping_pong;
pub mod probe;
pub mod server;
pub mod udp_flows;

pub use pattern::Pattern;
pub use server::{ECHO_PORT, HTTP_PORT, Server, UDP_PORT};
