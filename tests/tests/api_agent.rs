//! Whole agents in a cluster: from the Service to packets and back to its status.

use std::{
    ffi::OsString,
    io::{Read, Write},
    os::unix::net::UnixStream,
};

use anyhow::{Result, ensure};
use pointsman_tests::{
    cluster_world::{ClusterWorld, ingress},
    lab::wait_for,
    traffic::client::http_name,
};
use serde_json::json;

const POOL: [&str; 2] = ["192.0.2.0/28", "2001:db8:1::/124"];

/// Who answers a request.
fn ask(world: &ClusterWorld, vip: std::net::SocketAddr) -> Result<String> {
    Ok(world.lab.client.enter(|| http_name(vip))??)
}

#[test]
fn a_service_lives_and_goes() -> Result<()> {
    let Some(world) = ClusterWorld::new(2)? else { return Ok(()) };
    let _agent = world.agent(&[])?;
    world.pool(&POOL)?;
    world.service("web", &json!({}), &[1, 2])?;
    // The first status that shows an address is one that can be relied on.
    for vip in world.published("web", 2)? {
        ask(&world, vip)?;
    }
    let service = world.get("Service", "web")?.unwrap_or_default();
    ensure!(service["status"]["loadBalancer"]["ingress"][0]["ipMode"] == "VIP", "{service:#}");
    ensure!(service["metadata"]["finalizers"].to_string().contains("pointsman.dev/cleanup"), "{service:#}");
    world.delete("Service", "web")?;
    world.wait("the Service to go", ("Service", "web"), |found| found.is_none())?;
    ensure!(world.list("VirtualIP")?.is_empty(), "{:?}", world.list("VirtualIP")?);
    let addresses = world.lab.edge.run(["ip", "-o", "addr", "show", "dev", "uplink"])?;
    ensure!(!addresses.contains("192.0.2."), "{addresses}");
    Ok(())
}

/// A pod that is asked to end while the agent that takes over has not begun to serve.
#[test]
fn a_signal_while_the_next_agent_begins_is_enough() -> Result<()> {
    let Some(world) = ClusterWorld::new(1)? else { return Ok(()) };
    let mut agent = world.agent(&[])?;
    agent.wait_status("the agent", |status| !status["agent"].is_null())?;
    // The test is the next agent.
    let mut path = OsString::from(agent.socket());
    path.push(".handover");
    let mut heir = UnixStream::connect(&path)?;
    heir.write_all(b"pointsman: take over\n")?;
    let mut byte = [0];
    while byte != *b"\n" {
        heir.read_exact(&mut byte)?;
    }
    heir.write_all(b"+")?;
    heir.read_exact(&mut byte)?;
    ensure!(byte == *b".", "it lets go");
    agent.wait_log("is handed over to the next agent")?;
    agent.ask_to_end()?;
    ensure!(agent.ended()?.success(), "{}", agent.log());
    Ok(())
}

#[test]
fn endpoints_are_followed() -> Result<()> {
    let Some(world) = ClusterWorld::new(2)? else { return Ok(()) };
    let _agent = world.agent(&[])?;
    world.pool(&POOL)?;
    world.service("web", &json!({}), &[1])?;
    let vips = world.published("web", 2)?;
    let first = ask(&world, vips[0])?;
    world.endpoints("web", &[2])?;
    wait_for("the other backend", || {
        Ok((ask(&world, vips[0]).is_ok_and(|other| other != first)).then_some(()))
    })?;
    world.endpoints("web", &[])?;
    wait_for("a refusal", || {
        Ok(ask(&world, vips[0]).err().filter(|error| format!("{error:#}").contains("refused")).map(drop))
    })?;
    ensure!(ingress(&world.get("Service", "web")?.unwrap_or_default()).len() == 2, "the addresses stay");
    Ok(())
}
