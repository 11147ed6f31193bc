//! Kubernetes resources as they are written: our own, with their definitions, and those of MetalLB
//! that are read.
//!
//! Types and their checks only. What they mean is decided in `plan`; what speaks with the API
//! server is in `source` and `publish`.

mod address_pool;
mod definitions;
pub mod metallb;
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
