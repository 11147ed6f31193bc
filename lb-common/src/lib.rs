//! What the kernel programs and the agent share.
//!
//! [`abi`] is the layout of everything that crosses between them: map keys, map values, limits,
//! names, drop reasons. [`forward`] is the forwarding core: the decision what happens to a packet,
//! written once and compiled for BPF and for the host.
//!
//! No `std`, no allocation, no clock, no I/O.
#![no_std]
#![warn(missing_docs)]

pub mod abi;
pub mod forward;
