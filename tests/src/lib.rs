//! The test kit.

pub mod dump;
pub mod lab;
pub mod traffic;
