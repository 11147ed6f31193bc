//! Bulk TCP through veth with all offloads, so in super-packets: the TC programs beside the kernel's routing.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use aya::programs::TcAttachType;
use lb_common::abi::NextHop;

use super::machine;
use super::net::Namespace;
use super::packets::Kind;
use super::product::{Endpoint, Product};
use super::report::Report;

const VIP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 10), 80);
const BACKEND: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 2, 0, 2), 8080);
const TCP4: Kind = Kind { is_ipv6: false, is_udp: false };

/// Devices of the balancer: towards the client, and towards the backend.
const DEVICES: [&str; 2] = ["l0", "l1"];
/// What comes first does not count: windows grow.
const WARM_UP: Duration = Duration::from_millis(500);
/// Something is broken if nothing moves for so long.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of one read or write.
const BUFFER: usize = 1 << 18;

/// Who forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Routing,
    Product,
}

const WAYS: [(Way, &str); 2] = [(Way::Routing, "kernel routing"), (Way::Product, "pointsman in TC")];
/// Whether the backend sends.
const DIRECTIONS: [(bool, &str); 2] = [(false, "client to backend"), (true, "backend to client")];

struct Lab {
    client: Namespace,
    balancer: Namespace,
    backend: Namespace,
    product: Product,
    listener: TcpListener,
    /// The CPUs of the sender, who also does what softirqs have to do, and of the receiver.
    cpus: [usize; 2],
}

/// Runs all repetitions, of one connection each and `length`.
///
/// # Errors
/// When the lab cannot be set up, or nothing gets through.
pub fn measure(report: &mut Report, repetitions: usize, length: Duration, cpu: usize) -> Result<()> {
    let mut lab = Lab::set_up([cpu, (cpu + 1) % report.machine.cpus])?;
    for repetition in 0..repetitions {
        eprintln!("bulk: repetition {} of {repetitions}", repetition + 1);
        for (from_backend, direction) in DIRECTIONS {
            let mut ways = WAYS;
            // Who comes second finds the machine as the first has left it.
            ways.rotate_left(repetition % 2);
            for (way, name) in ways {
                let rate = lab
                    .through(way, from_backend, length)
                    .with_context(|| format!("bulk by {name}, {direction}"))?;
                report.add(&format!("bulk, {name}, {direction}"), "Gbit/s", rate);
            }
        }
    }
    for (_, direction) in DIRECTIONS {
        let [routing, ours] = WAYS.map(|(_, name)| format!("bulk, {name}, {direction}"));
        let what = format!("bulk Gbit/s, TC / kernel routing, {direction}");
        report.expect_ratio(&what, &ours, &routing, Some(1.0), false);
    }
    Ok(())
}

impl Lab {
    fn set_up(cpus: [usize; 2]) -> Result<Self> {
        let (client, balancer, backend) = (Namespace::new()?, Namespace::new()?, Namespace::new()?);
        client.link("c0", &balancer, DEVICES[0])?;
        balancer.link(DEVICES[1], &backend, "b0")?;
        client.run("ip addr add 10.1.0.1/24 dev c0")?;
        balancer.run("ip addr add 10.1.0.2/24 dev l0")?;
        balancer.run("ip addr add 10.2.0.1/24 dev l1")?;
        backend.run("ip addr add 10.2.0.2/24 dev b0")?;
        client.run("ip route add default via 10.1.0.2")?;
        backend.run("ip route add default via 10.2.0.1")?;
        balancer.set("ipv4/ip_forward", "1")?;
        let (ifindex, source_mac) = balancer.device(DEVICES[1])?;
        let (_, destination_mac) = backend.device("b0")?;
        let next_hop = NextHop { ifindex, destination_mac, source_mac, vlan: [0; 4] };
        let endpoint = Endpoint { address: BACKEND.ip().octets(), port: BACKEND.port(), next_hop };
        let product = Product::load(&[], &[endpoint], &[[10, 9, 0, 1]])?;
        let listener = backend.inside(|| Ok(TcpListener::bind(BACKEND)?))?;
        Ok(Self { client, balancer, backend, product, listener, cpus })
    }

    /// One transfer. Gives Gbit/s of what the receiver's socket has handed out.
    fn through(&mut self, way: Way, from_backend: bool, length: Duration) -> Result<f64> {
        let mut links = Vec::new();
        if way == Way::Product {
            let Self { balancer, product, .. } = self;
            for device in DEVICES {
                let attach = || Ok(product.ingress()?.attach(device, TcAttachType::Ingress)?);
                links.push(balancer.inside(attach).with_context(|| format!("attaching to {device}"))?);
            }
        }
        let before = self.product.forwarded(TCP4)?;
        let rate = self.transfer(if way == Way::Product { VIP } else { BACKEND }, from_backend, length);
        let after = self.product.forwarded(TCP4)?;
        for link in links {
            self.product.ingress()?.detach(link)?;
        }
        let is_ours = after.0 > before.0 && after.1 > before.1;
        ensure!(
            is_ours == (way == Way::Product),
            "the product has counted {before:?} packets before and {after:?} after; drops: {:?}; {rate:?}",
            self.product.drops()?
        );
        rate
    }

    fn transfer(&self, to: SocketAddrV4, from_backend: bool, length: Duration) -> Result<f64> {
        let stream = self.client.inside(|| Ok(TcpStream::connect_timeout(&to.into(), PATIENCE)?))?;
        let accepted = self.backend.inside(|| Ok(self.listener.accept()?.0))?;
        let [mut sender, mut receiver] = if from_backend { [accepted, stream] } else { [stream, accepted] };
        sender.set_write_timeout(Some(PATIENCE))?;
        receiver.set_read_timeout(Some(PATIENCE))?;
        let [sending, receiving] = self.cpus;
        std::thread::scope(|scope| {
            let sends = scope.spawn(move || -> Result<()> {
                machine::pin(sending)?;
                let buffer = vec![0; BUFFER];
                // The receiver ends it.
                while sender.write_all(&buffer).is_ok() {}
                Ok(())
            });
            let receives = scope.spawn(move || {
                machine::pin(receiving)?;
                receive(&mut receiver, length)
            });
            let rate = receives.join().map_err(|_| anyhow!("the receiver panicked"))?;
            sends.join().map_err(|_| anyhow!("the sender panicked"))??;
            rate
        })
    }
}

/// Reads until the time is over. Gives Gbit/s.
fn receive(stream: &mut TcpStream, length: Duration) -> Result<f64> {
    let mut buffer = vec![0; BUFFER];
    let mut bytes = 0;
    let mut begin = None;
    let start = Instant::now();
    loop {
        let count = stream.read(&mut buffer).context("waiting for bytes")?;
        ensure!(count > 0, "the sender closed the connection");
        bytes += count as u64;
        match begin {
            None if start.elapsed() >= WARM_UP => (begin, bytes) = (Some(Instant::now()), 0),
            Some(begin) if Instant::now() >= begin + length => {
                return Ok(bytes as f64 * 8.0 / begin.elapsed().as_secs_f64() / 1e9);
            }
            _ => {}
        }
    }
}
