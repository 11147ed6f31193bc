//! Counters.

use std::collections::HashMap;

use anyhow::Result;
use lb_common::abi::BackendState;

use crate::dataplane::KernelMaps;
use crate::ports::MapStore;
use crate::view::TrafficView;

/// Counters by index, of the entries in use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// By the index in `services`.
    pub services: HashMap<u32, TrafficView>,
    /// By the index in `backends`.
    pub backends: HashMap<u32, TrafficView>,
}

/// Reads the counters of the entries in use, summed over the CPUs.
///
/// # Errors
/// When a map cannot be read.
pub fn traffic(maps: &KernelMaps) -> Result<Traffic> {
    let mut traffic = Traffic::default();
    for (index, _) in maps.service_names()? {
        traffic.services.insert(index, maps.service_stats(index)?.into());
    }
    for (index, backend) in maps.backends()? {
        if BackendState::from_raw(backend.state) != BackendState::Free {
            traffic.backends.insert(index, maps.backend_stats(index)?.into());
        }
    }
    Ok(traffic)
}
