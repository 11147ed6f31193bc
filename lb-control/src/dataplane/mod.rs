//! The kernel side as the agent sees it: loading and pinning, the maps, the devices that programs
//! are attached to, the flows.

mod attach;
mod batch;
mod classifiers;
pub mod clock;
pub mod collect;
mod counters;
mod cpus;
pub mod flows;
mod growth;
pub mod half_open;
mod link_update;
mod links;
mod loader;
mod maps;
pub mod object;
mod pins;
mod refusal;
mod sockets;
mod takeover;
pub mod trial;

pub use attach::{Attachment, Devices, Mode};
pub use classifiers::{Classifiers, Direction};
pub use counters::Counters;
pub use cpus::Cpus;
pub use growth::are_slots_apart;
pub use links::{LinkedDevice, device_name, linked_devices};
pub use loader::{Kernel, Sizes};
pub use maps::KernelMaps;
pub use pins::{PinDirectory, PinLock};
pub use sockets::{Cgroup, SocketHooks};
