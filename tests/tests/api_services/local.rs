//! `externalTrafficPolicy: Local`: endpoints on the node that announces, and no others.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
};

use anyhow::{Context, Result, ensure};
use pointsman_tests::{
    cluster_world::ClusterWorld,
    lab::{Options, POD, is_proxied},
    traffic::{
        client::{TIMEOUT, http_get, who_answers},
        probe,
    },
};
use serde_json::{Value, json};

use super::kit::{HTTP, POOL, eventually, read, service, slices, sticks, with};

fn local() -> Value {
    json!({"externalTrafficPolicy": "Local"})
}

fn on(node: &str, ready: bool) -> Value {
    json!({"nodeName": node, "conditions": {"ready": ready}})
}

/// The status line of whoever answers health checks on the edge.
fn health(world: &ClusterWorld, port: u16) -> Result<String> {
    let to = SocketAddr::new(IpAddr::from([10, 1, 0, 1]), port);
    let answer = world.lab.client.enter(|| -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&to, TIMEOUT)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })??;
    Ok(answer.lines().next().unwrap_or_default().to_owned())
}

fn wait_health(world: &ClusterWorld, port: u16, wanted: &str) -> Result<()> {
    eventually(&format!("{wanted} from the health check"), || {
        let line = health(world, port)?;
        ensure!(line.contains(wanted), "{line}");
        Ok(())
    })
}

fn with_pod(test: impl FnOnce(&ClusterWorld) -> Result<()>) -> Result<()> {
    with(Options { backends: 1, pods: 1, ..Options::default() }, &[], |world, _| test(world))
}

/// "should work for type=LoadBalancer" and "should only target nodes with endpoints" of "ESIPP":
/// the pod sees the client (with the proxy, its node), backends elsewhere get nothing, the health check says so.
#[test]
fn the_client_is_seen_and_others_get_nothing() -> Result<()> {
    with_pod(|world| {
        world.pool(&POOL)?;
        service(world, "web", &[HTTP], &json!({}), &local())?;
        slices(world, "web", &[HTTP], &[(POD, on(&world.node, true)), (1, on("elsewhere", true))])?;
        let vips = world.published("web", 2)?;
        for vip in &vips {
            ensure!(who_answers(&world.lab.client, *vip, 4)? == ["p1"; 4], "another than the pod");
            let peer = world.lab.client.enter(|| http_get(*vip, "/peer"))??;
            let peer: SocketAddr = String::from_utf8(peer)?.trim().parse()?;
            if is_proxied() {
                let own = world.lab.edge.run(["ip", "-o", "addr"])?;
                ensure!(own.contains(&format!(" {}/", peer.ip())), "the pod saw {peer}, not the node");
            } else {
                let client = if vip.is_ipv4() { "10.1.0.2" } else { "fd01::2" };
                ensure!(peer.ip().to_string() == client, "the pod saw {peer}");
            }
        }
        let web = read(world, "web")?;
        let port = web["spec"]["healthCheckNodePort"].as_u64().context("healthCheckNodePort")?;
        wait_health(world, u16::try_from(port)?, "200")?;

        // No node can do better: the address stays where it is, to refuse instead of being silent, and
        // other load balancers are told.
        slices(world, "web", &[HTTP], &[(POD, on(&world.node, false)), (1, on("elsewhere", true))])?;
        wait_health(world, u16::try_from(port)?, "503")?;
        for vip in &vips {
            eventually("a refusal", || {
                let answer = probe::tcp(&world.lab.client, *vip)?;
                ensure!(answer.at_once(), "{answer:?}");
                Ok(())
            })?;
        }
        ensure!(world.published("web", 2)? == vips, "the addresses stay");

        slices(world, "web", &[HTTP], &[(POD, on(&world.node, true))])?;
        wait_health(world, u16::try_from(port)?, "200")?;
        for vip in &vips {
            ensure!(who_answers(&world.lab.client, *vip, 2)? == ["p1"; 2], "another than the pod");
        }
        Ok(())
    })
}

/// "should handle updates to ExternalTrafficPolicy field".
#[test]
fn the_policy_changes_in_place() -> Result<()> {
    with_pod(|world| {
        world.pool(&POOL)?;
        service(world, "web", &[HTTP], &json!({}), &json!({}))?;
        slices(world, "web", &[HTTP], &[(POD, on(&world.node, true)), (1, on("elsewhere", true))])?;
        let vips = world.published("web", 2)?;
        let are = |wanted: &[&str]| {
            let mut names = who_answers(&world.lab.client, vips[0], 4)?;
            names.sort();
            names.dedup();
            ensure!(names == wanted, "{names:?}");
            Ok(())
        };
        are(&["b1", "p1"])?;
        service(world, "web", &[HTTP], &json!({}), &local())?;
        eventually("the pod alone", || are(&["p1"]))?;
        let web = read(world, "web")?;
        let port =
            u16::try_from(web["spec"]["healthCheckNodePort"].as_u64().context("healthCheckNodePort")?)?;
        wait_health(world, port, "200")?;
        service(world, "web", &[HTTP], &json!({}), &json!({"externalTrafficPolicy": "Cluster"}))?;
        eventually("both", || are(&["b1", "p1"]))?;
        eventually("the health check to close", || {
            ensure!(health(world, port).is_err(), "it answers");
            Ok(())
        })?;
        ensure!(world.published("web", 2)? == vips, "other addresses");
        Ok(())
    })
}

/// Session affinity goes with either policy.
#[test]
fn affinity_holds_with_the_local_policy() -> Result<()> {
    with(Options { backends: 0, pods: 3, ..Options::default() }, &[], |world, _| {
        world.pool(&POOL)?;
        let mut spec = local();
        spec["sessionAffinity"] = json!("ClientIP");
        service(world, "web", &[HTTP], &json!({}), &spec)?;
        let pods: Vec<_> = (POD..POD + 3).map(|n| (n, on(&world.node, true))).collect();
        slices(world, "web", &[HTTP], &pods)?;
        for vip in world.published("web", 2)? {
            sticks(world, vip)?;
        }
        Ok(())
    })
}

/// "should only target nodes with endpoints": the address goes where the endpoints are. The other
/// node's agent is a Lease.
#[test]
fn the_address_follows_the_endpoints() -> Result<()> {
    with_pod(|world| {
        let other = world.cluster.name("other");
        world.node(&other, &json!({}))?;
        world.pool(&POOL)?;
        service(world, "web", &[HTTP], &json!({}), &local())?;
        slices(world, "web", &[HTTP], &[(POD, on(&world.node, true))])?;
        let vips = world.published("web", 2)?;
        let mut beats = 0;
        let mut move_to = |node: &str| -> Result<()> {
            slices(world, "web", &[HTTP], &[(POD, on(node, true))])?;
            eventually("the address to move", || {
                beats += 1;
                beat(world, &other, beats)?;
                let found = world.list("VirtualIP")?;
                ensure!(
                    found.len() == 2 && found.iter().all(|one| one["spec"]["node"] == node),
                    "{found:#?}"
                );
                Ok(())
            })
        };
        move_to(&other)?;
        eventually("the addresses to leave the device", || {
            let here = world.lab.edge.run(["ip", "-o", "addr", "show", "dev", "uplink"])?;
            ensure!(vips.iter().all(|vip| !here.contains(&format!(" {}/", vip.ip()))), "{here}");
            Ok(())
        })?;
        move_to(&world.node)?;
        for vip in &vips {
            eventually("the pod", || {
                ensure!(who_answers(&world.lab.client, *vip, 1)? == ["p1"], "another");
                Ok(())
            })?;
        }
        Ok(())
    })
}

/// A sign of life of a node's agent.
fn beat(world: &ClusterWorld, node: &str, count: u32) -> Result<()> {
    world.apply(
        "Lease",
        &format!("pointsman-agent-{node}"),
        &json!({
            "metadata": {
                "labels": {"pointsman.dev/agent": "true"},
                "annotations": {"pointsman.dev/link-device": "uplink"},
            },
            "spec": {
                "holderIdentity": node,
                "leaseDurationSeconds": 15,
                "renewTime": format!("2026-01-01T00:{:02}:{:02}.000000Z", count / 60 % 60, count % 60),
            },
        }),
    )
}

/// Endpoints that are published before they are ready count for the choice of the node, too.
#[test]
fn unready_endpoints_that_are_published_are_local_endpoints() -> Result<()> {
    with_pod(|world| {
        world.pool(&POOL)?;
        let mut spec = local();
        spec["publishNotReadyAddresses"] = json!(true);
        service(world, "web", &[HTTP], &json!({}), &spec)?;
        slices(world, "web", &[HTTP], &[(POD, on(&world.node, false))])?;
        for vip in world.published("web", 2)? {
            ensure!(who_answers(&world.lab.client, vip, 2)? == ["p1"; 2], "another than the pod");
        }
        Ok(())
    })
}
