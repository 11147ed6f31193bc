//! Whatever happens in whatever order.

use std::collections::BTreeSet;

use proptest::{collection::vec, prelude::*, sample::select};

use super::{holders::compatible, world::World, *};

/// Few addresses, ports, keys and names, so that Services get in each other's way.
fn change() -> impl Strategy<Value = String> {
    let wish = prop_oneof![
        4 => Just(String::new()),
        2 => (0..8).prop_map(|last| format!("ip=192.0.2.{last}")),
        1 => (0..8, 0..8).prop_map(|(four, six)| format!("ip=192.0.2.{four},2001:db8::{six}")),
        1 => (0..3).prop_map(|pool| format!("pool=p{pool}")),
        1 => (0..8).prop_map(|last| format!("published=192.0.2.{last}")),
    ];
    let share = select(vec!["", "share=k", "share=k", "share=l", "share=k local=a:b", "share=k local=a:c"]);
    let family = select(vec!["", "", "families=IPv4", "families=prefer", "families=dual", "order=IPv6"]);
    let other = select(vec!["", "", "", "labels=a:b", "class=other/lb", "deleting=1"]);
    let name = select(vec!["a", "b", "c", "d", "x/e", "x/f"]);
    let service = (name.clone(), wish, share, family, other, 0..3).prop_map(
        |(name, wish, share, family, other, port)| {
            format!("+ {name} {wish} {share} {family} {other} ports={}/TCP", 80 + port)
        },
    );
    let limits = select(vec!["", "", "", "disabled", "manual", "namespaces=x", "in=a:b", "for=a:b", "buggy"]);
    let kind = select(vec!["", "", "metallb=m"]);
    let pool = (0..3, 0..8u8, 0..3u8, 0..2, limits, kind).prop_map(|(name, first, more, priority, limits, kind)| {
        let last = first + more;
        format!("pool p{name} 192.0.2.{first}-192.0.2.{last} 2001:db8::{first}-2001:db8::{last} priority={priority} {limits} {kind}")
    });
    prop_oneof![
        8 => service,
        3 => name.clone().prop_map(|name| format!("- {name}")),
        4 => name.prop_map(|name| format!("released {name}")),
        3 => pool,
        1 => (0..3, select(vec!["", "metallb.io/m/"])).prop_map(|(name, kind)| format!("-pool {kind}p{name}")),
        1 => select(vec!["namespace x a:b", "namespace x a:c", "namespace default a:b"]).prop_map(Into::into),
    ]
}

fn options() -> impl Strategy<Value = Options> {
    (any::<bool>(), any::<bool>()).prop_map(|(outside_pools, deferred_release)| Options {
        default_class: true,
        outside_pools,
        deferred_release,
    })
}

type Decisions = BTreeMap<ObjectRef, Assigned>;

fn decisions(ipam: &Ipam) -> Decisions {
    ipam.all().map(|(object, assigned)| (object.clone(), assigned.clone())).collect()
}

/// Nobody is beside anybody without consent, and nobody has what another has not let go of.
fn check_owners(world: &World) {
    let mut seen: BTreeMap<IpAddr, Vec<&ObjectRef>> = BTreeMap::new();
    for (object, addresses) in &world.ipam.held {
        for address in addresses {
            seen.entry(*address).or_default().push(object);
        }
    }
    for (address, objects) in seen {
        for (index, one) in objects.iter().enumerate() {
            for other in &objects[..index] {
                // Those who are no longer ours are held to be what they were.
                if let (Some(one), Some(other)) = (world.ipam.ours.get(*one), world.ipam.ours.get(*other)) {
                    assert!(compatible(one, other), "{address}: {one:?} {other:?}");
                }
            }
        }
    }
}

/// Counts and lowest free addresses are as if every address was looked at.
fn check_pools(world: &World) {
    let held: BTreeSet<IpAddr> = world.ipam.held.values().flatten().copied().collect();
    for report in world.ipam.pool_reports() {
        if report.overlaps.is_some() {
            continue;
        }
        let pool = &world.pools[&report.key];
        let all = (0..16).flat_map(|last| {
            [IpAddr::from([192, 0, 2, last]), format!("2001:db8::{last:x}").parse().unwrap()]
        });
        let (taken, free): (Vec<_>, Vec<_>) =
            all.filter(|address| pool.contains(*address)).partition(|address| held.contains(address));
        let free = free.into_iter().filter(|address| pool.may_choose(*address)).count();
        assert_eq!(report.assigned, taken.len() as u64, "{report:?}");
        assert_eq!(report.available, if pool.disabled { 0 } else { free as u64 }, "{report:?}");
    }
}

/// Whoever has what it wishes and wishes nothing else keeps it.
fn check_nobody_moved(world: &World, old: &Decisions, before: &BTreeMap<ObjectRef, Arc<Service>>) {
    for (object, was) in old {
        let same = before.get(object) == world.services.get(object);
        let content = was.reason.is_empty() || was.reason == reason::DRAINING;
        if let Some(now) = world.ipam.assigned(object)
            && same
            && content
            && world.services[object].pool.is_none()
        {
            let addresses = |assigned: &Assigned| -> Vec<IpAddr> {
                assigned.addresses.iter().map(|(address, _)| *address).collect()
            };
            assert_eq!(addresses(was), addresses(now), "{object} was moved");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]
    #[test]
    fn what_holds_always_holds(options in options(), batches in vec(vec(change(), 1..4), 1..14)) {
        let mut world = World::new(options);
        for batch in batches {
            let old = decisions(&world.ipam);
            let before = world.services.clone();
            batch.iter().for_each(|change| world.tell(change));
            let changed = world.ipam.settle();
            let new = decisions(&world.ipam);

            let differ = old.keys().chain(new.keys()).filter(|object| old.get(*object) != new.get(*object));
            prop_assert_eq!(&changed, &differ.cloned().collect::<BTreeSet<_>>());
            check_owners(&world);
            check_pools(&world);
            check_nobody_moved(&world, &old, &before);
            prop_assert!(options.deferred_release || world.ipam.held.keys().all(|object| new.contains_key(object)));

            // A restart decides everything anew: who waits has nothing to get, who has keeps.
            let again = world.restarted();
            prop_assert_eq!(again.holdings(), world.ipam.holdings());
            for (object, assigned) in &new {
                let now = again.assigned(object).unwrap();
                prop_assert_eq!(&now.addresses, &assigned.addresses);
                prop_assert_eq!(now.reason.is_empty(), assigned.reason.is_empty());
            }
            prop_assert_eq!(again.problems(), world.ipam.problems());
            prop_assert_eq!(again.pool_reports(), world.ipam.pool_reports());
        }
    }
}
