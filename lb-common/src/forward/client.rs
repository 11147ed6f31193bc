//! What a Service asks of the client of a new flow: that it may connect, that it does so no more often
//! than it may, and that it stays with the backend that it had.

use super::ip::IpFamily;
use super::platform::{InsertFailed, Tables};
use super::scratch::Scratch;
use crate::abi::{BackendState, ConnectionRate, SourceRange, idle_ticks};

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

/// How often to try to count a connection while other CPUs count others of the same client.
const RATE_ATTEMPTS: u32 = 4;

/// Whether the client may open another connection to the Service entry now; if so, it is counted.
///
/// Never more than the limit: of CPUs that count for one client at once, one succeeds and the others
/// try again; who does not get to it is refused. A client that the least recently used table has
/// forgotten begins anew, and one that it cannot remember may connect.
#[inline(always)]
pub fn is_below_limit<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
    service: u32,
) -> bool {
    let limit = datapath.connection_limit(service);
    if limit.rate == 0 {
        return true;
    }
    let Scratch { key, affinity_key, connection_rate, .. } = scratch;
    affinity_key.client = key.source;
    F::keep_network(&mut affinity_key.client);
    affinity_key.service = service;
    let now = datapath.now();
    connection_rate.full_at = limit.take(ConnectionRate::time(now), now);
    for _ in 0..RATE_ATTEMPTS {
        let Some(mut rate) = datapath.connection_rate(affinity_key) else {
            match datapath.insert_new_connection_rate(affinity_key, connection_rate) {
                Err(InsertFailed::Exists) => continue,
                _ => return true,
            }
        };
        let before = rate.full_at;
        let after = limit.take(before, now);
        if after == before {
            return false;
        }
        if datapath.replace_rate(&mut rate, before, after) {
            return true;
        }
    }
    false
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
