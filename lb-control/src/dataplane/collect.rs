//! Forgets flows that have ended, and finds out which backends no flow refers to any more.
//!
//! The kernel makes room for flows that begin by itself (their table is least recently used); the
//! table of established flows only shrinks here.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use aya::maps::MapData;
use lb_common::abi::{
    Backend, Config, Flow, FlowKey, FlowState, Plain, Service, ServiceFlags, Tick, V4, V6, idle_ticks,
    ticks_from_seconds,
};

use lb_common::forward::tcp_state;

use super::flows::{Entries, FlowTables, Shown, entries, later};
use super::{Cpus, batch};
use crate::plan::Fill;

/// How long a client has to learn that its backend is gone, before its flow is forgotten.
const FAREWELL: Tick = ticks_from_seconds(60);

/// What a sweep found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sweep {
    /// Flows that are kept.
    pub kept: usize,
    /// Of them, those in the tables of established flows.
    pub established: usize,
    /// Connections that are established, and are not in those tables because they were full.
    pub unprotected: usize,
    /// Flows that were forgotten.
    pub forgotten: usize,
    /// How full the tables are, without what was forgotten, by their name.
    pub tables: BTreeMap<&'static str, Fill>,
    /// Indices of backends that flows refer to, with the number of flows that they have open.
    pub backends: BTreeMap<u32, u32>,
}

/// Whether a flow is over. `last_seen` is the time of the last packet in either direction,
/// `client_last_seen` that of the client's; `gone` says that its backend is not there any more.
#[must_use]
pub fn is_over(
    state: FlowState,
    now: Tick,
    last_seen: Tick,
    client_last_seen: Tick,
    gone: bool,
    config: &Config,
) -> bool {
    idle_ticks(now, last_seen) > config.timeouts[state as usize]
        || (gone && idle_ticks(now, client_last_seen) > FAREWELL)
}

/// Whether a connection in this state has a place in the table of established flows, if there is room.
/// Of UDP sessions the state alone does not tell.
fn should_stay(state: FlowState) -> bool {
    matches!(state, FlowState::Established | FlowState::ClientClosed | FlowState::BackendClosed)
}

/// Looks at all flows, and forgets those that are over. `is_gone` tells of a backend's index and
/// generation whether it is not there any more.
///
/// # Errors
/// When a table cannot be read or written.
pub fn sweep(
    tables: &FlowTables,
    now: Tick,
    config: &Config,
    is_gone: impl Fn(u32, u32) -> bool,
) -> Result<Sweep> {
    let mut sweep = Sweep::default();
    for table in 0..2 {
        let [v4, v6] = [&tables.tables_v4()[table], &tables.tables_v6()[table]];
        family::<V4>(v4, table, now, config, &is_gone, &mut sweep)?;
        family::<V6>(v6, table, now, config, &is_gone, &mut sweep)?;
    }
    Ok(sweep)
}

/// Backends whose number of open flows, as the kernel has counted it, is not what a sweep has found, with
/// what it should be: of Services that go by it. Flows that were evicted, that ran out, and those from
/// before the Service did, are not counted by the kernel.
///
/// Flows that come or go during the sweep may be counted wrongly. That is as much as they are, and does
/// not add up.
#[must_use]
pub fn miscounted(
    counted: &HashMap<u32, u32>,
    found: &BTreeMap<u32, u32>,
    services: &HashMap<u32, Service>,
    backends: &HashMap<u32, Backend>,
) -> Vec<(u32, u32)> {
    let goes_by_it = |backend: &Backend| {
        services.get(&backend.service).is_some_and(|service| service.has(ServiceFlags::LEAST_CONNECTIONS))
    };
    let of = |index: &u32| found.get(index).copied().unwrap_or_default();
    let ours = backends.iter().filter(|(_, backend)| goes_by_it(backend)).map(|(index, _)| *index);
    ours.map(|index| (index, of(&index)))
        .filter(|(index, flows)| counted.get(index).copied().unwrap_or_default() != *flows)
        .collect()
}

fn family<F: Shown>(
    data: &MapData,
    table: usize,
    now: Tick,
    config: &Config,
    is_gone: &impl Fn(u32, u32) -> bool,
    sweep: &mut Sweep,
) -> Result<()>
where
    FlowKey<F::Address>: Plain,
    Flow<F::Address>: Plain,
{
    let all: Entries<F> = entries(data, F::TABLES[table])?;
    let mut over = Vec::new();
    for (key, flow) in &all {
        let peer_key = FlowKey::reverse_of(flow, key.protocol);
        let peer = all.get(&peer_key);
        let last_seen = peer.map_or(flow.last_seen, |peer| later(flow.last_seen, peer.last_seen));
        let (client, gone) = match flow.is_reply() {
            false => (flow.last_seen, is_gone(flow.backend, flow.generation)),
            // Its generation is that of the route: the client's entry knows about the backend.
            true => (
                peer.map_or(flow.last_seen, |peer| peer.last_seen),
                peer.is_some_and(|peer| is_gone(peer.backend, peer.generation)),
            ),
        };
        if is_over(flow.state(), now, last_seen, client, gone, config) {
            over.push((*key, *flow));
            sweep.forgotten += usize::from(!flow.is_reply());
        } else {
            let is_open = !flow.is_reply() && !tcp_state::is_over(flow.state());
            *sweep.backends.entry(flow.backend).or_default() += u32::from(is_open);
            sweep.kept += usize::from(!flow.is_reply());
            sweep.established += usize::from(!flow.is_reply() && table == 0);
            sweep.unprotected += usize::from(!flow.is_reply() && table == 1 && should_stay(flow.state()));
        }
    }
    let name = F::TABLES[table].name;
    let room = data.info().with_context(|| format!("asking about the map {name}"))?.max_entries();
    // Of a table that is divided among CPUs, those that do not run have a part, too.
    let cpus = Cpus::count()?;
    let room = if table == 0 { room } else { cpus.usable(room, cpus.online) };
    sweep.tables.insert(name, Fill { entries: all.len() - over.len(), room });
    for (key, flow) in &over {
        // The tuple may have been used again since the table was read.
        let now: Option<Flow<F::Address>> = batch::lookup(data.fd().as_fd(), key)
            .with_context(|| format!("reading the map {}", F::TABLES[table].name))?;
        if now.is_none_or(|now| now.last_seen != flow.last_seen || now.status != flow.status) {
            continue;
        }
        batch::remove(data.fd().as_fd(), key)
            .with_context(|| format!("removing from the map {}", F::TABLES[table].name))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_is_over_when_both_directions_were_idle_for_its_timeout() {
        let config = Config::default();
        let limit = config.timeouts[FlowState::Established as usize];
        let over = |idle, gone| is_over(FlowState::Established, 7, 7u32.wrapping_sub(idle), 7, gone, &config);
        assert!(!over(limit, false));
        assert!(over(limit + 1, false));
        assert!(!over(0, true), "a client of a gone backend is told first");
    }

    #[test]
    fn a_flow_of_a_gone_backend_is_over_when_its_client_is_silent() {
        let config = Config::default();
        let over = |client_idle| {
            is_over(FlowState::Established, 10_000, 10_000, 10_000 - client_idle, true, &config)
        };
        assert!(!over(FAREWELL));
        assert!(over(FAREWELL + 1), "even though the backend still sends");
    }

    #[test]
    fn only_services_that_go_by_open_flows_are_put_right() {
        let service = |flags| Service::new(0, 2, flags);
        let services = HashMap::from([(1, service(ServiceFlags::LEAST_CONNECTIONS)), (2, service(0))]);
        let backend = |service| Backend { service, ..Backend::default() };
        let backends: HashMap<_, _> =
            [(11, 1), (12, 1), (13, 1), (21, 2)].map(|(index, service)| (index, backend(service))).into();
        let counted = HashMap::from([(11, 3), (12, 5), (13, u32::MAX), (21, 9)]);
        let found = BTreeMap::from([(11, 3), (12, 4), (21, 1)]);
        let mut wrong = miscounted(&counted, &found, &services, &backends);
        wrong.sort_unstable();
        assert_eq!(wrong, [(12, 4), (13, 0)]);
    }

    #[test]
    fn a_packet_that_came_while_reading_does_not_look_ancient() {
        let config = Config::default();
        assert!(!is_over(FlowState::UdpReplied, 100, 101, 101, false, &config));
    }
}
