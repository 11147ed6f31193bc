//! The door of the agent that runs: who wants to take over comes in here. Each is waited for by a task of its
//! own, so whoever is silent holds up neither the agent's loop nor the others.

use std::time::Duration;

use anyhow::{Context, Result};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::handover::{Given, Heir};
use crate::proxy::Lent;

/// How long who has connected may take to ask, and how long to take the sockets.
const PATIENCE: Duration = Duration::from_secs(5);
/// So many are waited for at once; others wait in the kernel.
const MOST: usize = 8;
/// How long nobody is let in after something failed. Where there is no file descriptor for accepting, whoever
/// asks stays there, and the loop would have nothing else to do.
const DEAF: Duration = Duration::from_secs(1);

/// What somebody at the door wants next.
pub enum Heard {
    /// To be given the sockets.
    Asks(Heir),
    /// That it is let go of everything: it has these.
    Has(Heir, Given),
}

/// The listening socket, and those who have connected to it.
pub struct Door {
    listener: UnixListener,
    tasks: JoinSet<Result<Heard>>,
    deaf_until: Option<Instant>,
}

impl Door {
    /// At a socket that listens.
    pub fn new(listener: UnixListener) -> Self {
        Self { listener, tasks: JoinSet::new(), deaf_until: None }
    }

    /// Waits until somebody wants something. May be dropped at any time, and called again.
    ///
    /// # Errors
    /// When somebody wanted it in vain, or could not be let in.
    pub async fn next(&mut self) -> Result<Heard> {
        let result = self.hear().await;
        if result.is_err() {
            self.deaf_until = Some(Instant::now() + DEAF);
        }
        result
    }

    async fn hear(&mut self) -> Result<Heard> {
        loop {
            let has_room = self.tasks.len() < MOST;
            tokio::select! {
                Some(done) = self.tasks.join_next() => return done.context("waiting for it")?,
                stream = let_in(&self.listener, self.deaf_until), if has_room => {
                    let stream = stream?;
                    self.tasks.spawn(async {
                        let heir = timeout(PATIENCE, Heir::new(stream)).await.context("it asks for nothing")?;
                        Ok(Heard::Asks(heir?))
                    });
                }
            }
        }
    }

    /// Gives somebody sockets, and how long connections may go on; [`Self::next`] says when it has them.
    pub fn give(&mut self, mut heir: Heir, sockets: Vec<Lent>, drain: Duration) {
        self.tasks.spawn(async move {
            let given = timeout(PATIENCE, heir.give(&sockets, drain)).await;
            Ok(Heard::Has(heir, given.context("it did not take the listening sockets in time")??))
        });
    }
}

async fn let_in(listener: &UnixListener, deaf_until: Option<Instant>) -> Result<UnixStream> {
    if let Some(moment) = deaf_until {
        sleep_until(moment).await;
    }
    let (stream, _) = listener.accept().await?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::app::handover;

    /// Who says nothing, and who takes nothing, keep nobody waiting.
    #[test]
    fn the_silent_are_waited_for_beside_others() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("door");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut door = Door::new(UnixListener::bind(&path).unwrap());
            let _silent = UnixStream::connect(&path).await.unwrap();
            let idle = UnixStream::connect(&path).await.unwrap();
            idle.try_write(b"pointsman: take over\n").unwrap();
            let Ok(Heard::Asks(heir)) = door.next().await else { panic!("it asks") };
            door.give(heir, Vec::new(), Duration::ZERO);
            let taken = tokio::task::spawn_blocking(move || handover::take(&path));
            let Ok(Heard::Asks(heir)) = door.next().await else { panic!("another one asks") };
            door.give(heir, Vec::new(), Duration::from_secs(7));
            let Ok(Heard::Has(heir, _)) = door.next().await else { panic!("it has everything") };
            heir.done().unwrap();
            assert_eq!(taken.await.unwrap().unwrap().unwrap().drain, Duration::from_secs(7));
            assert_eq!(door.tasks.len(), 2, "nobody's time was up meanwhile");
        });
    }
}
