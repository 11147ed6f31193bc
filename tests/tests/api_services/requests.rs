//! Addresses and pools that Services ask for, and what they share.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use pointsman_tests::cluster_world::ClusterWorld;
use serde_json::{Value, json};

use super::kit::{
    HTTP, POOL, Port, addresses, ask, cluster, eventually, serve, service, slices, wait_addresses,
    wait_condition, wait_event,
};

const SINGLE: &str = "SingleStack";

fn v4() -> Value {
    json!({"ipFamilyPolicy": SINGLE, "ipFamilies": ["IPv4"]})
}

/// Writes a Service with annotations, and endpoints on the first backend.
fn annotated(
    world: &ClusterWorld,
    name: &str,
    ports: &[Port],
    annotations: &Value,
    spec: &Value,
) -> Result<()> {
    service(world, name, ports, annotations, spec)?;
    slices(world, name, ports, &[(1, json!({}))])
}

/// A pool with more than addresses.
fn pool(world: &ClusterWorld, name: &str, spec: &Value) -> Result<String> {
    let name = world.cluster.name(name);
    world.apply("AddressPool", &name, &json!({ "spec": spec }))?;
    Ok(name)
}

#[test]
fn an_address_is_asked_for_in_every_spelling() -> Result<()> {
    cluster(1, |world, _| {
        world.pool(&["192.0.2.0/24", "2001:db8:1::/120"])?;
        let names = [
            "pointsman.dev/load-balancer-ips",
            "metallb.io/loadBalancerIPs",
            "metallb.universe.tf/loadBalancerIPs",
        ];
        for (n, annotation) in names.iter().enumerate() {
            let (service, v4, v6) =
                (format!("web-{n}"), format!("192.0.2.{}", 77 + n), format!("2001:db8:1::{}a", n + 1));
            annotated(world, &service, &[HTTP], &json!({*annotation: format!("{v4},{v6}")}), &json!({}))?;
            wait_addresses(world, &service, &[&v4, &v6])?;
            ask(world, SocketAddr::new(v4.parse()?, 80))?;
            ask(world, SocketAddr::new(v6.parse()?, 80))?;
        }
        let mut spec = v4();
        spec["loadBalancerIP"] = json!("192.0.2.99");
        annotated(world, "field", &[HTTP], &json!({}), &spec)?;
        wait_addresses(world, "field", &["192.0.2.99"])
    })
}

#[test]
fn a_request_that_is_refused_is_told_and_heals() -> Result<()> {
    cluster(1, |world, _| {
        world.pool(&POOL)?;
        let wish = json!({"pointsman.dev/load-balancer-ips": "192.0.2.5"});
        annotated(world, "first", &[HTTP], &wish, &v4())?;
        wait_addresses(world, "first", &["192.0.2.5"])?;
        annotated(world, "second", &[HTTP], &wish, &v4())?;
        let refused = wait_condition(world, "second", "Allocated", ("False", "AddressInUse"))?;
        ensure!(refused["message"].to_string().contains("first"), "{refused:#}");
        wait_event(world, "second", "AddressInUse")?;
        wait_addresses(world, "second", &[])?;
        let outside = json!({"pointsman.dev/load-balancer-ips": "198.51.100.1"});
        annotated(world, "outside", &[HTTP], &outside, &v4())?;
        wait_condition(world, "outside", "Allocated", ("False", "NotInPool"))?;
        wait_event(world, "outside", "NotInPool")?;
        world.delete("Service", "first")?;
        wait_addresses(world, "second", &["192.0.2.5"])?;
        wait_condition(world, "second", "Allocated", ("True", "AddressAllocated"))?;
        eventually("an answer", || ask(world, SocketAddr::new(IpAddr::from([192, 0, 2, 5]), 80)))?;
        Ok(())
    })
}

#[test]
fn a_pool_is_asked_for_and_refused_to_others() -> Result<()> {
    cluster(1, |world, _| {
        world.pool(&POOL)?;
        let own = pool(
            world,
            "own",
            &json!({"addresses": ["198.51.100.0/30"], "namespaces": [world.namespace], "autoAssign": false}),
        )?;
        let theirs = pool(
            world,
            "theirs",
            &json!({"addresses": ["203.0.113.0/30"], "namespaces": ["somebody-elses"]}),
        )?;
        let names =
            ["pointsman.dev/address-pool", "metallb.io/address-pool", "metallb.universe.tf/address-pool"];
        for (n, annotation) in names.iter().enumerate() {
            let name = format!("web-{n}");
            annotated(world, &name, &[HTTP], &json!({*annotation: own}), &v4())?;
            wait_addresses(world, &name, &[&format!("198.51.100.{n}")])?;
        }
        annotated(world, "by-name", &[HTTP], &json!({"pointsman.dev/address-pool": theirs}), &v4())?;
        annotated(
            world,
            "by-address",
            &[HTTP],
            &json!({"pointsman.dev/load-balancer-ips": "203.0.113.1"}),
            &v4(),
        )?;
        for name in ["by-name", "by-address"] {
            wait_condition(world, name, "Allocated", ("False", "PoolNotAllowed"))?;
            wait_event(world, name, "PoolNotAllowed")?;
            wait_addresses(world, name, &[])?;
        }
        // Who asks for nothing gets nothing of a pool that has to be asked for.
        annotated(world, "plain", &[HTTP], &json!({}), &v4())?;
        let plain = addresses(world, "plain", 1)?;
        ensure!(plain[0].to_string().starts_with("192.0.2."), "{plain:?}");
        Ok(())
    })
}

#[test]
fn an_address_is_shared_with_consent() -> Result<()> {
    cluster(2, |world, _| {
        world.pool(&POOL)?;
        for (key, prefix) in
            [("pointsman.dev/allow-shared-ip", 1), ("metallb.universe.tf/allow-shared-ip", 2)]
        {
            let ip = format!("192.0.2.{prefix}");
            let wish = |sharing: &str| json!({"pointsman.dev/load-balancer-ips": ip, key: sharing});
            let names = ["web", "admin", "clash", "stranger"].map(|name| format!("{name}-{prefix}"));
            let admin = Port("http", "TCP", 81, HTTP.3);
            annotated(world, &names[0], &[HTTP], &wish("together"), &v4())?;
            service(world, &names[1], &[admin], &wish("together"), &v4())?;
            slices(world, &names[1], &[admin], &[(2, json!({}))])?;
            for name in &names[..2] {
                wait_addresses(world, name, &[&ip])?;
            }
            let address: IpAddr = ip.parse()?;
            ensure!(ask(world, SocketAddr::new(address, 80))? == "b1", "the first Service");
            ensure!(ask(world, SocketAddr::new(address, 81))? == "b2", "the other Service");
            annotated(world, &names[2], &[HTTP], &wish("together"), &v4())?;
            annotated(world, &names[3], &[Port("http", "TCP", 82, HTTP.3)], &wish("apart"), &v4())?;
            for name in &names[2..] {
                wait_condition(world, name, "Allocated", ("False", "SharingRefused"))?;
                wait_addresses(world, name, &[])?;
            }
            // One leaves: the other keeps it.
            world.delete("Service", &names[0])?;
            world.wait("the Service to go", ("Service", &names[0]), |found| found.is_none())?;
            ensure!(ask(world, SocketAddr::new(address, 81))? == "b2", "the other Service stays");
            wait_addresses(world, &names[2], &[&ip])?;
        }
        Ok(())
    })
}

#[test]
fn families_change_in_place() -> Result<()> {
    cluster(1, |world, _| {
        world.pool(&POOL)?;
        serve(world, "web", &[HTTP], &v4(), &[1])?;
        let single = addresses(world, "web", 1)?;
        let dual = json!({"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv4", "IPv6"]});
        serve(world, "web", &[HTTP], &dual, &[1])?;
        let both = addresses(world, "web", 2)?;
        ensure!(both.contains(&single[0]), "{single:?} became {both:?}");
        for vip in &both {
            ask(world, SocketAddr::new(*vip, 80))?;
        }
        serve(world, "web", &[HTTP], &v4(), &[1])?;
        wait_addresses(world, "web", &[&single[0].to_string()])?;
        ask(world, SocketAddr::new(single[0], 80))?;
        let gone = both.iter().find(|vip| vip.is_ipv6()).context("an IPv6 address")?;
        eventually("the address to be released", || super::kit::released(world, &[*gone]))
    })
}

#[test]
fn exhaustion_is_told_and_ends() -> Result<()> {
    cluster(1, |world, _| {
        world.pool(&["192.0.2.8/31"])?;
        for name in ["a", "b"] {
            serve(world, name, &[HTTP], &v4(), &[1])?;
            addresses(world, name, 1)?;
        }
        for name in ["c", "d"] {
            serve(world, name, &[HTTP], &v4(), &[1])?;
            wait_condition(world, name, "Allocated", ("False", "PoolExhausted"))?;
            wait_event(world, name, "PoolExhausted")?;
        }
        let freed = addresses(world, "a", 1)?;
        world.delete("Service", "a")?;
        wait_addresses(world, "c", &[&freed[0].to_string()])?;
        wait_addresses(world, "d", &[])?;
        world.pool(&["192.0.2.8/31", "192.0.2.12/32"])?;
        wait_addresses(world, "d", &["192.0.2.12"])?;
        eventually("an answer", || ask(world, SocketAddr::new(IpAddr::from([192, 0, 2, 12]), 80)))?;
        Ok(())
    })
}

/// What a pool no longer has, whoever has it keeps.
#[test]
fn pools_that_shrink_or_go_drain() -> Result<()> {
    cluster(1, |world, _| {
        world.pool(&["192.0.2.0/28"])?;
        serve(world, "web", &[HTTP], &v4(), &[1])?;
        let before = addresses(world, "web", 1)?;
        let vip = SocketAddr::new(before[0], 80);
        world.pool(&["198.51.100.0/30"])?;
        // Pools and Services are watched apart: a Service may be seen before an older change of a pool.
        wait_condition(world, "web", "Allocated", ("True", "Draining"))?;
        serve(world, "next", &[HTTP], &v4(), &[1])?;
        wait_addresses(world, "next", &["198.51.100.0"])?;
        ensure!(addresses(world, "web", 1)? == before, "renumbered");
        ask(world, vip)?;
        world.delete("AddressPool", &world.cluster.name("pool"))?;
        wait_condition(world, "next", "Allocated", ("True", "Draining"))?;
        ask(world, vip)?;
        // A new wish is a new decision; until then all stays.
        world.delete("Service", "web")?;
        world.wait("the Service to go", ("Service", "web"), |found| found.is_none())?;
        serve(world, "late", &[HTTP], &v4(), &[1])?;
        wait_condition(world, "late", "Allocated", ("False", "FamilyUnavailable"))?;
        ensure!(addresses(world, "next", 1)?[0].to_string() == "198.51.100.0", "renumbered");
        Ok(())
    })
}

/// Bad input never takes down what works, nor what others have.
#[test]
fn a_wish_that_cannot_be_read_changes_nothing() -> Result<()> {
    cluster(1, |world, _| {
        world.pool(&POOL)?;
        let bad = json!({"pointsman.dev/load-balancer-ips": "the best one"});
        annotated(world, "bad", &[HTTP], &bad, &v4())?;
        annotated(world, "web", &[HTTP], &json!({}), &v4())?;
        let before = addresses(world, "web", 1)?;
        annotated(world, "web", &[HTTP], &bad, &v4())?;
        for name in ["bad", "web"] {
            wait_event(world, name, "InvalidConfiguration")?;
        }
        annotated(world, "next", &[HTTP], &json!({}), &v4())?;
        addresses(world, "next", 1)?;
        ensure!(addresses(world, "web", 1)? == before, "it stays as it last was");
        ask(world, SocketAddr::new(before[0], 80))?;
        wait_addresses(world, "bad", &[])?;
        annotated(world, "bad", &[HTTP], &json!({"pointsman.dev/load-balancer-ips": "192.0.2.9"}), &v4())?;
        wait_addresses(world, "bad", &["192.0.2.9"])
    })
}
