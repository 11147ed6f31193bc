//! Services and backends come and go under traffic.

use anyhow::Result;
use pointsman_tests::{
    lab::{
        agent::{is_served, list},
        manifest::{ECHO, HTTP, ServiceSpec, UDP, manifest, vip},
    },
    traffic::{
        client::{check_round_robin, who_answers, who_answers_udp},
        load::Load,
        ping_pong::PingPong,
        probe,
    },
    world::{World, both, web, web_service},
};
use serde_json::Value;

/// Whether every port of the Service `web` has this many backends, all of them active.
fn has_backends(status: &Value, count: usize) -> bool {
    list(status, "services").iter().filter(|service| service["name"] == "web").all(|service| {
        is_served(service)
            && list(service, "ports").iter().all(|port| {
                let backends = list(port, "backends");
                backends.len() == count && backends.iter().all(|backend| backend["state"] == "active")
            })
    })
}

#[test]
fn backends_come_and_go_under_load_without_an_error() -> Result<()> {
    let Some(world) = World::new(3)? else { return Ok(()) };
    let (agent, status) = world.web(&[1, 2])?;
    let [to, _] = both(&status, HTTP)?;
    let load = Load::start(&world.lab.client, to, 4, u64::MAX);
    for _ in 0..3 {
        load.wait_requests(200)?;
        agent.write_config(&web(&[1, 2, 3]))?;
        agent.wait_status("a third backend", |status| has_backends(status, 3))?;
        load.wait_requests(200)?;
        // Terminating first, as in Kubernetes: those who are connected finish.
        agent.write_config(&manifest(&[web_service(&[1, 2, 3]).terminating(3)]))?;
        agent.wait_status("a terminating backend", |status| !has_backends(status, 3))?;
        load.wait_requests(50)?;
        let settled = world.servers[2].accepted();
        load.wait_requests(200)?;
        assert!(settled > 0, "it took part before");
        assert_eq!(world.servers[2].accepted(), settled, "it takes no new connection");
        agent.write_config(&web(&[1, 2]))?;
        agent.wait_status("two backends", |status| has_backends(status, 2))?;
    }
    let report = load.stop()?;
    assert!(report.errors.is_empty() && report.answers.len() == 3, "{report:?}");
    check_round_robin(&who_answers(&world.lab.client, to, 10)?, 2)
}

#[test]
fn terminating_backend_keeps_its_connections_and_a_removed_one_resets_them() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let (agent, status) = world.web(&[1])?;
    let [to, to6] = both(&status, ECHO)?;
    let flows = [PingPong::start(&world.lab.client, to, 3)?, PingPong::start(&world.lab.client, to6, 3)?];
    agent.write_config(&manifest(&[web_service(&[1, 2]).terminating(1)]))?;
    agent.wait_status("a terminating backend", |status| {
        !has_backends(status, 1) && !has_backends(status, 2)
    })?;
    let [http, _] = both(&status, HTTP)?;
    assert_eq!(who_answers(&world.lab.client, http, 3)?, ["b2"; 3]);
    for flows in &flows {
        flows.wait_exchanges(50)?;
    }
    agent.write_config(&web(&[2]))?;
    for flows in flows {
        let report = flows.wait_broken()?;
        assert_eq!(report.broken.len(), 3);
        assert!(report.broken.iter().all(|why| why.contains("reset by peer")), "{report:?}");
    }
    Ok(())
}

#[test]
fn without_backends_connections_are_refused_at_once() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let agent = pointsman_tests::lab::Agent::start(&world.lab, &web(&[]))?;
    let status = agent.wait_status("a Service without backends", |status| {
        list(status, "services").iter().any(|service| service["state"] == "no-backends")
    })?;
    for v6 in [false, true] {
        let refusal = probe::tcp(&world.lab.client, vip(&status, "web", v6, HTTP)?)?;
        assert!(refusal.at_once(), "{refusal:?}");
        let refusal = probe::udp(&world.lab.client, vip(&status, "web", v6, UDP)?)?;
        assert!(refusal.at_once(), "{refusal:?}");
    }
    agent.write_config(&web(&[1]))?;
    agent.wait_ready()?;
    assert_eq!(who_answers(&world.lab.client, vip(&status, "web", false, HTTP)?, 1)?, ["b1"]);
    Ok(())
}

#[test]
fn a_service_is_added_while_others_run() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let (agent, status) = world.web(&[1, 2])?;
    let flows = PingPong::start(&world.lab.client, both(&status, ECHO)?[0], 4)?;
    agent.write_config(&manifest(&[web_service(&[1, 2]), ServiceSpec::new("more", &[HTTP], &[2])]))?;
    let status = agent.wait_status("two Services", |status| {
        let services = list(status, "services");
        services.len() == 2 && services.iter().all(is_served)
    })?;
    for v6 in [false, true] {
        assert_eq!(who_answers(&world.lab.client, vip(&status, "more", v6, HTTP)?, 3)?, ["b2"; 3]);
    }
    flows.wait_exchanges(20)?;
    let report = flows.stop()?;
    assert!(report.broken.is_empty(), "{report:?}");
    Ok(())
}

#[test]
fn bad_yaml_is_reported_and_changes_nothing() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let (agent, status) = world.web(&[1, 2])?;
    agent.write_config("apiVersion: v1\nkind: Service\nmetadata: {name: web\n")?;
    agent.wait_status("a problem with services.yaml", |status| {
        list(status, "problems").iter().any(|problem| problem.to_string().contains("services.yaml"))
    })?;
    let [to, _] = both(&status, HTTP)?;
    check_round_robin(&who_answers(&world.lab.client, to, 6)?, 2)?;
    agent.write_config(&web(&[2]))?;
    agent.wait_status("the problem to go", |status| {
        list(status, "problems").is_empty() && has_backends(status, 1)
    })?;
    assert_eq!(who_answers(&world.lab.client, to, 3)?, ["b2"; 3]);
    Ok(())
}

#[test]
fn two_services_share_an_address() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let shared = |name, port, backend| {
        ServiceSpec::new(name, &[port], &[backend])
            .annotated("pointsman.dev/allow-shared-ip", "one")
            .annotated("pointsman.dev/load-balancer-ips", "203.0.113.5,2001:db8:f::5")
    };
    let agent = pointsman_tests::lab::Agent::start(
        &world.lab,
        &manifest(&[shared("web", HTTP, 1), shared("dns", UDP, 2)]),
    )?;
    let status = agent.wait_ready()?;
    for v6 in [false, true] {
        let (web, dns) = (vip(&status, "web", v6, HTTP)?, vip(&status, "dns", v6, UDP)?);
        assert_eq!(web.ip(), dns.ip());
        assert_eq!(who_answers(&world.lab.client, web, 3)?, ["b1"; 3]);
        assert_eq!(who_answers_udp(&world.lab.client, dns, 3)?, ["b2"; 3]);
    }
    // One goes: the address stays for the other.
    agent.write_config(&manifest(&[shared("dns", UDP, 2)]))?;
    agent.wait_status("one Service", |status| list(status, "services").len() == 1)?;
    assert_eq!(who_answers_udp(&world.lab.client, vip(&status, "dns", false, UDP)?, 3)?, ["b2"; 3]);
    Ok(())
}
