use std::time::Duration;

use super::*;
use crate::model::{AgentLease, Selector};

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn lease(node: &str, renewed: &str) -> Arc<AgentLease> {
    Arc::new(AgentLease {
        node: node.into(),
        holder: node.into(),
        renewed: renewed.into(),
        duration: s(15),
        link_device: Some("eth0".into()),
        unfit: None,
    })
}

#[derive(Default)]
struct Cluster {
    nodes: BTreeMap<String, Arc<Node>>,
    liveness: Liveness,
    advertisements: BTreeMap<ObjectRef, Arc<Advertisement>>,
}

impl Cluster {
    fn new(names: &[&str]) -> Self {
        let mut cluster = Self::default();
        for name in names {
            let labels = [("name".to_owned(), (*name).to_owned())].into();
            let node = Node { name: (*name).into(), labels, excluded: false };
            cluster.nodes.insert((*name).into(), Arc::new(node));
            cluster.liveness.change(name, Some(&lease(name, "1")), s(0));
        }
        cluster
    }

    fn choose(&self, claim: &Claim<'_>, present: Option<&str>, load: &[(&str, usize)]) -> Choice {
        let nodes =
            Nodes { nodes: &self.nodes, liveness: &self.liveness, advertisements: &self.advertisements };
        let load: BTreeMap<_, _> = load.iter().copied().collect();
        nodes.choose(claim, present, |node| load.get(node).copied().unwrap_or(0))
    }

    fn exclude(&mut self, name: &str) {
        Arc::make_mut(self.nodes.get_mut(name).unwrap()).excluded = true;
    }
}

fn claim(local: &[&[&str]]) -> Claim<'static> {
    let local = local.iter().map(|nodes| nodes.iter().map(|node| (*node).to_owned()).collect());
    Claim { address: "192.0.2.1".parse().unwrap(), pool: None, local: local.collect() }
}

fn node(choice: &Choice) -> Option<&str> {
    choice.node.as_deref()
}

#[test]
fn leases_are_judged_by_our_clock_alone() {
    let mut liveness = Liveness::new(s(2));
    assert!(liveness.change("a", Some(&lease("a", "2001")), s(100)), "first seen: alive from then");
    assert!(!liveness.change("a", Some(&lease("a", "1970")), s(110)), "a clock set back renews as well");
    assert_eq!(liveness.next_due(), Some(s(127)));
    assert!(!liveness.change("a", Some(&lease("a", "1970")), s(120)), "the same again is no renewal");
    assert_eq!(liveness.expire(s(126)), Vec::<String>::new());
    assert_eq!(liveness.expire(s(127)), ["a"]);
    assert!(!liveness.is_alive("a"));
    assert_eq!(liveness.expire(s(200)), Vec::<String>::new(), "said once");
    assert!(liveness.change("a", Some(&lease("a", "2002")), s(201)), "it is back");

    let mut given_up = (*lease("a", "2002")).clone();
    given_up.holder.clear();
    assert!(liveness.change("a", Some(&Arc::new(given_up)), s(202)), "given up at once");
    assert!(!liveness.is_alive("a"));
    assert_eq!(liveness.next_due(), None);
    liveness.restart(s(300));
    assert!(!liveness.is_alive("a"), "who gave up stays away");
    liveness.change("a", Some(&lease("a", "2003")), s(300));
    assert!(liveness.change("a", None, s(301)));
}

#[test]
fn after_a_pause_of_ours_everybody_counts_anew() {
    let mut liveness = Liveness::new(s(0));
    liveness.change("a", Some(&lease("a", "1")), s(0));
    liveness.restart(s(1000));
    assert_eq!(liveness.expire(s(1014)), Vec::<String>::new());
    assert_eq!(liveness.expire(s(1015)), ["a"]);
    liveness.restart(s(2000));
    assert!(liveness.is_alive("a"));
}

#[test]
fn the_present_node_stays_and_the_idlest_takes_over() {
    let mut cluster = Cluster::new(&["a", "b", "c"]);
    let any = claim(&[]);
    let load = [("a", 9), ("b", 3), ("c", 2)];
    assert_eq!(node(&cluster.choose(&any, Some("a"), &load)), Some("a"), "sticky, whatever its load");
    assert_eq!(node(&cluster.choose(&any, None, &load)), Some("c"));
    cluster.exclude("c");
    assert_eq!(node(&cluster.choose(&any, Some("c"), &load)), Some("b"));
    cluster.liveness.change("b", None, s(1));
    assert_eq!(node(&cluster.choose(&any, Some("b"), &load)), Some("a"));
}

#[test]
fn where_nobody_is_better_the_present_node_keeps_the_address_unless_it_must_not() {
    let mut cluster = Cluster::new(&["a"]);
    let nowhere = cluster.choose(&claim(&[&[]]), Some("a"), &[]);
    assert_eq!(node(&nowhere), Some("a"), "without endpoints, connections are refused there");
    assert!(nowhere.unfit.unwrap().contains("1 without a ready endpoint"));
    assert_eq!(node(&cluster.choose(&claim(&[&[]]), None, &[])), None);

    cluster.liveness.change("a", None, s(1));
    let dead = cluster.choose(&claim(&[]), Some("a"), &[]);
    assert_eq!(node(&dead), Some("a"), "the kernel forwards without the agent");
    assert_eq!(dead.unfit.unwrap(), "none of 1 node can announce it: 1 without a live agent");

    cluster.exclude("a");
    assert_eq!(node(&cluster.choose(&claim(&[]), Some("a"), &[])), None);
    cluster.nodes.clear();
    let gone = cluster.choose(&claim(&[]), Some("a"), &[]);
    assert_eq!((node(&gone), gone.unfit.as_deref()), (None, Some("there are no nodes")));
}

#[test]
fn local_traffic_goes_where_all_its_services_have_endpoints_or_else_any() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    for (local, present, expected) in [
        (&[&["b"][..]][..], None, "b"),
        (&[&["b"]], Some("a"), "b"),
        (&[&["a", "b"], &["b", "c"]], Some("a"), "b"),
        (&[&["a"], &["b"]], Some("b"), "b"),
        (&[&["a"], &[]], None, "a"),
        (&[&["a", "unknown"]], None, "a"),
    ] {
        assert_eq!(node(&cluster.choose(&claim(local), present, &[])), Some(expected), "{local:?}");
    }
}

#[test]
fn pools_of_metallb_follow_its_advertisements() {
    let mut pool = crate::plan::testing::pool("p 192.0.2.0/24");
    pool.origin = PoolOrigin::MetalLb("metallb-system".into());
    pool.labels.insert("tier".into(), "gold".into());
    let select = |key: &str, value: &str| Selector {
        labels: [(key.to_owned(), value.to_owned())].into(),
        ..Selector::default()
    };
    let base = Advertisement { object: ObjectRef::new("metallb-system", "l2"), ..Advertisement::default() };
    let with = |change: &dyn Fn(&mut Advertisement)| {
        let mut advertisement = base.clone();
        change(&mut advertisement);
        Some(advertisement)
    };
    for (what, advertisement, expected) in [
        ("none at all", None, None),
        ("one for everything", with(&|_| ()), Some("a")),
        ("by name", with(&|it| it.pools = vec!["p".into()]), Some("a")),
        ("another pool's", with(&|it| it.pools = vec!["q".into()]), None),
        ("by label", with(&|it| it.pool_selectors = vec![select("tier", "gold")]), Some("a")),
        ("another label", with(&|it| it.pool_selectors = vec![select("tier", "tin")]), None),
        ("a node", with(&|it| it.node_selectors = vec![select("name", "b")]), Some("b")),
        ("its device", with(&|it| it.interfaces = vec!["eth1".into(), "eth0".into()]), Some("a")),
        ("another device", with(&|it| it.interfaces = vec!["eth1".into()]), None),
        ("another namespace", with(&|it| it.object.namespace = "other".into()), None),
    ] {
        let mut cluster = Cluster::new(&["a", "b"]);
        cluster.advertisements =
            advertisement.into_iter().map(|it| (it.object.clone(), Arc::new(it))).collect();
        let claim = Claim { pool: Some(&pool), ..claim(&[]) };
        assert_eq!(node(&cluster.choose(&claim, None, &[("b", 1)])), expected, "{what}");
    }
}

#[test]
fn ties_are_spread() {
    let cluster = Cluster::new(&["a", "b", "c", "d"]);
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for last in 0..=255 {
        let claim = Claim { address: IpAddr::from([192, 0, 2, last]), ..claim(&[]) };
        *counts.entry(cluster.choose(&claim, None, &[]).node.unwrap()).or_default() += 1;
    }
    assert!(counts.len() == 4 && counts.values().all(|count| (40..=90).contains(count)), "{counts:?}");
}

#[test]
fn endpoints_that_shut_down_count_only_where_none_is_ready() {
    let slice = |states: &[(&str, bool, bool)]| {
        let mut slice = EndpointSlice {
            object: ObjectRef::default(),
            place: None,
            service: None,
            family: None,
            ports: Vec::new(),
            endpoints: Vec::new(),
            weight: None,
        };
        for (node, ready, serving) in states {
            let mut endpoint = crate::model::Endpoint::ready(IpAddr::from([10, 0, 0, 1]));
            (endpoint.ready, endpoint.serving, endpoint.terminating) = (*ready, *serving, !*ready);
            endpoint.node = Some((*node).into());
            slice.endpoints.push(endpoint);
        }
        slice
    };
    let nodes =
        |slices: &[EndpointSlice]| endpoint_nodes(slices.iter(), false).into_iter().collect::<Vec<_>>();
    assert_eq!(nodes(&[slice(&[("a", true, true)]), slice(&[("b", false, true)])]), ["a"]);
    assert_eq!(nodes(&[slice(&[("a", false, false), ("b", false, true)])]), ["b"]);
    assert_eq!(nodes(&[]), [""; 0]);
    let published = endpoint_nodes([slice(&[("a", false, false)])].iter(), true);
    assert_eq!(published.into_iter().collect::<Vec<_>>(), ["a"]);
}
