//! The agent's view of the kernel's maps does what its double does.

use std::collections::BTreeSet;

use lb_common::abi::ConnectionLimit;
use lb_control::{
    dataplane::KernelMaps,
    ports::{FakeMaps, Limits, MapOp, MapStore},
};
use pointsman_tests::kit::kernel::loader;
use pointsman_tests::object_or_skip;

/// Both stores after the same operations must say the same.
fn agree(kernel: &mut KernelMaps, fake: &mut FakeMaps, ops: &[MapOp]) {
    for op in ops {
        kernel.apply(op).unwrap();
        fake.apply(op).unwrap();
    }
    let ranges =
        |store: &dyn MapStore| -> BTreeSet<_> { store.source_ranges().unwrap().into_iter().collect() };
    assert_eq!(ranges(kernel), ranges(fake));
    assert_eq!(kernel.affinity_timeouts().unwrap(), fake.affinity_timeouts().unwrap());
    assert_eq!(kernel.connection_limits().unwrap(), fake.connection_limits().unwrap());
}

#[test]
fn what_services_ask_of_clients() {
    let mut ebpf = loader().load(&object_or_skip!()).unwrap();
    let open = |map: lb_common::abi::maps::Map| {
        ebpf.take_map(map.name).ok_or_else(|| anyhow::anyhow!("no map {}", map.name))
    };
    let mut kernel = KernelMaps::new(open).unwrap();
    let mut fake = FakeMaps::new(Limits::default());
    assert_eq!((kernel.limits().source_ranges_v4, kernel.limits().source_ranges_v6), (16_384, 16_384));
    let allow = |service, range: &str| MapOp::AllowSource { service, range: range.parse().unwrap() };
    let forbid = |service, range: &str| MapOp::ForbidSource { service, range: range.parse().unwrap() };
    let timeout = |service, ticks| MapOp::SetAffinityTimeout { service, ticks };
    let ranges =
        ["0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/16", "10.0.0.7/32", "::/0", "2001:db8::/33", "2001:db8::1/128"];
    // Twice the same, of several Services whose indices differ in one byte each.
    for service in [0, 1, 0x0100, 0x0001_0000, u32::MAX] {
        let ops: Vec<_> = ranges.iter().chain(&ranges).map(|range| allow(service, range)).collect();
        agree(&mut kernel, &mut fake, &ops);
    }
    agree(&mut kernel, &mut fake, &[timeout(3, 7), timeout(5, u32::MAX), timeout(3, 0)]);
    let limit =
        |service, rate| MapOp::SetConnectionLimit { service, limit: ConnectionLimit { rate, burst: rate } };
    agree(&mut kernel, &mut fake, &[limit(3, 7), limit(5, u32::MAX), limit(3, 0)]);
    // What is not there is no error; what is there twice goes at once.
    for range in ranges {
        agree(&mut kernel, &mut fake, &[forbid(1, range), forbid(1, range), forbid(2, range)]);
    }
    assert_eq!(kernel.source_ranges().unwrap().len(), 4 * ranges.len());
}

#[test]
fn a_full_map_of_ranges_is_an_error_that_names_it() {
    let mut loader = loader();
    loader.map_max_entries("src_ranges_v4", 2);
    let mut ebpf = loader.load(&object_or_skip!()).unwrap();
    let open = |map: lb_common::abi::maps::Map| {
        ebpf.take_map(map.name).ok_or_else(|| anyhow::anyhow!("no map {}", map.name))
    };
    let mut kernel = KernelMaps::new(open).unwrap();
    assert_eq!(kernel.limits().source_ranges_v4, 2);
    let allow = |range: &str| MapOp::AllowSource { service: 1, range: range.parse().unwrap() };
    kernel.apply(&allow("10.0.0.0/8")).unwrap();
    kernel.apply(&allow("10.1.0.0/16")).unwrap();
    let error = kernel.apply(&allow("10.2.0.0/16")).unwrap_err();
    assert!(format!("{error:#}").contains("src_ranges_v4"), "{error:#}");
    kernel.apply(&MapOp::ForbidSource { service: 1, range: "10.1.0.0/16".parse().unwrap() }).unwrap();
    kernel.apply(&allow("10.2.0.0/16")).unwrap();
}
