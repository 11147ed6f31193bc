//! Backends that see the client's address, with the rules of routing that docs/proxy.md lists.

use anyhow::{Context, Result};
use pointsman_tests::{
    lab::{
        Agent,
        manifest::{ECHO, HTTP, ServiceSpec, manifest},
    },
    traffic::{
        bulk,
        client::{check_round_robin, connect, half_close, http_get, who_answers},
    },
    world::{World, both},
};

const DOCUMENT: &str = include_str!("../../docs/proxy.md");

/// The commands of the document's chapter.
fn commands() -> Result<&'static str> {
    let (_, chapter) = DOCUMENT.split_once("\n## Transparent\n").context("no such chapter")?;
    let (_, block) = chapter.split_once("\n```\n").context("no commands")?;
    Ok(block.split_once("\n```").context("they have no end")?.0)
}

fn see_the_client(flags: &[&str]) -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let service = ServiceSpec::new("web", &[HTTP, ECHO], &[1, 2])
        .annotated("pointsman.dev/client-address", "transparent");
    let agent = Agent::start_with(&world.lab, &manifest(&[service]), flags)?;
    let status = agent.wait_ready()?;
    world.lab.edge.run(["sh", "-ec", commands()?])?;
    let client = &world.lab.client;
    for (to, address) in both(&status, HTTP)?.into_iter().zip(["10.1.0.2:", "[fd01::2]:"]) {
        let seen = client.enter(|| http_get(to, "/peer"))??;
        let seen = String::from_utf8(seen)?;
        assert!(seen.starts_with(address), "{seen}");
        check_round_robin(&who_answers(client, to, 10)?, 2)?;
    }
    for to in both(&status, ECHO)? {
        half_close(&connect(client, to)?, b"half")?;
        bulk::echo(&connect(client, to)?, 8 << 20, 1)?;
    }
    Ok(())
}

#[test]
fn by_a_proxy_for_everything() -> Result<()> {
    see_the_client(&["--datapath", "proxy"])
}

/// Programs are on the devices that the answers come by, and leave them to the proxy.
#[test]
fn by_a_proxy_beside_the_kernel() -> Result<()> {
    see_the_client(&["--datapath", "auto"])
}
