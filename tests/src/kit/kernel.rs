//! The kernel programs as they are built, run by `BPF_PROG_TEST_RUN`. Nothing is attached or pinned.

use std::hash::Hash;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context as _, Result, anyhow};
use aya::maps::lpm_trie::Key;
use aya::maps::xdp::DevMapHash;
use aya::maps::{Array, HashMap, LpmTrie, MapData, PerCpuArray, ProgramArray};
use aya::programs::tc::TcAttachOptions;
use aya::programs::{
    LinkOrder, Program, ProgramError, SchedClassifier, TcAttachType, TestRun as _, TestRunOptions, Xdp,
};
use aya::{Ebpf, EbpfLoader, Pod};
use lb_common::abi::maps::{
    self, CALLED_PROGRAMS, COOKIE_PROGRAMS, EGRESS_PROGRAM, ENTRY_PROGRAM, INGRESS_PROGRAM,
    TC_CALLED_PROGRAMS, TC_COOKIE_PROGRAMS,
};
use lb_common::abi::{
    Affinity, AffinityKey, Backend, BackendStats, CachedFlow, Config, ConnectionLimit, ConnectionRate,
    DropStats, Flow, FlowKey, Fragment, FragmentKey, Plain, Service, ServiceStats, SourceRange, TICK_SHIFT,
    Tick, VipKey,
};

use super::device::{Action, AnyKey, Device, age_affinity, age_flow, age_fragment, age_rate, wide};
use super::host::{BACKENDS, Hook, SERVICES, SLOTS, SNAT_ADDRESSES, Stats};
use super::tables::{Snapshot, Snapshots};

/// A map's key or value as bytes.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Raw<T>(pub T);

#[expect(unsafe_code, reason = "`Plain` promises what `Pod` asks")]
// SAFETY: a transparent wrapper around plain bytes without padding.
unsafe impl<T: Plain> Pod for Raw<T> {}

/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;

type CacheOf<A, P> = Array<MapData, Raw<CachedFlow<A, P>>>;
type Hashed<K, V> = HashMap<MapData, Raw<K>, Raw<V>>;

struct Family<A> {
    established: Hashed<FlowKey<A>, Flow<A>>,
    transient: Hashed<FlowKey<A>, Flow<A>>,
    fragments: Hashed<FragmentKey<A>, Fragment<A>>,
    vips: Hashed<VipKey<A>, u32>,
    sources: LpmTrie<MapData, Raw<SourceRange<A>>, u32>,
    affinities: Hashed<AffinityKey<A>, Affinity>,
    rates: Hashed<AffinityKey<A>, ConnectionRate>,
}

/// The loaded programs and their maps.
pub struct Kernel {
    ebpf: Ebpf,
    hook: Hook,
    v4: Family<[u8; 4]>,
    v6: Family<[u8; 16]>,
    services: Array<MapData, Raw<Service>>,
    affinity_ticks: Array<MapData, u32>,
    connection_limits: Array<MapData, Raw<ConnectionLimit>>,
    slots: Array<MapData, u32>,
    backends: Array<MapData, Raw<Backend>>,
    snat_addresses: Array<MapData, [u8; 16]>,
    config: Array<MapData, Raw<Config>>,
    service_stats: PerCpuArray<MapData, Raw<ServiceStats>>,
    backend_stats: PerCpuArray<MapData, Raw<BackendStats>>,
    drops: PerCpuArray<MapData, Raw<DropStats>>,
    open_flows: Array<MapData, u32>,
    devices: DevMapHash<MapData>,
    cache_v4: CacheOf<[u8; 4], [u8; 0]>,
    cache_v6: CacheOf<[u8; 16], [u8; 16]>,
    _programs: ProgramArray<MapData>,
    output: Vec<u8>,
}

/// Where the object is: `POINTSMAN_EBPF_OBJECT`, or where `cargo xtask build-ebpf` leaves it.
#[must_use]
pub fn object_path() -> PathBuf {
    std::env::var_os("POINTSMAN_EBPF_OBJECT").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/ebpf/pointsman-ebpf.o")),
        PathBuf::from,
    )
}

/// The object, or the line that says why the test is skipped.
///
/// # Errors
/// When it was not built, or when programs may not be loaded.
pub fn object() -> Result<Vec<u8>, String> {
    let path = object_path();
    let bytes = std::fs::read(&path)
        .map_err(|error| format!("{}: {error}; run `cargo xtask build-ebpf`", path.display()))?;
    #[expect(unsafe_code, reason = "a question to the kernel without arguments")]
    // SAFETY: no arguments, cannot fail.
    let user = unsafe { libc::geteuid() };
    if user == 0 { Ok(bytes) } else { Err("loading kernel programs needs root".into()) }
}

/// Unwraps the object, or prints why the test is skipped and returns from it.
#[macro_export]
macro_rules! object_or_skip {
    () => {
        match $crate::kit::kernel::object() {
            Ok(object) => object,
            Err(reason) => {
                println!("SKIP: {reason}");
                return;
            }
        }
    };
}

impl Kernel {
    /// The programs of XDP, and that for packets that leave; see [`Self::load_as`].
    ///
    /// # Errors
    /// What the kernel refuses, with the verifier's log.
    pub fn load(object: &[u8]) -> Result<Self> {
        Self::load_as(object, Hook::Xdp)
    }

    /// Loads all programs, with small maps, in a network namespace of the calling thread's own (it
    /// ends with the thread) and on one CPU: what is per CPU is then one thing.
    ///
    /// # Errors
    /// What the kernel refuses, with the verifier's log.
    pub fn load_as(object: &[u8], hook: Hook) -> Result<Self> {
        Self::load_with_cache(object, hook, 0)
    }

    /// The same with [`CACHE_SLOTS`] copies of flows, or with as few as are asked for: they are good
    /// until they are pushed out, or time passes ([`Device::wait`]).
    ///
    /// # Errors
    /// What the kernel refuses, with the verifier's log.
    pub fn load_with_cache(object: &[u8], hook: Hook, slots: u32) -> Result<Self> {
        isolate()?;
        let mut loader = loader();
        loader.override_global(maps::FLOW_CACHE_SLOTS, &slots, true).override_global(
            maps::FLOW_CACHE_JIFFIES,
            &FOREVER,
            true,
        );
        let mut ebpf = loader.load(object).context("cannot load the object")?;
        let array = if hook == Hook::Xdp { maps::PROGRAMS } else { maps::TC_PROGRAMS };
        let mut programs = ProgramArray::try_from(ebpf.take_map(array.name).context("no map")?)?;
        match hook {
            Hook::Xdp => {
                for (index, name) in CALLED_PROGRAMS.iter().chain(&COOKIE_PROGRAMS).enumerate() {
                    programs.set(index as u32, load_program::<Xdp>(&mut ebpf, name)?.fd()?, 0)?;
                }
                load_program::<Xdp>(&mut ebpf, ENTRY_PROGRAM)?;
            }
            Hook::Tc => {
                for (index, name) in TC_CALLED_PROGRAMS.iter().chain(&TC_COOKIE_PROGRAMS).enumerate() {
                    programs.set(index as u32, load_program::<SchedClassifier>(&mut ebpf, name)?.fd()?, 0)?;
                }
                load_program::<SchedClassifier>(&mut ebpf, INGRESS_PROGRAM)?;
            }
        }
        load_program::<SchedClassifier>(&mut ebpf, EGRESS_PROGRAM)?;
        let mut map = |name: &'static str| ebpf.take_map(name).ok_or_else(|| anyhow!("no map {name}"));
        Ok(Self {
            v4: Family {
                established: map("flows_v4")?.try_into()?,
                transient: map("transient_v4")?.try_into()?,
                fragments: map("fragments_v4")?.try_into()?,
                vips: map("vips_v4")?.try_into()?,
                sources: map("src_ranges_v4")?.try_into()?,
                affinities: map("affinity_v4")?.try_into()?,
                rates: map("conn_rates_v4")?.try_into()?,
            },
            v6: Family {
                established: map("flows_v6")?.try_into()?,
                transient: map("transient_v6")?.try_into()?,
                fragments: map("fragments_v6")?.try_into()?,
                vips: map("vips_v6")?.try_into()?,
                sources: map("src_ranges_v6")?.try_into()?,
                affinities: map("affinity_v6")?.try_into()?,
                rates: map("conn_rates_v6")?.try_into()?,
            },
            services: map("services")?.try_into()?,
            affinity_ticks: map("affinity_ticks")?.try_into()?,
            connection_limits: map("conn_limits")?.try_into()?,
            slots: map("slots")?.try_into()?,
            backends: map("backends")?.try_into()?,
            snat_addresses: map("snat_addresses")?.try_into()?,
            config: map("config")?.try_into()?,
            service_stats: map("service_stats")?.try_into()?,
            backend_stats: map("backend_stats")?.try_into()?,
            drops: map("drops")?.try_into()?,
            open_flows: map("open_flows")?.try_into()?,
            devices: map("devices")?.try_into()?,
            cache_v4: map("flow_cache_v4")?.try_into()?,
            cache_v6: map("flow_cache_v6")?.try_into()?,
            _programs: programs,
            ebpf,
            hook,
            output: vec![0; 8192],
        })
    }

    /// Attaches the program for packets that come in to a device of the network namespace.
    ///
    /// # Errors
    /// When the kernel is older than 6.6.
    pub fn attach_to(&mut self, device: &str) -> Result<()> {
        let program: &mut SchedClassifier =
            self.ebpf.program_mut(INGRESS_PROGRAM).context("no program")?.try_into()?;
        let options = TcAttachOptions::TcxOrder(LinkOrder::first());
        program.attach_with_options(device, TcAttachType::Ingress, options)?;
        Ok(())
    }

    /// Runs a packet that leaves the node through, as a super-packet of segments of this size if one
    /// is given.
    ///
    /// # Panics
    /// When the program cannot be run.
    pub fn leave_as(&mut self, packet: &[u8], segment: Option<u32>) -> (Action, Vec<u8>) {
        self.run_classifier(EGRESS_PROGRAM, packet, segment)
    }

    fn run_classifier(&mut self, name: &str, packet: &[u8], segment: Option<u32>) -> (Action, Vec<u8>) {
        // Offsets of `gso_segs` and `gso_size` in struct __sk_buff, include/uapi/linux/bpf.h.
        const SEGMENTS: usize = 164;
        const SEGMENT_SIZE: usize = 176;
        let mut context = [0; 192];
        if let Some(size) = segment {
            let count = (packet.len() as u32).div_ceil(size);
            context[SEGMENTS..SEGMENTS + 4].copy_from_slice(&count.to_ne_bytes());
            context[SEGMENT_SIZE..SEGMENT_SIZE + 4].copy_from_slice(&size.to_ne_bytes());
        }
        let program: &SchedClassifier =
            self.ebpf.program(name).expect("the program is there").try_into().expect("it is a classifier");
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut self.output),
            ctx_in: segment.is_some().then_some(&context),
            ..TestRunOptions::default()
        };
        let result = program.test_run(options).expect("the program can be run");
        let action = match result.return_value as i32 {
            -1 => Action::Pass,
            2 => Action::Drop,
            // Where to is the kernel's secret.
            7 => Action::Redirect,
            other => panic!("TC action {other}"),
        };
        (action, self.output[..result.data_size_out as usize].to_vec())
    }

    /// The time as the programs see it.
    #[must_use]
    pub fn now() -> Tick {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        #[expect(unsafe_code, reason = "a question to the kernel")]
        // SAFETY: the pointer is valid.
        unsafe {
            libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut time);
        }
        ((time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64) >> TICK_SHIFT) as Tick
    }
}

/// Jiffies that no test takes.
pub const FOREVER: u32 = u32::MAX / 2;

/// Copies of flows that there is room for on each CPU: few, so that flows push each other out.
pub const CACHE_SLOTS: u32 = 64;

/// A loader that gives every map a size fit for tests.
#[must_use]
pub fn loader() -> EbpfLoader<'static> {
    let mut loader = EbpfLoader::new();
    let cpus = aya::util::nr_cpus().expect("the number of CPUs") as u32;
    for map in maps::ALL {
        loader.map_max_entries(map.name, map.default_entries.min(16_384));
    }
    loader
        .map_max_entries("services", SERVICES)
        .map_max_entries("service_stats", SERVICES)
        .map_max_entries("affinity_ticks", SERVICES)
        .map_max_entries("conn_limits", SERVICES)
        .map_max_entries("round_robin", SERVICES)
        .map_max_entries("slots", SLOTS)
        .map_max_entries("backends", BACKENDS)
        .map_max_entries("backend_stats", BACKENDS)
        .map_max_entries("open_flows", BACKENDS)
        .map_max_entries("snat_addresses", SNAT_ADDRESSES)
        .map_max_entries("flow_cache_v4", CACHE_SLOTS * cpus)
        .map_max_entries("flow_cache_v6", CACHE_SLOTS * cpus)
        // With the cache, the programs are as large as they get.
        .override_global(maps::FLOW_CACHE_SLOTS, &CACHE_SLOTS, true);
    loader
}

/// A kind of program.
trait Load {
    fn load(&mut self) -> Result<(), ProgramError>;
}

impl Load for Xdp {
    fn load(&mut self) -> Result<(), ProgramError> {
        Self::load(self)
    }
}

impl Load for SchedClassifier {
    fn load(&mut self) -> Result<(), ProgramError> {
        Self::load(self)
    }
}

fn load_program<'e, P: Load>(ebpf: &'e mut Ebpf, name: &str) -> Result<&'e mut P>
where
    &'e mut P: TryFrom<&'e mut Program, Error = ProgramError>,
{
    let program: &mut P = ebpf.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?;
    program.load().with_context(|| format!("cannot load {name}"))?;
    Ok(program)
}

fn isolate() -> Result<()> {
    #[expect(unsafe_code, reason = "no library call for these in use here")]
    // SAFETY: the set is plain data; both calls affect the calling thread only.
    let done = unsafe {
        let mut cpus: libc::cpu_set_t = std::mem::zeroed();
        let cpu = libc::sched_getcpu().max(0) as usize;
        libc::CPU_SET(cpu, &mut cpus);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const cpus) == 0
            && libc::unshare(libc::CLONE_NEWNET) == 0
    };
    if done { Ok(()) } else { Err(std::io::Error::last_os_error()).context("cannot isolate the thread") }
}

impl<A: Copy + Ord + Hash> Family<A>
where
    FlowKey<A>: Plain,
    Flow<A>: Plain,
    FragmentKey<A>: Plain,
    Fragment<A>: Plain,
    SourceRange<A>: Plain,
    AffinityKey<A>: Plain + Ord,
{
    fn snapshot(&self) -> Snapshot<A> {
        Snapshot {
            established: entries(&self.established).collect(),
            transient: entries(&self.transient).collect(),
            fragments: entries(&self.fragments)
                .map(|(key, note)| ((key.source, key.destination, key.identification, key.protocol), note))
                .collect(),
            affinities: entries(&self.affinities).collect(),
            rates: entries(&self.rates).collect(),
        }
    }

    fn age(&mut self, ticks: Tick) {
        for table in [&mut self.established, &mut self.transient] {
            let all: Vec<_> = entries(table).collect();
            for (key, mut flow) in all {
                age_flow(&key, &mut flow, ticks);
                table.insert(Raw(key), Raw(flow), 0).expect("an entry can be replaced");
            }
        }
        let all: Vec<_> = entries(&self.fragments).collect();
        for (key, mut fragment) in all {
            age_fragment(&mut fragment, ticks);
            self.fragments.insert(Raw(key), Raw(fragment), 0).expect("an entry can be replaced");
        }
        let all: Vec<_> = entries(&self.affinities).collect();
        for (key, mut affinity) in all {
            age_affinity(&mut affinity, ticks);
            self.affinities.insert(Raw(key), Raw(affinity), 0).expect("an entry can be replaced");
        }
    }

    fn age_rates(&mut self, ticks: Tick) {
        let all: Vec<_> = entries(&self.rates).collect();
        for (key, mut rate) in all {
            age_rate(&mut rate, ticks);
            self.rates.insert(Raw(key), Raw(rate), 0).expect("an entry can be replaced");
        }
    }

    fn set_source_range(&mut self, range: SourceRange<A>, length: u32, allowed: bool) {
        let key = Key::new(SourceRange::<A>::INDEX_BITS + length, Raw(range));
        if allowed {
            self.sources.insert(&key, 1, 0).expect("the range can be added");
        } else {
            // It need not be there.
            let _ = self.sources.remove(&key);
        }
    }
}

fn entries<K: Plain, V: Plain>(map: &Hashed<K, V>) -> impl Iterator<Item = (K, V)> {
    map.iter().map(|entry| {
        let (key, value) = entry.expect("the map can be read");
        (key.0, value.0)
    })
}

/// Sums a per-CPU counter up, and leaves out elements that are zero.
fn sums<T: Plain + Default + PartialEq>(
    map: &PerCpuArray<MapData, Raw<T>>,
    add: impl Fn(T, T) -> T,
) -> std::collections::BTreeMap<u32, T> {
    (0..map.len())
        .map(|index| {
            let values = map.get(&index, 0).expect("the counter can be read");
            (index, values.iter().fold(T::default(), |sum, value| add(sum, value.0)))
        })
        .filter(|(_, sum)| *sum != T::default())
        .collect()
}

impl Device for Kernel {
    fn send(&mut self, packet: &[u8]) -> (Action, Vec<u8>) {
        if self.hook == Hook::Tc {
            let header = if packet.get(12..14) == Some(&[0x86, 0xdd]) { 40 } else { 20 };
            if packet.len() < ETHERNET + header {
                // Test runs take no shorter ones (net/bpf/test_run.c).
                return (Action::Pass, packet.to_vec());
            }
            return self.run_classifier(INGRESS_PROGRAM, packet, None);
        }
        let program: &Xdp = self
            .ebpf
            .program(ENTRY_PROGRAM)
            .expect("the entry program is there")
            .try_into()
            .expect("it is an XDP program");
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut self.output),
            ..TestRunOptions::default()
        };
        let result = program.test_run(options).expect("the program can be run");
        let action = match result.return_value {
            1 => Action::Drop,
            2 => Action::Pass,
            3 => Action::Transmit,
            4 => Action::Redirect,
            other => panic!("XDP action {other}"),
        };
        (action, self.output[..result.data_size_out as usize].to_vec())
    }

    fn leave(&mut self, packet: &[u8]) -> (Action, Vec<u8>) {
        self.leave_as(packet, None)
    }

    fn wait(&mut self, ticks: Tick) {
        self.v4.age(ticks);
        self.v4.age_rates(ticks);
        self.v6.age(ticks);
        self.v6.age_rates(ticks);
        for index in 0..self.cache_v4.len() {
            let nothing = CachedFlow::nobodys([0; 4], []);
            self.cache_v4.set(index, Raw(nothing), 0).expect("the cache can be cleared");
            let nothing = CachedFlow::nobodys([0; 16], [0; 16]);
            self.cache_v6.set(index, Raw(nothing), 0).expect("the cache can be cleared");
        }
    }

    fn set_vip(&mut self, address: IpAddr, port: u16, protocol: u8, service: u32) {
        let port = port.to_be_bytes();
        match address {
            IpAddr::V4(address) => {
                self.v4.vips.insert(Raw(VipKey::new(address.octets(), port, protocol)), Raw(service), 0)
            }
            IpAddr::V6(address) => {
                self.v6.vips.insert(Raw(VipKey::new(address.octets(), port, protocol)), Raw(service), 0)
            }
        }
        .expect("the VIP can be set");
    }

    fn set_service(&mut self, index: u32, service: Service) {
        self.services.set(index, Raw(service), 0).expect("the Service can be set");
    }

    fn set_source_range(&mut self, service: u32, (address, length): (IpAddr, u32), allowed: bool) {
        match address {
            IpAddr::V4(address) => {
                self.v4.set_source_range(SourceRange::new(service, address.octets()), length, allowed);
            }
            IpAddr::V6(address) => {
                self.v6.set_source_range(SourceRange::new(service, address.octets()), length, allowed);
            }
        }
    }

    fn set_affinity_ticks(&mut self, service: u32, ticks: Tick) {
        self.affinity_ticks.set(service, ticks, 0).expect("the timeout can be set");
    }

    fn set_connection_limit(&mut self, service: u32, limit: ConnectionLimit) {
        self.connection_limits.set(service, Raw(limit), 0).expect("the limit can be set");
    }

    fn set_slot(&mut self, index: u32, backend: u32) {
        self.slots.set(index, backend, 0).expect("the slot can be set");
    }

    fn set_backend(&mut self, index: u32, backend: Backend) {
        self.backends.set(index, Raw(backend), 0).expect("the backend can be set");
    }

    fn set_snat_address(&mut self, index: u32, address: IpAddr) {
        self.snat_addresses.set(index, wide(address), 0).expect("the address can be set");
    }

    fn set_config(&mut self, config: Config) {
        self.config.set(0, Raw(config), 0).expect("the settings can be set");
    }

    fn hook(&self) -> Hook {
        self.hook
    }

    fn add_device(&mut self, ifindex: u32) {
        // A test run redirects nothing: any device may stand for it, and loopback is always there.
        self.devices.insert(ifindex, 1, None, 0).expect("the device can be set");
    }

    fn evict(&mut self, key: AnyKey) -> bool {
        match key {
            AnyKey::V4(key) => self.v4.transient.remove(&Raw(key)).is_ok(),
            AnyKey::V6(key) => self.v6.transient.remove(&Raw(key)).is_ok(),
        }
    }

    fn snapshots(&mut self) -> Snapshots {
        Snapshots { v4: self.v4.snapshot(), v6: self.v6.snapshot() }
    }

    fn stats(&mut self) -> Stats {
        Stats {
            services: sums(&self.service_stats, |a, b| ServiceStats {
                packets_in: a.packets_in + b.packets_in,
                bytes_in: a.bytes_in + b.bytes_in,
                packets_out: a.packets_out + b.packets_out,
                bytes_out: a.bytes_out + b.bytes_out,
                new_flows: a.new_flows + b.new_flows,
                refused: a.refused + b.refused,
            }),
            backends: sums(&self.backend_stats, |a, b| BackendStats {
                packets_in: a.packets_in + b.packets_in,
                bytes_in: a.bytes_in + b.bytes_in,
                packets_out: a.packets_out + b.packets_out,
                bytes_out: a.bytes_out + b.bytes_out,
                new_flows: a.new_flows + b.new_flows,
            }),
            open: (0..BACKENDS)
                .map(|index| (index, self.open_flows.get(&index, 0).expect("an element of an array")))
                .filter(|(_, flows)| *flows != 0)
                .collect(),
            drops: sums(&self.drops, |a, b| DropStats {
                packets: a.packets + b.packets,
                bytes: a.bytes + b.bytes,
            }),
        }
    }
}
