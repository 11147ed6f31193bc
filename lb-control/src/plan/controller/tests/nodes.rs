//! Nodes and agents that come and go.

use std::sync::Arc;

use super::World;
use crate::{
    model::{Endpoint, EndpointSlice, Node, ObjectChange, ObjectRef},
    plan::controller::{ANNOUNCED, Command},
};

fn exclude(world: &mut World, name: &str, excluded: bool) {
    let node = Node { name: name.into(), excluded, ..Node::default() };
    world.server.put(ObjectChange::Node(name.into(), Some(Arc::new(node))));
}

/// Endpoints of a Service on these nodes, all ready.
fn endpoints(world: &mut World, service: &ObjectRef, nodes: &[&str]) {
    let endpoint = |node: &&str| Endpoint {
        node: Some((*node).into()),
        ..Endpoint::ready(std::net::IpAddr::from([10, 0, 0, 1]))
    };
    let object = ObjectRef::new("default", format!("{}-slice", service.name));
    let slice = EndpointSlice {
        object: object.clone(),
        place: None,
        service: Some(service.name.clone()),
        family: None,
        ports: Vec::new(),
        endpoints: nodes.iter().map(endpoint).collect(),
        weight: None,
    };
    world.server.put(ObjectChange::Slice(object, Some(Arc::new(slice))));
}

fn cluster(nodes: &[&str]) -> World {
    let mut world = World::new(nodes);
    world.pool("p 192.0.2.0/24");
    world
}

fn owner(world: &World, index: usize) -> String {
    world.virtual_ips()[index].split(' ').nth(2).unwrap().to_owned()
}

fn condition(world: &World, service: &ObjectRef) -> (String, String) {
    let conditions = &world.get(service).api.conditions;
    let it = conditions.iter().find(|it| it.kind == ANNOUNCED).expect("a condition");
    (it.reason.clone(), it.message.clone())
}

#[test]
fn the_addresses_of_a_node_that_dies_move_once_and_stay_published() {
    let mut world = cluster(&["n1", "n2"]);
    let services: Vec<_> = (0..6).map(|index| world.service(&format!("s{index}"))).collect();
    world.calm();
    let on = |world: &World, node: &str| (0..6).filter(|index| owner(world, *index) == node).count();
    assert_eq!((on(&world, "n1"), on(&world, "n2")), (3, 3), "{:?}", world.virtual_ips());

    let published: Vec<_> = services.iter().map(|it| world.shown(it)).collect();
    world.agents.get_mut("n1").unwrap().is_alive = false;
    world.pass(10);
    assert_eq!(on(&world, "n1"), 3, "its Lease has not run out yet");
    world.pass(10);
    assert_eq!(on(&world, "n2"), 6);
    assert_eq!(services.iter().map(|it| world.shown(it)).collect::<Vec<_>>(), published);
    assert!(services.iter().all(|it| condition(&world, it).1.ends_with("by node n2")));

    world.agents.get_mut("n1").unwrap().is_alive = true;
    world.pass(30);
    assert_eq!(on(&world, "n2"), 6, "who comes back gets new ones only");
    world.service("new");
    world.calm();
    assert_eq!(owner(&world, 6), "n1");
}

#[test]
fn without_any_agent_an_address_waits_and_says_why() {
    let mut world = cluster(&["n1"]);
    exclude(&mut world, "n1", true);
    let web = world.service("web");
    world.pass(10);
    assert_eq!(world.virtual_ips(), ["192.0.2.0 web - -/"], "it is reserved all the same");
    assert_eq!(world.shown(&web), [""; 0]);
    let (reason, message) = condition(&world, &web);
    assert_eq!(reason, "NoNode");
    assert!(message.ends_with("1 excluded from external load balancers by label"), "{message}");
    exclude(&mut world, "n1", false);
    world.calm();
    assert_eq!(world.shown(&web), ["192.0.2.0"]);
    assert_eq!(world.events(), ["AddressAllocated", "NoNode", "Announced"]);
}

#[test]
fn an_excluded_node_hands_over_before_it_lets_go() {
    let mut world = cluster(&["n1", "n2"]);
    let web = world.service("web");
    world.calm();
    let before = owner(&world, 0);
    exclude(&mut world, &before, true);
    world.watch(0, usize::MAX);
    world.decide(0);
    assert_ne!(owner(&world, 0), before);
    assert_eq!(world.shown(&web), ["192.0.2.0"], "what is published stays");
    world.calm();
    assert_eq!(world.shown(&web), ["192.0.2.0"]);
    exclude(&mut world, "n1", true);
    exclude(&mut world, "n2", true);
    world.pass(10);
    assert_eq!(owner(&world, 0), "-");
    assert_eq!((condition(&world, &web).0.as_str(), world.shown(&web)), ("NoNode", vec!["192.0.2.0".into()]));
}

#[test]
fn a_cluster_whose_agents_are_all_away_keeps_everything() {
    let mut world = cluster(&["n1", "n2"]);
    let web = world.service("web");
    world.calm();
    let before = world.virtual_ips();
    for agent in world.agents.values_mut() {
        agent.is_alive = false;
    }
    world.pass(60);
    assert_eq!(world.virtual_ips(), before);
    assert_eq!((condition(&world, &web).0.as_str(), world.shown(&web)), ("NoNode", vec!["192.0.2.0".into()]));
    for agent in world.agents.values_mut() {
        agent.is_alive = true;
    }
    world.pass(10);
    assert_eq!(world.virtual_ips(), before);
    assert_eq!(condition(&world, &web).0, "Announced");
}

#[test]
fn local_traffic_follows_its_endpoints() {
    let mut world = cluster(&["n1", "n2", "n3"]);
    let web = world.service("web");
    world.edit(&web, |it| it.local_traffic_only = true);
    world.calm();
    assert_eq!(owner(&world, 0), "-", "nobody has an endpoint");
    for (nodes, expected) in
        [(&["n2"][..], "n2"), (&["n1", "n2"], "n2"), (&["n1"], "n1"), (&[], "n1"), (&["n3"], "n3")]
    {
        endpoints(&mut world, &web, nodes);
        world.calm();
        assert_eq!(owner(&world, 0), expected, "{nodes:?}");
    }
    assert_eq!(world.shown(&web), ["192.0.2.0"]);
}

#[test]
fn an_agent_that_does_not_serve_is_told_of_after_a_while() {
    let mut world = cluster(&["n1"]);
    world.agents.get_mut("n1").unwrap().is_alive = false;
    let web = world.service("web");
    world.calm();
    assert_eq!(owner(&world, 0), "n1", "its Lease still counts");
    assert!(world.get(&web).api.conditions.is_empty(), "a moment later there is more to say");
    world.pass(6);
    assert_eq!(condition(&world, &web).0, "NotServed");
    assert_eq!(world.shown(&web), [""; 0]);
    world.pass(20);
    assert_eq!(condition(&world, &web).0, "NoNode");
}

#[test]
fn the_dead_do_not_keep_a_service_from_going() {
    let mut world = cluster(&["n1"]);
    let web = world.service("web");
    world.calm();
    world.agents.get_mut("n1").unwrap().is_alive = false;
    world.pass(1);
    world.server.delete_service(&web);
    world.checks = false;
    world.pass(5);
    assert!(world.server.service(&web).is_some(), "it may serve still");
    world.pass(20);
    assert!(world.server.service(&web).is_none());
    assert!(world.virtual_ips().is_empty());
}

/// However much is under way for others: here pools, of which nobody ever hears again.
#[test]
fn a_backlog_does_not_hide_for_ever_that_a_node_does_not_serve() {
    let mut world = cluster(&["n1"]);
    world.agents.get_mut("n1").unwrap().is_silent = true;
    for number in 0..100 {
        let pool = format!("p{number}");
        let command = Command::SetPoolStatus { pool, assigned: 0, available: 0, conditions: Vec::new() };
        world.leaders[0].controller.flights.start(&command, Vec::new());
    }
    let web = world.service("web");
    world.pass(59);
    assert!(world.get(&web).api.conditions.is_empty(), "a moment later there is more to say");
    assert!(world.leaders[0].controller.flights.timers() < 10, "one for the Service at a time");
    world.pass(2);
    assert_eq!(condition(&world, &web).0, "NotServed");
}

#[test]
fn hands_in_virtual_ips_are_put_right() {
    let mut world = cluster(&["n1", "n2"]);
    let web = world.service("web");
    world.calm();
    let right = world.virtual_ips();
    let address = "192.0.2.0".parse().unwrap();
    let edit = |world: &mut World, edit: &dyn Fn(&mut crate::model::VirtualIp)| {
        let mut it = (*world.server.objects.virtual_ips[&address]).clone();
        edit(&mut it);
        world.server.write_virtual_ip(it);
    };
    edit(&mut world, &|it| it.services = [ObjectRef::new("default", "nobody")].into());
    world.checks = false;
    world.pass(10);
    assert_eq!(world.virtual_ips(), right);
    edit(&mut world, &|it| it.node = None);
    world.pass(10);
    assert_eq!(world.virtual_ips()[0].split(' ').nth(1), Some("web"));
    assert_ne!(owner(&world, 0), "-");
    world.server.put(ObjectChange::VirtualIp(address, None));
    world.pass(10);
    assert!(world.virtual_ips()[0].starts_with("192.0.2.0 web n"), "{:?}", world.virtual_ips());
    assert_eq!(world.shown(&web), ["192.0.2.0"]);

    let mut stray = (*world.server.objects.virtual_ips[&address]).clone();
    stray.address = "192.0.2.77".parse().unwrap();
    world.server.write_virtual_ip(stray);
    world.pass(10);
    assert_eq!(world.virtual_ips().len(), 1, "{:?}", world.virtual_ips());
    assert_eq!(world.shown(&web), ["192.0.2.0"]);
}

#[test]
fn addresses_of_metallbs_pools_follow_its_advertisements() {
    use crate::model::{Advertisement, PoolOrigin};

    let mut world = World::new(&["n1"]);
    let mut pool = crate::plan::testing::pool("p 192.0.2.0/24");
    pool.origin = PoolOrigin::MetalLb("metallb-system".into());
    world.server.put(ObjectChange::Pool(pool.key(), Some(Arc::new(pool))));
    let web = world.service("web");
    world.calm();
    assert_eq!(owner(&world, 0), "-");
    assert!(condition(&world, &web).1.ends_with("1 not selected by any advertisement of the pool"));

    let object = ObjectRef::new("metallb-system", "l2");
    let advertisement = Advertisement { object: object.clone(), ..Advertisement::default() };
    world.server.put(ObjectChange::Advertisement(object.clone(), Some(Arc::new(advertisement))));
    world.calm();
    assert_eq!((owner(&world, 0).as_str(), world.shown(&web)), ("n1", vec!["192.0.2.0".into()]));
    let statuses = world.commands.iter().filter(|it| matches!(it, Command::SetPoolStatus { .. }));
    assert_eq!(statuses.count(), 0, "the status of MetalLB's pools is MetalLB's");

    world.server.put(ObjectChange::Advertisement(object, None));
    world.calm();
    assert_eq!(owner(&world, 0), "-");
    assert_eq!(condition(&world, &web).0, "NoNode");
}

#[test]
fn the_status_of_a_pool_is_written_once_in_five_seconds() {
    let mut world = cluster(&["n1"]);
    world.writes();
    let mut statuses = Vec::new();
    for index in 0..20 {
        world.service(&format!("s{index}"));
        world.pass(1);
        statuses.extend(std::mem::take(&mut world.commands).into_iter().filter_map(|it| match it {
            Command::SetPoolStatus { assigned, .. } => Some(assigned),
            _ => None,
        }));
    }
    assert!((4..=5).contains(&statuses.len()), "{statuses:?}");
    world.pass(5);
    assert!(
        world.commands.iter().any(|it| matches!(it, Command::SetPoolStatus { assigned: 20, .. })),
        "the last word is always said"
    );
}

#[test]
fn a_pool_that_is_set_aside_is_told_at_the_pool_once() {
    let mut world = cluster(&["n1"]);
    world.pool("a 198.51.100.0/24");
    let aside = |world: &mut World, pool: &str| {
        let mut pool = crate::plan::testing::pool(pool);
        pool.uid = "u".into();
        world.server.put(ObjectChange::Pool(pool.key(), Some(Arc::new(pool))));
        world.pass(10);
        let events = std::mem::take(&mut world.commands).into_iter().filter_map(|it| match it {
            Command::Event { about, reason, note, .. } => Some(format!(
                "{reason} {} {} {} {}: {note}",
                about.api_version, about.kind, about.object, about.uid
            )),
            _ => None,
        });
        events.collect::<Vec<_>>()
    };
    let ours = "Overlapping pointsman.dev/v1alpha1 AddressPool b u: set aside: it overlaps AddressPool a; change one of them";
    assert_eq!(aside(&mut world, "b 198.51.100.0/25"), [ours]);
    assert!(aside(&mut world, "b 198.51.100.0/26").is_empty(), "it was told");
    assert!(aside(&mut world, "b 203.0.113.0/25").is_empty(), "it was mended");
    assert_eq!(aside(&mut world, "b 198.51.100.0/25"), [ours], "anew");
    let theirs = "Overlapping metallb.io/v1beta1 IPAddressPool m/c u: set aside: it overlaps AddressPool a; change one of them";
    assert_eq!(aside(&mut world, "c 198.51.100.0/25 metallb=m"), [theirs]);
}

/// Its Lease is renewed, and says why it cannot serve.
fn is_unfit(world: &mut World, node: &str, why: Option<&str>) {
    world.agents.get_mut(node).unwrap().unfit = why.map(str::to_owned);
    world.renew();
}

#[test]
fn who_cannot_serve_for_long_loses_its_addresses_and_the_services_say_why() {
    let mut world = cluster(&["n1", "n2"]);
    let services: Vec<_> = (0..4).map(|index| world.service(&format!("s{index}"))).collect();
    world.calm();
    let on = |world: &World, node: &str| (0..4).filter(|index| owner(world, *index) == node).count();
    assert_eq!((on(&world, "n1"), on(&world, "n2")), (2, 2));
    let published: Vec<_> = services.iter().map(|it| world.shown(it)).collect();

    is_unfit(&mut world, "n1", Some("eth0 is down"));
    world.pass(9);
    assert_eq!(on(&world, "n1"), 2, "it may be over soon");
    is_unfit(&mut world, "n1", None);
    world.pass(1);
    is_unfit(&mut world, "n1", Some("eth0 is down"));
    world.pass(9);
    assert_eq!(on(&world, "n1"), 2, "it begins anew");
    world.events();
    world.pass(2);
    assert_eq!(on(&world, "n2"), 4);
    let moved = |it: &&Command| matches!(it, Command::Event { reason, note, .. } if reason == "Moved" && note.contains("eth0 is down"));
    assert_eq!(world.commands.iter().filter(moved).count(), 2, "{:?}", world.commands);
    assert_eq!(services.iter().map(|it| world.shown(it)).collect::<Vec<_>>(), published);

    world.service("new");
    world.calm();
    assert_eq!(owner(&world, 4), "n2", "nothing new for it either");
    is_unfit(&mut world, "n1", None);
    world.pass(30);
    assert_eq!(on(&world, "n2"), 4, "nothing is moved back");
    world.service("newer");
    world.calm();
    assert_eq!(owner(&world, 5), "n1");
}

#[test]
fn where_nobody_can_serve_everything_stays() {
    let mut world = cluster(&["n1", "n2"]);
    let web = world.service("web");
    world.calm();
    let before = owner(&world, 0);
    for node in ["n1", "n2"] {
        is_unfit(&mut world, node, Some("the same on all nodes"));
    }
    world.pass(30);
    assert_eq!(owner(&world, 0), before);
    let (reason, message) = condition(&world, &web);
    assert!(reason == "Announced" || message.contains("cannot serve"), "{reason}: {message}");
    let other = if before == "n1" { "n2" } else { "n1" };
    is_unfit(&mut world, other, None);
    world.pass(9);
    assert_eq!(owner(&world, 0), before, "it may get well just as well");
    world.pass(2);
    assert_eq!(owner(&world, 0), other, "the first that can for a while takes it");
}

/// A switch that fails is noticed by one node after the other, and is mended for one after the other.
#[test]
fn what_breaks_on_all_nodes_moves_nothing() {
    let mut world = cluster(&["n1", "n2", "n3"]);
    for index in 0..6 {
        world.service(&format!("s{index}"));
    }
    world.calm();
    let owners = |world: &World| (0..6).map(|index| owner(world, index)).collect::<Vec<_>>();
    let before = owners(&world);
    for node in ["n1", "n2", "n3"] {
        is_unfit(&mut world, node, Some("eth0 is down"));
        world.pass(3);
        assert_eq!(owners(&world), before);
    }
    world.pass(30);
    assert_eq!(owners(&world), before, "nobody can");
    world.service("new");
    world.pass(2);
    assert_eq!(owner(&world, 6), "-", "it is given to nobody who cannot serve it");
    for node in ["n3", "n1", "n2"] {
        is_unfit(&mut world, node, None);
        world.pass(3);
        assert_eq!(owners(&world), before);
    }
    assert_eq!(owner(&world, 6), "n3", "the first that can: it had no node");
    world.pass(30);
    assert_eq!(owners(&world), before, "all can");
}

/// A new leader has not seen since when it lasts.
#[test]
fn a_new_leader_has_patience_too() {
    let mut world = cluster(&["n1", "n2"]);
    world.service("web");
    world.calm();
    let before = owner(&world, 0);
    is_unfit(&mut world, &before, Some("eth0 is down"));
    world.pass(8);
    world.restart();
    world.pass(8);
    assert_eq!(owner(&world, 0), before);
    world.pass(3);
    assert_ne!(owner(&world, 0), before);
}
