//! The life of a Service.

use super::World;
use crate::{
    model::{Protocol, ServicePort},
    plan::controller::Command,
};

fn kind(command: &Command) -> &'static str {
    match command {
        Command::CreateVirtualIp { .. } => "create",
        Command::UpdateVirtualIp { .. } => "update",
        Command::DeleteVirtualIp { .. } => "delete",
        Command::SetVirtualIpStatus { .. } => "say",
        Command::AddFinalizers { .. } => "protect",
        Command::RemoveFinalizers { .. } => "unprotect",
        Command::ApplyServiceStatus { .. } => "publish",
        Command::SetExternalIps { .. } => "external",
        Command::SetPoolStatus { .. } => "pool",
        Command::Event { .. } => "event",
    }
}

fn kinds(world: &mut World) -> Vec<&'static str> {
    world.writes().iter().map(kind).collect()
}

/// A cluster with one pool and a Service that is served.
fn served() -> (World, crate::model::ObjectRef) {
    let mut world = World::new(&["n1", "n2"]);
    world.pool("p 192.0.2.1-192.0.2.3");
    let web = world.service("web");
    world.calm();
    (world, web)
}

#[test]
fn an_address_is_given_in_order_and_taken_in_order() {
    let (mut world, web) = served();
    assert_eq!(world.shown(&web), ["192.0.2.1"]);
    assert_eq!(kinds(&mut world), ["protect", "create", "publish"]);
    let finalizers = &world.get(&web).api.finalizers;
    assert_eq!(finalizers[..], ["pointsman.dev/cleanup", "service.kubernetes.io/load-balancer-cleanup"]);

    world.server.delete_service(&web);
    world.calm();
    assert!(world.server.service(&web).is_none());
    let kinds = kinds(&mut world);
    assert_eq!(kinds[..2], ["update", "publish"]);
    assert_eq!(kinds.len(), 4);
    assert!(kinds[2..].contains(&"delete") && kinds[2..].contains(&"unprotect"), "{kinds:?}");
    assert!(world.virtual_ips().is_empty());
}

#[test]
fn events_and_conditions_tell_every_decision_once() {
    let mut world = World::new(&["n1"]);
    world.pool("p 192.0.2.1/32");
    let web = world.service("web");
    world.calm();
    assert_eq!(world.events(), ["AddressAllocated", "Announced"]);
    let conditions = &world.get(&web).api.conditions;
    let told: Vec<_> = conditions.iter().map(|it| it.message.as_str()).collect();
    assert_eq!(told, ["192.0.2.1 from pool p", "192.0.2.1 by node n1"]);

    let late = world.service("late");
    let thief = world.service("thief ip=192.0.2.1");
    world.calm();
    assert_eq!(world.events().len(), 2);
    assert_eq!(world.get(&late).api.conditions[0].reason, "PoolExhausted");
    assert_eq!(world.get(&thief).api.conditions[0].status, "False");
    assert!(world.get(&late).api.finalizers.is_empty(), "nothing to clean up");
    world.pass(600);
    assert_eq!(world.commands.len(), 0, "nothing is said twice");

    world.server.delete_service(&web);
    world.server.delete_service(&thief);
    world.calm();
    assert_eq!(world.shown(&late), ["192.0.2.1"], "whoever waits gets what becomes free");
}

#[test]
fn a_port_that_nobody_serves_is_told_while_it_is_there() {
    let mut world = World::new(&["n1"]);
    world.pool("p 192.0.2.1/32");
    let web = world.service("web");
    let tcp = world.get(&web).ports.clone();
    world.edit(&web, |it| {
        let first = it.ports[0].clone();
        it.ports.push(ServicePort { name: "s".into(), protocol: Protocol::Sctp, port: 5_060, ..first });
    });
    world.calm();
    assert_eq!(world.events(), ["AddressAllocated", "Announced", "ProtocolNotSupported"]);
    let told = &world.get(&web).api.conditions[2];
    assert_eq!((told.kind.as_str(), told.status.as_str()), ("pointsman.dev/PortsServed", "False"));
    assert!(told.message.contains("port 5060"), "{told:?}");
    world.edit(&web, |it| it.ports = tcp);
    world.calm();
    assert_eq!(world.get(&web).api.conditions.len(), 2);
    assert!(world.events().is_empty());
}

#[test]
fn a_new_leader_changes_nothing() {
    let (mut world, web) = served();
    world.service("shared-a share=k ports=1/TCP");
    world.service("shared-b share=k ports=2/TCP");
    world.service("refused ip=203.0.113.1");
    world.calm();
    let before = world.server.objects.clone();
    world.commands.clear();
    world.restart();
    world.calm();
    world.pass(60);
    assert_eq!(world.events(), [""; 0]);
    assert_eq!(before.services, world.server.objects.services);
    assert_eq!(before.virtual_ips, world.server.objects.virtual_ips);

    world.leaders[0].controller.reset();
    world.pass(60);
    assert_eq!(world.writes(), [], "nor does a new term");
    assert_eq!(world.shown(&web), ["192.0.2.1"]);
}

#[test]
fn what_is_not_ours_stays_as_it_is() {
    let mut world = World::new(&["n1"]);
    world.pool("p 192.0.2.0/24");
    let cluster_ip = world.service("cluster-ip type=ClusterIP");
    let other = world.service("other class=example.com/lb");
    world.edit(&other, |it| {
        it.api.finalizers = vec!["service.kubernetes.io/load-balancer-cleanup".into()];
        it.api.external_ips = vec!["198.51.100.1".into()];
        it.api.ingress = vec![crate::model::Ingress::default()];
    });
    let before = world.server.objects.services.clone();
    world.pass(20);
    world.restart();
    world.pass(20);
    assert_eq!(world.writes(), []);
    assert_eq!(before, world.server.objects.services);
    world.server.delete_service(&cluster_ip);
    world.server.delete_service(&other);
    world.pass(20);
    assert_eq!(world.writes(), [], "others' finalizers are others'");
}

#[test]
fn a_service_that_leaves_us_is_cleaned_of_all_that_is_ours() {
    for change in ["web type=ClusterIP", "web class=example.com/lb"] {
        let (mut world, web) = served();
        world.edit(&web, |it| it.api.finalizers.push("example.com/theirs".into()));
        world.service(change);
        world.calm();
        let api = &world.get(&web).api;
        assert_eq!(api.finalizers[..], ["example.com/theirs"], "{change}");
        assert!(api.ingress.is_empty() && api.conditions.is_empty(), "{change}: {api:?}");
        assert!(world.virtual_ips().is_empty(), "{change}");
        world.service("web");
        world.calm();
        assert_eq!(world.shown(&web), ["192.0.2.1"], "and back");
    }
}

#[test]
fn another_address_is_served_before_the_old_one_goes() {
    let (mut world, web) = served();
    world.service("web ip=192.0.2.3");
    world.watch(0, usize::MAX);
    world.decide(0);
    assert_eq!(world.virtual_ips().len(), 2, "the old one stays until the new one is published");
    assert_eq!(world.shown(&web), ["192.0.2.1"]);
    world.calm();
    assert_eq!(world.shown(&web), ["192.0.2.3"]);
    assert_eq!(world.virtual_ips().len(), 1);
}

#[test]
fn two_services_swap_their_addresses() {
    let mut world = World::new(&["n1"]);
    world.pool("p 192.0.2.1-192.0.2.3");
    let a = world.service("a");
    let b = world.service("b");
    world.calm();
    world.service("a ip=192.0.2.3");
    world.calm();
    world.service("b ip=192.0.2.1");
    world.service("a ip=192.0.2.2");
    world.pass(30);
    assert_eq!((world.shown(&a), world.shown(&b)), (vec!["192.0.2.2".into()], vec!["192.0.2.1".into()]));
    world.server.check_at_rest(true);
}

#[test]
fn a_deleted_service_that_comes_again_is_another_one() {
    let (mut world, web) = served();
    world.server.delete_service(&web);
    world.edit(&web, |it| it.api.finalizers.clear());
    let again = world.service("web");
    world.calm();
    assert_eq!(world.shown(&again), ["192.0.2.1"]);
    assert_eq!(world.get(&again).api.finalizers.len(), 2);
    world.server.check_at_rest(true);
}

#[test]
fn external_ips_hold_ours_beside_others() {
    let mut world = World::new(&["n1"]);
    world.options.publish_external_ips = true;
    world.restart();
    world.pool("p 192.0.2.1/32");
    let web = world.service("web");
    world.edit(&web, |it| it.api.external_ips = vec!["198.51.100.1".into()]);
    world.calm();
    assert_eq!(world.get(&web).api.external_ips, ["198.51.100.1", "192.0.2.1"]);
    assert_eq!(world.get(&web).api.our_external_ips, ["192.0.2.1"]);
    world.service("web type=ClusterIP");
    world.calm();
    assert_eq!(world.get(&web).api.external_ips, ["198.51.100.1"]);
    assert!(world.get(&web).api.our_external_ips.is_empty());
}

#[test]
fn nobody_else_is_fought_for_the_status() {
    let (mut world, web) = served();
    world.commands.clear();
    let rival = |ip: &str| crate::model::Ingress { ip: ip.parse().ok(), ..Default::default() };
    world.edit(&web, |it| {
        it.api.ingress = vec![rival("198.51.100.9")];
        it.api.ingress_is_ours = false;
    });
    world.pass(3600);
    let writes = world.commands.iter().filter(|it| kind(it) == "publish").count();
    let conflicts = world.leaders[0].controller.counters().status_conflicts;
    assert!((5..=24).contains(&writes), "{writes} in an hour");
    assert_eq!(conflicts, writes as u64);
    assert_eq!(world.events(), ["StatusConflict"]);
    assert_eq!(world.shown(&web), ["198.51.100.9"]);

    world.edit(&web, |it| it.api.ingress.clear());
    world.pass(301);
    assert_eq!(world.shown(&web), ["192.0.2.1"], "once it lets go, ours comes back");

    let mut taken = 0;
    for _ in 0..600 {
        world.pass(1);
        if world.get(&web).api.ingress_is_ours {
            taken += 1;
            world.edit(&web, |it| {
                it.api.ingress.clear();
                it.api.ingress_is_ours = false;
            });
        }
    }
    assert!(taken < 16, "written {taken} times in ten minutes against somebody who clears it");
}

#[test]
fn of_two_leaders_that_give_an_address_the_faster_one_is_right() {
    let mut world = World::new(&["n1"]);
    world.pool("p 192.0.2.1-192.0.2.9");
    world.elect();
    let protect = |world: &mut World, text: &str| {
        let service = world.service(text);
        world.edit(&service, |it| {
            it.api.finalizers = ["pointsman.dev/cleanup", "service.kubernetes.io/load-balancer-cleanup"]
                .map(str::to_owned)
                .to_vec();
        });
        service
    };
    let any = protect(&mut world, "any");
    world.watch(1, usize::MAX);
    let exact = protect(&mut world, "exact ip=192.0.2.1");
    world.watch(0, usize::MAX);
    world.decide(0);
    let given = world.virtual_ips();
    assert_eq!(given, ["192.0.2.1 exact n1 -/", "192.0.2.2 any n1 -/"]);
    world.decide(1);
    assert_eq!(world.virtual_ips(), given, "the API server refuses a second VirtualIP of that name");
    world.leaders.remove(0);
    world.pass(5);
    assert_eq!(
        (world.shown(&exact), world.shown(&any)),
        (vec!["192.0.2.1".into()], vec!["192.0.2.2".into()])
    );
    world.server.check_at_rest(true);
}

#[test]
fn both_families_are_published_together() {
    let mut world = World::new(&["n1"]);
    world.pool("p 192.0.2.1-192.0.2.9 2001:db8::1-2001:db8::9");
    let web = world.service("web families=dual");
    world.calm();
    assert_eq!(world.shown(&web), ["192.0.2.1", "2001:db8::1"]);
    assert_eq!(kinds(&mut world).iter().filter(|it| **it == "publish").count(), 1);

    world.service("web families=IPv4");
    world.watch(0, usize::MAX);
    world.decide(0);
    assert_eq!(world.shown(&web), ["192.0.2.1"]);
    assert_eq!(world.virtual_ips().len(), 2, "what is not shown any more goes after that");
    world.calm();
    assert_eq!(world.virtual_ips(), ["192.0.2.1 web n1 n1/web"]);

    world.service("web families=prefer");
    world.agents.get_mut("n1").unwrap().is_alive = false;
    world.calm();
    assert_eq!(world.virtual_ips().len(), 2);
    assert_eq!(world.shown(&web), ["192.0.2.1"], "until the second is served the first stays alone");
    world.agents.get_mut("n1").unwrap().is_alive = true;
    world.calm();
    assert_eq!(world.shown(&web), ["192.0.2.1", "2001:db8::1"]);
}

#[test]
fn what_we_may_not_write_is_tried_ever_less_often() {
    let (mut world, web) = served();
    world.server.delete_service(&web);
    world.faults.extend(std::iter::repeat_n(super::Fault::Lost, 6));
    world.writes();
    let mut times = Vec::new();
    for second in 0..80 {
        if !world.writes().is_empty() {
            times.push(second);
        }
        world.pass(1);
    }
    let pauses: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    // One of the writes that got lost is the status of the pool.
    assert_eq!(pauses[..4], [1, 2, 4, 8], "{times:?}");
    assert!(world.server.service(&web).is_none());
}
