//! The UDP engine.

pub mod batch;
pub mod table;
