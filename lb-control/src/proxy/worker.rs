//! A thread with a runtime of its own: what is accepted there stays there.

use std::{
    io,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::{
    runtime::{Builder, Handle},
    sync::oneshot,
    time::{MissedTickBehavior, interval},
};

use super::{clock, memory, registry, shared::Shared, splice};

/// How finely deadlines are kept: an eighth of the shortest timeout, within these bounds.
const TICKS: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(500)];

/// A thread that serves connections. It ends, with all of them, when this is dropped.
#[derive(Debug)]
pub struct Worker {
    /// Its runtime.
    pub handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts it.
    ///
    /// # Errors
    /// When the kernel has no thread or no epoll instance for it.
    pub fn start(number: usize, shared: &Arc<Shared>) -> Result<Self> {
        let failed = || format!("starting worker {number} of the proxy");
        let runtime = Builder::new_current_thread().enable_all().build().with_context(failed)?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let tick = tick(shared);
        let pipes = shared.limits.pipes;
        let shares = Arc::clone(&shared.memory);
        let run = move || {
            splice::allow(pipes);
            memory::share(shares);
            runtime.block_on(async {
                let mut stopped = stopped;
                let mut ticks = interval(tick);
                ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
                loop {
                    tokio::select! {
                        // Dropping the sender is a word too.
                        _ = &mut stopped => break,
                        _ = ticks.tick() => registry::wake_late(clock::milliseconds()),
                    }
                }
            });
        };
        let thread: io::Result<_> = thread::Builder::new().name(format!("proxy-{number}")).spawn(run);
        Ok(Self { handle, stop: Some(stop), thread: Some(thread.with_context(failed)?) })
    }

    /// Lets all its connections look whether they are still wanted.
    pub fn wake_all(&self) {
        self.handle.spawn(async { registry::wake_all() });
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It panicked: then it has ended, too.
            let _ = thread.join();
        }
    }
}

fn tick(shared: &Shared) -> Duration {
    let shortest = shared.settings.connect_timeout.min(shared.settings.idle_timeout_tcp);
    let [least, most] = TICKS;
    (shortest / 8).clamp(least, most)
}
