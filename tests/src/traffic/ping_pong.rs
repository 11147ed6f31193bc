//! Long-lived connections that exchange small messages, to see what a change does to them.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};

use super::client;
use crate::lab::{Namespace, wait_for};

/// An exchange that takes longer has lost a packet: 200 ms is the kernel's least retransmission
/// timeout (`TCP_RTO_MIN`, include/net/tcp.h), and tail loss probes hardly come earlier.
const LATE: Duration = Duration::from_millis(200);
/// Pause between the exchanges of a connection.
const PAUSE: Duration = Duration::from_millis(2);

/// What happened to all connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Exchanges that were completed.
    pub exchanges: u64,
    /// Of these, how many took longer than 200 ms. On a busy machine that is no proof of a loss:
    /// see [`retransmissions`].
    pub late: u64,
    /// The longest.
    pub longest: Duration,
    /// Connections that broke, and how.
    pub broken: Vec<String>,
}

/// Connections that exchange messages until they are stopped.
#[derive(Debug)]
pub struct PingPong {
    stop: Arc<AtomicBool>,
    exchanges: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<Flow>>,
}

#[derive(Debug, Default)]
struct Flow {
    late: u64,
    longest: Duration,
    broken: Option<String>,
}

impl PingPong {
    /// Opens connections to an echo server and starts to use them.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn start(from: &Namespace, to: SocketAddr, connections: usize) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut started = Self { stop, exchanges: Vec::new(), threads: Vec::new() };
        for _ in 0..connections {
            let stream = client::connect(from, to)?;
            let (stop, count) = (Arc::clone(&started.stop), Arc::new(AtomicU64::new(0)));
            started.exchanges.push(Arc::clone(&count));
            started.threads.push(thread::spawn(move || run(&stream, &stop, &count)));
        }
        Ok(started)
    }

    /// Waits until every connection has completed `more` exchanges from now.
    ///
    /// # Errors
    /// When that takes too long, as it does when one is broken.
    pub fn wait_exchanges(&self, more: u64) -> Result<()> {
        let now = |count: &Arc<AtomicU64>| count.load(Ordering::Relaxed);
        let goals: Vec<u64> = self.exchanges.iter().map(|count| now(count) + more).collect();
        wait_for("exchanges on every connection", || {
            let reached = self.exchanges.iter().zip(&goals).all(|(count, goal)| now(count) >= *goal);
            Ok(reached.then_some(()))
        })
    }

    /// Waits until every connection is broken, and tells how.
    ///
    /// # Errors
    /// When one lives on.
    pub fn wait_broken(self) -> Result<Report> {
        wait_for("every connection to break", || {
            Ok(self.threads.iter().all(JoinHandle::is_finished).then_some(()))
        })?;
        self.stop()
    }

    /// Ends the connections and tells what happened to them.
    ///
    /// # Errors
    /// When a thread panicked.
    pub fn stop(mut self) -> Result<Report> {
        self.stop.store(true, Ordering::Relaxed);
        let mut report = Report::default();
        for (thread, count) in std::mem::take(&mut self.threads).into_iter().zip(&self.exchanges) {
            let flow = thread.join().map_err(|_| anyhow!("a connection's thread panicked"))?;
            report.exchanges += count.load(Ordering::Relaxed);
            report.late += flow.late;
            report.longest = report.longest.max(flow.longest);
            report.broken.extend(flow.broken);
        }
        Ok(report)
    }
}

impl Drop for PingPong {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn run(stream: &TcpStream, stop: &AtomicBool, count: &AtomicU64) -> Flow {
    let mut flow = Flow::default();
    while !stop.load(Ordering::Relaxed) {
        let number = count.load(Ordering::Relaxed);
        let start = Instant::now();
        if let Err(error) = exchange(stream, number) {
            flow.broken = Some(format!("exchange {number}: {error}"));
            break;
        }
        let took = start.elapsed();
        flow.late += u64::from(took > LATE);
        flow.longest = flow.longest.max(took);
        count.store(number + 1, Ordering::Relaxed);
        // The rate, not a condition to wait for.
        thread::sleep(PAUSE);
    }
    flow
}

fn exchange(mut stream: &TcpStream, number: u64) -> io::Result<()> {
    stream.write_all(&number.to_be_bytes())?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer)?;
    let answer = u64::from_be_bytes(answer);
    if answer == number {
        Ok(())
    } else {
        Err(io::Error::other(format!("the answer is of exchange {answer}")))
    }
}

/// Makes TCP wait 4 s before it sends again, on connections opened from now on: a busy machine then
/// sends nothing twice, and what is sent twice was lost. Kernels before 6.11 keep their 200 ms.
///
/// # Errors
/// When the kernel does not take it.
pub fn be_patient(namespace: &Namespace) -> Result<()> {
    let key = "net/ipv4/tcp_rto_min_us";
    if namespace.enter(|| std::path::Path::new("/proc/sys").join(key).exists())? {
        namespace.sysctl(key, "4000000")?;
    }
    Ok(())
}

/// TCP segments that a namespace has sent again: 0 more proves that none was lost.
///
/// # Errors
/// When the kernel's counters cannot be read.
pub fn retransmissions(namespace: &Namespace) -> Result<u64> {
    // Not /proc/self: that is the main thread's, outside of the namespace.
    let text = namespace.enter(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))??;
    let lines: Vec<Vec<&str>> =
        text.lines().filter(|line| line.starts_with("Tcp:")).map(|line| line.split(' ').collect()).collect();
    ensure!(lines.len() == 2, "no TCP counters in /proc/net/snmp");
    let column = lines[0].iter().position(|name| *name == "RetransSegs").context("no RetransSegs")?;
    lines[1].get(column).context("no value")?.parse().context("RetransSegs")
}
