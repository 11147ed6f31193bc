use proptest::prelude::*;

use std::collections::BTreeSet;

use super::*;
use crate::plan::testing::{pool, service};

type World = (BTreeMap<ObjectRef, Arc<Service>>, BTreeMap<String, Arc<Pool>>, Holdings);

/// Few addresses, ports and keys, so that Services get in each other's way.
fn world() -> impl Strategy<Value = World> {
    let address = (0..6u8).prop_map(|last| IpAddr::from([192, 0, 2, last]));
    let wish = prop_oneof![
        3 => Just(String::new()),
        1 => (0..6).prop_map(|last| format!("ip=192.0.2.{last}")),
        1 => (0..6).prop_map(|last| format!("ip=192.0.2.{last},2001:db8::{last}")),
        1 => prop_oneof![Just("pool=p0"), Just("pool=p1"), Just("pool=none")].prop_map(Into::into),
    ];
    let share = prop_oneof![Just(""), Just("share=k"), Just("share=l")];
    let family = prop_oneof![Just(""), Just("families=IPv4"), Just("families=prefer"), Just("families=dual")];
    let one = (wish, share, family, 0..3, proptest::option::of(proptest::collection::vec(address, 1..3)));
    let pools = proptest::collection::vec((0..6u8, 0..3u8, 0..2), 0..3);
    (proptest::collection::vec(one, 1..8), pools).prop_map(|(services, pools)| {
        let mut world = World::default();
        for (index, (wish, share, family, port, current)) in services.into_iter().enumerate() {
            let service = service(&format!("s{index} {wish} {share} {family} ports={}/TCP", 80 + port));
            if let Some(current) = current {
                world.2.insert(service.object.clone(), current);
            }
            world.0.insert(service.object.clone(), service.into());
        }
        for (index, (first, more, priority)) in pools.into_iter().enumerate() {
            let last = first + more;
            let pool = pool(&format!("p{index} 192.0.2.{first}-192.0.2.{last} 2001:db8::{first:x}-2001:db8::{last:x} priority={priority}"));
            world.1.insert(pool.name.clone(), pool.into());
        }
        world
    })
}

fn run(world: &World) -> Allocation {
    allocate(
        &world.0,
        &world.1,
        &world.2,
        Options { default_class: true, outside_pools: true, deferred_release: false },
    )
}

proptest! {
    #[test]
    fn nobody_shares_without_consent(world in world()) {
        let result = run(&world);
        let mut seen: BTreeMap<IpAddr, Vec<&Service>> = BTreeMap::new();
        for (object, assigned) in &result.services {
            for (address, _) in &assigned.addresses {
                seen.entry(*address).or_default().push(&world.0[object]);
            }
        }
        for (address, services) in seen {
            let mut ports = BTreeSet::new();
            for service in &services {
                prop_assert!(services.len() == 1 || service.sharing_key.is_some(), "{address} {services:?}");
                prop_assert_eq!(&service.sharing_key, &services[0].sharing_key);
                for port in &service.ports {
                    prop_assert!(ports.insert((port.port, port.protocol)), "{} {:?}", address, services);
                }
            }
        }
    }

    #[test]
    fn the_same_question_has_the_same_answer(world in world()) {
        prop_assert_eq!(run(&world), run(&world));
    }

    #[test]
    fn the_answer_stands(mut world in world()) {
        let first = run(&world);
        world.2 = first.holdings();
        let second = run(&world);
        prop_assert_eq!(first.holdings(), second.holdings());
    }

    #[test]
    fn a_new_service_moves_nobody(mut world in world()) {
        let (object, service) = world.0.pop_first().unwrap();
        world.2 = run(&world).holdings();
        world.2.remove(&object);
        let before = run(&world).holdings();
        world.0.insert(object.clone(), service);
        let mut after = run(&world).holdings();
        after.remove(&object);
        prop_assert_eq!(before, after);
    }

    #[test]
    fn requested_is_all_or_nothing_or_what_was(world in world()) {
        for (object, assigned) in run(&world).services {
            let requested = &world.0[&object].requested_addresses;
            let got: Vec<_> = assigned.addresses.iter().map(|(address, _)| *address).collect();
            let before = world.2.get(&object).cloned().unwrap_or_default();
            let kept = got.iter().all(|address| before.contains(address));
            prop_assert!(requested.is_empty() || got == *requested || kept, "{got:?} {requested:?} {before:?}");
        }
    }
}
