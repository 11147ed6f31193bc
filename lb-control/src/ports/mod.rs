//! What the outside must fill.

mod fake;
mod map_store;

pub use fake::{FakeMaps, FaultyMaps};
pub use map_store::{Limits, MapOp, MapStore, Vip};
