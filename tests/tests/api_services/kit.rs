//! What the suite's tests have in common.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Error, Result, bail, ensure};
use pointsman_tests::{
    cluster_world::{ClusterWorld, bare, ingress},
    lab::{Agent, Lab, Options, wait_for},
    traffic::{ECHO_PORT, HTTP_PORT, UDP_PORT, client},
};
use serde_json::{Value, json};

/// Addresses of both families.
pub const POOL: [&str; 2] = ["192.0.2.0/28", "2001:db8:1::/124"];

/// Long enough for an answer, short enough to wait for none.
const SILENCE: Duration = Duration::from_millis(700);

/// A test with this many backends and an agent; when it fails, the agent's log is shown.
pub fn cluster(backends: u8, test: impl FnOnce(&ClusterWorld, &mut Agent<'_>) -> Result<()>) -> Result<()> {
    with(Options { backends, ..Options::default() }, &[], test)
}

/// The same with options of the lab and flags of the agent.
pub fn with(
    options: Options,
    flags: &[&str],
    test: impl FnOnce(&ClusterWorld, &mut Agent<'_>) -> Result<()>,
) -> Result<()> {
    let Some(world) = ClusterWorld::with(options)? else { return Ok(()) };
    let mut agent = world.agent(flags)?;
    let outcome = test(&world, &mut agent);
    if outcome.is_err() {
        eprintln!("--- log of the agent\n{}---", agent.log());
    }
    outcome
}

/// A port of a Service, and the one of the backends behind it.
#[derive(Clone, Copy)]
pub struct Port(pub &'static str, pub &'static str, pub u16, pub u16);

/// Who answers.
pub const HTTP: Port = Port("http", "TCP", 80, HTTP_PORT);
/// Connections that last.
pub const ECHO: Port = Port("echo", "TCP", 7, ECHO_PORT);
/// Datagrams.
pub const UDP: Port = Port("udp", "UDP", 53, UDP_PORT);

/// As Services list them.
pub fn service_ports(ports: &[Port]) -> Value {
    let ports = ports.iter().map(|Port(name, protocol, port, target)| {
        json!({"name": name, "protocol": protocol, "port": port, "targetPort": target})
    });
    ports.collect()
}

/// An endpoint on a backend; the fields of `more` come on top.
pub fn endpoint(n: u8, v6: bool, more: &Value) -> Value {
    let mut endpoint = json!({"addresses": [Lab::backend_address(n, v6)], "conditions": {"ready": true}});
    for (key, value) in more.as_object().into_iter().flatten() {
        endpoint[key] = value.clone();
    }
    endpoint
}

/// Writes a slice of a Service.
pub fn slice(
    world: &ClusterWorld,
    (service, name): (&str, &str),
    v6: bool,
    ports: &[Port],
    endpoints: &[Value],
) -> Result<()> {
    let ports: Value = ports
        .iter()
        .map(|Port(name, protocol, _, target)| json!({"name": name, "protocol": protocol, "port": target}))
        .collect();
    world.apply(
        "EndpointSlice",
        name,
        &json!({
            "metadata": {"labels": {"kubernetes.io/service-name": bare(service)}},
            "addressType": if v6 { "IPv6" } else { "IPv4" },
            "ports": ports,
            "endpoints": endpoints,
        }),
    )
}

/// One slice for each family with these backends, each with the fields of `more`.
pub fn slices(world: &ClusterWorld, service: &str, ports: &[Port], backends: &[(u8, Value)]) -> Result<()> {
    for (name, v6) in [("ipv4", false), ("ipv6", true)] {
        let endpoints: Vec<_> = backends.iter().map(|(n, more)| endpoint(*n, v6, more)).collect();
        slice(world, (service, &format!("{service}-{name}")), v6, ports, &endpoints)?;
    }
    Ok(())
}

/// Writes a Service of both families without its endpoints. What `spec` does not say is left to
/// the API server, but for the type; what an earlier call said and this one does not is taken
/// back.
pub fn service(
    world: &ClusterWorld,
    name: &str,
    ports: &[Port],
    annotations: &Value,
    spec: &Value,
) -> Result<()> {
    let mut all = json!({
        "type": "LoadBalancer",
        "ipFamilyPolicy": "PreferDualStack",
        "ports": service_ports(ports),
    });
    for (key, value) in spec.as_object().into_iter().flatten() {
        all[key] = value.clone();
    }
    world.apply("Service", name, &json!({"metadata": {"annotations": annotations}, "spec": all}))
}

/// As [`service`], with endpoints on these backends.
pub fn serve(world: &ClusterWorld, name: &str, ports: &[Port], spec: &Value, backends: &[u8]) -> Result<()> {
    service(world, name, ports, &json!({}), spec)?;
    let backends: Vec<_> = backends.iter().map(|n| (*n, json!({}))).collect();
    slices(world, name, ports, &backends)
}

/// The object.
pub fn read(world: &ClusterWorld, name: &str) -> Result<Value> {
    world.get("Service", name)?.with_context(|| format!("no Service {name}"))
}

/// The addresses of the status as they are, in the order of families.
pub fn addresses(world: &ClusterWorld, name: &str, count: usize) -> Result<Vec<IpAddr>> {
    let mut found: Vec<IpAddr> = world.published(name, count)?.iter().map(SocketAddr::ip).collect();
    found.sort();
    Ok(found)
}

/// Waits until the status shows exactly these.
pub fn wait_addresses(world: &ClusterWorld, name: &str, wanted: &[&str]) -> Result<()> {
    let what = format!("the addresses {wanted:?}");
    world.wait(&what, ("Service", name), |found| {
        let mut found = found.map(ingress).unwrap_or_default();
        found.sort();
        found == wanted
    })?;
    Ok(())
}

/// A condition of an object.
pub fn condition<'a>(object: &'a Value, kind: &str) -> &'a Value {
    let all = object["status"]["conditions"].as_array().into_iter().flatten();
    let mut of_kind = all.filter(|one| one["type"] == format!("pointsman.dev/{kind}"));
    of_kind.next().unwrap_or(&Value::Null)
}

/// Waits for a condition of a Service with this status and reason.
pub fn wait_condition(
    world: &ClusterWorld,
    name: &str,
    kind: &str,
    (status, reason): (&str, &str),
) -> Result<Value> {
    let what = format!("{kind} to be {status} by {reason}");
    let found = world.wait(&what, ("Service", name), |found| {
        found.is_some_and(|found| {
            let condition = condition(found, kind);
            condition["status"] == status && condition["reason"] == reason
        })
    })?;
    Ok(condition(&found.unwrap_or_default(), kind).clone())
}

/// Waits for an Event about a Service.
pub fn wait_event(world: &ClusterWorld, name: &str, reason: &str) -> Result<()> {
    let mut last = Vec::new();
    let waited = wait_for(&format!("an Event {reason}"), || {
        last = world.reasons(name)?;
        Ok(last.iter().any(|one| one == reason).then_some(()))
    });
    waited.with_context(|| format!("the Events of {name} are {last:?}"))
}

/// Waits until an Event at the agent's node says something; kept in `default`, as those of all Nodes.
pub fn wait_node_event(world: &ClusterWorld, reason: &str) -> Result<()> {
    wait_event(world, &format!("default/{}", world.node), reason)
}

/// Asks until there is a good answer.
pub fn eventually<T>(what: &str, mut question: impl FnMut() -> Result<T>) -> Result<T> {
    let mut last: Option<Error> = None;
    let waited = wait_for(what, || match question() {
        Ok(answer) => Ok(Some(answer)),
        Err(error) => {
            last = Some(error);
            Ok(None)
        }
    });
    waited.with_context(|| last.map_or_else(String::new, |last| format!("at last: {last:#}")))
}

/// Who answers one HTTP request.
pub fn ask(world: &ClusterWorld, to: SocketAddr) -> Result<String> {
    Ok(client::who_answers(&world.lab.client, to, 1)?.remove(0))
}

/// Who answers one datagram.
pub fn ask_udp(world: &ClusterWorld, to: SocketAddr) -> Result<String> {
    Ok(client::who_answers_udp(&world.lab.client, to, 1)?.remove(0))
}

/// That nothing at all comes back.
pub fn silent(world: &ClusterWorld, to: SocketAddr) -> Result<()> {
    let tried = world.lab.client.enter(|| TcpStream::connect_timeout(&to, SILENCE))?;
    match tried {
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(()),
        Err(error) => bail!("{to}: {error}"),
        Ok(_) => bail!("{to} can be reached"),
    }
}

/// That no VIP of the Service is left anywhere: its VirtualIPs and the addresses on the device.
pub fn released(world: &ClusterWorld, addresses: &[IpAddr]) -> Result<()> {
    let here = world.lab.edge.run(["ip", "-o", "addr", "show", "dev", "uplink"])?;
    for address in addresses {
        ensure!(!here.contains(&format!(" {address}/")), "{address} is still on the device:\n{here}");
    }
    let left = world.list("VirtualIP")?;
    let of_ours = left.iter().filter_map(|one| one["spec"]["address"].as_str()?.parse::<IpAddr>().ok());
    for left in of_ours {
        ensure!(!addresses.contains(&left), "there is still a VirtualIP for {left}");
    }
    Ok(())
}

/// That requests all come to one backend.
pub fn sticks(world: &ClusterWorld, to: SocketAddr) -> Result<String> {
    let names = client::who_answers(&world.lab.client, to, 9)?;
    ensure!(client::tally(&names).len() == 1, "{names:?}");
    Ok(names[0].clone())
}
