//! The test kit.

pub mod demo;
pub mod dump;
pub mod kit;
pub mod lab;
pub mod traffic;
pub mod world;
pub mod bench;
