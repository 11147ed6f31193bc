//! Facts in, findings out.

use lb_common::abi::{ABI_VERSION, previous};

use super::facts::*;
use super::*;

const ALL: u64 = 1 << 10 | 1 << 12 | 1 << 13 | 1 << 38 | 1 << 39;

fn tried(ability: Ability, device: &str, outcome: Outcome) -> Trial {
    Trial { ability, device: device.into(), outcome }
}

fn settings(all: &[(&str, &str)]) -> impl Iterator<Item = (String, String)> {
    all.iter().map(|(path, value)| ((*path).to_owned(), (*value).to_owned()))
}

fn device(name: &str, role: Role) -> Device {
    Device {
        name: name.into(),
        role,
        mtu: 1_500,
        is_up: true,
        is_ethernet: true,
        addresses: vec![format!("10.{}.0.1/24", name.len()).parse().expect("an address")],
        ..Device::default()
    }
}

/// A node with nothing wrong.
fn healthy() -> Facts {
    let abilities = [
        Ability::Maps,
        Ability::XdpPrograms,
        Ability::TcPrograms,
        Ability::CookiePrograms,
        Ability::SocketPrograms,
        Ability::ControlGroup,
        Ability::Native,
        Ability::Tcx,
        Ability::Clsact,
        Ability::Generic,
    ];
    Facts {
        release: "Linux 6.12".into(),
        process: Process { capabilities: ALL, open_files: 20_000, locked_bytes: Some(65_536) },
        pins: "/sys/fs/bpf/pointsman/v4".into(),
        trials: abilities.map(|ability| tried(ability, "", Outcome::Works)).into(),
        settings: settings(&[
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv6/conf/all/forwarding", "1"),
            ("net/ipv4/ip_local_port_range", "32768\t60999"),
            ("net/ipv4/ip_local_reserved_ports", ""),
            ("net/core/bpf_jit_enable", "1"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/eth0/rp_filter", "2"),
        ])
        .collect(),
        devices: vec![
            device("eth0", Role::Link),
            device("lan", Role::Backends),
            device("other", Role::Other),
        ],
        default_route: Some("eth0".into()),
        agent: Some(7),
        snat_ports: (1_024, 32_767),
        ..Facts::default()
    }
    .attached(AttachMode::XdpNative)
}

use crate::view::AttachMode;

impl Facts {
    fn attached(mut self, mode: AttachMode) -> Self {
        for device in &mut self.devices {
            device.attached = Some(Attached { mode, reason: Some("the fastest way works".into()) });
        }
        self
    }

    fn set(mut self, all: &[(&str, &str)]) -> Self {
        self.settings.extend(settings(all));
        self
    }

    fn with(mut self, ability: Ability, device: &str, outcome: Outcome) -> Self {
        self.trials.retain(|trial| trial.ability != ability || trial.device != device);
        self.trials.push(tried(ability, device, outcome));
        self
    }

    fn changed(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}

/// What is worse than in order, as `severity check subject`.
fn findings(facts: &Facts) -> Vec<String> {
    let all = diagnose(facts).findings;
    let bad = all.into_iter().filter(|finding| finding.severity > Severity::Ok);
    let bad = bad.map(|one| format!("{} {} {}", one.severity, one.check, one.subject).trim_end().to_owned());
    bad.collect()
}

fn fails(why: &str) -> Outcome {
    Outcome::Fails(why.into())
}

/// Facts that differ from a healthy node in one thing, and what is found.
#[track_caller]
fn finds(facts: &Facts, expected: &[&str]) {
    assert_eq!(findings(facts), expected);
}

#[test]
fn a_healthy_node_has_nothing() {
    finds(&healthy(), &[]);
    assert!(!diagnose(&healthy()).has_errors());
}

#[test]
fn whatever_is_wrong_has_a_way_out() {
    let facts = healthy()
        .set(&[("net/ipv4/ip_forward", "0"), ("net/core/bpf_jit_enable", "0")])
        .with(Ability::XdpPrograms, "", fails("unknown helper"))
        .changed(|facts| {
            facts.process = Process { open_files: 10, ..Process::default() };
            facts.bpf_fs = BpfFs::Absent;
            facts.missing_devices.push("eth9".into());
            facts.devices[0].is_up = false;
        });
    for finding in diagnose(&facts).findings {
        let needs_one = finding.severity >= Severity::Warning;
        assert!(!needs_one || finding.remedy.is_some(), "{finding:?}");
    }
}

#[test]
fn rights() {
    let with = |bits: u64| healthy().changed(|facts| facts.process.capabilities = bits);
    finds(&with(ALL & !(1 << 10)), &["warning capabilities CAP_NET_BIND_SERVICE"]);
    finds(&with(ALL & !(1 << 13)), &["warning capabilities CAP_NET_RAW"]);
    finds(&with(ALL & !(1 << 38)), &["error capabilities CAP_PERFMON"]);
    // What administrators may do includes BPF and PERFMON.
    finds(&with(1 << 10 | 1 << 12 | 1 << 13 | 1 << 21), &[]);
    finds(
        &with(0),
        &[
            "error capabilities CAP_BPF",
            "error capabilities CAP_NET_ADMIN",
            "error capabilities CAP_PERFMON",
            "warning capabilities CAP_NET_RAW",
            "warning capabilities CAP_NET_BIND_SERVICE",
        ],
    );
}

#[test]
fn limits() {
    finds(&healthy().changed(|facts| facts.process.open_files = 256), &["warning open-files"]);
    let refused = healthy().with(Ability::Maps, "", fails("Operation not permitted"));
    finds(&refused, &["error maps", "warning locked-memory"]);
    finds(&refused.changed(|facts| facts.process.locked_bytes = None), &["error maps"]);
}

#[test]
fn the_file_system_of_pins() {
    let absent = healthy().changed(|facts| facts.bpf_fs = BpfFs::Absent);
    finds(&absent, &["error bpf-file-system"]);
    let may_mount = absent.changed(|facts| facts.process.capabilities |= 1 << 21);
    finds(&may_mount, &["note bpf-file-system"]);
    let beside = |version: u32| healthy().changed(|facts| facts.other_layouts.push(format!("v{version}")));
    let (newer, previous) = (ABI_VERSION + 1, previous::VERSION);
    finds(&beside(newer), &[&format!("error pins v{newer}")]);
    finds(&beside(previous), &[&format!("note pins v{previous}")]);
    finds(&beside(1), &["warning pins v1"]);
    finds(&healthy().changed(|facts| facts.btf = fails("no such file")), &["note btf"]);
}

#[test]
fn kube_proxy() {
    let mode = |mode: &str| healthy().changed(|facts| facts.kube_proxy.mode = Some(mode.into()));
    finds(&mode("nftables"), &["note kube-proxy"]);
    finds(&mode("ipvs").set(&[("net/ipv4/conf/all/arp_ignore", "0")]), &["error kube-proxy"]);
    finds(&mode("ipvs").set(&[("net/ipv4/conf/all/arp_ignore", "1")]), &[]);
    let by_device = healthy().changed(|facts| facts.kube_proxy.has_ipvs_device = true);
    finds(&by_device.set(&[("net/ipv4/conf/all/arp_ignore", "0")]), &["error kube-proxy"]);
}

#[test]
fn trials() {
    finds(&healthy().with(Ability::TcPrograms, "", fails("x")), &["warning tc-programs"]);
    finds(&healthy().with(Ability::XdpPrograms, "", fails("x")), &["error xdp-programs"]);
    finds(&healthy().with(Ability::CookiePrograms, "", fails("x")), &["note cookie-programs"]);
    finds(&healthy().with(Ability::SocketPrograms, "", fails("x")), &["note socket-programs"]);
    finds(&healthy().with(Ability::ControlGroup, "", fails("x")), &["note control-group"]);
    finds(&healthy().with(Ability::Tcx, "", fails("Invalid argument")), &["note tcx"]);
    finds(
        &healthy().with(Ability::Native, "eth0", fails("not supported")),
        &["error datapath eth0", "note xdp-native eth0"],
    );
    let in_tc = healthy().with(Ability::Native, "eth0", fails("not supported"));
    finds(&in_tc.with(Ability::Tcx, "eth0", Outcome::Works), &["note xdp-native eth0"]);
    finds(
        &healthy().with(Ability::Native, "eth0", Outcome::Untried("busy".into())),
        &["note xdp-native eth0"],
    );
    let nothing = healthy()
        .with(Ability::Native, "", fails("x"))
        .with(Ability::Tcx, "", fails("x"))
        .with(Ability::Clsact, "", fails("x"))
        .with(Ability::Generic, "", fails("x"));
    let all = findings(&nothing);
    assert_eq!(all[0], "error datapath", "{all:?}");
}

#[test]
fn devices() {
    let link = |change: fn(&mut Device)| healthy().changed(|facts| change(&mut facts.devices[0]));
    finds(&link(|eth0| eth0.is_up = false), &["error device eth0"]);
    finds(&link(|eth0| eth0.is_ethernet = false), &["error device eth0"]);
    finds(&link(|eth0| eth0.above = Some("br0".into())), &["note device eth0"]);
    finds(&link(|eth0| eth0.attached = None), &["error datapath eth0"]);
    finds(&link(|eth0| eth0.driver_has_xdp = Some(false)), &[]);
    let unattached = |has_xdp| {
        healthy().changed(|facts| {
            facts.agent = None;
            (facts.devices[0].attached, facts.devices[0].driver_has_xdp) = (None, Some(has_xdp));
        })
    };
    finds(&unattached(false), &["note agent", "note driver eth0"]);
    finds(&unattached(true), &["note agent"]);
    let vlan = link(|eth0| (eth0.below, eth0.attached) = (Some("eth".into()), None));
    finds(&vlan, &["note device eth0"]);
    finds(&healthy().attached(AttachMode::XdpGeneric), &["note datapath eth0", "note datapath lan"]);
    finds(&healthy().changed(|facts| facts.missing_devices.push("eth9".into())), &["error link-device eth9"]);
    finds(&link(|eth0| eth0.lro = Some(true)), &["warning lro eth0"]);
    let merging = link(|eth0| eth0.gro_in_hardware = Some(true));
    finds(&merging, &[]);
    finds(&merging.attached(AttachMode::Tc), &["note gro-hw eth0"]);
}

#[test]
fn programs_of_others() {
    let program = |name: &str, is_ours| Program { name: name.into(), is_ours };
    let with = |tc: &[Program]| {
        let tc = tc.to_vec();
        healthy().changed(|facts| facts.devices[0].tc = tc)
    };
    let xdp = healthy().changed(|facts| facts.devices[0].xdp = Some(program("cil_xdp_entry", false)));
    finds(&xdp, &["warning other-programs eth0"]);
    assert!(diagnose(&xdp).findings[0].message.contains("of Cilium"));
    finds(&healthy().changed(|facts| facts.devices[0].xdp = Some(program("", true))), &[]);
    let ahead = with(&[program("cil_from_netdev", false), program("", true)]);
    finds(&ahead, &["note other-programs eth0"]);
    finds(&ahead.attached(AttachMode::Tc), &["warning other-programs eth0"]);
    finds(&with(&[program("", true), program("x", false)]).attached(AttachMode::Tc), &[]);
}

#[test]
fn mtus() {
    let lan = |mtu: u32| healthy().changed(|facts| facts.devices[1].mtu = mtu);
    finds(&lan(1_450), &["note mtu lan"]);
    finds(&lan(9_000).attached(AttachMode::Tc), &["note mtu lan"]);
    finds(&lan(9_000), &[]);
    finds(&lan(3_506).attached(AttachMode::Tc), &[]);
}

#[test]
fn forwarding() {
    finds(&healthy().set(&[("net/ipv4/ip_forward", "0")]), &["warning forwarding net.ipv4.ip_forward"]);
    finds(
        &healthy().set(&[("net/ipv6/conf/all/forwarding", "0")]),
        &["warning forwarding net.ipv6.conf.all.forwarding"],
    );
    finds(
        &healthy().set(&[("net/ipv4/conf/lan/forwarding", "0")]),
        &["warning forwarding net.ipv4.conf.lan.forwarding"],
    );
    finds(&healthy().set(&[("net/ipv4/conf/other/forwarding", "0")]), &[]);
}

#[test]
fn strict_filters() {
    let strict =
        healthy().set(&[("net/ipv4/conf/all/rp_filter", "1"), ("net/ipv4/conf/eth0/rp_filter", "0")]);
    finds(&strict, &["note rp-filter eth0"]);
    let elsewhere = strict.changed(|facts| facts.default_route = Some("lan".into()));
    finds(&elsewhere, &["warning rp-filter eth0"]);
    // The larger of both counts.
    finds(&elsewhere.set(&[("net/ipv4/conf/eth0/rp_filter", "2")]), &[]);
}

#[test]
fn answers_of_other_devices() {
    let shared = healthy().changed(|facts| {
        facts.devices[2].addresses = facts.devices[0].addresses.clone();
    });
    finds(&shared, &["warning arp eth0", "note arp eth0"]);
    let right = shared
        .clone()
        .set(&[("net/ipv4/conf/other/arp_ignore", "1"), ("net/ipv4/conf/all/arp_announce", "2")]);
    finds(&right, &[]);
    finds(&shared.changed(|facts| facts.devices[2].role = Role::Link), &[]);
    // The VLAN device's own device below may well share a subnet with nobody else.
    let host = healthy().changed(|facts| {
        for device in &mut facts.devices {
            device.addresses = vec!["10.0.0.1/32".parse().expect("an address")];
        }
    });
    finds(&host, &[]);
}

#[test]
fn answers_of_the_device_itself() {
    let own = |value: &str| healthy().set(&[("net/ipv4/conf/all/arp_ignore", value)]);
    for (value, expected) in [
        ("0", &[][..]),
        ("1", &[]),
        ("2", &["note arp eth0"]),
        ("3", &["warning arp eth0"]),
        ("4", &[]),
        ("8", &["warning arp eth0"]),
    ] {
        finds(&own(value), expected);
    }
    finds(&own("0").set(&[("net/ipv4/conf/eth0/arp_ignore", "8")]), &["warning arp eth0"]);
    finds(&own("0").set(&[("net/ipv4/conf/other/arp_ignore", "8")]), &[]);
}

#[test]
fn ports() {
    let local = |range: &str| healthy().set(&[("net/ipv4/ip_local_port_range", range)]);
    finds(&local("1024\t65535"), &["warning source-ports net.ipv4.ip_local_port_range"]);
    finds(&local("32767 60999"), &["warning source-ports net.ipv4.ip_local_port_range"]);
    let reserved =
        local("32000 60999").set(&[("net/ipv4/ip_local_reserved_ports", "8080,32000-32700,32701-32767")]);
    finds(&reserved, &[]);
    let in_part = reserved.set(&[("net/ipv4/ip_local_reserved_ports", "32000-32766")]);
    finds(&in_part, &["warning source-ports net.ipv4.ip_local_port_range"]);
    assert!(diagnose(&in_part).findings[0].message.contains(" 1 shared ports"));
}

#[test]
fn compiler_and_ipv6() {
    finds(&healthy().set(&[("net/core/bpf_jit_enable", "0")]), &["error jit net.core.bpf_jit_enable"]);
    finds(&healthy().set(&[("net/ipv6/conf/eth0/disable_ipv6", "1")]), &["note ipv6 eth0"]);
    let advertised = [("net/ipv6/conf/eth0/forwarding", "1"), ("net/ipv6/conf/eth0/accept_ra", "1")];
    finds(&healthy().set(&advertised), &["note ipv6 eth0"]);
    finds(&healthy().set(&advertised).set(&[("net/ipv6/conf/eth0/accept_ra", "2")]), &[]);
}

#[test]
fn a_device_with_a_dot_keeps_it_in_what_to_do() {
    let facts = healthy().changed(|facts| {
        facts.devices[0].name = "eth0.5".into();
        facts.default_route = Some("lan".into());
    });
    let facts = facts.set(&[("net/ipv4/conf/all/rp_filter", "1")]);
    let all = diagnose(&facts).findings;
    let finding = all.iter().find(|finding| finding.check == "rp-filter").expect("it is found");
    let remedy = finding.remedy.as_deref().expect("a way out");
    assert!(remedy.starts_with("sysctl -w net/ipv4/conf/eth0.5/rp_filter=2"), "{remedy}");
}

#[test]
fn what_is_judged_is_read() {
    let paths = keys(["eth0", "lan"]);
    assert!(paths.contains(&"net/ipv4/conf/lan/rp_filter".to_owned()));
    for path in healthy().settings.keys() {
        assert!(paths.contains(path), "{path}");
    }
}
