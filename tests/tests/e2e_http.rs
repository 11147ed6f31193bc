//! Metrics, probes and health checks of other load balancers, asked over TCP.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use pointsman_tests::{
    lab::{
        Agent, Lab, Namespace,
        agent::{list, wait_for},
        is_proxied,
        manifest::{HTTP, vip},
    },
    traffic::client::who_answers,
    world::{World, web},
};

/// Inside the edge's own namespace every port is free.
const METRICS: u16 = 9404;
/// A `healthCheckNodePort`.
const HEALTH: u16 = 32_100;

/// Status and text of an answer; nothing while nobody listens.
fn get(edge: &Namespace, port: u16, path: &str) -> Result<Option<(u16, String)>> {
    edge.enter(|| {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let Ok(mut stream) = TcpStream::connect(address) else { return Ok(None) };
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
        let mut text = String::new();
        match stream.read_to_string(&mut text) {
            // It was closed before our connection was taken.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
            read => read.with_context(|| format!("reading {path}"))?,
        };
        let status = text.split(' ').nth(1).and_then(|status| status.parse().ok());
        Ok(Some((status.with_context(|| format!("no status: {text}"))?, text)))
    })?
}

/// Values of all series whose line contains every one of `parts`, added up; nothing if there is none.
fn value(metrics: &str, parts: &[&str]) -> Option<f64> {
    let lines = metrics.lines().filter(|line| parts.iter().all(|part| line.contains(part)));
    let values = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    values.reduce(|sum, value| sum + value)
}

#[test]
fn metrics_tell_what_was_sent() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let flags = ["--http-address", "[::]:9404", "--metrics-per-backend"];
    let agent = Agent::start_with(&world.lab, &web(&[1, 2]), &flags)?;
    let status = agent.wait_ready()?;
    let edge = &world.lab.edge;
    for path in ["/healthz", "/readyz"] {
        let (code, text) = get(edge, METRICS, path)?.context("nobody listens")?;
        ensure!(code == 200, "{path}: {text}");
    }
    let to = vip(&status, "web", false, HTTP)?;
    who_answers(&world.lab.client, to, 10)?;

    let vip_label = format!("vip=\"{}\",port=\"80\"", to.ip());
    let metric = |text: &str, name: &str, more: &str| value(text, &[&format!("{name}{{"), &vip_label, more]);
    // The last packets of the connections may be on their way still.
    let text = wait_for("the metrics to be those of the map", || {
        let (_, text) = get(edge, METRICS, "/metrics")?.context("nobody listens")?;
        let status = agent.status()?;
        let services = list(&status, "services").iter();
        let mut ports = services.flat_map(|service| list(service, "ports"));
        let port = ports.find(|port| port["vip"] == to.ip().to_string() && port["port"] == 80);
        let counters = &port.context("no such port")?["counters"];
        let bytes = [("bytesIn", "bytes", "in"), ("bytesOut", "bytes", "out")];
        let packets = [("packetsIn", "packets", "in"), ("packetsOut", "packets", "out")];
        // The proxy sees no packets.
        let packets = if is_proxied() { [].as_slice() } else { &packets };
        let same = bytes.iter().chain(packets).all(|(field, name, direction)| {
            let name = format!("pointsman_service_{name}_total");
            metric(&text, &name, &format!("direction=\"{direction}\"")) == counters[*field].as_f64()
        });
        Ok(same.then_some(text))
    })?;
    assert_eq!(metric(&text, "pointsman_service_new_flows_total", ""), Some(10.0), "{text}");
    assert_eq!(metric(&text, "pointsman_service_refused_total", ""), Some(0.0));
    let of_backends = metric(&text, "pointsman_backend_new_flows_total", "");
    assert_eq!(of_backends, Some(10.0), "{text}");
    for n in [1, 2] {
        let backend = format!("backend=\"{}:", Lab::backend_address(n, false));
        assert_eq!(metric(&text, "pointsman_backend_new_flows_total", &backend), Some(5.0), "{text}");
    }
    for (series, wanted) in [
        ("pointsman_services{state=\"active\"}", 1.0),
        ("pointsman_vips ", 2.0),
        ("pointsman_vips_placed ", 2.0),
        ("pointsman_pool_assigned_addresses{pool=\"lab\"}", 2.0),
        ("pointsman_pool_addresses{pool=\"lab\"}", 16.0 + 256.0),
        // Three ports of two VIPs, by two backends.
        ("pointsman_backends{state=\"active\"}", 12.0),
        ("pointsman_problems{area=", 0.0),
        ("pointsman_device_info{device=\"uplink\"", 1.0),
        ("pointsman_source_synced ", 1.0),
        ("pointsman_resync_repairs_total ", 0.0),
    ] {
        assert_eq!(value(&text, &[series]), Some(wanted), "{series}:\n{text}");
    }
    // The proxy needs no maps.
    let entries = value(&text, &["pointsman_map_entries{map=\"services\"}"]);
    assert_eq!(entries, (!is_proxied()).then_some(6.0), "{text}");
    for series in ["pointsman_source_updates_total ", "pointsman_update_apply_seconds_count "] {
        assert!(value(&text, &[series]) >= Some(1.0), "{series}:\n{text}");
    }
    assert!(text.ends_with("# EOF\n"), "{text}");
    Ok(())
}

/// The Service `web` with these backends, all of them on the node `edge-1`, and only those of a node
/// serve there.
fn local(backends: &[u8]) -> String {
    let policy =
        format!("type: LoadBalancer\n  externalTrafficPolicy: Local\n  healthCheckNodePort: {HEALTH}");
    web(backends)
        .replace("type: LoadBalancer", &policy)
        .replace("  conditions:", "  nodeName: edge-1\n  conditions:")
}

#[test]
fn health_checks_follow_local_endpoints() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let agent = Agent::start_with(&world.lab, &local(&[1]), &["--node-name", "edge-1"])?;
    let edge = &world.lab.edge;
    let answers = |wanted: Option<u16>| {
        wait_for(&format!("{wanted:?} at the health check port"), || {
            let answer = get(edge, HEALTH, "/healthz")?;
            Ok((answer.as_ref().map(|(code, _)| *code) == wanted).then_some(answer))
        })
        .with_context(|| agent.log())
    };
    let (_, text) = answers(Some(200))?.context("an answer")?;
    ensure!(text.contains("\"name\":\"web\"") && text.contains("\"localEndpoints\":1"), "{text}");
    agent.write_config(&local(&[]))?;
    answers(Some(503))?;
    agent.write_config(&local(&[1]))?;
    answers(Some(200))?;
    agent.write_config(&local(&[1]).replace("nodeName: edge-1", "nodeName: edge-2"))?;
    answers(Some(503))?;
    agent.write_config(&web(&[1]))?;
    answers(None)?;
    Ok(())
}
