//! Many connections that stay, and exchange a little with each round.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use nix::{
    sched::{CloneFlags, unshare},
    sys::resource::{Resource, getrlimit, setrlimit},
};

use super::client;
use crate::lab::Namespace;

/// Longest time for all connections to be opened, or for a round of them.
const PATIENCE: Duration = Duration::from_secs(180);

/// Thousands of connections to an echo server, on one thread: round after round, each sends a
/// number and gets it back.
#[derive(Debug)]
pub struct Herd {
    stop: Arc<AtomicBool>,
    rounds: Receiver<()>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Herd {
    /// Opens the connections, and returns when each has been used once.
    ///
    /// # Errors
    /// When one cannot be opened or used.
    pub fn start(from: &Arc<Namespace>, to: SocketAddr, connections: usize) -> Result<Self> {
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, most, most).context("cannot allow more open files")?;
        let stop = Arc::new(AtomicBool::new(false));
        let (done, rounds) = channel();
        let (namespace, stopped) = (Arc::clone(from), Arc::clone(&stop));
        let body = move || namespace.enter(|| run(to, connections, &stopped, &done))?;
        let mut herd = Self { stop, rounds, thread: Some(thread::spawn(body)) };
        herd.wait_round()?;
        Ok(herd)
    }

    /// Waits until every connection has been used once more, from the end of the last round that
    /// was waited for on.
    ///
    /// # Errors
    /// When one broke, or that takes too long.
    pub fn wait_round(&mut self) -> Result<()> {
        match self.rounds.recv_timeout(PATIENCE) {
            Ok(()) => Ok(()),
            Err(RecvTimeoutError::Timeout) => bail!("a round of all connections takes over {PATIENCE:?}"),
            Err(RecvTimeoutError::Disconnected) => Err(self.join().err().context("the connections ended")?),
        }
    }

    /// Waits for a whole round that begins after this is called, and ends the connections; gives how
    /// many rounds there were since the last one that was waited for.
    ///
    /// # Errors
    /// When a connection broke.
    pub fn finish(mut self) -> Result<usize> {
        let before = self.rounds.try_iter().count();
        self.wait_round()?;
        self.wait_round()?;
        self.stop.store(true, Ordering::Relaxed);
        self.join()?;
        Ok(before + 2)
    }

    fn join(&mut self) -> Result<()> {
        let thread = self.thread.take().context("it was waited for already")?;
        thread.join().map_err(|_| anyhow!("the thread of the connections panicked"))?
    }
}

impl Drop for Herd {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.join();
    }
}

fn run(to: SocketAddr, connections: usize, stop: &AtomicBool, done: &Sender<()>) -> Result<()> {
    // Open files of its own, as many again as the process may have: servers have the other ends.
    unshare(CloneFlags::CLONE_FILES).context("cannot have open files apart")?;
    let mut streams = Vec::with_capacity(connections);
    for number in 0..connections {
        streams.push(client::open(to).with_context(|| format!("connection {number}"))?);
    }
    let mut round = 0;
    while !stop.load(Ordering::Relaxed) {
        exchange(&streams, round)?;
        round += 1;
        if done.send(()).is_err() {
            break;
        }
    }
    Ok(())
}

fn exchange(streams: &[TcpStream], round: u64) -> Result<()> {
    let message = round.to_be_bytes();
    for (number, mut stream) in streams.iter().enumerate() {
        stream.write_all(&message).with_context(|| format!("round {round}, connection {number}"))?;
    }
    for (number, mut stream) in streams.iter().enumerate() {
        let mut answer = [0; 8];
        stream.read_exact(&mut answer).with_context(|| format!("round {round}, connection {number}"))?;
        if answer != message {
            bail!("round {round}, connection {number}: the answer is of {}", u64::from_be_bytes(answer));
        }
    }
    Ok(())
}
