//! Schedulers, with real traffic.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    ops::Range,
    time::Duration,
};

use anyhow::Result;
use pointsman_tests::{
    lab::{
        Lab,
        agent::{Agent, list, wait_for},
        manifest::{ECHO, UDP, manifest},
    },
    traffic::{
        Server,
        client::{connect, half_close, tally, udp_exchange},
    },
    world::{World, both, web_service},
};
use serde_json::Value;

fn yaml(scheduler: &str, backends: &[u8]) -> String {
    manifest(&[web_service(backends).annotated("pointsman.dev/scheduler", scheduler)])
}

/// Whether every port of the Service `web` is served so, by this many backends.
fn is_spread(status: &Value, scheduler: &str, backends: usize) -> bool {
    let web = list(status, "services").iter().filter(|service| service["name"] == "web");
    let ports: Vec<&Value> = web.flat_map(|service| list(service, "ports")).collect();
    let is_right =
        |port: &&&Value| port["scheduler"] == scheduler && list(port, "backends").len() == backends;
    !ports.is_empty() && ports.iter().filter(is_right).count() == ports.len()
}

/// Who answers a client, by its own port.
fn by_port(lab: &Lab, to: SocketAddr, ports: Range<u16>) -> Result<Vec<String>> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let ask = |port| -> Result<String> {
        let socket = UdpSocket::bind((any, port))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        udp_exchange(&socket, b"who")
    };
    lab.client.enter(|| ports.map(ask).collect())?
}

/// An agent whose maps begin empty knows the backends by other indices.
#[test]
fn maglev_gives_a_client_the_same_backend_after_all_was_forgotten() -> Result<()> {
    let Some(world) = World::new(3)? else { return Ok(()) };
    let mut agent = Agent::start(&world.lab, &yaml("maglev", &[2]))?;
    agent.wait_ready()?;
    agent.write_config(&yaml("maglev", &[2, 3, 1]))?;
    let status = agent.wait_status("three backends", |status| is_spread(status, "maglev", 3))?;
    let ask = || -> Result<Vec<String>> {
        let all: Vec<_> = both(&status, UDP)?
            .into_iter()
            .map(|to| by_port(&world.lab, to, 40_000..40_030))
            .collect::<Result<_>>()?;
        Ok(all.concat())
    };
    let before = ask()?;
    assert_eq!(tally(&before).len(), 3, "{before:?}");
    agent.sigterm()?;
    agent.write_config(&yaml("maglev", &[1, 2, 3]))?;
    agent.run()?;
    agent.wait_ready()?;
    agent.wait_status("three backends", |status| is_spread(status, "maglev", 3))?;
    assert_eq!(ask()?, before);
    Ok(())
}

/// A backend that has lost its connections gets the next ones, all of them.
#[test]
fn least_connections_go_where_few_are_open() -> Result<()> {
    let Some(world) = World::new(3)? else { return Ok(()) };
    let agent = Agent::start(&world.lab, &yaml("least-connections", &[1, 2, 3]))?;
    let status = agent.wait_ready()?;
    agent.wait_status("three backends", |status| is_spread(status, "least-connections", 3))?;
    for to in both(&status, ECHO)? {
        // One after the other, also for the proxy, which chooses a backend only after it has accepted.
        let accepted = || world.servers.iter().map(Server::accepted).sum::<u64>();
        let open = || -> Result<TcpStream> {
            let before = accepted();
            let stream = connect(&world.lab.client, to)?;
            wait_for("a backend to accept it", || Ok((accepted() > before).then_some(())))?;
            Ok(stream)
        };
        let name = |stream: &TcpStream| half_close(stream, b"who");
        let held: Vec<_> = (0..9).map(|_| open()).collect::<Result<_>>()?;
        // Those of one: idle backends take turns.
        let ended: Vec<_> = held.iter().step_by(3).map(name).collect::<Result<_>>()?;
        assert_eq!(tally(&ended).len(), 1, "{ended:?}");
        let next: Vec<_> = (0..3).map(|_| open()).collect::<Result<_>>()?;
        let next: Vec<_> = next.iter().map(name).collect::<Result<_>>()?;
        assert_eq!(next, ended);
    }
    Ok(())
}
