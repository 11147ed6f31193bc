//! Whole agents whose API server, or whose neighbours there, do not behave. With the double only.

#[path = "api_faults_agent/watch.rs"]
mod watch;

#[path = "api_faults_agent/neighbours.rs"]
mod neighbours;
#[path = "api_faults_agent/rights.rs"]
mod rights;

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use pointsman_tests::{
    apiserver::{ApiServer, Effect, FaultHandle, Filter, Request, Verb, cluster::is_real},
    cluster_world::ClusterWorld,
    lab::{Agent, is_proxied, wait_for},
    traffic::{client::http_name, load::Load},
};
use serde_json::{Value, json};
use watch::AddressWatch;

const POOL: [&str; 2] = ["192.0.2.0/28", "2001:db8:1::/124"];

/// Nothing with a real cluster: it cannot be told to fail.
fn world(backends: u8) -> Result<Option<ClusterWorld>> {
    if is_real() {
        return Ok(None);
    }
    let Some(world) = ClusterWorld::new(backends)? else { return Ok(None) };
    world.pool(&POOL)?;
    Ok(Some(world))
}

fn double(world: &ClusterWorld) -> Result<&ApiServer> {
    world.cluster.double().context("a real cluster")
}

fn faults(world: &ClusterWorld) -> Result<FaultHandle<'_>> {
    Ok(double(world)?.faults())
}

fn ask(world: &ClusterWorld, vip: SocketAddr) -> Result<String> {
    Ok(world.lab.client.enter(|| http_name(vip))??)
}

/// Requests that change something, but for renewals of Leases.
fn writes(world: &ClusterWorld) -> Result<Vec<Request>> {
    let is_read = |verb| matches!(verb, Verb::Get | Verb::List | Verb::Watch);
    let all = double(world)?.requests().into_iter();
    Ok(all
        .filter(|it| it.user_agent.starts_with("pointsman/") && !is_read(it.verb) && it.resource != "leases")
        .collect())
}

fn problems(status: &Value) -> String {
    status["agent"]["problems"].to_string() + &status["problems"].to_string()
}

/// Waits until the agent says what is wrong, in its status.
fn wait_problem(agent: &Agent<'_>, text: &str) -> Result<()> {
    agent.wait_status(text, |status| problems(status).contains(text)).map(drop)
}

#[test]
fn the_api_server_may_be_away() -> Result<()> {
    let Some(world) = world(2)? else { return Ok(()) };
    let mut agent = world.agent(&[])?;
    world.service("web", &json!({}), &[1])?;
    let vips = world.published("web", 2)?;
    let first = ask(&world, vips[0])?;
    let addresses = AddressWatch::start(&world)?;
    let load = Load::start(&world.lab.client, vips[0], 1, u64::MAX);
    world.relay.cut(true);
    // What happens meanwhile is seen later.
    world.endpoints("web", &[1, 2])?;
    load.wait_requests(200)?;
    ensure!(ask(&world, vips[0])? == first, "the endpoints that are known stay");
    // Without the API server, and without pins, another agent knows of nothing to serve.
    if !is_proxied() {
        agent.restart()?;
    }
    wait_problem(&agent, "API server")?;
    load.wait_requests(200)?;
    ensure!(ask(&world, vips[1])? == first, "the endpoints that are known stay");
    world.relay.cut(false);
    wait_for("the other backend", || Ok((ask(&world, vips[0])? != first).then_some(())))?;
    agent.wait_status("no problems", |status| !problems(status).contains("API server"))?;
    load.wait_requests(50)?;
    let report = load.stop()?;
    ensure!(report.errors.is_empty(), "{report:?}");
    ensure!(world.published("web", 2)? == vips, "nothing is renumbered");
    addresses.none_left()
}

#[test]
fn a_new_list_is_no_flap() -> Result<()> {
    let Some(world) = world(3)? else { return Ok(()) };
    let agent = world.agent(&[])?;
    world.service("web", &json!({}), &[1])?;
    let vips = world.published("web", 2)?;
    let mut seen = vec![ask(&world, vips[0])?];
    let addresses = AddressWatch::start(&world)?;
    let load = Load::start(&world.lab.client, vips[0], 1, u64::MAX);
    for (epoch, backends) in [(None, &[1, 2][..]), (Some(100_000), &[1, 2, 3])] {
        double(&world)?.forget_requests();
        match epoch {
            None => {
                faults(&world)?.compact();
                faults(&world)?.close_watches(Filter::default());
            }
            Some(by) => faults(&world)?.new_epoch(by),
        }
        wait_for("new watches", || {
            let all = double(&world)?.requests();
            let again = |kind: &str| all.iter().any(|it| it.resource == kind && it.verb == Verb::Watch);
            Ok(["services", "endpointslices", "virtualips"].into_iter().all(again).then_some(()))
        })?;
        load.wait_requests(50)?;
        ensure!(writes(&world)?.is_empty(), "{:#?}", writes(&world)?);
        // What changes is followed again. Backends only come: one that went would reset a request.
        world.endpoints("web", backends)?;
        let followed = wait_for("another backend", || {
            Ok(Some(ask(&world, vips[0])?).filter(|answer| !seen.contains(answer)))
        });
        seen.push(followed.with_context(|| format!("epoch {epoch:?}\n{}", agent.log()))?);
    }
    let report = load.stop()?;
    ensure!(report.errors.is_empty(), "{report:?}");
    ensure!(world.published("web", 2)? == vips, "nothing is renumbered");
    addresses.none_left()
}

#[test]
fn a_silent_watch_is_begun_anew() -> Result<()> {
    let Some(world) = world(2)? else { return Ok(()) };
    let _agent = world.agent(&["--watch-idle-seconds", "2"])?;
    world.service("web", &json!({}), &[1])?;
    let vips = world.published("web", 2)?;
    let first = ask(&world, vips[0])?;
    let silence = faults(&world)?.stall(Filter::of("watch", "endpointslices"));
    world.endpoints("web", &[2])?;
    double(&world)?.forget_requests();
    wait_for("a new watch", || {
        let all = double(&world)?.requests();
        Ok(all.iter().any(|it| it.resource == "endpointslices").then_some(()))
    })?;
    faults(&world)?.lift(silence);
    wait_for("the other backend", || Ok((ask(&world, vips[0])? != first).then_some(())))?;
    Ok(())
}

#[test]
fn addresses_are_given_out_through_errors() -> Result<()> {
    let Some(world) = world(1)? else { return Ok(()) };
    let _agent = world.agent(&[])?;
    let ours =
        |verb: &str, resource: &str| Filter { user: "pointsman/".into(), ..Filter::of(verb, resource) };
    let faults = faults(&world)?;
    faults.add(ours("", ""), Effect::Delay { milliseconds: 50 }, None);
    let mut set = Vec::new();
    for resource in ["virtualips", "services", "services/status", "virtualips/status"] {
        let verb = if resource == "virtualips" { "create" } else { "patch" };
        for (code, retry_after) in [(409, None), (500, None), (429, Some(1))] {
            set.push(faults.error(ours(verb, resource), code, retry_after, 1));
        }
        set.push(faults.add(ours(verb, resource), Effect::Drop, Some(1)));
        set.push(faults.add(ours(verb, resource), Effect::DropAfter, Some(1)));
    }
    world.service("web", &json!({}), &[1])?;
    world.service("dns", &json!({}), &[1])?;
    let mut all: Vec<_> = [world.published("web", 2)?, world.published("dns", 2)?].concat();
    for vip in &all {
        ask(&world, *vip)?;
    }
    ensure!(set.iter().all(|id| faults.left(*id) == 0), "each fault has struck");
    all.sort_unstable();
    all.dedup();
    ensure!(all.len() == 4, "{all:?}");
    ensure!(world.list("VirtualIP")?.len() == 4, "{:#?}", world.list("VirtualIP")?);
    Ok(())
}
