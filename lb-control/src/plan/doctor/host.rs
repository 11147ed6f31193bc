//! The process, the kernel, the file system of the pins, kube-proxy, the agent.

use lb_common::abi::{ABI_VERSION, previous};

use super::facts::{BpfFs, Capability, Facts, Outcome};
use super::{error, note, ok, warning};
use crate::view::FindingView;

/// Descriptors that an agent needs: maps, programs, links; watches; connections of health checks.
const OPEN_FILES: u64 = 1_024;

/// What each capability is for.
const CAPABILITIES: [(Capability, &str, &str); 5] = [
    (Capability::Bpf, "CAP_BPF", "no map can be made and no program be loaded"),
    (
        Capability::NetAdmin,
        "CAP_NET_ADMIN",
        "no program can be loaded for or attached to a device, and no address be added",
    ),
    (Capability::Perfmon, "CAP_PERFMON", "the verifier refuses programs that compare packet pointers"),
    (
        Capability::NetRaw,
        "CAP_NET_RAW",
        "new addresses are not announced: clients wait until their neighbour entries end",
    ),
    (
        Capability::NetBindService,
        "CAP_NET_BIND_SERVICE",
        "the userspace proxy, where it serves, does not serve ports below 1024",
    ),
];

pub(super) fn judge(facts: &Facts, found: &mut Vec<FindingView>) {
    capabilities(facts, found);
    limits(facts, found);
    file_system(facts, found);
    layouts(facts, found);
    kube_proxy(facts, found);
    agent(facts, found);
}

fn capabilities(facts: &Facts, found: &mut Vec<FindingView>) {
    let before = found.len();
    for (capability, name, without) in CAPABILITIES {
        if facts.process.has(capability) {
            continue;
        }
        let is_minor = matches!(capability, Capability::NetRaw | Capability::NetBindService);
        let judged = if is_minor { warning } else { error };
        let message = format!("this process lacks it: without it, {without}");
        found.push(judged("capabilities", message).about(name).remedy(
            "run as root, or give the container the capabilities BPF, NET_ADMIN, NET_BIND_SERVICE, NET_RAW and \
             PERFMON",
        ));
    }
    if found.len() == before {
        found.push(ok("capabilities", "BPF, NET_ADMIN, NET_BIND_SERVICE, NET_RAW and PERFMON are there"));
    }
}

fn limits(facts: &Facts, found: &mut Vec<FindingView>) {
    let files = facts.process.open_files;
    found.push(if files < OPEN_FILES {
        warning(
            "open-files",
            format!("a process may have {files} files open, which may be too few for the agent"),
        )
        .remedy(format!(
            "raise it to {OPEN_FILES} or more: LimitNOFILE= of a systemd unit, ulimit -n of a shell"
        ))
    } else {
        ok("open-files", format!("{files} files may be open"))
    });
    // Since Linux 5.11 maps count towards the memory of the control group, and this limit does not
    // matter. Which it is shows when maps cannot be made.
    let maps_fail = matches!(facts.outcome(super::Ability::Maps, ""), Some(Outcome::Fails(_)));
    if let Some(bytes) = facts.process.locked_bytes.filter(|_| maps_fail) {
        found.push(
            warning(
                "locked-memory",
                format!("{bytes} bytes may be locked; before Linux 5.11 that includes maps"),
            )
            .remedy("lift the limit: LimitMEMLOCK=infinity, or ulimit -l unlimited"),
        );
    }
}

fn file_system(facts: &Facts, found: &mut Vec<FindingView>) {
    found.push(match &facts.bpf_fs {
        BpfFs::Mounted => ok("bpf-file-system", format!("pins are kept in {}", facts.pins)),
        BpfFs::Absent if facts.process.has(Capability::SysAdmin) => note(
            "bpf-file-system",
            format!("{} is on no BPF file system yet: the agent mounts it", facts.pins),
        ),
        BpfFs::Absent => error(
            "bpf-file-system",
            format!(
                "{} is on no BPF file system, and this process may not mount one (CAP_SYS_ADMIN)",
                facts.pins
            ),
        )
        .remedy("mount -t bpf bpf /sys/fs/bpf, on the node, before the agent starts"),
        BpfFs::Unknown(why) => error("bpf-file-system", why.clone())
            .remedy("make it readable, or name another place by --pin-dir"),
    });
    match &facts.btf {
        Outcome::Works => found.push(ok("btf", "the kernel describes its types")),
        Outcome::Fails(why) | Outcome::Untried(why) => {
            found.push(note("btf", format!("the kernel does not describe its types: {why}; maps work all the same, bpftool shows less")));
        }
    }
}

/// Pins of other versions, by their directories: `v3`. What an agent does with them is in
/// `dataplane::takeover`.
fn layouts(facts: &Facts, found: &mut Vec<FindingView>) {
    const CHECK: &str = "pins";
    if facts.other_layouts.is_empty() {
        return found.push(ok(CHECK, "there are no pins of other versions"));
    }
    for name in &facts.other_layouts {
        let number = name.strip_prefix('v').and_then(|number| number.parse::<u32>().ok());
        let beside = format!("beside {} there are pins of another version", facts.pins);
        let finding = match number {
            Some(number) if number > ABI_VERSION => {
                error(CHECK, format!("{beside}, which is newer: this one does not begin over them")).remedy(
                    "run the newer version; or end its agent with SIGTERM, so that it takes them along, which ends \
                     its connections",
                )
            }
            Some(previous::VERSION) => {
                note(CHECK, format!("{beside}: an agent of this one takes them over, and connections go on"))
            }
            _ => warning(CHECK, format!("{beside}, too old to be taken over: its connections end with an upgrade"))
                .remedy("upgrade by way of the version between, or when the node has been drained"),
        };
        found.push(finding.about(name));
    }
}

fn kube_proxy(facts: &Facts, found: &mut Vec<FindingView>) {
    const CHECK: &str = "kube-proxy";
    let proxy = &facts.kube_proxy;
    let is_ipvs = proxy.has_ipvs_device || proxy.mode.as_deref() == Some("ipvs");
    if is_ipvs {
        // What `strictARP: true` sets (pkg/proxy/ipvs/proxier.go).
        let answers = facts.number("net/ipv4/conf/all/arp_ignore").is_some_and(|value| value == 0);
        found.push(if answers {
            error(
                CHECK,
                "kube-proxy in mode ipvs puts the addresses of Services on every node, and this node answers ARP \
                 for them: clients reach nodes that do not hold the address",
            )
            .remedy("set ipvs.strictARP to true in kube-proxy's configuration, and restart it, on all nodes")
        } else {
            ok(CHECK, "mode ipvs, and the node does not answer ARP for addresses of other devices")
        });
        return;
    }
    found.push(match proxy.mode.as_deref() {
        Some(mode) => note(
            CHECK,
            format!(
                "it is in mode {mode}: packets of clients are taken before its rules; what pods and this node \
                 themselves send to a Service's address meets its rules first"
            ),
        ),
        None => ok(CHECK, "none answers on 127.0.0.1:10249, and there is no device kube-ipvs0"),
    });
}

fn agent(facts: &Facts, found: &mut Vec<FindingView>) {
    found.push(match facts.agent {
        Some(pid) => ok("agent", format!("an agent answers, process {pid}")),
        None => note("agent", "no agent answers: what it would do is told by trials alone"),
    });
    for problem in &facts.agent_problems {
        found.push(error("agent", problem.clone()).remedy("see `pointsman status`"));
    }
}
