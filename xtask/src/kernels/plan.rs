//! What is done in a guest, and the root that it needs for that.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::initramfs::Initramfs;
use super::modules;
use crate::{ebpf, process, workspace};

/// The first process.
const GUEST: &str = "pointsman-guest";
const AGENT: &str = "pointsman";
/// The name under which all programs are loaded.
pub const VERIFY: &str = "verify";
/// The name under which the agent is started where the kernel refuses programs.
pub const REFUSAL: &str = "refusal";
/// The name under which it is started there as it chooses itself.
pub const PROXY: &str = "proxy";
/// What it is to say of such a kernel.
pub const REFUSAL_WORDS: &str = "cannot run the program";
/// What is printed in the guest when a connection went through the proxy, and the status says why.
pub const PROXY_WORDS: &str = "served by the proxy: this kernel cannot forward";
/// Seconds that anything may take. A processor in software is twenty times slower than one.
const LIMIT: u32 = 600;

/// Where kernels keep what the lab and the agent need, if it is not built in.
const MODULES: [&str; 5] = ["veth", "bridge", "sch_ingress", "cls_bpf", "af_packet"];
/// Programs that the lab runs.
const TOOLS: [&str; 2] = ["ip", "ethtool"];

/// Tests of the core set: the file in `tests/tests`, and the test. They are few, because verifying the
/// programs takes an emulator half a minute each time, and touch every program and every kind of map,
/// not every rule: those are the same on all kernels.
const TESTS: [(&str, &[&str]); 7] = [
    (
        "differential",
        &[
            "xdp::tcp::whole_life",
            "xdp::fragment::datagram",
            "xdp::affinity::sticks",
            "xdp::sources::nested",
            "classifier::tcp::whole_life",
            "classifier::local::whole_life",
            "super_packets_leave",
        ],
    ),
    // Another agent adopts maps and links; nothing is left at the end.
    ("e2e_agent", &["changes_made_while_it_was_dead_are_applied", "sigterm_leaves_nothing_behind"]),
    // The egress program: by netlink before Linux 6.6, by a link since.
    ("e2e_local", &["the_pod_sees_the_client"]),
    // With the flow cache.
    ("e2e_forward", &["tcp_goes_round_exactly", "fragmented_datagrams_arrive_both_ways"]),
    // Attached to devices and carrying all kinds of traffic: tcx since Linux 6.6, a filter before.
    ("e2e_tc", &["in_place_of_xdp"]),
    // The helpers of cookies.
    ("e2e_cookies", &["connections_work"]),
    // The programs of a control group, which pass reasons on since Linux 6.1.
    ("e2e_hairpin", &["the_node_reaches_its_own_vips"]),
];

/// Executables by the name of their target.
pub type Executables = BTreeMap<String, PathBuf>;

/// Builds the kernel programs, the agent and the tests.
pub fn build() -> Result<Executables> {
    ebpf::build()?;
    let mut selection = vec!["--bin", AGENT, "--bin", GUEST];
    for (target, _) in TESTS {
        selection.extend(["--test", target]);
    }
    let built = workspace::build(workspace::Profile::Dev, &selection)?;
    Ok(built.into_iter().map(|artifact| (artifact.target, artifact.path)).collect())
}

/// What is done on a kernel beside loading the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beside {
    /// The core set of tests.
    Tests,
    /// The agent is started, and is to say what the kernel lacks, and to serve by its proxy: programs are
    /// refused there, and tests would fail one after the other for the same reason.
    Refusal,
}

/// The root of a guest.
pub fn root(built: &Executables, module_tree: &Path, beside: Beside) -> Result<Vec<u8>> {
    let built = |name: &str| built.get(name).with_context(|| format!("cargo built no `{name}`"));
    let mut root = Initramfs::new();
    root.program("init", built(GUEST)?)?;
    root.program(AGENT, built(AGENT)?)?;
    let object = workspace::ebpf_dir().join("pointsman-ebpf.o");
    let bytes = std::fs::read(&object).with_context(|| format!("cannot read {}", object.display()))?;
    root.file("pointsman-ebpf.o", &bytes);
    for tool in TOOLS {
        let path = process::find_program(tool).with_context(|| format!("no program `{tool}`"))?;
        root.program(&format!("bin/{tool}"), &path)?;
    }
    let mut plan = vec![
        format!("env POINTSMAN_BIN /{AGENT}"),
        "env POINTSMAN_EBPF_OBJECT /pointsman-ebpf.o".to_owned(),
        format!("env POINTSMAN_TEST_PATIENCE {}", LIMIT / 2),
        "env CI true".to_owned(),
    ];
    for module in modules::in_order(module_tree, &MODULES)? {
        let path = format!("/modules/{}.ko", module.name);
        root.file(&path, &module.bytes);
        plan.push(format!("module {path}"));
    }
    plan.push(format!("run {LIMIT} {VERIFY} /init verify"));
    match beside {
        Beside::Refusal => {
            root.file("config/none.yaml", b"");
            let run = "run --kubernetes=false --link-device lo --pin-dir /sys/fs/bpf/p --max-flows 1024";
            plan.push(format!(
                "run {LIMIT} {REFUSAL} /{AGENT} {run} --config /config --socket /run/p.sock --datapath tc"
            ));
            plan.push(format!("run {LIMIT} {PROXY} /init proxy {run} --datapath auto"));
        }
        Beside::Tests => {
            for (target, names) in TESTS {
                root.program(&format!("tests/{target}"), built(target)?)?;
                plan.extend(names.iter().map(|name| {
                    format!("run {LIMIT} {target}::{name} /tests/{target} {name} --exact --nocapture")
                }));
            }
        }
    }
    root.file("plan", (plan.join("\n") + "\n").as_bytes());
    Ok(root.finish())
}
