use super::*;
use crate::plan::testing::{pool, service};

/// Services as `name key=value…`, pools as `name range…`: see [`crate::plan::testing`].
fn run(services: &[&str], pools: &[&str], current: &[(&str, &str)]) -> Vec<String> {
    let options = Options { default_class: true, outside_pools: true, deferred_release: false };
    let current = current.iter().map(|(name, addresses)| {
        (ObjectRef::new("default", *name), addresses.split(',').map(|text| text.parse().unwrap()).collect())
    });
    let services =
        services.iter().map(|text| service(text)).map(|service| (service.object.clone(), service.into()));
    let pools = pools.iter().map(|text| pool(text)).map(|pool| (pool.name.clone(), pool.into()));
    let result = allocate(&services.collect(), &pools.collect(), &current.collect(), options);
    let lines = result.services.iter().map(|(object, assigned)| {
        let mut line = object.name.clone();
        for (address, pool) in &assigned.addresses {
            line += &format!(" {address}({})", pool.as_deref().unwrap_or("-"));
        }
        for problem in &assigned.problems {
            line += &format!(" !{}", problem.message);
        }
        line
    });
    lines.chain(result.problems.iter().map(|problem| format!("!{}", problem.message))).collect()
}

macro_rules! table {
    ($($name:ident: $services:expr, $pools:expr, $current:expr => $expected:expr;)+) => {
        $(#[test] fn $name() {
            let got = run(&$services, &$pools, &$current);
            let expected: &[&str] = &$expected;
            assert_eq!(got.len(), expected.len(), "{got:#?}");
            for (got, expected) in got.iter().zip(expected) {
                assert!(got.starts_with(expected), "\n got      {got}\n expected {expected}");
            }
        })+
    };
}

table! {
    lowest_free_address: ["a", "b"], ["p 192.0.2.0/30"], [] => ["a 192.0.2.0(p)", "b 192.0.2.1(p)"];
    buggy_addresses_are_left_out: ["a"], ["p 192.0.2.255-192.0.3.9 buggy"], [] => ["a 192.0.3.1(p)"];
    lower_priority_first_then_name: ["a", "b", "c"], ["x 192.0.2.1/32", "y 192.0.2.2/32", "z 192.0.2.3/32 priority=-1"], []
        => ["a 192.0.2.3(z)", "b 192.0.2.1(x)", "c 192.0.2.2(y)"];
    no_automatic_choice: ["a", "b pool=x"], ["x 192.0.2.1/32 manual"], []
        => ["a !no pool that assigns automatically has IPv4 addresses", "b 192.0.2.1(x)"];
    exhausted: ["a", "b"], ["p 192.0.2.1/32"], [] => ["a 192.0.2.1(p)", "b !no free IPv4 address is left in p"];
    v6_where_there_is_no_v4: ["a"], ["p 2001:db8::/64"], [] => ["a 2001:db8::(p)"];
    huge_pools_are_not_walked: ["a", "b"], ["p ::/0"], [("a", "::")] => ["a ::(p)", "b ::1(p)"];
    requests_before_choice: ["a", "z ip=192.0.2.0"], ["p 192.0.2.0/24"], [] => ["a 192.0.2.1(p)", "z 192.0.2.0(p)"];
    all_or_nothing: ["a ip=192.0.2.9", "b ip=192.0.2.9,2001:db8::1"], [], []
        => ["a 192.0.2.9(-)", "b !192.0.2.9 is held by Service default/a"];
    a_holder_keeps_against_an_earlier_name: ["a ip=192.0.2.0", "z"], ["p 192.0.2.0/24"], [("z", "192.0.2.0")]
        => ["a !192.0.2.0 is held by Service default/z", "z 192.0.2.0(p)"];
    a_refused_change_keeps_the_old: ["a ip=192.0.2.0", "z"], ["p 192.0.2.0/24"], [("z", "192.0.2.0"), ("a", "192.0.2.5")]
        => ["a 192.0.2.5(p) !192.0.2.0 is held by Service default/z; both need the same value of the annotation pointsman.dev/allow-shared-ip to share it; the Service keeps 192.0.2.5", "z 192.0.2.0(p)"];
    a_change_makes_way_for_another: ["a ip=192.0.2.2", "b ip=192.0.2.3"], [], [("a", "192.0.2.1"), ("b", "192.0.2.2")]
        => ["a 192.0.2.2(-)", "b 192.0.2.3(-)"];
    not_in_the_named_pool: ["a pool=p ip=192.0.2.1"], ["p 198.51.100.0/24"], []
        => ["a !192.0.2.1 is not in the pool p"];
    unknown_pool: ["a pool=q"], ["p 198.51.100.0/24"], [] => ["a !there is no AddressPool q"];
    a_shrunk_pool_renumbers_nobody: ["a"], ["p 198.51.100.0/24"], [("a", "192.0.2.1")]
        => ["a 192.0.2.1(-) !192.0.2.1 is in no AddressPool any more"];
    a_missing_pool_renumbers_nobody: ["a pool=q"], ["p 198.51.100.0/24"], [("a", "192.0.2.1")]
        => ["a 192.0.2.1(-) !there is no AddressPool q; the Service keeps 192.0.2.1"];
    another_pool_asked_for: ["a pool=q"], ["p 192.0.2.0/24", "q 198.51.100.0/24"], [("a", "192.0.2.1")]
        => ["a 198.51.100.0(q)"];
    overlapping_pools: ["a", "b pool=y"], ["x 192.0.2.0/24", "y 192.0.2.128/25"], []
        => ["a 192.0.2.0(x)", "b !AddressPool y is set aside: it overlaps AddressPool x", "!overlaps AddressPool x; y is set aside"];
    sharing: ["a share=k ports=80/TCP", "b share=k ports=80/UDP", "c share=k ports=80/TCP", "d share=l ports=81/TCP"], ["p 192.0.2.0/24"], []
        => ["a 192.0.2.0(p)", "b 192.0.2.0(p)", "c 192.0.2.1(p)", "d 192.0.2.2(p)"];
    sharing_by_request: ["a share=k ip=192.0.2.9 ports=80/TCP", "b share=k ip=192.0.2.9 ports=81/TCP", "c share=k ip=192.0.2.9 ports=81/TCP", "d ip=192.0.2.9 ports=82/TCP"], [], []
        => ["a 192.0.2.9(-)", "b 192.0.2.9(-)", "c !192.0.2.9 is shared with Service default/b, which has port 81/TCP", "d !192.0.2.9 is held by Service default/a"];
    sharing_is_adopted: ["a share=k ports=80/TCP", "b share=k ports=81/TCP"], ["p 192.0.2.0/24"], [("a", "192.0.2.7"), ("b", "192.0.2.7")]
        => ["a 192.0.2.7(p)", "b 192.0.2.7(p)"];
    dual_stack: ["a families=dual", "b families=prefer", "c families=IPv6"], ["p 192.0.2.0/31 2001:db8::/64"], []
        => ["a 192.0.2.0(p) 2001:db8::(p)", "b 192.0.2.1(p) 2001:db8::1(p)", "c 2001:db8::2(p)"];
    dual_stack_half: ["a families=dual", "b families=prefer"], ["p 192.0.2.0/31"], []
        => ["a !no pool that assigns automatically has IPv6 addresses", "b 192.0.2.0(p) !no pool that assigns"];
    the_second_family_follows: ["a families=prefer"], ["p 192.0.2.0/31 2001:db8::/64"], [("a", "2001:db8::5")]
        => ["a 192.0.2.0(p) 2001:db8::5(p)"];
    one_family_less: ["a families=IPv4"], ["p 192.0.2.0/31 2001:db8::/64"], [("a", "192.0.2.1,2001:db8::5")]
        => ["a 192.0.2.1(p)"];
    the_family_left_to_us_is_kept: ["a"], ["p 192.0.2.0/31 2001:db8::/64"], [("a", "2001:db8::5")]
        => ["a 2001:db8::5(p)"];
    not_ours: ["a class=other/lb", "b type=ClusterIP", "c class=pointsman.dev/pointsman"], ["p 192.0.2.0/31"], [("a", "192.0.2.0")]
        => ["c 192.0.2.0(p)"];
}
