//! The kernel as the forwarding core sees it: maps and helpers.

// long because it is what the core asks of the kernel, one helper after the other.

use core::arch::asm;

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST, bpf_fib_lookup as FibLookup};
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::helpers::generated::{
    bpf_fib_lookup, bpf_get_smp_processor_id, bpf_jiffies64, bpf_ktime_get_coarse_ns,
    bpf_tcp_raw_check_syncookie_ipv4, bpf_tcp_raw_check_syncookie_ipv6, bpf_tcp_raw_gen_syncookie_ipv4,
    bpf_tcp_raw_gen_syncookie_ipv6,
};
use core::ffi::c_void;
use lb_common::abi::{
    AddressFamily, Affinity, AffinityKey, Backend, CachedFlow, Config, ConnectionLimit, ConnectionRate,
    FLOW_VERSION_BITS, Flow, FlowKey, FlowState, FlowStatus, Fragment, FragmentKey, NextHop, Service,
    SourceRange, SourceRangeKey, TICK_SHIFT, Tick, V4, V6, VipKey, VlanTags,
};
use lb_common::forward::cache;
use lb_common::forward::ip::IpFamily;
use lb_common::forward::parse::Link;
use lb_common::forward::platform::{
    ChecksumChange, Datapath, EditFailed, InsertFailed, Packet, ResizeFailed, Tables,
};
use lb_common::forward::scratch::Scratch;
use lb_common::forward::wire::Tcp;

use crate::maps;

/// A program's surroundings: what differs between the hooks is its context.
pub struct Kernel<C> {
    pub context: C,
}

/// What the forwarding core asks of a hook.
pub trait Hook {
    type Packet: Packet;
    /// See [`Datapath::is_on_wire`].
    const ON_WIRE: bool;
    /// See [`Datapath::sends_by_any_device`].
    const ANY_DEVICE: bool;
    /// Whether other programs may run on the same CPU before this one has ended.
    const IS_INTERRUPTED: bool;
    fn packet(&self) -> Self::Packet;
    fn pull(&self, bytes: u32);
    fn add_to_checksum(&self, change: ChecksumChange) -> Result<(), EditFailed>;
    fn add_to_sum(&self, change: u32);
    fn take_out_options(&self, bytes: u32) -> Result<(), ResizeFailed>;
    fn is_unfinished(&self, offset: usize) -> bool;
    fn link(&self) -> Option<Link>;
    fn largest_on_wire(&self, l3: usize, headers: usize) -> usize;
    fn move_head(&self, bytes: i32) -> Result<(), ResizeFailed>;
    fn move_tail(&self, bytes: i32) -> Result<(), ResizeFailed>;
    fn device(&self) -> u32;
    fn context(&self) -> *mut c_void;
    fn set_tags(datapath: &Kernel<Self>, link: &Link, tags: VlanTags) -> Result<(), EditFailed>
    where
        Self: Sized;
}

const EEXIST: i32 = -17;

// rustc declares no atomics for BPF, although cpu v3 has them (Linux 5.12).

/// Adds to a number atomically, and gives what it was before.
///
/// # Safety
/// `number` is valid and aligned.
#[inline(always)]
unsafe fn fetch_add(number: *mut u64, amount: u64) -> u64 {
    let mut value = amount;
    // SAFETY: by the caller's promise.
    unsafe {
        asm!("{value} = atomic_fetch_add((u64 *)({number} + 0), {value})",
            number = in(reg) number, value = inout(reg) value);
    }
    value
}

/// Adds to a word atomically, wrapping around.
///
/// # Safety
/// `word` is valid and aligned.
#[inline(always)]
unsafe fn add(word: *mut u32, amount: u32) {
    // SAFETY: by the caller's promise.
    unsafe {
        asm!("lock *(u32 *)({word} + 0) += {amount}", word = in(reg) word, amount = in(wreg) amount);
    }
}

/// Replaces a word atomically if it has the expected value; says whether it did.
///
/// # Safety
/// `word` is valid and aligned.
#[inline(always)]
unsafe fn compare_exchange(word: *mut u32, expected: u32, new: u32) -> bool {
    let mut found = expected;
    // SAFETY: by the caller's promise.
    unsafe {
        asm!("w0 = cmpxchg32_32({word} + 0, w0, {new})",
            word = in(reg) word, new = in(wreg) new, inout("w0") found);
    }
    found == expected
}

/// Like [`compare_exchange`], of 8 bytes.
///
/// # Safety
/// `word` is valid and aligned.
#[inline(always)]
unsafe fn compare_exchange_wide(word: *mut u64, expected: u64, new: u64) -> bool {
    let mut found = expected;
    // SAFETY: by the caller's promise.
    unsafe {
        asm!("r0 = cmpxchg_64({word} + 0, r0, {new})",
            word = in(reg) word, new = in(reg) new, inout("r0") found);
    }
    found == expected
}

/// Counts one more. Only programs that may be interrupted need more than an addition: nobody else
/// writes the counters of this CPU.
#[inline(always)]
fn count<C: Hook>(counter: &mut u64) {
    if C::IS_INTERRUPTED {
        // SAFETY: a valid and aligned number.
        unsafe { fetch_add(counter, 1) };
    } else {
        *counter += 1;
    }
}

const _: () = assert!(Config::TIMEOUTS == 16, "the mask in `timeout` must fit");

impl<C: Hook> Datapath for Kernel<C> {
    type Packet = C::Packet;

    #[inline(always)]
    fn packet(&self) -> C::Packet {
        self.context.packet()
    }

    #[inline(always)]
    fn is_on_wire(&self) -> bool {
        C::ON_WIRE
    }

    #[inline(always)]
    fn sends_by_any_device(&self) -> bool {
        C::ANY_DEVICE
    }

    #[inline(always)]
    fn link(&self) -> Option<Link> {
        self.context.link()
    }

    #[inline(always)]
    fn set_tags(&self, link: &Link, tags: VlanTags) -> Result<(), EditFailed> {
        C::set_tags(self, link, tags)
    }

    #[inline(always)]
    fn pull(&self, bytes: u32) {
        self.context.pull(bytes);
    }

    #[inline(always)]
    fn add_to_checksum(&self, change: ChecksumChange) -> Result<(), EditFailed> {
        self.context.add_to_checksum(change)
    }

    #[inline(always)]
    fn add_to_sum(&self, change: u32) {
        self.context.add_to_sum(change);
    }

    #[inline(always)]
    fn take_out_options(&self, bytes: u32) -> Result<(), ResizeFailed> {
        self.context.take_out_options(bytes)
    }

    #[inline(always)]
    fn is_unfinished(&self, offset: usize) -> bool {
        self.context.is_unfinished(offset)
    }

    #[inline(always)]
    fn largest_on_wire(&self, l3: usize, headers: usize) -> usize {
        self.context.largest_on_wire(l3, headers)
    }

    #[inline(always)]
    fn move_head(&self, bytes: i32) -> Result<(), ResizeFailed> {
        self.context.move_head(bytes)
    }

    #[inline(always)]
    fn move_tail(&self, bytes: i32) -> Result<(), ResizeFailed> {
        self.context.move_tail(bytes)
    }

    #[inline(always)]
    fn forget(&self, slot: &mut usize, value: usize) -> usize {
        // SAFETY: the slot is valid; volatile, or LLVM would see through it.
        unsafe {
            core::ptr::write_volatile(slot, value);
            core::ptr::read_volatile(slot)
        }
    }

    #[inline(always)]
    fn ingress_device(&self) -> u32 {
        self.context.device()
    }

    #[inline(always)]
    fn now(&self) -> Tick {
        // SAFETY: no arguments.
        (unsafe { bpf_ktime_get_coarse_ns() } >> TICK_SHIFT) as Tick
    }

    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        maps::CONFIG.get(0)
    }

    #[inline(always)]
    fn timeout(&self, state: FlowState) -> Tick {
        let mut index = state as usize;
        // The verifier does not see that there are fewer states than timeouts.
        // SAFETY: an AND of a register.
        unsafe { asm!("{0} &= 15", inout(reg) index, options(pure, nomem, nostack)) };
        match self.config() {
            // SAFETY: the index is below 16.
            Some(config) => unsafe { *config.timeouts.as_ptr().add(index) },
            None => 0,
        }
    }

    #[inline(always)]
    fn service(&self, index: u32) -> Option<Service> {
        // One 8-byte load: both fields are of the same version.
        // SAFETY: `Service` is 8 bytes of plain data, aligned to 8.
        let word = unsafe { maps::SERVICES.get_ptr(index)?.cast::<u64>().read_volatile() };
        Some(Service { first_slot: word as u32, count_and_flags: (word >> 32) as u32 })
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<u32> {
        maps::SLOTS.get(index).copied()
    }

    #[inline(always)]
    fn backend(&self, index: u32) -> Option<&Backend> {
        maps::BACKENDS.get(index)
    }

    #[inline(always)]
    fn snat_address(&self, index: u32) -> Option<[u8; 16]> {
        maps::SNAT_ADDRESSES.get(index).copied()
    }

    #[inline(always)]
    fn next_turn(&self, service: u32) -> u64 {
        match maps::ROUND_ROBIN.get_ptr_mut(service) {
            // SAFETY: the pointer is to an aligned map value that lives as long as the program runs.
            Some(counter) => unsafe { fetch_add(counter, 1) },
            None => 0,
        }
    }

    #[inline(always)]
    fn open_flows(&self, backend: u32) -> u32 {
        maps::OPEN_FLOWS.get(backend).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn flow_opened(&self, backend: u32) {
        if let Some(flows) = maps::OPEN_FLOWS.get_ptr_mut(backend) {
            // SAFETY: as in `next_turn`.
            unsafe { add(flows, 1) };
        }
    }

    #[inline(always)]
    fn flow_ended(&self, backend: u32) {
        if let Some(flows) = maps::OPEN_FLOWS.get_ptr_mut(backend) {
            // SAFETY: as in `next_turn`.
            unsafe { add(flows, u32::MAX) };
        }
    }

    #[inline(always)]
    fn affinity_timeout(&self, service: u32) -> Tick {
        maps::AFFINITY_TICKS.get(service).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn connection_limit(&self, service: u32) -> ConnectionLimit {
        maps::CONNECTION_LIMITS.get(service).copied().unwrap_or_default()
    }

    #[inline(always)]
    fn count_forwarded(&self, service: u32, backend: u32, reply: bool, bytes: u64) {
        // SAFETY (both): per-CPU values, and XDP programs are not preempted by each other.
        if let Some(stats) = maps::SERVICE_STATS.get_ptr_mut(service).map(|stats| unsafe { &mut *stats }) {
            stats.count_forwarded(reply, bytes);
        }
        if let Some(stats) = maps::BACKEND_STATS.get_ptr_mut(backend).map(|stats| unsafe { &mut *stats }) {
            stats.count_forwarded(reply, bytes);
        }
    }

    #[inline(always)]
    fn count_new_flow(&self, service: u32, backend: u32) {
        // SAFETY (both): as above.
        if let Some(stats) = maps::SERVICE_STATS.get_ptr_mut(service).map(|stats| unsafe { &mut *stats }) {
            count::<C>(&mut stats.new_flows);
        }
        if let Some(stats) = maps::BACKEND_STATS.get_ptr_mut(backend).map(|stats| unsafe { &mut *stats }) {
            count::<C>(&mut stats.new_flows);
        }
    }

    #[inline(always)]
    fn count_refused(&self, service: u32) {
        // SAFETY: as above.
        if let Some(stats) = maps::SERVICE_STATS.get_ptr_mut(service).map(|stats| unsafe { &mut *stats }) {
            count::<C>(&mut stats.refused);
        }
    }

    #[inline(always)]
    fn count_drop_number(&self, reason: u32, bytes: u64) {
        // SAFETY: as above.
        if let Some(stats) = maps::DROPS.get_ptr_mut(reason).map(|stats| unsafe { &mut *stats }) {
            stats.packets += 1;
            stats.bytes += bytes;
        }
    }

    #[inline(always)]
    fn caches_flows(&self) -> bool {
        C::ON_WIRE && maps::FLOW_CACHE_SLOTS.load() != 0
    }

    #[inline(always)]
    fn jiffies(&self) -> u32 {
        // SAFETY: no arguments.
        (unsafe { bpf_jiffies64() }) as u32
    }

    #[inline(always)]
    fn cache_lifetime(&self) -> u32 {
        maps::FLOW_CACHE_JIFFIES.load()
    }

    #[inline(always)]
    fn flow_version(&self, hash: u32) -> u16 {
        // Volatile: a version must be from before the flow is looked up.
        // SAFETY: the pointer is to an aligned map value that lives as long as the program runs.
        maps::FLOW_VERSIONS
            .get_ptr(hash >> (32 - FLOW_VERSION_BITS))
            .map_or(0, |version| unsafe { version.read_volatile() } as u16)
    }

    #[inline(always)]
    fn renew_version(&self, hash: u32) {
        if let Some(version) = maps::FLOW_VERSIONS.get_ptr_mut(hash >> (32 - FLOW_VERSION_BITS)) {
            // SAFETY: as above.
            unsafe { fetch_add(version, 1) };
        }
    }

    #[inline(always)]
    fn replace_status(&self, status: &mut FlowStatus, expected: FlowStatus, new: FlowStatus) -> bool {
        let word = |status: FlowStatus| {
            let [low, high] = status.epoch.to_ne_bytes();
            u32::from_ne_bytes([status.state, status.flags, low, high])
        };
        // SAFETY: `FlowStatus` is four plain bytes, aligned to 4.
        unsafe { compare_exchange(core::ptr::from_mut(status).cast(), word(expected), word(new)) }
    }

    #[inline(always)]
    fn replace_rate(&self, rate: &mut ConnectionRate, expected: u64, new: u64) -> bool {
        // SAFETY: a reference to an aligned word.
        unsafe { compare_exchange_wide(&raw mut rate.full_at, expected, new) }
    }
}

impl<C: Hook> Kernel<C> {
    /// Asks the kernel for the next hop; the caller fills in the addresses.
    #[inline(always)]
    fn fib(&self, lookup: &mut FibLookup) -> Option<NextHop> {
        lookup.ifindex = self.ingress_device();
        // SAFETY: the context is the program's own, the parameters live on the stack.
        let result = unsafe {
            bpf_fib_lookup(
                self.context.context(),
                core::ptr::from_mut(lookup),
                size_of::<FibLookup>() as i32,
                0,
            )
        };
        let ifindex = lookup.ifindex;
        if result != 0 {
            return None;
        }
        let is_reachable = C::ANY_DEVICE || ifindex == self.ingress_device();
        if !is_reachable && maps::DEVICES.get_ifindex(ifindex).is_none() {
            return None;
        }
        Some(NextHop { ifindex, destination_mac: lookup.dmac, source_mac: lookup.smac, vlan: [0; 4] })
    }
}

macro_rules! tables {
    ($family:ty, $address:ty, $flows:ident, $transient:ident, $vips:ident, $fragments:ident, $sources:ident, $affinity:ident, $rates:ident, $scratch:ident, $cache:ident, $make:ident, $check:ident, $route:expr) => {
        impl<C: Hook> Tables<$family> for Kernel<C> {
            type FlowRef = &'static mut Flow<$address>;
            type AffinityRef = &'static mut Affinity;
            type RateRef = &'static mut ConnectionRate;
            type FragmentRef<'m>
                = &'m Fragment<$address>
            where
                C: 'm;

            #[inline(always)]
            fn scratch<'s>(&self) -> Option<&'s mut Scratch<$address>> {
                // SAFETY: per-CPU, and taken once by each run of a program.
                maps::$scratch.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch })
            }

            #[inline(always)]
            fn cached_flow<'s>(
                &self,
                hash: u32,
            ) -> Option<&'s mut CachedFlow<$address, <$family as AddressFamily>::Pad>> {
                let slots = maps::FLOW_CACHE_SLOTS.load();
                // SAFETY: no arguments.
                let cpu = unsafe { bpf_get_smp_processor_id() };
                let index = cpu * slots + cache::place(hash, slots);
                // SAFETY: only programs on this CPU use it, which do not interrupt each other.
                maps::$cache.get_ptr_mut(index).map(|copy| unsafe { &mut *copy })
            }

            #[inline(always)]
            fn established(&self, key: &FlowKey<$address>) -> Option<Self::FlowRef> {
                // SAFETY: the kernel keeps the value's memory while the program runs.
                maps::$flows.get_ptr_mut(key).map(|flow| unsafe { &mut *flow })
            }

            #[inline(always)]
            fn transient(&self, key: &FlowKey<$address>) -> Option<Self::FlowRef> {
                // SAFETY: the kernel keeps the value's memory while the program runs. Another CPU may
                // give it to another flow meanwhile: the core compares the tuples of a pair before
                // it relies on them.
                maps::$transient.get_ptr_mut(key).map(|flow| unsafe { &mut *flow })
            }

            #[inline(always)]
            fn insert_established(
                &self,
                key: &FlowKey<$address>,
                flow: &Flow<$address>,
            ) -> Result<(), InsertFailed> {
                maps::$flows.insert(key, flow, BPF_ANY.into()).map_err(|_| InsertFailed::Full)
            }

            #[inline(always)]
            fn insert_new_transient(
                &self,
                key: &FlowKey<$address>,
                flow: &Flow<$address>,
            ) -> Result<(), InsertFailed> {
                maps::$transient
                    .insert(key, flow, BPF_NOEXIST.into())
                    .map_err(|error| if error == EEXIST { InsertFailed::Exists } else { InsertFailed::Full })
            }

            #[inline(always)]
            fn insert_transient(
                &self,
                key: &FlowKey<$address>,
                flow: &Flow<$address>,
            ) -> Result<(), InsertFailed> {
                maps::$transient.insert(key, flow, BPF_ANY.into()).map_err(|_| InsertFailed::Full)
            }

            #[inline(always)]
            fn remove_established(&self, key: &FlowKey<$address>) {
                let _ = maps::$flows.remove(key);
            }

            #[inline(always)]
            fn remove_transient(&self, key: &FlowKey<$address>) {
                let _ = maps::$transient.remove(key);
            }

            #[inline(always)]
            fn cookie(&self, l3: usize, tcp: &mut Tcp) -> Option<u32> {
                let ip = self.packet().at::<<$family as IpFamily>::Header>(l3)?;
                let tcp: *mut Tcp = tcp;
                // SAFETY: both headers are whole; the helper only reads them.
                let made =
                    unsafe { $make(core::ptr::from_mut(ip).cast(), tcp.cast(), size_of::<Tcp>() as u32) };
                // The segment size that the kernel took is in the upper half.
                if made < 0 { None } else { Some(made as u32) }
            }

            #[inline(always)]
            fn is_cookie(&self, l3: usize, tcp: &mut Tcp) -> bool {
                let Some(ip) = self.packet().at::<<$family as IpFamily>::Header>(l3) else { return false };
                let tcp: *mut Tcp = tcp;
                // SAFETY: both headers are whole; the helper only reads them.
                let result = unsafe { $check(core::ptr::from_mut(ip).cast(), tcp.cast()) };
                result == 0
            }

            #[inline(always)]
            fn vip(&self, key: &VipKey<$address>) -> Option<u32> {
                maps::$vips.get_ptr(key).map(|service| unsafe { *service })
            }

            #[inline(always)]
            fn is_in_source_range(&self, client: &SourceRangeKey<$address>) -> bool {
                // SAFETY: the same fields in the same order, and the alignment is only less.
                let key = unsafe { &*core::ptr::from_ref(client).cast::<Key<SourceRange<$address>>>() };
                maps::$sources.get(key).is_some()
            }

            #[inline(always)]
            fn affinity(&self, key: &AffinityKey<$address>) -> Option<&'static mut Affinity> {
                // SAFETY: as in `transient`; the worst that can come of it is a backend that a client did
                // not have, and whether it may be used is checked.
                maps::$affinity.get_ptr_mut(key).map(|affinity| unsafe { &mut *affinity })
            }

            #[inline(always)]
            fn insert_affinity(&self, key: &AffinityKey<$address>, affinity: &Affinity) {
                let _ = maps::$affinity.insert(key, affinity, BPF_ANY.into());
            }

            #[inline(always)]
            fn connection_rate(&self, key: &AffinityKey<$address>) -> Option<&'static mut ConnectionRate> {
                // SAFETY: as in `transient`; that another client's word is changed, it has to be the same
                // to the fraction of a tick.
                maps::$rates.get_ptr_mut(key).map(|rate| unsafe { &mut *rate })
            }

            #[inline(always)]
            fn insert_new_connection_rate(
                &self,
                key: &AffinityKey<$address>,
                rate: &ConnectionRate,
            ) -> Result<(), InsertFailed> {
                maps::$rates
                    .insert(key, rate, BPF_NOEXIST.into())
                    .map_err(|error| if error == EEXIST { InsertFailed::Exists } else { InsertFailed::Full })
            }

            #[inline(always)]
            fn fragment<'m>(&'m self, key: &FragmentKey<$address>) -> Option<&'m Fragment<$address>> {
                // SAFETY: as in `transient`; the worst that can come of it is a lost fragment.
                maps::$fragments.get_ptr(key).map(|fragment| unsafe { &*fragment })
            }

            #[inline(always)]
            fn insert_fragment(&self, key: &FragmentKey<$address>, fragment: &Fragment<$address>) {
                let _ = maps::$fragments.insert(key, fragment, BPF_ANY.into());
            }

            #[inline(always)]
            fn route(&self, source: &$address, destination: &$address) -> Option<NextHop> {
                // SAFETY: per-CPU, and used only in here. Not on the stack: its fields are not aligned as
                // the verifier wants them there. All fields are integers, for which zero is a value.
                let lookup = unsafe { &mut *maps::SCRATCH_FIB.get_ptr_mut(0)? };
                *lookup = unsafe { core::mem::zeroed() };
                $route(lookup, source, destination);
                self.fib(lookup)
            }
        }
    };
}

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

tables!(
    V4,
    [u8; 4],
    FLOWS_V4,
    TRANSIENT_V4,
    VIPS_V4,
    FRAGMENTS_V4,
    SOURCE_RANGES_V4,
    AFFINITY_V4,
    CONNECTION_RATES_V4,
    SCRATCH_V4,
    FLOW_CACHE_V4,
    bpf_tcp_raw_gen_syncookie_ipv4,
    bpf_tcp_raw_check_syncookie_ipv4,
    |lookup: &mut FibLookup, source: &[u8; 4], destination: &[u8; 4]| {
        lookup.family = AF_INET;
        lookup.__bindgen_anon_3.ipv4_src = u32::from_ne_bytes(*source);
        lookup.__bindgen_anon_4.ipv4_dst = u32::from_ne_bytes(*destination);
    }
);

tables!(
    V6,
    [u8; 16],
    FLOWS_V6,
    TRANSIENT_V6,
    VIPS_V6,
    FRAGMENTS_V6,
    SOURCE_RANGES_V6,
    AFFINITY_V6,
    CONNECTION_RATES_V6,
    SCRATCH_V6,
    FLOW_CACHE_V6,
    bpf_tcp_raw_gen_syncookie_ipv6,
    bpf_tcp_raw_check_syncookie_ipv6,
    |lookup: &mut FibLookup, source: &[u8; 16], destination: &[u8; 16]| {
        lookup.family = AF_INET6;
        lookup.__bindgen_anon_3.ipv6_src = words(source);
        lookup.__bindgen_anon_4.ipv6_dst = words(destination);
    }
);

/// An address as the kernel's structures hold it.
#[inline(always)]
pub fn words(address: &[u8; 16]) -> [u32; 4] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *address;
    [
        u32::from_ne_bytes([a, b, c, d]),
        u32::from_ne_bytes([e, f, g, h]),
        u32::from_ne_bytes([i, j, k, l]),
        u32::from_ne_bytes([m, n, o, p]),
    ]
}
