//! Ctrl-C while something runs that has to be taken down.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use signal_hook::consts::{SIGINT, SIGTERM};

/// Runs `body` with a flag that is set when the user, or the system, wants us to end.
pub fn watch<T>(body: impl FnOnce(&AtomicBool) -> Result<T>) -> Result<T> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let handlers =
        [SIGINT, SIGTERM].map(|signal| signal_hook::flag::register(signal, Arc::clone(&interrupted)));
    let result = body(&interrupted);
    for handler in handlers.into_iter().flatten() {
        signal_hook::low_level::unregister(handler);
    }
    result
}
