//! Real connections that begin with SYN cookies, which are the programs' own: a proxy's listener has those of
//! the node's kernel.

use anyhow::{Context, Result};
use pointsman_tests::{
    lab::{
        Agent,
        agent::list,
        in_kernel,
        manifest::{ECHO, HTTP},
        wait_for,
    },
    traffic::{
        bulk,
        client::{check_round_robin, connect, half_close, who_answers},
        flood::Flood,
        herd::Herd,
    },
    world::{World, both, web},
};
use serde_json::Value;

fn agent<'lab>(world: &'lab World, backends: &[u8], flags: &[&str]) -> Result<Agent<'lab>> {
    Agent::start_with(&world.lab, &web(backends), &[flags, in_kernel()].concat())
}

#[test]
fn connections_work() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let agent = agent(&world, &[1, 2], &["--syn-cookies", "always"])?;
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
    let agent = agent(&world, &[1], &["--syn-cookies", "always"])?;
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

/// SYNs that were answered with a cookie.
fn given_out(agent: &Agent<'_>) -> Result<u64> {
    let drops: Value = serde_json::from_str(&agent.cli(&["drops", "-o", "json"])?)?;
    let mut all = list(&drops, "drops").iter();
    let found = all.find(|drop| drop["name"] == "syn-cookie-sent").context("no such reason")?;
    found["packets"].as_u64().context("no such counter")
}

/// What is there goes on, what comes is served, and the flood leaves nothing behind.
#[test]
fn a_flood_leaves_nothing_behind() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    world.lab.queue_frames()?;
    let agent = agent(&world, &[1, 2], &["--syn-cookies", "always"])?;
    let status = agent.wait_ready()?;
    for (to, echo) in both(&status, HTTP)?.into_iter().zip(both(&status, ECHO)?) {
        let mut herd = Herd::start(&world.lab.client, echo, 500)?;
        let before = given_out(&agent)?;
        let flood = Flood::start(&world.lab, to)?;
        let given = wait_for("the flood to arrive", || {
            herd.wait_round()?;
            check_round_robin(&who_answers(&world.lab.client, to, 10)?, 2)?;
            half_close(&connect(&world.lab.client, echo)?, b"new")?;
            Ok(Some(given_out(&agent)? - before).filter(|given| *given > 20_000))
        })?;
        flood.stop()?;
        herd.finish()?;
        let flows: Value = serde_json::from_str(&agent.cli(&["flows", "-o", "json"])?)?;
        let begun = list(&flows, "flows").iter().filter(|flow| flow["state"] == "syn-sent").count();
        assert!(begun < 100, "{begun} flows of {given} SYNs");
    }
    Ok(())
}

/// Left to the agent, cookies are in use while there is a flood. What began before, meanwhile and after goes on.
/// The SYNs that came before cookies are in the backends' queues for seconds, so backends need the cookies that
/// their kernels have by default: without them, a new client would wait for room there (probes of its window
/// come at twice the distance each time).
#[test]
fn auto_answers_a_flood_and_no_longer() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    world.lab.queue_frames()?;
    let agent = agent(&world, &[1, 2], &["--syn-cookies", "auto", "--max-flows", "16384"])?;
    let status = agent.wait_ready()?;
    assert_eq!(status["synCookies"], Value::Null);
    let ([to, _], [echo, _]) = (both(&status, HTTP)?, both(&status, ECHO)?);
    let mut herd = Herd::start(&world.lab.client, echo, 500)?;
    let flood = Flood::start(&world.lab, to)?;
    let status = agent.wait_status("cookies", |status| status["synCookies"] == "answer")?;
    println!("answered after {} SYNs", flood.sent());
    let problems = list(&status, "problems").iter().map(|problem| problem["message"].as_str());
    assert!(problems.flatten().any(|message| message.contains("flood of SYNs")), "{status}");
    let meanwhile = connect(&world.lab.client, echo)?;
    let before = given_out(&agent)?;
    wait_for("more of the flood", || {
        herd.wait_round()?;
        check_round_robin(&who_answers(&world.lab.client, to, 10)?, 2)?;
        Ok((given_out(&agent)? > before + 10_000).then_some(()))
    })?;
    flood.stop()?;
    let status = agent.wait_status("the end", |status| status["synCookies"] == "accept")?;
    assert!(list(&status, "problems").is_empty(), "{status}");
    let given = given_out(&agent)?;
    half_close(&meanwhile, b"began with a cookie")?;
    check_round_robin(&who_answers(&world.lab.client, to, 10)?, 2)?;
    herd.finish()?;
    assert_eq!(given_out(&agent)?, given, "connections begin the usual way again");
    Ok(())
}
