//! Settings of the kernel below `/proc/sys`.

use ipnet::IpNet;

use super::facts::{Device, Facts, Role};
use super::{error, note, ok, warning};
use crate::view::FindingView;

const FORWARD_V4: &str = "net/ipv4/ip_forward";
const FORWARD_V6: &str = "net/ipv6/conf/all/forwarding";
const LOCAL_PORTS: &str = "net/ipv4/ip_local_port_range";
const RESERVED_PORTS: &str = "net/ipv4/ip_local_reserved_ports";
const JIT: &str = "net/core/bpf_jit_enable";

/// Paths of all settings that are judged, for these devices.
#[must_use]
pub fn keys<'a>(devices: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let mut all: Vec<_> =
        [FORWARD_V4, FORWARD_V6, LOCAL_PORTS, RESERVED_PORTS, JIT].map(str::to_owned).into();
    for device in devices.into_iter().chain(["all"]) {
        let v4 = ["rp_filter", "arp_ignore", "arp_announce", "forwarding"];
        all.extend(v4.map(|name| of("ipv4", device, name)));
        all.extend(["forwarding", "disable_ipv6", "accept_ra"].map(|name| of("ipv6", device, name)));
    }
    all
}

/// The path of a device's setting.
fn of(family: &str, device: &str, name: &str) -> String {
    format!("net/{family}/conf/{device}/{name}")
}

/// A path as sysctl(8) is used to it. Dots in the names of devices would be taken for slashes.
fn shown(path: &str) -> String {
    if path.contains('.') { path.to_owned() } else { path.replace('/', ".") }
}

fn set(path: &str, value: impl std::fmt::Display) -> String {
    format!("sysctl -w {}={value}, and in /etc/sysctl.d for the next boot", shown(path))
}

pub(super) fn judge(facts: &Facts, found: &mut Vec<FindingView>) {
    compiler(facts, found);
    forwarding(facts, found);
    ports(facts, found);
    for device in facts.used_devices() {
        rp_filter(facts, device, found);
    }
    for device in facts.link_devices() {
        arp_answers(facts, device, found);
        arp(facts, device, found);
        ipv6(facts, device, found);
    }
}

fn compiler(facts: &Facts, found: &mut Vec<FindingView>) {
    match facts.number(JIT) {
        Some(0) => found.push(
            error("jit", "BPF programs are interpreted: ours cannot be loaded, since they call each other")
                .about(shown(JIT))
                .remedy(set(JIT, 1)),
        ),
        Some(_) => found.push(ok("jit", "BPF programs are compiled").about(shown(JIT))),
        // Only the first network namespace has the setting.
        None => {}
    }
}

fn forwarding(facts: &Facts, found: &mut Vec<FindingView>) {
    for path in [FORWARD_V4, FORWARD_V6] {
        let Some(value) = facts.number(path) else { continue };
        let name = shown(path);
        if value > 0 {
            found.push(ok("forwarding", "the node forwards").about(name));
            continue;
        }
        let message = "the node does not forward: packets do not reach backends in pods of this node, and clients \
                       are answered by the way they came, whatever the routes say (bpf_fib_lookup asks for it)";
        found.push(warning("forwarding", message).about(name).remedy(set(path, 1)));
    }
    for device in facts.used_devices() {
        let path = of("ipv4", &device.name, "forwarding");
        if facts.number(FORWARD_V4).is_some_and(|all| all > 0) && facts.number(&path) == Some(0) {
            let message = "it is excepted from forwarding: what comes in by it reaches no pod of this node, and \
                           replies are not routed anew";
            found.push(warning("forwarding", message).about(shown(&path)).remedy(set(&path, 1)));
        }
    }
}

/// Whether the kernel gives connections of the node itself ports that we take.
fn ports(facts: &Facts, found: &mut Vec<FindingView>) {
    const CHECK: &str = "source-ports";
    let Some(local) = facts.settings.get(LOCAL_PORTS).and_then(|text| range(text)) else { return };
    let (first, last) = facts.snat_ports;
    let shared = first.max(local.0)..=last.min(local.1);
    let reserved = facts.settings.get(RESERVED_PORTS).map(|text| ranges(text)).unwrap_or_default();
    let is_reserved = |port: u16| reserved.iter().any(|(from, to)| (*from..=*to).contains(&port));
    let free = shared.clone().filter(|port| !is_reserved(*port)).count();
    if free == 0 {
        return found.push(ok(
            CHECK,
            format!("towards backends {first}-{last}, of the node's own connections {}-{}", local.0, local.1),
        ));
    }
    let (from, to) = (shared.start(), shared.end());
    let message = format!(
        "the node's own connections take their ports from {}-{}, ours towards backends from {first}-{last}: if both \
         have one of the {free} shared ports to the same backend, one of them breaks",
        local.0, local.1
    );
    let remedy = format!(
        "sysctl -w {}={from}-{to} (besides what is reserved already), or choose --snat-ports apart from it",
        shown(RESERVED_PORTS)
    );
    found.push(warning(CHECK, message).about(shown(LOCAL_PORTS)).remedy(remedy));
}

/// Two numbers with white space between.
fn range(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.trim().split_once(char::is_whitespace)?;
    Some((first.parse().ok()?, last.trim().parse().ok()?))
}

/// `8080,30000-32767`.
fn ranges(text: &str) -> Vec<(u16, u16)> {
    let one = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some((first.trim().parse().ok()?, last.trim().parse().ok()?))
    };
    text.split(',').filter_map(one).collect()
}

/// The larger of the device's and everybody's counts (Documentation/networking/ip-sysctl.rst).
fn larger(facts: &Facts, device: &str, name: &str) -> Option<(u64, String)> {
    let paths = [of("ipv4", device, name), of("ipv4", "all", name)];
    let values = paths.into_iter().filter_map(|path| Some((facts.number(&path)?, path)));
    values.reduce(|one, other| if other.0 > one.0 { other } else { one })
}

/// What XDP or TC send on never meets the filter; what they leave to the stack does: packets to
/// backends on this node, with the client's address as their source.
fn rp_filter(facts: &Facts, device: &Device, found: &mut Vec<FindingView>) {
    const CHECK: &str = "rp-filter";
    let Some((value, path)) = larger(facts, &device.name, "rp_filter") else { return };
    if value != 1 {
        return found.push(ok(CHECK, format!("{value}: not strict")).about(&device.name));
    }
    if device.role != Role::Link {
        // Backends answer by the device that leads to them.
        return found.push(ok(CHECK, "strict, which replies of backends satisfy").about(&device.name));
    }
    // Strict: the route back to the source must leave by the device the packet came in by. The
    // larger value counts, so 2 at the device is enough.
    let way_out = set(&of("ipv4", &device.name, "rp_filter"), 2);
    let elsewhere = facts.default_route.as_ref().filter(|route| **route != device.name);
    found.push(match elsewhere {
        Some(route) => warning(
            CHECK,
            format!(
                "strict ({} is 1), while the default route leaves by {route}: packets of clients to backends on this \
                 node are dropped, unless another route leads back by {}",
                shown(&path),
                device.name
            ),
        )
        .about(&device.name)
        .remedy(way_out),
        None => note(
            CHECK,
            format!(
                "strict ({} is 1): packets to backends on this node are dropped if the route back to the client \
                 leaves by another device",
                shown(&path)
            ),
        )
        .about(&device.name)
        .remedy(format!("if there are such clients: {way_out}")),
    });
}

/// Whether the device answers for VIPs itself: they are addresses of their own, without a subnet, and of
/// host scope (`arp_ignore` in net/ipv4/arp.c). Values that are not named mean 0.
fn arp_answers(facts: &Facts, link: &Device, found: &mut Vec<FindingView>) {
    const CHECK: &str = "arp";
    let Some((value, path)) = larger(facts, &link.name, "arp_ignore") else { return };
    // The larger value counts, so it is the larger one that has to be made smaller.
    let way_out = set(&path, 1);
    match value {
        2 => found.push(
            note(
                CHECK,
                "arp_ignore 2: the node answers ARP requests for those VIPs alone that are in the device's own subnet",
            )
            .about(&link.name)
            .remedy(format!("if there are others that routers or clients on the link ask for: {way_out}")),
        ),
        3 | 8 => found.push(
            warning(
                CHECK,
                format!("arp_ignore {value}: the node answers no ARP request for a VIP, so nobody on the link finds it"),
            )
            .about(&link.name)
            .remedy(way_out),
        ),
        _ => {}
    }
}

/// Whether another device, which has no VIPs, answers for those of this one.
fn arp(facts: &Facts, link: &Device, found: &mut Vec<FindingView>) {
    const CHECK: &str = "arp";
    let neighbours = |other: &&Device| {
        // On those of clients, VIPs are, and the datapath is.
        other.role != Role::Link
            && other.name != link.name
            && other.is_up
            && link.below.as_deref() != Some(other.name.as_str())
            && other.addresses.iter().any(|one| link.addresses.iter().any(|two| is_same_subnet(*one, *two)))
    };
    let Some(other) = facts.devices.iter().find(neighbours) else {
        return found
            .push(ok(CHECK, "no device but those of clients is on the same subnet").about(&link.name));
    };
    let ignores = larger(facts, &other.name, "arp_ignore").map_or(0, |(value, _)| value);
    let announces = larger(facts, &link.name, "arp_announce").map_or(0, |(value, _)| value);
    if ignores == 0 {
        let message = format!(
            "{} is on the same subnet, and answers ARP for VIPs of {} too (arp_ignore 0): packets of clients may come \
             in there, where the datapath may not be",
            other.name, link.name
        );
        let way_out = set(&of("ipv4", &other.name, "arp_ignore"), 1);
        found.push(warning(CHECK, message).about(&link.name).remedy(way_out));
    } else {
        found.push(ok(CHECK, "no other device answers for VIPs").about(&link.name));
    }
    if announces < 2 {
        let message = format!(
            "arp_announce {announces}: the node may ask for neighbours in the name of a VIP, and {} is on the same \
             subnet: others may learn the wrong device for it",
            other.name
        );
        let way_out = set(&of("ipv4", &link.name, "arp_announce"), 2);
        found.push(note(CHECK, message).about(&link.name).remedy(way_out));
    }
}

fn is_same_subnet(one: IpNet, other: IpNet) -> bool {
    // An address alone is on no subnet.
    let is_subnet = |net: IpNet| net.prefix_len() < net.max_prefix_len();
    let is_link_local = |net: IpNet| matches!(net, IpNet::V6(net) if net.addr().is_unicast_link_local());
    is_subnet(one) && is_subnet(other) && !is_link_local(one) && one.trunc() == other.trunc()
}

fn ipv6(facts: &Facts, link: &Device, found: &mut Vec<FindingView>) {
    const CHECK: &str = "ipv6";
    let path = of("ipv6", &link.name, "disable_ipv6");
    if facts.number(&path) == Some(1) {
        let message = "IPv6 is off on this device: no IPv6 VIP can be put on it";
        found.push(
            note(CHECK, message).about(&link.name).remedy(format!("if there are any: {}", set(&path, 0))),
        );
        return;
    }
    let forwards = facts.number(&of("ipv6", &link.name, "forwarding")).unwrap_or(0) > 0;
    let path = of("ipv6", &link.name, "accept_ra");
    // Hosts that forward take advertisements with 2 only (Documentation/networking/ip-sysctl.rst).
    if forwards && facts.number(&path) == Some(1) {
        let message = "the device forwards, and therefore takes no router advertisements (accept_ra 1): a default \
                       route that was learnt from them ends";
        found.push(note(CHECK, message).about(&link.name).remedy(format!("if it was: {}", set(&path, 2))));
    }
}
