//! Loads the kernel programs over the pinned maps, or creates and pins both.

use anyhow::{Context, Result, bail};
use aya::maps::{MapData, ProgramArray};
use aya::programs::{CgroupSockAddr, Program, ProgramError, ProgramFd, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader};
use lb_common::abi::maps::{self, SocketProgram};
use lb_common::abi::{CachedFlow, Flow, FlowKey};
use tokio::runtime::{Handle, RuntimeFlavor};
use tracing::{info, warn};

use super::growth::Growth;
use super::{Cpus, KernelMaps, PinDirectory, object, refusal};

/// Sizes of the maps that can be chosen.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Established IPv4 flows; IPv6 gets half of it.
    pub flows: u32,
    /// Service entries: one for each port of each VIP.
    pub services: u32,
    /// Backends over all Service entries.
    pub backends: u32,
    /// Source ranges of each family over all Service entries.
    pub source_ranges: u32,
    /// Copies of flows of each family that each CPU keeps; 0 is no flow cache.
    pub flow_cache: u32,
}

/// At most as many entries has a map of a trial: those that no flag sets the size of are large, and take
/// their memory at once.
const TRIAL_ENTRIES: u32 = 1_024;

impl Default for Sizes {
    fn default() -> Self {
        Self {
            flows: maps::DEFAULT_FLOWS,
            services: maps::DEFAULT_SERVICES,
            backends: maps::DEFAULT_BACKENDS,
            source_ranges: maps::DEFAULT_SOURCE_RANGES,
            flow_cache: maps::DEFAULT_FLOW_CACHE,
        }
    }
}

/// So much memory the flow cache takes at most: a machine may have far fewer CPUs than it has room for,
/// and the cache has a part for each that there may be.
const FLOW_CACHE_BYTES: u32 = 64 << 20;

impl Sizes {
    /// Copies of flows of each family that each of as many CPUs keeps.
    fn flow_cache_on(&self, cpus: u32) -> u32 {
        let both = size_of::<CachedFlow<[u8; 4], [u8; 0]>>() + size_of::<CachedFlow<[u8; 16], [u8; 16]>>();
        self.flow_cache.min(FLOW_CACHE_BYTES / (both as u32 * cpus.max(1)))
    }

    /// Number of entries of a map on a node with these CPUs.
    fn of(&self, map: maps::Map, cpus: Cpus) -> u32 {
        match map {
            maps::FLOWS_V4 => self.flows.saturating_mul(2),
            maps::FLOWS_V6 => self.flows,
            maps::TRANSIENT_V4 => cpus.divided(self.of(maps::FLOWS_V4, cpus), flow_size::<[u8; 4]>()),
            maps::TRANSIENT_V6 => cpus.divided(self.of(maps::FLOWS_V6, cpus), flow_size::<[u8; 16]>()),
            maps::VIPS_V4
            | maps::VIPS_V6
            | maps::SERVICES
            | maps::SERVICE_NAMES
            | maps::ROUND_ROBIN
            | maps::AFFINITY_TICKS
            | maps::CONNECTION_LIMITS
            | maps::SERVICE_STATS => self.services,
            maps::SOURCE_RANGES_V4 | maps::SOURCE_RANGES_V6 => self.source_ranges,
            // A map without elements is none.
            maps::FLOW_CACHE_V4 | maps::FLOW_CACHE_V6 => {
                self.flow_cache_on(cpus.possible).saturating_mul(cpus.possible).max(1)
            }
            maps::BACKENDS | maps::BACKEND_STATS | maps::OPEN_FLOWS => self.backends,
            maps::SLOTS => self.backends.saturating_mul(maps::SLOTS_PER_BACKEND),
            other => other.default_entries,
        }
    }
}

/// Bytes of an entry of a flow table.
const fn flow_size<A>() -> usize {
    size_of::<FlowKey<A>>() + size_of::<Flow<A>>()
}

/// The loaded programs.
pub struct Kernel {
    ebpf: Ebpf,
    programs: ProgramArray<MapData>,
    tc_programs: ProgramArray<MapData>,
    /// Whether the programs of TC are loaded: not before they are needed.
    has_tc: bool,
    /// Whether the programs for SYN cookies are wanted, and loaded as far as others are.
    has_cookies: bool,
    adopted: bool,
}

impl Kernel {
    /// Loads the programs. Maps that are pinned already are adopted with all that they contain, so
    /// that flows go on.
    ///
    /// # Errors
    /// When the kernel refuses; with the verifier's last words or the capability that lacks.
    pub fn load(pins: &PinDirectory, sizes: &Sizes) -> Result<Self> {
        let adopted = pins.is_populated();
        let cpus = Cpus::count()?;
        let growth = Growth::begin(pins, sizes.of(maps::SLOTS, cpus))?;
        let path = |map: maps::Map| match &growth {
            Some(growth) if map == maps::SLOTS => growth.unfinished().to_owned(),
            _ => pins.map(map),
        };
        let paths: Vec<_> = maps::ALL.iter().map(|map| (map.name, path(*map))).collect();
        let mut loader = EbpfLoader::new();
        let cached = sizes.flow_cache_on(cpus.possible);
        if cached < sizes.flow_cache {
            warn!(
                slots = cached,
                wanted = sizes.flow_cache,
                "the flow cache is smaller than asked for: the machine has room for {} CPUs, and more than {} \
                 MiB it does not take; see --flow-cache-slots",
                cpus.possible,
                FLOW_CACHE_BYTES >> 20
            );
        }
        loader.override_global(maps::FLOW_CACHE_SLOTS, &cached, true);
        for (map, (name, path)) in maps::ALL.iter().zip(&paths) {
            if !maps::NOT_PINNED.contains(map) {
                loader.map_pin_path(name, path.as_path());
            }
            loader.map_max_entries(name, sizes.of(*map, cpus));
        }
        let ebpf = loader
            .load(object::bytes()?)
            .context("creating the BPF maps (needs CAP_BPF, CAP_NET_ADMIN and a kernel of 5.12 or later)")?;
        growth.map_or(Ok(()), Growth::finish)?;
        report_sizes(&ebpf, sizes, cpus)?;
        let mut kernel = Self { adopted, ..Self::with_maps(ebpf)? };
        kernel.load_programs()?;
        Ok(kernel)
    }

    /// Makes the maps of a trial: pinned nowhere, they go with this. No program is loaded yet.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn unpinned(sizes: &Sizes) -> Result<Self> {
        Self::unpinned_from(object::bytes()?, sizes)
    }

    fn unpinned_from(object: &[u8], sizes: &Sizes) -> Result<Self> {
        let cpus = Cpus::count()?;
        let mut loader = EbpfLoader::new();
        let cached = sizes.flow_cache_on(cpus.possible);
        loader.override_global(maps::FLOW_CACHE_SLOTS, &cached, true);
        for map in maps::ALL {
            loader.map_max_entries(map.name, sizes.of(*map, cpus).min(TRIAL_ENTRIES));
        }
        Self::with_maps(loader.load(object).context("creating BPF maps")?)
    }

    fn with_maps(mut ebpf: Ebpf) -> Result<Self> {
        let programs = ebpf.take_map(maps::PROGRAMS.name).context("the object lacks the map programs")?;
        let tc_programs = ebpf.take_map(maps::TC_PROGRAMS.name).context("the object lacks a map")?;
        let (programs, tc_programs) = (programs.try_into()?, tc_programs.try_into()?);
        Ok(Self { ebpf, programs, tc_programs, has_tc: false, has_cookies: false, adopted: false })
    }

    /// Loads all programs but those of TC.
    ///
    /// # Errors
    /// When the kernel refuses one; says what it lacks.
    pub(super) fn load_programs(&mut self) -> Result<()> {
        for (index, name) in (0..).zip(maps::CALLED_PROGRAMS) {
            let program = program::<Xdp>(&mut self.ebpf, name)?;
            let fd = program.fd()?.try_clone()?;
            // An older version of the entry program goes on with these from now on: layouts are the
            // same, or the pins would be others.
            put(&mut self.programs, index, &fd, name)?;
        }
        program::<Xdp>(&mut self.ebpf, maps::ENTRY_PROGRAM)?;
        program::<SchedClassifier>(&mut self.ebpf, maps::EGRESS_PROGRAM)?;
        let origin = if self.adopted { "adopted" } else { "created" };
        info!(maps = origin, "kernel programs are loaded");
        Ok(())
    }

    /// Loads the programs for SYN cookies, now for XDP, and for TC when that is needed.
    ///
    /// # Errors
    /// When the kernel refuses them: their helpers came with Linux 6.0.
    pub fn load_cookies(&mut self) -> Result<()> {
        if self.has_cookies {
            return Ok(());
        }
        for (index, name) in (maps::PROGRAM_COOKIE_V4..).zip(maps::COOKIE_PROGRAMS) {
            let fd = program::<Xdp>(&mut self.ebpf, name)?.fd()?.try_clone()?;
            put(&mut self.programs, index, &fd, name)?;
        }
        self.has_cookies = true;
        if self.has_tc {
            self.load_tc_cookies_if_possible()?;
        }
        Ok(())
    }

    /// Whether the programs for SYN cookies are loaded.
    #[must_use]
    pub fn has_cookies(&self) -> bool {
        self.has_cookies
    }

    /// Where the kernel refuses them for TC alone, connections begin there as without cookies.
    fn load_tc_cookies_if_possible(&mut self) -> Result<()> {
        let Err(error) = self.load_tc_cookies() else { return Ok(()) };
        warn!("SYN cookies are not used where packets come in by TC: {error:#}");
        // Called in their place.
        for (index, name) in
            (maps::PROGRAM_COOKIE_V4..).zip([maps::TC_CALLED_PROGRAMS[2], maps::TC_CALLED_PROGRAMS[3]])
        {
            let fd = program::<SchedClassifier>(&mut self.ebpf, name)?.fd()?.try_clone()?;
            put(&mut self.tc_programs, index, &fd, name)?;
        }
        Ok(())
    }

    /// Loads the programs of TC for SYN cookies.
    ///
    /// # Errors
    /// When the kernel refuses one.
    pub(super) fn load_tc_cookies(&mut self) -> Result<()> {
        for (index, name) in (maps::PROGRAM_COOKIE_V4..).zip(maps::TC_COOKIE_PROGRAMS) {
            let fd = program::<SchedClassifier>(&mut self.ebpf, name)?.fd()?.try_clone()?;
            put(&mut self.tc_programs, index, &fd, name)?;
        }
        Ok(())
    }

    /// The program that is attached to devices.
    ///
    /// # Errors
    /// When the object lacks it.
    pub fn entry_program(&mut self) -> Result<&mut Xdp> {
        let program =
            self.ebpf.program_mut(maps::ENTRY_PROGRAM).context("the object lacks its entry program")?;
        Ok(program.try_into()?)
    }

    /// The program that is attached to devices in TC. With those that it calls it is loaded when it is
    /// first asked for.
    ///
    /// # Errors
    /// When the object lacks one, or the kernel refuses it.
    pub fn ingress_program(&mut self) -> Result<&mut SchedClassifier> {
        if !self.has_tc {
            aside(|| self.load_tc_programs())?;
            self.has_tc = true;
        }
        let program =
            self.ebpf.program_mut(maps::INGRESS_PROGRAM).context("the object lacks its TC program")?;
        Ok(program.try_into()?)
    }

    fn load_tc_programs(&mut self) -> Result<()> {
        for (index, name) in (0..).zip(maps::TC_CALLED_PROGRAMS) {
            let program = program::<SchedClassifier>(&mut self.ebpf, name)?;
            let fd = program.fd()?.try_clone()?;
            put(&mut self.tc_programs, index, &fd, name)?;
        }
        if self.has_cookies {
            self.load_tc_cookies_if_possible()?;
        }
        program::<SchedClassifier>(&mut self.ebpf, maps::INGRESS_PROGRAM)?;
        Ok(())
    }

    /// The program that is attached where replies of backends on this node leave.
    ///
    /// # Errors
    /// When the object lacks it.
    pub fn egress_program(&mut self) -> Result<&mut SchedClassifier> {
        let program =
            self.ebpf.program_mut(maps::EGRESS_PROGRAM).context("the object lacks its egress program")?;
        Ok(program.try_into()?)
    }
}

impl Kernel {
    /// A program for sockets. It is loaded when it is first asked for.
    ///
    /// # Errors
    /// When the object lacks it, or the kernel refuses it.
    pub fn socket_program(&mut self, wanted: SocketProgram) -> Result<&mut CgroupSockAddr> {
        let preferred = program::<CgroupSockAddr>(&mut self.ebpf, wanted.name).map(drop);
        match (preferred, wanted.without_reason) {
            (Ok(()), _) => program(&mut self.ebpf, wanted.name),
            (Err(_), Some(other)) => program(&mut self.ebpf, other),
            (Err(error), None) => Err(error),
        }
    }
}

/// Does what takes the verifier some tenths of a second. The runtime's other tasks (Leases, answers)
/// go on by another thread meanwhile.
fn aside<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

/// Puts a program where others call it.
fn put(programs: &mut ProgramArray<MapData>, index: u32, fd: &ProgramFd, name: &str) -> Result<()> {
    programs.set(index, fd, 0).with_context(|| format!("putting the program {name} in place"))
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

impl Load for CgroupSockAddr {
    fn load(&mut self) -> Result<(), ProgramError> {
        Self::load(self)
    }
}

/// Loads a program.
fn program<'e, P: Load>(ebpf: &'e mut Ebpf, name: &str) -> Result<&'e mut P>
where
    &'e mut P: TryFrom<&'e mut Program, Error = ProgramError>,
{
    let program: &mut P =
        ebpf.program_mut(name).with_context(|| format!("the object lacks the program {name}"))?.try_into()?;
    match program.load() {
        // Loaded already by an attempt of which something else failed.
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(program),
        Err(ProgramError::LoadError { io_error, verifier_log }) => {
            let log = verifier_log.to_string();
            if let Some(reason) = refusal::explain(&log) {
                bail!("this kernel, {}, cannot run the program {name}: {reason}", kernel_release());
            }
            let tail: Vec<_> = log.lines().rev().take(12).collect();
            let tail: Vec<_> = tail.into_iter().rev().collect();
            bail!("the kernel refuses the program {name}: {io_error}\n{}", tail.join("\n"));
        }
        Err(error) => Err(error).with_context(|| format!("loading the program {name}")),
    }
}

/// As `uname -r` says it.
fn kernel_release() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease");
    release.map_or_else(|_| "of unknown release".to_owned(), |release| format!("Linux {}", release.trim()))
}

/// Pinned maps keep the size they were created with.
fn report_sizes(ebpf: &Ebpf, sizes: &Sizes, cpus: Cpus) -> Result<()> {
    for map in maps::ALL {
        let Some(found) = ebpf.map(map.name) else {
            bail!("the kernel object lacks the map {}: it was built from another version", map.name);
        };
        let data = KernelMaps::data(found)?;
        let (has, wanted) = (data.info()?.max_entries(), sizes.of(*map, cpus));
        // Per-CPU LRU lists round up to a multiple of the number of CPUs.
        if has < wanted || has > wanted + 1024 {
            warn!(
                map = map.name,
                has, wanted, "a pinned map keeps its size; stop the agent with SIGTERM to create it anew"
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookies_that_tc_alone_lacks_are_used_in_xdp_in_either_order() {
        let Ok(object) = object::bytes() else {
            println!("SKIP: the kernel programs are not built");
            return;
        };
        if !nix::unistd::geteuid().is_root() {
            println!("SKIP: needs root");
            return;
        }
        let [.., missing] = maps::TC_COOKIE_PROGRAMS;
        let mut object = object.to_vec();
        let places: Vec<_> =
            (0..object.len()).filter(|at| object[*at..].starts_with(missing.as_bytes())).collect();
        assert!(!places.is_empty());
        places.into_iter().for_each(|at| object[at] = b'x');
        let sizes = Sizes { flows: 1_024, services: 64, backends: 64, source_ranges: 64, flow_cache: 64 };
        for tc_first in [false, true] {
            let mut kernel = Kernel::unpinned_from(&object, &sizes).unwrap();
            if tc_first {
                kernel.ingress_program().unwrap();
            }
            kernel.load_cookies().unwrap();
            kernel.ingress_program().unwrap();
            assert!(kernel.has_cookies() && kernel.load_tc_cookies().is_err(), "{tc_first}");
        }
    }

    #[test]
    fn the_flow_cache_does_not_grow_with_every_cpu_that_might_be() {
        let sizes = |flow_cache| Sizes { flow_cache, ..Sizes::default() };
        assert_eq!(Sizes::default().flow_cache_on(16), maps::DEFAULT_FLOW_CACHE);
        assert_eq!(sizes(0).flow_cache_on(16), 0);
        for cpus in [1, 2, 512, 8_192] {
            let slots = sizes(u32::MAX).flow_cache_on(cpus);
            assert!(
                slots > 0 && u64::from(slots) * u64::from(cpus) * 192 <= 64 << 20,
                "{slots} on {cpus} CPUs"
            );
            let all = Cpus { possible: cpus, online: 1 };
            assert_eq!(sizes(u32::MAX).of(maps::FLOW_CACHE_V4, all), slots * cpus);
        }
    }

    #[test]
    fn only_tables_that_are_divided_grow_with_cpus_that_might_be() {
        let (sizes, all) = (Sizes::default(), Cpus { possible: 8, online: 8 });
        let hot_plug = Cpus { possible: 8, online: 4 };
        for map in maps::ALL {
            let fold = if [maps::TRANSIENT_V4, maps::TRANSIENT_V6].contains(map) { 2 } else { 1 };
            assert_eq!(sizes.of(*map, hot_plug), fold * sizes.of(*map, all), "{}", map.name);
        }
        // What the CPUs that run can use is what was asked for.
        let entries = sizes.of(maps::TRANSIENT_V4, hot_plug);
        assert_eq!(hot_plug.usable(entries, hot_plug.online), sizes.of(maps::FLOWS_V4, hot_plug));
    }
}
