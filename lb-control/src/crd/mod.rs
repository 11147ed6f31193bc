//! Kubernetes resources as they are written, with their definitions.
//!
//! Types and their checks only. What they mean is decided in `plan`; what speaks with the API
//! server is in `source` and `publish`.

mod address_pool;
mod definitions;
mod name;
mod schema;
mod virtual_ip;

pub use address_pool::{AddressPool, AddressPoolSpec, AddressPoolStatus};
pub use definitions::{definitions, yaml};
pub use name::{BadName, virtual_ip_address, virtual_ip_name};
pub use virtual_ip::{ServiceName, VirtualIp, VirtualIpSpec, VirtualIpStatus};

/// The API group of our resources.
pub const GROUP: &str = "pointsman.dev";
/// `apiVersion` of our resources.
pub const API_VERSION: &str = "pointsman.dev/v1alpha1";
