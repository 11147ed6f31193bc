//! One address of several Services, also of several namespaces: who answers on which port.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use pointsman_tests::{
    cluster_world::ClusterWorld,
    lab::{Options, POD},
};
use serde_json::{Value, json};

use super::kit::{
    HTTP, Port, ask, cluster, eventually, service, slices, wait_addresses, wait_condition, wait_event, with,
};

const IP: &str = "192.0.2.7";
/// The other port of the address.
const ADMIN: Port = Port("http", "TCP", 81, HTTP.3);

/// A pool for the test's namespace and one more, whose name is given.
fn pool_of_two(world: &ClusterWorld) -> Result<String> {
    let other = world.add_namespace("other")?;
    let spec = json!({"addresses": ["192.0.2.0/28"], "namespaces": [world.namespace, other]});
    world.apply("AddressPool", &world.cluster.name("pool"), &json!({ "spec": spec }))?;
    Ok(other)
}

/// A Service that wants [`IP`] and shares it by a key.
fn wishes(world: &ClusterWorld, name: &str, port: Port, key: &str, more: &Value) -> Result<()> {
    let mut spec = json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"]});
    for (field, value) in more.as_object().into_iter().flatten() {
        spec[field] = value.clone();
    }
    let annotations = json!({"pointsman.dev/load-balancer-ips": IP, "pointsman.dev/allow-shared-ip": key});
    service(world, name, &[port], &annotations, &spec)
}

fn is_refused(world: &ClusterWorld, name: &str) -> Result<()> {
    wait_condition(world, name, "Allocated", ("False", "SharingRefused"))?;
    wait_event(world, name, "SharingRefused")?;
    wait_addresses(world, name, &[])
}

fn at(port: Port) -> Result<SocketAddr> {
    Ok(SocketAddr::new(IP.parse::<IpAddr>()?, port.2))
}

#[test]
fn two_namespaces_share_an_address_with_consent() -> Result<()> {
    cluster(2, |world, _| {
        let other = pool_of_two(world)?;
        let (admin, stranger) = (format!("{other}/admin"), format!("{other}/stranger"));
        for (name, port, backend) in [("web", HTTP, 1), (admin.as_str(), ADMIN, 2)] {
            wishes(world, name, port, "together", &json!({}))?;
            slices(world, name, &[port], &[(backend, json!({}))])?;
            wait_addresses(world, name, &[IP])?;
        }
        ensure!(ask(world, at(HTTP)?)? == "b1", "the first Service");
        ensure!(ask(world, at(ADMIN)?)? == "b2", "the Service of the other namespace");
        wishes(world, &stranger, Port("http", "TCP", 82, HTTP.3), "apart", &json!({}))?;
        is_refused(world, &stranger)?;
        ensure!(ask(world, at(HTTP)?)? == "b1" && ask(world, at(ADMIN)?)? == "b2", "both go on");

        // One goes: the other keeps the address.
        world.delete("Service", "web")?;
        world.wait("the Service to go", ("Service", "web"), |found| found.is_none())?;
        wait_addresses(world, &admin, &[IP])?;
        ensure!(ask(world, at(ADMIN)?)? == "b2", "the Service of the other namespace stays");
        // Then it takes its consent back: nobody else comes to the address.
        wishes(world, &admin, ADMIN, "alone", &json!({}))?;
        wishes(world, "web", HTTP, "together", &json!({}))?;
        is_refused(world, "web")?;
        ensure!(ask(world, at(ADMIN)?)? == "b2", "it stays");
        Ok(())
    })
}

/// Under `externalTrafficPolicy: Local`, only a node that has endpoints of all of them could announce
/// the address: they have to be the same, which is known by namespace and selector.
#[test]
fn under_the_local_policy_only_the_same_endpoints_share() -> Result<()> {
    with(Options { backends: 0, pods: 2, ..Options::default() }, &[], |world, _| {
        let other = pool_of_two(world)?;
        let local = |app: &str| json!({"externalTrafficPolicy": "Local", "selector": {"app": app}});
        let here = json!({"nodeName": world.node});
        for (name, port, pod) in [("web", HTTP, POD), ("admin", ADMIN, POD + 1)] {
            wishes(world, name, port, "together", &local("one"))?;
            slices(world, name, &[port], &[(pod, here.clone())])?;
            wait_addresses(world, name, &[IP])?;
        }
        let strangers = [
            ("others".to_owned(), local("two")),
            ("anywhere".to_owned(), json!({"selector": {"app": "one"}})),
            (format!("{other}/elsewhere"), local("one")),
        ];
        for (n, (name, spec)) in (90..).zip(&strangers) {
            wishes(world, name, Port("http", "TCP", n, HTTP.3), "together", spec)?;
            is_refused(world, name)?;
        }
        eventually("both", || {
            let names = [ask(world, at(HTTP)?)?, ask(world, at(ADMIN)?)?];
            ensure!(names == ["p1", "p2"], "{names:?}");
            Ok(())
        })
    })
}
