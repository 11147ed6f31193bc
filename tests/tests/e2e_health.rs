//! Health checks of backends, with real traffic.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use pointsman_tests::{
    cluster_world::{ClusterWorld, METRICS},
    lab::{
        Agent, Namespace,
        agent::list,
        manifest::{ECHO, HTTP, Port, ServiceSpec, UDP, manifest},
        wait_for,
    },
    traffic::{
        Server,
        client::{check_round_robin, connect, tally, who_answers, who_answers_udp},
        ping_pong::PingPong,
    },
    world::{World, both, web_service},
};
use serde_json::{Value, json};

const ANNOTATION: &str = "pointsman.dev/health-check";
const UNHEALTHY_AFTER: u64 = 2;
/// For an answer, the maps and the status, on a machine that does much else.
const SLACK: Duration = Duration::from_secs(8);
/// All ports of a backend stand and fall with its HTTP server.
const CHECK: &str = "http /healthz port=8080 interval=1s healthy=2 unhealthy=2";

fn yaml(check: &str, backends: &[u8]) -> String {
    manifest(&[web_service(backends).annotated(ANNOTATION, check)])
}

/// State and reason of all backends of a Service's port, both families, in the order of their addresses.
fn states(status: &Value, service: &str, port: Port) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let services = list(status, "services").iter().filter(|found| found["name"] == service);
    let ports = services.flat_map(|found| list(found, "ports")).filter(|found| found["port"] == port.port);
    let backends = ports.flat_map(|found| list(found, "backends"));
    backends.map(|backend| (text(&backend["state"]), text(&backend["reason"]))).collect()
}

/// Waits until the backends of these ports of the Service `web` are in these states, in both families.
fn wait_states(agent: &Agent<'_>, ports: &[Port], states_of_all: &[&str]) -> Result<Value> {
    let wanted = [states_of_all, states_of_all].concat();
    agent.wait_status(&format!("backends that are {states_of_all:?}"), |status| {
        ports.iter().all(|port| {
            let states = states(status, "web", *port);
            states.iter().map(|(state, _)| state.as_str()).eq(wanted.iter().copied())
        })
    })
}

/// Waits until a backend was asked so many times more.
fn wait_asked(server: &Server, more: u64) -> Result<()> {
    let asked = || server.asked().values().sum::<u64>();
    let goal = asked() + more;
    wait_for("questions to a backend", || Ok((asked() >= goal).then_some(())))
}

/// The metrics of the agent on a node.
fn metrics(namespace: &Namespace) -> Result<String> {
    let mut stream = connect(namespace, METRICS.parse()?)?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: edge\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// How many connections to a port the kernel still remembers on a node.
fn remembered(namespace: &Namespace, port: Port) -> Result<usize> {
    let text = namespace.run(["ss", "-Htan", "state", "time-wait"])?;
    let port = format!(":{}", port.target);
    Ok(text.split_whitespace().filter(|word| word.ends_with(&port)).count())
}

#[test]
fn who_fails_keeps_what_it_has_and_takes_nothing_new_until_it_recovers() -> Result<()> {
    fails_and_recovers(&[], &[HTTP, ECHO, UDP])
}

#[test]
fn so_it_is_by_the_proxy() -> Result<()> {
    fails_and_recovers(&["--datapath", "proxy"], &[HTTP, ECHO])
}

fn fails_and_recovers(flags: &[&str], ports: &[Port]) -> Result<()> {
    let Some(world) = World::new(3)? else { return Ok(()) };
    let service = ServiceSpec::new("web", ports, &[1, 2, 3]).annotated(ANNOTATION, CHECK);
    let agent = Agent::start_with(&world.lab, &manifest(&[service]), flags)?;
    let status = agent.wait_ready()?;
    let (http, echo) = (both(&status, HTTP)?, both(&status, ECHO)?);
    for to in http {
        check_round_robin(&who_answers(&world.lab.client, to, 12)?, 3)?;
    }
    // Three each: one is with the backend that falls ill.
    let held: Vec<_> =
        echo.iter().map(|to| PingPong::start(&world.lab.client, *to, 3)).collect::<Result<_>>()?;
    let ill = &world.servers[1];
    wait_asked(ill, 4)?;
    let before: u64 = ill.asked().values().sum();
    let started = Instant::now();
    ill.set_healthy(false);
    let status = wait_states(&agent, ports, &["active", "unhealthy", "active"])?;
    // Of either family's address it takes so many answers in a row.
    let asked = ill.asked().values().sum::<u64>() - before;
    ensure!(asked >= 2 * UNHEALTHY_AFTER, "{asked}");
    // Whoever looks is late by what looking takes, not by intervals.
    let took = started.elapsed();
    ensure!(took < Duration::from_secs(UNHEALTHY_AFTER) + SLACK, "{took:?}");
    for (state, reason) in states(&status, "web", HTTP) {
        ensure!((state == "unhealthy") == (reason == "HTTP 503"), "{state}: {reason}");
    }
    let health = &list(&status, "services")[0]["health"];
    ensure!((&health["healthy"], &health["unhealthy"]) == (&json!(4), &json!(2)), "{health}");
    let mut answers: Vec<_> =
        http.iter().map(|to| who_answers(&world.lab.client, *to, 12)).collect::<Result<_>>()?;
    if ports.iter().any(|port| port.port == UDP.port) {
        for to in both(&status, UDP)? {
            answers.push(who_answers_udp(&world.lab.client, to, 12)?);
        }
    }
    for names in answers {
        ensure!(tally(&names) == [("b1".to_owned(), 6), ("b3".to_owned(), 6)].into(), "{names:?}");
    }
    for flows in &held {
        flows.wait_exchanges(20)?;
    }
    ill.set_healthy(true);
    let status = wait_states(&agent, ports, &["active"; 3])?;
    ensure!(states(&status, "web", HTTP).iter().all(|(_, reason)| reason.is_empty()));
    for to in http {
        check_round_robin(&who_answers(&world.lab.client, to, 12)?, 3)?;
    }
    for flows in held {
        let report = flows.stop()?;
        ensure!(report.broken.is_empty(), "{report:?}");
    }
    Ok(())
}

#[test]
fn if_all_fail_all_take_connections() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let agent = Agent::start(&world.lab, &yaml(CHECK, &[1, 2]))?;
    let status = agent.wait_ready()?;
    for server in &world.servers {
        server.set_healthy(false);
    }
    let ports = [HTTP, ECHO, UDP];
    wait_states(&agent, &ports, &["unhealthy"; 2])?;
    for to in both(&status, HTTP)? {
        check_round_robin(&who_answers(&world.lab.client, to, 6)?, 2)?;
    }
    let text = agent.cli(&["status"])?;
    ensure!(text.contains("unhealthy (HTTP 503)"), "{text}");
    ensure!(text.contains("fails for all backends of port 80, which take connections"), "{text}");
    world.servers[1].set_healthy(true);
    wait_states(&agent, &ports, &["unhealthy", "active"])?;
    for to in both(&status, HTTP)? {
        ensure!(who_answers(&world.lab.client, to, 6)? == ["b2"; 6]);
    }
    Ok(())
}

/// Nobody listens any more, and nobody is led there once that is known.
#[test]
fn who_is_dead_is_found_by_tcp() -> Result<()> {
    let Some(mut world) = World::new(2)? else { return Ok(()) };
    let service = ServiceSpec::new("web", &[HTTP], &[1, 2]).annotated(ANNOTATION, "tcp interval=1s");
    let agent = Agent::start(&world.lab, &manifest(&[service]))?;
    let status = agent.wait_ready()?;
    drop(world.servers.pop());
    agent.wait_status("a dead backend to be found", |status| {
        let dead = ("unhealthy".to_owned(), "connect: refused".to_owned());
        states(status, "web", HTTP).iter().filter(|state| **state == dead).count() == 2
    })?;
    for to in both(&status, HTTP)? {
        ensure!(who_answers(&world.lab.client, to, 6)? == ["b1"; 6]);
    }
    Ok(())
}

#[test]
fn backends_are_asked_once_however_many_ports_lead_there() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let again = ServiceSpec::new("again", &[HTTP, UDP], &[1]).annotated(ANNOTATION, CHECK);
    let yaml = manifest(&[web_service(&[1]).annotated(ANNOTATION, CHECK), again]);
    let agent = Agent::start_with(&world.lab, &yaml, &["--http-address", METRICS])?;
    agent.wait_ready()?;
    let server = &world.servers[0];
    let started = Instant::now();
    let before: u64 = server.asked().values().sum();
    wait_asked(server, 16)?;
    let asked: u64 = server.asked().values().sum::<u64>() - before;
    // Both families, once in a second each, and whoever is late may be right on time next.
    let most = 2 * (started.elapsed().as_secs() + 2);
    ensure!(asked <= most, "{asked} questions in {:?}", started.elapsed());
    // They leave nothing behind, neither here nor there.
    for node in [&world.lab.edge, &world.lab.backends[0]] {
        ensure!(remembered(node, HTTP)? == 0, "{}", node.run(["ss", "-tan"])?);
    }
    let text = metrics(&world.lab.edge)?;
    let value = |name: &str| -> Option<f64> {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.rsplit(' ').next()?.parse().ok()
    };
    ensure!(value("pointsman_health_probes_total{result=\"healthy\"}") >= Some(16.0), "{text}");
    let of = r#"pointsman_checked_backends{namespace="default",service="web",state="#;
    ensure!(value(&format!("{of}\"healthy\"}}")) == Some(2.0), "{text}");
    ensure!(value(&format!("{of}\"unhealthy\"}}")) == Some(0.0), "{text}");
    Ok(())
}

/// Each asks for the addresses that it has, and for no others.
#[test]
fn agents_ask_for_their_own_addresses() -> Result<()> {
    let Some(mut world) = ClusterWorld::new(1)? else { return Ok(()) };
    world.add_node()?;
    world.pool(&["192.0.2.0/28"])?;
    let _agent = world.agent(&[])?;
    let mut other = world.other_agent(0, &[])?;
    for node in [&world.node, &world.others[0].node] {
        let lease = format!("pointsman-agent-{node}");
        world.wait("the agents' Leases", ("Lease", &lease), |lease| lease.is_some())?;
    }
    let path = |n: u8| format!("/healthz-{n}");
    for n in 1..=4_u8 {
        let name = format!("web{n}");
        world.service(&name, &json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"]}), &[1])?;
        let check = format!("http {} interval=1s", path(n));
        world.patch("Service", &name, &json!({"metadata": {"annotations": {ANNOTATION: check}}}))?;
        world.published(&name, 1)?;
    }
    let here = || -> Result<Option<BTreeSet<String>>> {
        let vips = world.list("VirtualIP")?;
        let settled = |vip: &Value| vip["status"]["node"] == vip["spec"]["node"];
        let own = vips.iter().filter(|vip| vip["spec"]["node"] == world.node.as_str());
        let name = |vip: &Value| vip["spec"]["services"][0]["name"].as_str().map(str::to_owned);
        let paths = own.filter_map(name).map(|name| name.replace("web", "/healthz-")).collect();
        Ok((vips.len() == 4 && vips.iter().all(settled)).then_some(paths))
    };
    let own = wait_for("addresses to be served", here)?;
    ensure!(own.len() == 2, "spread over both: {own:?}");
    // The other node's packets do not come as far as the backend: all questions are from this one.
    let server = &world.servers[0];
    let asked_of = || server.asked().into_keys().collect::<BTreeSet<_>>();
    wait_for("questions", || Ok((asked_of() == own).then_some(())))?;
    wait_asked(server, 8)?;
    ensure!(asked_of() == own, "{:?}", server.asked());
    // What the other leaves comes here, and is asked for from then on.
    other.sigterm()?;
    wait_for("questions for all", || Ok((asked_of().len() == 4).then_some(())))?;
    // Somebody falls ill: whoever watches the Service is told, and told again. Of one that was here all
    // the time: to the other node, the backend looked dead.
    let service = own.first().map(|path| path.replace("/healthz-", "web")).unwrap_or_default();
    server.set_healthy(false);
    let told = |reason: &'static str| {
        wait_for(reason, || Ok(world.reasons(&service)?.iter().any(|one| one == reason).then_some(())))
    };
    told("BackendsUnhealthy")?;
    server.set_healthy(true);
    told("BackendsHealthy")?;
    Ok(())
}

/// What is wrong with the annotation is told, and the Service is served all the same.
#[test]
fn a_check_that_cannot_be_made_costs_nothing_else() -> Result<()> {
    let Some(world) = ClusterWorld::new(1)? else { return Ok(()) };
    world.pool(&["192.0.2.0/28"])?;
    let agent = world.agent(&[])?;
    world.service("web", &json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"]}), &[1])?;
    let annotations = json!({ANNOTATION: "http /healthz every=5s"});
    world.patch("Service", "web", &json!({"metadata": {"annotations": annotations}}))?;
    let vips = world.published("web", 1)?;
    agent.wait_status("what is wrong to be told", |status| {
        let problems = status["problems"].to_string() + &status["services"].to_string();
        problems.contains("`every` is not known here")
    })?;
    for to in vips {
        ensure!(who_answers(&world.lab.client, to, 2)? == ["b1"; 2]);
    }
    ensure!(world.servers[0].asked().is_empty());
    Ok(())
}

/// The proxy avoids a backend that takes no connections without being asked to, and tells it when it lasts.
#[test]
fn who_is_avoided_for_long_is_told() -> Result<()> {
    let Some(mut world) = ClusterWorld::new(2)? else { return Ok(()) };
    world.pool(&["192.0.2.0/28"])?;
    // Nobody listens at the second one.
    drop(world.servers.remove(1));
    let agent = world.agent(&["--datapath", "proxy"])?;
    world.service("web", &json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"]}), &[1, 2])?;
    let vip = world.published("web", 1)?[0];
    let connect = || who_answers(&world.lab.client, vip, 2);
    wait_for("a backend to be avoided", || {
        ensure!(connect()? == ["b1"; 2], "others take its turns");
        Ok(agent.status()?.to_string().contains("avoided for now").then_some(()))
    })?;
    ensure!(!world.reasons("web")?.iter().any(|one| one == "BackendsEjected"), "it may be back in a second");
    let told = |reason: &'static str| {
        wait_for(reason, || {
            connect()?;
            Ok(world.reasons("web")?.iter().any(|one| one == reason).then_some(()))
        })
    };
    told("BackendsEjected")?;
    ensure!(!world.reasons("web")?.iter().any(|one| one == "BackendsReturned"));
    let _server = Server::start(&world.lab.backends[1])?;
    wait_for("somebody to try it", || Ok(connect()?.contains(&"b2".to_owned()).then_some(())))?;
    told("BackendsReturned")?;
    Ok(())
}
