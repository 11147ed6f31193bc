//! Live frames through veth: generator, load balancer and sink on one CPU.

use anyhow::{Context, Result, ensure};
use aya::programs::xdp::XdpLinkId;
use aya::programs::{TcAttachType, XdpMode};
use lb_common::abi::NextHop;

use super::baselines::Bench;
use super::cost::Effort;
use super::machine;
use super::net::Namespace;
use super::packets::{Kind, Segment, Tuple, client};
use super::product::{PORT, Product, VIP, endpoints, snat_addresses};
use super::report::Report;

const FLOWS: usize = 1_024;
const TCP4: Kind = Kind { is_ipv6: false, is_udp: false };
const REDIRECT: u32 = 4;

/// Ways that the frames can go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Dropped where they come in: what the generator and the first device take.
    Floor,
    Transmit,
    Product,
    Tc,
    Routing,
    Nftables,
}

const WAYS: [(Way, &str); 6] = [
    (Way::Floor, "dropped on arrival (floor)"),
    (Way::Transmit, "XDP_TX"),
    (Way::Product, "pointsman (XDP redirect)"),
    (Way::Tc, "pointsman (TC redirect)"),
    (Way::Routing, "kernel routing"),
    (Way::Nftables, "nftables DNAT + masquerade"),
];

/// nftables as a user would write it: three backends in turn, and masquerading. `backends` are
/// dotted addresses, all in `subnet`.
#[must_use]
pub fn nftables(backends: [&str; 3], subnet: &str) -> String {
    let [first, second, third] = backends;
    let map = format!("{{ 0 : {first} . 8080, 1 : {second} . 8080, 2 : {third} . 8080 }}");
    format!(
        "table ip bench {{
           chain in {{
             type nat hook prerouting priority dstnat
             ip daddr 192.0.2.10 tcp dport 80 dnat to numgen inc mod 3 map {map}
           }}
           chain out {{
             type nat hook postrouting priority srcnat
             ip daddr {subnet} masquerade
           }}
         }}"
    )
}

struct Live {
    generator: Namespace,
    balancer: Namespace,
    _sink: Namespace,
    bench: Bench,
    product: Product,
    clients: Vec<Tuple>,
    ksoftirqd: String,
}

/// Runs all repetitions.
///
/// # Errors
/// When the kernel refuses, or frames get lost.
pub fn measure(report: &mut Report, effort: Effort, cpu: usize) -> Result<()> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| -> Result<()> {
            let mut live = Live::set_up(cpu)?;
            live.generator.enter()?;
            machine::pin(cpu)?;
            live.open_flows()?;
            for repetition in 0..effort.repetitions {
                eprintln!("live frames: repetition {} of {}", repetition + 1, effort.repetitions);
                live.repetition(report, effort.packets)?;
            }
            Ok(())
        });
        thread.join().map_err(|_| anyhow::anyhow!("the benchmark's thread panicked"))?
    })?;
    for (way, name) in WAYS {
        let bound = (way == Way::Product).then_some(5.0);
        let (of, to) = (format!("live, {name}"), "live, nftables DNAT + masquerade");
        report.expect_ratio(&format!("live packets/s, {name} / nftables"), &of, to, bound, false);
    }
    let (nftables, ours) = ("live net, nftables DNAT + masquerade", "live net, pointsman (XDP redirect)");
    report.expect_ratio("live CPU time less the floor, nftables / pointsman", nftables, ours, None, false);
    let (tc, routing) = ("live, pointsman (TC redirect)", "live, kernel routing");
    report.expect_ratio("live packets/s, TC redirect / kernel routing", tc, routing, None, false);
    Ok(())
}

impl Live {
    fn set_up(cpu: usize) -> Result<Self> {
        let (generator, balancer, sink) = (Namespace::new()?, Namespace::new()?, Namespace::new()?);
        generator.join("g0", &balancer, "l0")?;
        balancer.join("l1", &sink, "s0")?;
        let (_, sink_mac) = sink.device("s0")?;
        let (_, generator_mac) = generator.device("g0")?;
        let text = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
        for setting in ["ipv4/conf/all/rp_filter", "ipv4/conf/l0/rp_filter", "ipv4/conf/l1/rp_filter"] {
            balancer.set(setting, "0")?;
        }
        balancer.set("ipv4/ip_forward", "1")?;
        for line in [
            "ip addr add 10.1.0.2/24 dev l0".to_owned(),
            "ip addr add 10.2.0.1/24 dev l1".to_owned(),
            format!("ip neigh add 10.1.0.1 lladdr {} dev l0 nud permanent", text(generator_mac)),
            format!("ip neigh add 10.2.0.2 lladdr {} dev l1 nud permanent", text(sink_mac)),
            "ip route add 10.96.0.0/11 via 10.1.0.1".to_owned(),
            "ip route add 192.0.2.0/24 via 10.2.0.2".to_owned(),
            "ip route add 10.0.1.0/24 via 10.2.0.2".to_owned(),
        ] {
            balancer.run(&line)?;
        }
        let (ifindex, source_mac) = balancer.device("l1")?;
        let hop = NextHop { ifindex, destination_mac: sink_mac, source_mac, vlan: [0; 4] };
        let mut bench = Bench::load(VIP, PORT, 1 << 16)?;
        let mut product = Product::load(&[], &endpoints(hop), &snat_addresses(8))?;
        balancer.inside(|| product.allow_device(ifindex))?;
        sink.inside(|| bench.program("sink")?.attach("s0", XdpMode::Driver).context("attaching the sink"))?;
        let clients = (0..FLOWS).map(|index| client(index, VIP, PORT, 0)).collect();
        let ksoftirqd = ksoftirqd(cpu)?;
        Ok(Self { generator, balancer, _sink: sink, bench, product, clients, ksoftirqd })
    }

    /// Establishes the flows in the product, by test runs.
    fn open_flows(&mut self) -> Result<()> {
        let entry = self.product.handle()?;
        let macs = ([0; 6], [0; 6]);
        self.bench.aim(TCP4, Segment::Syn, &self.clients, macs, 0)?;
        let run = self.bench.run(&entry, FLOWS, FLOWS as u32)?;
        ensure!(
            run.action == REDIRECT,
            "the SYN's action is {}; drops: {:?}",
            run.action,
            self.product.drops()?
        );
        let replies = self.product.replies(TCP4, &self.clients)?;
        self.bench.aim(TCP4, Segment::SynAck, &replies, macs, 0)?;
        self.bench.run(&entry, FLOWS, FLOWS as u32)?;
        self.bench.aim(TCP4, Segment::Ack, &self.clients, macs, 0)?;
        self.bench.run(&entry, FLOWS, FLOWS as u32)?;
        for client in &self.clients {
            ensure!(self.product.is_established(TCP4, client)?, "{client:?} is not established");
        }
        let (device, generator_mac) = self.generator.device("g0")?;
        let (_, balancer_mac) = self.balancer.device("l0")?;
        self.bench.aim(TCP4, Segment::Ack, &self.clients, (balancer_mac, generator_mac), device)
    }

    fn repetition(&mut self, report: &mut Report, packets: u32) -> Result<()> {
        let mut floor = 0.0;
        for (way, name) in WAYS {
            let ns = self.through(way, packets).with_context(|| format!("live frames by {name}"))?;
            report.add(&format!("live, {name}"), "kpps", 1e6 / ns);
            if way == Way::Floor {
                floor = ns;
            } else {
                report.add(&format!("live net, {name}"), "ns", ns - floor);
            }
        }
        Ok(())
    }

    /// Attaches what a way needs, sends, and takes it off again. Gives nanoseconds per packet.
    fn through(&mut self, way: Way, packets: u32) -> Result<f64> {
        let Self { balancer, generator, bench, product, .. } = self;
        let first = match way {
            Way::Floor => Some(balancer.inside(|| attach(bench, "sink", "l0"))?),
            Way::Transmit => Some(balancer.inside(|| attach(bench, "swap_tx", "l0"))?),
            _ => None,
        };
        let back =
            if way == Way::Transmit { Some(generator.inside(|| attach(bench, "sink", "g0"))?) } else { None };
        let ours = if way == Way::Product {
            Some(balancer.inside(|| Ok(product.entry()?.attach("l0", XdpMode::Driver)?))?)
        } else {
            None
        };
        let classifier = if way == Way::Tc {
            Some(balancer.inside(|| Ok(product.ingress()?.attach("l0", TcAttachType::Ingress)?))?)
        } else {
            None
        };
        if way == Way::Nftables {
            let rules = nftables(["10.0.1.1", "10.0.1.2", "10.0.1.3"], "10.0.1.0/24");
            balancer.inside(|| nft(&rules))?;
        }
        let result = self.send(way, packets);
        if let Some(link) = first {
            let name = if way == Way::Floor { "sink" } else { "swap_tx" };
            self.bench.program(name)?.detach(link)?;
        }
        if let Some(link) = back {
            self.bench.program("sink")?.detach(link)?;
        }
        if let Some(link) = ours {
            self.product.entry()?.detach(link)?;
        }
        if let Some(link) = classifier {
            self.product.ingress()?.detach(link)?;
        }
        if way == Way::Nftables {
            self.balancer.inside(|| nft("delete table ip bench"))?;
        }
        result
    }

    fn send(&mut self, way: Way, packets: u32) -> Result<f64> {
        self.bench.generate(FLOWS, packets / 8)?;
        let forwarded = self.product.forwarded(TCP4)?.0;
        let before = (self.bench.sunk()?, on_cpu(&self.ksoftirqd)?);
        let thread = self.bench.generate(FLOWS, packets)?;
        let arrived = self.bench.sunk()? - before.0;
        let spent = thread + on_cpu(&self.ksoftirqd)? - before.1;
        ensure!(
            arrived >= u64::from(packets) * 99 / 100,
            "{arrived} of {packets} frames arrived; drops: {:?}",
            self.product.drops()?
        );
        if matches!(way, Way::Product | Way::Tc) {
            let ours = self.product.forwarded(TCP4)?.0 - forwarded;
            // The sink also counts the odd neighbour discovery of the kernel's.
            let enough = u64::from(packets) * 99 / 100;
            ensure!(ours >= enough, "{ours} of {packets} frames were forwarded by the product");
        }
        if way == Way::Nftables {
            let tracked = self.balancer.run("cat /proc/sys/net/netfilter/nf_conntrack_count")?;
            let tracked: usize = tracked.trim().parse()?;
            ensure!(tracked >= FLOWS, "{tracked} of {FLOWS} flows are tracked: nftables does not translate");
        }
        Ok(spent as f64 / arrived as f64)
    }
}

fn attach(bench: &mut Bench, program: &str, device: &str) -> Result<XdpLinkId> {
    let program = bench.program(program)?;
    program.attach(device, XdpMode::Driver).with_context(|| format!("attaching to {device}"))
}

/// Runs nft in the thread's namespace.
///
/// # Errors
/// When it refuses.
pub fn nft(ruleset: &str) -> Result<()> {
    let output = std::process::Command::new("nft").arg(ruleset).output().context("running nft")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "nft refused `{ruleset}`: {}", errors.trim());
    Ok(())
}

/// The kernel's thread for what one batch leaves to do, as its directory in /proc.
fn ksoftirqd(cpu: usize) -> Result<String> {
    let wanted = format!("ksoftirqd/{cpu}\n");
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        if std::fs::read_to_string(path.join("comm")).is_ok_and(|name| name == wanted) {
            return Ok(path.display().to_string());
        }
    }
    anyhow::bail!("there is no {}", wanted.trim())
}

/// Nanoseconds that a process was on a CPU.
fn on_cpu(process: &str) -> Result<u64> {
    let text = std::fs::read_to_string(format!("{process}/schedstat"))?;
    Ok(text.split(' ').next().unwrap_or_default().parse()?)
}
