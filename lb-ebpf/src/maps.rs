//! The maps. Names and layouts are those of `lb_common::abi`; sizes are set when the agent loads
//! the object.

use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_COMMON_LRU, bpf_fib_lookup};
use aya_ebpf::btf_maps::{Array, DevMapHash, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray};
use aya_ebpf::macros::btf_map;
use lb_common::abi::maps as sizes;
use lb_common::abi::{
    Affinity, AffinityKey, Backend, BackendStats, CACHE_JIFFIES, CachedFlow, Config, ConnectionLimit,
    ConnectionRate, DropStats, Flow, FlowKey, Fragment, FragmentKey, Service, ServiceName, ServiceStats,
    SocketKey, SocketPeer, SourceRange, Tick, VipKey,
};
use lb_common::forward::scratch::Scratch;

type A4 = [u8; 4];
type A6 = [u8; 16];

/// Lists of free entries per CPU: an update takes no lock that another CPU holds.
const OWN_LRU: usize = BPF_F_NO_COMMON_LRU as usize;

macro_rules! entries {
    ($map:ident) => {{ sizes::$map.default_entries as usize }};
}

#[btf_map(name = "flows_v4")]
pub static FLOWS_V4: HashMap<FlowKey<A4>, Flow<A4>, { entries!(FLOWS_V4) }> = HashMap::new();
#[btf_map(name = "flows_v6")]
pub static FLOWS_V6: HashMap<FlowKey<A6>, Flow<A6>, { entries!(FLOWS_V6) }> = HashMap::new();
#[btf_map(name = "transient_v4")]
pub static TRANSIENT_V4: LruHashMap<FlowKey<A4>, Flow<A4>, { entries!(TRANSIENT_V4) }, OWN_LRU> =
    LruHashMap::new();
#[btf_map(name = "transient_v6")]
pub static TRANSIENT_V6: LruHashMap<FlowKey<A6>, Flow<A6>, { entries!(TRANSIENT_V6) }, OWN_LRU> =
    LruHashMap::new();
/// The kernel puts the values of an array that can be mapped at the start of a page, so that a copy
/// lies in as few cache lines as it can. An array for all CPUs, of which each has a part: elements of
/// a per-CPU array are found by a second table.
const ALIGNED: usize = BPF_F_MMAPABLE as usize;

#[btf_map(name = "flow_cache_v4")]
pub static FLOW_CACHE_V4: Array<CachedFlow<A4, [u8; 0]>, { entries!(FLOW_CACHE_V4) }, ALIGNED> = Array::new();
#[btf_map(name = "flow_cache_v6")]
pub static FLOW_CACHE_V6: Array<CachedFlow<A6, [u8; 16]>, { entries!(FLOW_CACHE_V6) }, ALIGNED> =
    Array::new();
#[btf_map(name = "flow_versions")]
pub static FLOW_VERSIONS: Array<u64, { entries!(FLOW_VERSIONS) }> = Array::new();

/// How many copies of flows each CPU keeps: none, unless the loader makes room. The verifier knows the value, and leaves out what it rules
/// out: without a cache, nothing asks for one.
#[unsafe(no_mangle)]
pub static FLOW_CACHE_SLOTS: Global<u32> = Global::new(0);
/// For how long they are good.
#[unsafe(no_mangle)]
pub static FLOW_CACHE_JIFFIES: Global<u32> = Global::new(CACHE_JIFFIES);

#[btf_map(name = "vips_v4")]
pub static VIPS_V4: HashMap<VipKey<A4>, u32, { entries!(VIPS_V4) }> = HashMap::new();
#[btf_map(name = "vips_v6")]
pub static VIPS_V6: HashMap<VipKey<A6>, u32, { entries!(VIPS_V6) }> = HashMap::new();
#[btf_map(name = "services")]
pub static SERVICES: Array<Service, { entries!(SERVICES) }> = Array::new();
#[btf_map(name = "service_names")]
pub static SERVICE_NAMES: Array<ServiceName, { entries!(SERVICE_NAMES) }> = Array::new();
#[btf_map(name = "round_robin")]
pub static ROUND_ROBIN: Array<u64, { entries!(ROUND_ROBIN) }> = Array::new();
#[btf_map(name = "slots")]
pub static SLOTS: Array<u32, { entries!(SLOTS) }> = Array::new();
#[btf_map(name = "backends")]
pub static BACKENDS: Array<Backend, { entries!(BACKENDS) }> = Array::new();
#[btf_map(name = "snat_addresses")]
pub static SNAT_ADDRESSES: Array<A6, { entries!(SNAT_ADDRESSES) }> = Array::new();
#[btf_map(name = "config")]
pub static CONFIG: Array<Config, { entries!(CONFIG) }> = Array::new();
#[btf_map(name = "service_stats")]
pub static SERVICE_STATS: PerCpuArray<ServiceStats, { entries!(SERVICE_STATS) }> = PerCpuArray::new();
#[btf_map(name = "backend_stats")]
pub static BACKEND_STATS: PerCpuArray<BackendStats, { entries!(BACKEND_STATS) }> = PerCpuArray::new();
#[btf_map(name = "open_flows")]
pub static OPEN_FLOWS: Array<u32, { entries!(OPEN_FLOWS) }> = Array::new();
#[btf_map(name = "drops")]
pub static DROPS: PerCpuArray<DropStats, { entries!(DROPS) }> = PerCpuArray::new();
#[btf_map(name = "fragments_v4")]
pub static FRAGMENTS_V4: LruHashMap<FragmentKey<A4>, Fragment<A4>, { entries!(FRAGMENTS_V4) }> =
    LruHashMap::new();
#[btf_map(name = "fragments_v6")]
pub static FRAGMENTS_V6: LruHashMap<FragmentKey<A6>, Fragment<A6>, { entries!(FRAGMENTS_V6) }> =
    LruHashMap::new();
#[btf_map(name = "src_ranges_v4")]
pub static SOURCE_RANGES_V4: LpmTrie<SourceRange<A4>, u32, { entries!(SOURCE_RANGES_V4) }> = LpmTrie::new();
#[btf_map(name = "src_ranges_v6")]
pub static SOURCE_RANGES_V6: LpmTrie<SourceRange<A6>, u32, { entries!(SOURCE_RANGES_V6) }> = LpmTrie::new();
#[btf_map(name = "affinity_v4")]
pub static AFFINITY_V4: LruHashMap<AffinityKey<A4>, Affinity, { entries!(AFFINITY_V4) }> = LruHashMap::new();
#[btf_map(name = "affinity_v6")]
pub static AFFINITY_V6: LruHashMap<AffinityKey<A6>, Affinity, { entries!(AFFINITY_V6) }> = LruHashMap::new();
#[btf_map(name = "affinity_ticks")]
pub static AFFINITY_TICKS: Array<Tick, { entries!(AFFINITY_TICKS) }> = Array::new();
#[btf_map(name = "conn_limits")]
pub static CONNECTION_LIMITS: Array<ConnectionLimit, { entries!(CONNECTION_LIMITS) }> = Array::new();
#[btf_map(name = "conn_rates_v4")]
pub static CONNECTION_RATES_V4: LruHashMap<
    AffinityKey<A4>,
    ConnectionRate,
    { entries!(CONNECTION_RATES_V4) },
    OWN_LRU,
> = LruHashMap::new();
#[btf_map(name = "conn_rates_v6")]
pub static CONNECTION_RATES_V6: LruHashMap<
    AffinityKey<A6>,
    ConnectionRate,
    { entries!(CONNECTION_RATES_V6) },
    OWN_LRU,
> = LruHashMap::new();
#[btf_map(name = "sockets")]
pub static SOCKETS: LruHashMap<SocketKey, SocketPeer, { entries!(SOCKETS) }> = LruHashMap::new();
#[btf_map(name = "devices")]
pub static DEVICES: DevMapHash<{ entries!(DEVICES) }> = DevMapHash::new();
#[btf_map(name = "programs")]
pub static PROGRAMS: ProgramArray<{ entries!(PROGRAMS) }> = ProgramArray::new();
#[btf_map(name = "tc_programs")]
pub static TC_PROGRAMS: ProgramArray<{ entries!(TC_PROGRAMS) }> = ProgramArray::new();
#[btf_map(name = "scratch_v4")]
pub static SCRATCH_V4: PerCpuArray<Scratch<A4>, { entries!(SCRATCH_V4) }> = PerCpuArray::new();
#[btf_map(name = "scratch_v6")]
pub static SCRATCH_V6: PerCpuArray<Scratch<A6>, { entries!(SCRATCH_V6) }> = PerCpuArray::new();
#[btf_map(name = "scratch_fib")]
pub static SCRATCH_FIB: PerCpuArray<bpf_fib_lookup, { entries!(SCRATCH_FIB) }> = PerCpuArray::new();
