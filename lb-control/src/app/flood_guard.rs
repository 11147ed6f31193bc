//! Looks for floods of SYNs, on a thread of its own: the agent's loop may be busy when one comes.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Result;
use lb_common::abi::{DropReason, IPPROTO_TCP, ticks_from_seconds};
use tokio::sync::mpsc;
use tracing::error;

use crate::dataplane::flows::FlowTables;
use crate::dataplane::{Counters, Cpus, PinDirectory, clock, half_open};
use crate::plan::{CookiePhase, CpuUse, FloodWatch, Handshakes};

/// How often handshakes are looked at, unless that takes long.
const INTERVAL: Duration = Duration::from_secs(1);
/// The part of the time that looking may take: one in so many.
const SHARE: u32 = 20;
/// After a look that failed.
const RETRY: Duration = Duration::from_secs(10);

/// The thread; it ends when this is dropped.
pub struct FloodGuard {
    phases: mpsc::Receiver<CookiePhase>,
    _stop: Sender<()>,
}

impl FloodGuard {
    /// Begins to look, and goes on with what the datapath does already.
    pub fn start(pins: &PinDirectory, phase: CookiePhase) -> Self {
        // One phase lasts longer than the agent's loop may take, but for a flood that comes back at once.
        let (sender, phases) = mpsc::channel(8);
        let (stop, stopped) = channel();
        let pins = pins.clone();
        std::thread::spawn(move || {
            let start = Instant::now();
            let mut watch = FloodWatch::new(phase, Duration::ZERO);
            let mut cpus = CpuUse::default();
            let mut pause = INTERVAL;
            // Woken by nobody until the agent lets go of the other end.
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(pause) {
                let begin = Instant::now();
                match look(&pins, &watch, &mut cpus, start.elapsed()) {
                    Ok(seen) => {
                        let news = watch.look(start.elapsed(), &seen);
                        if news.is_some_and(|phase| sender.blocking_send(phase).is_err()) {
                            break;
                        }
                        pause = INTERVAL.max(begin.elapsed() * SHARE);
                    }
                    Err(error) => {
                        error!("looking for a flood of SYNs: {error:#}");
                        pause = RETRY;
                    }
                }
            }
        });
        Self { phases, _stop: stop }
    }

    /// Waits until the datapath is to do something else about SYN cookies.
    pub async fn next(&mut self) -> CookiePhase {
        match self.phases.recv().await {
            Some(phase) => phase,
            // The thread is gone, which ends with the agent only.
            None => std::future::pending().await,
        }
    }
}

/// What decides in this phase; the rest is not read.
fn look(pins: &PinDirectory, watch: &FloodWatch, cpus: &mut CpuUse, now: Duration) -> Result<Handshakes> {
    let tables = FlowTables::open(pins)?;
    let (online, counters) = (Cpus::count()?.online, Counters::new(pins.clone()));
    if watch.phase() == CookiePhase::Answer {
        let (answered, begun) = counted(&counters)?;
        let half_open = cpus.part(half_open::room(&tables)?, online);
        return Ok(Handshakes { half_open, answered, begun });
    }
    let after = watch.counts_after().map(|after| {
        let ago = u32::try_from(now.saturating_sub(after).as_secs()).unwrap_or(u32::MAX);
        clock::now().wrapping_sub(ticks_from_seconds(ago))
    });
    let half_open = half_open::half_open(&tables, after)?;
    // The counters of all Services on all CPUs are much to read, when there is no need.
    if CpuUse::matters(&half_open, online) {
        cpus.look(counters.new_flows_by_cpu()?, online);
    } else {
        cpus.forget();
    }
    Ok(Handshakes { half_open: cpus.part(half_open, online), ..Handshakes::default() })
}

/// SYNs that were answered with a cookie, and TCP connections that began. Of the latter some may have
/// begun without a cookie, those to backends on this node: so a flood may seem to be over that is not,
/// and is seen in the tables then.
fn counted(counters: &Counters) -> Result<(u64, u64)> {
    let answered = counters.drops()?.into_iter().find(|(reason, _)| *reason == DropReason::SynCookieSent);
    let stats = counters.service_stats()?;
    let names = counters.service_names()?;
    let tcp = names.iter().filter(|(_, name)| name.protocol == IPPROTO_TCP);
    let begun = tcp.filter_map(|(index, _)| stats.get(index)).map(|stats| stats.new_flows).sum();
    Ok((answered.map_or(0, |(_, stats)| stats.packets), begun))
}
