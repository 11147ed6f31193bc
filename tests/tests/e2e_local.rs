//! Backends on the edge node itself: clients see the VIP, backends the client.

use std::{fs, net::SocketAddr};

use anyhow::Result;
use pointsman_tests::{
    lab::{
        HOST, Lab, Options, POD,
        agent::list,
        is_proxied,
        manifest::{ECHO, HTTP, UDP},
        wait_for,
    },
    traffic::{
        Server, bulk,
        client::{
            check_round_robin, connect, half_close, http_get, tally, udp_exchange, udp_socket, who_answers,
            who_answers_udp,
        },
        ping_pong::PingPong,
    },
    world::{World, both, web},
};

const P1: u8 = POD;
const P2: u8 = POD + 1;

fn with_pods(backends: u8, pods: u8) -> Result<Option<World>> {
    World::with(Options { backends, pods, ..Options::default() })
}

/// The client's address as the backend saw it.
fn seen_by_backend(lab: &Lab, to: SocketAddr) -> Result<SocketAddr> {
    let body = lab.client.enter(|| http_get(to, "/peer"))??;
    Ok(String::from_utf8_lossy(&body).trim().parse()?)
}

fn client_address(v6: bool) -> &'static str {
    if v6 { "fd01::2" } else { "10.1.0.2" }
}

/// How many programs for replies are attached on the edge, by their pins. `bpftool net` tells no links
/// of TC before its version 7.3.
fn exits(lab: &Lab) -> Result<usize> {
    let mut count = 0;
    for version in fs::read_dir(lab.pin_directory())? {
        for pin in fs::read_dir(version?.path().join("links"))? {
            count += usize::from(pin?.file_name().to_string_lossy().ends_with("-egress"));
        }
    }
    Ok(count)
}

#[test]
fn the_pod_sees_the_client() -> Result<()> {
    let Some(world) = with_pods(0, 1)? else { return Ok(()) };
    let (_agent, status) = world.web_in_kernel(&[P1])?;
    for to in both(&status, HTTP)? {
        assert_eq!(seen_by_backend(&world.lab, to)?.ip().to_string(), client_address(to.is_ipv6()));
        assert_eq!(who_answers(&world.lab.client, to, 3)?, ["p1"; 3]);
    }
    for to in both(&status, UDP)? {
        assert_eq!(who_answers_udp(&world.lab.client, to, 3)?, ["p1"; 3]);
    }
    for to in both(&status, ECHO)? {
        half_close(&connect(&world.lab.client, to)?, b"half closed")?;
    }
    Ok(())
}

/// Packets of clients come in by the link device, and the default route leaves by another.
#[test]
fn replies_leave_by_another_device() -> Result<()> {
    let Some(world) = with_pods(0, 1)? else { return Ok(()) };
    let Lab { client, edge, .. } = &world.lab;
    edge.ip_batch(&format!("link add back type veth peer name eth1 netns {}", client.name()))?;
    edge.ip_batch(
        "addr add 10.6.0.1/24 dev back\n addr add fd06::1/64 dev back nodad\n link set back up
         route add default via 10.6.0.2\n route add ::/0 via fd06::2",
    )?;
    client.ip_batch(
        "addr add 10.6.0.2/24 dev eth1\n addr add fd06::2/64 dev eth1 nodad\n link set eth1 up
         addr add 10.5.0.2/32 dev lo\n addr add fd05::2/128 dev lo nodad
         route replace default via 10.1.0.1 src 10.5.0.2\n route replace ::/0 via fd01::1 src fd05::2",
    )?;
    for (namespace, device) in [(edge, "uplink"), (client.as_ref(), "eth1")] {
        for name in [device, "all"] {
            namespace.sysctl(&format!("net/ipv4/conf/{name}/rp_filter"), "0")?;
        }
    }
    let (_agent, status) = world.web_in_kernel(&[P1])?;
    for (to, own) in both(&status, HTTP)?.into_iter().zip(["10.5.0.2", "fd05::2"]) {
        assert_eq!(seen_by_backend(&world.lab, to)?.ip().to_string(), own);
        assert_eq!(who_answers(client, to, 3)?, ["p1"; 3]);
    }
    for to in both(&status, UDP)? {
        assert_eq!(who_answers_udp(client, to, 3)?, ["p1"; 3]);
    }
    assert_eq!(exits(&world.lab)?, 2);
    Ok(())
}

#[test]
fn super_packets_arrive_intact_both_ways() -> Result<()> {
    let Some(world) = with_pods(0, 1)? else { return Ok(()) };
    let (_agent, status) = world.web(&[P1])?;
    for (seed, to) in (1..).zip(both(&status, ECHO)?) {
        assert_eq!(bulk::echo(&connect(&world.lab.client, to)?, 256 << 20, seed)?, "p1");
    }
    Ok(())
}

#[test]
fn fragmented_datagrams_arrive_both_ways() -> Result<()> {
    let Some(world) = with_pods(0, 1)? else { return Ok(()) };
    let (_agent, status) = world.web(&[P1])?;
    for to in both(&status, UDP)? {
        let socket = world.lab.client.enter(|| udp_socket(to))??;
        for size in [1, 1_400, 3_000, 20_000] {
            assert_eq!(udp_exchange(&socket, &vec![b'f'; size])?, "p1");
        }
    }
    Ok(())
}

#[test]
fn local_and_remote_take_turns_exactly() -> Result<()> {
    let Some(world) = with_pods(2, 1)? else { return Ok(()) };
    let _host = Server::start(&world.lab.edge)?;
    let (_agent, status) = world.web(&[1, 2, P1, HOST])?;
    for to in both(&status, HTTP)? {
        check_round_robin(&who_answers(&world.lab.client, to, 24)?, 4)?;
    }
    for to in both(&status, UDP)? {
        check_round_robin(&who_answers_udp(&world.lab.client, to, 24)?, 4)?;
    }
    for to in both(&status, ECHO)? {
        let names: Result<Vec<_>> =
            (0..4).map(|seed| bulk::echo(&connect(&world.lab.client, to)?, 1_000_000, seed)).collect();
        assert_eq!(tally(&names?).len(), 4);
    }
    Ok(())
}

#[test]
fn the_host_network_sees_the_client() -> Result<()> {
    let Some(world) = with_pods(0, 0)? else { return Ok(()) };
    let _host = Server::start(&world.lab.edge)?;
    let (_agent, status) = world.web_in_kernel(&[HOST])?;
    for to in both(&status, HTTP)? {
        assert_eq!(seen_by_backend(&world.lab, to)?.ip().to_string(), client_address(to.is_ipv6()));
    }
    for to in both(&status, UDP)? {
        assert_eq!(who_answers_udp(&world.lab.client, to, 3)?, ["edge"; 3]);
    }
    for (seed, to) in (1..).zip(both(&status, ECHO)?) {
        assert_eq!(bulk::echo(&connect(&world.lab.client, to)?, 64 << 20, seed)?, "edge");
    }
    Ok(())
}

#[test]
fn connections_outlive_the_agent() -> Result<()> {
    let Some(world) = with_pods(0, 1)? else { return Ok(()) };
    let (mut agent, status) = world.web_in_kernel(&[P1])?;
    let flows: Vec<PingPong> = both(&status, ECHO)?
        .into_iter()
        .map(|to| PingPong::start(&world.lab.client, to, 2))
        .collect::<Result<_>>()?;
    for _ in 0..2 {
        agent.kill();
        for flows in &flows {
            flows.wait_exchanges(30)?;
        }
        assert_eq!(who_answers(&world.lab.client, both(&status, HTTP)?[0], 2)?, ["p1"; 2]);
        agent.run()?;
        agent.wait_ready()?;
        for flows in &flows {
            flows.wait_exchanges(30)?;
        }
    }
    for flows in flows {
        let report = flows.stop()?;
        assert!(report.broken.is_empty(), "{report:?}");
    }
    Ok(())
}

#[test]
fn a_pod_that_is_gone_breaks_its_connections_at_once() -> Result<()> {
    let Some(world) = with_pods(0, 2)? else { return Ok(()) };
    let (agent, status) = world.web(&[P1])?;
    let [to, to6] = both(&status, ECHO)?;
    let flows = [PingPong::start(&world.lab.client, to, 1)?, PingPong::start(&world.lab.client, to6, 1)?];
    for flows in &flows {
        flows.wait_exchanges(5)?;
    }
    agent.write_config(&web(&[P2]))?;
    for flows in flows {
        let report = flows.wait_broken()?;
        assert!(report.broken.iter().all(|error| error.contains("reset")), "{report:?}");
    }
    wait_for("the other pod to answer", || {
        Ok((who_answers(&world.lab.client, both(&status, HTTP)?[0], 1)? == ["p2"]).then_some(()))
    })
}

#[test]
fn the_egress_program_is_there_while_it_is_needed() -> Result<()> {
    let Some(world) = with_pods(1, 1)? else { return Ok(()) };
    let (mut agent, status) = world.web_in_kernel(&[1])?;
    assert_eq!(exits(&world.lab)?, 0, "no backend is on the node");
    agent.write_config(&web(&[1, P1]))?;
    let [to, _] = both(&status, HTTP)?;
    wait_for("the egress programs", || Ok((exits(&world.lab)? == 2).then_some(())))?;
    wait_for("both to answer", || {
        Ok((tally(&who_answers(&world.lab.client, to, 4)?).len() == 2).then_some(()))
    })?;
    agent.write_config(&web(&[1]))?;
    wait_for("the egress programs to go", || Ok((exits(&world.lab)? == 0).then_some(())))?;
    agent.write_config(&web(&[P1]))?;
    wait_for("the egress program again", || Ok((exits(&world.lab)? >= 1).then_some(())))?;
    assert!(agent.sigterm()?.success());
    assert!(!world.lab.pin_directory().exists(), "pins are left");
    Ok(())
}

#[test]
fn a_node_that_does_not_forward_is_told() -> Result<()> {
    let Some(world) = with_pods(0, 1)? else { return Ok(()) };
    world.lab.edge.sysctl("net/ipv4/ip_forward", "0")?;
    if is_proxied() {
        // It ends connections and makes others: nothing is forwarded.
        let (agent, status) = world.web(&[P1])?;
        assert_eq!(who_answers(&world.lab.client, both(&status, HTTP)?[0], 2)?, ["p1"; 2]);
        assert!(list(&agent.status()?, "problems").is_empty(), "{status:#}");
        return Ok(());
    }
    let (agent, _) = world.web(&[P1])?;
    agent.wait_status("the warning", |status| {
        status["problems"].to_string().contains("sysctl -w net.ipv4.ip_forward=1")
    })?;
    Ok(())
}

#[test]
fn a_narrow_link_to_the_client_is_learned_by_the_pod() -> Result<()> {
    let options = Options { backends: 0, pods: 1, client_mtu: Some(1_300), ..Options::default() };
    let Some(world) = World::with(options)? else { return Ok(()) };
    let (_agent, status) = world.web(&[P1])?;
    for (seed, to) in (1..).zip(both(&status, ECHO)?) {
        assert_eq!(bulk::echo(&connect(&world.lab.client, to)?, 4 << 20, seed)?, "p1");
    }
    Ok(())
}

/// What bridges of containers come with: the node masquerades what pods send out. A reply is no
/// connection of its own.
#[test]
fn replies_are_not_masqueraded() -> Result<()> {
    let Some(world) = with_pods(0, 1)? else { return Ok(()) };
    for (family, pods) in [("ip", "10.4.0.0/24"), ("ip6", "fd04::/64")] {
        let rules = format!(
            "table {family} cni {{ chain post {{ type nat hook postrouting priority 100;
             {family} saddr {pods} {family} daddr != {pods} masquerade; }}; }}"
        );
        world.lab.edge.run(["nft", &rules])?;
    }
    let (_agent, status) = world.web_in_kernel(&[P1])?;
    for to in both(&status, HTTP)? {
        assert_eq!(seen_by_backend(&world.lab, to)?.ip().to_string(), client_address(to.is_ipv6()));
    }
    for (seed, to) in (1..).zip(both(&status, ECHO)?) {
        assert_eq!(bulk::echo(&connect(&world.lab.client, to)?, 1 << 20, seed)?, "p1");
    }
    for to in both(&status, UDP)? {
        assert_eq!(who_answers_udp(&world.lab.client, to, 3)?, ["p1"; 3]);
    }
    Ok(())
}
