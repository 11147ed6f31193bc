//! The end of an installation, and the next one: whole agents that still run while `pointsman
//! cleanup` does its work, as a hook of Helm does before it deletes anything.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use aya::programs::{SchedClassifier, tc::TcAttachType};
use pointsman_tests::{
    cluster_world::{ClusterWorld, LEASE},
    lab::{Agent, Namespace, Options, POD, Seat, is_proxied, wait_for},
    traffic::client::{http_name, who_answers},
};
use serde_json::{Value, json};

const POOL: [&str; 1] = ["192.0.2.0/28"];
const LEADER: &str = "pointsman-controller";

/// Backends of both kinds: one behind the edge, and a pod on it, so that the program for replies is
/// attached too.
fn world() -> Result<Option<ClusterWorld>> {
    let Some(mut world) = ClusterWorld::with(Options { backends: 1, pods: 1, ..Options::default() })? else {
        return Ok(None);
    };
    world.add_node()?;
    world.pool(&POOL)?;
    Ok(Some(world))
}

/// Two Services with one IPv4 address each, served.
fn services(world: &ClusterWorld) -> Result<Vec<SocketAddr>> {
    let names = ["web1", "web2"];
    for name in names {
        let spec = json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"]});
        world.service(name, &spec, &[1, POD])?;
    }
    let published: Result<Vec<_>> = names.iter().map(|name| world.published(name, 1)).collect();
    Ok(published?.concat())
}

/// What an agent has put into the kernel of its node: the kind, and what it is.
fn traces(namespace: &Namespace, pins: &Path) -> Result<Vec<String>> {
    let lines = |kind: &str, command: &[&str], mark: &str| -> Result<Vec<String>> {
        let text = namespace.run(command.iter().copied())?;
        let found = text.lines().filter(|line| line.contains(mark));
        Ok(found.map(|line| format!("{kind}: {line}")).collect())
    };
    let mut traces = [
        lines("address", &["ip", "-o", "addr", "show", "dev", "uplink"], " 192.0.2.")?,
        lines("XDP", &["ip", "-o", "link", "show"], "prog/xdp")?,
        lines("TC", &["tc", "filter", "show", "dev", "uplink", "egress"], "pointsman")?,
        lines("listener", &["ss", "-Hltn"], " 192.0.2.")?,
    ]
    .concat();
    // Kernels before 6.6 have no such links.
    let links = namespace.enter(|| SchedClassifier::query_tcx("uplink", TcAttachType::Egress))?;
    let programs = links.map(|(_, programs)| programs).unwrap_or_default();
    traces.extend(programs.iter().map(|program| format!("TC: program {}", program.id())));
    if pins.exists() {
        traces.push(format!("pins: {}", pins.display()));
    }
    Ok(traces)
}

/// Programs, maps and links that a process keeps from going.
fn held(agent: &Agent<'_>) -> Result<Vec<String>> {
    let pid = agent.process_id().context("the agent does not run")?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    ensure!(!stat.contains(") Z "), "the agent has ended by itself");
    let mut held = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // It may be closed by now.
        let target = fs::read_link(entry?.path()).unwrap_or_default().display().to_string();
        held.extend(target.contains("bpf").then_some(target));
    }
    Ok(held)
}

fn all_traces(world: &ClusterWorld) -> Result<Vec<String>> {
    let seats: [Seat<'_>; 2] = [world.lab.seat(), world.others[0].edge.seat()];
    let traces: Result<Vec<_>> = seats.iter().map(|seat| traces(seat.namespace, &seat.pins)).collect();
    Ok(traces?.concat())
}

/// What the API server has of ours.
fn objects(world: &ClusterWorld) -> Result<Vec<String>> {
    let mut left = Vec::new();
    for kind in ["VirtualIP", "Lease"] {
        let names = world.list(kind)?.into_iter().map(|one| format!("{kind} {}", one["metadata"]["name"]));
        // It stays for a while, so that nobody leads who is started too early or too late.
        left.extend(names.filter(|name| *name != format!("Lease \"{LEADER}\"")));
    }
    for service in world.list("Service")? {
        let conditions = service["status"]["conditions"].as_array().is_some_and(|all| !all.is_empty());
        let ingress = !service["status"]["loadBalancer"]["ingress"].is_null();
        let finalizers = service["metadata"]["finalizers"].as_array().is_some_and(|all| !all.is_empty());
        if conditions || ingress || finalizers {
            left.push(format!("{service:#}"));
        }
    }
    Ok(left)
}

/// That nothing of ours is anywhere, although the agents run, and that it stays so.
fn nothing_is_left(world: &ClusterWorld, agents: &[&Agent<'_>]) -> Result<()> {
    // For longer than a leader takes to look for work: an agent that has not understood would be seen.
    for _ in 0..20 {
        let left = [all_traces(world)?, objects(world)?].concat();
        ensure!(left.is_empty(), "{left:#?}");
        thread::sleep(Duration::from_millis(150));
    }
    for agent in agents {
        let held = held(agent)?;
        ensure!(held.is_empty(), "{held:?}");
    }
    Ok(())
}

fn uninstalled_and_installed_again(flags: &[&str]) -> Result<()> {
    let Some(world) = world()? else { return Ok(()) };
    let mut agent = world.agent(flags)?;
    let mut other = world.other_agent(0, flags)?;
    wait_for("two agents", || Ok((world.list("Lease")?.len() == 3).then_some(())))?;
    let vips = services(&world)?;
    wait_for("an address on each node", || {
        let nodes = world.list("VirtualIP")?;
        let nodes: BTreeSet<_> =
            nodes.iter().filter_map(|vip| vip["status"]["node"].as_str().map(str::to_owned)).collect();
        Ok((nodes.len() == 2).then_some(()))
    })?;
    let before = all_traces(&world)?;
    let programs = [("XDP", 2), ("TC", 1), ("pins", 2)];
    let of_path = if is_proxied() { [("listener", 2)].as_slice() } else { &programs };
    for (kind, count) in of_path.iter().copied().chain([("address", 2)]) {
        let found = before.iter().filter(|trace| trace.starts_with(kind)).count();
        ensure!(found >= count, "{found} of {kind}: this test would see nothing go: {before:#?}");
    }
    ensure!(held(&agent)?.is_empty() == is_proxied() && !objects(&world)?.is_empty());

    let said = world.clean_up()?;
    ensure!(said.contains("freed 2 Services; deleted 2 VirtualIPs and the Leases of 2 agents"), "{said}");
    ensure!(!said.contains("did not say"), "{said}");
    nothing_is_left(&world, &[&agent, &other])?;
    let again = world.clean_up()?;
    ensure!(again.contains("freed 0 Services; deleted 0 VirtualIPs and the Leases of 0 agents"), "{again}");

    // Then the agents are ended; what was kept before is not there to be kept.
    for agent in [&mut agent, &mut other] {
        ensure!(agent.sigterm()?.success(), "{}", agent.log());
    }
    nothing_is_left(&world, &[])?;

    // The next installation waits for what the leader's Lease asks, and no longer.
    let started = Instant::now();
    agent.run()?;
    for (name, vip) in ["web1", "web2"].iter().zip(vips) {
        ensure!(world.published(name, 1)? == [vip], "the lowest free addresses again");
        world.lab.client.enter(|| http_name(vip))??;
    }
    ensure!(started.elapsed() < LEASE + LEASE / 2, "{:?}", started.elapsed());
    let names = who_answers(&world.lab.client, world.published("web1", 1)?[0], 4)?;
    ensure!(names.contains(&"p1".to_owned()) && names.contains(&"b1".to_owned()), "{names:?}");
    Ok(())
}

#[test]
fn nothing_is_left_while_the_agents_still_run() -> Result<()> {
    uninstalled_and_installed_again(&[])
}

/// What is left for the next agent in an update is not left by an uninstallation.
#[test]
fn nothing_is_left_by_agents_that_keep() -> Result<()> {
    uninstalled_and_installed_again(&["--on-exit=keep"])
}

/// An agent that is started while the cluster is cleaned up is meant as well; the leader's Lease tells.
#[test]
fn one_that_is_restarted_meanwhile_lets_go_too() -> Result<()> {
    let Some(world) = world()? else { return Ok(()) };
    let mut agent = world.agent(&["--on-exit=keep"])?;
    services(&world)?;
    // Its Lease is still good, so it is waited for.
    agent.kill();
    let said = thread::scope(|scope| -> Result<String> {
        let cleanup = scope.spawn(|| world.clean_up());
        let is_asked = |lease: Option<&Value>| {
            lease.is_some_and(|lease| lease["metadata"]["annotations"]["pointsman.dev/uninstall"] == "true")
        };
        world.wait("the agents to be asked", ("Lease", LEADER), is_asked)?;
        agent.run()?;
        cleanup.join().map_err(|_| anyhow::anyhow!("it panicked"))?
    })?;
    ensure!(said.contains("the Leases of 1 agents") && !said.contains("did not say"), "{said}");
    nothing_is_left(&world, &[&agent])
}

/// An agent that the API server cannot be reached from is not waited for longer than its Lease lasts,
/// and lets go when it hears of it.
#[test]
fn one_that_is_cut_off_is_named_and_lets_go_later() -> Result<()> {
    let Some(world) = world()? else { return Ok(()) };
    let agent = world.agent(&[])?;
    let vips = services(&world)?;
    world.relay.cut(true);
    let said = world.clean_up()?;
    ensure!(
        said.contains(&format!(
            "did not say that they have let go of their addresses and programs: {}",
            world.node
        )),
        "{said}"
    );
    ensure!(objects(&world)?.is_empty(), "{:#?}", objects(&world)?);
    world.lab.client.enter(|| http_name(vips[0]))??;
    world.relay.cut(false);
    wait_for("the agent to let go", || {
        let left = [all_traces(&world)?, objects(&world)?].concat();
        Ok(left.is_empty().then_some(()))
    })?;
    ensure!(world.clean_up()?.contains("the Leases of 0 agents"));
    nothing_is_left(&world, &[&agent])
}
