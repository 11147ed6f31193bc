//! The test kit.

pub mod dump;
