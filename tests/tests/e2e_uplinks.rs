//! Clients that come in by another device than the one that has the VIPs.

use std::net::IpAddr;

use anyhow::Result;
use pointsman_tests::{
    lab::{
        Agent, ExtraClient, ExtraEdge, Lab, Namespace, UPLINK_2,
        agent::list,
        is_proxied,
        manifest::{ECHO, HTTP, UDP},
        wait_for,
        wire::{Capture, ethernet_address},
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
    everything_works_with(2, from, status)
}

fn everything_works_with(backends: usize, from: &Namespace, status: &Value) -> Result<()> {
    for to in both(status, HTTP)? {
        check_round_robin(&who_answers(from, to, 10)?, backends)?;
    }
    for to in both(status, UDP)? {
        check_round_robin(&who_answers_udp(from, to, 10)?, backends)?;
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

/// The devices of a node that have an address.
fn places(node: &Namespace, address: IpAddr) -> Result<Vec<String>> {
    let shown = node.run(["ip", "-o", "addr", "show", "to", &address.to_string()])?;
    Ok(shown.lines().filter_map(|line| line.split_whitespace().nth(1)).map(str::to_owned).collect())
}

/// Waits until each address is on these devices of a node, and on no other.
fn wait_places(node: &Namespace, addresses: [IpAddr; 2], devices: &[&str]) -> Result<()> {
    wait_for(&format!("{addresses:?} to be on {devices:?} alone"), || {
        let mut are_there = true;
        for address in addresses {
            let mut places = places(node, address)?;
            places.sort_unstable();
            are_there &= places == devices;
        }
        Ok(are_there.then_some(()))
    })
}

/// Waits until somebody believes an address to be at that device of a node.
fn wait_believed(who: &Namespace, address: IpAddr, node: &Namespace) -> Result<()> {
    let mac = ethernet_address(node, UPLINK_2)?.map(|byte| format!("{byte:02x}")).join(":");
    wait_for(&format!("{address} to be believed at {mac}"), || {
        let shown = who.run(["ip", "neigh", "show", "to", &address.to_string()])?;
        Ok(shown.contains(&mac).then_some(()))
    })
}

/// Clients of a link of its own, who know no router: nobody but the second device answers them.
#[test]
fn vips_are_found_on_each_link() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let Lab { edge, client, .. } = &world.lab;
    // Each device answers for its own addresses alone.
    edge.sysctl("net/ipv4/conf/all/arp_ignore", "1")?;
    let other = ExtraClient::new(&world.lab)?;
    other.has_vips_on_link()?;
    let mut agent = Agent::start_with(&world.lab, &web(&[1, 2]), &FLAGS)?;
    for turn in ["as the run has it", "tc"] {
        let status = agent.wait_ready()?;
        let vips = both(&status, HTTP)?.map(|vip| vip.ip());
        wait_places(edge, vips, &["uplink", UPLINK_2])?;
        everything_works(&other.namespace, &status)?;
        everything_works(client, &status)?;
        // A device that goes down takes its IPv6 addresses along.
        edge.ip_batch(&format!("link set {UPLINK_2} down"))?;
        edge.ip_batch(&format!("link set {UPLINK_2} up\n addr add fd05::1/64 dev {UPLINK_2} nodad"))?;
        for vip in vips {
            wait_for("an answer again", || {
                Ok(who_answers(&other.namespace, (vip, HTTP.port).into(), 1).ok())
            })?;
        }
        wait_places(edge, vips, &["uplink", UPLINK_2])?;
        agent.sigterm()?;
        wait_places(edge, vips, &[])?;
        if turn == "tc" || is_proxied() {
            break;
        }
        agent.use_flags(&[&FLAGS[..], &["--datapath", "tc"]].concat());
        agent.run()?;
    }
    Ok(())
}

/// Whoever has talked to the node that had a VIP hears by which device of which node it is now.
#[test]
fn a_vip_that_moves_is_announced_on_each_link() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let Lab { edge, .. } = &world.lab;
    let other = ExtraClient::new(&world.lab)?;
    let second = ExtraEdge::new(&world.lab, "edge2")?;
    other.join_other(&second)?;
    let mut agent = Agent::start_with(&world.lab, &web(&[1]), &FLAGS)?;
    let status = agent.wait_ready()?;
    let vips = both(&status, HTTP)?.map(|vip| vip.ip());
    everything_works_with(1, &other.namespace, &status)?;
    for vip in vips {
        wait_believed(&other.namespace, vip, edge)?;
    }
    agent.sigterm()?;
    wait_places(edge, vips, &[])?;

    let heard = Capture::start(&world.lab, &other.namespace, "eth1", "arp or icmp6")?;
    let mut agent = Agent::start_at(second.seat(), &world.lab, &web(&[1]), &FLAGS)?;
    let [v4, v6] = vips;
    heard.wait_for(&[&format!("who-has {v4} tell {v4},")])?;
    heard.wait_for(&["> ff02::1:", &format!("neighbor advertisement, tgt is {v6},")])?;
    for vip in vips {
        wait_believed(&other.namespace, vip, &second.namespace)?;
    }
    wait_places(&second.namespace, vips, &["uplink", UPLINK_2])?;
    // What an agent leaves that is killed, one takes away that does not know of the device.
    agent.kill();
    agent.use_flags(&[]);
    agent.run()?;
    wait_places(&second.namespace, vips, &["uplink"])?;
    agent.sigterm()?;
    wait_places(&second.namespace, vips, &[])
}

/// Until another node has them, VIPs are served by the devices that there are, and they go from these at
/// the end.
#[test]
fn clients_outlive_the_link_device() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let Lab { edge, .. } = &world.lab;
    let other = ExtraClient::new(&world.lab)?;
    other.has_vips_on_link()?;
    let mut agent = Agent::start_with(&world.lab, &web(&[1, 2]), &FLAGS)?;
    let status = agent.wait_ready()?;
    let vips = both(&status, HTTP)?.map(|vip| vip.ip());
    let streams: Result<Vec<_>> =
        both(&status, ECHO)?.map(|to| connect(&other.namespace, to)).into_iter().collect();
    edge.ip_batch("link del uplink")?;
    agent.wait_status("the link device to be missed", |status| {
        let problems = list(status, "problems").iter().filter_map(|problem| problem["message"].as_str());
        problems.into_iter().any(|message| message.contains("link device uplink is gone"))
    })?;
    wait_places(edge, vips, &[UPLINK_2])?;
    everything_works(&other.namespace, &status)?;
    for stream in &streams? {
        half_close(stream, b"has outlived the link device")?;
    }
    agent.sigterm()?;
    wait_places(edge, vips, &[])
}
