//! The userspace proxy under strain: many connections, floods, slow readers, a link that fails, and its own
//! end while clients are busy.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use pointsman_tests::{
    lab::{
        Agent,
        agent::wait_for,
        manifest::{ECHO, HTTP},
    },
    traffic::{
        client::{connect, who_answers},
        flood::Flood,
        herd::Herd,
        load::Load,
        ping_pong::PingPong,
    },
    world::{World, both, web},
};
use serde_json::Value;

const PROXY: &[&str] = &["--datapath", "proxy"];
/// Connections that stay: two file descriptors each are well below the usual hard limit of 20,000.
const MANY: usize = 5_000;
/// What a connection may cost the agent, in bytes; the kernel's sockets not counted.
const EACH: usize = 8 * 1024;

fn start<'lab>(world: &'lab World, flags: &[&str]) -> Result<(Agent<'lab>, Value)> {
    let agent = Agent::start_with(&world.lab, &web(&[1, 2]), &[PROXY, flags].concat())?;
    let status = agent.wait_ready()?;
    Ok((agent, status))
}

/// Bytes of memory that a process has of its own.
fn resident(agent: &Agent<'_>) -> Result<usize> {
    let id = agent.process_id().context("the agent does not run")?;
    let text = fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<usize>()? * 1024)
}

#[test]
fn thousands_of_connections_stay() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let (agent, status) = start(&world, &[])?;
    let ([http, _], [echo, _]) = (both(&status, HTTP)?, both(&status, ECHO)?);
    who_answers(&world.lab.client, http, 10)?;
    let before = resident(&agent)?;
    let mut herd = Herd::start(&world.lab.client, echo, MANY)?;
    let grown = resident(&agent)?.saturating_sub(before);
    assert!(grown < MANY * EACH, "{} bytes for each connection", grown / MANY);
    let load = Load::start(&world.lab.client, http, 2, 500).finish()?;
    assert!(load.errors.is_empty(), "{load:?}");
    herd.wait_round()?;
    herd.finish()?;
    Ok(())
}

/// Clients that never go on after their SYN.
#[test]
fn half_open_connections_stop_nobody() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    world.lab.queue_frames()?;
    let (_agent, status) = start(&world, &[])?;
    let ([http, _], [echo, _]) = (both(&status, HTTP)?, both(&status, ECHO)?);
    let mut herd = Herd::start(&world.lab.client, echo, 100)?;
    let flood = Flood::start(&world.lab, http)?;
    // More than the queue of those that connect has room for (`tcp_max_syn_backlog`, at most 4,096).
    wait_for("a flood", || Ok((flood.sent() > 10_000).then_some(())))?;
    let load = Load::start(&world.lab.client, http, 2, 50).finish()?;
    assert!(load.errors.is_empty(), "{load:?}");
    herd.wait_round()?;
    herd.finish()?;
    assert!(flood.stop()? > 10_000);
    Ok(())
}

#[test]
fn connections_outlive_a_link_that_is_down() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let (_agent, status) = start(&world, &[])?;
    let ([http, _], [echo, _]) = (both(&status, HTTP)?, both(&status, ECHO)?);
    let mut streams = [connect(&world.lab.client, echo)?, connect(&world.lab.client, echo)?];
    for stream in &mut streams {
        exchange(stream)?;
    }
    world.lab.edge.run(["ip", "link", "set", "lan", "down"])?;
    for stream in &mut streams {
        stream.set_read_timeout(Some(Duration::from_millis(100)))?;
        stream.write_all(b"ping")?;
        let error = stream.read(&mut [0]).expect_err("no way leads to the backend");
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
    }
    world.lab.edge.run(["ip", "link", "set", "lan", "up"])?;
    for stream in &mut streams {
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer)?;
        assert_eq!(answer, *b"ping");
        exchange(stream)?;
    }
    who_answers(&world.lab.client, http, 4)?;
    Ok(())
}

#[test]
fn slow_readers_stop_nobody() -> Result<()> {
    const BODY: usize = 24 << 20;
    let Some(world) = World::new(2)? else { return Ok(()) };
    // Less than they make it wait with, were it not for the bound.
    let (agent, status) = start(&world, &["--proxy-max-buffers", "4"])?;
    let ([http, _], [echo, _]) = (both(&status, HTTP)?, both(&status, ECHO)?);
    let before = resident(&agent)?;
    let mut slow = Vec::new();
    for _ in 0..8 {
        let mut stream = connect(&world.lab.client, http)?;
        stream.write_all(format!("GET /bytes/{BODY} HTTP/1.1\r\nConnection: close\r\n\r\n").as_bytes())?;
        // It has begun.
        stream.peek(&mut [0])?;
        slow.push(stream);
    }
    let flows = PingPong::start(&world.lab.client, echo, 4)?;
    let load = Load::start(&world.lab.client, http, 2, 300).finish()?;
    assert!(load.errors.is_empty(), "{load:?}");
    flows.wait_exchanges(50)?;
    assert!(flows.stop()?.broken.is_empty());
    let grown = resident(&agent)?.saturating_sub(before);
    assert!(grown < 16 << 20, "it has grown by {grown} bytes");
    for mut stream in slow {
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        assert!(answer.len() > BODY, "{} bytes", answer.len());
    }
    Ok(())
}

#[test]
fn its_end_under_load_breaks_nothing_before_the_deadline() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let (mut agent, status) = start(&world, &["--drain-seconds", "600"])?;
    let ([http, _], [echo, _]) = (both(&status, HTTP)?, both(&status, ECHO)?);
    let load = Load::start(&world.lab.client, http, 2, u64::MAX);
    let flows = PingPong::start(&world.lab.client, echo, 4)?;
    load.wait_requests(100)?;
    agent.ask_to_end()?;
    agent.wait_log("serving until the proxy's connections have ended")?;
    load.wait_requests(100)?;
    flows.wait_exchanges(50)?;
    let report = load.stop()?;
    assert!(report.errors.is_empty() && report.answers.len() == 2, "{report:?}");
    assert!(agent.status().is_ok(), "it waits");
    let report = flows.stop()?;
    assert!(report.broken.is_empty(), "{report:?}");
    assert!(agent.ended()?.success());
    Ok(())
}

#[test]
fn after_a_restart_under_load_all_is_well() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let (mut agent, status) = start(&world, &[])?;
    let [http, _] = both(&status, HTTP)?;
    let load = Load::start(&world.lab.client, http, 2, u64::MAX);
    for _ in 0..2 {
        load.wait_requests(100)?;
        agent.restart()?;
        agent.wait_ready()?;
    }
    load.wait_requests(100)?;
    load.stop()?;
    let report = Load::start(&world.lab.client, http, 2, 500).finish()?;
    assert!(report.errors.is_empty() && report.answers.len() == 2, "{report:?}");
    Ok(())
}

fn exchange(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(b"ping")?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)?;
    ensure!(answer == *b"ping", "{answer:?}");
    Ok(())
}
