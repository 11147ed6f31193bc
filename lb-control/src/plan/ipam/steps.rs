//! What changes come to, one after the other.

use super::{world::World, *};

const CLUSTER: Options = Options { default_class: true, outside_pools: false, deferred_release: true };
const FILES: Options = Options { default_class: true, outside_pools: true, deferred_release: false };

/// Tells of changes, then compares the beginnings of lines, step by step.
fn run(options: Options, steps: &[(&[&str], &[&str])]) {
    let mut world = World::new(options);
    for (number, (changes, expected)) in steps.iter().enumerate() {
        changes.iter().for_each(|change| world.tell(change));
        world.ipam.settle();
        let got = world.lines();
        assert_eq!(got.len(), expected.len(), "step {number}: {got:#?}");
        for (got, expected) in got.iter().zip(*expected) {
            assert!(got.starts_with(expected), "step {number}\n got      {got}\n expected {expected}");
        }
    }
}

macro_rules! steps {
    ($($name:ident($options:expr): $([$($change:expr),*] => [$($line:expr),*];)+)+) => {
        $(#[test] fn $name() { run($options, &[$((&[$($change),*], &[$($line),*])),+]); })+
    };
}

steps! {
    whoever_waits_gets_what_is_released(FILES):
        ["pool p 192.0.2.1/32", "+ a", "+ b", "+ c"] => ["a 192.0.2.1(p)", "b NoFreeAddress", "c NoFreeAddress"];
        ["- a"] => ["b 192.0.2.1(p)", "c NoFreeAddress"];
        ["- b", "+ a"] => ["a NoFreeAddress", "c 192.0.2.1(p)"];
        ["pool p 192.0.2.0/31"] => ["a 192.0.2.0(p)", "c 192.0.2.1(p)"];

    a_request_goes_before_those_who_wait(FILES):
        ["pool p 192.0.2.1/32", "+ a", "+ b"] => ["a 192.0.2.1(p)", "b NoFreeAddress"];
        ["- a", "+ z ip=192.0.2.1"] => ["b NoFreeAddress", "z 192.0.2.1(p)"];

    released_addresses_only(CLUSTER):
        ["pool p 192.0.2.1/32", "+ a", "+ b"] => ["a 192.0.2.1(p)", "b NoFreeAddress"];
        ["+ a deleting=1"] => ["b NoFreeAddress"];
        ["- a"] => ["b NoFreeAddress"];
        ["released a"] => ["b 192.0.2.1(p)"];
        ["released b"] => ["b 192.0.2.1(p)"];
        ["+ b class=other/lb", "+ c ip=192.0.2.1"] => ["c AddressInUse !192.0.2.1 is held by Service default/b"];
        ["+ b"] => ["b 192.0.2.1(p)", "c AddressInUse"];
        ["+ b type=ClusterIP"] => ["c AddressInUse"];
        ["released b"] => ["c 192.0.2.1(p)"];

    adopted_from_one_who_is_gone(CLUSTER):
        ["adopt gone 192.0.2.0", "adopt a 192.0.2.0", "pool p 192.0.2.0/31", "+ a share=k", "+ b share=k ports=81/TCP"]
            => ["a 192.0.2.0(p)", "b 192.0.2.1(p)"];
        ["released gone", "+ c share=k ports=82/TCP"] => ["a 192.0.2.0(p)", "b 192.0.2.1(p)", "c 192.0.2.0(p)"];

    deferred_until_the_last_of_a_group(CLUSTER):
        ["pool p 192.0.2.1/32", "+ a share=k", "+ b share=k ports=81/TCP", "+ c"]
            => ["a 192.0.2.1(p)", "b 192.0.2.1(p)", "c NoFreeAddress"];
        ["- a", "released a"] => ["b 192.0.2.1(p)", "c NoFreeAddress"];
        ["- b"] => ["c NoFreeAddress"];
        ["released b"] => ["c 192.0.2.1(p)"];

    two_change_places(CLUSTER):
        ["pool p 192.0.2.0/24", "+ a ip=192.0.2.1", "+ b ip=192.0.2.2"] => ["a 192.0.2.1(p)", "b 192.0.2.2(p)"];
        ["+ a ip=192.0.2.2"] => ["a 192.0.2.1(p) AddressInUse", "b 192.0.2.2(p)"];
        ["+ b ip=192.0.2.1"] => ["a 192.0.2.2(p)", "b 192.0.2.1(p)"];

    three_change_places_at_once(FILES):
        ["+ a ip=192.0.2.1", "+ b ip=192.0.2.2", "+ c ip=192.0.2.3"]
            => ["a 192.0.2.1(-)", "b 192.0.2.2(-)", "c 192.0.2.3(-)"];
        ["+ a ip=192.0.2.2", "+ b ip=192.0.2.3", "+ c ip=192.0.2.1"]
            => ["a 192.0.2.2(-)", "b 192.0.2.3(-)", "c 192.0.2.1(-)"];

    nobody_is_made_to_move(CLUSTER):
        ["pool p 192.0.2.0/24", "+ a ip=192.0.2.1", "+ b"] => ["a 192.0.2.1(p)", "b 192.0.2.0(p)"];
        ["+ a ip=192.0.2.0"] => ["a 192.0.2.1(p) AddressInUse", "b 192.0.2.0(p)"];

    a_group_splits(CLUSTER):
        ["pool p 192.0.2.0/24", "+ a share=k", "+ b share=k ports=81/TCP", "+ c share=k ports=82/TCP"]
            => ["a 192.0.2.0(p)", "b 192.0.2.0(p)", "c 192.0.2.0(p)"];
        ["+ a share=l"] => ["a 192.0.2.1(p)", "b 192.0.2.0(p)", "c 192.0.2.0(p)"];
        ["+ b share=l ports=81/TCP"] => ["a 192.0.2.1(p)", "b 192.0.2.1(p)", "c 192.0.2.0(p)"];
        ["+ c share=k ports=80/TCP", "+ b share=l ports=80/TCP"] => ["a 192.0.2.1(p)", "b 192.0.2.2(p)", "c 192.0.2.0(p)"];

    a_whole_group_changes_its_key(CLUSTER):
        ["pool p 192.0.2.0/24", "+ a share=k", "+ b share=k ports=81/TCP"] => ["a 192.0.2.0(p)", "b 192.0.2.0(p)"];
        ["+ a share=l", "+ b share=l ports=81/TCP"] => ["a 192.0.2.0(p)", "b 192.0.2.0(p)"];

    whoever_clashes_by_its_own_change_goes(CLUSTER):
        ["pool p 192.0.2.0/31", "+ a share=k", "+ b share=k ports=81/TCP", "+ c"]
            => ["a 192.0.2.0(p)", "b 192.0.2.0(p)", "c 192.0.2.1(p)"];
        ["+ b share=k ports=80/TCP", "pool p 192.0.2.0/31 priority=3"]
            => ["a 192.0.2.0(p)", "b NoFreeAddress", "c 192.0.2.1(p)"];
        ["+ a share=k ports=90/TCP"] => ["a 192.0.2.0(p)", "b 192.0.2.0(p)", "c 192.0.2.1(p)"];

    sharing_under_local_asks_for_the_same_endpoints(CLUSTER):
        ["pool p 192.0.2.9/32", "+ a share=k local=app:x", "+ b share=k local=app:x ports=81/TCP"]
            => ["a 192.0.2.9(p)", "b 192.0.2.9(p)"];
        ["+ c share=k local=app:y ports=82/TCP ip=192.0.2.9"]
            => ["a 192.0.2.9(p)", "b 192.0.2.9(p)", "c SharingRefused !192.0.2.9 is held by Service default/a; with externalTrafficPolicy Local"];
        ["+ c share=k ports=82/TCP ip=192.0.2.9"] => ["a 192.0.2.9(p)", "b 192.0.2.9(p)", "c SharingRefused"];
        ["- c", "+ other/c share=k local=app:x ports=82/TCP ip=192.0.2.9"] => ["a 192.0.2.9(p)", "b 192.0.2.9(p)", "other/c SharingRefused"];
        ["- other/c", "+ a share=k local=-", "+ b share=k local=- ports=81/TCP"] => ["a NoFreeAddress", "b 192.0.2.9(p)"];

    sharing_across_namespaces(CLUSTER):
        ["pool p 192.0.2.9/32", "+ a share=k", "+ other/b share=k ports=81/TCP"] => ["a 192.0.2.9(p)", "other/b 192.0.2.9(p)"];
        ["pool p 192.0.2.9/32 namespaces=other", "+ c share=k ports=82/TCP"]
            => ["a 192.0.2.9(p) Draining", "c FamilyUnavailable", "other/b 192.0.2.9(p)"];

    pools_serve_whom_they_list(CLUSTER):
        ["pool gold 192.0.2.0/24 namespaces=rich priority=9", "pool all 198.51.100.0/24 priority=1", "+ rich/a", "+ b"]
            => ["b 198.51.100.0(all)", "rich/a 192.0.2.0(gold)"];
        ["+ c pool=gold", "+ d ip=192.0.2.7"]
            => ["b 198.51.100.0(all)",
                "c PoolNotAllowed !AddressPool gold does not serve this Service, by its labels or its namespace default",
                "d PoolNotAllowed !192.0.2.7 cannot be had: AddressPool gold does not serve this Service, by its labels or its namespace default",
                "rich/a 192.0.2.0(gold)"];
        ["pool gold 192.0.2.0/24 namespaces=rich,default"]
            => ["b 198.51.100.0(all)", "c 192.0.2.1(gold)", "d 192.0.2.7(gold)", "rich/a 192.0.2.0(gold)"];

    theft_is_refused_before_it_learns_anything(CLUSTER):
        ["pool gold 192.0.2.0/24 namespaces=rich", "+ rich/a share=k", "+ b ip=192.0.2.0 share=k ports=81/TCP"]
            => ["b PoolNotAllowed", "rich/a 192.0.2.0(gold)"];

    labels_of_a_namespace_change(CLUSTER):
        ["pool gold 192.0.2.0/24 in=tier:gold", "+ x/a", "+ y/a"] => ["x/a FamilyUnavailable", "y/a FamilyUnavailable"];
        ["namespace x tier:gold"] => ["x/a 192.0.2.0(gold)", "y/a FamilyUnavailable"];
        ["namespace x tier:tin", "namespace y tier:gold"] => ["x/a 192.0.2.0(gold) Draining", "y/a 192.0.2.1(gold)"];

    labels_of_a_service_change(CLUSTER):
        ["pool web 192.0.2.0/24 for=app:web", "+ a labels=app:web"] => ["a 192.0.2.0(web)"];
        ["+ a labels=app:db"] => ["a 192.0.2.0(web) Draining"];
        ["- a", "released a"] => [];
        ["+ a labels=app:db"] => ["a FamilyUnavailable"];

    metallb_without_priority_comes_last(CLUSTER):
        ["pool a 192.0.2.0/24 metallb=m", "pool b 198.51.100.0/24 metallb=m priority=7", "+ s", "+ t pool=a"]
            => ["s 198.51.100.0(metallb.io/m/b)", "t 192.0.2.0(metallb.io/m/a)"];

    migration_from_metallb_keeps_addresses(CLUSTER):
        ["pool a 192.0.2.0/24 metallb=m", "+ s pool=a"] => ["s 192.0.2.0(metallb.io/m/a)"];
        ["pool a 192.0.2.0/24"] => ["s 192.0.2.0(a)", "!overlaps AddressPool a; a is set aside"];
        ["-pool metallb.io/m/a"] => ["s 192.0.2.0(a)"];

    draining(CLUSTER):
        ["pool p 192.0.2.0/31", "+ a", "+ b"] => ["a 192.0.2.0(p)", "b 192.0.2.1(p)"];
        ["pool p 192.0.2.0/31 disabled", "- b", "released b", "+ c", "+ d pool=p"]
            => ["a 192.0.2.0(p) Draining !AddressPool p is disabled; 192.0.2.0 is kept",
                "c FamilyUnavailable !no pool that assigns automatically has IPv4 addresses for this Service: AddressPool p is disabled; change that",
                "d PoolNotAllowed"];
        ["pool p 198.51.100.0/32", "- d", "released d"]
            => ["a 192.0.2.0(-) Draining !192.0.2.0 is in no AddressPool any more; it is kept", "c 198.51.100.0(p)"];
        ["-pool p"] => ["a 192.0.2.0(-) Draining", "c 198.51.100.0(-) Draining"];
        ["pool p 192.0.2.0/31"] => ["a 192.0.2.0(p)", "c 198.51.100.0(-) Draining"];

    overlap_heals(CLUSTER):
        ["pool a 192.0.2.0/24", "pool b 192.0.2.128/25", "pool c 192.0.2.0/23 namespaces=x", "+ s pool=b"]
            => ["s NoSuchPool !AddressPool b is set aside: it overlaps AddressPool a", "!overlaps AddressPool a; b", "!overlaps AddressPool a; c"];
        ["pool a 192.0.2.0/25"] => ["s 192.0.2.128(b)", "!overlaps AddressPool a; c"];
        ["pool a 192.0.2.0/24"] => ["s 192.0.2.128(a) ", "!overlaps AddressPool a; b", "!overlaps AddressPool a; c"];
        ["-pool a"] => ["s 192.0.2.128(b)", "!overlaps AddressPool b; c"];

    whoever_waits_hears_which_pools_are_shut(CLUSTER):
        ["pool a 192.0.2.0/24 disabled", "pool b 192.0.2.128/25", "pool c 198.51.100.0/24 disabled namespaces=x", "+ s"]
            => ["s FamilyUnavailable !no pool that assigns automatically has IPv4 addresses for this Service: AddressPool a is disabled, AddressPool b is set aside: it overlaps AddressPool a; change that, or add some to another", "!overlaps AddressPool a; b"];
        ["-pool b", "pool a 2001:db8::/64 disabled"] => ["s FamilyUnavailable !no pool that assigns automatically has IPv4 addresses for this Service: add some to an AddressPool"];

    dual_stack_in_place(CLUSTER):
        ["pool p 192.0.2.0/24 2001:db8::/64", "+ a order=IPv6"] => ["a 2001:db8::(p)"];
        ["+ a order=IPv6,IPv4 families=prefer"] => ["a 2001:db8::(p) 192.0.2.0(p)"];
        ["+ a order=IPv6,IPv4 families=dual"] => ["a 2001:db8::(p) 192.0.2.0(p)"];
        ["+ a order=IPv6"] => ["a 2001:db8::(p)"];
        ["+ b"] => ["a 2001:db8::(p)", "b 192.0.2.0(p)"];

    only_families_that_the_cluster_has(CLUSTER):
        ["pool p 192.0.2.0/24 2001:db8::/64", "+ a order=IPv4 families=prefer"] => ["a 192.0.2.0(p)"];

    requested_in_the_order_of_families(CLUSTER):
        ["pool p 192.0.2.0/24 2001:db8::/64", "+ a order=IPv6,IPv4 families=prefer ip=192.0.2.3,2001:db8::3"]
            => ["a 2001:db8::3(p) 192.0.2.3(p)"];
        ["+ a ip=192.0.2.3,192.0.2.4"] => ["a 2001:db8::3(p) 192.0.2.3(p) FamilyUnavailable !192.0.2.4 is the second"];

    two_families_at_once_or_none(CLUSTER):
        ["pool p 192.0.2.0/31 2001:db8::/128", "+ a families=dual", "+ b families=dual", "+ c families=prefer"]
            => ["a 192.0.2.0(p) 2001:db8::(p)", "b NoFreeAddress", "c 192.0.2.1(p) NoFreeAddress"];
        ["- a", "released a"] => ["b 192.0.2.0(p) 2001:db8::(p)", "c 192.0.2.1(p) NoFreeAddress"];

    what_was_published_comes_back(CLUSTER):
        ["pool p 192.0.2.0/24", "pool m 198.51.100.0/24 manual", "+ a", "+ b published=192.0.2.0", "+ c ip=192.0.2.0",
         "+ d published=198.51.100.9", "+ e published=203.0.113.1", "+ f published=192.0.2.0"]
            => ["a 192.0.2.1(p)", "b 192.0.2.0(p)", "c AddressInUse", "d 198.51.100.9(m)", "e 192.0.2.2(p)", "f 192.0.2.3(p)"];
        ["+ a published=192.0.2.77"] => ["a 192.0.2.1(p)", "b", "c", "d", "e", "f"];

    published_where_it_may_not_be(CLUSTER):
        ["pool gold 192.0.2.0/24 namespaces=rich", "pool p 198.51.100.0/24", "+ a published=192.0.2.9", "+ b published=198.51.100.5 pool=q"]
            => ["a 198.51.100.0(p)", "b NoSuchPool"];

    all_of_the_internet(CLUSTER):
        ["pool p 0.0.0.0/0 buggy", "+ a", "+ b ip=255.255.255.255"] => ["a 0.0.0.1(p)", "b 255.255.255.255(p)"];

    not_in_any_pool(CLUSTER):
        ["pool p 192.0.2.0/24", "pool q 192.0.2.0/25", "+ a ip=203.0.113.1", "+ b ip=192.0.2.1 pool=q"]
            => ["a NotInPool !203.0.113.1 is in no AddressPool", "b NotInPool", "!overlaps"];
        ["pool q 203.0.113.0/24"] => ["a 203.0.113.1(q)", "b NotInPool"];
}

#[test]
fn says_whose_assignment_differs() {
    let mut world = World::new(FILES);
    let mut settle = |changes: &[&str]| -> Vec<String> {
        changes.iter().for_each(|change| world.tell(change));
        world.ipam.settle().into_iter().map(|object| object.name).collect()
    };
    assert_eq!(settle(&["pool p 192.0.2.0/31", "+ a", "+ b", "+ c"]), ["a", "b", "c"]);
    assert_eq!(settle(&["+ a", "pool p 192.0.2.0/31"]), [""; 0]);
    assert_eq!(settle(&["- b"]), ["b", "c"]);
    assert_eq!(settle(&["- a", "+ a"]), [""; 0], "in the end it is the same Service");
}

#[test]
fn pools_are_reported() {
    let mut world = World::new(CLUSTER);
    for change in [
        "pool a 192.0.2.0/24 buggy",
        "pool b 192.0.2.9/32",
        "pool c 198.51.100.0/31",
        "pool d 203.0.113.0/24 disabled",
        "pool e 2001:db8::/64",
        "+ r share=k",
        "+ s share=k ports=81/TCP",
        "+ t pool=c",
        "+ u ip=192.0.2.0",
    ] {
        world.tell(change);
    }
    world.ipam.settle();
    world.tell("pool c 198.51.100.0/31 disabled");
    world.ipam.settle();
    let lines: Vec<_> = world
        .ipam
        .pool_reports()
        .into_iter()
        .map(|report| {
            let PoolReport { key, assigned, available, draining, overlaps, disabled } = report;
            format!("{key} {assigned} {available} {draining} {overlaps:?} {disabled}")
        })
        .collect();
    assert_eq!(
        lines,
        [
            "a 2 253 false None false",
            "b 0 0 false Some(\"AddressPool a\") false",
            "c 1 0 true None true",
            "d 0 0 false None true",
            &format!("e 0 {} false None false", u64::MAX),
        ]
    );
    world.tell("- t");
    world.ipam.settle();
    assert!(!world.ipam.pool_reports()[2].draining);
}
