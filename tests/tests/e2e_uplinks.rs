//! Clients that come in by another device than the one that has the VIPs.

use anyhow::Result;
use pointsman_tests::{
    lab::{
        Agent, ExtraClient, Namespace, UPLINK_2,
        agent::list,
        is_proxied,
        manifest::{ECHO, HTTP, UDP},
    },
    traffic::{
        bulk,
        client::{check_round_robin, connect, half_close, who_answers, who_answers_udp},
    },
    world::{World, both, web},
};
use serde_json::Value;

const FLAGS: [&str; 2] = ["--client-devices", UPLINK_2];

fn everything_works(from: &Namespace, status: &Value) -> Result<()> {
    for to in both(status, HTTP)? {
        check_round_robin(&who_answers(from, to, 10)?, 2)?;
    }
    for to in both(status, UDP)? {
        check_round_robin(&who_answers_udp(from, to, 10)?, 2)?;
    }
    for to in both(status, ECHO)? {
        bulk::echo(&connect(from, to)?, 1 << 20, 1)?;
    }
    Ok(())
}

fn is_attached(status: &Value) -> bool {
    list(status, "devices").iter().any(|device| device["device"] == UPLINK_2)
}

fn says_it_is_gone(status: &Value) -> bool {
    let problems = list(status, "problems").iter().filter_map(|problem| problem["message"].as_str());
    problems.into_iter().any(|message| message.contains("client device uplink2 is gone"))
}

/// Each is served, whatever happens to the other's device.
#[test]
fn clients_of_both_are_served() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let mut other = ExtraClient::new(&world.lab)?;
    let agent = Agent::start_with(&world.lab, &web(&[1, 2]), &FLAGS)?;
    let status = agent.wait_ready()?;
    assert!(is_proxied() || is_attached(&status), "{status}");
    everything_works(&world.lab.client, &status)?;
    everything_works(&other.namespace, &status)?;

    let old: Result<Vec<_>> =
        both(&status, ECHO)?.map(|to| connect(&world.lab.client, to)).into_iter().collect();
    other.leave(&world.lab)?;
    agent.wait_status("the device to be missed", says_it_is_gone)?;
    everything_works(&world.lab.client, &status)?;
    other.join(&world.lab)?;
    let is_back = |status: &Value| !says_it_is_gone(status) && (is_proxied() || is_attached(status));
    let status = agent.wait_status("the device to be back", is_back)?;
    everything_works(&other.namespace, &status)?;
    for stream in &old? {
        half_close(stream, b"has outlived the device")?;
    }
    Ok(())
}

/// The agent serves whom it can, and takes the device into use when it comes.
#[test]
fn a_device_may_come_later() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let agent = Agent::start_with(&world.lab, &web(&[1, 2]), &FLAGS)?;
    let status = agent.wait_ready()?;
    assert!(says_it_is_gone(&status), "{status}");
    everything_works(&world.lab.client, &status)?;
    let other = ExtraClient::new(&world.lab)?;
    let status = agent.wait_status("the device", |status| is_proxied() || is_attached(status))?;
    everything_works(&other.namespace, &status)
}
