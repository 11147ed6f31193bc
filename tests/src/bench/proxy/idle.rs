//! What connections cost that do nothing.

use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::peers::Runner;
use super::process::{anonymous, pipes};
use super::server::{ANSWER, Counts, Wish};
use crate::bench::net::Namespace;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// What idle connections hold.
#[derive(Clone, Copy, Debug)]
pub struct Idle {
    /// Anonymous memory of the load balancer's processes, in bytes for each connection.
    pub bytes: f64,
    /// Pipes that it holds in all.
    pub pipes: usize,
}

/// Opens connections through a proxy that was just started, each of which has carried one request.
///
/// # Errors
/// When one of them breaks.
pub fn measure(runner: &Runner, client: &Namespace, counts: &Counts, connections: usize) -> Result<Idle> {
    let processes = runner.processes()?;
    let address = runner.address();
    settle("earlier connections to end", || Ok(counts.open.load(Ordering::Relaxed) == 0))?;
    let before = anonymous(&processes)?;
    let mut streams: Vec<TcpStream> = client.inside(|| {
        (0..connections)
            .map(|number| open(address, PATIENCE).with_context(|| format!("connection {number}")))
            .collect()
    })?;
    let idle =
        Idle { bytes: (anonymous(&processes)? - before) / connections as f64, pipes: pipes(&processes)? };
    let check: Result<()> = client.inside(|| {
        // One that was given up would have cost nothing.
        streams.iter_mut().step_by(97).try_for_each(ask).context("an idle connection was lost")
    });
    drop(streams);
    check?;
    settle("idle connections to end", || Ok(counts.open.load(Ordering::Relaxed) == 0))?;
    Ok(idle)
}

/// A connection that has carried a request.
///
/// # Errors
/// When it has not, in that time.
pub fn open(address: SocketAddrV4, patience: Duration) -> Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&address.into(), patience)?;
    stream.set_read_timeout(Some(patience))?;
    ask(&mut stream)?;
    Ok(stream)
}

fn ask(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(&Wish::Answers.request())?;
    let mut answer = [0; ANSWER];
    stream.read_exact(&mut answer)?;
    Ok(())
}

fn settle(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let begin = Instant::now();
    while !is_so()? {
        ensure!(begin.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
