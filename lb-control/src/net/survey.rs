//! The devices of a node and its settings, for whoever looks for what is wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::address::AddressMessage;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::generic::Generic;
use super::{Kernel, addresses, local_address};
use crate::plan::doctor::{Device, KubeProxy, Role};

/// More backends are not asked for: the devices that they are behind are few.
const BACKENDS: usize = 2_000;
/// Where kube-proxy tells its mode (`--metrics-bind-address`).
const KUBE_PROXY: &str = "127.0.0.1:10249";
/// It answers at once or not at all.
const PATIENCE: Duration = Duration::from_secs(1);
/// The device that kube-proxy makes in mode `ipvs`.
const IPVS_DEVICE: &str = "kube-ipvs0";

/// What netlink tells.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// All devices but the loopback device, with their index.
    pub devices: Vec<(u32, Device)>,
    /// The kernel's number of the XDP program on a device.
    pub xdp_programs: BTreeMap<u32, u32>,
    /// Link devices that do not exist.
    pub missing: Vec<String>,
}

/// Looks at all devices. `link` are those that clients come in by.
///
/// # Errors
/// When the kernel refuses.
pub async fn devices(kernel: &Kernel, link: &[String], backends: &BTreeSet<IpAddr>) -> Result<Survey> {
    let links = kernel.links().await?;
    let mut towards_backends = BTreeSet::new();
    for backend in backends.iter().take(BACKENDS) {
        if let Some(route) = kernel.route(*backend).await? {
            towards_backends.insert(route.ifindex);
        }
    }
    let mut by_device = subnets(kernel).await?;
    let mut survey = Survey::default();
    let is_there = |name: &&String| links.values().any(|found| found.name == **name);
    survey.missing = link.iter().filter(|name| !is_there(name)).cloned().collect();
    // Frames of a VLAN device come in by the one below.
    let below = |name: &String| {
        let found = links.values().find(|one| one.name == *name)?;
        found.vlan.and(found.parent)
    };
    let below: BTreeSet<u32> = link.iter().filter_map(below).collect();
    // Older kernels do not have it; then it is not known.
    let drivers = Generic::connect().ok();
    let name = |index: u32| links.get(&index).map(|found| found.name.clone());
    for (index, found) in links.iter().filter(|(_, found)| !found.is_loopback) {
        let role = if link.contains(&found.name) || below.contains(index) {
            Role::Link
        } else if towards_backends.contains(index) {
            Role::Backends
        } else {
            Role::Other
        };
        let device = Device {
            name: found.name.clone(),
            role,
            mtu: found.mtu,
            is_up: found.is_up,
            is_ethernet: found.mac.is_some(),
            below: found.vlan.and(found.parent).and_then(name),
            above: found.master.and_then(name),
            driver: driver(&found.name, *index),
            addresses: by_device.remove(index).unwrap_or_default(),
            ..Device::default()
        };
        let features = drivers.as_ref().and_then(|drivers| drivers.features(*index).ok());
        let is_on = |feature: &str| Some(features.as_ref()?.iter().any(|one| one == feature));
        let device = Device {
            lro: is_on("rx-lro"),
            gro_in_hardware: is_on("rx-gro-hw"),
            driver_has_xdp: drivers.as_ref().and_then(|drivers| drivers.has_xdp(*index).ok()),
            ..device
        };
        survey.xdp_programs.extend(found.xdp_program.map(|id| (*index, id)));
        survey.devices.push((*index, device));
    }
    Ok(survey)
}

/// Addresses with their subnet, by device; none of ours.
async fn subnets(kernel: &Kernel) -> Result<BTreeMap<u32, Vec<IpNet>>> {
    let messages: Vec<AddressMessage> =
        kernel.handle().address().get().execute().try_collect().await.context("listing addresses")?;
    let mut all: BTreeMap<u32, Vec<IpNet>> = BTreeMap::new();
    for message in messages.iter().filter(|message| !addresses::is_ours(message)) {
        let address = local_address(&message.attributes);
        if let Some(net) = address.and_then(|one| IpNet::new(one, message.header.prefix_len).ok()) {
            all.entry(message.header.index).or_default().push(net);
        }
    }
    Ok(all)
}

/// The driver of a device that is hardware. `/sys` may be that of another network namespace, where the
/// name is another device's.
fn driver(name: &str, ifindex: u32) -> Option<String> {
    let directory = format!("/sys/class/net/{name}");
    let index = fs::read_to_string(format!("{directory}/ifindex")).ok()?;
    if index.trim() != ifindex.to_string() {
        return None;
    }
    let target = fs::read_link(format!("{directory}/device/driver")).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

/// Settings by their path below `/proc/sys`, without those that do not exist or may not be read.
#[must_use]
pub fn settings(paths: &[String]) -> BTreeMap<String, String> {
    let read = |path: &String| {
        let text = fs::read_to_string(format!("/proc/sys/{path}")).ok()?;
        Some((path.clone(), text.trim().to_owned()))
    };
    paths.iter().filter_map(read).collect()
}

/// The device of the IPv4 default route with the best metric.
#[must_use]
pub fn default_route() -> Option<String> {
    first_default(&fs::read_to_string("/proc/net/route").ok()?)
}

/// Columns: device, destination, gateway, flags, two that are unused, metric, mask.
fn first_default(table: &str) -> Option<String> {
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let defaults = rows.filter(|row| row.get(1) == Some(&"00000000") && row.get(7) == Some(&"00000000"));
    let best = defaults.min_by_key(|row| row[6].parse().unwrap_or(u32::MAX))?;
    Some(best[0].to_owned())
}

/// Looks for kube-proxy.
pub async fn kube_proxy(devices: &[(u32, Device)]) -> KubeProxy {
    let mode = tokio::time::timeout(PATIENCE, ask_kube_proxy()).await.ok().flatten();
    KubeProxy { mode, has_ipvs_device: devices.iter().any(|(_, device)| device.name == IPVS_DEVICE) }
}

async fn ask_kube_proxy() -> Option<String> {
    let mut stream = TcpStream::connect(KUBE_PROXY).await.ok()?;
    stream.write_all(b"GET /proxyMode HTTP/1.0\r\n\r\n").await.ok()?;
    let mut answer = String::new();
    stream.take(4_096).read_to_string(&mut answer).await.ok()?;
    read_mode(&answer)
}

/// The body of an answer, if it is a word.
fn read_mode(answer: &str) -> Option<String> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let is_good = head.split_whitespace().nth(1) == Some("200");
    let is_word = !body.trim().is_empty() && body.trim().chars().all(|c| c.is_ascii_alphanumeric());
    (is_good && is_word).then(|| body.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_route_with_the_best_metric() {
        let head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n";
        let row = |device: &str, destination: &str, metric: u32, mask: &str| {
            format!("{device}\t{destination}\t0100000A\t0003\t0\t0\t{metric}\t{mask}\t0\t0\t0\n")
        };
        let other = row("lan", "0000000A", 0, "00FFFFFF");
        assert_eq!(first_default(&format!("{head}{other}")), None);
        let two = row("wlan0", "00000000", 600, "00000000") + &row("eth0", "00000000", 100, "00000000");
        assert_eq!(first_default(&format!("{head}{other}{two}")).as_deref(), Some("eth0"));
        assert_eq!(first_default(""), None);
    }

    #[test]
    fn what_kube_proxy_answers() {
        let answer =
            |status: &str, body: &str| format!("HTTP/1.0 {status}\r\nContent-Length: 4\r\n\r\n{body}");
        assert_eq!(read_mode(&answer("200 OK", "ipvs")).as_deref(), Some("ipvs"));
        assert_eq!(read_mode(&answer("404 Not Found", "ipvs")), None);
        assert_eq!(read_mode(&answer("200 OK", "<html>")), None);
        assert_eq!(read_mode("ipvs"), None);
    }
}
