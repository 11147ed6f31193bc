//! Which endpoints take part, and how.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use pointsman_tests::{
    cluster_world::ClusterWorld,
    lab::wait_for,
    traffic::{
        client::{check_round_robin, tally, udp_exchange, udp_socket, who_answers, who_answers_udp},
        load::Load,
        probe,
    },
};
use serde_json::{Value, json};

use super::kit::{
    ECHO, HTTP, POOL, Port, UDP, addresses, ask, cluster, endpoint, eventually, serve, service, slice, slices,
};

fn refused(world: &ClusterWorld, to: SocketAddr, udp: bool) -> Result<()> {
    let probe = if udp { probe::udp } else { probe::tcp };
    let answer = probe(&world.lab.client, to)?;
    ensure!(answer.at_once(), "{to}: {answer:?}");
    Ok(())
}

/// "should reject connections when there are no endpoints": by TCP RST and by ICMP.
#[test]
fn without_endpoints_clients_are_refused() -> Result<()> {
    cluster(1, |world, _| {
        world.pool(&POOL)?;
        service(world, "web", &[HTTP, UDP], &json!({}), &json!({}))?;
        let vips = addresses(world, "web", 2)?;
        for vip in &vips {
            refused(world, SocketAddr::new(*vip, 80), false)?;
            refused(world, SocketAddr::new(*vip, 53), true)?;
        }
        serve(world, "web", &[HTTP, UDP], &json!({}), &[1])?;
        for vip in &vips {
            eventually("an answer", || ask(world, SocketAddr::new(*vip, 80)))?;
        }
        slices(world, "web", &[HTTP, UDP], &[])?;
        for vip in &vips {
            eventually("a TCP refusal", || refused(world, SocketAddr::new(*vip, 80), false))?;
            eventually("an ICMP refusal", || refused(world, SocketAddr::new(*vip, 53), true))?;
        }
        ensure!(addresses(world, "web", 2)? == vips, "the addresses stay");
        Ok(())
    })
}

fn conditions(ready: bool, serving: bool, terminating: bool) -> Value {
    json!({"conditions": {"ready": ready, "serving": serving, "terminating": terminating}})
}

/// "should fall back to terminating endpoints when there are no ready ones".
#[test]
fn terminating_endpoints_serve_when_none_is_ready() -> Result<()> {
    cluster(2, |world, _| {
        world.pool(&POOL)?;
        let terminating = conditions(false, true, true);
        service(world, "web", &[HTTP], &json!({}), &json!({}))?;
        slices(world, "web", &[HTTP], &[(1, json!({})), (2, terminating.clone())])?;
        let vip = world.published("web", 2)?[0];
        let is = |name: &str, vip| {
            let names = who_answers(&world.lab.client, vip, 4)?;
            ensure!(names.iter().all(|other| other == name), "{names:?}");
            Ok(())
        };
        is("b1", vip)?;
        slices(world, "web", &[HTTP], &[(1, conditions(false, false, false)), (2, terminating.clone())])?;
        eventually("the terminating one", || is("b2", vip))?;
        slices(world, "web", &[HTTP], &[(1, json!({})), (2, terminating)])?;
        eventually("the ready one", || is("b1", vip))?;
        slices(world, "web", &[HTTP], &[(2, conditions(false, false, true))])?;
        eventually("a refusal: nobody serves", || refused(world, vip, false))
    })
}

/// "should be able to reach endpoints that are not ready when publishNotReadyAddresses is set".
#[test]
fn endpoints_that_are_not_ready_may_be_published() -> Result<()> {
    cluster(1, |world, _| {
        world.pool(&POOL)?;
        service(world, "web", &[HTTP], &json!({}), &json!({}))?;
        slices(world, "web", &[HTTP], &[(1, conditions(false, false, false))])?;
        let vip = world.published("web", 2)?[0];
        refused(world, vip, false)?;
        service(world, "web", &[HTTP], &json!({}), &json!({"publishNotReadyAddresses": true}))?;
        eventually("an answer", || ask(world, vip))?;
        service(world, "web", &[HTTP], &json!({}), &json!({"publishNotReadyAddresses": false}))?;
        eventually("a refusal", || refused(world, vip, false))
    })
}

/// A named target port that has another number in each pod: a slice for each number.
#[test]
fn named_ports_differ_by_pod() -> Result<()> {
    cluster(2, |world, _| {
        let rules = "table inet other { chain pre { type nat hook prerouting priority -100;
             tcp dport 8888 redirect to :8080; tcp dport 8080 ct status != dnat reject; }; }";
        world.lab.backends[1].run(["nft", rules])?;
        world.pool(&POOL)?;
        let named = json!([{"name": "http", "port": 80, "protocol": "TCP", "targetPort": "web"}]);
        service(world, "web", &[], &json!({}), &json!({"ports": named}))?;
        let other = Port("http", "TCP", 80, 8888);
        for v6 in [false, true] {
            slice(world, ("web", &format!("web-a-{v6}")), v6, &[HTTP], &[endpoint(1, v6, &json!({}))])?;
            slice(world, ("web", &format!("web-b-{v6}")), v6, &[other], &[endpoint(2, v6, &json!({}))])?;
        }
        for vip in world.published("web", 2)? {
            eventually("turns", || check_round_robin(&who_answers(&world.lab.client, vip, 8)?, 2))?;
        }
        Ok(())
    })
}

/// 125 addresses on each of two backends, in three slices of at most 100.
#[test]
fn a_service_has_250_endpoints_in_three_slices() -> Result<()> {
    cluster(2, |world, agent| {
        // Apart from the lab's own, which end in 1 and 10 to 19.
        let all: Vec<u8> = (2..10).chain(20..=255).collect();
        let address = |n: u8, block: u8| IpAddr::from([10, 2, block, n]);
        let mut owned = vec![String::new(); 2];
        let mut endpoints = Vec::new();
        world.lab.edge.run(["ip", "route", "add", "10.2.1.0/24", "dev", "lan"])?;
        for (index, n) in all.iter().take(125).enumerate() {
            for backend in 0..2_u8 {
                // The first block belongs to the first backend, the next to the second.
                let address = address(*n, backend + 1);
                owned[usize::from(backend)].push_str(&format!("addr add {address}/32 dev eth0\n"));
                endpoints.push((index, json!({"addresses": [address], "conditions": {"ready": true}})));
            }
        }
        world.lab.edge.run(["ip", "route", "add", "10.2.2.0/24", "dev", "lan"])?;
        for (backend, lines) in world.lab.backends.iter().zip(&owned) {
            backend.ip_batch(lines)?;
        }
        world.pool(&POOL)?;
        service(
            world,
            "web",
            &[HTTP],
            &json!({}),
            &json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"]}),
        )?;
        let endpoints: Vec<Value> = endpoints.into_iter().map(|(_, endpoint)| endpoint).collect();
        for (number, chunk) in endpoints.chunks(100).enumerate() {
            slice(world, ("web", &format!("web-{number}")), false, &[HTTP], chunk)?;
        }
        let vip = world.published("web", 1)?[0];
        agent.wait_status("250 backends", |status| {
            let backends = status["services"][0]["ports"][0]["backends"].as_array();
            backends
                .is_some_and(|all| all.len() == 250 && all.iter().all(|one| one["nextHopResolved"] == true))
        })?;
        let names = who_answers(&world.lab.client, vip, 250)?;
        ensure!(tally(&names).values().all(|count| *count == 125), "{:?}", tally(&names));
        Ok(())
    })
}

#[test]
fn one_port_number_serves_two_protocols() -> Result<()> {
    cluster(2, |world, _| {
        world.pool(&POOL)?;
        let ports = [HTTP, Port("udp", "UDP", 80, UDP.3), ECHO];
        serve(world, "web", &ports, &json!({}), &[1, 2])?;
        for vip in world.published("web", 2)? {
            check_round_robin(&who_answers(&world.lab.client, vip, 4)?, 2)?;
            check_round_robin(&who_answers_udp(&world.lab.client, vip, 4)?, 2)?;
        }
        Ok(())
    })
}

#[test]
fn weights_are_annotated() -> Result<()> {
    cluster(2, |world, _| {
        world.pool(&POOL)?;
        serve(world, "web", &[HTTP], &json!({}), &[1, 2])?;
        let vip = world.published("web", 2)?[0];
        let weigh = |text: String| {
            service(world, "web", &[HTTP], &json!({"pointsman.dev/weights": text}), &json!({}))
        };
        let first = endpoint(1, vip.is_ipv6(), &json!({}))["addresses"][0].as_str().map(str::to_owned);
        let first = first.context("an address")?;
        weigh(format!("{first}=3, *=1"))?;
        eventually("three to one", || {
            let tally = tally(&who_answers(&world.lab.client, vip, 40)?);
            ensure!(tally.get("b1") == Some(&30), "{tally:?}");
            Ok(())
        })?;
        weigh(format!("{first}=0"))?;
        eventually("the other alone", || {
            let tally = tally(&who_answers(&world.lab.client, vip, 10)?);
            ensure!(tally.len() == 1 && tally.contains_key("b2"), "{tally:?}");
            Ok(())
        })
    })
}

/// `trafficDistribution` comes as hints of the EndpointSlice controller.
#[test]
fn zones_are_preferred() -> Result<()> {
    cluster(2, |world, _| {
        world.node(&world.node, &json!({"topology.kubernetes.io/zone": "here"}))?;
        world.pool(&POOL)?;
        let hint = |zone: &str| json!({"zone": zone, "hints": {"forZones": [{"name": zone}]}});
        service(world, "web", &[HTTP], &json!({}), &json!({"trafficDistribution": "PreferClose"}))?;
        slices(world, "web", &[HTTP], &[(1, hint("there")), (2, hint("here"))])?;
        let vip = world.published("web", 2)?[0];
        eventually("the zone's own", || {
            let names = who_answers(&world.lab.client, vip, 6)?;
            ensure!(names.iter().all(|name| name == "b2"), "{names:?}");
            Ok(())
        })?;
        world.node(&world.node, &json!({"topology.kubernetes.io/zone": "there"}))?;
        eventually("the other zone's own", || {
            let names = who_answers(&world.lab.client, vip, 6)?;
            ensure!(names.iter().all(|name| name == "b1"), "{names:?}");
            Ok(())
        })?;
        slices(world, "web", &[HTTP], &[(1, hint("there")), (2, json!({"zone": "here"}))])?;
        eventually("all, when one has no hint", || {
            check_round_robin(&who_answers(&world.lab.client, vip, 6)?, 2)
        })
    })
}

/// "should not have connectivity disruption during rolling update": pods become ready, terminate
/// and go, one after the other, while clients come without a pause.
#[test]
fn a_rolling_update_is_not_noticed() -> Result<()> {
    cluster(3, |world, _| {
        world.pool(&POOL)?;
        serve(world, "web", &[HTTP], &json!({}), &[1, 2])?;
        let vips = world.published("web", 2)?;
        let loads: Vec<Load> =
            vips.iter().map(|vip| Load::start(&world.lab.client, *vip, 2, u64::MAX)).collect();
        let ready = json!({});
        for round in 0..6_u8 {
            let [old, kept, new] = [round, round + 1, round + 2].map(|n| n % 3 + 1);
            let leaving = conditions(false, true, true);
            slices(
                world,
                "web",
                &[HTTP],
                &[(old, ready.clone()), (kept, ready.clone()), (new, ready.clone())],
            )?;
            slices(world, "web", &[HTTP], &[(old, leaving), (kept, ready.clone()), (new, ready.clone())])?;
            for load in &loads {
                load.wait_requests(50)?;
            }
            slices(world, "web", &[HTTP], &[(kept, ready.clone()), (new, ready.clone())])?;
            for load in &loads {
                load.wait_requests(50)?;
            }
        }
        for load in loads {
            let report = load.stop()?;
            ensure!(report.errors.is_empty(), "{report:?}");
            ensure!(report.answers.len() == 3, "all have served: {report:?}");
        }
        Ok(())
    })
}

/// "should be able to preserve UDP traffic when server pod cycles": a client that never changes its
/// port comes to the new pod.
#[test]
fn udp_survives_the_cycle_of_its_server() -> Result<()> {
    cluster(2, |world, _| {
        world.pool(&POOL)?;
        serve(world, "web", &[UDP], &json!({}), &[1])?;
        for vip in addresses(world, "web", 2)? {
            let to = SocketAddr::new(vip, UDP.2);
            slices(world, "web", &[UDP], &[(1, json!({}))])?;
            let socket = world.lab.client.enter(|| udp_socket(to))??;
            socket.set_read_timeout(Some(std::time::Duration::from_millis(500)))?;
            eventually("the first pod", || {
                ensure!(udp_exchange(&socket, b"before")? == "b1", "another");
                Ok(())
            })?;
            slices(world, "web", &[UDP], &[])?;
            wait_for("no answer", || Ok(udp_exchange(&socket, b"between").is_err().then_some(())))?;
            slices(world, "web", &[UDP], &[(2, json!({}))])?;
            eventually("the new pod", || {
                ensure!(udp_exchange(&socket, b"after")? == "b2", "another");
                Ok(())
            })?;
        }
        Ok(())
    })
}
