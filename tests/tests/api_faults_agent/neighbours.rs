//! Others who write, and quiet.

use std::{
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use pointsman_tests::{
    apiserver::Verb,
    cluster_world::{METRICS, ingress},
    lab::{is_proxied, wait_for},
};
use serde_json::json;

use super::{ask, double, world, writes};

/// How long it has to be quiet. There is nothing to wait for: it is about what does not happen.
const QUIET: Duration = Duration::from_secs(10);

/// What the agent of this network namespace counts.
fn metrics() -> Result<String> {
    let mut stream = TcpStream::connect(METRICS)?;
    stream.set_read_timeout(Some(QUIET))?;
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: edge\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

#[test]
fn a_rival_who_writes_the_status_is_not_fought() -> Result<()> {
    let Some(world) = world(1)? else { return Ok(()) };
    let _agent = world.agent(&[])?;
    world.service("web", &json!({}), &[1])?;
    let vips = world.published("web", 2)?;
    double(&world)?.forget_requests();
    let theirs = json!({"loadBalancer": {"ingress": [{"ip": "198.51.100.9", "ipMode": "VIP"}]}});
    world.seize_status("Service", "web", "rival", &theirs)?;
    wait_for("an Event", || Ok(world.reasons("web")?.iter().any(|it| it == "StatusConflict").then_some(())))?;
    thread::sleep(QUIET);
    let attempts = writes(&world)?.iter().filter(|it| it.subresource == "status").count();
    ensure!((1..=8).contains(&attempts), "{attempts} writes of the status");
    let events = world.reasons("web")?;
    ensure!(events.iter().filter(|it| *it == "StatusConflict").count() == 1, "{events:?}");
    let found = world.get("Service", "web")?.unwrap_or_default();
    ensure!(ingress(&found) == ["198.51.100.9"], "the rival's status stays: {found:#}");
    ask(&world, vips[0])?;
    let metrics = world.lab.edge.enter(metrics)??;
    let counted = metrics.lines().any(|line| line.contains("conflict") && !line.ends_with(" 0"));
    ensure!(counted, "{metrics}");
    Ok(())
}

#[test]
fn at_rest_only_leases_are_written() -> Result<()> {
    let Some(world) = world(1)? else { return Ok(()) };
    let _agent = world.agent(&[])?;
    world.service("web", &json!({}), &[1])?;
    world.published("web", 2)?;
    // The Event is the last that is written about it.
    wait_for("an Event", || Ok(world.reasons("web")?.iter().any(|it| it == "Announced").then_some(())))?;
    double(&world)?.forget_requests();
    thread::sleep(QUIET);
    let all = double(&world)?.requests();
    let ours = all.iter().filter(|it| it.user_agent.starts_with("pointsman/"));
    let others: Vec<_> = ours.filter(|it| it.resource != "leases").collect();
    ensure!(others.is_empty(), "{others:#?}");
    ensure!(all.iter().any(|it| it.verb == Verb::Update && it.changed), "Leases are renewed: {all:#?}");

    for n in 0..20 {
        let note = json!({"metadata": {"annotations": {"example.org/note": n.to_string()}}});
        world.patch("Service", "web", &note)?;
    }
    // Later than those in the same watch.
    world.service("last", &json!({}), &[1])?;
    world.published("last", 2)?;
    let writes = writes(&world)?;
    let about: Vec<_> = writes.iter().filter(|it| it.name == "web").collect();
    ensure!(about.is_empty(), "{about:#?}");
    Ok(())
}

#[test]
fn a_thousand_changes_in_a_row_converge() -> Result<()> {
    let Some(world) = world(2)? else { return Ok(()) };
    let _agent = world.agent(&[])?;
    world.service("web", &json!({}), &[1])?;
    let vips = world.published("web", 2)?;
    double(&world)?.forget_requests();
    for n in 0..1000_u16 {
        let port = if n == 999 { 81 } else { 1000 + n };
        let ports = json!({"spec": {"ports": [{
            "name": "http", "port": port, "targetPort": pointsman_tests::traffic::HTTP_PORT, "protocol": "TCP",
        }]}});
        world.patch("Service", "web", &ports)?;
    }
    let mut vip = vips[0];
    vip.set_port(81);
    wait_for("the last port", || Ok(ask(&world, vip).is_ok().then_some(())))?;
    wait_for("the others to be gone", || {
        let mut other = vip;
        other.set_port(1998);
        Ok(ask(&world, other).is_err().then_some(()))
    })?;
    ensure!(world.published("web", 2)? == vips, "the addresses stay");
    // Events about its start may come late. So has one write of the status on a busy machine; if changes
    // caused any, they would be many.
    let writes: Vec<_> = writes(&world)?.into_iter().filter(|it| it.resource != "events").collect();
    ensure!(writes.len() <= 1, "{writes:#?}");
    Ok(())
}

#[test]
fn what_an_unclean_end_left_is_taken_off() -> Result<()> {
    let Some(world) = world(1)? else { return Ok(()) };
    let mut agent = world.agent(&[])?;
    world.service("web", &json!({}), &[1])?;
    world.service("kept", &json!({}), &[1])?;
    let gone = world.published("web", 2)?;
    let kept = world.published("kept", 2)?;
    agent.kill();
    if !is_proxied() {
        std::fs::remove_dir_all(world.lab.pin_directory())?;
    }
    // Nobody else ends what it began.
    world.patch("Service", "web", &json!({"metadata": {"finalizers": null}}))?;
    world.delete("Service", "web")?;
    // And one that has waited meanwhile.
    let wish = json!({"pointsman.dev/load-balancer-ips": "192.0.2.9,2001:db8:1::9"});
    world.service("new", &json!({}), &[1])?;
    world.patch("Service", "new", &json!({"metadata": {"annotations": wish}}))?;
    agent.run()?;
    world.wait("its VirtualIP to go", ("VirtualIP", &gone[0].ip().to_string()), |vip| vip.is_none())?;
    let new = world.published("new", 2)?;
    wait_for("the addresses of Services that there are", || {
        let text = world.lab.edge.run(["ip", "-o", "addr", "show", "dev", "uplink"])?;
        let has = |vip: &std::net::SocketAddr| text.contains(&format!(" {}/", vip.ip()));
        Ok((kept.iter().chain(&new).all(has) && !gone.iter().any(has)).then_some(()))
    })?;
    ensure!(world.published("kept", 2)? == kept, "nothing is renumbered");
    ask(&world, kept[0])?;
    ask(&world, new[0])?;
    Ok(())
}
