//! Log lines: text on stderr, one line an event. Metrics are in a module of their own.

pub mod metrics;

use std::io::{IsTerminal, stderr};

use anyhow::{Context, Result};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Subscriber;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::prelude::*;

/// Starts logging for the process. Colours are for terminals only, and not when NO_COLOR is set
/// (no-color.org).
///
/// # Errors
/// When logging was started before.
pub fn init(debug: bool) -> Result<()> {
    let colours = stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    subscriber(debug, colours, stderr).try_init().context("starting to log")
}

/// Info, or debug for our own modules: libraries that log each system call would drown them.
fn subscriber<W>(debug: bool, colours: bool, writer: W) -> impl Subscriber + Send + Sync
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let own = if debug { LevelFilter::DEBUG } else { LevelFilter::INFO };
    let filter = Targets::new().with_default(LevelFilter::INFO).with_target("lb_control", own);
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(colours).with_target(debug);
    tracing_subscriber::registry().with(lines.with_filter(filter))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged(debug: bool) -> String {
        let lines = Lines::default();
        let writer = lines.clone();
        tracing::subscriber::with_default(subscriber(debug, false, move || writer.clone()), || {
            tracing::info!(device = "eth0", "attached");
            tracing::debug!("details");
            tracing::debug!(target: "netlink", "a packet");
        });
        let bytes = lines.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn debug_shows_our_details_only() {
        let (info, debug) = (logged(false), logged(true));
        assert!(info.contains("INFO attached device=\"eth0\"") && !info.contains("details"), "{info}");
        assert!(debug.contains("details") && !debug.contains("a packet"), "{debug}");
        assert!(!debug.contains('\u{1b}'), "{debug}");
    }
}
