//! What the log says about the ways to backends.

use std::collections::BTreeMap;
use std::net::IpAddr;

use tracing::{debug, info, warn};

use super::way::Resolution;

/// Lines of a kind that are written at once; a gateway may take thousands of backends with it.
const LINES: usize = 10;

/// What changed at once. Says how much it left out when it is dropped.
#[derive(Debug, Default)]
pub struct News {
    lost: usize,
    found: usize,
}

impl News {
    /// The way to a backend is another than before, or there was none before.
    pub fn tell(&mut self, backend: IpAddr, before: Option<&Resolution>, now: Option<&Resolution>) {
        let Some(now) = now else { return };
        match (&now.problem, before.map(|before| &before.problem)) {
            (Some(problem), before) if before != Some(&now.problem) => {
                self.lost += 1;
                if self.lost <= LINES {
                    warn!("{problem}");
                }
            }
            (None, Some(Some(_))) => {
                self.found += 1;
                if self.found <= LINES {
                    info!(%backend, "the way to the backend is known");
                }
            }
            // As it should be: not worth a line for each of many.
            (None, None) => debug!(%backend, "the way to the backend is known"),
            _ => {}
        }
    }
}

impl Drop for News {
    fn drop(&mut self) {
        if let Some(more) = self.lost.checked_sub(LINES + 1) {
            warn!("{} more backends cannot be reached", more + 1);
        }
        if let Some(more) = self.found.checked_sub(LINES + 1) {
            info!("the ways to {} more backends are known", more + 1);
        }
    }
}

/// Keeps what is wrong with the way to a backend.
pub fn note(troubled: &mut BTreeMap<IpAddr, String>, backend: IpAddr, now: Option<&Resolution>) {
    match now.and_then(|now| now.problem.clone()) {
        Some(problem) => drop(troubled.insert(backend, problem)),
        None => drop(troubled.remove(&backend)),
    }
}
