//! Routes to backends change, and devices come and go, under traffic: hooks follow, and no connection
//! breaks.

use std::{collections::BTreeSet, thread};

use anyhow::{Context, Result};
use pointsman_tests::{
    lab::{
        Agent, Lab, Namespace,
        agent::list,
        manifest::{ECHO, HTTP},
        wait_for,
    },
    traffic::{
        bulk,
        client::connect,
        load::Load,
        ping_pong::{PingPong, retransmissions},
    },
    world::{World, both},
};
use serde_json::Value;

/// Backends are here by a second device, too.
const OTHER_V4: &str = "10.2.0.3";
const OTHER_V6: &str = "fd02::3";

/// The devices that the datapath is attached to.
fn hooked(status: &Value) -> BTreeSet<&str> {
    list(status, "devices").iter().filter_map(|device| device["device"].as_str()).collect()
}

fn are_hooked<const N: usize>(devices: [&str; N]) -> impl Fn(&Value) -> bool {
    move |status| hooked(status) == devices.into()
}

fn wait_up(namespace: &Namespace, device: &str) -> Result<()> {
    wait_for("a device to come up", || {
        let shown = namespace.run(["ip", "-o", "link", "show", "dev", device])?;
        Ok(shown.contains(" state UP ").then_some(()))
    })
}

/// Gives the edge a second device on the backends' LAN, with addresses of its own, and no route by it yet.
fn add_other_device(lab: &Lab) -> Result<()> {
    // Each device answers for its own addresses alone.
    for (key, value) in [("arp_ignore", "1"), ("arp_announce", "2")] {
        lab.edge.sysctl(&format!("net/ipv4/conf/all/{key}"), value)?;
    }
    lab.edge.ip_batch(&format!("link add lan2 type veth peer name edge2 netns {}", lab.switch.name()))?;
    lab.edge.like_a_nic("lan2")?;
    lab.switch.like_a_nic("edge2")?;
    lab.switch.ip_batch("link set edge2 master lan up")?;
    lab.edge.ip_batch(&format!(
        "addr add {OTHER_V4}/32 dev lan2\n addr add {OTHER_V6}/128 dev lan2 nodad\n link set lan2 up"
    ))?;
    wait_up(&lab.edge, "lan2")
}

/// Adds or deletes the routes to backends by the second device, which go before those by the first.
fn other_routes(lab: &Lab, verb: &str, backends: u8) -> Result<()> {
    let route = |n| {
        let (v4, v6) = (Lab::backend_address(n, false), Lab::backend_address(n, true));
        format!(
            "route {verb} {v4}/32 dev lan2 src {OTHER_V4}\n route {verb} {v6}/128 dev lan2 src {OTHER_V6}\n"
        )
    };
    lab.edge.ip_batch(&(1..=backends).map(route).collect::<String>())
}

/// Waits until new connections have this address towards backends.
fn wait_source(agent: &Agent<'_>, load: &Load, source: &str) -> Result<()> {
    load.wait_requests(20)?;
    wait_for("connections with the other device's address", || {
        let flows: Value = serde_json::from_str(&agent.cli(&["flows", "-o", "json"])?)?;
        let snat = |flow: &Value| flow["snat"].as_str().map(str::to_owned);
        let all: Vec<_> = list(&flows, "flows").iter().filter_map(snat).collect();
        let is_of = |one: &String| one.starts_with(&format!("{source}:"));
        Ok(all.iter().any(is_of).then_some(()))
    })
}

#[test]
fn connections_outlive_a_route_that_moves_to_another_device() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    add_other_device(&world.lab)?;
    let (agent, status) = world.web_in_kernel(&[1, 2])?;
    assert_eq!(hooked(&status), ["lan", "uplink"].into());
    let mut flows = Vec::new();
    for to in both(&status, ECHO)? {
        flows.push(PingPong::start(&world.lab.client, to, 4)?);
    }
    let load = Load::start(&world.lab.client, both(&status, HTTP)?[0], 2, u64::MAX);
    load.wait_requests(20)?;
    for (verb, source) in [("add", OTHER_V4), ("del", "10.2.0.1"), ("add", OTHER_V4)] {
        other_routes(&world.lab, verb, 2)?;
        agent.wait_status("the other device to be hooked", |status| hooked(status).contains("lan2"))?;
        wait_source(&agent, &load, source)?;
        for flows in &flows {
            flows.wait_exchanges(100)?;
        }
        assert_eq!(hooked(&agent.status()?), ["lan", "lan2", "uplink"].into());
        // These have the addresses of whichever device led to the backends when they began.
        for to in both(&status, ECHO)? {
            flows.push(PingPong::start(&world.lab.client, to, 1)?);
        }
    }
    let report = load.stop()?;
    assert!(report.errors.is_empty(), "{report:?}");
    for flows in flows {
        let report = flows.stop()?;
        assert!(report.broken.is_empty(), "{report:?}");
    }
    Ok(())
}

#[test]
fn a_device_is_left_once_no_connection_needs_it() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    add_other_device(&world.lab)?;
    let (agent, status) = world.web_in_kernel(&[1])?;
    let stream = connect(&world.lab.client, both(&status, ECHO)?[0])?;
    bulk::echo(&stream, 1 << 16, 1)?;
    other_routes(&world.lab, "add", 1)?;
    agent.wait_status("both devices to be hooked", are_hooked(["lan", "lan2", "uplink"]))?;
    drop(stream);
    // Two rounds of the sweep take twenty seconds, and longer on a busy machine than the usual patience.
    let is_left = || agent.wait_status("the first device to be left", are_hooked(["lan2", "uplink"]));
    is_left().or_else(|_| is_left())?;
    Ok(())
}

#[test]
fn connections_outlive_a_restart_after_their_route_has_moved() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    add_other_device(&world.lab)?;
    let (mut agent, status) = world.web_in_kernel(&[1])?;
    let flows = PingPong::start(&world.lab.client, both(&status, ECHO)?[0], 4)?;
    flows.wait_exchanges(20)?;
    other_routes(&world.lab, "add", 1)?;
    agent.wait_status("both devices to be hooked", are_hooked(["lan", "lan2", "uplink"]))?;
    agent.restart()?;
    let status = agent.wait_ready()?;
    assert_eq!(hooked(&status), ["lan", "lan2", "uplink"].into());
    flows.wait_exchanges(100)?;
    let report = flows.stop()?;
    assert!(report.broken.is_empty(), "{report:?}");
    Ok(())
}

#[test]
fn connections_outlive_a_route_that_goes_and_comes_back() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let (agent, status) = world.web_in_kernel(&[1])?;
    // Where packets to the backend, and the node's own answers, go when there is no better route.
    world.lab.edge.ip_batch("route add default via 10.1.0.2\n route add ::/0 via fd01::2")?;
    let streams: Vec<_> =
        both(&status, ECHO)?.into_iter().map(|to| connect(&world.lab.client, to)).collect::<Result<_>>()?;
    thread::scope(|scope| {
        let transfers: Vec<_> = (1..)
            .zip(&streams)
            .map(|(seed, stream)| scope.spawn(move || bulk::echo(stream, 256 << 20, seed)))
            .collect();
        let flows = PingPong::start(&world.lab.client, both(&status, ECHO)?[0], 4)?;
        flows.wait_exchanges(20)?;
        let before = retransmissions(&world.lab.backends[0])?;
        world.lab.edge.ip_batch("route del 10.2.0.0/24 dev lan\n route del fd02::/64 dev lan")?;
        wait_for("the backend to send again what nobody acknowledges", || {
            Ok((retransmissions(&world.lab.backends[0])? > before + 5).then_some(()))
        })?;
        assert_eq!(hooked(&agent.status()?), ["lan", "uplink"].into());
        world.lab.edge.ip_batch(
            "route add 10.2.0.0/24 dev lan src 10.2.0.1 scope link\n route add fd02::/64 dev lan",
        )?;
        flows.wait_exchanges(20)?;
        for transfer in transfers {
            let name = transfer.join().map_err(|_| anyhow::anyhow!("a transfer's thread panicked"))??;
            assert_eq!(name, "b1");
        }
        let report = flows.stop()?;
        assert!(report.broken.is_empty(), "{report:?}");
        Ok(())
    })
}

#[test]
fn connections_outlive_a_device_that_is_made_anew() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let Lab { edge, switch, .. } = &world.lab;
    let (agent, status) = world.web_in_kernel(&[1])?;
    let mut flows = Vec::new();
    for to in both(&status, ECHO)? {
        flows.push(PingPong::start(&world.lab.client, to, 3)?);
    }
    for flows in &flows {
        flows.wait_exchanges(20)?;
    }
    let links: Value = serde_json::from_str(&edge.run(["ip", "-j", "link", "show", "dev", "lan"])?)?;
    let mac = links[0]["address"].as_str().context("no Ethernet address")?;
    edge.ip_batch("link del lan")?;
    agent.wait_status("the device to be gone", are_hooked(["uplink"]))?;
    // As a driver that is loaded again does it: addresses come later, by whoever manages the network.
    edge.ip_batch(&format!("link add lan address {mac} type veth peer name edge netns {}", switch.name()))?;
    edge.like_a_nic("lan")?;
    switch.like_a_nic("edge")?;
    switch.ip_batch("link set edge master lan up")?;
    edge.ip_batch("link set lan up")?;
    agent.wait_status("the device to be hooked again", are_hooked(["lan", "uplink"]))?;
    wait_up(edge, "lan")?;
    edge.ip_batch("addr add 10.2.0.1/24 dev lan\n addr add fd02::1/64 dev lan nodad")?;
    agent.wait_ready()?;
    for flows in flows {
        flows.wait_exchanges(50)?;
        let report = flows.stop()?;
        assert!(report.broken.is_empty(), "{report:?}");
    }
    Ok(())
}
