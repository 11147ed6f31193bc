//! Schedulers, with real traffic.

use std::net::SocketAddr;

use anyhow::Result;
use pointsman_tests::{
    lab::{
        Lab,
        agent::{Agent, list, wait_for},
        manifest::{ECHO, HTTP, UDP, manifest},
    },
    traffic::client::{check_round_robin, connect, half_close, tally, udp_exchange, udp_socket, who_answers},
    world::{World, both, web_service},
};
use serde_json::Value;

fn yaml(scheduler: &str, backends: &[u8]) -> String {
    manifest(&[web_service(backends).annotated("pointsman.dev/scheduler", scheduler)])
}

/// Whether every port of the Service `web` is served so, by this many backends.
fn is_spread(status: &Value, scheduler: &str, backends: usize) -> bool {
    let web = list(status, "services").iter().filter(|service| service["name"] == "web");
    web.flat_map(|service| list(service, "ports"))
        .all(|port| port["scheduler"] == scheduler && list(port, "backends").len() == backends)
}

/// Whom a socket of a client talks to, asked twice: by its own port.
fn by_port(lab: &Lab, to: SocketAddr, ports: std::ops::Range<u16>) -> Result<Vec<String>> {
    let ask = |port| -> Result<String> {
        let any: SocketAddr =
            if to.is_ipv4() { ([0, 0, 0, 0], port).into() } else { ([0u16; 8], port).into() };
        let socket = std::net::UdpSocket::bind(any)?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(std::time::Duration::from_secs(5)))?;
        udp_exchange(&socket, b"who")
    };
    lab.client.enter(|| ports.map(ask).collect())?
}

/// Another agent, whose maps begin empty, knows the backends by other indices.
#[test]
fn maglev_gives_a_client_the_same_backend_after_all_was_forgotten() -> Result<()> {
    let Some(world) = World::new(3)? else { return Ok(()) };
    let mut agent = Agent::start(&world.lab, &yaml("maglev", &[2]))?;
    agent.write_config(&yaml("maglev", &[2, 3, 1]))?;
    let status = agent.wait_status("three backends", |status| is_spread(status, "maglev", 3))?;
    let wide = agent.cli(&["status", "--output", "wide"])?;
    assert!(wide.contains("maglev"), "{wide}");
    for to in both(&status, UDP)? {
        let before = by_port(&world.lab, to, 40_000..40_030)?;
        assert_eq!(tally(&before).len(), 3, "{before:?}");
        agent.sigterm()?;
        agent = Agent::start(&world.lab, &yaml("maglev", &[1, 2, 3]))?;
        agent.wait_status("three backends", |status| is_spread(status, "maglev", 3))?;
        assert_eq!(by_port(&world.lab, to, 40_000..40_030)?, before);
    }
    Ok(())
}

#[test]
fn least_connections_go_where_few_are_open() -> Result<()> {
    let Some(world) = World::new(3)? else { return Ok(()) };
    let agent = Agent::start(&world.lab, &yaml("least-connections", &[1, 2, 3]))?;
    let status = agent.wait_status("three backends", |status| is_spread(status, "least-connections", 3))?;
    let [http, _] = both(&status, HTTP)?;
    check_round_robin(&who_answers(&world.lab.client, http, 9)?, 3)?;
    let [echo, _] = both(&status, ECHO)?;
    let mut held = Vec::new();
    for _ in 0..9 {
        held.push(connect(&world.lab.client, echo)?);
    }
    // Ends all that one of them has.
    let names = |held: Vec<std::net::TcpStream>| -> Result<Vec<String>> {
        held.iter().map(|stream| half_close(stream, b"who")).collect()
    };
    let first = names(held.drain(..3).collect())?;
    assert_eq!(tally(&first).len(), 3, "one each: {first:?}");
    let more: Vec<_> = (0..3).map(|_| connect(&world.lab.client, echo)).collect::<Result<Vec<_>>>()?;
    held.extend(more);
    let all = names(held)?;
    let counts = tally(&all);
    assert!(counts.values().all(|count| *count == 3), "{counts:?}");
    Ok(())
}
