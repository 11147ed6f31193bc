//! `pointsman status`, `flows` and `drops`: asks the agent, or reads the pinned maps.

use std::io::{ErrorKind, Write, stdout};

use anyhow::{Context, Result, anyhow};
use clap::Args;

use super::{Place, watch};
use crate::dataplane::PinDirectory;
use crate::http::Inspect;
use crate::http::client::Client;
use crate::inspect::PinnedMaps;
use crate::view::render::{Format, Render, render};
use crate::view::{DEFAULT_FLOW_LIMIT, DropsView, FlowFilter, FlowsView, StatusView};

/// Arguments of `pointsman status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// How to show it
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value_t)]
    pub output: Format,
    /// Show it again every so many seconds, until Ctrl-C [2 if no number is given]
    #[arg(short, long, value_name = "SECONDS", num_args = 0..=1, require_equals = true,
          default_missing_value = "2", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub watch: Option<u64>,
    /// Where the agent is found.
    #[command(flatten)]
    pub place: Place,
}

/// Arguments of `pointsman flows`.
#[derive(Clone, Debug, Args)]
pub struct FlowsArgs {
    /// Only those of this Service
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub service: Option<String>,
    /// Only those to this backend
    #[arg(long, value_name = "ADDRESS[:PORT]")]
    pub backend: Option<String>,
    /// Only those of this client
    #[arg(long, value_name = "ADDRESS[:PORT]")]
    pub client: Option<String>,
    /// Only those in this state, for example established, time-wait, udp-replied
    #[arg(long)]
    pub state: Option<String>,
    /// Show so many, those with the latest packet first; 0 shows all
    #[arg(long, value_name = "NUMBER", default_value_t = DEFAULT_FLOW_LIMIT)]
    pub limit: usize,
    /// How to show them
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value_t)]
    pub output: Format,
    /// Where the agent is found.
    #[command(flatten)]
    pub place: Place,
}

/// Arguments of `pointsman drops`.
#[derive(Clone, Debug, Args)]
pub struct DropsArgs {
    /// How to show them; wide lists also the reasons that did not occur
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value_t)]
    pub output: Format,
    /// Where the agent is found.
    #[command(flatten)]
    pub place: Place,
}

impl FlowsArgs {
    /// The filter that was asked for.
    #[must_use]
    pub fn filter(&self) -> FlowFilter {
        FlowFilter {
            service: self.service.clone(),
            backend: self.backend.clone(),
            client: self.client.clone(),
            state: self.state.clone(),
            limit: Some(self.limit),
        }
    }
}

/// Carries out `pointsman status`.
pub(super) async fn status(args: &StatusArgs) -> Result<()> {
    let show = async || {
        let asked = Client::new(&args.place.socket).status().await;
        let (view, note) = either(&args.place, asked, |maps| -> Result<StatusView> { maps.status() }).await?;
        Ok((render(&view, args.output)?, note))
    };
    match args.watch {
        Some(seconds) => {
            watch::repeat(seconds, matches!(args.output, Format::Table | Format::Wide), show).await
        }
        None => once(show().await?),
    }
}

/// Carries out `pointsman flows`.
pub(super) async fn flows(args: &FlowsArgs) -> Result<()> {
    let filter = args.filter();
    filter.validate().map_err(anyhow::Error::msg)?;
    let asked = Client::new(&args.place.socket).flows(&filter).await;
    let pinned = move |maps: &PinnedMaps| -> Result<FlowsView> {
        filter.apply(maps.flows()?).map_err(anyhow::Error::msg)
    };
    show(either(&args.place, asked, pinned).await?, args.output)
}

/// Carries out `pointsman drops`.
pub(super) async fn drops(args: &DropsArgs) -> Result<()> {
    let asked = Client::new(&args.place.socket).drops().await;
    let pinned = |maps: &PinnedMaps| Ok(DropsView { drops: maps.drops()? });
    show(either(&args.place, asked, pinned).await?, args.output)
}

fn show((view, note): (impl Render, Option<String>), format: Format) -> Result<()> {
    once((render(&view, format)?, note))
}

fn once((text, note): (String, Option<String>)) -> Result<()> {
    if let Some(note) = note {
        eprintln!("pointsman: {note}");
    }
    write(&text)
}

/// The agent's answer; or, with a note, what the pinned maps tell.
async fn either<T: Send + 'static>(
    place: &Place,
    asked: Result<Option<T>>,
    pinned: impl FnOnce(&PinnedMaps) -> Result<T> + Send + 'static,
) -> Result<(T, Option<String>)> {
    let silence = match asked {
        Ok(Some(view)) => return Ok((view, None)),
        Ok(None) => format!("no agent answers on {}", place.socket.display()),
        Err(error) => format!("{error:#}"),
    };
    let pins = PinDirectory::new(&place.pin_dir);
    let note = format!("{silence}; this is what the pinned maps in {} tell", pins.display());
    let read = tokio::task::spawn_blocking(move || pinned(&PinnedMaps::new(pins)));
    match read.await.context("reading the pinned maps")? {
        Ok(view) => Ok((view, Some(note))),
        Err(error) => Err(anyhow!("{silence}, and the pinned maps tell nothing: {error:#}")),
    }
}

/// Writes to stdout. Whoever reads may stop when they have seen enough (`pointsman flows | head`).
pub(super) fn write(text: &str) -> Result<()> {
    let mut out = stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        written => written.context("writing to stdout"),
    }
}
