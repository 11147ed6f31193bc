//! Who is close to the VIP: backends, the node itself and its pods.

use std::{
    fs,
    io::{self, ErrorKind},
    net::{Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use pointsman_tests::{
    lab::{
        Agent, ControlGroup, HOST, Lab, Namespace, Options, POD, in_kernel,
        manifest::{ECHO, HTTP, UDP},
        wait_for,
    },
    traffic::{
        Server, bulk,
        client::{
            TIMEOUT, check_round_robin, connect, half_close, open, tally, uninterrupted, who_answers,
            who_answers_udp,
        },
    },
    world::{World, both, web},
};
use serde_json::Value;

const P1: u8 = POD;
const P2: u8 = POD + 1;

/// A world whose agent serves the sockets of a control group.
struct Near {
    group: ControlGroup,
    world: World,
}

impl Near {
    fn new(backends: u8, pods: u8) -> Result<Option<Self>> {
        let options = Options { backends, pods, ..Options::default() };
        let Some(world) = World::with(options)? else { return Ok(None) };
        Ok(Some(Self { group: ControlGroup::new(&world.lab)?, world }))
    }

    fn lab(&self) -> &Lab {
        &self.world.lab
    }

    fn start(&self, backends: &[u8], flags: &[&str]) -> Result<Agent<'_>> {
        let path = self.group.path().display().to_string();
        Agent::start_with(self.lab(), &web(backends), &[&["--cgroup", &path], flags].concat())
    }

    fn web(&self, backends: &[u8]) -> Result<(Agent<'_>, Value)> {
        self.web_with(backends, &[])
    }

    /// By the hooks of the group, which there are beside programs alone: the proxy's listeners are
    /// reached by sockets of the node anyhow.
    fn web_in_kernel(&self, backends: &[u8]) -> Result<(Agent<'_>, Value)> {
        self.web_with(backends, in_kernel())
    }

    fn web_with(&self, backends: &[u8], flags: &[&str]) -> Result<(Agent<'_>, Value)> {
        let agent = self.start(backends, flags)?;
        let status = agent.wait_ready()?;
        Ok((agent, status))
    }
}

/// How many links of sockets' programs are pinned.
fn hooks(lab: &Lab) -> Result<usize> {
    let mut count = 0;
    for version in fs::read_dir(lab.pin_directory())? {
        for pin in fs::read_dir(version?.path().join("links"))? {
            count += usize::from(pin?.file_name().to_string_lossy().starts_with("cgroup"));
        }
    }
    Ok(count)
}

/// The address as sockets of IPv6 name it.
fn mapped(to: SocketAddr) -> SocketAddr {
    match to {
        SocketAddr::V4(v4) => (v4.ip().to_ipv6_mapped(), v4.port()).into(),
        SocketAddr::V6(_) => to,
    }
}

fn check_all_reached(near: &Near, from: &Namespace, status: &Value, backends: usize) -> Result<()> {
    for to in both(status, HTTP)? {
        check_round_robin(&near.group.enter(|| who_answers(from, to, 3 * backends))?, backends)?;
    }
    for to in both(status, UDP)? {
        check_round_robin(&near.group.enter(|| who_answers_udp(from, to, 3 * backends))?, backends)?;
    }
    for to in both(status, ECHO)? {
        let stream = near.group.enter(|| connect(from, to))?;
        assert_eq!(stream.peer_addr()?, to, "the peer is the VIP");
        half_close(&stream, b"half closed")?;
        let stream = near.group.enter(|| connect(from, mapped(to)))?;
        assert_eq!(stream.peer_addr()?, mapped(to), "the peer is the VIP");
        bulk::echo(&stream, 1 << 20, 7)?;
    }
    Ok(())
}

#[test]
fn the_node_reaches_its_own_vips() -> Result<()> {
    let Some(near) = Near::new(2, 1)? else { return Ok(()) };
    let _host = Server::start(&near.lab().edge)?;
    let (_agent, status) = near.web(&[1, 2, P1, HOST])?;
    check_all_reached(&near, &near.lab().edge, &status, 4)?;
    // Clients from outside take turns with the node.
    let [to, _] = both(&status, HTTP)?;
    let outside = || who_answers(&near.lab().client, to, 1);
    let inside = || near.group.enter(|| who_answers(&near.lab().edge, to, 1));
    let mut names = Vec::new();
    for _ in 0..4 {
        names.extend(outside()?);
        names.extend(inside()?);
    }
    check_round_robin(&names, 4)
}

#[test]
fn a_pod_of_the_node_reaches_the_vip_and_itself() -> Result<()> {
    let Some(near) = Near::new(1, 2)? else { return Ok(()) };
    let (_agent, status) = near.web(&[1, P1, P2])?;
    check_all_reached(&near, &near.lab().pods[0], &status, 3)
}

#[test]
fn the_only_backend_of_the_host_network_is_reached_by_its_node() -> Result<()> {
    let Some(near) = Near::new(0, 0)? else { return Ok(()) };
    let _host = Server::start(&near.lab().edge)?;
    let (_agent, status) = near.web(&[HOST])?;
    check_all_reached(&near, &near.lab().edge, &status, 1)?;
    assert_eq!(who_answers(&near.lab().client, both(&status, HTTP)?[0], 2)?, ["edge"; 2]);
    Ok(())
}

/// By full NAT, without any hook: the packets of other nodes' pods come by the wire.
#[test]
fn a_backend_reaches_the_vip_and_itself() -> Result<()> {
    let Some(near) = Near::new(2, 0)? else { return Ok(()) };
    let (_agent, status) = near.world.web(&[1, 2])?;
    for (n, backend) in near.lab().backends.iter().enumerate() {
        for to in both(&status, HTTP)? {
            check_round_robin(&who_answers(backend, to, 6)?, 2)?;
        }
        for to in both(&status, UDP)? {
            check_round_robin(&who_answers_udp(backend, to, 6)?, 2)?;
        }
        for to in both(&status, ECHO)? {
            let names: Result<Vec<_>> =
                (0..2).map(|seed| bulk::echo(&connect(backend, to)?, 1 << 20, seed)).collect();
            assert_eq!(tally(&names?).len(), 2, "backend {} did not reach all", n + 1);
        }
    }
    Ok(())
}

/// EndpointSlices made by hand: a machine outside, behind a router.
#[test]
fn a_machine_behind_a_router_is_a_backend() -> Result<()> {
    let Some(near) = Near::new(2, 0)? else { return Ok(()) };
    let outside = near.lab().behind_second_backend(1_500)?;
    let _server = Server::start(&outside)?;
    let path = near.group.path().display().to_string();
    let by_hand = web(&[1, 2]).replace("10.2.0.12", "10.7.0.2").replace("fd02::12", "fd07::2");
    assert!(by_hand.contains("10.7.0.2") && by_hand.contains("fd07::2"));
    let agent = Agent::start_with(near.lab(), &by_hand, &["--cgroup", &path])?;
    let status = agent.wait_ready()?;
    for to in both(&status, HTTP)? {
        let names = who_answers(&near.lab().client, to, 6)?;
        check_round_robin(&names, 2)?;
        assert!(names.contains(&"outside".to_owned()), "{names:?}");
    }
    for to in both(&status, UDP)? {
        check_round_robin(&who_answers_udp(&near.lab().client, to, 6)?, 2)?;
    }
    for to in both(&status, ECHO)? {
        let names: Result<Vec<_>> =
            (0..2).map(|seed| bulk::echo(&connect(&near.lab().client, to)?, 4 << 20, seed)).collect();
        assert_eq!(tally(&names?).len(), 2);
    }
    check_all_reached(&near, &near.lab().edge, &status, 2)
}

/// A socket that is not connected, for both families, in the namespace of this thread.
fn datagram_socket() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    Ok(socket)
}

/// Sends a datagram to a VIP and waits for its echo, which has to come from there. Gives who sent it.
fn ask(socket: &UdpSocket, to: SocketAddr, text: &str) -> Result<String> {
    socket.send_to(text.as_bytes(), to).context("cannot send")?;
    let mut buffer = [0; 100];
    let (count, from) = uninterrupted(|| socket.recv_from(&mut buffer)).context("no answer")?;
    ensure!(from == to, "an answer of {from}, not {to}");
    let answer = String::from_utf8_lossy(&buffer[..count]).into_owned();
    let (name, echo) = answer.split_once(' ').context("an answer without a name")?;
    ensure!(echo == text, "`{echo}` is not the echo of `{text}`");
    Ok(name.to_owned())
}

#[test]
fn one_datagram_socket_talks_to_many() -> Result<()> {
    let Some(near) = Near::new(2, 1)? else { return Ok(()) };
    let (agent, status) = near.web(&[1, 2])?;
    for from in [&near.lab().edge, &near.lab().pods[0]] {
        let socket = near.group.enter(|| Ok(from.enter(datagram_socket)??))?;
        let [v4, v6] = both(&status, UDP)?;
        let (v4, backend) = (mapped(v4), (Lab::backend_address(1, true), UDP.target).into());
        let first = [ask(&socket, v4, "one")?, ask(&socket, v6, "two")?];
        for _ in 0..4 {
            assert_eq!([ask(&socket, v4, "again")?, ask(&socket, v6, "again")?], first);
        }
        // Others take turns.
        let others: Result<Vec<_>> = (0..2)
            .map(|_| ask(&near.group.enter(|| Ok(from.enter(datagram_socket)??))?, v6, "other"))
            .collect();
        assert_eq!(tally(&others?).len(), 2);
        // Whom it does not reach by a VIP, it sees as it is; unless it is the one behind a VIP.
        let stranger = near.group.enter(|| Ok(from.enter(datagram_socket)??))?;
        assert_eq!(ask(&stranger, backend, "direct")?, "b1");
    }
    // A backend that is gone: the session goes on with another.
    let socket = near.group.enter(|| Ok(near.lab().edge.enter(datagram_socket)??))?;
    let to = both(&status, UDP)?[1];
    let first = ask(&socket, to, "before")?;
    let other = if first == "b1" { (2, "b2") } else { (1, "b1") };
    agent.write_config(&web(&[other.0]))?;
    wait_for("the other backend", || Ok((ask(&socket, to, "after")? == other.1).then_some(())))
}

#[test]
fn without_a_backend_the_call_fails_at_once() -> Result<()> {
    let Some(near) = Near::new(0, 1)? else { return Ok(()) };
    let agent = near.start(&[], in_kernel())?;
    let status = agent.wait_status("the VIPs", |status| both(status, HTTP).is_ok())?;
    wait_for("the hooks", || Ok((hooks(near.lab())? == 8).then_some(())))?;
    for from in [&near.lab().edge, &near.lab().pods[0]] {
        for to in both(&status, HTTP)? {
            let before = Instant::now();
            let result = near.group.enter(|| from.enter(|| TcpStream::connect(to)))?;
            assert_eq!(result.unwrap_err().kind(), ErrorKind::ConnectionRefused);
            assert!(before.elapsed() < TIMEOUT);
        }
        let socket = near.group.enter(|| Ok(from.enter(datagram_socket)??))?;
        for to in both(&status, UDP)? {
            let error = socket.send_to(b"nobody", mapped(to)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        }
    }
    Ok(())
}

#[test]
fn sockets_are_served_while_agents_come_and_go() -> Result<()> {
    let Some(near) = Near::new(2, 0)? else { return Ok(()) };
    let edge = &near.lab().edge;
    let (mut agent, status) = near.web_in_kernel(&[1, 2])?;
    assert_eq!(hooks(near.lab())?, 8);
    let [to, _] = both(&status, HTTP)?;
    let [echo, _] = both(&status, ECHO)?;
    let flows = near.group.enter(|| Ok(edge.enter(|| open(echo))??))?;
    for _ in 0..2 {
        agent.kill();
        check_round_robin(&near.group.enter(|| who_answers(edge, to, 4))?, 2)?;
        agent.run()?;
        agent.wait_ready()?;
        check_round_robin(&near.group.enter(|| who_answers(edge, to, 4))?, 2)?;
        assert_eq!(hooks(near.lab())?, 8);
    }
    assert_eq!(flows.peer_addr()?, echo);
    half_close(&flows, b"still there")?;
    assert!(agent.sigterm()?.success());
    assert!(!near.lab().pin_directory().exists(), "pins are left");
    Ok(())
}

#[test]
fn hooks_are_there_while_there_are_vips() -> Result<()> {
    let Some(near) = Near::new(1, 0)? else { return Ok(()) };
    let (agent, _) = near.web_in_kernel(&[1])?;
    assert_eq!(hooks(near.lab())?, 8);
    agent.write_config("")?;
    wait_for("the hooks to go", || Ok((hooks(near.lab())? == 0).then_some(())))?;
    agent.write_config(&web(&[1]))?;
    wait_for("the hooks", || Ok((hooks(near.lab())? == 8).then_some(())))
}

#[test]
fn a_group_that_is_none_is_told_and_nothing_else_suffers() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let directory = world.lab.directory().display().to_string();
    let flags = [&["--cgroup", &directory], in_kernel()].concat();
    let agent = Agent::start_with(&world.lab, &web(&[1]), &flags)?;
    let status = agent.wait_status("the problem", |status| {
        status["problems"].to_string().contains("is no control group of version 2")
    })?;
    for to in both(&status, HTTP)? {
        assert_eq!(who_answers(&world.lab.client, to, 2)?, ["b1"; 2]);
    }
    Ok(())
}
