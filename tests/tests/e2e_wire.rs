//! What the wire may look like: tagged frames, and one device for everything.

use std::net::IpAddr;

use anyhow::{Result, bail};
use etherparse::{PacketBuilder, VlanId};
use pointsman_tests::{
    lab::{
        Options,
        manifest::{ECHO, HTTP, UDP},
        wire::{Capture, ethernet_address, send_frame},
    },
    traffic::{
        bulk,
        client::{check_round_robin, connect, half_close, who_answers, who_answers_udp},
    },
    world::{World, both},
};

const VLAN: u16 = 5;
const CLIENT_PORT: u16 = 40_000;

/// A tagged datagram is forwarded, untagged, to a backend; its answer has the client's tag.
#[test]
fn a_vlan_tag_goes_and_comes_back() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let (_agent, status) = world.web_in_kernel(&[1])?;
    let lab = &world.lab;
    let source = ethernet_address(&lab.client, "eth0")?;
    let edge = ethernet_address(&lab.edge, "uplink")?;
    let answers = Capture::start(lab, &lab.client, "eth0", "vlan and udp")?;
    let questions = Capture::start(lab, &lab.backends[0], "eth0", "udp and dst port 9000")?;
    for (to, client) in both(&status, UDP)?.into_iter().zip(["10.1.0.2", "fd01::2"]) {
        let tagged = PacketBuilder::ethernet2(source, edge).single_vlan(VlanId::try_new(VLAN)?);
        let packet = match (client.parse()?, to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(vip)) => tagged.ipv4(from.octets(), vip.octets(), 64),
            (IpAddr::V6(from), IpAddr::V6(vip)) => tagged.ipv6(from.octets(), vip.octets(), 64),
            _ => bail!("two families"),
        };
        let mut frame = Vec::new();
        packet.udp(CLIENT_PORT, to.port()).write(&mut frame, b"tagged")?;
        send_frame(&lab.client, "eth0", &frame)?;
        let family = if to.is_ipv4() { "ethertype IPv4" } else { "ethertype IPv6" };
        let seen = questions.wait_for(&[family])?;
        assert!(!seen.contains("vlan"), "the backend's LAN has no tags: {seen}");
        // tcpdump joins address and port by a dot.
        let from = format!("{}.{} > ", to.ip(), to.port());
        answers.wait_for(&[&format!("vlan {VLAN},"), family, &from, &format!(".{CLIENT_PORT}: ")])?;
    }
    Ok(())
}

/// Requests come in, and leave for the backends, by the same device (`XDP_TX`).
#[test]
fn one_device_is_enough() -> Result<()> {
    let Some(world) = World::with(Options { one_armed: true, ..Options::default() })? else { return Ok(()) };
    let (_agent, status) = world.web(&[1, 2, 3])?;
    let client = &world.lab.client;
    for to in both(&status, HTTP)? {
        check_round_robin(&who_answers(client, to, 12)?, 3)?;
    }
    for to in both(&status, UDP)? {
        check_round_robin(&who_answers_udp(client, to, 12)?, 3)?;
    }
    for to in both(&status, ECHO)? {
        half_close(&connect(client, to)?, b"half")?;
        bulk::echo(&connect(client, to)?, 20_000_000, 1)?;
    }
    Ok(())
}
