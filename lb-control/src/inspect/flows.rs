//! Flows as people are shown them.

use std::collections::{HashMap, HashSet};

use lb_common::abi::{IPPROTO_TCP, IPPROTO_UDP, ServiceName, Tick};

use crate::dataplane::clock;
use crate::dataplane::flows::FlowRecord;
use crate::model::ObjectRef;
use crate::plan::name;
use crate::view::FlowView;

/// Whose the Service entries are, by their index.
#[must_use]
pub fn service_refs(names: &[(u32, ServiceName)]) -> HashMap<u32, ObjectRef> {
    names.iter().filter_map(|(index, stored)| Some((*index, name::parse(stored)?.service))).collect()
}

/// Flows, those with the latest packet first. `names` as from [`service_refs`]; `now` as from
/// [`clock::now`], read after the records.
#[must_use]
pub fn flow_views(mut records: Vec<FlowRecord>, names: &HashMap<u32, ObjectRef>, now: Tick) -> Vec<FlowView> {
    // One that moves from table to table while they are read is in both; the records of established
    // flows come first.
    let mut known = HashSet::with_capacity(records.len());
    records.retain(|record| known.insert((record.protocol, record.client, record.vip)));
    records.sort_by_cached_key(|record| (idle(record, now), record.client, record.vip));
    records.iter().map(|record| flow_view(record, names, now)).collect()
}

fn flow_view(record: &FlowRecord, names: &HashMap<u32, ObjectRef>, now: Tick) -> FlowView {
    FlowView {
        protocol: match record.protocol {
            IPPROTO_TCP => "TCP".to_owned(),
            IPPROTO_UDP => "UDP".to_owned(),
            other => other.to_string(),
        },
        client: record.client,
        vip: record.vip,
        snat: record.snat,
        backend: record.backend,
        service: names.get(&record.service).map(ToString::to_string).unwrap_or_default(),
        state: record.state.name().to_owned(),
        // Down to whole seconds, as for every age.
        idle_seconds: clock::seconds(idle(record, now)) as u64,
    }
}

/// Ticks since the last packet; 0 for a packet that came after `now` was read. Wraps as ticks do.
fn idle(record: &FlowRecord, now: Tick) -> Tick {
    let idle = now.wrapping_sub(record.last_seen);
    if (idle as i32) < 0 { 0 } else { idle }
}

#[cfg(test)]
mod tests {
    use lb_common::abi::{FlowState, ticks_from_seconds};

    use super::*;
    use crate::inspect::testing::{maps_with, service};
    use crate::ports::MapStore;

    fn record(client: &str, last_seen: Tick) -> FlowRecord {
        FlowRecord {
            protocol: IPPROTO_TCP,
            client: client.parse().unwrap(),
            vip: "192.0.2.10:80".parse().unwrap(),
            snat: "10.0.0.1:1024".parse().unwrap(),
            backend: "10.0.0.2:8080".parse().unwrap(),
            service: 1,
            backend_index: 4,
            backend_generation: 1,
            state: FlowState::Established,
            established: true,
            last_seen,
            client_last_seen: last_seen,
        }
    }

    #[test]
    fn latest_first_and_named() {
        let now = ticks_from_seconds(100);
        let names = maps_with(&service(1, "default/web", "192.0.2.10:80", Some(1))).service_names().unwrap();
        let old = record("198.51.100.1:1000", now - ticks_from_seconds(61));
        let new = record("198.51.100.2:1000", now - ticks_from_seconds(5));
        let stray = FlowRecord { service: 9, protocol: IPPROTO_UDP, ..record("198.51.100.3:1", 0) };
        let views = flow_views(vec![old, stray, new], &service_refs(&names), now);
        let shown: Vec<_> = views
            .iter()
            .map(|view| (view.idle_seconds, view.service.as_str(), view.protocol.as_str()))
            .collect();
        assert_eq!(shown, [(5, "default/web", "TCP"), (61, "default/web", "TCP"), (100, "", "UDP")]);
    }

    #[test]
    fn time_wraps() {
        let ages = |last_seen, now| {
            flow_views(vec![record("198.51.100.1:1", last_seen)], &HashMap::new(), now)[0].idle_seconds
        };
        assert_eq!(ages(Tick::MAX - ticks_from_seconds(2), ticks_from_seconds(3)), 5);
        assert_eq!(ages(ticks_from_seconds(3), ticks_from_seconds(2)), 0);
    }

    #[test]
    fn a_flow_on_the_move_is_shown_once() {
        let old =
            FlowRecord { established: false, state: FlowState::SynReceived, ..record("198.51.100.1:1", 0) };
        let views = flow_views(vec![record("198.51.100.1:1", 0), old], &HashMap::new(), 0);
        assert_eq!(views.len(), 1);
        assert_eq!(views[0].state, "established");
    }
}
