//! Where Services come from.

pub mod convert;
pub mod file;
pub mod kube;
pub mod pools;
