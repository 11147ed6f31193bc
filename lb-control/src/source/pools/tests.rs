use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;
use crate::model::Labels;

fn read<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn metallb(spec: Value) -> Result<Pool, Vec<FieldError>> {
    metallb_pool(&read(json!({
        "apiVersion": "metallb.io/v1beta1",
        "kind": "IPAddressPool",
        "metadata": { "name": "p", "namespace": "metallb-system", "labels": { "tier": "edge" } },
        "spec": spec,
    })))
}

fn messages<T>(result: Result<T, Vec<FieldError>>) -> Vec<String> {
    let errors = result.err().unwrap_or_default();
    errors.into_iter().map(|error| format!("{}: {}", error.field, error.message)).collect()
}

#[test]
fn a_pool_of_metallb_is_read_with_its_defaults() {
    let pool = metallb(json!({ "addresses": ["192.0.2.0/24"] })).unwrap();
    assert_eq!((pool.auto_assign, pool.avoid_buggy_ips, pool.disabled), (true, false, false));
    assert_eq!(pool.key(), "metallb.io/metallb-system/p");
    assert_eq!(pool.labels, Labels::from([("tier".into(), "edge".into())]));
    assert!(!pool.is_restricted());
}

#[test]
fn a_pool_of_metallb_says_whom_it_serves() {
    let pool = metallb(json!({
        "addresses": ["192.0.2.9/24", "2001:db8::1 - 2001:db8::2"],
        "autoAssign": false,
        "avoidBuggyIPs": true,
        "serviceAllocation": {
            "priority": 50,
            "namespaces": ["shop"],
            "namespaceSelectors": [{ "matchLabels": { "team": "shop" } }],
            "serviceSelectors": [{ "matchExpressions": [{ "key": "tier", "operator": "In", "values": ["a"] }] }],
        },
    }))
    .unwrap();
    let ranges: Vec<_> = pool.ranges.iter().map(ToString::to_string).collect();
    assert_eq!(ranges, ["192.0.2.0-192.0.2.255", "2001:db8::1-2001:db8::2"], "host bits are dropped");
    assert_eq!((pool.auto_assign, pool.avoid_buggy_ips, pool.priority), (false, true, 50));
    assert_eq!(pool.namespaces, ["shop"]);
    assert_eq!(pool.namespace_selectors[0].labels, Labels::from([("team".into(), "shop".into())]));
    assert_eq!(pool.service_selectors[0].requirements[0].operator, Operator::In(vec!["a".into()]));
}

#[test]
fn priorities_keep_the_order_of_metallb() {
    // Pinned pools by priority, then those without one, then pools for everybody.
    let order = [Some(-5), Some(1), Some(100), Some(i64::MAX), Some(0), None].map(metallb_priority);
    assert!(order.is_sorted_by(|one, next| one < next), "{order:?}");
    assert_eq!(metallb_priority(Some(i64::MIN)), i32::MIN);
}

#[test]
fn what_is_wrong_with_a_pool_of_metallb_is_told() {
    assert_eq!(messages(metallb(json!({}))), ["spec.addresses: is empty: a pool needs at least one address"]);
    let found = messages(metallb(json!({
        "addresses": ["192.0.2.0/33", "192.0.2.1-192.0.2.9", "192.0.2.8/31"],
        "serviceAllocation": { "serviceSelectors": [{ "matchExpressions": [
            { "key": "a", "operator": "In" },
            { "key": "a", "operator": "Exists", "values": ["b"] },
            { "key": "a", "operator": "Like" },
        ] }] },
    })));
    let at = "spec.serviceAllocation.serviceSelectors[0].matchExpressions";
    assert_eq!(found.len(), 5, "{found:#?}");
    assert!(found[0].starts_with("spec.addresses[0]: "), "{found:#?}");
    assert_eq!(found[1], "spec.addresses[2]: `192.0.2.8/31` overlaps 192.0.2.1-192.0.2.9 of the same pool");
    assert_eq!(found[2], format!("{at}[0].values: must not be empty for In"));
    assert_eq!(found[3], format!("{at}[1].values: must be empty for Exists"));
    assert_eq!(found[4], format!("{at}[2].operator: `Like` is none of In, NotIn, Exists, DoesNotExist"));
}

#[test]
fn advertisements_are_read() {
    let metadata = json!({ "name": "a", "namespace": "metallb-system" });
    let all = l2_advertisement(&read(json!({ "metadata": metadata }))).unwrap();
    assert_eq!(
        all,
        Advertisement { object: ObjectRef::new("metallb-system", "a"), ..Advertisement::default() },
        "one without a specification is about all pools"
    );
    let spec = json!({
        "ipAddressPools": ["p"],
        "ipAddressPoolSelectors": [{ "matchLabels": { "tier": "edge" } }],
        "nodeSelectors": [{ "matchLabels": { "rack": "1" } }],
        "interfaces": ["eth0"],
    });
    let one = l2_advertisement(&read(json!({ "metadata": metadata, "spec": spec }))).unwrap();
    assert_eq!((one.pools.as_slice(), one.interfaces.as_slice()), (&["p".into()][..], &["eth0".into()][..]));
    assert_eq!((one.pool_selectors.len(), one.node_selectors.len()), (1, 1));
    let bgp = bgp_advertisement(&read(json!({ "metadata": metadata, "spec": spec }))).unwrap();
    assert_eq!(bgp, Advertisement { interfaces: Vec::new(), ..one });
    let spec = json!({ "serviceSelectors": [{}] });
    let found = messages(l2_advertisement(&read(json!({ "metadata": metadata, "spec": spec }))));
    assert!(found[0].starts_with("spec.serviceSelectors: is not supported"), "{found:?}");
}

#[test]
fn a_pool_of_ours_says_whom_it_serves() {
    let pool: AddressPool = read(json!({
        "metadata": { "name": "p" },
        "spec": {
            "addresses": ["192.0.2.0/24"],
            "namespaces": ["shop"],
            "namespaceSelectors": [{ "matchLabels": { "team": "shop" } }],
            "serviceSelectors": [{}],
            "priority": -1,
            "disabled": true,
        },
    }));
    let pool = address_pool(&pool, None).unwrap();
    assert_eq!((pool.priority, pool.disabled, pool.auto_assign), (-1, true, true));
    assert_eq!(pool.namespaces, ["shop"]);
    assert_eq!((pool.namespace_selectors.len(), pool.service_selectors.len()), (1, 1));
    assert_eq!(pool.origin, PoolOrigin::Pointsman);
}

#[test]
fn a_virtual_ip_is_read() {
    let object = json!({
        "metadata": { "name": "192.0.2.1", "uid": "u", "resourceVersion": "7" },
        "spec": {
            "address": "192.0.2.1",
            "pool": "p",
            "services": [{ "namespace": "a", "name": "x" }, { "namespace": "a", "name": "y" }],
            "node": "edge-1",
        },
        "status": { "node": "edge-2", "services": [{ "namespace": "a", "name": "x" }] },
    });
    let vip = virtual_ip(&read(object.clone())).unwrap();
    let (x, y) = (ObjectRef::new("a", "x"), ObjectRef::new("a", "y"));
    assert_eq!((vip.services, vip.live), (Few::from([x.clone(), y]), Few::from([x])));
    assert_eq!((vip.node.as_deref(), vip.live_node.as_deref()), (Some("edge-1"), Some("edge-2")));
    assert_eq!((vip.uid.as_str(), vip.resource_version.as_str(), vip.deleting), ("u", "7", false));

    let mut other = object;
    other["spec"]["address"] = json!("192.0.2.2");
    assert!(messages(virtual_ip(&read(other)))[0].contains("the name says 192.0.2.1"));
}
