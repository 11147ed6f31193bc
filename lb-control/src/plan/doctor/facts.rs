//! What was read and tried on a node.

use std::collections::BTreeMap;

use ipnet::IpNet;

use crate::view::AttachMode;

/// Everything that is judged.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// As `uname -r` says it, to be shown.
    pub release: String,
    /// The process that asks, which has the rights of an agent in its place.
    pub process: Process,
    /// The file system that the pins are to be on.
    pub bpf_fs: BpfFs,
    /// Whether the kernel describes its types, or why that cannot be read.
    pub btf: Outcome,
    /// The directory of the pins of this version.
    pub pins: String,
    /// Names of directories beside it that hold the pins of other versions: `v2`.
    pub other_layouts: Vec<String>,
    /// What was tried.
    pub trials: Vec<Trial>,
    /// Settings of the kernel by their path below `/proc/sys`; those that there are.
    pub settings: BTreeMap<String, String>,
    /// Devices of this network namespace but the loopback device.
    pub devices: Vec<Device>,
    /// Link devices that were asked for and do not exist.
    pub missing_devices: Vec<String>,
    /// The device of the IPv4 default route.
    pub default_route: Option<String>,
    /// The process id of the agent that answers.
    pub agent: Option<u32>,
    /// What the agent says is wrong.
    pub agent_problems: Vec<String>,
    /// kube-proxy on this node.
    pub kube_proxy: KubeProxy,
    /// First and last source port towards backends.
    pub snat_ports: (u16, u16),
}

/// The rights of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// Effective capabilities, a bit each (capability.h).
    pub capabilities: u64,
    /// How many files it may have open.
    pub open_files: u64,
    /// Bytes that it may lock; `None` without a limit.
    pub locked_bytes: Option<u64>,
}

/// A capability that the agent needs; the number of its bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    NetAdmin = 12,
    NetRaw = 13,
    /// Listen on ports below 1024.
    NetBindService = 10,
    SysAdmin = 21,
    Perfmon = 38,
    Bpf = 39,
}

impl Process {
    /// Whether it has a capability. That of administrators includes those that were cut out of it in
    /// Linux 5.8 (`bpf_capable` and `perfmon_capable` in include/linux/capability.h).
    #[must_use]
    pub fn has(&self, capability: Capability) -> bool {
        let has = |one: Capability| self.capabilities & (1 << one as u32) != 0;
        has(capability)
            || matches!(capability, Capability::Bpf | Capability::Perfmon) && has(Capability::SysAdmin)
    }
}

/// The file system that the pins are to be on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BpfFs {
    /// There.
    #[default]
    Mounted,
    /// Not there; the agent mounts it if it may.
    Absent,
    /// Why it cannot be told.
    Unknown(String),
}

/// Something that was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trial {
    /// What.
    pub ability: Ability,
    /// On which device; empty if on none that is the node's own.
    pub device: String,
    /// With what result.
    pub outcome: Outcome,
}

/// What can be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ability {
    /// All maps, small.
    Maps,
    /// All programs of XDP, and the one for replies of backends on this node.
    XdpPrograms,
    /// All programs of TC.
    TcPrograms,
    /// The programs of XDP and TC for SYN cookies.
    CookiePrograms,
    /// The programs for sockets of this node.
    SocketPrograms,
    /// Finding the control group that those are attached to.
    ControlGroup,
    /// Attaching in the driver.
    Native,
    /// Attaching in TC by a link.
    Tcx,
    /// Attaching in TC as a filter.
    Clsact,
    /// Attaching in the kernel's core.
    Generic,
}

/// How something went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Outcome {
    /// It works.
    #[default]
    Works,
    /// It does not; why.
    Fails(String),
    /// It was not tried; why.
    Untried(String),
}

/// A device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// MTU in bytes.
    pub mtu: u32,
    /// Whether it can send.
    pub is_up: bool,
    /// Whether it is an Ethernet device.
    pub is_ethernet: bool,
    /// The device below, of a VLAN device.
    pub below: Option<String>,
    /// The device that it is a port of.
    pub above: Option<String>,
    /// Its driver, if it is hardware.
    pub driver: Option<String>,
    /// Whether its driver says that it has XDP; `None` if it does not say (before Linux 6.3).
    pub driver_has_xdp: Option<bool>,
    /// Its addresses, VIPs of ours not among them.
    pub addresses: Vec<IpNet>,
    /// The XDP program on it.
    pub xdp: Option<Program>,
    /// Programs and filters of TC that its incoming packets meet, in their order.
    pub tc: Vec<Program>,
    /// How our programs are attached to it.
    pub attached: Option<Attached>,
    /// Whether it merges received segments in a way that cannot be undone (LRO); `None` if it does not
    /// say.
    pub lro: Option<bool>,
    /// Whether it merges received segments in hardware so that they can be taken apart again; `None` if
    /// it does not say.
    pub gro_in_hardware: Option<bool>,
}

/// What a device is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Clients come in by it.
    Link,
    /// Packets to backends leave by it.
    Backends,
    /// It is there.
    #[default]
    Other,
}

/// A program on a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Program {
    /// Its name; empty if it has none.
    pub name: String,
    /// Whether it is one of ours.
    pub is_ours: bool,
}

/// How our programs are attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// How.
    pub mode: AttachMode,
    /// Why so; only an agent knows.
    pub reason: Option<String>,
}

/// What is seen of kube-proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KubeProxy {
    /// What it says of itself, if it answers: `iptables`, `ipvs`, `nftables`.
    pub mode: Option<String>,
    /// Whether there is the device that it puts the addresses of Services on in mode `ipvs`.
    pub has_ipvs_device: bool,
}

impl Facts {
    /// What came of a trial on no device of the node's own, or on one.
    #[must_use]
    pub fn outcome(&self, ability: Ability, device: &str) -> Option<&Outcome> {
        let mut trials = self.trials.iter();
        trials.find(|trial| trial.ability == ability && trial.device == device).map(|trial| &trial.outcome)
    }

    /// A setting that is a number.
    #[must_use]
    pub fn number(&self, path: &str) -> Option<u64> {
        self.settings.get(path)?.parse().ok()
    }

    /// Devices that clients come in by.
    pub fn link_devices(&self) -> impl Iterator<Item = &Device> {
        self.devices.iter().filter(|device| device.role == Role::Link)
    }

    /// Devices that packets of connections pass.
    pub fn used_devices(&self) -> impl Iterator<Item = &Device> {
        self.devices.iter().filter(|device| device.role != Role::Other)
    }
}
