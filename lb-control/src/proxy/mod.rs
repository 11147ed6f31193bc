//! The userspace proxy.

pub mod udp;
