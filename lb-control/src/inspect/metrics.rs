//! What the maps tell, as metrics.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Result;
use lb_common::abi::{
    Backend, BackendState, BackendStats, DropReason, DropStats, Service, ServiceName, ServiceStats, maps,
};

use crate::dataplane::Counters;
use crate::model::ServiceKey;
use crate::plan::name;
use crate::telemetry::metrics::{Labels, Samples, labels, table};

/// Maps of which the room is told.
const WITH_ROOM: [maps::Map; 9] = [
    maps::FLOWS_V4,
    maps::FLOWS_V6,
    maps::TRANSIENT_V4,
    maps::TRANSIENT_V6,
    maps::VIPS_V4,
    maps::VIPS_V6,
    maps::SERVICES,
    maps::SLOTS,
    maps::BACKENDS,
];

/// The maps at one time, as far as metrics tell of them.
#[derive(Debug, Default)]
pub struct MapReading {
    names: Vec<(u32, ServiceName)>,
    services: Vec<(u32, Service)>,
    backends: Vec<(u32, Backend)>,
    vips: [usize; 2],
    service_stats: HashMap<u32, ServiceStats>,
    /// Only if they are asked for.
    backend_stats: Option<HashMap<u32, BackendStats>>,
    drops: Vec<(DropReason, DropStats)>,
    room: Vec<(&'static str, u32)>,
}

impl MapReading {
    /// Reads the maps. `per_backend`: the counters of backends too.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn new(maps: &Counters, per_backend: bool) -> Result<Self> {
        let room = WITH_ROOM.iter().map(|map| Ok((map.name, maps.room(*map)?)));
        Ok(Self {
            names: maps.service_names()?,
            services: maps.services()?,
            backends: maps.backends()?,
            vips: maps.vips()?,
            service_stats: maps.service_stats()?,
            backend_stats: per_backend.then(|| maps.backend_stats()).transpose()?,
            drops: maps.drops()?,
            room: room.collect::<Result<_>>()?,
        })
    }

    /// Adds everything that they tell.
    pub fn collect(&self, samples: &mut Samples) {
        let keys: HashMap<u32, ServiceKey> =
            self.names.iter().filter_map(|(index, stored)| Some((*index, name::parse(stored)?))).collect();
        for (index, key) in &keys {
            let stats = self.service_stats.get(index).copied().unwrap_or_default();
            service(key, &stats, samples);
        }
        for (_, backend) in &self.backends {
            if let Some(state) = state(backend) {
                samples.level(&table::BACKENDS, &labels([state]), 1.0);
            }
        }
        for (index, backend) in self.backends.iter().filter(|(_, backend)| state(backend).is_some()) {
            if let (Some(all), Some(key)) = (&self.backend_stats, keys.get(&backend.service)) {
                self::backend(key, backend, &all.get(index).copied().unwrap_or_default(), samples);
            }
        }
        for (reason, stats) in &self.drops {
            let reason = labels([reason.name()]);
            samples.count(&table::DROPPED_PACKETS, &reason, stats.packets);
            samples.count(&table::DROPPED_BYTES, &reason, stats.bytes);
        }
        self.pressure(samples);
    }

    fn pressure(&self, samples: &mut Samples) {
        let slots: u64 = self.services.iter().map(|(_, service)| u64::from(service.slot_count())).sum();
        let used = [
            (maps::VIPS_V4, self.vips[0] as f64),
            (maps::VIPS_V6, self.vips[1] as f64),
            (maps::SERVICES, self.names.len() as f64),
            (maps::SLOTS, slots as f64),
            (maps::BACKENDS, self.backends.iter().filter(|(_, one)| state(one).is_some()).count() as f64),
        ];
        for (map, entries) in used {
            samples.level(&table::MAP_ENTRIES, &labels([map.name]), entries);
        }
        for (map, room) in &self.room {
            samples.level(&table::MAP_MAX_ENTRIES, &labels([map]), f64::from(*room));
        }
    }
}

/// The value of the label; `None` for an entry that is not in use.
fn state(backend: &Backend) -> Option<&'static str> {
    match BackendState::from_raw(backend.state) {
        BackendState::Free => None,
        BackendState::Active => Some("active"),
        BackendState::Terminating => Some("terminating"),
    }
}

/// Namespace, Service, protocol, VIP and port.
pub(super) fn entry(key: &ServiceKey) -> [String; 5] {
    let ServiceKey { service, protocol, vip, port } = key;
    [service.namespace.clone(), service.name.clone(), protocol.to_string(), vip.to_string(), port.to_string()]
}

fn service(key: &ServiceKey, stats: &ServiceStats, samples: &mut Samples) {
    let labels: Labels = Arc::new(entry(key));
    samples.count_directions(&table::SERVICE_PACKETS, &labels, [stats.packets_in, stats.packets_out]);
    samples.count_directions(&table::SERVICE_BYTES, &labels, [stats.bytes_in, stats.bytes_out]);
    samples.count(&table::SERVICE_NEW_FLOWS, &labels, stats.new_flows);
    samples.count(&table::SERVICE_REFUSED, &labels, stats.refused);
}

fn backend(key: &ServiceKey, backend: &Backend, stats: &BackendStats, samples: &mut Samples) {
    let Some(address) = name::narrow(backend.address, backend.family) else { return };
    let socket = SocketAddr::new(address, u16::from_be_bytes(backend.port));
    let labels: Labels = entry(key).into_iter().chain([socket.to_string()]).collect();
    samples.count_directions(&table::BACKEND_PACKETS, &labels, [stats.packets_in, stats.packets_out]);
    samples.count_directions(&table::BACKEND_BYTES, &labels, [stats.bytes_in, stats.bytes_out]);
    samples.count(&table::BACKEND_NEW_FLOWS, &labels, stats.new_flows);
}

#[cfg(test)]
impl MapReading {
    /// Something of everything.
    pub fn sample() -> Self {
        use super::testing::{backend, maps_with, service};
        let mut ops = service(1, "default/web", "192.0.2.10:80", Some(1));
        ops.extend(backend(4, 1, "10.0.0.2:8080", |_| ()));
        Self::for_tests(&maps_with(&ops), true)
    }

    /// What the maps of a test hold, with some traffic everywhere.
    fn for_tests(store: &dyn crate::ports::MapStore, per_backend: bool) -> Self {
        let traffic = ServiceStats {
            packets_in: 1,
            bytes_in: 2,
            packets_out: 3,
            bytes_out: 4,
            new_flows: 5,
            refused: 6,
        };
        let of_backend =
            BackendStats { packets_in: 7, bytes_in: 8, packets_out: 9, bytes_out: 10, new_flows: 11 };
        let (names, backends) = (store.service_names().unwrap(), store.backends().unwrap());
        Self {
            services: store.services().unwrap(),
            vips: [store.vips().unwrap().len(), 0],
            service_stats: names.iter().map(|(index, _)| (*index, traffic)).collect(),
            backend_stats: per_backend
                .then(|| backends.iter().map(|(index, _)| (*index, of_backend)).collect()),
            drops: vec![(DropReason::TableFull, DropStats { packets: 12, bytes: 13 })],
            room: vec![("flows_v4", 14)],
            names,
            backends,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::testing::{backend as backend_ops, maps_with, service as service_ops};

    fn text(per_backend: bool) -> String {
        let mut ops = service_ops(1, "default/web", "192.0.2.10:80", Some(2));
        ops.extend(service_ops(2, "default/web", "[2001:db8::10]:80", None));
        ops.extend(backend_ops(4, 1, "10.0.0.2:8080", |_| ()));
        ops.extend(backend_ops(5, 1, "10.0.0.3:8080", |b| b.state = BackendState::Terminating as u8));
        ops.extend(backend_ops(6, 1, "10.0.0.4:8080", |b| b.state = BackendState::Free as u8));
        let mut samples = Samples::default();
        MapReading::for_tests(&maps_with(&ops), per_backend).collect(&mut samples);
        samples.text().unwrap()
    }

    fn has(text: &str, line: &str) {
        assert!(text.lines().any(|found| found == line), "{line}:\n{text}");
    }

    #[test]
    fn services_and_maps() {
        let text = text(false);
        let web = r#"{namespace="default",service="web",protocol="TCP",vip="192.0.2.10",port="80""#;
        has(&text, &format!("pointsman_service_packets_total{web},direction=\"in\"}} 1"));
        has(&text, &format!("pointsman_service_packets_total{web},direction=\"out\"}} 3"));
        has(&text, &format!("pointsman_service_bytes_total{web},direction=\"out\"}} 4"));
        has(&text, &format!("pointsman_service_new_flows_total{web}}} 5"));
        has(&text, &format!("pointsman_service_refused_total{web}}} 6"));
        has(&text, "pointsman_backends{state=\"active\"} 1.0");
        has(&text, "pointsman_backends{state=\"terminating\"} 1.0");
        has(&text, "pointsman_dropped_packets_total{reason=\"table-full\"} 12");
        has(&text, "pointsman_map_entries{map=\"services\"} 2.0");
        has(&text, "pointsman_map_entries{map=\"backends\"} 2.0");
        has(&text, "pointsman_map_entries{map=\"slots\"} 2.0");
        has(&text, "pointsman_map_entries{map=\"vips_v4\"} 1.0");
        has(&text, "pointsman_map_max_entries{map=\"flows_v4\"} 14.0");
        assert!(!text.contains("pointsman_backend_packets"), "nobody asked for backends:\n{text}");
    }

    #[test]
    fn backends_if_they_are_asked_for() {
        let text = text(true);
        let one = r#"{namespace="default",service="web",protocol="TCP",vip="192.0.2.10",port="80",backend="10.0.0.2:8080""#;
        has(&text, &format!("pointsman_backend_packets_total{one},direction=\"in\"}} 7"));
        has(&text, &format!("pointsman_backend_bytes_total{one},direction=\"out\"}} 10"));
        has(&text, &format!("pointsman_backend_new_flows_total{one}}} 11"));
        assert!(!text.contains("10.0.0.4"), "free:\n{text}");
    }
}
