//! The demo: real requests through the load balancer, and what a person wants to see of it.

use std::{fmt::Write, net::SocketAddr};

use anyhow::{Context, Result, ensure};
use lb_common::abi::ABI_VERSION;
use serde_json::Value;

use crate::{
    lab::{
        Agent, Lab,
        agent::list,
        manifest::{HTTP, Port, ServiceSpec, UDP, manifest, vip},
    },
    traffic::{
        Server,
        client::{check_round_robin, tally, who_answers, who_answers_udp},
    },
};

const BACKENDS: u8 = 3;
/// Requests of each kind: a multiple of the backends, so that all get the same share.
const REQUESTS: usize = 30;

/// Builds the lab, forwards, shows, and calls `then` while everything still runs.
///
/// # Errors
/// When anything is not as it should be; the lab is removed in any case.
pub fn run(then: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    let lab = Lab::routed(BACKENDS)?;
    let _servers = Server::start_all(&lab.backends)?;
    let yaml = manifest(&[ServiceSpec::new("web", &[HTTP, UDP], &[1, 2, 3])]);
    let agent = Agent::start(&lab, &yaml)?;
    let status = agent.wait_ready()?;
    println!("{}", picture(&lab, &status)?);
    println!("== Configuration: {}\n\n{yaml}", agent.config_path().display());
    let forwarded = forward(&lab, &status).with_context(|| format!("the agent's log:\n{}", agent.log()))?;
    println!("== {REQUESTS} requests of each kind, each a connection of its own\n\n{forwarded}");
    show(&lab, &agent)?;
    then(&lab)
}

fn picture(lab: &Lab, status: &Value) -> Result<String> {
    let (web4, web6) = (vip(status, "web", false, HTTP)?, vip(status, "web", true, HTTP)?);
    let id = lab.id();
    Ok(format!(
        "== The lab: network namespaces {id}-…\n\n\
        \x20 client                    edge: pointsman run               b1 10.2.0.11 fd02::11\n\
        \x20 10.1.0.2 ───────── uplink               lan ── switch ──┬── b2 10.2.0.12 fd02::12\n\
        \x20 fd01::2            10.1.0.1        10.2.0.1             └── b3 10.2.0.13 fd02::13\n\
        \x20                    fd01::1          fd02::1\n\
        \x20        VIP of Service web: {} and {}\n",
        web4.ip(),
        web6.ip()
    ))
}

/// Sends requests of every kind; gives a line for each.
fn forward(lab: &Lab, status: &Value) -> Result<String> {
    let mut lines = String::new();
    for v6 in [false, true] {
        for (port, what) in [(HTTP, "HTTP"), (UDP, "UDP echo")] {
            let to = vip(status, "web", v6, port)?;
            let names = requests(lab, to, port)?;
            let order: Vec<&str> = names.iter().take(6).map(String::as_str).collect();
            let shares: Vec<String> =
                tally(&names).iter().map(|(name, count)| format!("{name} {count}")).collect();
            let to = to.to_string();
            writeln!(lines, "{what:<9} {to:<22} {} …   in all: {}", order.join(" "), shares.join(", "))?;
            check_round_robin(&names, usize::from(BACKENDS)).with_context(|| format!("{what} to {to}"))?;
        }
    }
    lines.push_str(
        "\nExact round-robin: every three in a row are three different backends, always in the same order.\n",
    );
    Ok(lines)
}

fn requests(lab: &Lab, to: SocketAddr, port: Port) -> Result<Vec<String>> {
    if port.protocol == "UDP" {
        who_answers_udp(&lab.client, to, REQUESTS)
    } else {
        who_answers(&lab.client, to, REQUESTS)
    }
}

fn show(lab: &Lab, agent: &Agent<'_>) -> Result<()> {
    for args in [["status", "-o", "wide"].as_slice(), &["drops"]] {
        println!("== pointsman {}\n\n{}", args.join(" "), agent.cli(args)?);
    }
    check_counters(&agent.status()?)?;
    println!("== XDP programs on the edge\n");
    for device in ["uplink", "lan"] {
        println!("{}", xdp_line(lab, device)?);
    }
    let pin = lab.pin_directory().join(format!("v{ABI_VERSION}/services"));
    let dump = lab.edge.run(["bpftool", "map", "dump", "pinned", &pin.display().to_string()])?;
    println!("\n== bpftool map dump pinned {}\n\n{}", pin.display(), used_entries(&dump));
    println!("== Step in\n\n{}", agent.hints());
    Ok(())
}

/// The native XDP program of a device, as `ip` names it.
fn xdp_line(lab: &Lab, device: &str) -> Result<String> {
    let text = lab.edge.run(["ip", "-d", "link", "show", "dev", device])?;
    // `xdpgeneric` would be one in the network stack.
    ensure!(
        text.contains(" xdp ") || text.contains(" xdpdrv "),
        "no native XDP program on {device}:\n{text}"
    );
    let program = text.lines().find(|line| line.contains("prog/xdp")).unwrap_or_default().trim();
    Ok(format!("{device}: native (in the driver), {program}"))
}

/// The counters must know about exactly what was sent.
fn check_counters(status: &Value) -> Result<()> {
    for port in list(status, "services").iter().flat_map(|service| list(service, "ports")) {
        let flows = port["counters"]["newFlows"].as_u64().unwrap_or_default();
        ensure!(flows == REQUESTS as u64, "{flows} flows were counted instead of {REQUESTS}: {port:#}");
    }
    Ok(())
}

/// Of a dumped array, the entries that are not all zero.
fn used_entries(dump: &str) -> String {
    let Ok(Value::Array(entries)) = serde_json::from_str::<Value>(dump) else { return dump.to_owned() };
    let used = entries.iter().filter(|entry| entry["value"].as_object().is_some_and(is_used));
    used.map(|entry| format!("{entry}\n")).collect()
}

fn is_used(fields: &serde_json::Map<String, Value>) -> bool {
    fields.values().any(|field| field.as_u64().unwrap_or(1) != 0)
}
