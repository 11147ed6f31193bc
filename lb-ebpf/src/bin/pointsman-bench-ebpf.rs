//! Kernel side of `pointsman-bench`: what gives each run a fresh packet, and the baselines that the
//! datapath is compared with. It shares no map or program with the product.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod bench {
    use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS, XDP_TX};
    use aya_ebpf::bindings::{BPF_F_NO_COMMON_LRU, TC_ACT_SHOT, TC_ACT_UNSPEC};
    use aya_ebpf::btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, ProgramArray};
    use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_redirect, bpf_xdp_adjust_tail};
    use aya_ebpf::macros::{btf_map, classifier, xdp};
    use aya_ebpf::programs::{TcContext, XdpContext};
    use lb_common::abi::{FlowKey, IPPROTO_TCP, VipKey};
    use lb_common::forward::checksum::{TTL_DECREMENT, apply, fold, replaced};
    use lb_common::forward::wire::{ETHER_TYPE_IPV4, Ethernet, Ipv4, Tcp, TcpFrame, copy_mac};

    /// Bytes of every packet: what a template restores.
    const LENGTH: usize = 96;

    /// What the harness does: written by the benchmark before each run.
    #[derive(Clone, Copy)]
    #[repr(C)]
    pub struct Setup {
        template: [u64; LENGTH / 8],
        /// Number of flows less one; a power of two of them.
        mask: u64,
        /// Packets so far.
        counter: u64,
        /// 1 if the template is UDP.
        is_udp: u64,
        /// Device that `generate` sends by.
        ifindex: u64,
    }

    /// What differs between the packets of a template, as on the wire; of IPv6 addresses the last
    /// four bytes.
    #[derive(Clone, Copy)]
    #[repr(C, align(8))]
    pub struct Record {
        source: [u8; 4],
        destination: [u8; 4],
        source_port: [u8; 2],
        destination_port: [u8; 2],
        l3_checksum: [u8; 2],
        l4_checksum: [u8; 2],
    }

    #[btf_map(name = "bench_setup")]
    static SETUP: Array<Setup, 1> = Array::new();
    #[btf_map(name = "bench_records")]
    static RECORDS: Array<Record, 65_536> = Array::new();
    #[btf_map(name = "bench_target")]
    static TARGET: ProgramArray<1> = ProgramArray::new();
    #[btf_map(name = "bench_tc_target")]
    static TC_TARGET: ProgramArray<1> = ProgramArray::new();
    #[btf_map(name = "bench_sunk")]
    static SUNK: PerCpuArray<u64, 1> = PerCpuArray::new();

    #[inline(always)]
    fn put<const N: usize>(start: usize, offset: usize, bytes: [u8; N]) {
        // SAFETY: callers checked that LENGTH bytes are there, and offsets are below.
        unsafe { ((start + offset) as *mut [u8; N]).write_unaligned(bytes) };
    }

    /// Makes the packet from `start` to `end` that of the next flow. `None` if it is shorter than expected.
    #[inline(always)]
    fn restore(start: usize, end: usize, is_ipv6: bool) -> Option<&'static Setup> {
        // SAFETY: one CPU runs the benchmark.
        let setup = unsafe { &mut *SETUP.get_ptr_mut(0)? };
        if start + LENGTH > end {
            return None;
        }
        // In words, not by `memmove`, which would be a loop over bytes: the program under test could
        // not be served from the store buffer, and would wait.
        let mut word = 0;
        while word < LENGTH / 8 {
            // SAFETY: the bytes are there, as just checked; a packet starts at an aligned address.
            unsafe { (start as *mut u64).add(word).write_volatile(setup.template[word]) };
            word += 1;
        }
        let record = RECORDS.get((setup.counter & setup.mask) as u32)?;
        setup.counter += 1;
        let (source, destination, ports) = if is_ipv6 { (34, 50, 54) } else { (26, 30, 34) };
        put(start, source, record.source);
        put(start, destination, record.destination);
        put(start, ports, record.source_port);
        put(start, ports + 2, record.destination_port);
        if !is_ipv6 {
            put(start, 24, record.l3_checksum);
        }
        if setup.is_udp == 1 {
            put(start, ports + 6, record.l4_checksum);
        } else {
            put(start, ports + 16, record.l4_checksum);
        }
        Some(setup)
    }

    #[inline(always)]
    fn run(context: &XdpContext, is_ipv6: bool) -> u32 {
        let length = context.data_end() - context.data();
        if length != LENGTH {
            // A refusal is shorter than what it refuses.
            // SAFETY: the context is the program's own.
            unsafe { bpf_xdp_adjust_tail(context.ctx, LENGTH as i32 - length as i32) };
        }
        if restore(context.data(), context.data_end(), is_ipv6).is_some() {
            // SAFETY: the map holds XDP programs only.
            unsafe { TARGET.tail_call(context, 0) };
        }
        XDP_ABORTED
    }

    #[xdp]
    pub fn harness_v4(context: XdpContext) -> u32 {
        run(&context, false)
    }

    #[xdp]
    pub fn harness_v6(context: XdpContext) -> u32 {
        run(&context, true)
    }

    /// Nothing that is measured in TC changes a packet's length.
    #[classifier]
    pub fn tc_harness_v4(context: TcContext) -> i32 {
        if restore(context.data(), context.data_end(), false).is_some() {
            // SAFETY: the map holds classifiers only.
            unsafe { TC_TARGET.tail_call(&context, 0) };
        }
        TC_ACT_SHOT
    }

    #[classifier]
    pub fn tc_nothing(_context: TcContext) -> i32 {
        TC_ACT_UNSPEC
    }

    /// For live frames: sends each packet by a device.
    #[xdp]
    pub fn generate(context: XdpContext) -> u32 {
        match restore(context.data(), context.data_end(), false) {
            // SAFETY: no pointers.
            Some(setup) => unsafe { bpf_redirect(setup.ifindex as u32, 0) as u32 },
            None => XDP_ABORTED,
        }
    }

    /// Counts and drops.
    #[xdp]
    pub fn sink(_context: XdpContext) -> u32 {
        if let Some(count) = SUNK.get_ptr_mut(0) {
            // SAFETY: per-CPU.
            unsafe { *count += 1 };
        }
        XDP_DROP
    }

    #[xdp]
    pub fn nothing(_context: XdpContext) -> u32 {
        XDP_PASS
    }

    #[inline(always)]
    fn frame(context: &XdpContext) -> Option<&'static mut TcpFrame<Ipv4>> {
        let (start, end) = (context.data(), context.data_end());
        if start + size_of::<TcpFrame<Ipv4>>() > end {
            return None;
        }
        // SAFETY: the bytes are there; wire types take any bytes at any alignment.
        let frame = unsafe { &mut *(start as *mut TcpFrame<Ipv4>) };
        let is_plain = frame.ethernet.ether_type == ETHER_TYPE_IPV4
            && frame.ip.version_ihl == [0x45]
            && frame.ip.protocol == [IPPROTO_TCP];
        is_plain.then_some(frame)
    }

    #[inline(always)]
    fn swap(ethernet: &mut Ethernet) {
        let (mut from, mut to) = ([0; 6], [0; 6]);
        copy_mac(&mut from, &ethernet.source);
        copy_mac(&mut to, &ethernet.destination);
        copy_mac(&mut ethernet.source, &to);
        copy_mac(&mut ethernet.destination, &from);
    }

    /// Baseline: parse, swap the Ethernet addresses, send back.
    #[xdp]
    pub fn swap_tx(context: XdpContext) -> u32 {
        let Some(frame) = frame(&context) else { return XDP_PASS };
        swap(&mut frame.ethernet);
        XDP_TX
    }

    /// One direction of a flow of the bare NAT: as large as the product's.
    #[derive(Clone, Copy)]
    #[repr(C, align(8))]
    struct Bare {
        last_seen: u64,
        source: [u8; 4],
        destination: [u8; 4],
        source_port: [u8; 2],
        destination_port: [u8; 2],
        l3_delta: u16,
        l4_delta: u16,
        destination_mac: [u8; 6],
        source_mac: [u8; 6],
        ifindex: u32,
        backend: u32,
        service: u32,
        reserved: [u32; 4],
    }

    #[derive(Clone, Copy)]
    #[repr(C, align(8))]
    struct Counters {
        packets: u64,
        bytes: u64,
        others: [u64; 4],
    }

    type Key = FlowKey<[u8; 4]>;

    const OWN_LRU: usize = BPF_F_NO_COMMON_LRU as usize;
    #[btf_map(name = "bare_vips")]
    static BARE_VIPS: HashMap<VipKey<[u8; 4]>, u32, 16_384> = HashMap::new();
    #[btf_map(name = "bare_flows")]
    static BARE_FLOWS: LruHashMap<Key, Bare, 524_288> = LruHashMap::new();
    #[btf_map(name = "bare_own_flows")]
    static BARE_OWN_FLOWS: LruHashMap<Key, Bare, 524_288, OWN_LRU> = LruHashMap::new();
    #[btf_map(name = "bare_backends")]
    static BARE_BACKENDS: Array<[u8; 8], 4> = Array::new();
    #[btf_map(name = "bare_turn")]
    static BARE_TURN: Array<u64, 1> = Array::new();
    #[btf_map(name = "bare_services")]
    static BARE_SERVICES: PerCpuArray<Counters, 16_384> = PerCpuArray::new();
    #[btf_map(name = "bare_traffic")]
    static BARE_TRAFFIC: PerCpuArray<Counters, 131_072> = PerCpuArray::new();

    /// A new entry: the next of three backends, source address and MAC addresses fixed.
    #[inline(always)]
    fn begin(key: &Key, frame: &TcpFrame<Ipv4>, service: u32) -> Option<Bare> {
        // SAFETY: one CPU runs the benchmark.
        let turn = unsafe { &mut *BARE_TURN.get_ptr_mut(0)? };
        *turn += 1;
        let index = (*turn % 3) as u32 + 1;
        let [a, b, c, d, port_high, port_low, ..] = *BARE_BACKENDS.get(index)?;
        let (source, destination) = ([10, 0, 0, 1], [a, b, c, d]);
        let destination_port = [port_high, port_low];
        let addresses = replaced(&key.source, &source) + replaced(&key.destination, &destination);
        let ports = replaced(&key.destination_port, &destination_port);
        let mut entry = Bare {
            last_seen: 0,
            source,
            destination,
            source_port: key.source_port,
            destination_port,
            l3_delta: fold(addresses + u32::from(TTL_DECREMENT)),
            l4_delta: fold(addresses + ports),
            destination_mac: [0; 6],
            source_mac: [0; 6],
            ifindex: 1,
            backend: index,
            service,
            reserved: [0; 4],
        };
        copy_mac(&mut entry.destination_mac, &frame.ethernet.source);
        copy_mac(&mut entry.source_mac, &frame.ethernet.destination);
        Some(entry)
    }

    #[inline(always)]
    fn count(counters: Option<*mut Counters>, bytes: u64) {
        if let Some(counters) = counters {
            // SAFETY: per-CPU.
            let counters = unsafe { &mut *counters };
            counters.packets += 1;
            counters.bytes += bytes;
        }
    }

    #[inline(always)]
    fn bare(
        context: &XdpContext,
        find: impl Fn(&Key) -> Option<*mut Bare>,
        insert: impl Fn(&Key, &Bare),
    ) -> Option<u32> {
        let frame = frame(context)?;
        let Tcp { source_port, destination_port, .. } = frame.tcp;
        let vip = VipKey::new(frame.ip.destination, destination_port, IPPROTO_TCP);
        // SAFETY: the kernel keeps the value while the program runs.
        let service = unsafe { *BARE_VIPS.get_ptr(vip)? };
        let key = Key {
            source: frame.ip.source,
            destination: frame.ip.destination,
            source_port,
            destination_port,
            protocol: u32::from(IPPROTO_TCP),
        };
        let flow = match find(&key) {
            Some(flow) => flow,
            None => {
                insert(&key, &begin(&key, frame, service)?);
                find(&key)?
            }
        };
        // SAFETY: as above.
        let flow = unsafe { &mut *flow };
        // SAFETY: no arguments.
        flow.last_seen = unsafe { bpf_ktime_get_ns() };
        copy_mac(&mut frame.ethernet.destination, &flow.destination_mac);
        copy_mac(&mut frame.ethernet.source, &flow.source_mac);
        frame.ip.ttl = [frame.ip.ttl[0].wrapping_sub(1)];
        frame.ip.source = flow.source;
        frame.ip.destination = flow.destination;
        apply(&mut frame.ip.checksum, flow.l3_delta);
        frame.tcp.source_port = flow.source_port;
        frame.tcp.destination_port = flow.destination_port;
        apply(&mut frame.tcp.checksum, flow.l4_delta);
        let bytes = (context.data_end() - context.data()) as u64;
        count(BARE_SERVICES.get_ptr_mut(flow.service), bytes);
        count(BARE_TRAFFIC.get_ptr_mut(flow.backend), bytes);
        Some(if flow.ifindex == context.ingress_ifindex() as u32 {
            XDP_TX
        } else {
            // SAFETY: no pointers.
            unsafe { bpf_redirect(flow.ifindex, 0) as u32 }
        })
    }

    /// Baseline: VIP, one entry in an LRU table, timestamp, two counters, rewrite, send back.
    #[xdp]
    pub fn bare_nat(context: XdpContext) -> u32 {
        let insert = |key: &Key, flow: &Bare| {
            let _ = BARE_FLOWS.insert(key, flow, 0);
        };
        bare(&context, |key| BARE_FLOWS.get_ptr_mut(key), insert).unwrap_or(XDP_PASS)
    }

    /// The same with free lists per CPU, as the product has.
    #[xdp]
    pub fn bare_nat_own(context: XdpContext) -> u32 {
        let insert = |key: &Key, flow: &Bare| {
            let _ = BARE_OWN_FLOWS.insert(key, flow, 0);
        };
        bare(&context, |key| BARE_OWN_FLOWS.get_ptr_mut(key), insert).unwrap_or(XDP_PASS)
    }

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }

    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
