//! Long-lived UDP flows: no retransmission hides a loss.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};

use super::client::{udp_exchange, udp_socket};
use crate::lab::{Namespace, wait_for};

/// Pause between the exchanges of a flow.
const PAUSE: Duration = Duration::from_millis(2);

/// Flows that ask and wait for the answer, one datagram at a time, until they are stopped.
#[derive(Debug)]
pub struct UdpFlows {
    stop: Arc<AtomicBool>,
    exchanges: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl UdpFlows {
    /// Opens flows to an echo server and starts to use them.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn start(from: &Namespace, to: SocketAddr, flows: usize) -> Result<Self> {
        let mut started = Self { stop: Arc::default(), exchanges: Vec::new(), threads: Vec::new() };
        for _ in 0..flows {
            let socket = from.enter(|| udp_socket(to))??;
            let (stop, count) = (Arc::clone(&started.stop), Arc::new(AtomicU64::new(0)));
            started.exchanges.push(Arc::clone(&count));
            started.threads.push(thread::spawn(move || run(&socket, &stop, &count)));
        }
        Ok(started)
    }

    /// Waits until every flow has completed `more` exchanges from now.
    ///
    /// # Errors
    /// When that takes too long, as it does when a datagram was lost.
    pub fn wait_exchanges(&self, more: u64) -> Result<()> {
        let now = |count: &Arc<AtomicU64>| count.load(Ordering::Relaxed);
        let goals: Vec<u64> = self.exchanges.iter().map(|count| now(count) + more).collect();
        wait_for("exchanges on every UDP flow", || {
            let reached = self.exchanges.iter().zip(&goals).all(|(count, goal)| now(count) >= *goal);
            Ok(reached.then_some(()))
        })
    }

    /// Waits until every flow has ended by itself, and fails as [`Self::stop`] does.
    ///
    /// # Errors
    /// Always, but for flows that were stopped before.
    pub fn stop_when_broken(self) -> Result<()> {
        wait_for("every UDP flow to break", || {
            Ok(self.threads.iter().all(JoinHandle::is_finished).then_some(()))
        })?;
        self.stop()
    }

    /// Ends the flows.
    ///
    /// # Errors
    /// When a datagram or its answer was lost, or a flow moved to another backend.
    pub fn stop(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in std::mem::take(&mut self.threads) {
            thread.join().map_err(|_| anyhow!("a flow's thread panicked"))??;
        }
        Ok(())
    }
}

impl Drop for UdpFlows {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn run(socket: &UdpSocket, stop: &AtomicBool, count: &AtomicU64) -> Result<()> {
    let mut backend: Option<String> = None;
    while !stop.load(Ordering::Relaxed) {
        let number = count.load(Ordering::Relaxed);
        let name =
            udp_exchange(socket, &number.to_be_bytes()).with_context(|| format!("exchange {number}"))?;
        let before = backend.get_or_insert_with(|| name.clone());
        ensure!(*before == name, "exchange {number}: moved from {before} to {name}");
        count.store(number + 1, Ordering::Relaxed);
        // The rate, not a condition to wait for.
        thread::sleep(PAUSE);
    }
    Ok(())
}
