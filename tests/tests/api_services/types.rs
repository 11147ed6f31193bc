//! Services that come, change and leave: whose they are, and what is written on them.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use pointsman_tests::{lab::Options, traffic::probe};
use serde_json::{Value, json};

use super::kit::{
    HTTP, POOL, Port, UDP, addresses, ask, ask_udp, cluster, condition, eventually, read, released, serve,
    service, wait_addresses, wait_condition, wait_event, with,
};

const FINALIZER: &str = "pointsman.dev/cleanup";
const FINALIZER_KUBERNETES: &str = "service.kubernetes.io/load-balancer-cleanup";

fn finalizers(service: &Value) -> Vec<&str> {
    let all = service["metadata"]["finalizers"].as_array();
    all.into_iter().flatten().filter_map(Value::as_str).collect()
}

/// "should be able to change the type and ports of a TCP service", and of a UDP service.
#[test]
fn type_and_ports_change() -> Result<()> {
    cluster(1, |world, _| {
        world.pool(&POOL)?;
        serve(world, "web", &[HTTP, UDP], &json!({"type": "ClusterIP"}), &[1])?;
        serve(world, "other", &[HTTP], &json!({}), &[1])?;
        world.published("other", 2)?;
        let web = read(world, "web")?;
        ensure!(finalizers(&web).is_empty() && condition(&web, "Allocated").is_null(), "{web:#}");

        serve(world, "web", &[HTTP, UDP], &json!({}), &[1])?;
        let vips = addresses(world, "web", 2)?;
        for vip in &vips {
            ask(world, SocketAddr::new(*vip, 80))?;
            ask_udp(world, SocketAddr::new(*vip, 53))?;
        }

        let moved = [Port("http", "TCP", 81, HTTP.3), Port("udp", "UDP", 54, UDP.3)];
        serve(world, "web", &moved, &json!({}), &[1])?;
        for vip in &vips {
            eventually("the new TCP port", || ask(world, SocketAddr::new(*vip, 81)))?;
            eventually("the new UDP port", || {
                ensure!(probe::udp(&world.lab.client, SocketAddr::new(*vip, 54))?.error.is_none(), "refused");
                Ok(())
            })?;
            ensure!(
                probe::tcp(&world.lab.client, SocketAddr::new(*vip, 80))?.error.is_some(),
                "the old port"
            );
        }
        ensure!(addresses(world, "web", 2)? == vips, "other addresses");

        serve(world, "web", &moved, &json!({"type": "ClusterIP"}), &[1])?;
        wait_addresses(world, "web", &[])?;
        world.wait("the finalizers to go", ("Service", "web"), |found| {
            found.is_some_and(|found| finalizers(found).is_empty() && condition(found, "Allocated").is_null())
        })?;
        released(world, &vips)?;
        ask(world, world.published("other", 2)?[0])?;
        Ok(())
    })
}

/// "should handle load balancer cleanup finalizer for service".
#[test]
fn finalizers_come_and_go() -> Result<()> {
    cluster(1, |world, _| {
        world.pool(&POOL)?;
        serve(world, "plain", &[HTTP], &json!({}), &[1])?;
        serve(world, "classy", &[HTTP], &json!({"loadBalancerClass": "pointsman.dev/pointsman"}), &[1])?;
        let vips = [addresses(world, "plain", 2)?, addresses(world, "classy", 2)?].concat();
        let plain = read(world, "plain")?;
        let mut found = finalizers(&plain);
        found.sort_unstable();
        ensure!(found == [FINALIZER, FINALIZER_KUBERNETES], "{found:?}");
        let classy = read(world, "classy")?;
        ensure!(finalizers(&classy) == [FINALIZER], "{:?}", finalizers(&classy));
        for name in ["plain", "classy"] {
            world.delete("Service", name)?;
            world.wait("the Service to go", ("Service", name), |found| found.is_none())?;
        }
        released(world, &vips)
    })
}

/// "should be able to create LoadBalancer Service without NodePort".
#[test]
fn no_node_port_is_needed() -> Result<()> {
    cluster(1, |world, _| {
        world.pool(&POOL)?;
        serve(world, "web", &[HTTP], &json!({"allocateLoadBalancerNodePorts": false}), &[1])?;
        for vip in world.published("web", 2)? {
            ask(world, vip)?;
        }
        let web = read(world, "web")?;
        ensure!(web["spec"]["ports"][0]["nodePort"].is_null(), "{:#}", web["spec"]);
        Ok(())
    })
}

#[test]
fn services_of_others_are_not_touched() -> Result<()> {
    let flags = ["--default-class=false"];
    with(Options { backends: 1, ..Options::default() }, &flags, |world, _| {
        world.pool(&POOL)?;
        serve(world, "theirs", &[HTTP], &json!({"loadBalancerClass": "example.com/theirs"}), &[1])?;
        serve(world, "nobodys", &[HTTP], &json!({}), &[1])?;
        let status =
            json!({"status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.9", "ipMode": "Proxy"}]}}});
        world.patch_status("Service", "theirs", &status)?;
        let before = [read(world, "theirs")?, read(world, "nobodys")?];
        serve(world, "ours", &[HTTP], &json!({"loadBalancerClass": "pointsman.dev/pointsman"}), &[1])?;
        world.published("ours", 2)?;
        world.delete("Service", "ours")?;
        world.wait("ours to go", ("Service", "ours"), |found| found.is_none())?;
        ensure!(before == [read(world, "theirs")?, read(world, "nobodys")?], "{before:#?}");
        Ok(())
    })
}

#[test]
fn what_cannot_be_served_is_told() -> Result<()> {
    cluster(1, |world, _| {
        world.pool(&POOL)?;
        let ports = [HTTP, Port("sctp", "SCTP", 80, 80)];
        serve(world, "web", &ports, &json!({}), &[1])?;
        for vip in world.published("web", 2)? {
            ask(world, vip)?;
        }
        eventually("an Event about SCTP", || {
            let events = world.list("Event")?;
            let told = events.iter().any(|event| {
                event["regarding"]["name"] == "web" && event["note"].to_string().contains("SCTP")
            });
            ensure!(told, "{events:#?}");
            Ok(())
        })
    })
}

#[test]
fn external_ips_are_ours_and_theirs() -> Result<()> {
    let flags = ["--publish-external-ips"];
    with(Options { backends: 1, ..Options::default() }, &flags, |world, _| {
        world.pool(&POOL)?;
        service(world, "web", &[HTTP], &json!({}), &json!({}))?;
        world.patch("Service", "web", &json!({"spec": {"externalIPs": ["198.51.100.9"]}}))?;
        let vips = addresses(world, "web", 2)?;
        world.wait("externalIPs", ("Service", "web"), |found| {
            let all = found.map(|found| found["spec"]["externalIPs"].to_string()).unwrap_or_default();
            all.contains("198.51.100.9") && vips.iter().all(|vip| all.contains(&format!("\"{vip}\"")))
        })?;
        service(world, "web", &[HTTP], &json!({}), &json!({"type": "ClusterIP"}))?;
        world.wait("ours to go", ("Service", "web"), |found| {
            found.is_some_and(|found| {
                found["spec"]["externalIPs"] == json!(["198.51.100.9"]) && finalizers(found).is_empty()
            })
        })?;
        Ok(())
    })
}

/// "should only allow access from service loadbalancer source ranges" and all others begin with it:
/// a Service waits without an address, has one, and says who announces it.
#[test]
fn the_status_tells_what_happens() -> Result<()> {
    cluster(1, |world, _| {
        serve(world, "web", &[HTTP], &json!({}), &[1])?;
        let waiting = wait_condition(world, "web", "Allocated", ("False", "FamilyUnavailable"))?;
        ensure!(waiting["message"].to_string().contains("pool"), "{waiting:#}");
        wait_addresses(world, "web", &[])?;
        world.pool(&POOL)?;
        let vips = addresses(world, "web", 2)?;
        let allocated = wait_condition(world, "web", "Allocated", ("True", "AddressAllocated"))?;
        let announced = wait_condition(world, "web", "Announced", ("True", "Announced"))?;
        for vip in vips {
            ensure!(allocated["message"].to_string().contains(&vip.to_string()), "{allocated:#}");
            ensure!(
                announced["message"].to_string().contains(&format!("{vip} by node {}", world.node)),
                "{announced:#}"
            );
        }
        for reason in ["FamilyUnavailable", "AddressAllocated", "Announced"] {
            wait_event(world, "web", reason)?;
        }
        Ok(())
    })
}
