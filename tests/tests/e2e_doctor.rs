//! `pointsman doctor`: what is wrong is found, and found no more once it is put right.

use std::{
    fs,
    process::{Command, Output},
};

use anyhow::{Context, Result};
use pointsman_tests::{
    lab::{Agent, Lab, Lan, Options, is_root, wait_for},
    world::{World, web},
};
use serde_json::Value;

/// Sends a node's own doctor, with more arguments; what it found, and how it ended.
fn doctor_by(lab: &Lab, wrapper: &[&str], args: &[&str]) -> Result<(Vec<Finding>, Output)> {
    let binary = std::env::var("POINTSMAN_BIN").context("POINTSMAN_BIN is not set")?;
    let line =
        [wrapper, &[binary.as_str(), "doctor", "-o", "json", "--link-device", "uplink"], args].concat();
    let mut command = Command::new(line[0]);
    command.args(&line[1..]).arg("--pin-dir").arg(lab.pin_directory());
    command.arg("--socket").arg(lab.directory().join("agent.sock")).env_remove("LINKDEVICE");
    let output = lab.edge.enter(|| command.output())?.context("cannot run the doctor")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let view: Value = serde_json::from_str(&text)
        .with_context(|| format!("not JSON: {text}{}", String::from_utf8_lossy(&output.stderr)))?;
    let findings = view["findings"].as_array().context("no findings")?;
    Ok((findings.iter().map(Finding::of).collect(), output))
}

/// What is read; nothing is tried, which takes a second or two.
fn doctor(lab: &Lab) -> Result<Vec<Finding>> {
    Ok(doctor_by(lab, &[], &["--read-only"])?.0)
}

#[derive(Debug)]
struct Finding {
    /// `severity check subject`.
    what: String,
    message: String,
    has_remedy: bool,
}

impl Finding {
    fn of(value: &Value) -> Self {
        let text = |key: &str| value[key].as_str().unwrap_or_default();
        Self {
            what: format!("{} {} {}", text("severity"), text("check"), text("subject")).trim_end().to_owned(),
            message: text("message").to_owned(),
            has_remedy: !text("remedy").is_empty(),
        }
    }
}

#[track_caller]
fn has(found: &[Finding], what: &str) {
    let finding = found.iter().find(|finding| finding.what == what);
    let Some(finding) = finding else { panic!("{what} is not in {found:#?}") };
    let needs_way_out = what.starts_with("error") || what.starts_with("warning");
    assert!(finding.has_remedy || !needs_way_out, "{finding:?}");
}

/// Warnings and errors.
fn bad(found: &[Finding]) -> Vec<&str> {
    let bad = found.iter().filter(|one| one.what.starts_with("error") || one.what.starts_with("warning"));
    bad.map(|one| one.what.as_str()).collect()
}

/// A lab whose edge has nothing that a doctor would find.
fn healthy() -> Result<Option<Lab>> {
    if !is_root() {
        return Ok(None);
    }
    let lab = Lab::routed(1)?;
    for device in ["all", "uplink", "lan"] {
        lab.edge.sysctl(&format!("net/ipv4/conf/{device}/rp_filter"), "0")?;
    }
    lab.edge.sysctl("net/ipv4/ip_local_port_range", "32768 60999")?;
    Ok(Some(lab))
}

#[test]
fn bad_settings_are_found_until_they_are_put_right() -> Result<()> {
    let Some(lab) = healthy()? else { return Ok(()) };
    let found = doctor(&lab)?;
    assert_eq!(bad(&found), [""; 0], "{found:#?}");
    let settings = [
        ("net/ipv4/ip_forward", "0", "1", "warning forwarding net.ipv4.ip_forward"),
        ("net/ipv6/conf/all/forwarding", "0", "1", "warning forwarding net.ipv6.conf.all.forwarding"),
        (
            "net/ipv4/ip_local_port_range",
            "1024 60999",
            "32768 60999",
            "warning source-ports net.ipv4.ip_local_port_range",
        ),
        ("net/ipv4/conf/all/rp_filter", "1", "0", "note rp-filter uplink"),
        ("net/ipv6/conf/uplink/disable_ipv6", "1", "0", "note ipv6 uplink"),
    ];
    for (key, wrong, ..) in settings {
        lab.edge.sysctl(key, wrong)?;
    }
    let found = doctor(&lab)?;
    settings.iter().for_each(|(.., expected)| has(&found, expected));
    for (number, (key, _, right, expected)) in settings.iter().enumerate() {
        lab.edge.sysctl(key, right)?;
        let found = doctor(&lab)?;
        assert!(found.iter().all(|finding| finding.what != *expected), "{key}: {found:#?}");
        settings[number + 1..].iter().for_each(|(.., still)| has(&found, still));
    }
    // Of one device alone.
    lab.edge.sysctl("net/ipv4/conf/uplink/forwarding", "0")?;
    assert_eq!(bad(&doctor(&lab)?), ["warning forwarding net.ipv4.conf.uplink.forwarding"]);
    Ok(())
}

#[test]
fn what_depends_on_routes_and_neighbours_is_found() -> Result<()> {
    let Some(lab) = healthy()? else { return Ok(()) };
    let edge = &lab.edge;
    edge.sysctl("net/ipv4/conf/all/rp_filter", "1")?;
    edge.ip_batch("route add default via 10.2.0.11")?;
    has(&doctor(&lab)?, "warning rp-filter uplink");
    edge.sysctl("net/ipv4/conf/uplink/rp_filter", "2")?;
    assert_eq!(bad(&doctor(&lab)?), [""; 0], "the larger value counts");
    edge.ip_batch(
        "link add second type veth peer name third\n addr add 10.1.0.9/24 dev second
         link set third up\n link set second up",
    )?;
    // Devices come up in their own time.
    wait_for("the second device to be noticed", || {
        let found = doctor(&lab)?.into_iter().any(|finding| finding.what == "warning arp uplink");
        Ok(found.then_some(()))
    })?;
    edge.sysctl("net/ipv4/conf/second/arp_ignore", "1")?;
    assert_eq!(bad(&doctor(&lab)?), [""; 0]);
    let others = lab.pin_directory().join("v1");
    // Stands for the pin of a link.
    fs::create_dir_all(others.join("links/first"))?;
    has(&doctor(&lab)?, "warning pins v1");
    fs::remove_dir_all(&others)?;
    assert_eq!(bad(&doctor(&lab)?), [""; 0]);
    Ok(())
}

#[test]
fn errors_are_the_status() -> Result<()> {
    let Some(lab) = healthy()? else { return Ok(()) };
    let status = || -> Result<(Vec<Finding>, Option<i32>)> {
        let (found, output) = doctor_by(&lab, &[], &["--read-only"])?;
        Ok((found, output.status.code()))
    };
    assert_eq!(status()?.1, Some(0));
    // As kube-proxy makes one in mode ipvs, which is a dummy device.
    lab.edge.ip_batch("link add kube-ipvs0 type bridge")?;
    let (found, code) = status()?;
    has(&found, "error kube-proxy");
    assert_eq!(code, Some(1));
    lab.edge.sysctl("net/ipv4/conf/all/arp_ignore", "1")?;
    assert_eq!(status()?.1, Some(0));
    lab.edge.ip_batch("link set uplink down")?;
    let (found, code) = status()?;
    has(&found, "error device uplink");
    assert_eq!(code, Some(1));
    Ok(())
}

#[test]
fn missing_rights_are_named() -> Result<()> {
    let Some(lab) = healthy()? else { return Ok(()) };
    let without =
        |rights: &str| doctor_by(&lab, &["setpriv", "--inh-caps", rights, "--bounding-set", rights], &[]);
    let (found, output) = without("-net_raw")?;
    assert_eq!(bad(&found), ["warning capabilities CAP_NET_RAW"]);
    assert!(output.status.success());
    let (found, output) = without("-bpf,-perfmon,-sys_admin")?;
    has(&found, "error capabilities CAP_BPF");
    has(&found, "error capabilities CAP_PERFMON");
    assert_eq!(output.status.code(), Some(1));
    // All that the container has.
    let (found, _) = without("-all,+bpf,+perfmon,+net_admin,+net_bind_service,+net_raw")?;
    has(&found, "ok capabilities");
    has(&found, "ok xdp-programs");
    has(&found, "note xdp-native");
    Ok(())
}

#[test]
fn attaching_is_tried_and_leaves_nothing() -> Result<()> {
    let Some(lab) = healthy()? else { return Ok(()) };
    let (found, _) = doctor_by(&lab, &[], &[])?;
    has(&found, "note xdp-native uplink");
    has(&found, "ok driver uplink");
    assert_eq!(bad(&found), [""; 0], "{found:#?}");
    has(&found, "ok cookie-programs");
    has(&found, "ok socket-programs");
    assert!(found.iter().any(|finding| finding.what.ends_with(" control-group")), "{found:#?}");
    let (found, _) = doctor_by(&lab, &[], &["--attach"])?;
    for way in ["xdp-native", "tcx", "xdp-generic"] {
        has(&found, &format!("ok {way} uplink"));
        has(&found, &format!("ok {way}"));
    }
    let device = lab.edge.run(["ip", "-d", "link", "show", "dev", "uplink"])?;
    assert!(!device.contains("prog/xdp"), "{device}");
    let filters = lab.edge.run(["tc", "filter", "show", "dev", "uplink", "ingress"])?;
    assert_eq!(filters, "");
    assert!(!lab.pin_directory().exists(), "pins are left");
    Ok(())
}

#[test]
fn beside_an_agent_it_says_how_it_is_attached() -> Result<()> {
    let Some(world) = World::with(Options { lan: Lan::Vxlan, ..Options::default() })? else { return Ok(()) };
    world.lab.edge.sysctl("net/ipv4/conf/all/rp_filter", "0")?;
    let mut agent = Agent::start_with(&world.lab, &web(&[1]), &["--datapath", "auto"])?;
    let before = agent.wait_ready()?;
    let (found, _) = doctor_by(&world.lab, &[], &["--attach"])?;
    has(&found, "ok agent");
    has(&found, "ok datapath uplink");
    has(&found, "ok datapath lan");
    has(&found, "note mtu lan");
    let reason = found.iter().find(|finding| finding.what == "ok datapath lan").map(|one| &one.message);
    assert!(reason.is_some_and(|text| text.contains("mode tc: XDP native attach on lan")), "{reason:?}");
    assert!(!found.iter().any(|finding| finding.what.contains("xdp-native uplink")), "an agent is there");
    assert!(!found.iter().any(|finding| finding.what.contains("other-programs")), "{found:#?}");
    let after = agent.status()?;
    assert_eq!(before["devices"], after["devices"], "the agent was disturbed");
    // What it left behind is as good.
    agent.kill();
    let found = doctor(&world.lab)?;
    has(&found, "note agent");
    has(&found, "ok datapath uplink");
    has(&found, "note mtu lan");
    Ok(())
}
