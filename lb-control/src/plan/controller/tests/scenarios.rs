//! Scenarios: what happens in a cluster in; commands and the resulting objects out.
//!
//! A scenario is a file `tests/scenarios_control/*.txt`. Its first lines say what it shows; then
//! come steps, each with what happens, one thing a line, and what is expected to come of it:
//!
//! ```text
//! == step WHAT HAPPENS
//! service web share=k      a Service comes or changes; words as in `plan::testing`
//! delete web               people delete it
//! pool p 192.0.2.0/24      a pool comes or changes
//! no-pool p
//! node n1 [excluded]       a node comes or changes, and its agent
//! agent n1 up|down
//! endpoints web n1 n2      nodes with ready endpoints; `local web` is externalTrafficPolicy Local
//! hand 192.0.2.1 web n1    people write a VirtualIP: Services (`a+b`) and node, or `gone`
//! rival web 203.0.113.1    somebody else writes the Service's status; `none` clears it
//! lost 2                   so many writes do not arrive; `unanswered 2`: their answers do not
//! leader                   another leader takes over
//! seconds 5
//! -- expect
//! …
//! ```
//!
//! With `UPDATE=1` the expectations are written anew.

use std::{fmt::Write, fs, path::Path, sync::Arc};

use super::{Fault, World};
use crate::{
    model::{Endpoint, EndpointSlice, Few, Ingress, Node, ObjectChange, ObjectRef, VirtualIp},
    plan::controller::Command,
};

fn object(name: &str) -> ObjectRef {
    ObjectRef::new("default", name)
}

fn happens(world: &mut World, line: &str) {
    let (what, rest) = line.split_once(' ').unwrap_or((line, ""));
    let words: Vec<&str> = rest.split_whitespace().collect();
    match (what, &words[..]) {
        ("service", _) => drop(world.service(rest)),
        ("delete", [name]) => world.server.delete_service(&object(name)),
        ("pool", _) => world.pool(rest),
        ("no-pool", [name]) => world.server.put(ObjectChange::Pool((*name).into(), None)),
        ("node", [name, excluded @ ..]) => {
            let name = (*name).to_owned();
            let node = Node { name: name.clone(), excluded: !excluded.is_empty(), ..Node::default() };
            world.server.put(ObjectChange::Node(name.clone(), Some(Arc::new(node))));
            world.agents.entry(name).or_insert_with(super::world::Agent::new);
            world.renew();
        }
        ("agent", [name, state]) => {
            world.agents.get_mut(*name).unwrap().is_alive = *state == "up";
            world.renew();
        }
        ("local", [name]) => world.edit(&object(name), |it| it.local_traffic_only = true),
        ("endpoints", [service, nodes @ ..]) => endpoints(world, service, nodes),
        ("hand", [address, "gone"]) => {
            world.server.put(ObjectChange::VirtualIp(address.parse().unwrap(), None));
        }
        ("hand", [address, services, node]) => hand(world, address, services, node),
        ("rival", [name, address]) => world.edit(&object(name), |it| {
            it.api.ingress_is_ours = false;
            it.api.ingress = match *address {
                "none" => Vec::new(),
                _ => vec![Ingress { ip: address.parse().ok(), ..Ingress::default() }],
            };
        }),
        ("lost", [count]) => fault(world, Fault::Lost, count),
        ("unanswered", [count]) => fault(world, Fault::AnswerLost, count),
        ("leader", []) => world.restart(),
        ("seconds", [count]) => world.pass(count.parse().unwrap()),
        _ => panic!("{line}"),
    }
}

fn fault(world: &mut World, fault: Fault, count: &str) {
    world.faults.extend(std::iter::repeat_n(fault, count.parse().unwrap()));
}

fn endpoints(world: &mut World, service: &str, nodes: &[&str]) {
    let endpoint = |node: &&str| Endpoint {
        node: Some((*node).into()),
        ..Endpoint::ready(std::net::IpAddr::from([10, 0, 0, 1]))
    };
    let slice = EndpointSlice {
        object: object(&format!("{service}-slice")),
        place: None,
        service: Some(service.to_owned()),
        family: None,
        ports: Vec::new(),
        endpoints: nodes.iter().map(endpoint).collect(),
        weight: None,
    };
    world.server.put(ObjectChange::Slice(slice.object.clone(), Some(Arc::new(slice))));
}

fn hand(world: &mut World, address: &str, services: &str, node: &str) {
    // Safety does not hold against people who write what is the controller's to write.
    world.checks = false;
    let address = address.parse().unwrap();
    let new = VirtualIp {
        address,
        pool: None,
        services: Few::default(),
        node: None,
        live_node: None,
        live: Few::default(),
        uid: "by-hand".into(),
        resource_version: String::new(),
        deleting: false,
    };
    let mut it = world.server.objects.virtual_ips.get(&address).map_or(new, |it| (**it).clone());
    it.services = services.split('+').map(object).collect();
    it.node = (node != "-").then(|| node.to_owned());
    world.server.write_virtual_ip(it);
}

fn names(services: &Few<ObjectRef>) -> String {
    let names: Vec<_> = services.iter().map(|it| it.name.as_str()).collect();
    if names.is_empty() { "nobody".into() } else { names.join("+") }
}

fn list<T: ToString>(items: &[T]) -> String {
    let items: Vec<_> = items.iter().map(ToString::to_string).collect();
    if items.is_empty() { "nothing".into() } else { items.join(", ") }
}

fn describe(command: &Command) -> String {
    let node = |node: &Option<String>| node.clone().unwrap_or("nobody".into());
    match command {
        Command::CreateVirtualIp { address, pool, services, node: by } => format!(
            "create VirtualIP {address} of {} for {}, by {}",
            pool.as_deref().unwrap_or("no pool"),
            names(services),
            node(by)
        ),
        Command::UpdateVirtualIp { address, services, node: by, .. } => {
            format!("update VirtualIP {address} for {}, by {}", names(services), node(by))
        }
        Command::DeleteVirtualIp { address, .. } => format!("delete VirtualIP {address}"),
        Command::SetVirtualIpStatus { .. } => unreachable!("agents write that"),
        Command::AddFinalizers { service, finalizers, .. } => {
            format!("finalizers of {}: add {}", service.name, list(finalizers))
        }
        Command::RemoveFinalizers { service, finalizers, .. } => {
            format!("finalizers of {}: remove {}", service.name, list(finalizers))
        }
        Command::ApplyServiceStatus { service, ingress, .. } => {
            format!("status of {}: {}", service.name, list(ingress))
        }
        Command::SetExternalIps { service, all, .. } => {
            format!("externalIPs of {}: {}", service.name, list(all))
        }
        Command::SetPoolStatus { pool, assigned, available, conditions } => {
            format!("status of pool {pool}: {assigned} assigned, {available} free, {}", conditions[0].reason)
        }
        Command::Event { about, warning, reason, note } => {
            let kind = if *warning { "Warning" } else { "Normal" };
            format!("event {kind} {reason} about {}: {note}", about.object.name)
        }
    }
}

/// What was done since the last time, and how things stand.
fn result(world: &mut World) -> String {
    let mut out = String::new();
    for command in std::mem::take(&mut world.commands) {
        writeln!(out, "{}", describe(&command)).unwrap();
    }
    writeln!(out, "--").unwrap();
    for service in world.server.objects.services.values() {
        let api = &service.api;
        let ingress: Vec<_> = api.ingress.iter().filter_map(|it| it.ip).collect();
        let held = if api.finalizers.is_empty() { "" } else { ", held by finalizers" };
        let deleting = if api.deleting { ", being deleted" } else { "" };
        writeln!(out, "Service {}: {}{held}{deleting}", service.object.name, list(&ingress)).unwrap();
        for it in &api.conditions {
            let kind = it.kind.strip_prefix("pointsman.dev/").unwrap_or(&it.kind);
            writeln!(out, "  {kind} {} {}: {}", it.status, it.reason, it.message).unwrap();
        }
    }
    for it in world.server.objects.virtual_ips.values() {
        let by = |node: &Option<String>| node.clone().unwrap_or("nobody".into());
        let (services, live) = (names(&it.services), names(&it.live));
        let (node, live_node) = (by(&it.node), by(&it.live_node));
        writeln!(out, "VirtualIP {}: for {services} by {node}; served: {live} by {live_node}", it.address)
            .unwrap();
    }
    out
}

/// The text of a scenario with what came of it in place of what was expected.
fn run(text: &str) -> String {
    let mut world = World::new(&[]);
    let mut out = String::new();
    let mut lines = text.lines().peekable();
    let mut is_step = false;
    while let Some(line) = lines.next() {
        writeln!(out, "{line}").unwrap();
        if line == "-- expect" {
            while lines.next_if(|line| !line.starts_with("== ")).is_some() {}
            world.calm();
            let blank = if lines.peek().is_some() { "\n" } else { "" };
            write!(out, "{}{blank}", result(&mut world)).unwrap();
            is_step = false;
        } else if line.starts_with("== ") {
            is_step = true;
        } else if is_step {
            happens(&mut world, line);
        }
    }
    out
}

#[test]
fn scenarios() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/scenarios_control");
    let mut seen = 0;
    for file in fs::read_dir(&folder).unwrap() {
        let path = file.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let result = run(&text);
        seen += 1;
        if std::env::var_os("UPDATE").is_some() {
            fs::write(&path, result).unwrap();
        } else {
            let name = path.file_name().unwrap().to_string_lossy();
            let line = text.lines().zip(result.lines()).position(|(old, new)| old != new);
            assert!(
                text == result,
                "{name}: line {}: other than expected; look at what UPDATE=1 makes of it",
                line.unwrap_or_else(|| text.lines().count().min(result.lines().count())) + 1
            );
        }
    }
    assert!(seen > 0, "no scenarios in {}", folder.display());
}
