//! Where Services come from.

pub mod address_pool;
pub mod convert;
pub mod file;
