//! What one event costs among ten thousand Services: what it concerns, not what there is.

use super::{world::World, *};

const MANY: usize = 10_000;
const FILES: Options = Options { default_class: true, outside_pools: true, deferred_release: false };

/// With these pools, and Services `s00000` and so on with these wishes.
fn world(pools: &[&str], wish: &str) -> World {
    let mut world = World::new(FILES);
    pools.iter().for_each(|pool| world.tell(&format!("pool {pool}")));
    for number in 0..MANY {
        world.tell(&format!("+ s{number:05} {wish}"));
    }
    world.ipam.settle();
    world
}

/// How many Services got something else, and how much was looked at for it.
fn cost(world: &mut World, change: &str) -> (usize, u64) {
    let before = world.ipam.steps();
    world.tell(change);
    let changed = world.ipam.settle().len();
    (changed, world.ipam.steps() - before)
}

#[test]
fn of_a_service_that_comes_changes_goes() {
    let mut world = world(&["p 10.0.0.0/8"], "");
    for (change, changed, most) in [
        ("+ t", 1, 3),
        ("+ t ip=10.0.100.1", 1, 3),
        ("+ t ip=10.0.0.0", 1, 3),
        ("+ t ports=81/TCP", 1, 3),
        ("- s00000", 1, 3),
        ("+ s00001 ports=81/TCP", 0, 3),
        ("+ u share=k", 1, 3),
        ("+ v share=k ports=81/TCP", 1, 4),
    ] {
        let (got, steps) = cost(&mut world, change);
        assert!(got == changed && steps <= most, "{change}: {got} changed, {steps} steps");
    }
}

#[test]
fn of_a_release_that_everybody_waits_for() {
    let mut world = world(&["p 192.0.2.1/32"], "");
    for number in 0..10 {
        let (changed, steps) = cost(&mut world, &format!("- s{number:05}"));
        assert_eq!(changed, 2, "the one that goes and the next one");
        assert!(steps <= 3, "{steps} steps");
    }
}

#[test]
fn of_a_release_that_helps_only_half() {
    let mut world = world(&["p 192.0.2.0/31 2001:db8::/128"], "families=dual");
    world.tell("+ a");
    world.ipam.settle();
    let (changed, steps) = cost(&mut world, "- a");
    assert!(changed == 1 && steps <= 3, "one IPv4 address is not what anybody waits for: {changed}, {steps}");
    let (changed, steps) = cost(&mut world, "- s00000");
    assert!(changed == 2 && steps <= 5, "{changed}, {steps}");
}

#[test]
fn of_a_pool_that_nobody_waits_for() {
    let mut world = world(&["p 10.0.0.0/8"], "");
    for change in ["pool q 192.0.2.0/24", "pool q 192.0.2.0/25", "-pool q", "namespace default a:b"] {
        assert_eq!(cost(&mut world, change), (0, 0), "{change}");
    }
}

#[test]
fn of_sharing() {
    let mut world = world(&["p 192.0.2.0/24"], "share=k");
    assert_eq!(world.ipam.held.len(), 256, "all have the same port");
    let (changed, steps) = cost(&mut world, "+ t share=k ports=81/TCP");
    assert!(changed == 1 && steps <= 300, "{changed}, {steps}");
    let (changed, steps) = cost(&mut world, "- s00000");
    assert!(changed == 2 && steps <= 300, "{changed}, {steps}");
}

#[test]
fn of_a_start() {
    let world = world(&["p 10.0.0.0/8", "q 192.0.2.0/24"], "");
    assert!(world.ipam.steps() <= 4 * MANY as u64, "{}", world.ipam.steps());
    let again = world.restarted();
    assert!(again.steps() <= 4 * MANY as u64, "{}", again.steps());
    assert_eq!(again.holdings(), world.ipam.holdings());
}
