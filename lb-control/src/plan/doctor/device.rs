//! The devices that packets of connections pass.

use super::facts::{Device, Facts, Role};
use super::{error, note, ok, warning};
use crate::view::{AttachMode, FindingView};

/// What is left of a page of 4096 bytes for the IP packet of a frame that XDP is to see as a whole:
/// 256 bytes are headroom, 320 the description of fragments, 14 the Ethernet header.
const LARGEST_IN_A_PAGE: u32 = 4_096 - 256 - 320 - 14;

pub(super) fn judge(facts: &Facts, found: &mut Vec<FindingView>) {
    for name in &facts.missing_devices {
        let there: Vec<_> = facts.devices.iter().map(|device| device.name.as_str()).collect();
        found.push(
            error("link-device", format!("there is no such device; this node has: {}", there.join(", ")))
                .about(name)
                .remedy("name the device that clients come in by, with --link-device"),
        );
    }
    for device in facts.used_devices() {
        state(device, found);
        attached(facts, device, found);
        programs(device, found);
        largest(device, found);
        merging(device, found);
    }
    mtu(facts, found);
}

fn state(device: &Device, found: &mut Vec<FindingView>) {
    const CHECK: &str = "device";
    let finding = if !device.is_up {
        error(CHECK, "it is down or has no carrier: nothing comes in by it")
            .remedy(format!("ip link set {} up; look at the cable, or at the other end", device.name))
    } else if !device.is_ethernet {
        error(
            CHECK,
            "it is not an Ethernet device (a tunnel of IP in IP, WireGuard): the datapath cannot use it",
        )
        .remedy("use a device that has an Ethernet address, or an overlay that is one (VXLAN, Geneve)")
    } else if let Some(master) = device.above.as_deref().filter(|_| device.role == Role::Link) {
        note(
            CHECK,
            format!("it is a port of {master}: the VIPs belong on that one, if it has the node's address"),
        )
    } else if let Some(below) = device.below.as_deref() {
        note(
            CHECK,
            format!("it is a VLAN device: the datapath is attached to {below}, which its frames come in by"),
        )
    } else {
        let driver = device.driver.as_deref().map_or_else(String::new, |name| format!(", driver {name}"));
        ok(CHECK, format!("it is up, MTU {}{driver}", device.mtu))
    };
    found.push(finding.about(&device.name));
}

fn attached(facts: &Facts, device: &Device, found: &mut Vec<FindingView>) {
    let Some(attached) = &device.attached else {
        // What the driver says is less than what attaching shows.
        found.extend(match device.driver_has_xdp {
            Some(true) => Some(ok("driver", "it says that it has XDP").about(&device.name)),
            Some(false) => {
                let message = "it says that it has no XDP: the datapath will be TC, which is slower, and works all the same";
                Some(note("driver", message).about(&device.name))
            }
            None => None,
        });
        // Frames of a VLAN device come in by the one below.
        let is_waited_for = facts.agent.is_some() && device.role == Role::Link && device.below.is_none();
        if is_waited_for {
            let message = "an agent runs, and its programs are not on this device: it serves no client of it";
            let remedy =
                "`pointsman status` says what was tried; if it runs with another --link-device, ask for that";
            found.push(error("datapath", message).about(&device.name).remedy(remedy));
        }
        return;
    };
    let reason = attached.reason.as_deref().map_or_else(String::new, |reason| format!(": {reason}"));
    let message = format!("our programs are attached in mode {}{reason}", attached.mode);
    let finding = match attached.mode {
        AttachMode::XdpGeneric => {
            note("datapath", format!("{message}; this is the slowest way, and costs super-packets"))
        }
        AttachMode::Proxy => warning(
            "datapath",
            format!("the userspace proxy serves what comes in here{reason}; it takes several times the CPU"),
        ),
        _ => ok("datapath", message),
    };
    found.push(finding.about(&device.name));
}

/// Programs of others.
fn programs(device: &Device, found: &mut Vec<FindingView>) {
    if let Some(other) = device.xdp.as_ref().filter(|program| !program.is_ours) {
        let message = format!(
            "{} is attached in XDP, so that ours cannot be: it will be TC, and sees only what that one passes",
            named(&other.name)
        );
        found.push(warning("other-programs", message).about(&device.name).remedy(format!(
            "if XDP is wanted, detach it: `ip link set {} xdp off`, or configure its owner not to use XDP there \
             (Cilium: loadBalancer.acceleration=disabled)",
            device.name
        )));
    }
    let ahead: Vec<_> = device.tc.iter().take_while(|program| !program.is_ours).collect();
    if ahead.is_empty() {
        return;
    }
    let names: Vec<_> = ahead.iter().map(|program| named(&program.name)).collect();
    let is_in_tc = device.attached.as_ref().is_some_and(|attached| attached.mode == AttachMode::Tc);
    let has_ours = device.tc.len() > ahead.len();
    let (names, name) = (names.join(", "), &device.name);
    found.push(if is_in_tc && has_ours {
        warning("other-programs", format!("{names} in TC stands ahead of ours, and may take packets away"))
            .about(name)
            .remedy(format!("see `tc filter show dev {name} ingress`; give its filters a later preference"))
    } else {
        note("other-programs", format!("{names} is attached in TC: what the datapath takes, it does not see"))
            .about(name)
    });
}

fn named(name: &str) -> String {
    let owner = if name.starts_with("cil_") { " (of Cilium)" } else { "" };
    match name {
        "" => "another program".to_owned(),
        name => format!("another program, {name}{owner},"),
    }
}

fn largest(device: &Device, found: &mut Vec<FindingView>) {
    let is_in_driver =
        device.attached.as_ref().is_some_and(|attached| attached.mode == AttachMode::XdpNative);
    if device.mtu > LARGEST_IN_A_PAGE && !is_in_driver {
        found.push(
            note(
                "mtu",
                format!(
                    "MTU {}: most drivers refuse XDP where a packet may not fit one page, so it will be TC",
                    device.mtu
                ),
            )
            .about(&device.name)
            .remedy(format!(
                "for XDP in the driver, set an MTU of {LARGEST_IN_A_PAGE} or less; 1500 always fits"
            )),
        );
    }
}

/// Merged segments. What XDP in the kernel's core sees, the kernel merges itself.
fn merging(device: &Device, found: &mut Vec<FindingView>) {
    let name = &device.name;
    if device.lro == Some(true) {
        found.push(
            warning(
                "lro",
                "it merges received segments for good (LRO): TC could not send them on, and many drivers refuse XDP",
            )
            .about(name)
            .remedy(format!("ethtool -K {name} lro off")),
        );
    }
    let is_in_driver =
        device.attached.as_ref().is_some_and(|attached| attached.mode == AttachMode::XdpNative);
    if device.gro_in_hardware == Some(true) && !is_in_driver {
        found.push(
            note(
                "gro-hw",
                "it merges received segments in hardware: some drivers refuse XDP then; TC takes them",
            )
            .about(name)
            .remedy(format!("for XDP in the driver: ethtool -K {name} rx-gro-hw off")),
        );
    }
}

/// Whether packets of clients fit the ways to backends.
fn mtu(facts: &Facts, found: &mut Vec<FindingView>) {
    for link in facts.link_devices() {
        let narrow = facts.devices.iter().filter(|device| device.role == Role::Backends);
        let narrow: Vec<_> = narrow.filter(|device| device.mtu < link.mtu).collect();
        for device in &narrow {
            let message = format!(
                "MTU {}, clients come in by {} with {}: packets that do not fit are answered with ICMP, as path MTU \
                 discovery has it, and clients behind a filter for ICMP hang",
                device.mtu, link.name, link.mtu
            );
            found.push(note("mtu", message).about(&device.name).remedy(format!(
                "if some hang: let ICMP pass on the way to clients, or make the MTU of {} {} too",
                link.name, device.mtu
            )));
        }
        if narrow.is_empty() {
            found.push(
                ok("mtu", format!("{}: what comes in fits the ways to backends", link.mtu)).about(&link.name),
            );
        }
    }
}
