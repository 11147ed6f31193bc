use proptest::{collection::vec, option, prelude::*};

use super::*;
use crate::{
    model::{ClientAddress, Endpoint, EndpointPort, Few, Node, Protocol},
    plan::{
        ipam::Options,
        testing::{pool, service},
    },
};

const OPTIONS: Options = Options { default_class: true, outside_pools: true, deferred_release: false };

fn slice(name: u8, service: Option<u8>, endpoints: &[u8]) -> EndpointSlice {
    let endpoint = |last: &u8| Endpoint {
        ready: *last < 5,
        terminating: *last > 6,
        node: Some(format!("n{}", last % 2).into()),
        for_zones: if *last == 4 {
            Box::default()
        } else {
            [["a", "b"][usize::from(last % 2)].into()].into()
        },
        ..Endpoint::ready([10, 0, 0, *last].into())
    };
    EndpointSlice {
        object: ObjectRef::new("default", format!("slice{name}")),
        place: None,
        service: service.map(|number| format!("s{number}")),
        family: Some(Family::V4),
        ports: vec![EndpointPort { name: "80-TCP".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints: endpoints.iter().map(endpoint).collect(),
        weight: None,
    }
}

fn virtual_ip(last: u8, services: &[u8], node: Option<u8>) -> VirtualIp {
    VirtualIp {
        address: [192, 0, 2, last].into(),
        pool: Some("p".into()),
        services: services.iter().map(|number| ObjectRef::new("default", format!("s{number}"))).collect(),
        node: node.map(|number| format!("n{number}")),
        live_node: None,
        live: Few::default(),
        uid: String::new(),
        resource_version: String::new(),
        deleting: false,
    }
}

fn node(name: &str, zone: &str) -> Node {
    Node {
        name: name.into(),
        labels: [(crate::model::LABEL_ZONE.to_owned(), zone.to_owned())].into(),
        excluded: false,
    }
}

fn deciding(holdings: Holdings) -> Planner {
    let mut ipam = Ipam::new(OPTIONS);
    ipam.adopt(holdings);
    Planner::new(true, "n1", Addressing::Decides(Box::new(ipam)))
}

fn following() -> Planner {
    Planner::new(true, "n1", Addressing::Follows)
}

fn any_change() -> impl Strategy<Value = ObjectChange> {
    let checks = prop_oneof![Just(""), Just(" check=tcp"), Just(" check=http_port=8080")];
    let service_change = (0..4u8, any::<bool>(), any::<bool>(), checks);
    let service_change = service_change.prop_map(|(number, is_there, local, check)| {
        let mut service = service(&format!("s{number}{check}"));
        service.local_traffic_only = local;
        service.health_check_node_port = Some(32_000 + u16::from(number));
        ObjectChange::Service(service.object.clone(), is_there.then(|| service.into()))
    });
    let slice_change = (0..4u8, option::of(0..4u8), vec(0..9u8, 0..4), any::<bool>()).prop_map(
        |(name, owner, endpoints, is_there)| {
            let slice = slice(name, owner, &endpoints);
            ObjectChange::Slice(slice.object.clone(), is_there.then(|| slice.into()))
        },
    );
    let vip_change = (0..3u8, vec(0..4u8, 0..3), option::of(0..3u8), any::<bool>()).prop_map(
        |(last, services, node, is_there)| {
            let vip = virtual_ip(last, &services, node);
            ObjectChange::VirtualIp(vip.address, is_there.then(|| vip.into()))
        },
    );
    let node_change = ("[ab]", any::<bool>()).prop_map(|(zone, is_there)| {
        ObjectChange::Node("n1".into(), is_there.then(|| node("n1", &zone).into()))
    });
    let pool_change = any::<bool>().prop_map(|is_there| pool_change("p 192.0.2.0/30").filtered(is_there));
    prop_oneof![4 => service_change, 4 => slice_change, 4 => vip_change, 1 => node_change, 1 => pool_change]
}

fn pool_change(text: &str) -> ObjectChange {
    let pool = pool(text);
    ObjectChange::Pool(pool.key(), Some(pool.into()))
}

impl ObjectChange {
    fn filtered(self, is_there: bool) -> Self {
        match self {
            Self::Pool(key, pool) => Self::Pool(key, pool.filter(|_| is_there)),
            other => other,
        }
    }
}

/// Changes of objects, then what health checks tell of backends: by the last byte of the address, the
/// check, and whether it works.
type Step = (Vec<ObjectChange>, Vec<(u8, bool, bool)>);

fn any_step() -> impl Strategy<Value = Step> {
    (vec(any_change(), 0..4), vec((0..9u8, any::<bool>(), any::<bool>()), 0..4))
}

/// Step by step comes to the same as all at once, and the effects name all that differs.
fn check(mut planner: Planner, fresh: impl Fn(Holdings) -> Planner, steps: Vec<Step>) {
    for (changes, verdicts) in steps {
        let verdicts = verdicts.into_iter().map(|(last, http, works)| {
            let target = target(last, if http { "http port=8080" } else { "tcp" });
            (target, (!works).then(|| "x".into()))
        });
        check_step(&mut planner, &fresh, |planner| planner.apply(changes));
        check_step(&mut planner, &fresh, |planner| planner.health(verdicts));
    }
}

fn check_step(
    planner: &mut Planner,
    fresh: impl Fn(Holdings) -> Planner,
    step: impl FnOnce(&mut Planner) -> Effects,
) {
    let before = planner.plan().clone();
    let held = planner.holdings();
    let placed = |planner: &Planner| -> BTreeSet<_> {
        planner.backends().map(|address| (address, planner.is_local(&address))).collect()
    };
    let before_backends = placed(planner);
    let before_asked = planner.targets.asked();
    let effects = step(planner);

    let mut whole = fresh(held);
    whole.apply(Objects::default().changes_to(planner.objects()));
    let unhealthy = planner.targets.unhealthy().clone();
    whole.health(unhealthy.into_iter().map(|(target, why)| (target, Some(why))));
    assert_eq!(planner.targets.unhealthy(), whole.targets.unhealthy());
    let asked = planner.targets.asked();
    assert_eq!(asked, whole.targets.asked());
    assert_eq!(effects.targets, before_asked.symmetric_difference(&asked).cloned().collect());
    let plan = planner.plan();
    assert_eq!(plan, whole.plan());
    for key in before.desired.entries.keys().chain(plan.desired.entries.keys()) {
        let differs = before.desired.entries.get(key) != plan.desired.entries.get(key);
        assert!(!differs || effects.services.contains(&key.service), "{key}");
    }
    let differing =
        |old: &BTreeSet<IpAddr>, new: &BTreeSet<IpAddr>| old.symmetric_difference(new).copied().collect();
    let vips = |plan: &Plan| plan.desired.vips.keys().copied().collect::<BTreeSet<_>>();
    assert_eq!(effects.vips, differing(&vips(&before), &vips(plan)));
    let backends: BTreeSet<_> = planner.backends().collect();
    assert_eq!(backends, plan.desired.backend_addresses());
    let other = before_backends.symmetric_difference(&placed(planner)).map(|(address, _)| *address).collect();
    assert_eq!(effects.backends, other);
    let local = |address: &IpAddr| planner.is_local(address) == Some(true);
    assert_eq!(
        backends.iter().copied().filter(local).collect::<BTreeSet<_>>(),
        plan.desired.local_addresses()
    );
    for object in before.reports.keys().chain(plan.reports.keys()) {
        let differs = before.reports.get(object) != plan.reports.get(object);
        assert_eq!(differs, effects.reports.contains(object), "{object}");
    }
    for object in before.health_checks.keys().chain(plan.health_checks.keys()) {
        let differs = before.health_checks.get(object) != plan.health_checks.get(object);
        assert_eq!(differs, effects.health_checks.contains(object), "{object}");
    }
}

proptest! {
    #[test]
    fn deciding_is_as_if_from_scratch(steps in vec(any_step(), 1..10)) {
        check(deciding(Holdings::new()), deciding, steps);
    }

    #[test]
    fn following_is_as_if_from_scratch(steps in vec(any_step(), 1..10)) {
        check(following(), |_| following(), steps);
    }
}

#[test]
fn one_event_costs_one_service() {
    let mut planner = following();
    let changes = (0..200u8).flat_map(|number| {
        let service = service(&format!("s{number}"));
        let vip = virtual_ip(number, &[number], Some(1));
        let slice = slice(number, Some(number), &[1, 2, 3]);
        [
            ObjectChange::Service(service.object.clone(), Some(service.into())),
            ObjectChange::VirtualIp(vip.address, Some(vip.into())),
            ObjectChange::Slice(slice.object.clone(), Some(slice.into())),
        ]
    });
    planner.apply(changes);
    let before = planner.resolved();
    let slice = slice(7, Some(7), &[1, 2]);
    let effects = planner.apply([ObjectChange::Slice(slice.object.clone(), Some(slice.into()))]);
    assert_eq!(planner.resolved() - before, 1);
    assert_eq!(effects.services, [ObjectRef::new("default", "s7")].into());
}

#[test]
fn only_the_node_that_a_virtual_ip_names_has_the_address() {
    let mut planner = following();
    let service = service("s0");
    let vip = |node| {
        let vip = virtual_ip(9, &[0], node);
        ObjectChange::VirtualIp(vip.address, Some(vip.into()))
    };
    planner.apply([ObjectChange::Service(service.object.clone(), Some(service.into())), vip(Some(2))]);
    assert!(planner.plan().desired.vips.is_empty());
    assert_eq!(planner.plan().desired.entries.len(), 1, "its entries are ready all the same");
    let effects = planner.apply([vip(Some(1))]);
    assert_eq!(effects.vips.len(), 1);
    assert!(effects.services.is_empty(), "the maps stay as they are");
    assert!(planner.apply([vip(None)]).vips.len() == 1 && planner.plan().desired.vips.is_empty());
}

#[test]
fn health_checks_follow_the_service_and_its_endpoints() {
    let mut planner = following();
    let mut web = service("s0");
    web.local_traffic_only = true;
    web.health_check_node_port = Some(32_000);
    let object = web.object.clone();
    let told = |planner: &mut Planner, change| {
        let effects = planner.apply([change]);
        let check = planner.plan().health_checks.get(&object);
        (effects.health_checks.len(), check.map(|check| check.endpoints))
    };
    let endpoints = |last: &[u8]| {
        let slice = slice(0, Some(0), last);
        ObjectChange::Slice(slice.object.clone(), Some(slice.into()))
    };
    let is = |service: Service| ObjectChange::Service(object.clone(), Some(service.into()));
    assert_eq!(told(&mut planner, is(web.clone())), (1, Some(0)));
    assert_eq!(told(&mut planner, endpoints(&[1, 2, 3])), (1, Some(2)), "10.0.0.2 is elsewhere");
    assert_eq!(told(&mut planner, endpoints(&[1, 3])), (0, Some(2)));
    assert_eq!(told(&mut planner, endpoints(&[7])), (1, Some(0)));
    web.local_traffic_only = false;
    assert_eq!(told(&mut planner, is(web)), (1, None));
}

#[test]
fn what_its_status_says_is_no_news() {
    let mut planner = following();
    let service = service("s0");
    let mut vip = virtual_ip(9, &[0], Some(1));
    let object = service.object.clone();
    planner.apply([
        ObjectChange::Service(object.clone(), Some(service.into())),
        ObjectChange::VirtualIp(vip.address, Some(vip.clone().into())),
    ]);
    let before = planner.resolved();
    vip.live_node = Some("n1".into());
    vip.live.insert(object);
    vip.resource_version = "2".into();
    assert!(planner.apply([ObjectChange::VirtualIp(vip.address, Some(vip.into()))]).is_empty());
    assert_eq!(planner.resolved(), before);
}

/// Backends of the entries of a VIP as `address`, with `!` behind those that take no connections.
fn takers(planner: &Planner, vip: u8) -> String {
    let vip = IpAddr::from([192, 0, 2, vip]);
    let entries = planner.plan().desired.entries.iter().filter(|(key, _)| key.vip == vip);
    let backends = entries.flat_map(|(_, entry)| &entry.backends);
    let one = |(address, backend): (&std::net::SocketAddr, &crate::model::DesiredBackend)| {
        let keeps = if backend.takes_connections() { "" } else { "!" };
        format!("{}{keeps}", address.ip().to_string().rsplit('.').next().unwrap())
    };
    backends.map(one).collect::<Vec<_>>().join(" ")
}

fn checked_service(name: &str, check: &str) -> ObjectChange {
    let service = service(&format!("{name} check={check}"));
    ObjectChange::Service(service.object.clone(), Some(service.into()))
}

fn slice_change(slice: EndpointSlice) -> ObjectChange {
    ObjectChange::Slice(slice.object.clone(), Some(slice.into()))
}

fn vip_change(vip: VirtualIp) -> ObjectChange {
    ObjectChange::VirtualIp(vip.address, Some(vip.into()))
}

fn target(last: u8, check: &str) -> CheckTarget {
    let check = Arc::new(check.parse().unwrap());
    CheckTarget { address: ([10, 0, 0, last], 8080).into(), check, header: ClientAddress::Path }
}

fn fails(last: u8) -> (CheckTarget, Option<Arc<str>>) {
    (target(last, "tcp"), Some("connect: refused".into()))
}

fn works(last: u8) -> (CheckTarget, Option<Arc<str>>) {
    (target(last, "tcp"), None)
}

/// Services with the same check and backend have one target in common; each is told of it.
#[test]
fn who_fails_takes_nothing_new_of_any_service() {
    let mut planner = following();
    let effects = planner.apply([
        checked_service("s0", "tcp"),
        checked_service("s1", "tcp"),
        checked_service("s2", "tcp_interval=9s"),
        slice_change(slice(0, Some(0), &[1, 2])),
        slice_change(slice(1, Some(1), &[2, 3])),
        slice_change(slice(2, Some(2), &[2, 3])),
        vip_change(virtual_ip(1, &[0], Some(1))),
        vip_change(virtual_ip(2, &[1], Some(1))),
        vip_change(virtual_ip(3, &[2], Some(1))),
    ]);
    let other = |last| target(last, "tcp interval=9s");
    let expected: BTreeSet<_> =
        [1, 2, 3].map(|last| target(last, "tcp")).into_iter().chain([other(2), other(3)]).collect();
    assert_eq!(effects.targets, expected);
    let before = planner.resolved();
    let effects = planner.health([fails(2)]);
    let both = BTreeSet::from([ObjectRef::new("default", "s0"), ObjectRef::new("default", "s1")]);
    assert_eq!((&effects.services, &effects.reports), (&both, &both));
    assert_eq!(planner.resolved() - before, 2, "only those that it is something to");
    assert_eq!([1, 2, 3].map(|vip| takers(&planner, vip)), ["1 2!", "2! 3", "2 3"]);
    assert!(planner.health([fails(2)]).is_empty(), "that is known");
    planner.health([fails(1)]);
    assert_eq!(takers(&planner, 1), "1 2", "all fail");
    let problems =
        |planner: &Planner| planner.plan().reports[&ObjectRef::new("default", "s0")].problems.clone();
    assert!(problems(&planner)[0].message.contains("connect: refused"), "{:?}", problems(&planner));
    planner.health([works(2)]);
    assert_eq!([1, 2].map(|vip| takers(&planner, vip)), ["1! 2", "2 3"]);
    assert!(problems(&planner).is_empty());
    let health = planner.plan().reports[&ObjectRef::new("default", "s0")].health.clone().unwrap();
    assert_eq!((health.healthy, health.unhealthy), (1, 1));
}

#[test]
fn a_node_asks_for_its_own_addresses_only() {
    let mut planner = following();
    let effects = planner.apply([
        checked_service("s0", "tcp"),
        slice_change(slice(0, Some(0), &[1, 2])),
        vip_change(virtual_ip(1, &[0], Some(2))),
    ]);
    assert!(effects.targets.is_empty(), "another node has the address");
    assert!(planner.health([fails(1)]).is_empty());
    assert_eq!(takers(&planner, 1), "1 2");
    // It comes here: from now on they are asked, and count as healthy until shown otherwise.
    let effects = planner.apply([vip_change(virtual_ip(1, &[0], Some(1)))]);
    assert_eq!(effects.targets, [1, 2].map(|last| target(last, "tcp")).into());
    assert!(planner.is_asked(&target(1, "tcp")));
    planner.health([fails(1)]);
    assert_eq!(takers(&planner, 1), "1! 2");
    // It goes: what is known goes with it, and word that comes late is nothing to anybody.
    let effects = planner.apply([vip_change(virtual_ip(1, &[0], Some(2)))]);
    assert_eq!(effects.targets.len(), 2);
    assert_eq!(takers(&planner, 1), "1 2");
    assert!(planner.health([fails(1)]).is_empty());
    planner.apply([vip_change(virtual_ip(1, &[0], Some(1)))]);
    assert_eq!(takers(&planner, 1), "1 2", "nothing of before is left");
}

#[test]
fn targets_come_and_go_with_check_and_endpoints() {
    let mut planner = following();
    planner.apply([
        checked_service("s0", "tcp"),
        slice_change(slice(0, Some(0), &[1, 2])),
        vip_change(virtual_ip(1, &[0], Some(1))),
    ]);
    planner.health([fails(1)]);
    // Endpoint 6 is not ready: it takes nothing in any case, and is not asked.
    let effects = planner.apply([slice_change(slice(0, Some(0), &[2, 3, 6]))]);
    assert_eq!(effects.targets, [1, 3].map(|last| target(last, "tcp")).into());
    assert!(!planner.is_asked(&target(1, "tcp")) && planner.is_asked(&target(3, "tcp")));
    let effects = planner.apply([checked_service("s0", "http")]);
    let http = [2, 3].map(|last| target(last, "http"));
    assert_eq!(effects.targets, [2, 3].map(|last| target(last, "tcp")).into_iter().chain(http).collect());
    let plain = service("s0");
    let effects = planner.apply([ObjectChange::Service(plain.object.clone(), Some(plain.into()))]);
    assert_eq!(effects.targets.len(), 2);
    assert!(planner.plan().reports[&ObjectRef::new("default", "s0")].health.is_none());
}

#[test]
fn udp_ports_are_asked_elsewhere() {
    let mut planner = deciding(Holdings::new());
    let report = |planner: &mut Planner, text: &str| {
        let service = service(&format!("s0 ip=192.0.2.1 {text}"));
        planner.apply([ObjectChange::Service(service.object.clone(), Some(service.into()))]);
        planner.plan().reports[&ObjectRef::new("default", "s0")].problems.clone()
    };
    let problems = report(&mut planner, "ports=53/UDP check=tcp");
    assert!(problems.iter().any(|problem| problem.message.contains("with port=")), "{problems:?}");
    for fine in ["ports=53/UDP check=tcp_port=53", "ports=53/TCP check=tcp", "ports=53/UDP"] {
        let problems = report(&mut planner, fine);
        assert!(!problems.iter().any(|problem| problem.message.contains("with port=")), "{problems:?}");
    }
}
