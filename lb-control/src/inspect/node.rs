//! The facts that a node is judged by: read and tried here, judged in `plan::doctor`.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::PinnedMaps;
use crate::dataplane::trial::{self, Subject};
use crate::dataplane::{KernelMaps, PinDirectory};
use crate::http::Inspect;
use crate::http::client::Client;
use crate::net::survey::{self, Survey};
use crate::net::{Filter, Kernel};
use crate::plan::doctor::{Ability, Attached, Device, Facts, Outcome, Process, Program, Role, Trial, keys};
use crate::ports::MapStore;
use crate::view::StatusView;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Question {
    /// Devices that clients come in by.
    pub link_devices: Vec<String>,
    /// Whether programs are attached to those for a moment, too.
    pub attach: bool,
    /// Whether nothing is tried at all.
    pub read_only: bool,
    /// Source ports towards backends, unless the maps tell.
    pub snat_ports: (u16, u16),
    /// Socket of the agent.
    pub socket: PathBuf,
    /// Directory of its pins.
    pub pin_directory: PathBuf,
}

/// Looks at everything.
///
/// # Errors
/// When not even devices can be listed.
pub async fn facts(question: &Question) -> Result<Facts> {
    let pins = PinDirectory::new(&question.pin_directory);
    let (status, silence) = match Client::new(&question.socket).status().await {
        Ok(Some(status)) => (Some(status), None),
        Ok(None) => (None, None),
        Err(error) => (None, Some(format!("{error:#}"))),
    };
    let agent = status.as_ref().and_then(|status| status.agent.as_ref()).map(|agent| agent.pid);
    // Without an agent, its maps and links may still be at work.
    let status = status.or_else(|| PinnedMaps::new(pins.clone()).status().ok()).unwrap_or_default();
    let kernel = Kernel::connect()?;
    let survey = survey::devices(&kernel, &question.link_devices, &backends(&status)).await?;
    let kube_proxy = survey::kube_proxy(&survey.devices).await;
    let missing_devices = survey.missing.clone();
    let devices = devices(&kernel, survey, &status).await?;
    let subjects = subjects(question, &devices);
    let trials = if question.read_only {
        let why = Outcome::Untried("--read-only".to_owned());
        vec![Trial { ability: Ability::Maps, device: String::new(), outcome: why }]
    } else {
        tokio::task::spawn_blocking(move || trial::run(&subjects)).await.context("trying")?
    };
    let devices: Vec<_> = devices.into_iter().map(|(_, device)| device).collect();
    let problems = status.problems.iter().map(|problem| format!("{}: {}", problem.subject, problem.message));
    Ok(Facts {
        release: release(),
        process: process(),
        bpf_fs: trial::bpf_fs(&question.pin_directory),
        btf: trial::btf(),
        pins: pins.display(),
        other_layouts: pins.other_versions(),
        trials,
        settings: survey::settings(&keys(devices.iter().map(|device| device.name.as_str()))),
        devices,
        missing_devices,
        default_route: survey::default_route(),
        agent,
        agent_problems: problems.chain(silence).collect(),
        kube_proxy,
        snat_ports: snat_ports(&pins).unwrap_or(question.snat_ports),
    })
}

fn backends(status: &StatusView) -> BTreeSet<IpAddr> {
    let ports = status.services.iter().flat_map(|service| &service.ports);
    ports.flat_map(|port| &port.backends).map(|backend| backend.address).collect()
}

/// Adds what BPF tells to what netlink tells.
async fn devices(kernel: &Kernel, survey: Survey, status: &StatusView) -> Result<Vec<(u32, Device)>> {
    let mut devices = survey.devices;
    for (index, device) in &mut devices {
        device.xdp = survey.xdp_programs.get(index).map(|id| trial::program(*id));
        let filters = kernel.filters(*index, false).await?;
        // Links come ahead of filters (net/core/dev.c, sch_handle_ingress).
        device.tc = trial::tcx_programs(&device.name);
        device.tc.extend(filters.into_iter().map(of_filter));
        let ours = status.devices.iter().find(|found| found.device == device.name);
        device.attached = ours.map(|found| Attached { mode: found.mode, reason: found.reason.clone() });
        if device.role == Role::Other && device.attached.is_some() {
            device.role = Role::Backends;
        }
    }
    Ok(devices)
}

fn of_filter(filter: Filter) -> Program {
    match filter.program_id {
        // Its own name tells more than what the filter was called.
        Some(id) => Some(trial::program(id)).filter(|program| !program.name.is_empty()),
        None => None,
    }
    .unwrap_or_else(|| trial::named(&filter.name))
}

/// The devices that attaching is tried on: none that an agent or others are at work on.
fn subjects(question: &Question, devices: &[(u32, Device)]) -> Vec<Subject> {
    let links = devices.iter().filter(|(_, device)| device.role == Role::Link && device.below.is_none());
    links
        .filter(|(_, device)| device.attached.is_none())
        .map(|(ifindex, device)| {
            let spared = match &device.xdp {
                Some(_) => Some("another program is attached there".to_owned()),
                None if !question.attach => {
                    Some("--attach tries it; some drivers stop for a moment then".to_owned())
                }
                None => None,
            };
            Subject { ifindex: *ifindex, name: device.name.clone(), spared }
        })
        .collect()
}

fn snat_ports(pins: &PinDirectory) -> Option<(u16, u16)> {
    if !pins.is_populated() {
        return None;
    }
    let config = KernelMaps::from_pins(pins).ok()?.config().ok()??;
    let last = config.snat_port_first.checked_add(config.snat_port_count.checked_sub(1)?)?;
    Some((config.snat_port_first, last))
}

fn release() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("Linux {}", release.trim())
}

fn process() -> Process {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    process_of(&read("/proc/self/status"), &read("/proc/self/limits"))
}

/// From `/proc/PID/status` and `/proc/PID/limits`.
fn process_of(status: &str, limits: &str) -> Process {
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Process {
        capabilities: capabilities.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0),
        open_files: limit("Max open files").unwrap_or(u64::MAX),
        locked_bytes: limit("Max locked memory"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::doctor::Capability;

    #[test]
    fn rights_of_a_process() {
        let status = "Name:\tx\nCapEff:\t000000c000003000\nCapBnd:\t000001ffffffffff\n";
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max locked memory         65536                65536                bytes     \n\
                      Max open files            1024                 524288               files     \n";
        let process = process_of(status, limits);
        assert_eq!((process.open_files, process.locked_bytes), (1_024, Some(65_536)));
        assert!(process.has(Capability::Bpf) && process.has(Capability::NetRaw));
        assert!(!process.has(Capability::SysAdmin));
        let unlimited = process_of("", &limits.replace("65536 ", "unlimited "));
        assert_eq!((unlimited.capabilities, unlimited.locked_bytes), (0, None));
    }
}
