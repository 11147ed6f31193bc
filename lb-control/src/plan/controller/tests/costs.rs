//! What a change costs in a large cluster.

use std::sync::Arc;

use super::World;
use crate::{
    model::{AgentLease, Endpoint, EndpointSlice, ObjectChange, ObjectRef},
    plan::controller::Command,
};

const SERVICES: usize = 10_000;

fn large() -> World {
    let mut world = World::new(&["n1", "n2", "n3"]);
    // They look at everything with every command.
    world.checks = false;
    world.pool("p 10.0.0.0/16");
    for index in 0..SERVICES {
        world.service(&format!("s{index:05}"));
    }
    world.calm();
    world
}

/// Objects that were looked at for the sake of one change, until rest.
fn cost(world: &mut World, change: impl FnOnce(&mut World)) -> u64 {
    let steps = |world: &World| world.leaders[0].controller.counters().steps;
    let before = steps(world);
    change(world);
    world.calm();
    steps(world) - before
}

#[test]
fn one_change_among_ten_thousand_services_concerns_few() {
    let mut world = large();
    let kinds: Vec<_> = world.writes();
    let creates = kinds.iter().filter(|it| matches!(it, Command::CreateVirtualIp { .. })).count();
    let statuses = kinds.iter().filter(|it| matches!(it, Command::ApplyServiceStatus { .. })).count();
    assert_eq!((creates, statuses, kinds.len()), (SERVICES, SERVICES, 3 * SERVICES), "one of each");

    let slice = |nodes: &[&str]| EndpointSlice {
        object: ObjectRef::new("default", "slice"),
        place: None,
        service: Some("s05000".into()),
        family: None,
        ports: Vec::new(),
        endpoints: nodes
            .iter()
            .map(|node| Endpoint {
                node: Some((*node).into()),
                ..Endpoint::ready(std::net::IpAddr::from([10, 1, 0, 1]))
            })
            .collect(),
        weight: None,
    };
    let object = ObjectRef::new("default", "s05000");
    let put = |world: &mut World, nodes: &[&str]| {
        let slice = slice(nodes);
        world.server.put(ObjectChange::Slice(slice.object.clone(), Some(Arc::new(slice))));
    };
    assert_eq!(cost(&mut world, |world| put(world, &["n1"])), 0, "any node will do for cluster traffic");
    let local = cost(&mut world, |world| world.edit(&object, |it| it.local_traffic_only = true));
    assert!(local <= 12, "{local}");
    let moved = cost(&mut world, |world| put(world, &["n3"])) + cost(&mut world, |world| put(world, &["n2"]));
    assert!((1..=24).contains(&moved), "{moved}");
    let new = cost(&mut world, |world| drop(world.service("new")));
    assert!((1..=16).contains(&new), "{new}");
    let gone = cost(&mut world, |world| world.server.delete_service(&object));
    assert!((1..=16).contains(&gone), "{gone}");
    let renewed = cost(&mut world, |world| {
        let lease = (*world.server.objects.agents["n1"]).clone();
        let lease = AgentLease { renewed: "later".into(), ..lease };
        world.server.put(ObjectChange::Agent("n1".into(), Some(Arc::new(lease))));
    });
    assert_eq!(renewed, 0);
}

#[test]
fn a_node_that_dies_concerns_its_own_addresses() {
    let mut world = large();
    world.writes();
    world.agents.get_mut("n1").unwrap().is_alive = false;
    let steps = cost(&mut world, |world| {
        let lease = AgentLease { holder: String::new(), ..(*world.server.objects.agents["n1"]).clone() };
        world.server.put(ObjectChange::Agent("n1".into(), Some(Arc::new(lease))));
    });
    let moves = world.writes().iter().filter(|it| matches!(it, Command::UpdateVirtualIp { .. })).count();
    assert!((SERVICES / 3..=SERVICES / 3 + 1).contains(&moves), "{moves}");
    assert!(steps <= 8 * moves as u64, "{steps} for {moves} moves");
}

/// How many of so many new Services are said to wait for their node, when the API server takes its
/// time with VirtualIPs.
fn said_to_wait(services: usize) -> usize {
    let mut world = World::new(&["n1"]);
    world.pool("p 10.0.0.0/16");
    for index in 0..services {
        world.service(&format!("s{index:05}"));
    }
    let mut said = 0;
    for _ in 0..8 {
        world.watch(0, usize::MAX);
        let commands = world.leaders[0].controller.decide(world.now);
        for command in commands.iter().filter(|it| !matches!(it, Command::CreateVirtualIp { .. })) {
            said += usize::from(matches!(command, Command::ApplyServiceStatus { .. }));
            let outcome = world.server.run(command);
            world.leaders[0].controller.done(command, &outcome, world.now);
        }
        world.elapse(1);
    }
    said
}

#[test]
fn a_crowd_of_new_services_gets_one_status_each() {
    assert_eq!(said_to_wait(3), 3, "these wait for something unusual");
    assert_eq!(said_to_wait(200), 0, "these wait for their turn");
}
