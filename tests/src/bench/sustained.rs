//! Connections opened and closed without pause, against real servers behind the load balancer.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::programs::XdpMode;
use lb_common::abi::NextHop;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::live::{nft, nftables};
use super::net::Namespace;
use super::product::{Endpoint, Product};
use super::report::{Report, spread};

const VIP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 10), 80);
const BACKENDS: u8 = 3;
const CLIENT_THREADS: usize = 32;
const SERVER_THREADS: usize = 2;
/// Width of the windows at the beginning and at the end.
const WINDOW: Duration = Duration::from_secs(3);
/// A connection that takes longer is an error.
const PATIENCE_SECONDS: i64 = 5;

/// Who translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Balancer {
    Pointsman,
    Nftables,
}

struct Lab {
    client: Namespace,
    balancer: Namespace,
    backends: Vec<Namespace>,
}

/// One connection: when it was done, and how long `connect` took.
type Sample = (Duration, Duration);

/// Runs all four loads.
///
/// # Errors
/// When the lab cannot be set up, or nothing gets through.
pub fn measure(report: &mut Report, seconds: u64) -> Result<()> {
    for clients in [1u8, 50] {
        for (balancer, name) in [(Balancer::Pointsman, "pointsman"), (Balancer::Nftables, "nftables")] {
            eprintln!("sustained load: {name}, {clients} client addresses, {seconds} s");
            let (samples, errors) = load(balancer, clients, Duration::from_secs(seconds))?;
            describe(report, &format!("{name}, {clients} clients"), seconds, samples, errors);
        }
    }
    let rate = |report: &Report, name: &str, end: &str| report.values(&format!("{name}: {end} 3 s")).to_vec();
    let kept: Vec<_> = rate(report, "pointsman, 1 clients", "last")
        .iter()
        .zip(rate(report, "pointsman, 1 clients", "first"))
        .map(|(last, first)| last / first)
        .collect();
    // Less than 15 % is noise on a machine that others use.
    report.expect("one client address: last 3 s / first 3 s", kept, Some(0.85), false);
    report.expect_ratio(
        "50 client addresses: last 3 s / nftables",
        "pointsman, 50 clients: last 3 s",
        "nftables, 50 clients: last 3 s",
        Some(5.0),
        false,
    );
    Ok(())
}

fn describe(report: &mut Report, name: &str, seconds: u64, samples: Vec<Sample>, errors: usize) {
    let end = Duration::from_secs(seconds);
    for (window, from) in [("first", Duration::ZERO), ("last", end.saturating_sub(WINDOW))] {
        let mut latencies: Vec<f64> = samples
            .iter()
            .filter(|(done, _)| (from..from + WINDOW).contains(done))
            .map(|(_, latency)| latency.as_secs_f64() * 1e6)
            .collect();
        report.add(&format!("{name}: {window} 3 s"), "conn/s", latencies.len() as f64 / WINDOW.as_secs_f64());
        latencies.sort_by(f64::total_cmp);
        let (_, median, _) = spread(&latencies);
        let p99 = latencies.get(latencies.len() * 99 / 100).copied().unwrap_or(f64::NAN);
        report.add(&format!("{name}: {window} 3 s, connect p50"), "µs", median);
        report.add(&format!("{name}: {window} 3 s, connect p99"), "µs", p99);
    }
    report.add(&format!("{name}: errors"), "conn", errors as f64);
    // All of them, so that a decay can be told from other work on the machine.
    for second in 0..seconds {
        let done = samples.iter().filter(|(done, _)| done.as_secs() == second).count();
        report.add(&format!("{name}: each second"), "conn/s", done as f64);
    }
}

fn load(balancer: Balancer, clients: u8, length: Duration) -> Result<(Vec<Sample>, usize)> {
    let lab = Lab::set_up(clients)?;
    let mut product = None;
    match balancer {
        Balancer::Pointsman => product = Some(lab.attach()?),
        Balancer::Nftables => lab.translate()?,
    }
    let stop = AtomicBool::new(false);
    let result = std::thread::scope(|scope| -> Result<(Vec<Sample>, usize)> {
        let _stopped = StopOnDrop(&stop);
        for backend in &lab.backends {
            let listener = backend.inside(|| Ok(TcpListener::bind("0.0.0.0:8080")?))?;
            listener.set_nonblocking(false)?;
            for _ in 0..SERVER_THREADS {
                let listener = listener.try_clone()?;
                let stop = &stop;
                scope.spawn(move || serve(&listener, stop));
            }
        }
        let start = Instant::now();
        let threads: Vec<_> = (0..CLIENT_THREADS)
            .map(|thread| {
                let lab = &lab;
                scope.spawn(move || -> Result<(Vec<Sample>, usize)> {
                    lab.client.enter()?;
                    Ok(connect_until(start + length, start, thread, clients))
                })
            })
            .collect();
        let (mut samples, mut errors) = (Vec::new(), 0);
        for thread in threads {
            let (some, failed) = thread.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
            samples.extend(some);
            errors += failed;
        }
        Ok((samples, errors))
    })?;
    if let Some(product) = &mut product {
        eprintln!("  drops: {:?}", product.drops()?);
    }
    ensure!(!result.0.is_empty(), "no connection got through ({} errors)", result.1);
    Ok(result)
}

struct StopOnDrop<'s>(&'s AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Accepts and closes at once, so that TIME_WAIT is at the server.
fn serve(listener: &TcpListener, stop: &AtomicBool) {
    let wait = TimeVal::new(0, 200_000);
    // `accept` honours the receive timeout: so the thread sees when it is time to stop.
    let _ = setsockopt(listener, sockopt::ReceiveTimeout, &wait);
    while !stop.load(Ordering::Relaxed) {
        drop(listener.accept());
    }
}

fn connect_until(end: Instant, start: Instant, thread: usize, clients: u8) -> (Vec<Sample>, usize) {
    let (mut samples, mut errors) = (Vec::new(), 0);
    let mut turn = thread;
    while Instant::now() < end {
        let source = (clients > 1).then(|| Ipv4Addr::new(10, 1, 1, 1 + (turn % usize::from(clients)) as u8));
        turn += 1;
        match connect_once(source) {
            Ok(latency) => samples.push((start.elapsed(), latency)),
            Err(_) => errors += 1,
        }
    }
    (samples, errors)
}

/// Connects, waits until the server closes, and closes.
fn connect_once(source: Option<Ipv4Addr>) -> Result<Duration> {
    let fd: OwnedFd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let patience = TimeVal::new(PATIENCE_SECONDS, 0);
    setsockopt(&fd, sockopt::SendTimeout, &patience)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &patience)?;
    if let Some(source) = source {
        let [a, b, c, d] = source.octets();
        setsockopt(&fd, sockopt::IpBindAddressNoPort, &true)?;
        bind(fd.as_raw_fd(), &SockaddrIn::new(a, b, c, d, 0))?;
    }
    let begin = Instant::now();
    connect(fd.as_raw_fd(), &SockaddrIn::from(VIP))?;
    let latency = begin.elapsed();
    let mut byte = [0];
    ensure!(TcpStream::from(fd).read(&mut byte)? == 0, "the server sent something");
    Ok(latency)
}

impl Lab {
    fn set_up(clients: u8) -> Result<Self> {
        let (client, balancer) = (Namespace::new()?, Namespace::new()?);
        client.join("c0", &balancer, "l0")?;
        client.run("ip addr add 10.1.0.1/16 dev c0")?;
        balancer.run("ip addr add 10.1.0.2/16 dev l0")?;
        client.run("ip route add 192.0.2.0/24 via 10.1.0.2")?;
        client.set("ipv4/ip_local_port_range", "1024 65535")?;
        if clients > 1 {
            for place in 1..=clients {
                client.run(&format!("ip addr add 10.1.1.{place}/16 dev c0"))?;
            }
        }
        balancer.set("ipv4/ip_forward", "1")?;
        let mut backends = Vec::new();
        for place in 1..=BACKENDS {
            let backend = Namespace::new()?;
            balancer.join(&format!("l{place}"), &backend, "b0")?;
            balancer.run(&format!("ip addr add 10.2.{place}.1/24 dev l{place}"))?;
            backend.run(&format!("ip addr add 10.2.{place}.2/24 dev b0"))?;
            backend.run(&format!("ip route add default via 10.2.{place}.1"))?;
            // Otherwise the kernel forgets TIME_WAIT early, and with it what this is about.
            backend.set("ipv4/tcp_max_tw_buckets", "2000000")?;
            backends.push(backend);
        }
        for (place, backend) in (1..).zip(&backends) {
            backend.run(&format!("ping -c 1 -W 2 10.2.{place}.1"))?;
        }
        client.run("ping -c 1 -W 2 10.1.0.2")?;
        Ok(Self { client, balancer, backends })
    }

    /// The product's programs on all devices of the balancer.
    fn attach(&self) -> Result<Product> {
        let mut endpoints = Vec::new();
        for (place, backend) in (1..=BACKENDS).zip(&self.backends) {
            let (ifindex, source_mac) = self.balancer.device(&format!("l{place}"))?;
            let (_, destination_mac) = backend.device("b0")?;
            let next_hop = NextHop { ifindex, destination_mac, source_mac, vlan: [0; 4] };
            endpoints.push(Endpoint { address: [10, 2, place, 2], port: 8080, next_hop });
        }
        // One source address towards each backend, as masquerading has.
        let mut product = Product::load(&[], &endpoints, &[[10, 9, 0, 1]])?;
        self.balancer.inside(|| {
            for place in 0..=BACKENDS {
                let device = format!("l{place}");
                let (ifindex, _) = self.balancer.device(&device)?;
                product.allow_device(ifindex)?;
                product
                    .entry()?
                    .attach(&device, XdpMode::Driver)
                    .with_context(|| format!("attaching to {device}"))?;
            }
            Ok(())
        })?;
        Ok(product)
    }

    /// nftables in the balancer.
    fn translate(&self) -> Result<()> {
        let rules = nftables(["10.2.1.2", "10.2.2.2", "10.2.3.2"], "10.2.0.0/16");
        self.balancer.inside(|| nft(&rules))
    }
}
