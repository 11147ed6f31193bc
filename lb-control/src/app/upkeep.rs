//! Sweeps of the flow tables, on a thread of their own: a table may have a million entries.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use lb_common::abi::{BackendState, Config, ServiceFlags};
use tokio::sync::mpsc;
use tracing::error;

use crate::dataplane::collect::{Sweep, miscounted, sweep};
use crate::dataplane::flows::FlowTables;
use crate::dataplane::{KernelMaps, PinDirectory, clock};
use crate::ports::MapStore;

/// How often the tables are looked at, unless that takes long.
const INTERVAL: Duration = Duration::from_secs(10);
/// The part of the time that sweeping may take.
const SHARE: u32 = 20;

/// The thread; it ends when this is dropped.
pub struct Upkeep {
    sweeps: mpsc::Receiver<Sweep>,
    _stop: std::sync::mpsc::Sender<()>,
}

impl Upkeep {
    /// Begins to sweep.
    pub fn start(pins: &PinDirectory) -> Self {
        let (sender, sweeps) = mpsc::channel(1);
        let (stop, stopped) = std::sync::mpsc::channel();
        let pins = pins.clone();
        std::thread::spawn(move || {
            let mut pause = INTERVAL;
            // Woken by nobody until the agent lets go of the other end.
            while let Err(std::sync::mpsc::RecvTimeoutError::Timeout) = stopped.recv_timeout(pause) {
                let begin = Instant::now();
                match one(&pins) {
                    Ok(found) => {
                        if sender.blocking_send(found).is_err() {
                            break;
                        }
                    }
                    Err(error) => error!("sweep of the flow tables: {error:#}"),
                }
                pause = INTERVAL.max(begin.elapsed() * SHARE);
            }
        });
        Self { sweeps, _stop: stop }
    }

    /// Waits for the next sweep to end.
    pub async fn next(&mut self) -> Sweep {
        match self.sweeps.recv().await {
            Some(sweep) => sweep,
            // The thread is gone, which it says itself.
            None => std::future::pending().await,
        }
    }
}

fn one(pins: &PinDirectory) -> Result<Sweep> {
    let mut maps = KernelMaps::from_pins(pins)?;
    let tables = FlowTables::open(pins)?;
    let config = maps.config()?.unwrap_or_else(Config::default);
    // Read before the flows: a backend that is new here would look gone to its own flows.
    let backends: HashMap<_, _> = maps.backends()?.into_iter().collect();
    let is_gone = |index: u32, generation: u32| {
        backends.get(&index).is_some_and(|backend| {
            backend.generation != generation || BackendState::from_raw(backend.state) == BackendState::Free
        })
    };
    let found = sweep(&tables, clock::now(), &config, is_gone)?;
    let services: HashMap<_, _> = maps.services()?.into_iter().collect();
    if services.values().any(|service| service.has(ServiceFlags::LEAST_CONNECTIONS)) {
        let counted = maps.open_flows()?;
        for (backend, flows) in miscounted(&counted, &found.backends, &services, &backends) {
            maps.set_open_flows(backend, flows)?;
        }
    }
    Ok(found)
}
