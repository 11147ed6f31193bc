//! Several agents in a cluster: who leads, and who announces what. Also against a real cluster.

use std::{collections::BTreeSet, net::SocketAddr};

use anyhow::{Context, Result, ensure};
use pointsman_tests::{
    cluster_world::{ClusterWorld, ingress},
    lab::wait_for,
    traffic::client::http_name,
};
use serde_json::{Value, json};

const POOL: [&str; 1] = ["192.0.2.0/28"];
const LEADER: &str = "pointsman-controller";
const EXCLUDED: &str = "node.kubernetes.io/exclude-from-external-load-balancers";

fn world() -> Result<Option<ClusterWorld>> {
    let Some(mut world) = ClusterWorld::new(1)? else { return Ok(None) };
    world.add_node()?;
    world.pool(&POOL)?;
    Ok(Some(world))
}

/// Services `web1`, `web2`, … with one IPv4 address each, all published.
fn services(world: &ClusterWorld, count: u8) -> Result<Vec<SocketAddr>> {
    let name = |n: u8| format!("web{n}");
    for n in 1..=count {
        world.service(&name(n), &json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"]}), &[1])?;
    }
    let published: Result<Vec<_>> = (1..=count).map(|n| world.published(&name(n), 1)).collect();
    Ok(published?.concat())
}

/// The nodes that addresses are given to, while each is served by that node.
fn served_by(world: &ClusterWorld) -> Result<Option<BTreeSet<String>>> {
    let all = world.list("VirtualIP")?;
    let is_served = |vip: &Value| {
        vip["spec"]["node"].is_string()
            && vip["status"]["node"] == vip["spec"]["node"]
            && vip["status"]["services"] == vip["spec"]["services"]
    };
    let nodes = all.iter().filter_map(|vip| vip["spec"]["node"].as_str().map(str::to_owned)).collect();
    Ok((!all.is_empty() && all.iter().all(is_served)).then_some(nodes))
}

/// Waits until all addresses are served by exactly these nodes.
fn wait_served_by(world: &ClusterWorld, nodes: &[&str]) -> Result<()> {
    let wanted: BTreeSet<_> = nodes.iter().map(|node| (*node).to_owned()).collect();
    let served =
        wait_for(
            "addresses to be served",
            || Ok((served_by(world)?.as_ref() == Some(&wanted)).then_some(())),
        );
    served.map_err(|error| error.context(format!("{:#?}", world.list("VirtualIP"))))
}

/// Waits until these nodes' devices have these VIPs, and no other of the two has.
fn wait_addresses(world: &ClusterWorld, on_edge: usize, on_other: usize) -> Result<()> {
    let count = |text: String| text.lines().filter(|line| line.contains(" 192.0.2.")).count();
    wait_for("addresses on the devices", || {
        let edge = count(world.lab.edge.run(["ip", "-o", "addr", "show", "dev", "uplink"])?);
        let other = &world.others[0].edge.namespace;
        let other = count(other.run(["ip", "-o", "addr", "show", "dev", "uplink"])?);
        Ok(((edge, other) == (on_edge, on_other)).then_some(()))
    })
}

fn holder(world: &ClusterWorld) -> Result<Option<String>> {
    let lease = world.get("Lease", LEADER)?.unwrap_or_default();
    Ok(lease["spec"]["holderIdentity"].as_str().filter(|holder| !holder.is_empty()).map(str::to_owned))
}

fn agent_lease(world: &ClusterWorld, node: &str) -> Result<()> {
    let name = format!("pointsman-agent-{node}");
    world.wait("the agent's Lease", ("Lease", &name), |lease| lease.is_some())?;
    Ok(())
}

/// All published addresses, and that no two Services share one.
fn distinct(world: &ClusterWorld) -> Result<Vec<String>> {
    let all: Vec<_> = world.list("Service")?.iter().flat_map(ingress).collect();
    let distinct: BTreeSet<_> = all.iter().collect();
    ensure!(distinct.len() == all.len(), "given twice: {all:?}");
    Ok(all)
}

#[test]
fn addresses_are_spread_and_leave_with_their_node() -> Result<()> {
    let Some(world) = world()? else { return Ok(()) };
    let (here, there) = (world.node.clone(), world.others[0].node.clone());
    let _agent = world.agent(&[])?;
    wait_for("a leader", || holder(&world))?;
    let mut other = world.other_agent(0, &[])?;
    agent_lease(&world, &there)?;
    services(&world, 4)?;
    ensure!(holder(&world)? == Some(here.clone()), "who came first leads");
    wait_served_by(&world, &[&here, &there])?;
    wait_addresses(&world, 2, 2)?;
    let before = distinct(&world)?;
    // It says goodbye: nobody has to wait for its Lease to run out.
    let started = std::time::Instant::now();
    other.sigterm()?;
    wait_served_by(&world, &[&here])?;
    ensure!(started.elapsed() < pointsman_tests::cluster_world::GOODBYE, "{:?}", started.elapsed());
    wait_addresses(&world, 4, 0)?;
    ensure!(distinct(&world)? == before, "nothing is renumbered");
    Ok(())
}

#[test]
fn a_node_may_be_excluded() -> Result<()> {
    let Some(world) = world()? else { return Ok(()) };
    let (here, there) = (world.node.clone(), world.others[0].node.clone());
    let _other = world.other_agent(0, &[])?;
    agent_lease(&world, &there)?;
    let vips = services(&world, 2)?;
    wait_served_by(&world, &[&there])?;
    let _agent = world.agent(&[])?;
    agent_lease(&world, &here)?;
    world.node(&there, &json!({ EXCLUDED: "" }))?;
    wait_served_by(&world, &[&here])?;
    wait_addresses(&world, 2, 0)?;
    for vip in vips {
        world.lab.client.enter(|| http_name(vip))??;
    }
    Ok(())
}

#[test]
fn who_is_killed_is_replaced() -> Result<()> {
    let Some(world) = world()? else { return Ok(()) };
    let (here, there) = (world.node.clone(), world.others[0].node.clone());
    let mut other = world.other_agent(0, &[])?;
    wait_for("a leader", || holder(&world))?;
    let _agent = world.agent(&[])?;
    agent_lease(&world, &here)?;
    services(&world, 4)?;
    wait_served_by(&world, &[&here, &there])?;
    let before = distinct(&world)?;
    // Leader and owner at once.
    ensure!(holder(&world)? == Some(there), "who came first leads");
    other.kill();
    wait_for("another leader", || Ok((holder(&world)? == Some(here.clone())).then_some(())))?;
    wait_served_by(&world, &[&here])?;
    ensure!(distinct(&world)? == before, "nothing is renumbered");
    // It comes back: what it has no longer is taken off its device.
    other.run()?;
    wait_addresses(&world, 4, 0)?;
    ensure!(distinct(&world)? == before, "nothing is renumbered");
    Ok(())
}

#[test]
fn two_that_believe_to_lead_give_no_address_twice() -> Result<()> {
    let Some(world) = world()? else { return Ok(()) };
    let (here, there) = (world.node.clone(), world.others[0].node.clone());
    let _agent = world.agent(&[])?;
    let _other = world.other_agent(0, &[])?;
    for node in [&here, &there] {
        agent_lease(&world, node)?;
    }
    wait_for("a leader", || holder(&world))?;
    // The Lease changes hands under its holder, who learns of it only when it renews.
    let name = |n: u8| format!("web{n}");
    for n in 1..=12 {
        let lease = json!({"spec": {"holderIdentity": if n % 2 == 0 { &here } else { &there }}});
        world.patch("Lease", LEADER, &lease)?;
        world.service(&name(n), &json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"]}), &[1])?;
    }
    for n in 1..=12 {
        world.published(&name(n), 1)?;
        distinct(&world)?;
    }
    wait_served_by(&world, &[&here, &there])?;
    ensure!(distinct(&world)?.len() == 12);
    ensure!(world.list("VirtualIP")?.len() == 12, "{:#?}", world.list("VirtualIP")?);
    Ok(())
}

#[test]
fn one_that_is_cut_off_loses_its_addresses_to_the_other() -> Result<()> {
    let Some(world) = world()? else { return Ok(()) };
    let (here, there) = (world.node.clone(), world.others[0].node.clone());
    let agent = world.agent(&[])?;
    wait_for("a leader", || holder(&world))?;
    let _other = world.other_agent(0, &[])?;
    agent_lease(&world, &there)?;
    let vips = services(&world, 4)?;
    wait_served_by(&world, &[&here, &there])?;
    let before = distinct(&world)?;
    // The leader: it serves on, and writes nothing.
    world.relay.cut(true);
    wait_for("another leader", || Ok((holder(&world)? == Some(there.clone())).then_some(())))?;
    wait_served_by(&world, &[&there])?;
    let own = world.lab.edge.run(["ip", "-o", "addr", "show", "dev", "uplink"])?;
    let kept = vips.iter().find(|vip| own.contains(&format!(" {}/", vip.ip())));
    let kept = *kept.context("it keeps what it has")?;
    world.lab.client.enter(|| http_name(kept))??;
    // Back again, it takes off what is another's by now.
    world.relay.cut(false);
    wait_addresses(&world, 0, 4)?;
    agent.wait_status("no addresses", |status| !status["agent"].is_null())?;
    ensure!(distinct(&world)? == before, "nothing is renumbered");
    Ok(())
}

/// It is alive, and no packet reaches it.
#[test]
fn one_whose_link_is_down_loses_its_addresses_to_the_other() -> Result<()> {
    let Some(world) = world()? else { return Ok(()) };
    let (here, there) = (world.node.clone(), world.others[0].node.clone());
    let _agent = world.agent(&[])?;
    wait_for("a leader", || holder(&world))?;
    let _other = world.other_agent(0, &[])?;
    agent_lease(&world, &there)?;
    services(&world, 4)?;
    wait_served_by(&world, &[&here, &there])?;
    let before = distinct(&world)?;
    let unfit = |lease: Option<&Value>| {
        lease
            .and_then(|lease| lease["metadata"]["annotations"]["pointsman.dev/unfit"].as_str())
            .map(str::to_owned)
    };
    let own = format!("pointsman-agent-{here}");
    world.lab.edge.run(["ip", "link", "set", "uplink", "down"])?;
    let lease = world.wait("the Lease to say so", ("Lease", &own), |lease| unfit(lease).is_some())?;
    let why = unfit(lease.as_ref()).unwrap_or_default();
    ensure!(why.contains("uplink is down"), "{why}");
    wait_served_by(&world, &[&there])?;
    wait_for("an Event", || {
        let all: Result<Vec<_>> = (1..=4).map(|n| world.reasons(&format!("web{n}"))).collect();
        Ok((all?.concat().iter().filter(|reason| *reason == "Moved").count() >= 2).then_some(()))
    })?;
    // How it forwards is there, too; and why, where something faster was given up.
    let annotations = lease.as_ref().map_or(&Value::Null, |lease| &lease["metadata"]["annotations"]);
    let ways = annotations["pointsman.dev/datapath"].as_str().unwrap_or_default();
    ensure!(ways.split(',').any(|way| way.starts_with("uplink=")), "{annotations}");
    // It comes back, and takes what is new.
    world.lab.edge.run(["ip", "link", "set", "uplink", "up"])?;
    world.wait("the Lease to say no more", ("Lease", &own), |lease| {
        lease.is_some() && unfit(lease).is_none()
    })?;
    wait_addresses(&world, 0, 4)?;
    ensure!(distinct(&world)? == before, "nothing is renumbered");
    Ok(())
}
