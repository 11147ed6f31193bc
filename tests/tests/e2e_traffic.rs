//! Servers and clients, by plain routing: what the other suites measure with must be right itself.

use std::net::SocketAddr;

use anyhow::Result;
use pointsman_tests::{
    lab::{Lab, is_root},
    traffic::{
        ECHO_PORT, HTTP_PORT, Server, UDP_PORT, bulk,
        client::{connect, half_close, http_get, who_answers, who_answers_udp},
        load::Load,
        ping_pong::{PingPong, retransmissions},
        probe,
        udp_flows::UdpFlows,
    },
};

fn lab() -> Result<Option<(Lab, Vec<Server>)>> {
    if !is_root() {
        return Ok(None);
    }
    let lab = Lab::routed(1)?;
    let servers = Server::start_all(&lab.backends)?;
    Ok(Some((lab, servers)))
}

fn both(port: u16) -> [SocketAddr; 2] {
    [false, true].map(|v6| SocketAddr::new(Lab::backend_address(1, v6), port))
}

#[test]
fn requests() -> Result<()> {
    let Some((lab, servers)) = lab()? else { return Ok(()) };
    for to in both(HTTP_PORT) {
        assert_eq!(who_answers(&lab.client, to, 3)?, ["b1", "b1", "b1"]);
        assert_eq!(lab.client.enter(|| http_get(to, "/bytes/3000000"))??.len(), 3_000_000);
    }
    for to in both(UDP_PORT) {
        assert_eq!(who_answers_udp(&lab.client, to, 2)?, ["b1", "b1"]);
    }
    assert_eq!(servers[0].accepted(), 8);
    Ok(())
}

#[test]
fn streams() -> Result<()> {
    let Some((lab, _servers)) = lab()? else { return Ok(()) };
    for to in both(ECHO_PORT) {
        assert_eq!(half_close(&connect(&lab.client, to)?, b"half")?, "b1");
        assert_eq!(bulk::echo(&connect(&lab.client, to)?, 20_000_000, 1)?, "b1");
        let flows = PingPong::start(&lab.client, to, 3)?;
        flows.wait_exchanges(20)?;
        let report = flows.stop()?;
        assert!(report.exchanges >= 60 && report.broken.is_empty(), "{report:?}");
    }
    Ok(())
}

#[test]
fn losses_show() -> Result<()> {
    let Some((lab, servers)) = lab()? else { return Ok(()) };
    let flows = PingPong::start(&lab.client, both(ECHO_PORT)[0], 1)?;
    flows.wait_exchanges(5)?;
    assert_eq!(retransmissions(&lab.client)?, 0);
    lab.edge.ip_batch("link set lan down")?;
    pointsman_tests::lab::wait_for("a retransmission", || {
        Ok((retransmissions(&lab.client)? > 0).then_some(()))
    })?;
    lab.edge.ip_batch("link set lan up")?;
    flows.wait_exchanges(5)?;
    assert!(flows.stop()?.late >= 1);
    let flows = PingPong::start(&lab.client, both(ECHO_PORT)[0], 2)?;
    flows.wait_exchanges(5)?;
    drop(servers);
    let report = flows.wait_broken()?;
    assert_eq!(report.broken.len(), 2, "{report:?}");
    Ok(())
}

/// Without a word from anybody: a blackhole sends no ICMP error.
#[test]
fn a_lost_datagram_shows() -> Result<()> {
    let Some((lab, _servers)) = lab()? else { return Ok(()) };
    let to = both(UDP_PORT)[0];
    let flows = UdpFlows::start(&lab.client, to, 2)?;
    flows.wait_exchanges(20)?;
    flows.stop()?;
    let flows = UdpFlows::start(&lab.client, to, 2)?;
    flows.wait_exchanges(20)?;
    lab.edge.ip_batch(&format!("route add blackhole {}/32", to.ip()))?;
    let lost = flows.stop_when_broken().expect_err("nothing got through").to_string();
    assert!(lost.starts_with("exchange "), "{lost}");
    Ok(())
}

#[test]
fn refusals_and_errors_show() -> Result<()> {
    let Some((lab, servers)) = lab()? else { return Ok(()) };
    for to in both(1) {
        assert!(probe::tcp(&lab.client, to)?.at_once());
        assert!(probe::udp(&lab.client, to)?.at_once());
    }
    for to in both(UDP_PORT) {
        assert_eq!(probe::udp(&lab.client, to)?.error, None);
    }
    let load = Load::start(&lab.client, both(HTTP_PORT)[0], 2, u64::MAX);
    load.wait_requests(20)?;
    drop(servers);
    load.wait_requests(20)?;
    let report = load.stop()?;
    assert!(report.answers["b1"] >= 18 && !report.errors.is_empty(), "{report:?}");
    Ok(())
}
