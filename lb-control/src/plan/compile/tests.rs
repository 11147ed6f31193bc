use lb_common::abi::{Backend, ConnectionLimit};

use super::*;
use crate::{
    model::{DesiredBackend, DesiredEntry, ObjectRef, Role, Severity},
    plan::compile::testing::{desired, key, look, paths},
    ports::{FakeMaps, FaultyMaps},
};

const NOW: Duration = Duration::from_secs(1000);

struct Lab {
    maps: FakeMaps,
    compiler: Compiler,
    now: Duration,
}

impl Lab {
    fn new(limits: Limits) -> Self {
        let maps = FakeMaps::new(limits);
        Self { compiler: Compiler::adopt(&maps, Settings::default()).unwrap(), maps, now: NOW }
    }

    /// Brings the maps to a state; what it took.
    fn go(&mut self, text: &str) -> Delta {
        let desired = desired(text);
        let delta =
            self.compiler.reconcile(&desired, &paths(&desired, 1), &Config::default(), Scope::All, self.now);
        let failures = apply(&delta, &mut self.maps, &mut self.compiler, self.now);
        assert!(failures.is_empty(), "{failures:?}");
        delta
    }
}

fn kinds(delta: &Delta) -> Vec<&'static str> {
    delta
        .ops()
        .map(|op| match op {
            MapOp::SetVip { .. } => "vip",
            MapOp::DeleteVip { .. } => "no-vip",
            MapOp::SetService { value, .. } if value.slot_count() == 0 => "empty",
            MapOp::SetService { .. } => "flip",
            MapOp::SetServiceName { value, .. } if value.name[0] == 0 => "no-name",
            MapOp::SetServiceName { .. } => "name",
            MapOp::AllowSource { .. } => "allow",
            MapOp::ForbidSource { .. } => "forbid",
            MapOp::SetAffinityTimeout { ticks: 0, .. } => "no-timeout",
            MapOp::SetAffinityTimeout { .. } => "timeout",
            MapOp::SetConnectionLimit { limit: ConnectionLimit { rate: 0, .. }, .. } => "no-limit",
            MapOp::SetConnectionLimit { .. } => "limit",
            MapOp::SetSlots { .. } => "slots",
            MapOp::SetBackend { value, .. } => match BackendState::from_raw(value.state) {
                BackendState::Free => "free",
                BackendState::Active => "active",
                BackendState::Terminating => "terminating",
            },
            MapOp::SetSnatAddress { .. } => "snat",
            MapOp::SetConfig { .. } => "config",
            MapOp::ClearServiceCounters { .. } => "clear-service",
            MapOp::ClearBackendCounters { .. } => "clear-backend",
        })
        .collect()
}

#[test]
fn order_of_operations() {
    let mut lab = Lab::new(Limits::default());
    for (text, expected) in [
        ("", &["config"][..]),
        ("a 1 80: .1 .2", &["snat", "active", "active", "slots", "name", "flip", "vip"]),
        ("a 1 80: .1 .2", &[]),
        ("a 1 80: .1 .2 .3", &["active", "slots", "flip"]),
        ("a 1 80: .1 .2~ .3", &["slots", "flip", "terminating"]),
        ("a 1 80: .1 .2 .3", &["active", "slots", "flip"]),
        ("a 1 80: .1 .3", &["slots", "flip", "free", "clear-backend"]),
        ("a 1 80: .1*2 .3", &["active", "slots", "flip"]),
        ("a 1 80:", &["empty", "free", "clear-backend", "free", "clear-backend"]),
        ("a 1 80: .1", &["active", "slots", "flip"]),
        // The VIP goes over to another Service: it is led there before the first one is emptied.
        (
            "b 1 80: .1",
            &[
                "active",
                "slots",
                "name",
                "flip",
                "vip",
                "empty",
                "free",
                "clear-backend",
                "clear-service",
                "no-name",
            ],
        ),
        ("", &["no-vip", "empty", "free", "clear-backend", "clear-service", "no-name"]),
        ("", &[]),
    ] {
        assert_eq!(kinds(&lab.go(text)), expected, "{text}");
    }
    assert_eq!(look(&lab.maps), "");
}

/// Ranges are there before they count, and go when they count no more; while they count, new ones
/// come before old ones go.
#[test]
fn order_of_source_ranges_limits_and_affinity() {
    let mut lab = Lab::new(Limits::default());
    lab.go("a 1 80: .1");
    for (text, expected) in [
        ("a 1 80: <10.1.0.0/16 <10.2.0.0/16 .1", &["allow", "allow", "flip"][..]),
        ("a 1 80: <10.1.0.0/16 <10.2.0.9/16 <10.2.0.0/16 .1", &[]),
        ("a 1 80: <10.3.0.0/16 <10.2.0.0/16 .1", &["allow", "forbid"]),
        ("a 1 80: <2001:db8::/32 .1", &["forbid", "forbid"]),
        ("a 1 80: <10.3.0.0/16", &["allow", "empty", "free", "clear-backend"]),
        ("a 1 80:", &["empty", "forbid"]),
        ("a 1 80: @60", &["timeout", "empty"]),
        ("a 1 80: @90", &["timeout"]),
        ("a 1 80: @90 <0.0.0.0/0", &["allow", "empty"]),
        ("a 1 80: <0.0.0.0/0", &["empty", "no-timeout"]),
        ("a 1 80: @90 <0.0.0.0/0", &["timeout", "empty"]),
        ("a 1 80: @90 <0.0.0.0/0", &[]),
        ("a 1 80: @90 ^5 <0.0.0.0/0", &["limit", "empty"]),
        ("a 1 80: @90 ^5/9 <0.0.0.0/0", &["limit"]),
        ("a 1 80: @90 <0.0.0.0/0", &["empty", "no-limit"]),
        ("a 1 80: @90 ^5/9 <0.0.0.0/0", &["limit", "empty"]),
        ("", &["no-vip", "empty", "forbid", "no-timeout", "no-limit", "clear-service", "no-name"]),
    ] {
        assert_eq!(kinds(&lab.go(text)), expected, "{text}");
    }
    assert_eq!((lab.maps.source_ranges().unwrap(), lab.maps.affinity_timeouts().unwrap()), (vec![], vec![]));
    assert_eq!(lab.maps.connection_limits().unwrap(), []);
}

#[test]
fn ranges_of_the_other_family_let_nobody_in() {
    let mut lab = Lab::new(Limits::default());
    lab.go("a 1 80: <2001:db8::/32 .1");
    assert_eq!(look(&lab.maps), "a 192.0.2.1:80/TCP: < 10.0.0.1:8080\n");
    assert!(!lab.maps.is_allowed(0, IpAddr::from([10, 1, 0, 1])));
}

#[test]
fn ranges_and_timeouts_are_adopted_and_repaired() {
    let mut lab = Lab::new(Limits::default());
    let text = "a 1 80: @60 ^7 <10.1.0.0/16 .1\nb 2 80: .1";
    lab.go(text);
    let before = look(&lab.maps);
    lab.compiler = Compiler::adopt(&lab.maps, Settings::default()).unwrap();
    assert_eq!(kinds(&lab.go(text)), [""; 0]);
    // By somebody's hand: of the entry, of another one, of none.
    let range: ipnet::IpNet = "10.9.0.0/16".parse().unwrap();
    for op in [
        MapOp::ForbidSource { service: 0, range: "10.1.0.0/16".parse().unwrap() },
        MapOp::AllowSource { service: 0, range },
        MapOp::AllowSource { service: 1, range },
        MapOp::AllowSource { service: 9, range },
        MapOp::SetAffinityTimeout { service: 0, ticks: 1 },
        MapOp::SetAffinityTimeout { service: 9, ticks: 1 },
        MapOp::SetConnectionLimit { service: 0, limit: ConnectionLimit { rate: 7, burst: 1 } },
        MapOp::SetConnectionLimit { service: 9, limit: ConnectionLimit { rate: 7, burst: 1 } },
    ] {
        lab.maps.apply(&op).unwrap();
    }
    lab.compiler.reload(&lab.maps).unwrap();
    assert_eq!(
        kinds(&lab.go(text)),
        ["timeout", "limit", "allow", "forbid", "forbid", "forbid", "no-timeout", "no-limit"]
    );
    assert_eq!(look(&lab.maps), before);
    assert_eq!(lab.maps.source_ranges().unwrap().len(), 1);
}

/// An index whose owner is gone must not let that one's clients in for the next.
#[test]
fn a_reused_index_has_no_ranges_of_its_last_owner() {
    let mut lab = Lab::new(Limits { services: 1, ..Limits::default() });
    lab.go("a 1 80: @60 <10.1.0.0/16 .1");
    lab.go("");
    lab.now += Duration::from_secs(3);
    // The agent that removed it had died before it had removed the range.
    lab.maps.apply(&MapOp::AllowSource { service: 0, range: "10.1.0.0/16".parse().unwrap() }).unwrap();
    lab.compiler.reload(&lab.maps).unwrap();
    let delta = lab.go("b 2 80: <10.2.0.0/16 .1");
    assert_eq!(kinds(&delta), ["active", "slots", "forbid", "allow", "name", "flip", "vip"]);
    assert_eq!(look(&lab.maps), "b 192.0.2.2:80/TCP: <10.2.0.0/16 10.0.0.1:8080\n");
}

/// Without room for all ranges, those clients are dropped that have none: never all let in.
#[test]
fn a_full_map_of_ranges_opens_nothing() {
    let mut lab = Lab::new(Limits { source_ranges_v4: 2, ..Limits::default() });
    let delta = lab.go("a 1 80: <10.1.0.0/16 <10.2.0.0/16 <10.3.0.0/16 .1\nb 2 80: .1");
    assert!(
        delta.problems[0].message.starts_with("the map src_ranges_v4 is full (2 entries): 1 of 3"),
        "{delta:?}"
    );
    assert_eq!(
        look(&lab.maps),
        "a 192.0.2.1:80/TCP: <10.1.0.0/16,10.2.0.0/16 10.0.0.1:8080\nb 192.0.2.2:80/TCP: 10.0.0.1:8080\n"
    );
    // Others take their place: there is room once the old ones are gone.
    let text = "a 1 80: <10.4.0.0/16 <10.5.0.0/16 .1";
    assert_eq!(lab.go(text).problems.len(), 1);
    assert!(lab.go(text).problems.is_empty());
    assert_eq!(look(&lab.maps), "a 192.0.2.1:80/TCP: <10.4.0.0/16,10.5.0.0/16 10.0.0.1:8080\n");
}

#[test]
fn what_is_left_in_the_maps() {
    let mut lab = Lab::new(Limits::default());
    lab.go("a 1 80: .1 .2\nb 2 53/UDP: .1*2 .9 .8~");
    assert_eq!(
        look(&lab.maps),
        "a 192.0.2.1:80/TCP: 10.0.0.1:8080 10.0.0.2:8080\n\
         b 192.0.2.2:53/UDP: 10.0.0.1:8080 10.0.0.9:8080 10.0.0.1:8080 (10.0.0.8:8080)\n"
    );
}

#[test]
fn survivors_keep_their_place() {
    let mut lab = Lab::new(Limits::default());
    lab.go("a 1 80: .1 .2 .3");
    let places = |lab: &Lab| {
        ["10.0.0.1:8080", "10.0.0.3:8080"]
            .map(|address| lab.compiler.backend_index(&key("a 1 80"), &address.parse().unwrap()))
    };
    let before = places(&lab);
    lab.go("a 1 80: .0 .1 .3 .4");
    assert_eq!(before, places(&lab));
    lab.compiler = Compiler::adopt(&lab.maps, Settings::default()).unwrap();
    assert!(lab.go("a 1 80: .0 .1 .3 .4").is_empty());
    assert_eq!(before, places(&lab));
}

#[test]
fn indices_rest_until_flows_are_purged() {
    let mut lab = Lab::new(Limits { backends: 3, ..Limits::default() });
    lab.go("a 1 80: .1 .2");
    lab.go("a 1 80: .1");
    let freed = lab.compiler.freed_backends();
    assert_eq!(freed.len(), 1);
    let generation = lab.maps.backend(freed[0]).generation;
    assert_eq!(generation, 2);
    let delta = lab.go("a 1 80: .1 .3");
    assert!(delta.problems[0].message.starts_with("the map backends is full (3 entries): 1 of 2 backends"));
    assert_eq!(look(&lab.maps), "a 192.0.2.1:80/TCP: 10.0.0.1:8080\n");
    lab.compiler.flows_purged(&freed);
    lab.go("a 1 80: .1 .3");
    assert_eq!(lab.maps.backend(freed[0]).generation, generation);
    assert_eq!(look(&lab.maps), "a 192.0.2.1:80/TCP: 10.0.0.1:8080 10.0.0.3:8080\n");
}

#[test]
fn slots_rest_for_the_grace_time() {
    let mut lab = Lab::new(Limits { slots: 4, ..Limits::default() });
    lab.go("a 1 80: .1 .2");
    lab.go("a 1 80: .1 .3");
    // Four slots are in use or resting: .2 must not take connections, .4 cannot yet.
    let delta = lab.go("a 1 80: .3 .4");
    assert!(delta.problems[0].message.starts_with("the map slots is full"), "{delta:?}");
    assert_eq!(delta.retry_at, Some(NOW + Duration::from_secs(2)));
    assert_eq!(look(&lab.maps), "a 192.0.2.1:80/TCP: 10.0.0.3:8080 10.0.0.3:8080 (10.0.0.4:8080)\n");
    lab.now = delta.retry_at.unwrap();
    assert!(lab.go("a 1 80: .3 .4").problems.is_empty());
    assert_eq!(look(&lab.maps), "a 192.0.2.1:80/TCP: 10.0.0.3:8080 10.0.0.4:8080\n");
}

#[test]
fn limits_stop_one_service_and_not_the_others() {
    let mut lab = Lab::new(Limits { services: 2, ..Limits::default() });
    let delta = lab.go("a 1 80: .1\nb 2 80: .1\nc 3 80: .1");
    assert_eq!(delta.problems.len(), 1);
    assert_eq!(delta.problems[0].object.as_ref().unwrap().name, "c");
    assert_eq!(look(&lab.maps).lines().count(), 2);
    let delta = lab.go("b 2 80: .1\nc 3 80: .1");
    lab.now = delta.retry_at.unwrap();
    assert!(lab.go("b 2 80: .1\nc 3 80: .1").problems.is_empty());

    let mut lab = Lab::new(Limits { vips_v4: 1, ..Limits::default() });
    let delta = lab.go("a 1 80: .1\nb 2 80: .1");
    assert_eq!(delta.problems[0].object.as_ref().unwrap().name, "b");

    let mut lab = Lab::new(Limits { snat_addresses: 0, ..Limits::default() });
    assert!(lab.go("a 1 80: .1").problems[0].message.starts_with("the map snat_addresses is full"));
}

#[test]
fn two_services_with_one_vip_are_refused() {
    let mut lab = Lab::new(Limits::default());
    let delta = lab.go("a 1 80: .1\nb 1 80: .2");
    assert!(delta.problems[0].message.contains("already served for Service default/a"), "{delta:?}");
    assert_eq!(look(&lab.maps), "a 192.0.2.1:80/TCP: 10.0.0.1:8080\n");
}

#[test]
fn a_path_that_changes_is_written_in_place() {
    let mut lab = Lab::new(Limits::default());
    lab.go("a 1 80: .1 .2");
    let desired = desired("a 1 80: .1 .2");
    let paths = paths(&desired, 2);
    let services = BTreeSet::from([ObjectRef::new("default", "a")]);
    let config = Config::default();
    let delta = lab.compiler.reconcile(&desired, &paths, &config, Scope::Services(&services), lab.now);
    assert_eq!(kinds(&delta), ["snat", "active", "active"]);
    assert!(apply(&delta, &mut lab.maps, &mut lab.compiler, lab.now).is_empty());
    assert_eq!(lab.maps.backend(1).next_hop.ifindex, 2);
    assert_eq!(lab.maps.backend(1).snat_first, 1);
}

#[test]
fn an_unreachable_backend_has_its_place_all_the_same() {
    let mut lab = Lab::new(Limits::default());
    let desired = desired("a 1 80: .1");
    let delta = lab.compiler.reconcile(&desired, &Paths::new(), &Config::default(), Scope::All, NOW);
    assert!(apply(&delta, &mut lab.maps, &mut lab.compiler, NOW).is_empty());
    let backend: Backend = lab.maps.backend(1);
    assert_eq!((backend.next_hop.ifindex, backend.snat_count), (0, 0));
}

#[test]
fn a_failed_batch_holds_up_only_what_needs_it() {
    let mut maps = FaultyMaps::new(FakeMaps::new(Limits::default()), [1]);
    let mut compiler = Compiler::adopt(&maps, Settings::default()).unwrap();
    let mut round = |maps: &mut FaultyMaps<FakeMaps>| {
        let desired = desired("a 1 80: .1\nb 2 80: .2");
        let delta = compiler.reconcile(&desired, &paths(&desired, 1), &Config::default(), Scope::All, NOW);
        apply(&delta, maps, &mut compiler, NOW)
    };
    // Write 1 is the source address, which b needs as well.
    let failures = round(&mut maps);
    assert_eq!(failures.len(), 2);
    assert!(failures[1].error.to_string().contains("default/a TCP 192.0.2.1:80"), "{failures:?}");
    assert_eq!(look(&maps.inner), "");
    assert!(round(&mut maps).is_empty());
    assert_eq!(look(&maps.inner).lines().count(), 2);
}

/// Not a benchmark: it shows that the cost of one change does not grow with the rest.
#[test]
fn one_change_among_many_is_one_change() {
    let mut desired = Desired::default();
    for number in 0..2_000u32 {
        let mut key = key(&format!("s{number} 1 80"));
        key.vip = IpAddr::from((0xc0a8_0000u32 + number).to_be_bytes());
        let backends = (0..10u8).map(|last| {
            let address = SocketAddr::new(IpAddr::from([10, 0, 0, last]), 8080);
            (address, DesiredBackend { weight: 1, role: Role::Active, local: false })
        });
        desired.entries.insert(key, DesiredEntry { backends: backends.collect(), ..DesiredEntry::default() });
    }
    let mut maps = FakeMaps::new(Limits::default());
    let mut compiler = Compiler::adopt(&maps, Settings::default()).unwrap();
    let paths = paths(&desired, 1);
    let all = compiler.reconcile(&desired, &paths, &Config::default(), Scope::All, NOW);
    assert!(apply(&all, &mut maps, &mut compiler, NOW).is_empty());
    assert_eq!(maps.vips().unwrap().len(), 2_000);
    let (key, entry) = desired.entries.iter_mut().nth(1_000).unwrap();
    entry.backends.pop_first();
    let services = BTreeSet::from([key.service.clone()]);
    let one = compiler.reconcile(&desired, &paths, &Config::default(), Scope::Services(&services), NOW);
    assert_eq!(kinds(&one), ["slots", "flip", "free", "clear-backend"]);
}

#[test]
fn a_backend_on_this_node_needs_no_way() {
    let mut lab = Lab::new(Limits::default());
    let mut desired = desired("web 1 80: .1 .2 .3");
    let mut paths = paths(&desired, 1);
    // One is known to be here by the node of its endpoint, another by its route.
    let backends = &mut desired.entries.get_mut(&key("web 1 80")).unwrap().backends;
    let mut addresses = backends.keys().copied().collect::<Vec<_>>().into_iter();
    backends.get_mut(&addresses.next().unwrap()).unwrap().local = true;
    Arc::make_mut(paths.get_mut(&addresses.next().unwrap().ip()).unwrap()).is_local = true;
    let mut go = |desired: &Desired, paths: &Paths| {
        let delta = lab.compiler.reconcile(desired, paths, &Config::default(), Scope::All, lab.now);
        assert!(apply(&delta, &mut lab.maps, &mut lab.compiler, lab.now).is_empty());
        let backends = lab.maps.backends().unwrap().into_iter();
        backends
            .map(|(_, backend)| {
                (backend.is_local(), backend.snat_count, backend.next_hop.ifindex, backend.generation)
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(go(&desired, &paths), [(true, 0, 0, 1), (true, 0, 0, 1), (false, 1, 1, 1)]);
    // The route leads elsewhere by now: it is still the same backend.
    for path in paths.values_mut() {
        Arc::make_mut(path).is_local = false;
    }
    assert_eq!(go(&desired, &paths), [(true, 0, 0, 1), (false, 1, 1, 1), (false, 1, 1, 1)]);
}

/// How many slots each backend of the one Service has.
fn places(lab: &Lab) -> BTreeMap<u32, usize> {
    let (_, service) = lab.maps.services().unwrap()[0];
    let mut places = BTreeMap::new();
    for slot in lab.maps.slots(service.first_slot, service.slot_count()).unwrap() {
        *places.entry(slot).or_default() += 1;
    }
    places
}

#[test]
fn a_new_backend_starts_slowly() {
    let mut lab = Lab::new(Limits::default());
    lab.go("a 1 80: %30s .1 .2");
    assert_eq!((places(&lab), lab.compiler.next_step()), (BTreeMap::from([(1, 1), (2, 1)]), None));
    let text = "a 1 80: %30s .1 .2 .3*2";
    lab.go(text);
    for (step, share) in [(0, 2), (1, 4), (2, 6), (3, 8), (4, 10)] {
        let divisor = if step == 4 { 10 } else { 2 };
        let expected = BTreeMap::from([(1, 10 / divisor), (2, 10 / divisor), (3, share / divisor)]);
        assert_eq!(places(&lab), expected, "step {step}");
        assert!(lab.go(text).is_empty(), "nothing to do before the next");
        lab.now = lab.compiler.next_step().expect("another step");
        assert_eq!(lab.compiler.take_due(lab.now).len(), 1);
        lab.go(text);
    }
    lab.now += Duration::from_secs(30);
    lab.go(text);
    assert_eq!((places(&lab), lab.compiler.next_step()), (BTreeMap::from([(1, 1), (2, 1), (3, 2)]), None));
}

#[test]
fn least_connections_compare_by_weights_that_grow() {
    let mut lab = Lab::new(Limits::default());
    lab.go("a 1 80: !least-connections %30s .1*3");
    lab.go("a 1 80: !least-connections %30s .1*3 .2");
    let weights = |lab: &Lab| [1, 2].map(|index| lab.maps.backend(index).weight);
    assert_eq!((weights(&lab), places(&lab).len()), ([30, 1], 2));
    lab.now += Duration::from_secs(30);
    lab.go("a 1 80: !least-connections %30s .1*3 .2");
    assert_eq!(weights(&lab), [3, 1]);
}

#[test]
fn a_table_without_room_is_done_without() {
    let mut lab = Lab::new(Limits { slots: 1_500, ..Limits::default() });
    lab.go("a 1 80: !maglev .1 .2");
    assert_eq!(places(&lab), BTreeMap::from([(1, 511), (2, 510)]));
    let delta = lab.go("a 1 80: !maglev .1 .2 .3");
    assert!(delta.problems.is_empty(), "changed in place: {:?}", delta.problems);
    assert_eq!(places(&lab).len(), 3);
    let two = "a 1 80: !maglev .1 .2 .3\nb 2 80: !maglev .1 .2";
    let delta = lab.go(two);
    let [problem] = &delta.problems[..] else { panic!("{:?}", delta.problems) };
    assert_eq!(problem.severity, Severity::Warning);
    assert!(problem.message.contains("no room for the lookup table of default/b"), "{problem}");
    assert!(look(&lab.maps).ends_with("b 192.0.2.2:80/TCP: 10.0.0.1:8080 10.0.0.2:8080\n"));
    // It is served: nothing is tried again before somebody else gives back enough.
    assert_eq!((delta.retry_at, lab.compiler.next_step()), (None, None));
    lab.go("a 1 80: !maglev .1 .2 .3\nb 2 80: !maglev .1 .2 .4");
    let at = lab.compiler.next_step().expect("three slots rest");
    assert_eq!((lab.compiler.take_due(at), lab.compiler.next_step()), (BTreeSet::new(), None));
    let delta = lab.go("b 2 80: !maglev .1 .2 .4");
    assert_eq!((delta.problems.len(), delta.retry_at), (1, None));
    lab.now = lab.compiler.next_step().expect("the table rests");
    assert_eq!(lab.compiler.take_due(lab.now), BTreeSet::from([ObjectRef::new("default", "b")]));
    assert!(lab.go("b 2 80: !maglev .1 .2 .4").problems.is_empty());
    assert_eq!(lab.compiler.next_step(), None);
    assert!(look(&lab.maps).contains("10.0.0.1:8080 at"), "{}", look(&lab.maps));
}
