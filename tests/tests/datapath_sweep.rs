//! The agent's sweep of the kernel's flow tables.

use std::fs;
use std::path::{Path, PathBuf};

use aya::maps::{Array, HashMap, MapData};
use lb_common::abi::{
    Config, FLOW_VERSION_BITS, Flow, FlowFlags, FlowKey, FlowState, FlowStatus, IPPROTO_TCP, Tick, V4, maps,
};
use lb_common::forward::cache::hash;
use lb_common::forward::scratch::Scratch;
use lb_control::dataplane::PinDirectory;
use lb_control::dataplane::collect::sweep;
use lb_control::dataplane::flows::FlowTables;
use pointsman_tests::kit::kernel::loader;
use pointsman_tests::object_or_skip;

type A4 = [u8; 4];
type Table = HashMap<MapData, FlowKey<A4>, Flow<A4>>;

/// Pins that go with the test.
struct Pins(PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

fn open<T: TryFrom<aya::maps::Map, Error = aya::maps::MapError>>(pins: &PinDirectory, map: maps::Map) -> T {
    let data = MapData::from_pin(pins.map(map)).unwrap();
    aya::maps::Map::from_map_data(data).unwrap().try_into().unwrap()
}

/// Both entries of a connection of a client with this port.
fn pair(port: u8, client_seen: Tick, backend_seen: Tick) -> [(FlowKey<A4>, Flow<A4>); 2] {
    let (client, vip, snat, backend) = ([192, 0, 2, 1], [203, 0, 113, 1], [10, 1, 0, 1], [10, 1, 0, 2]);
    let ends = |source, source_port, destination, destination_port| FlowKey {
        source,
        destination,
        source_port: [40, source_port],
        destination_port: [40, destination_port],
        protocol: IPPROTO_TCP.into(),
    };
    let entry = |out: FlowKey<A4>, flags, last_seen| Flow {
        new_source: out.source,
        new_destination: out.destination,
        new_source_port: out.source_port,
        new_destination_port: out.destination_port,
        status: FlowStatus { state: FlowState::Established as u8, flags, epoch: 0 },
        last_seen,
        ..Scratch::new([0; 4]).flow
    };
    [
        (ends(client, port, vip, 80), entry(ends(snat, port, backend, 88), 0, client_seen)),
        (ends(backend, 88, snat, port), entry(ends(vip, 80, client, port), FlowFlags::REPLY, backend_seen)),
    ]
}

#[test]
fn flows_go_by_pairs_and_copies_with_them() {
    let object = object_or_skip!();
    let root = Pins(Path::new("/sys/fs/bpf").join(format!("pointsman-sweep-{}", std::process::id())));
    let pins = PinDirectory::new(&root.0);
    fs::create_dir_all(pins.map(maps::FLOWS_V4).parent().unwrap()).unwrap();
    let mut loader = loader();
    let used = [maps::FLOWS_V4, maps::FLOWS_V6, maps::TRANSIENT_V4, maps::TRANSIENT_V6, maps::FLOW_VERSIONS];
    for map in used {
        loader.map_pin_path(map.name, pins.map(map));
    }
    let _ebpf = loader.load(&object).unwrap();
    let (mut flows, mut transient): (Table, Table) =
        (open(&pins, maps::FLOWS_V4), open(&pins, maps::TRANSIENT_V4));
    let versions: Array<MapData, u64> = open(&pins, maps::FLOW_VERSIONS);

    let (config, now) = (Config::default(), 100_000_000);
    let long_ago = now - config.timeouts[FlowState::Established as usize] - 1;
    let (over, busy, begins) =
        (pair(1, long_ago, long_ago), pair(2, long_ago, now), pair(3, long_ago, long_ago));
    // A reply entry that stayed when its client's became another flow's.
    let [_, left] = pair(4, long_ago, long_ago);
    for (key, flow) in over.iter().chain(&busy).chain([&left]) {
        flows.insert(key, flow, 0).unwrap();
    }
    for (key, flow) in &begins {
        transient.insert(key, flow, 0).unwrap();
    }

    let found = sweep(&FlowTables::open(&pins).unwrap(), now, &config, |_, _| false).unwrap();
    assert_eq!((found.kept, found.established, found.forgotten), (1, 1, 2));
    assert_eq!(found.tables["flows_v4"].entries, 2);
    assert_eq!(found.tables["transient_v4"].entries, 0);
    let keys = |table: &Table| table.keys().map(Result::unwrap).collect::<std::collections::BTreeSet<_>>();
    assert_eq!(keys(&flows), busy.map(|(key, _)| key).into());
    assert!(keys(&transient).is_empty());
    // Only what left the table of established flows may have copies.
    let mut renewed = vec![0; 1 << FLOW_VERSION_BITS];
    for key in [over[0].0, over[1].0, left.0] {
        renewed[(hash::<V4>(&key) >> (32 - FLOW_VERSION_BITS)) as usize] += 1;
    }
    for (index, renewed) in (0..).zip(renewed) {
        let version = versions.get(&index, 0).unwrap();
        assert_eq!(version, 64 * renewed, "{index}");
    }
}
