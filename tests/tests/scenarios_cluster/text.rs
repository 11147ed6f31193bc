//! What the API server and the nodes have, as text: the same state gives the same text.

use std::{collections::BTreeSet, fmt::Write, net::IpAddr};

use lb_control::plan::controller::FINALIZER;
use pointsman_tests::dump::dump;
use serde_json::Value;

use super::{
    agent::Agent,
    server::{Key, RIVAL, owns, texts},
    world::World,
};

/// More backends than this are counted instead of listed.
const LISTED: usize = 20;

/// The state, with the maps of these nodes. A line of an Event begins with [`EVENT`].
pub fn show(world: &mut World, nodes: &[&str]) -> String {
    let mut out = String::new();
    let server = &world.server;
    for (key, object) in &server.objects {
        match key.kind.as_str() {
            "AddressPool" => pool(&mut out, key, object),
            "Service" => service(&mut out, key, object, server.is_as_written(key)),
            "VirtualIP" => virtual_ip(&mut out, object),
            _ => {}
        }
    }
    if let Some(leader) = world.agents.values().find(|agent| agent.leads) {
        for problem in leader.problems.iter().flatten() {
            writeln!(out, "Problem {problem}").unwrap();
        }
    }
    let mut announced = BTreeSet::new();
    for agent in world.agents.values() {
        node(&mut out, agent, nodes.contains(&agent.node.as_str()));
        for address in agent.planner.plan().desired.vips.keys().filter(|_| agent.is_up) {
            assert!(announced.insert(*address), "two nodes announce {address}:\n{out}");
        }
    }
    for event in std::mem::take(&mut world.server.events) {
        writeln!(out, "{event}").unwrap();
    }
    out
}

/// Begins the lines of Events.
pub const EVENT: &str = "Event ";

fn list(items: impl IntoIterator<Item = impl ToString>) -> String {
    let items: Vec<_> = items.into_iter().map(|it| it.to_string()).collect();
    if items.is_empty() { "nothing".into() } else { items.join(", ") }
}

fn conditions(out: &mut String, object: &Value) {
    for it in object["status"]["conditions"].as_array().into_iter().flatten() {
        let text = |field: &str| it[field].as_str().unwrap_or_default();
        let kind = text("type").trim_start_matches("pointsman.dev/");
        writeln!(out, "  {kind} {} {}: {}", text("status"), text("reason"), text("message")).unwrap();
    }
}

fn pool(out: &mut String, key: &Key, object: &Value) {
    let status = &object["status"];
    let available = match status["available"].as_i64() {
        Some(i64::MAX) => "countless".to_owned(),
        _ => status["available"].to_string(),
    };
    writeln!(out, "AddressPool {}: {} assigned, {available} available", key.name, status["assigned"])
        .unwrap();
    conditions(out, object);
}

fn service(out: &mut String, key: &Key, object: &Value, is_as_written: bool) {
    let ingress = object["status"]["loadBalancer"]["ingress"].as_array();
    let addresses = list(ingress.into_iter().flatten().filter_map(|it| it["ip"].as_str()));
    write!(out, "Service {}/{}: {addresses}", key.namespace, key.name).unwrap();
    let finalizers = texts(&object["metadata"]["finalizers"]);
    let is_ours = finalizers.iter().any(|it| it == FINALIZER);
    if owns(object, RIVAL) {
        out.push_str(" (written by a rival)");
    }
    if is_as_written && !is_ours && object["status"]["conditions"].is_null() {
        out.push_str(", not touched");
    }
    if object["metadata"]["deletionTimestamp"].is_string() {
        out.push_str(", being deleted");
    }
    out.push('\n');
    if !finalizers.is_empty() {
        writeln!(out, "  finalizers {}", finalizers.join(", ")).unwrap();
    }
    let external = texts(&object["spec"]["externalIPs"]);
    if !external.is_empty() {
        writeln!(out, "  externalIPs {}", external.join(", ")).unwrap();
    }
    conditions(out, object);
}

fn virtual_ip(out: &mut String, object: &Value) {
    let services = |part: &Value| {
        let all = part["services"].as_array().cloned().unwrap_or_default();
        let name = |it: &Value| {
            format!(
                "{}/{}",
                it["namespace"].as_str().unwrap_or_default(),
                it["name"].as_str().unwrap_or_default()
            )
        };
        list(all.iter().map(name)).replace("nothing", "nobody")
    };
    let (spec, status) = (&object["spec"], &object["status"]);
    let text = |value: &Value, none: &str| value.as_str().unwrap_or(none).to_owned();
    let given = services(spec);
    write!(
        out,
        "VirtualIP {} of {} for {given} by {}; ",
        text(&spec["address"], "?"),
        text(&spec["pool"], "no pool"),
        text(&spec["node"], "no node")
    )
    .unwrap();
    let served = services(status);
    match status["node"].as_str() {
        None => writeln!(out, "not served"),
        Some(node) if served == given => writeln!(out, "served by {node}"),
        Some(node) => writeln!(out, "served by {node} for {served}"),
    }
    .unwrap();
}

fn node(out: &mut String, agent: &Agent, with_maps: bool) {
    let plan = agent.planner.plan();
    write!(out, "Node {}", agent.node).unwrap();
    if agent.is_up {
        let leads = if agent.leads { " leads and" } else { "" };
        let addresses: Vec<&IpAddr> = plan.desired.vips.keys().collect();
        writeln!(out, "{leads} announces {}", list(addresses)).unwrap();
    } else {
        out.push_str(" is down\n");
    }
    if !with_maps {
        return;
    }
    for report in plan.reports.values() {
        writeln!(out, "  {} {:?}", report.object, report.state).unwrap();
        for problem in &report.problems {
            writeln!(out, "    {:?}: {problem}", problem.severity).unwrap();
        }
    }
    let dump = dump(&agent.maps).unwrap();
    let (backends, rest): (Vec<_>, Vec<_>) = dump.lines().partition(|line| line.starts_with("backend "));
    // What a free place remembers is the business of `tests/scenarios`.
    let backends: Vec<_> = backends.into_iter().filter(|line| !line.contains(" Free ")).collect();
    for line in rest {
        let slots = line.find('[').filter(|_| line.split(", ").count() > LISTED);
        writeln!(out, "  {}", slots.map_or(line, |start| line[..start].trim_end())).unwrap();
    }
    if backends.len() > LISTED {
        let state = |line: &&str| line.split_once(':').map(|(_, rest)| rest.to_owned());
        let kinds: BTreeSet<_> = backends.iter().filter_map(state).collect();
        writeln!(out, "  {} backends: {}", backends.len(), list(kinds)).unwrap();
    } else {
        for line in backends {
            writeln!(out, "  {line}").unwrap();
        }
    }
}
