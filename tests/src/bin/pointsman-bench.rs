//! `pointsman-bench datapath`, `proxy` and `control`: what the datapath, the proxy and the control plane
//! cost, beside baselines of the same run.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use pointsman_tests::bench::bulk;
use pointsman_tests::bench::control;
use pointsman_tests::bench::cost::{self, Effort};
use pointsman_tests::bench::live;
use pointsman_tests::bench::machine::{self, Machine};
use pointsman_tests::bench::net::Namespace;
use pointsman_tests::bench::proxy;
use pointsman_tests::bench::report::Report;
use pointsman_tests::bench::sustained;

#[derive(Parser)]
#[command(version, about)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Costs of the kernel datapath. Needs root, and the objects of `cargo xtask build-ebpf`.
    Datapath(Datapath),
    /// Costs of an agent that follows a large cluster. Needs root, and the agent in POINTSMAN_BIN.
    Control(Control),
    /// The proxy beside HAProxy, nginx, a plain relay and the kernel's paths. Needs root, and the agent in
    /// POINTSMAN_BIN; HAProxy and nginx are left out where they are not installed.
    Proxy(Proxy),
    /// A plain relay of `copy_bidirectional`: one of those that the proxy is compared with.
    #[command(hide = true)]
    Relay { listen: SocketAddr, backends: Vec<SocketAddr> },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Section {
    /// Nanoseconds per packet, by test runs of the programs.
    Cost,
    /// Packets per second through veth, by live frames.
    Live,
    /// Gbit/s of one connection through veth with offloads, in TC.
    Bulk,
    /// Connections per second under a sustained load.
    Sustained,
}

#[derive(clap::Args)]
struct Datapath {
    /// Few and short repetitions: for a look, not for a claim.
    #[arg(long)]
    quick: bool,
    /// Writes every repetition to a file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only one section.
    #[arg(long)]
    only: Option<Section>,
    /// Repetitions of the first three sections (7, or 3 with --quick).
    #[arg(long)]
    repetitions: Option<usize>,
    /// Length of the sustained load (60, or 10 with --quick).
    #[arg(long)]
    seconds: Option<u64>,
    /// CPU that the first three sections run on.
    #[arg(long, default_value_t = 1)]
    cpu: usize,
}

#[derive(clap::Args)]
struct Control {
    /// Few Services and changes: for a look, not for a claim.
    #[arg(long)]
    quick: bool,
    /// Writes every number to a file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Services (10000, or 200 with --quick).
    #[arg(long)]
    services: Option<u32>,
    /// Endpoints of each Service.
    #[arg(long, default_value_t = 10)]
    endpoints: u32,
    /// Endpoints that change, one after another (1000, or 50 with --quick).
    #[arg(long)]
    changes: Option<u32>,
    /// Length of the rest, in seconds (30, or 6 with --quick).
    #[arg(long, value_name = "SECONDS")]
    rest: Option<u32>,
}

#[derive(clap::Args)]
struct Proxy {
    /// Few and short repetitions: for a look, not for a claim.
    #[arg(long)]
    quick: bool,
    /// Writes every repetition to a file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only one section; may be repeated.
    #[arg(long)]
    only: Vec<proxy::Section>,
    /// Only peers whose name contains this; may be repeated.
    #[arg(long, value_name = "NAME")]
    peer: Vec<String>,
    /// How often everything is measured (5, or 2 with --quick).
    #[arg(long)]
    repetitions: Option<usize>,
    /// Length of each number's measurement in seconds (2, or 0.5 with --quick).
    #[arg(long)]
    seconds: Option<f64>,
}

fn main() -> Result<()> {
    let mut report = Report::new(Machine::read()?);
    let file = match Options::parse().command {
        Command::Datapath(options) => {
            datapath(&mut report, &options)?;
            options.json
        }
        Command::Control(options) => {
            let choose = |whole: u32, quick: u32| if options.quick { quick } else { whole };
            let scale = control::Scale {
                services: options.services.unwrap_or(choose(10_000, 200)),
                endpoints: options.endpoints,
                changes: options.changes.unwrap_or(choose(1_000, 50)),
                rest: Duration::from_secs(options.rest.unwrap_or(choose(30, 6)).into()),
            };
            if let Err(error) = control::measure(&mut report, scale) {
                // What was measured until then took long.
                print!("{}", report.table());
                return Err(error);
            }
            options.json
        }
        Command::Proxy(options) => {
            let choose = |whole, quick| if options.quick { quick } else { whole };
            let scale = proxy::Scale {
                sections: options.only,
                repetitions: options.repetitions.unwrap_or(choose(5.0, 2.0) as usize),
                length: Duration::from_secs_f64(options.seconds.unwrap_or(choose(2.0, 0.5))),
                peers: options.peer,
            };
            let result = proxy::measure(&mut report, &scale);
            print!("{}", proxy::table(&report));
            if let Err(error) = result {
                // What was measured until then took long.
                print!("{}", report.table());
                return Err(error);
            }
            options.json
        }
        Command::Relay { listen, backends } => return proxy::relay::run(listen, &backends),
    };
    print!("{}", report.table());
    if let Some(file) = file {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(())
}

fn datapath(report: &mut Report, options: &Datapath) -> Result<()> {
    let wanted = |section| options.only.is_none_or(|only| only == section);
    let packets = if options.quick { 1 << 17 } else { 1 << 20 };
    let repetitions = options.repetitions.unwrap_or(if options.quick { 3 } else { 7 });
    let effort = Effort { repetitions, packets };
    if wanted(Section::Cost) {
        Namespace::new()?.inside(|| {
            machine::pin(options.cpu)?;
            cost::measure(report, effort)
        })?;
    }
    if wanted(Section::Live) {
        live::measure(report, effort, options.cpu)?;
    }
    if wanted(Section::Bulk) {
        let length = Duration::from_secs(if options.quick { 1 } else { 3 });
        bulk::measure(report, repetitions, length, options.cpu)?;
    }
    if wanted(Section::Sustained) {
        let seconds = options.seconds.unwrap_or(if options.quick { 10 } else { 60 });
        sustained::measure(report, seconds)?;
    }
    Ok(())
}
