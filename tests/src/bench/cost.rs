//! Nanoseconds per packet by `BPF_PROG_TEST_RUN`, net of the harness.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use aya::programs::ProgramFd;
use lb_common::abi::{NextHop, SynCookies, maps};

use super::baselines::Bench;
use super::packets::{FLOWS, Kind, Segment, Tuple, client};
use super::product::{EMPTY_PORT, PORT, Product, VIP, endpoints, snat_addresses};
use super::report::Report;

const PASS: u32 = 2;
const TRANSMIT: u32 = 3;

/// How much to run.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Repetitions.
    pub repetitions: usize,
    /// Packets in each run.
    pub packets: u32,
}

const TCP4: Kind = Kind { is_ipv6: false, is_udp: false };
const KINDS: [(Kind, &str); 4] = [
    (TCP4, "tcp v4"),
    (Kind { is_ipv6: false, is_udp: true }, "udp v4"),
    (Kind { is_ipv6: true, is_udp: false }, "tcp v6"),
    (Kind { is_ipv6: true, is_udp: true }, "udp v6"),
];

/// Numbers of flows that established packets are cycled over.
const CYCLES: [usize; 3] = [1, 1_024, FLOWS];

const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);

/// Device 1 is the one that test runs come in by, so packets go out by `XDP_TX`.
fn hop() -> NextHop {
    NextHop { ifindex: 1, destination_mac: [2, 0, 0, 0, 0, 3], source_mac: [2, 0, 0, 0, 0, 4], vlan: [0; 4] }
}

/// A fixed shuffle: entries lie in memory in the order in which they were made, and no real traffic
/// comes in that order.
fn shuffled<T: Copy>(all: &[T]) -> Vec<T> {
    let mut all = all.to_vec();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for last in (1..all.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        all.swap(last, ((state >> 33) % (last as u64 + 1)) as usize);
    }
    all
}

struct Cost<'r> {
    report: &'r mut Report,
    bench: Bench,
    product: Product,
    entry: ProgramFd,
    effort: Effort,
    /// Set before the name of each row.
    prefix: String,
}

/// Runs all repetitions.
///
/// # Errors
/// When the kernel refuses, or a program does not do what is measured.
pub fn measure(report: &mut Report, effort: Effort) -> Result<()> {
    for repetition in 0..effort.repetitions {
        eprintln!("ns per packet: repetition {} of {}", repetition + 1, effort.repetitions);
        let mut cost = Cost::begin(report, effort, &[])?;
        let large = cost.product.memory(maps::FLOWS_V4)?;
        cost.repetition()?;
        drop(cost);
        with_flow_cache(report, effort)?;
        let small = full_tables(report, effort)?;
        let whole = 2.0 * large.0 as f64 / large.1 as f64;
        report.add("flow table of default size / flows it has room for", "bytes", whole);
        // A flow is two entries. The difference of two tables is free of what each has once.
        let each = 2.0 * (large.0 - small.0) as f64 / (large.1 - small.1) as f64;
        report.add("map memory of an established v4 flow", "bytes", each);
    }
    expect(report);
    Ok(())
}

fn expect(report: &mut Report) {
    for (direction, flows) in
        [("to backend", 1), ("to client", 1), ("to backend", 1_024), ("to client", 1_024)]
    {
        let what = format!("full NAT / bare NAT, tcp v4 {direction}, {flows} flows");
        report.expect_ratio(
            &what,
            &format!("tcp v4 {direction}, {flows} flows"),
            &format!("bare NAT, {flows} flows"),
            Some(1.2),
            true,
        );
    }
    for slots in [0].into_iter().chain(CACHES) {
        for direction in ["to backend", "to client"] {
            for (flows, bound) in [(1, 0.7), (1_024, 0.7), (65_536, 0.95)] {
                report.expect_ratio(
                    &format!("flow cache of {slots} / bare NAT, tcp v4 {direction}, {flows} flows"),
                    &format!("flow cache {slots}: tcp v4 {direction}, {flows} flows"),
                    &format!("flow cache {slots}: bare NAT, {flows} flows"),
                    (slots != 0).then_some(bound),
                    true,
                );
            }
        }
    }
    for tables in ["fresh", "full"] {
        for baseline in ["bare NAT", "bare NAT (own lists)"] {
            let what = format!("new flow / {baseline}, {tables} tables");
            let ours = format!("tcp v4 new flow, {tables} tables");
            report.expect_ratio(
                &what,
                &ours,
                &format!("{baseline} new flow, {tables} tables"),
                Some(1.6),
                true,
            );
        }
    }
    report.expect_ratio(
        "packet of a SYN flood / bare NAT, full tables",
        "tcp v4 packet of a SYN flood",
        "bare NAT, packet of a SYN flood",
        None,
        true,
    );
    report.expect_ratio(
        "SYN answered with a cookie / new flow",
        "SYN answered with a cookie",
        "tcp v4 new flow, fresh tables",
        Some(0.3),
        true,
    );
    let memory = report.values("map memory of an established v4 flow").to_vec();
    report.expect("bytes per v4 flow, both directions", memory, Some(288.0), true);
}

impl<'r> Cost<'r> {
    fn begin(report: &'r mut Report, effort: Effort, sizes: &[(&str, u32)]) -> Result<Self> {
        Self::begin_with_cache(report, effort, sizes, 0)
    }

    fn begin_with_cache(
        report: &'r mut Report,
        effort: Effort,
        sizes: &[(&str, u32)],
        slots: u32,
    ) -> Result<Self> {
        let bare = sizes.first().map_or(8 * FLOWS as u32, |(_, entries)| *entries);
        let bench = Bench::load(VIP, PORT, bare)?;
        let mut product = Product::load_with_cache(sizes, &endpoints(hop()), &snat_addresses(8), slots)?;
        let entry = product.handle()?;
        Ok(Self { report, bench, product, entry, effort, prefix: String::new() })
    }

    fn add(&mut self, name: &str, unit: &'static str, value: f64) {
        self.report.add(&format!("{}{name}", self.prefix), unit, value);
    }

    fn repetition(&mut self) -> Result<()> {
        let mut flows = Vec::new();
        for (kind, name) in KINDS {
            let clients: Vec<_> = (0..FLOWS).map(|index| client(index, VIP, PORT, 0)).collect();
            let replies = self.open(kind, name, &clients)?;
            flows.push((kind, name, clients, replies));
        }
        self.settle_udp(&flows)?;
        for (kind, name, clients, replies) in &flows {
            self.established(*kind, name, &shuffled(clients), &shuffled(replies))?;
        }
        self.others()
    }

    /// Runs a program on each of the packets aimed at once, less what the harness takes for it.
    fn once(&mut self, target: &ProgramFd, action: u32) -> Result<f64> {
        let run = self.bench.run(target, FLOWS, FLOWS as u32)?;
        ensure!(
            run.action == action,
            "the last packet's action is {} in place of {action}; drops: {:?}",
            run.action,
            self.product.drops()?
        );
        let nothing = self.bench.handle("nothing")?;
        Ok(run.ns - self.bench.run(&nothing, FLOWS, FLOWS as u32)?.ns)
    }

    fn aim(&mut self, kind: Kind, segment: Segment, tuples: &[Tuple]) -> Result<()> {
        self.bench.aim(kind, segment, tuples, MACS, 0)
    }

    /// Opens all flows of a kind, in the way that their clients and backends do.
    fn open(&mut self, kind: Kind, name: &str, clients: &[Tuple]) -> Result<Vec<Tuple>> {
        let entry = self.entry.try_clone()?;
        let (first, answer) = if kind.is_udp {
            (Segment::Datagram, Segment::Datagram)
        } else {
            (Segment::Syn, Segment::SynAck)
        };
        self.aim(kind, first, clients)?;
        if kind == TCP4 {
            for (program, name) in [("bare_nat", "bare NAT"), ("bare_nat_own", "bare NAT (own lists)")] {
                let bare = self.bench.handle(program)?;
                let ns = self.once(&bare, TRANSMIT)?;
                self.add(&format!("{name} new flow, fresh tables"), "ns", ns);
            }
        }
        let ns = self.once(&entry, TRANSMIT)?;
        self.add(&format!("{name} new flow, fresh tables"), "ns", ns);
        let replies = self.product.replies(kind, clients)?;
        self.aim(kind, answer, &replies)?;
        let ns = self.once(&entry, TRANSMIT)?;
        self.add(&format!("{name} first answer"), "ns", ns);
        if !kind.is_udp {
            self.aim(kind, Segment::Ack, clients)?;
            let ns = self.once(&entry, TRANSMIT)?;
            self.add(&format!("{name} handshake's end (promotion)"), "ns", ns);
        }
        Ok(replies)
    }

    /// UDP counts as established once it has gone on for two seconds.
    fn settle_udp(&mut self, flows: &[(Kind, &str, Vec<Tuple>, Vec<Tuple>)]) -> Result<()> {
        let entry = self.entry.try_clone()?;
        for (kind, name, clients, _) in flows.iter().filter(|(kind, ..)| kind.is_udp) {
            self.aim(*kind, Segment::Datagram, clients)?;
            let deadline = Instant::now() + Duration::from_secs(10);
            while !self.product.is_established(*kind, &clients[FLOWS - 1])? {
                ensure!(Instant::now() < deadline, "{name}: no flow was promoted within ten seconds");
                let ns = self.once(&entry, TRANSMIT)?;
                if !self.product.is_established(*kind, &clients[0])? {
                    self.add(&format!("{name} of a young session"), "ns", ns);
                }
            }
        }
        Ok(())
    }

    /// Measures programs on `flows` flows, after one round to warm the caches.
    fn cycle(&mut self, target: &ProgramFd, flows: usize, action: u32) -> Result<f64> {
        self.bench.run(target, flows, flows.max(1_024) as u32)?;
        let run = self.bench.run(target, flows, self.effort.packets)?;
        ensure!(run.action == action, "the last packet's action is {} in place of {action}", run.action);
        Ok(run.ns)
    }

    fn established(&mut self, kind: Kind, name: &str, clients: &[Tuple], replies: &[Tuple]) -> Result<()> {
        let entry = self.entry.try_clone()?;
        let nothing = self.bench.handle("nothing")?;
        let (segment, answer) =
            if kind.is_udp { (Segment::Datagram, Segment::Datagram) } else { (Segment::Ack, Segment::Reply) };
        for (direction, segment, tuples) in [("to backend", segment, clients), ("to client", answer, replies)]
        {
            self.aim(kind, segment, tuples)?;
            for flows in CYCLES {
                let harness = self.cycle(&nothing, flows, PASS)?;
                if kind == TCP4 && direction == "to backend" {
                    self.baselines(flows, harness)?;
                }
                let before = self.product.forwarded(kind)?;
                let ns = self.cycle(&entry, flows, TRANSMIT)?;
                let after = self.product.forwarded(kind)?;
                let counted = (after.0 - before.0) + (after.1 - before.1);
                let sent = u64::from(self.effort.packets) + flows.max(1_024) as u64;
                ensure!(counted == sent, "{name} {direction}: {counted} of {sent} packets were forwarded");
                self.add(&format!("{name} {direction}, {flows} flows"), "ns", ns - harness);
                if kind == TCP4 {
                    self.add(&format!("harness, {direction}, {flows} flows"), "ns", harness);
                }
            }
        }
        Ok(())
    }

    fn baselines(&mut self, flows: usize, harness: f64) -> Result<()> {
        for (program, name) in [
            ("swap_tx", "parse + swap + TX"),
            ("bare_nat", "bare NAT"),
            ("bare_nat_own", "bare NAT (own lists)"),
        ] {
            let target = self.bench.handle(program)?;
            let ns = self.cycle(&target, flows, TRANSMIT)? - harness;
            self.add(&format!("{name}, {flows} flows"), "ns", ns);
        }
        Ok(())
    }

    /// What is not forwarded.
    fn others(&mut self) -> Result<()> {
        let entry = self.entry.try_clone()?;
        let nothing = self.bench.handle("nothing")?;
        let cases = [
            ("refused SYN (no backend, RST)", Segment::Syn, VIP, EMPTY_PORT, TRANSMIT),
            ("refused segment (no flow, RST)", Segment::Ack, VIP, PORT, TRANSMIT),
            ("not ours, passed", Segment::Ack, [198, 51, 100, 1], PORT, PASS),
        ];
        for (name, segment, vip, port, action) in cases {
            let tuples: Vec<_> = (0..1_024).map(|index| client(index, vip, port, 9)).collect();
            self.aim(TCP4, segment, &tuples)?;
            let harness = self.cycle(&nothing, 1_024, PASS)?;
            let ns = self.cycle(&entry, 1_024, action)? - harness;
            self.add(name, "ns", ns);
        }
        self.flood()
    }

    /// SYNs of clients that were never heard of, and are never heard of again.
    fn flood(&mut self) -> Result<()> {
        let entry = self.entry.try_clone()?;
        let clients: Vec<_> = (0..FLOWS).map(|index| client(index, VIP, PORT, 8)).collect();
        self.aim(TCP4, Segment::Syn, &clients)?;
        self.product.set_syn_cookies(SynCookies::ANSWER)?;
        let ns = self.once(&entry, TRANSMIT)?;
        self.product.set_syn_cookies(SynCookies::OFF)?;
        self.report.add("SYN answered with a cookie", "ns", ns);
        Ok(())
    }
}

/// Sizes of the flow cache that are compared.
const CACHES: [u32; 3] = [4_096, 16_384, 65_536];

/// Packets of established flows with a flow cache in front of the table, beside the same without, and
/// the bare NAT.
fn with_flow_cache(report: &mut Report, effort: Effort) -> Result<()> {
    let clients: Vec<_> = (0..FLOWS).map(|index| client(index, VIP, PORT, 0)).collect();
    for slots in [0].into_iter().chain(CACHES) {
        let mut cost = Cost::begin_with_cache(report, effort, &[], slots)?;
        cost.prefix = format!("flow cache {slots}: ");
        let replies = cost.open(TCP4, "tcp v4", &clients)?;
        cost.established(TCP4, "tcp v4", &shuffled(&clients), &shuffled(&replies))?;
    }
    Ok(())
}

/// New flows when the tables are full: each pushes others out. Gives the flow table's bytes and
/// entries.
fn full_tables(report: &mut Report, effort: Effort) -> Result<(u64, u64)> {
    let entries = 2 * FLOWS as u32;
    let sizes = [(maps::TRANSIENT_V4.name, entries), (maps::FLOWS_V4.name, entries)];
    let mut cost = Cost::begin(report, effort, &sizes)?;
    let targets = [
        ("bare NAT new flow, full tables", cost.bench.handle("bare_nat")?),
        ("bare NAT (own lists) new flow, full tables", cost.bench.handle("bare_nat_own")?),
        ("tcp v4 new flow, full tables", cost.entry.try_clone()?),
    ];
    const FILLING: u8 = 3;
    for generation in 0..=FILLING {
        let clients: Vec<_> = (0..FLOWS).map(|index| client(index, VIP, PORT, generation)).collect();
        cost.aim(TCP4, Segment::Syn, &clients)?;
        for (name, target) in &targets {
            let ns = cost.once(target, TRANSMIT)?;
            if generation == FILLING {
                cost.report.add(name, "ns", ns);
            }
        }
    }
    // From anybody, in no order: nothing of what went before is of use.
    let flood: Vec<_> = (0..FLOWS).map(|index| client(index, VIP, PORT, FILLING + 1)).collect();
    cost.aim(TCP4, Segment::Syn, &shuffled(&flood))?;
    for (name, target) in [
        ("bare NAT, packet of a SYN flood", cost.bench.handle("bare_nat")?),
        ("tcp v4 packet of a SYN flood", cost.entry.try_clone()?),
    ] {
        let ns = cost.once(&target, TRANSMIT)?;
        cost.report.add(name, "ns", ns);
    }
    cost.product.memory(maps::FLOWS_V4)
}
