//! Floods: what begins does not push out what is there, in the tables of the programs. SYNs to a proxy's
//! listener are the node's own kernel's to bear.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pointsman_tests::{
    lab::{
        Agent,
        agent::list,
        in_kernel,
        manifest::{ECHO, HTTP, Port, ServiceSpec, manifest},
    },
    traffic::{flood::Flood, herd::Herd},
    world::{World, both, web},
};
use serde_json::Value;

/// SYNs that have to arrive, if others than those that go round the table of beginning flows more than twice.
const PACKETS_ENV: &str = "POINTSMAN_TEST_FLOOD";
/// Room for more than the connections that stay; as many again can begin.
const MAX_FLOWS: &str = "16384";
/// How long a flood may take to arrive, on a busy machine; longer if more is asked for.
const PATIENCE: Duration = Duration::from_secs(180);

/// New flows to a port of the Service `web`, both families or one.
fn counted(agent: &Agent<'_>, port: Port, v6: bool, counter: &str) -> Result<u64> {
    let status: Value = agent.status()?;
    let ports = list(&status, "services").iter().flat_map(|service| list(service, "ports"));
    let mut of_port = ports.filter(|view| {
        view["port"].as_u64() == Some(port.port.into())
            && view["vip"].as_str().is_some_and(|vip| vip.contains(':') == v6)
    });
    of_port.next().context("no such port")?["counters"][counter].as_u64().context("no such counter")
}

/// Opens connections, and floods another port of the same Service meanwhile: each connection
/// answers all along, and none is reset.
fn survives(v6: bool, connections: usize, packets: u64) -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let asked = std::env::var(PACKETS_ENV).ok().map(|packets| packets.parse()).transpose()?;
    let (packets, patience) = asked.map_or((packets, PATIENCE), |packets| (packets, 10 * PATIENCE));
    for backend in &world.lab.backends {
        // What is flooded here is the load balancer: backends with a full queue say nothing.
        backend.sysctl("net/ipv4/tcp_syncookies", "0")?;
    }
    world.lab.queue_frames()?;
    let flags = [["--max-flows", MAX_FLOWS].as_slice(), in_kernel()].concat();
    let agent = Agent::start_with(&world.lab, &web(&[1, 2]), &flags)?;
    let status = agent.wait_ready()?;
    let start = Instant::now();
    let mut herd = Herd::start(&world.lab.client, both(&status, ECHO)?[usize::from(v6)], connections)?;
    println!("{connections} connections after {:?}", start.elapsed());
    let flood = Flood::start(&world.lab, both(&status, HTTP)?[usize::from(v6)])?;
    let begin = Instant::now();
    let mut rounds = 0;
    let arrived = loop {
        herd.wait_round()?;
        rounds += 1;
        let arrived = counted(&agent, HTTP, v6, "newFlows")?;
        if arrived >= packets {
            break arrived;
        }
        if begin.elapsed() > patience {
            bail!("only {arrived} SYNs of {} have arrived in {patience:?}", flood.sent());
        }
    };
    let took = begin.elapsed();
    let sent = flood.stop()?;
    rounds += herd.finish()?;
    println!(
        "{arrived} SYNs of {sent} in {took:.1?}, {:.0} in a second; {rounds} rounds of {connections} exchanges",
        arrived as f64 / took.as_secs_f64()
    );
    // A connection that was forgotten would have been begun anew, or refused.
    assert_eq!(counted(&agent, ECHO, v6, "newFlows")?, connections as u64);
    assert_eq!(counted(&agent, ECHO, v6, "refused")?, 0);
    Ok(())
}

#[test]
fn ten_thousand_connections_outlive_a_flood() -> Result<()> {
    survives(false, 10_000, 40_000)
}

#[test]
fn ipv6_connections_outlive_a_flood() -> Result<()> {
    survives(true, 2_000, 20_000)
}

/// A client above its limit gets no answer, others do, and connections that are there go on.
#[test]
fn a_client_above_its_limit_waits() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let service =
        ServiceSpec::new("web", &[HTTP, ECHO], &[1]).annotated("pointsman.dev/connection-rate-limit", "1/20");
    let agent = Agent::start_with(&world.lab, &manifest(&[service]), in_kernel())?;
    let status = agent.wait_ready()?;
    for (v6, to) in [false, true].into_iter().zip(both(&status, ECHO)?) {
        let mut herd = Herd::start(&world.lab.client, to, 15)?;
        let flood = Flood::start(&world.lab, to)?;
        herd.wait_round()?;
        // Its network is one client with IPv6, and many with IPv4.
        let begin = Instant::now();
        let wanted = if v6 { "refused" } else { "newFlows" };
        while counted(&agent, ECHO, v6, wanted)? < 1_000 {
            herd.wait_round()?;
            if begin.elapsed() > PATIENCE {
                bail!("{wanted} does not grow; {} sent", flood.sent());
            }
        }
        flood.stop()?;
        herd.finish()?;
    }
    let drops = agent.cli(&["drops"])?;
    assert!(drops.contains("connection-rate"), "{drops}");
    Ok(())
}
