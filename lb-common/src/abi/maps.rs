//! Names and default sizes of the maps. Names have at most 15 characters (BPF_OBJ_NAME_LEN), and
//! are the file names of the pins.

/// Directory of the pins below the BPF file system; the version is appended as `v<ABI_VERSION>`.
pub const PIN_ROOT: &str = "/sys/fs/bpf/pointsman";

macro_rules! maps {
    ($($(#[doc = $doc:literal])+ $constant:ident = $name:literal, $entries:expr;)+) => {
        $($(#[doc = $doc])+ pub const $constant: Map = Map { name: $name, default_entries: $entries };)+
        /// All maps.
        pub const ALL: &[Map] = &[$($constant),+];
    };
}

/// A map's name and the number of entries it is created with unless configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Map {
    /// The name in the kernel, in the object, and of the pin.
    pub name: &'static str,
    /// Number of entries unless configured.
    pub default_entries: u32,
}

/// Flows of each family that are kept for as long as they live, unless configured.
pub const DEFAULT_FLOWS: u32 = 262_144;

/// Service entries (one for each port of each VIP), unless configured.
pub const DEFAULT_SERVICES: u32 = 16_384;

/// Backends of all Service entries, unless configured. Their counters take 40 bytes on each CPU.
pub const DEFAULT_BACKENDS: u32 = 131_072;

/// Slots of all Service entries for each backend that there may be. Lookup tables are what takes most:
/// 1,021 slots for up to 10 backends, and two of it while it changes. A thousand of them fit by default.
pub const SLOTS_PER_BACKEND: u32 = 16;

/// Source ranges of each family over all Service entries, unless configured.
pub const DEFAULT_SOURCE_RANGES: u32 = 65_536;

/// Clients of each family whose backend is remembered, over all Service entries with affinity.
pub const DEFAULT_AFFINITIES: u32 = 65_536;

/// Clients of each family whose connections are counted, over all Service entries with a limit.
pub const DEFAULT_CONNECTION_RATES: u32 = 65_536;

/// Sockets of this node whose peer is remembered: an entry for a connection, two for a datagram socket
/// and each VIP that it talks to.
pub const DEFAULT_SOCKETS: u32 = 65_536;

/// Copies that the flow cache has room for on each CPU and for each family, unless configured; 0 is
/// no cache.
pub const DEFAULT_FLOW_CACHE: u32 = 16_384;

maps! {
    /// Established IPv4 flows: hash, [`FlowKey`](super::FlowKey) to [`Flow`](super::Flow), two entries a flow.
    FLOWS_V4 = "flows_v4", 2 * DEFAULT_FLOWS;
    /// Established IPv6 flows.
    FLOWS_V6 = "flows_v6", DEFAULT_FLOWS;
    /// IPv4 flows that begin or end: LRU hash of the same layout.
    TRANSIENT_V4 = "transient_v4", 2 * DEFAULT_FLOWS;
    /// IPv6 flows that begin or end.
    TRANSIENT_V6 = "transient_v6", DEFAULT_FLOWS;
    /// Copies of established IPv4 flows: array of [`CachedFlow`](super::CachedFlow), a part for each CPU. At
    /// least one element, used or not.
    FLOW_CACHE_V4 = "flow_cache_v4", 1;
    /// The same for IPv6.
    FLOW_CACHE_V6 = "flow_cache_v6", 1;
    /// Array of `u64`: counts flows that have left the tables of established flows, by hash.
    FLOW_VERSIONS = "flow_versions", 1 << super::FLOW_VERSION_BITS;
    /// [`VipKey`](super::VipKey) to the index in `services`.
    VIPS_V4 = "vips_v4", DEFAULT_SERVICES;
    /// The same for IPv6.
    VIPS_V6 = "vips_v6", DEFAULT_SERVICES;
    /// Array of [`Service`](super::Service).
    SERVICES = "services", DEFAULT_SERVICES;
    /// Array of [`ServiceName`](super::ServiceName).
    SERVICE_NAMES = "service_names", DEFAULT_SERVICES;
    /// Array of `u64`: the round-robin counter of each Service entry.
    ROUND_ROBIN = "round_robin", DEFAULT_SERVICES;
    /// Array of `u32`: indices in `backends`, in the order in which a Service uses them.
    SLOTS = "slots", SLOTS_PER_BACKEND * DEFAULT_BACKENDS;
    /// Array of [`Backend`](super::Backend).
    BACKENDS = "backends", DEFAULT_BACKENDS;
    /// Array of 16-byte addresses; an IPv4 address is in the first four bytes.
    SNAT_ADDRESSES = "snat_addresses", 256;
    /// Array with one [`Config`](super::Config).
    CONFIG = "config", 1;
    /// Per-CPU array of [`ServiceStats`](super::ServiceStats).
    SERVICE_STATS = "service_stats", DEFAULT_SERVICES;
    /// Per-CPU array of [`BackendStats`](super::BackendStats).
    BACKEND_STATS = "backend_stats", DEFAULT_BACKENDS;
    /// Array of `u32`: the open flows of each backend of a Service with least connections; what looks
    /// negative is 0. The kernel counts, the agent puts right what evictions have left.
    OPEN_FLOWS = "open_flows", DEFAULT_BACKENDS;
    /// Per-CPU array of [`DropStats`](super::DropStats) by [`DropReason`](super::DropReason).
    DROPS = "drops", 64;
    /// IPv4 fragments under way: LRU hash, [`FragmentKey`](super::FragmentKey) to [`Fragment`](super::Fragment).
    FRAGMENTS_V4 = "fragments_v4", 8_192;
    /// IPv6 fragments under way.
    FRAGMENTS_V6 = "fragments_v6", 8_192;
    /// Who may connect: longest prefix match, [`SourceRangeKey`](super::SourceRangeKey) to an unused `u32`.
    SOURCE_RANGES_V4 = "src_ranges_v4", DEFAULT_SOURCE_RANGES;
    /// The same for IPv6.
    SOURCE_RANGES_V6 = "src_ranges_v6", DEFAULT_SOURCE_RANGES;
    /// Clients' backends: LRU hash, [`AffinityKey`](super::AffinityKey) to [`Affinity`](super::Affinity).
    AFFINITY_V4 = "affinity_v4", DEFAULT_AFFINITIES;
    /// The same for IPv6.
    AFFINITY_V6 = "affinity_v6", DEFAULT_AFFINITIES;
    /// Array of [`Tick`](super::Tick): how long a client's backend is remembered, by Service entry.
    AFFINITY_TICKS = "affinity_ticks", DEFAULT_SERVICES;
    /// Array of [`ConnectionLimit`](super::ConnectionLimit), by Service entry.
    CONNECTION_LIMITS = "conn_limits", DEFAULT_SERVICES;
    /// What clients have used of it: LRU hash, [`AffinityKey`](super::AffinityKey) to
    /// [`ConnectionRate`](super::ConnectionRate).
    CONNECTION_RATES_V4 = "conn_rates_v4", DEFAULT_CONNECTION_RATES;
    /// The same for IPv6, by network.
    CONNECTION_RATES_V6 = "conn_rates_v6", DEFAULT_CONNECTION_RATES;
    /// Sockets of this node that talk to backends: LRU hash, [`SocketKey`](super::SocketKey) to
    /// [`SocketPeer`](super::SocketPeer).
    SOCKETS = "sockets", DEFAULT_SOCKETS;
    /// Device map (hash) of the devices that packets may be redirected to, by index.
    DEVICES = "devices", 1_024;
    /// Program array: the slow paths.
    PROGRAMS = "programs", 8;
    /// Program array: the slow paths of TC.
    TC_PROGRAMS = "tc_programs", 8;
    /// Per-CPU array of one: what the slow path has under construction (IPv4).
    SCRATCH_V4 = "scratch_v4", 1;
    /// The same for IPv6.
    SCRATCH_V6 = "scratch_v6", 1;
    /// Per-CPU array of one: the parameters of `bpf_fib_lookup`.
    SCRATCH_FIB = "scratch_fib", 1;
}

/// Maps that are not pinned: each loader makes its own, empty and of the size that it wants.
pub const NOT_PINNED: [Map; 2] = [FLOW_CACHE_V4, FLOW_CACHE_V6];

/// Name of the variable of the kernel object that holds how many copies of flows there is room for on
/// each CPU: `u32`, set when the object is loaded.
pub const FLOW_CACHE_SLOTS: &str = "FLOW_CACHE_SLOTS";

/// The same for how many jiffies a copy is good, see [`CACHE_JIFFIES`](super::CACHE_JIFFIES): only tests set it.
pub const FLOW_CACHE_JIFFIES: &str = "FLOW_CACHE_JIFFIES";

/// Name of the program that is attached to devices.
pub const ENTRY_PROGRAM: &str = "pointsman_xdp";

/// Name of the program that is attached where packets leave, if a backend is on this node.
pub const EGRESS_PROGRAM: &str = "pointsman_tc";

/// Name of the program that does in TC what the entry program does in XDP.
pub const INGRESS_PROGRAM: &str = "pointsman_tc_in";

/// Names of the programs that [`ENTRY_PROGRAM`] calls, in the order of their indices in the program array.
pub const CALLED_PROGRAMS: [&str; 4] = ["slow_v4", "slow_v6", "unknown_v4", "unknown_v6"];

/// The same for [`INGRESS_PROGRAM`] and its own program array.
pub const TC_CALLED_PROGRAMS: [&str; 4] = ["tc_slow_v4", "tc_slow_v6", "tc_unknown_v4", "tc_unknown_v6"];

/// Names of the programs that take the place of `unknown_v4` and `unknown_v6` for TCP while SYN cookies
/// are in use, and of those for the flows that began with one. Loaded only then: their helpers came with
/// Linux 6.0.
pub const COOKIE_PROGRAMS: [&str; 4] = ["cookie_v4", "cookie_v6", "follow_v4", "follow_v6"];

/// The same for TC.
pub const TC_COOKIE_PROGRAMS: [&str; 4] = ["tc_cookie_v4", "tc_cookie_v6", "tc_follow_v4", "tc_follow_v6"];

/// Index of the slow path for IPv4 in the program array; that for IPv6 is the next.
pub const PROGRAM_SLOW_V4: u32 = 0;
/// Index of the path for unknown IPv4 flows in the program array; that for IPv6 is the next.
pub const PROGRAM_UNKNOWN_V4: u32 = 2;
/// Index of the path for unknown IPv4 flows with SYN cookies in the program array; that for IPv6 is the next.
pub const PROGRAM_COOKIE_V4: u32 = 4;
/// Index of the path for IPv4 flows that began with a SYN cookie in the program array; that for IPv6 is the next.
pub const PROGRAM_FOLLOW_V4: u32 = 6;

/// A program for sockets, attached to a control group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketProgram {
    /// Name of the program, and a part of its pin's.
    pub name: &'static str,
    /// Name of the same for kernels where it cannot say why it refuses (before Linux 6.1): it does so
    /// as "not permitted".
    pub without_reason: Option<&'static str>,
}

impl SocketProgram {
    /// The names, the preferred one first.
    pub fn variants(self) -> impl Iterator<Item = &'static str> {
        [self.name].into_iter().chain(self.without_reason)
    }
}

/// The programs for sockets, in the order in which they are attached: what gives a socket a backend
/// comes last, since from then on the others are needed.
pub const SOCKET_PROGRAMS: [SocketProgram; 8] = [
    SocketProgram { name: "peername_v4", without_reason: None },
    SocketProgram { name: "peername_v6", without_reason: None },
    SocketProgram { name: "recvmsg_v4", without_reason: None },
    SocketProgram { name: "recvmsg_v6", without_reason: None },
    SocketProgram { name: "sendmsg_v4", without_reason: Some("sendmsg_v4_old") },
    SocketProgram { name: "sendmsg_v6", without_reason: Some("sendmsg_v6_old") },
    SocketProgram { name: "connect_v4", without_reason: Some("connect_v4_old") },
    SocketProgram { name: "connect_v6", without_reason: Some("connect_v6_old") },
];
