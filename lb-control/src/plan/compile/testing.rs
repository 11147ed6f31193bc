//! Desired state and maps in a few characters, for tests.

use std::{
    collections::BTreeMap,
    fmt::Write,
    net::{IpAddr, SocketAddr},
};

use lb_common::abi::{BackendState, NextHop, ServiceFlags};

use super::{
    Path, Paths,
    name::{narrow, parse},
};
use crate::{
    model::{
        ClientAddress, Desired, DesiredBackend, DesiredEntry, ObjectRef, Protocol, Role, ServiceKey,
        parse_connection_limit,
    },
    ports::{FakeMaps, MapStore},
};

/// `name VIP port[/UDP]`; the VIP is 192.0.2.VIP.
pub fn key(text: &str) -> ServiceKey {
    let words: Vec<_> = text.split_whitespace().collect();
    let (port, protocol) = match words[2].strip_suffix("/UDP") {
        Some(port) => (port, Protocol::Udp),
        None => (words[2], Protocol::Tcp),
    };
    ServiceKey {
        service: ObjectRef::new("default", words[0]),
        protocol,
        vip: IpAddr::from([192, 0, 2, words[1].parse().unwrap()]),
        port: port.parse().unwrap(),
    }
}

/// Lines of `KEY: [!SCHEDULER] [%SLOW-START] [@SECONDS] [^RATE/BURST] [<RANGE]… .BACKEND[*WEIGHT][~]…`:
/// affinity, connection rate limit, source ranges, backends. A
/// backend is 10.0.0.BACKEND:8080, `~` terminates.
pub fn desired(text: &str) -> Desired {
    let mut desired = Desired::default();
    for line in text.lines() {
        let (name, rest) = line.split_once(": ").unwrap_or((line.trim_end_matches(':'), ""));
        let words = |sign: char| rest.split_whitespace().filter_map(move |word| word.strip_prefix(sign));
        let backends = words('.').map(|word| {
            let role = if word.ends_with('~') { Role::Terminating } else { Role::Active };
            let word = word.trim_end_matches('~');
            let (last, weight) = word.split_once('*').unwrap_or((word, "1"));
            let address = SocketAddr::new(IpAddr::from([10, 0, 0, last.parse().unwrap()]), 8080);
            (address, DesiredBackend { weight: weight.parse().unwrap(), role, local: false })
        });
        let entry = DesiredEntry {
            port_name: "http".into(),
            backends: backends.collect(),
            source_ranges: words('<').map(|range| range.parse().unwrap()).collect(),
            affinity: words('@').next().map(|seconds| seconds.parse().unwrap()),
            connection_limit: words('^').next().map(|limit| parse_connection_limit(limit).unwrap()),
            slow_start: words('%').next().map(|time| time.parse().unwrap()),
            client_address: ClientAddress::default(),
            scheduler: words('!').next().map(|name| name.parse().unwrap()).unwrap_or_default(),
        };
        desired.entries.insert(key(name), entry);
    }
    desired
}

/// All backends behind one device, with one source address.
pub fn paths(desired: &Desired, device: u8) -> Paths {
    let next_hop = Some(NextHop { ifindex: device.into(), ..NextHop::default() });
    let snat = vec![IpAddr::from([10, 0, 255, device])];
    let path = Path { next_hop, snat, is_local: false, mtu: 1_500, is_for_tc: false };
    desired.backend_addresses().into_iter().map(|address| (address, path.clone().into())).collect()
}

/// What packets meet: per VIP its affinity, its limit, its source ranges and its slots in order, and in brackets
/// the backends without one.
///
/// # Panics
/// When something is wrong that a packet could meet.
pub fn look(maps: &FakeMaps) -> String {
    let names: BTreeMap<_, _> = maps.service_names().unwrap().into_iter().collect();
    let backends = maps.backends().unwrap();
    let snat = maps.snat_addresses().unwrap();
    let mut lines = BTreeMap::new();
    for (vip, index) in maps.vips().unwrap() {
        let key =
            parse(names.get(&index).expect("a VIP leads to a named entry")).expect("a name that is whole");
        assert_eq!(
            (SocketAddr::new(key.vip, key.port), key.protocol.number()),
            (vip.socket(), vip.protocol())
        );
        let service = maps.service(index);
        let slots = maps.slots(service.first_slot, service.slot_count()).unwrap();
        let mut line = String::new();
        if service.has(ServiceFlags::AFFINITY) {
            let timeout =
                maps.affinity_timeouts().unwrap().into_iter().find(|(service, _)| *service == index);
            write!(line, " @{}", timeout.expect("affinity has a timeout").1).unwrap();
        }
        if service.has(ServiceFlags::CONNECTION_RATE) {
            let limit = maps.connection_limits().unwrap().into_iter().find(|(service, _)| *service == index);
            let limit = limit.expect("the flag has a limit").1;
            write!(line, " ^{}/{}", limit.rate, limit.burst).unwrap();
        }
        if service.has(ServiceFlags::SOURCE_RANGES) {
            line += " <";
            let ranges = maps.source_ranges().unwrap().into_iter().filter(|(service, _)| *service == index);
            let ranges: Vec<_> = ranges.map(|(_, range)| range.to_string()).collect();
            line += &ranges.join(",");
        }
        let is_table = service.has(ServiceFlags::MAGLEV) && slots.len() > 1;
        if service.has(ServiceFlags::LEAST_CONNECTIONS) {
            line += " least";
        }
        let mut table = BTreeMap::<_, Vec<usize>>::new();
        for (place, slot) in slots.iter().enumerate() {
            let backend = maps.backend(*slot);
            assert!(*slot != 0 && backend.service == index, "{key}: slot of backend {slot}: {backend:?}");
            assert_eq!(BackendState::from_raw(backend.state), BackendState::Active, "{key}: {backend:?}");
            let last = backend.snat_first + backend.snat_count;
            assert!(snat[backend.snat_first.into()..last.into()].iter().all(|address| *address != [0; 16]));
            if is_table {
                table.entry(socket(&backend)).or_default().push(place);
            } else {
                write!(line, " {}", socket(&backend)).unwrap();
            }
        }
        for (address, places) in table {
            let sum: usize = places.iter().sum();
            write!(line, " {address} at {} places, sum {sum}", places.len()).unwrap();
        }
        let without = backends.iter().filter(|(_, backend)| backend.service == index);
        let without = without.filter(|(index, _)| !slots.contains(index)).map(|(_, backend)| backend);
        let without = without.filter(|backend| BackendState::from_raw(backend.state) != BackendState::Free);
        let mut without: Vec<_> = without.map(socket).collect();
        without.sort();
        for address in without {
            write!(line, " ({address})").unwrap();
        }
        lines.insert(key, line);
    }
    let line = |(key, line): (&ServiceKey, &String)| {
        format!("{} {}/{}:{line}\n", key.service.name, SocketAddr::new(key.vip, key.port), key.protocol)
    };
    lines.iter().map(line).collect()
}

fn socket(backend: &lb_common::abi::Backend) -> SocketAddr {
    SocketAddr::new(narrow(backend.address, backend.family).unwrap(), u16::from_be_bytes(backend.port))
}
