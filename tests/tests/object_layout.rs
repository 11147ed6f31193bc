//! The built object against the ABI that the agent relies on.

use std::collections::{BTreeMap, BTreeSet};

use aya_obj::Object;
use lb_common::abi::maps::{
    self, CALLED_PROGRAMS, COOKIE_PROGRAMS, EGRESS_PROGRAM, ENTRY_PROGRAM, INGRESS_PROGRAM, SOCKET_PROGRAMS,
    TC_CALLED_PROGRAMS, TC_COOKIE_PROGRAMS,
};
use lb_common::abi::previous::{CARRIED, VERSION};
use lb_common::abi::{
    Affinity, AffinityKey, Backend, BackendStats, CachedFlow, Config, ConnectionLimit, ConnectionRate,
    DropStats, Flow, FlowKey, Fragment, FragmentKey, Service, ServiceName, ServiceStats, SocketKey,
    SocketPeer, SourceRangeKey, Tick, VipKey,
};
use lb_common::forward::scratch::Scratch;
use pointsman_tests::object_or_skip;

type A4 = [u8; 4];
type A6 = [u8; 16];

/// BPF_OBJ_NAME_LEN, without the terminating zero.
const LONGEST_NAME: usize = 15;
/// sizeof(struct bpf_fib_lookup), include/uapi/linux/bpf.h.
const FIB_LOOKUP: usize = 64;
/// sizeof(struct bpf_devmap_val).
const DEVMAP_VALUE: usize = 8;

/// Sizes of keys and values by map.
fn layouts() -> BTreeMap<&'static str, (usize, usize)> {
    fn hash<K, V>() -> (usize, usize) {
        (size_of::<K>(), size_of::<V>())
    }
    fn array<V>() -> (usize, usize) {
        (size_of::<u32>(), size_of::<V>())
    }
    BTreeMap::from([
        ("flows_v4", hash::<FlowKey<A4>, Flow<A4>>()),
        ("flows_v6", hash::<FlowKey<A6>, Flow<A6>>()),
        ("transient_v4", hash::<FlowKey<A4>, Flow<A4>>()),
        ("transient_v6", hash::<FlowKey<A6>, Flow<A6>>()),
        ("flow_cache_v4", array::<CachedFlow<A4, [u8; 0]>>()),
        ("flow_cache_v6", array::<CachedFlow<A6, A6>>()),
        ("flow_versions", array::<u64>()),
        ("vips_v4", hash::<VipKey<A4>, u32>()),
        ("vips_v6", hash::<VipKey<A6>, u32>()),
        ("services", array::<Service>()),
        ("service_names", array::<ServiceName>()),
        ("round_robin", array::<u64>()),
        ("slots", array::<u32>()),
        ("backends", array::<Backend>()),
        ("snat_addresses", array::<A6>()),
        ("config", array::<Config>()),
        ("service_stats", array::<ServiceStats>()),
        ("backend_stats", array::<BackendStats>()),
        ("open_flows", array::<u32>()),
        ("drops", array::<DropStats>()),
        ("fragments_v4", hash::<FragmentKey<A4>, Fragment<A4>>()),
        ("fragments_v6", hash::<FragmentKey<A6>, Fragment<A6>>()),
        ("src_ranges_v4", hash::<SourceRangeKey<A4>, u32>()),
        ("src_ranges_v6", hash::<SourceRangeKey<A6>, u32>()),
        ("affinity_v4", hash::<AffinityKey<A4>, Affinity>()),
        ("affinity_v6", hash::<AffinityKey<A6>, Affinity>()),
        ("affinity_ticks", array::<Tick>()),
        ("conn_limits", array::<ConnectionLimit>()),
        ("conn_rates_v4", hash::<AffinityKey<A4>, ConnectionRate>()),
        ("conn_rates_v6", hash::<AffinityKey<A6>, ConnectionRate>()),
        ("sockets", hash::<SocketKey, SocketPeer>()),
        ("devices", (size_of::<u32>(), DEVMAP_VALUE)),
        ("programs", array::<u32>()),
        ("tc_programs", array::<u32>()),
        ("scratch_v4", array::<Scratch<A4>>()),
        ("scratch_v6", array::<Scratch<A6>>()),
        ("scratch_fib", (size_of::<u32>(), FIB_LOOKUP)),
    ])
}

#[test]
fn maps_are_those_of_the_abi() {
    let object = Object::parse(&object_or_skip!()).unwrap();
    // What is set when the object is loaded lies in a map of the object's own.
    let built: BTreeSet<_> =
        object.maps.keys().map(String::as_str).filter(|name| *name != ".rodata").collect();
    let declared: BTreeSet<_> = maps::ALL.iter().map(|map| map.name).collect();
    assert_eq!(built, declared);
    assert_eq!(declared.len(), maps::ALL.len(), "names are distinct");
    let layouts = layouts();
    for map in maps::ALL {
        assert!(map.name.len() <= LONGEST_NAME, "{} is too long a name", map.name);
        let built = &object.maps[map.name];
        assert_eq!(
            (built.key_size() as usize, built.value_size() as usize),
            layouts[map.name],
            "{}",
            map.name
        );
        assert_eq!(built.max_entries(), map.default_entries, "entries of {}", map.name);
    }
}

/// Programs of both versions use them at the same time.
#[test]
fn maps_that_outlive_an_upgrade_are_as_they_were() {
    let object = Object::parse(&object_or_skip!()).unwrap();
    for map in CARRIED {
        let built = &object.maps[map.name];
        assert_eq!(
            (built.map_type(), built.key_size(), built.value_size()),
            (map.kind as u32, map.key_size, map.value_size),
            "{} differs from that of version {VERSION}: convert its entries, or do without them",
            map.name
        );
    }
    assert_eq!(CARRIED.last().map(|map| map.name), Some(maps::CONFIG.name), "it tells that all are there");
}

#[test]
fn programs_are_those_of_the_abi() {
    let object = Object::parse(&object_or_skip!()).unwrap();
    let built: BTreeSet<_> = object.programs.keys().map(String::as_str).collect();
    let called = CALLED_PROGRAMS
        .into_iter()
        .chain(TC_CALLED_PROGRAMS)
        .chain(COOKIE_PROGRAMS)
        .chain(TC_COOKIE_PROGRAMS);
    let sockets = SOCKET_PROGRAMS.into_iter().flat_map(|program| program.variants());
    let called = called.chain(sockets);
    let declared: BTreeSet<_> = called.chain([ENTRY_PROGRAM, INGRESS_PROGRAM, EGRESS_PROGRAM]).collect();
    assert_eq!(built, declared);
    assert!(declared.iter().all(|name| name.len() <= LONGEST_NAME));
}
