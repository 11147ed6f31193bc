//! The rights that are shipped, against the authorizer of whatever cluster it is. That none of them is
//! spare is `api_faults_agent`'s matter: it takes a record of all requests.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use pointsman_tests::{
    apiserver::metallb,
    cluster_world::ClusterWorld,
    lab::{Agent, in_kernel, wait_for},
    traffic::client::http_name,
};
use serde_json::{Value, json};

const POOL: [&str; 1] = ["192.0.2.0/28"];

/// Installs MetalLB's definitions: the agents may read its objects.
fn install_metallb(world: &ClusterWorld) -> Result<()> {
    for (plural, kind) in metallb::KINDS {
        let definition = serde_json::from_value(metallb::definition(plural, kind).1)?;
        world.block(world.cluster.install(&definition))?;
    }
    Ok(())
}

fn problems(status: &Value) -> String {
    status["agent"]["problems"].to_string() + &status["problems"].to_string()
}

/// What the agent has heard or told of something that it may not do: every problem is in the log, too.
fn refusals(agent: &Agent<'_>) -> Vec<String> {
    // The API server's word, and ours.
    let words = ["forbidden", "rbac does not let"];
    let log = agent.log().to_lowercase();
    log.lines().filter(|line| words.iter().any(|word| line.contains(word))).map(str::to_owned).collect()
}

fn wait_event(world: &ClusterWorld, service: &str, reason: &str) -> Result<()> {
    wait_for(&format!("an Event {reason} of {service}"), || {
        Ok(world.reasons(service)?.iter().any(|found| found == reason).then_some(()))
    })
}

/// One life of an installation, with what is seldom written: Events of the leader and of an agent that
/// does not lead, an address that moves, annotations of Leases, and the end.
#[test]
fn nothing_is_forbidden_from_the_first_service_to_the_end() -> Result<()> {
    let Some(mut world) = ClusterWorld::new(1)? else { return Ok(()) };
    world.add_node()?;
    world.pool(&POOL)?;
    install_metallb(&world)?;
    world.grant(&world.shipped_rights()?)?;
    world.act_as_account()?;
    let world = world;

    // The limit is that of a map; and programs, unlike the proxy, serve what comes by for an address that
    // the other node has.
    let limit = [["--max-source-ranges=2"].as_slice(), in_kernel()].concat();
    let leader = world.agent(&limit)?;
    wait_for("a leader", || {
        let lease = world.get("Lease", "pointsman-controller")?.unwrap_or_default();
        Ok((lease["spec"]["holderIdentity"] == world.node).then_some(()))
    })?;
    let other = world.other_agent(0, &limit)?;
    wait_for("two agents", || Ok((world.list("Lease")?.len() == 3).then_some(())))?;

    let v4 = |more: &Value| {
        let mut spec = json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"]});
        for (key, value) in more.as_object().into_iter().flatten() {
            spec[key] = value.clone();
        }
        spec
    };
    let mut vips: Vec<SocketAddr> = Vec::new();
    for name in ["web1", "web2", "web3", "web4"] {
        world.service(name, &v4(&json!({})), &[1])?;
        vips.extend(world.published(name, 1)?);
    }
    for vip in &vips {
        world.lab.client.enter(|| http_name(*vip))??;
    }
    // The leader tells why there is no address.
    world.service("elsewhere", &v4(&json!({"loadBalancerIP": "198.51.100.77"})), &[1])?;
    wait_for("an Event about what cannot be given", || {
        Ok((!world.reasons("elsewhere")?.is_empty()).then_some(()))
    })?;
    // Whoever has an address tells that there is no room for these; half of the addresses are the other's.
    let ranges = json!({"loadBalancerSourceRanges": ["10.1.0.0/24", "10.2.0.0/24", "10.3.0.0/24"]});
    for name in ["web1", "web2", "web3", "web4"] {
        world.service(name, &v4(&ranges), &[1])?;
    }
    for name in ["web1", "web2", "web3", "web4"] {
        wait_event(&world, name, "NodeCannotServe")?;
    }
    world.delete("Service", "web1")?;
    world.wait("the Service to go", ("Service", "web1"), |found| found.is_none())?;

    let said = world.clean_up()?;
    ensure!(!said.contains("did not say") && said.contains("the Leases of 2 agents"), "{said}");
    // But for the leader's, by which nobody leads who is started too early.
    ensure!(world.list("VirtualIP")?.is_empty() && world.list("Lease")?.len() == 1, "{said}");
    for agent in [&leader, &other] {
        let refusals = refusals(agent);
        ensure!(refusals.is_empty(), "{refusals:#?}");
    }
    Ok(())
}

/// That the above can fail: without a rule it is refused and named, and it goes on by itself with it.
#[test]
fn a_rule_that_is_missing_is_named() -> Result<()> {
    for (resource, verb) in [("endpointslices", "watch"), ("services/status", "patch")] {
        let Some(mut world) = ClusterWorld::new(1)? else { return Ok(()) };
        world.pool(&POOL)?;
        let mut rights = world.shipped_rights()?;
        for rules in rights.iter_mut().filter_map(|right| right.get_mut("rules")?.as_array_mut()) {
            for list in rules.iter_mut().filter_map(|rule| rule.get_mut("resources")?.as_array_mut()) {
                list.retain(|it| it != resource);
            }
            // A rule about nothing is refused.
            rules.retain(|rule| rule["resources"].as_array().is_some_and(|list| !list.is_empty()));
        }
        world.grant(&rights)?;
        world.act_as_account()?;
        let world = world;
        let agent = world.agent(&[])?;
        let v4 = json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"]});
        world.service("web", &v4, &[1])?;
        let told = format!("RBAC does not let Pointsman {verb}");
        agent.wait_status(&told, |status| problems(status).contains(&told))?;
        ensure!(refusals(&agent).iter().any(|line| line.contains(resource)), "{}", agent.log());
        world.grant(&world.shipped_rights()?)?;
        let vip = world.published("web", 1)?[0];
        world.lab.client.enter(|| http_name(vip))??;
        agent.wait_status("no problem any more", |status| !problems(status).contains(resource))?;
    }
    Ok(())
}
