//! What a Service asks of the client of a new flow: that it may connect, and that it stays with the
//! backend that it had.

use super::ip::IpFamily;
use super::platform::Tables;
use super::scratch::Scratch;
use crate::abi::{BackendState, SourceRange, idle_ticks};

/// Whether the client is in one of the source ranges of the Service entry.
#[inline(always)]
pub fn is_allowed<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
    service: u32,
) -> bool {
    let Scratch { key, source, .. } = scratch;
    source.prefix_length = SourceRange::<F::Address>::ALL_BITS;
    source.range.service = service.to_be_bytes();
    source.range.address = key.source;
    datapath.is_in_source_range(source)
}

/// The index of the backend that the client had, if it still takes connections; 0 if there is none.
/// The time of its last connection is now.
///
/// Weight 0 is no reason to leave: it keeps new clients away, and this is none.
#[inline(always)]
pub fn remembered<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
    service: u32,
) -> u32 {
    let Scratch { key, affinity_key, .. } = scratch;
    affinity_key.client = key.source;
    affinity_key.service = service;
    let Some(mut affinity) = datapath.affinity(affinity_key) else { return 0 };
    let now = datapath.now();
    if idle_ticks(now, affinity.last_used) > datapath.affinity_timeout(service) {
        return 0;
    }
    let index = affinity.backend;
    let Some(backend) = datapath.backend(index) else { return 0 };
    if BackendState::from_raw(backend.state) != BackendState::Active
        || backend.generation != affinity.generation
        || backend.service != service
    {
        return 0;
    }
    affinity.last_used = now;
    index
}
