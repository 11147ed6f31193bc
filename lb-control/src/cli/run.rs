//! Arguments of `pointsman run`.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};
use lb_common::abi::{Config, maps};

use super::Place;
use super::proxy::ProxyArgs;
use crate::app::{ClusterSettings, DatapathPolicy, Settings, Source, host_name};
use crate::dataplane::{Cgroup, Mode, Sizes};
use crate::plan::CookiePolicy;

/// Settings of the agent.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Device that the VIPs are put on, and that clients come in by
    #[arg(long, env = "LINKDEVICE", value_name = "DEVICE", value_parser = device_name)]
    pub link_device: String,
    /// Further devices that clients come in by, as those of other uplinks, separated by commas: VIPs are put
    /// on them and announced there, too
    #[arg(long, env = "CLIENT_DEVICES", value_name = "DEVICES", value_delimiter = ',', value_parser = device_name)]
    pub client_devices: Vec<String>,
    /// Take Services from the Kubernetes API; false: from --config
    #[arg(long, env = "KUBERNETES", value_name = "BOOL", default_value = "true", num_args = 0..=1,
          default_missing_value = "true", action = clap::ArgAction::Set, value_parser = BoolishValueParser::new())]
    pub kubernetes: bool,
    /// File or directory of Kubernetes YAML (Service, EndpointSlice, AddressPool), with
    /// --kubernetes=false; changes are taken over at once
    #[arg(long, value_name = "PATH")]
    pub config: Option<PathBuf>,
    /// Credentials for the Kubernetes API; without them those of the Pod
    #[arg(long, env = "KUBECONFIG", value_name = "PATH")]
    pub kubeconfig: Option<PathBuf>,
    /// Namespace of our Leases: who writes, and which agents are alive; the same for all agents of a
    /// cluster. Without: pointsman-system
    #[arg(long, env = "LEASE_NAMESPACE", value_name = "NAME")]
    pub namespace: Option<String>,
    /// Write addresses to spec.externalIPs too, which Kubernetes has deprecated since 1.36; entries of
    /// others stay
    #[arg(long, env = "PUBLISH_EXTERNAL_IPS", value_name = "BOOL", default_value = "false", num_args = 0..=1,
          require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set,
          value_parser = BoolishValueParser::new())]
    pub publish_external_ips: bool,
    /// A watch of the Kubernetes API that says nothing for so long is begun anew
    #[arg(long, env = "WATCH_IDLE_SECONDS", value_name = "SECONDS", default_value_t = 150,
          value_parser = clap::value_parser!(u64).range(1..=3_600))]
    pub watch_idle_seconds: u64,
    /// Name of this node, as in EndpointSlices (nodeName); without it, with Kubernetes, the host name
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,
    /// Serve Services without a loadBalancerClass too
    #[arg(long, env = "DEFAULT_CLASS", value_name = "BOOL", default_value = "true", num_args = 0..=1,
          require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set,
          value_parser = BoolishValueParser::new())]
    pub default_class: bool,
    /// Log details
    #[arg(long, env = "DEBUG", value_name = "BOOL", default_value = "false", num_args = 0..=1,
          require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set,
          value_parser = BoolishValueParser::new())]
    pub debug: bool,
    /// Socket and pins.
    #[command(flatten)]
    pub place: Place,
    /// TCP address of metrics and probes (/metrics, /healthz, /readyz), or none. Without: [::]:9404,
    /// which is every address, or none if Services come from files
    #[arg(long, env = "HTTP_ADDRESS", value_name = "ADDRESS:PORT")]
    pub http_address: Option<HttpAddress>,
    /// Metrics of every backend, not only of every Service: there may be many
    #[arg(long, env = "METRICS_PER_BACKEND", value_name = "BOOL", default_value = "false", num_args = 0..=1,
          require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set,
          value_parser = BoolishValueParser::new())]
    pub metrics_per_backend: bool,
    /// How packets are forwarded: auto takes on each device the first that works of xdp-native, tc and
    /// xdp-generic, and the userspace proxy where none does
    #[arg(
        long,
        env = "DATAPATH",
        value_enum,
        value_name = "PATH",
        default_value_t,
        help_heading = "Datapath"
    )]
    pub datapath: DatapathChoice,
    /// Which processes of this node reach the VIPs: those in this control group (version 2), or all
    /// (auto), or none (off). Without: all, or none if Services come from files
    #[arg(long, env = "CGROUP", value_name = "PATH|auto|off", help_heading = "Datapath")]
    pub cgroup: Option<Cgroup>,
    /// SYN cookies: a SYN is answered with one, and a connection made only when it comes back, so that a
    /// flood of SYNs from made-up addresses leaves nothing behind. Always, or only during floods (auto).
    /// Needs Linux 6.0
    #[arg(
        long,
        env = "SYN_COOKIES",
        value_enum,
        value_name = "WHEN",
        default_value_t,
        help_heading = "Datapath"
    )]
    pub syn_cookies: SynCookiesChoice,
    /// Source address towards backends; may be repeated. Without: the addresses that the node's
    /// routes give
    #[arg(long = "snat-address", value_name = "ADDRESS", help_heading = "Datapath")]
    pub snat_addresses: Vec<IpAddr>,
    /// Source ports towards backends. Keep them apart from net.ipv4.ip_local_port_range
    #[arg(long, value_name = "FIRST-LAST", default_value_t, help_heading = "Datapath")]
    pub snat_ports: PortRange,
    /// Established IPv4 flows that there is room for; for IPv6 half as many
    #[arg(long, value_name = "NUMBER", default_value_t = maps::DEFAULT_FLOWS, help_heading = "Datapath",
          value_parser = clap::value_parser!(u32).range(1..=MAXIMUM_SIZE))]
    pub max_flows: u32,
    /// Service entries that there is room for: one for each port of each VIP
    #[arg(long, value_name = "NUMBER", default_value_t = maps::DEFAULT_SERVICES, help_heading = "Datapath",
          value_parser = clap::value_parser!(u32).range(1..=MAXIMUM_SIZE))]
    pub max_services: u32,
    /// Backends that there is room for, over all Service entries
    #[arg(long, value_name = "NUMBER", default_value_t = maps::DEFAULT_BACKENDS, help_heading = "Datapath",
          value_parser = clap::value_parser!(u32).range(2..=MAXIMUM_SIZE))]
    pub max_backends: u32,
    /// Source ranges (loadBalancerSourceRanges) of each family that there is room for, over all Service
    /// entries
    #[arg(long, value_name = "NUMBER", default_value_t = maps::DEFAULT_SOURCE_RANGES, help_heading = "Datapath",
          value_parser = clap::value_parser!(u32).range(1..=MAXIMUM_SIZE))]
    pub max_source_ranges: u32,
    /// Copies of established flows of each family that each CPU keeps in front of the table of flows, 64
    /// bytes each for IPv4 and 128 for IPv6; 0 for none
    #[arg(long, value_name = "NUMBER", default_value_t = maps::DEFAULT_FLOW_CACHE, help_heading = "Datapath",
          value_parser = clap::value_parser!(u32).range(0..=MAXIMUM_FLOW_CACHE))]
    pub flow_cache_slots: u32,
    /// Of the userspace proxy.
    #[command(flatten)]
    pub proxy: ProxyArgs,
    /// What SIGTERM leaves behind: withdraw takes VIPs and programs away, keep lets the kernel go on
    /// forwarding until the next agent takes over
    #[arg(long, value_enum, value_name = "WHAT", default_value_t)]
    pub on_exit: OnExit,
    /// Ask an agent that runs here to hand over, and begin when it has let go; its listening sockets stay
    /// open, and its connections finish with it
    #[arg(long, env = "TAKE_OVER", value_name = "BOOL", default_value = "false", num_args = 0..=1,
          require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set,
          value_parser = BoolishValueParser::new())]
    pub take_over: bool,
}

/// Four times as many slots still fit an index.
const MAXIMUM_SIZE: i64 = 1 << 26;
/// For each CPU: 128 MiB of IPv6, and with 512 CPUs still a number of elements that a map can have.
const MAXIMUM_FLOW_CACHE: i64 = 1 << 20;

/// How packets are forwarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DatapathChoice {
    /// On each device the first that works; where none does, the proxy.
    #[default]
    Auto,
    /// In the driver, or not at all.
    XdpNative,
    /// In TC: any device; keeps super-packets together.
    Tc,
    /// XDP in the kernel's core: any device, slower.
    XdpGeneric,
    /// Not in the kernel at all: a proxy in user space accepts connections, and makes others.
    Proxy,
}

impl DatapathChoice {
    fn policy(self) -> DatapathPolicy {
        match self {
            Self::Auto => DatapathPolicy::Auto,
            Self::XdpNative => DatapathPolicy::Only(Mode::Native),
            Self::Tc => DatapathPolicy::Only(Mode::Tc),
            Self::XdpGeneric => DatapathPolicy::Only(Mode::Generic),
            Self::Proxy => DatapathPolicy::Proxy,
        }
    }
}

/// When SYNs are answered with cookies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SynCookiesChoice {
    /// Never.
    #[default]
    Off,
    /// Every SYN, while there is a flood of them.
    Auto,
    /// Every SYN.
    Always,
}

impl SynCookiesChoice {
    fn policy(self) -> CookiePolicy {
        match self {
            Self::Off => CookiePolicy::Off,
            Self::Auto => CookiePolicy::Auto,
            Self::Always => CookiePolicy::Always,
        }
    }
}

/// What a clean end leaves behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum OnExit {
    /// Nothing: connections end.
    #[default]
    Withdraw,
    /// All of the datapath: connections go on.
    Keep,
}

/// Where metrics and probes are served. Read as `ADDRESS:PORT` or `none`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpAddress {
    /// Nowhere.
    Nowhere,
    /// Here.
    At(SocketAddr),
}

impl HttpAddress {
    /// Every address of the node: the kubelet and Prometheus come by the node's own.
    const IN_CLUSTER: Self = Self::At(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 9404));

    fn socket(self) -> Option<SocketAddr> {
        match self {
            Self::Nowhere => None,
            Self::At(socket) => Some(socket),
        }
    }
}

impl FromStr for HttpAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::Nowhere),
            _ => text.parse().map(Self::At).map_err(|_| {
                "write ADDRESS:PORT, for example [::]:9404 or 127.0.0.1:9404, or none".to_owned()
            }),
        }
    }
}

/// Ports from first to last, at least one, never 0. Shown and read as `1024-32767`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// The first port.
    pub first: u16,
    /// The last port, not below the first.
    pub last: u16,
}

impl Default for PortRange {
    fn default() -> Self {
        let Config { snat_port_first, snat_port_count, .. } = Config::default();
        Self { first: snat_port_first, last: snat_port_first + (snat_port_count - 1) }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ports = text.split_once('-').and_then(|(first, last)| {
            Some(Self { first: first.trim().parse().ok()?, last: last.trim().parse().ok()? })
        });
        match ports {
            Some(range) if range.first == 0 => Err("port 0 cannot be used".to_owned()),
            Some(range) if range.first > range.last => {
                Err(format!("{} is above {}", range.first, range.last))
            }
            Some(range) => Ok(range),
            None => Err("write FIRST-LAST, for example 1024-32767".to_owned()),
        }
    }
}

impl RunArgs {
    /// What the agent is started with.
    ///
    /// # Errors
    /// A sentence with the way out, when arguments do not go together.
    pub fn settings(self) -> Result<Settings, String> {
        let default_http = if self.kubernetes { HttpAddress::IN_CLUSTER } else { HttpAddress::Nowhere };
        let default_cgroup = if self.kubernetes { Cgroup::Auto } else { Cgroup::Off };
        let source = match (self.kubernetes, self.config) {
            (false, Some(config)) => Source::Files(config),
            (false, None) => {
                return Err("--kubernetes=false needs Services from files: add --config PATH".to_owned());
            }
            (true, None) => Source::Cluster(ClusterSettings {
                kubeconfig: self.kubeconfig,
                namespace: self.namespace,
                publish_external_ips: self.publish_external_ips,
                watch_idle: Duration::from_secs(self.watch_idle_seconds),
            }),
            (true, Some(config)) => {
                return Err(format!(
                    "Services come either from Kubernetes or from files: to use {}, add --kubernetes=false",
                    config.display()
                ));
            }
        };
        let node = match (self.node_name, &source) {
            (Some(name), _) => name,
            // What the kubelet takes when nobody says another.
            (None, Source::Cluster(_)) => host_name().map_err(|error| format!("--node-name: {error:#}"))?,
            (None, Source::Files(_)) => String::new(),
        };
        Ok(Settings {
            source,
            node,
            default_class: self.default_class,
            client_devices: self.client_devices,
            link_device: self.link_device,
            pin_directory: self.place.pin_dir,
            socket: self.place.socket,
            http: self.http_address.unwrap_or(default_http).socket(),
            metrics_per_backend: self.metrics_per_backend,
            datapath: self.datapath.policy(),
            proxy: self.proxy.settings(),
            drain: Duration::from_secs(self.proxy.drain_seconds),
            cgroup: self.cgroup.unwrap_or(default_cgroup),
            sizes: Sizes {
                flows: self.max_flows,
                services: self.max_services,
                backends: self.max_backends,
                source_ranges: self.max_source_ranges,
                flow_cache: self.flow_cache_slots,
            },
            syn_cookies: self.syn_cookies.policy(),
            snat_addresses: self.snat_addresses,
            snat_ports: (self.snat_ports.first, self.snat_ports.last),
            keep_on_exit: self.on_exit == OnExit::Keep,
            take_over: self.take_over,
        })
    }
}

/// As the kernel takes them (`dev_valid_name` in net/core/dev.c).
pub(super) fn device_name(text: &str) -> Result<String, String> {
    let bad = text.is_empty()
        || text.len() > 15
        || text == "."
        || text == ".."
        || text.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
    match bad {
        true => Err("a device has a name of 1 to 15 characters, as `ip link` lists them".to_owned()),
        false => Ok(text.to_owned()),
    }
}
