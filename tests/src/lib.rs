//! The test kit.

pub mod bench;
