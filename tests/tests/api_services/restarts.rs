//! What an agent that dies leaves as it was.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use pointsman_tests::{lab::is_proxied, traffic::ping_pong::PingPong};
use serde_json::json;

use super::kit::{ECHO, HTTP, POOL, addresses, ask, cluster, eventually, serve, service, slices};

/// `kill -9`, changes meanwhile, and a new agent: no address changes, no connection breaks. Those of the
/// proxy end with it.
#[test]
fn a_killed_agent_is_not_missed() -> Result<()> {
    cluster(2, |world, agent| {
        world.pool(&POOL)?;
        // Against the order of names, so that a fresh allocation would give others.
        let names = ["e", "d", "c", "b", "a"];
        let mut before = Vec::new();
        for name in names {
            serve(world, name, &[HTTP, ECHO], &json!({}), &[1, 2])?;
            before.push(addresses(world, name, 2)?);
        }
        let lasting = if is_proxied() { &[] } else { before.as_slice() };
        let flows: Vec<PingPong> = lasting
            .iter()
            .flatten()
            .map(|vip| PingPong::start(&world.lab.client, SocketAddr::new(*vip, ECHO.2), 1))
            .collect::<Result<_>>()?;
        for _ in 0..2 {
            agent.kill();
            for flow in &flows {
                flow.wait_exchanges(10)?;
            }
            if !is_proxied() {
                ask(world, SocketAddr::new(before[0][0], 80))?;
            }
            // Happens while nobody looks.
            slices(world, "e", &[HTTP, ECHO], &[(1, json!({})), (2, json!({}))])?;
            service(world, "0", &[HTTP], &json!({}), &json!({}))?;
            agent.run()?;
            agent.wait_status("all Services", |status| {
                status["services"].as_array().is_some_and(|all| all.len() == names.len() + 1)
            })?;
            addresses(world, "0", 2)?;
            for (name, before) in names.iter().zip(&before) {
                ensure!(addresses(world, name, 2)? == *before, "{name} had {before:?}");
                eventually("an answer", || ask(world, SocketAddr::new(before[0], 80)).map(drop))?;
            }
            world.delete("Service", "0")?;
            eventually("the Service to go", || {
                ensure!(world.get("Service", "0")?.is_none(), "it is there");
                Ok(())
            })?;
            for flow in &flows {
                flow.wait_exchanges(10)?;
            }
        }
        for flow in flows {
            let report = flow.stop()?;
            ensure!(report.broken.is_empty(), "{report:?}");
        }
        Ok(())
    })
}
