//! The test kit.

pub mod apiserver;
pub mod bench;
pub mod cluster_world;
pub mod demo;
pub mod dump;
pub mod kit;
pub mod lab;
pub mod traffic;
pub mod world;
