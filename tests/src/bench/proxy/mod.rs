//! The proxy beside other proxies, and beside paths without one, in one interleaved run.
//!
//! Client, node and backends are network namespaces; every peer has a node of its own, all share the client
//! and the backends, and all run all the time: who is not measured has nothing to do.

mod agent;
mod bulk;
mod goals;
mod idle;
mod lab;
mod load;
mod peers;
mod process;
pub mod relay;
mod server;
mod window;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use clap::ValueEnum;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

pub use goals::table;

use self::goals::add;
use self::lab::{BACKEND_PORT, Lab};
use self::load::Load;
use self::peers::{Peer, Runner};
use self::process::{Meter, softirq_threads, this_thread};
use self::server::{Counts, Wish};
use self::window::{Length, Measured};
use super::report::Report;

/// Connections of the closed loops.
const CONNECTIONS: usize = 32;
/// Requests per second at which latency is measured.
const PACE: f64 = 5_000.0;
/// Connections that idle: each is two files in a proxy, and two here.
const IDLE: usize = 8_000;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Section {
    /// Gbit/s, and CPU time for it.
    Bulk,
    /// New connections per second, and CPU time for them.
    Connections,
    /// Requests per second over connections that stay, and CPU time for them.
    Requests,
    /// Latency of requests at a fixed rate.
    Latency,
    /// Memory of idle connections.
    Idle,
}

/// How much is measured.
#[derive(Clone, Debug)]
pub struct Scale {
    /// Only these; all if empty.
    pub sections: Vec<Section>,
    /// How often.
    pub repetitions: usize,
    /// How long each number takes.
    pub length: Duration,
    /// Only those whose name contains one of these; all if empty.
    pub peers: Vec<String>,
}

/// Runs all repetitions. To be called by the main thread.
///
/// # Errors
/// When the lab cannot be set up, or a peer fails.
pub fn measure(report: &mut Report, scale: &Scale) -> Result<()> {
    raise_file_limit()?;
    let directory = agent::directory()?;
    let result = Bench::set_up(scale, &directory).and_then(|mut bench| bench.measure(report, scale));
    agent::remove_directories(&directory);
    goals::expect(report);
    result
}

/// As far as the kernel lets us; children inherit it.
fn raise_file_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let wanted = hard.max(40_000);
    if setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_err() {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(())
}

struct Bench {
    // In the order in which they end.
    runners: Vec<Runner>,
    server: Server,
    lab: Lab,
    meter: Meter,
}

struct Server {
    counts: Arc<Counts>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.counts.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && !matches!(thread.join(), Ok(Ok(())))
        {
            eprintln!("the server failed");
        }
    }
}

impl Bench {
    fn set_up(scale: &Scale, directory: &std::path::Path) -> Result<Self> {
        let lab = Lab::new()?;
        let (server, task) = start_server(&lab)?;
        let meter = Meter { balancer: Vec::new(), softirq: softirq_threads()?, ends: vec![task] };
        let mut bench = Self { runners: Vec::new(), server, lab, meter };
        let chosen = |peer: &Peer| {
            scale.peers.is_empty() || scale.peers.iter().any(|part| peer.name().contains(part.as_str()))
        };
        for (number, peer) in (1..).zip(Peer::ALL).filter(|(_, peer)| chosen(peer)) {
            if let Some(why) = peer.missing()? {
                eprintln!("SKIPPED: {}: {why}", peer.name());
                continue;
            }
            eprintln!("starting {}", peer.name());
            bench.runners.push(Runner::start(peer, &bench.lab, number, directory)?);
        }
        ensure!(!bench.runners.is_empty(), "nobody is left to be measured");
        Ok(bench)
    }

    fn measure(&mut self, report: &mut Report, scale: &Scale) -> Result<()> {
        for repetition in 0..scale.repetitions {
            for section in Section::value_variants() {
                if !scale.sections.is_empty() && !scale.sections.contains(section) {
                    continue;
                }
                eprintln!("repetition {} of {}: {section:?}", repetition + 1, scale.repetitions);
                self.section(report, *section, repetition, scale.length)?;
            }
        }
        Ok(())
    }

    fn section(
        &mut self,
        report: &mut Report,
        section: Section,
        turn: usize,
        length: Duration,
    ) -> Result<()> {
        if section == Section::Bulk {
            return self.all_bulk(report, turn, length);
        }
        for place in self.order(turn) {
            let peer = self.runners[place].peer;
            match section {
                Section::Bulk => Ok(()),
                Section::Connections => self.load(report, place, Load::Connections, length),
                Section::Requests => self.load(report, place, Load::Requests, length),
                Section::Latency => self.load(report, place, Load::Paced(PACE), length),
                Section::Idle => self.idle(report, place),
            }
            .with_context(|| format!("{section:?} by {}\n{}", peer.name(), self.runners[place].said()))?;
        }
        Ok(())
    }

    /// Who comes when: who follows whom finds the machine as the other has left it.
    fn order(&self, turn: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.runners.len()).collect();
        order.rotate_left(turn % self.runners.len());
        if turn % 2 == 1 {
            order.reverse();
        }
        order
    }

    fn meter(&self, place: usize) -> Result<Meter> {
        Ok(Meter { balancer: self.runners[place].processes()?, ..self.meter.clone() })
    }

    fn all_bulk(&mut self, report: &mut Report, turn: usize, length: Duration) -> Result<()> {
        let cases = [
            ("bulk down, 1 stream", Wish::Download, 1, false),
            ("bulk down, 4 streams", Wish::Download, 4, false),
            ("bulk up, 1 stream", Wish::Upload, 1, false),
            ("bulk up, 4 streams", Wish::Upload, 4, false),
            ("MTU bulk down, 1 stream", Wish::Download, 1, true),
            ("MTU bulk down, 4 streams", Wish::Download, 4, true),
        ];
        for (name, wish, streams, like_nics) in cases {
            for place in self.order(turn) {
                let peer = self.runners[place].peer;
                // This one needs whole checksums all the time.
                if peer != Peer::KernelAuto {
                    self.runners[place].site.look_like_nics(&self.lab, like_nics)?;
                } else if !like_nics {
                    continue;
                }
                let measured = self
                    .bulk(place, wish, streams, length)
                    .with_context(|| format!("{name} by {}\n{}", peer.name(), self.runners[place].said()))?;
                add(report, name, peer, measured.rate() * 8.0 / 1e9);
                cpu(report, name, peer, &measured, 1e9);
            }
        }
        for runner in &mut self.runners {
            if runner.peer != Peer::KernelAuto {
                runner.site.look_like_nics(&self.lab, false)?;
            }
        }
        Ok(())
    }

    fn bulk(&self, place: usize, wish: Wish, streams: usize, measured: Duration) -> Result<Measured> {
        let (meter, to, counts) = (self.meter(place)?, self.runners[place].address(), &self.server.counts);
        let length = Length { warm_up: Duration::from_millis(400), measured };
        self.lab.client.inside(|| bulk::run(wish, to, streams, counts, meter, length))
    }

    fn load(&self, report: &mut Report, place: usize, load: Load, measured: Duration) -> Result<()> {
        let (meter, to) = (self.meter(place)?, self.runners[place].address());
        let length = Length { warm_up: Duration::from_millis(300), measured };
        let outcome = self.lab.client.inside(|| load::run(load, to, CONNECTIONS, meter, length))?;
        let peer = self.runners[place].peer;
        let quantile = |share: f64| {
            let place = (outcome.latencies.len() as f64 * share) as usize;
            outcome.latencies.get(place).map_or(f64::NAN, |seconds| seconds * 1e6)
        };
        let rate = outcome.measured.rate();
        match load {
            Load::Connections => {
                add(report, "connections", peer, rate);
                add(report, "connections, p99", peer, quantile(0.99));
                add(report, goals::FAILED, peer, outcome.errors as f64);
                cpu(report, "connections", peer, &outcome.measured, 1e4);
            }
            Load::Requests => {
                add(report, "requests", peer, rate);
                add(report, "requests, p99", peer, quantile(0.99));
                cpu(report, "requests", peer, &outcome.measured, 1e5);
            }
            Load::Paced(_) => {
                if rate < 0.98 * PACE {
                    eprintln!("{}: {rate:.0} of {PACE} requests per second were answered", peer.name());
                }
                add(report, "paced, p50", peer, quantile(0.5));
                add(report, "paced, p99", peer, quantile(0.99));
                cpu(report, "paced", peer, &outcome.measured, 1e5);
            }
        }
        Ok(())
    }

    fn idle(&mut self, report: &mut Report, place: usize) -> Result<()> {
        let peer = self.runners[place].peer;
        if !peer.is_proxy() {
            return Ok(());
        }
        // Memory that earlier connections have left would serve these.
        self.runners[place].restart(&self.lab)?;
        let idle = idle::measure(&self.runners[place], &self.lab.client, &self.server.counts, IDLE)?;
        add(report, "idle connection", peer, idle.bytes);
        if idle.pipes > 0 {
            eprintln!("{}: {} pipes with {IDLE} idle connections", peer.name(), idle.pipes);
        }
        Ok(())
    }
}

/// CPU seconds for `unit` of what was counted: by the load balancer, and by everybody.
fn cpu(report: &mut Report, name: &str, peer: Peer, measured: &Measured, unit: f64) {
    let each = |seconds: f64| seconds / measured.count * unit;
    if peer.is_proxy() {
        add(report, &format!("LB CPU: {name}"), peer, each(measured.usage.balancer));
    }
    let all = format!("all CPU: {name}");
    if goals::METRICS.iter().any(|metric| metric.name == all) {
        add(report, &all, peer, each(measured.usage.path()));
    }
}

/// Starts the backends; gives the thread as its directory in /proc, too.
fn start_server(lab: &Lab) -> Result<(Server, String)> {
    let listener = lab.backend.inside(|| server::listen(BACKEND_PORT))?;
    let counts = Arc::new(Counts::default());
    let (sender, receiver) = mpsc::channel();
    let shared = Arc::clone(&counts);
    let thread = thread::spawn(move || {
        // Whoever waits sees why when the thread ends.
        let _ = sender.send(this_thread()?);
        server::serve(&listener, &shared)
    });
    let server = Server { counts, thread: Some(thread) };
    let task = receiver.recv().map_err(|_| anyhow!("the server did not start"))?;
    Ok((server, task))
}
