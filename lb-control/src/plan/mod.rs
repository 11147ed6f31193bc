//! Decisions. Pure: no clock, no I/O; time is an argument.

pub mod ipam;
#[cfg(test)]
pub(crate) mod testing;
