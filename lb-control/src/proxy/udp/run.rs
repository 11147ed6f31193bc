//! An engine on its worker's runtime.

use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc::Sender},
};

use nix::sys::epoll::Epoll;
use tokio::{
    io::Interest,
    sync::mpsc::UnboundedReceiver,
    time::{MissedTickBehavior, interval},
};

use super::engine::{Engine, TICK};
use crate::proxy::{clock, entry::Entry, watch::watch};

/// What an engine is to do.
#[derive(Debug)]
pub enum Order {
    /// Serve a socket of an entry.
    Add(u32, Arc<Entry>, Arc<OwnedFd>),
    /// Serve it no more.
    Remove(u32),
    /// Look what is wanted of the socket's entry now.
    Follow(u32),
    /// Begin no more sessions, and end those that wait for nothing.
    Drain,
}

/// Orders, and whom to tell that they have been carried out.
#[derive(Debug)]
pub struct Orders {
    /// In turn.
    pub all: Vec<Order>,
    /// Gets what went wrong.
    pub done: Sender<Vec<nix::Error>>,
}

struct Watched(Arc<Epoll>);

impl AsFd for Watched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.0.as_fd()
    }
}

impl AsRawFd for Watched {
    fn as_raw_fd(&self) -> RawFd {
        self.0.0.as_raw_fd()
    }
}

/// Until nobody has orders any more.
pub async fn run(mut engine: Engine, mut orders: UnboundedReceiver<Orders>) {
    let watched = match watch(Watched(engine.epoll()), Interest::READABLE) {
        Ok(watched) => watched,
        Err(error) => return tracing::error!("UDP is not served: watching its sockets: {error}"),
    };
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        while let Ok(some) = orders.try_recv() {
            carry_out(&mut engine, some);
        }
        // A panic costs a round, and not all sessions.
        let has_more = catch_unwind(AssertUnwindSafe(|| engine.round(clock::now())));
        if has_more.unwrap_or(true) {
            tokio::task::yield_now().await;
            continue;
        }
        let has_sessions = engine.has_sessions();
        tokio::select! {
            some = orders.recv() => match some {
                Some(some) => carry_out(&mut engine, some),
                None => break,
            },
            ready = watched.readable() => match ready {
                // Whatever comes from now on makes it ready again.
                Ok(mut ready) => ready.clear_ready(),
                Err(_) => break,
            },
            _ = ticks.tick(), if has_sessions => {}
        }
    }
}

fn carry_out(engine: &mut Engine, Orders { all, done }: Orders) {
    let mut errors = Vec::new();
    for order in all {
        match order {
            Order::Add(way, entry, socket) => errors.extend(engine.add(way, entry, socket).err()),
            Order::Remove(way) => engine.remove(way),
            Order::Follow(way) => engine.follow(way),
            Order::Drain => engine.drain(),
        }
    }
    // Whoever gave them may not have waited.
    let _ = done.send(errors);
}
