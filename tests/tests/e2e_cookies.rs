//! Real connections that begin with SYN cookies.

use anyhow::Result;
use pointsman_tests::{
    lab::{
        Agent,
        manifest::{ECHO, HTTP},
        wait_for,
    },
    traffic::{
        bulk,
        client::{check_round_robin, connect, half_close, who_answers},
    },
    world::{World, both, web},
};

#[test]
fn connections_work() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let agent = Agent::start_with(&world.lab, &web(&[1, 2]), &["--syn-cookies", "always"])?;
    let status = agent.wait_ready()?;
    for to in both(&status, HTTP)? {
        check_round_robin(&who_answers(&world.lab.client, to, 20)?, 2)?;
    }
    for to in both(&status, ECHO)? {
        half_close(&connect(&world.lab.client, to)?, b"half")?;
        bulk::echo(&connect(&world.lab.client, to)?, 1 << 20, 1)?;
    }
    let drops = agent.cli(&["drops"])?;
    assert!(drops.contains("syn-cookie-sent") && !drops.contains("syn-cookie-invalid"), "{drops}");
    Ok(())
}

/// The server gets its connection although the client says nothing: it may be the one that speaks first.
#[test]
fn servers_may_speak_first() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let agent = Agent::start_with(&world.lab, &web(&[1]), &["--syn-cookies", "always"])?;
    let status = agent.wait_ready()?;
    for to in both(&status, ECHO)? {
        let before = world.servers[0].accepted();
        let _silent = connect(&world.lab.client, to)?;
        wait_for("the server's end of the connection", || {
            Ok((world.servers[0].accepted() > before).then_some(()))
        })?;
    }
    Ok(())
}
