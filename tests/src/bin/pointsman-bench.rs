//! `pointsman-bench datapath`: what the datapath costs, beside baselines of the same run.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use pointsman_tests::bench::cost::{self, Effort};
use pointsman_tests::bench::live;
use pointsman_tests::bench::machine::{self, Machine};
use pointsman_tests::bench::net::Namespace;
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
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Section {
    /// Nanoseconds per packet, by test runs of the programs.
    Cost,
    /// Packets per second through veth, by live frames.
    Live,
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
    /// Length of the sustained load (60, or 10 with --quick).
    #[arg(long)]
    seconds: Option<u64>,
    /// CPU that the cost and live sections run on.
    #[arg(long, default_value_t = 1)]
    cpu: usize,
}

fn main() -> Result<()> {
    let Options { command: Command::Datapath(options) } = Options::parse();
    let mut report = Report::new(Machine::read()?);
    let wanted = |section| options.only.is_none_or(|only| only == section);
    if wanted(Section::Cost) {
        let packets = if options.quick { 1 << 17 } else { 1 << 20 };
        let effort = Effort { repetitions: if options.quick { 3 } else { 7 }, packets };
        Namespace::new()?.inside(|| {
            machine::pin(options.cpu)?;
            cost::measure(&mut report, effort)
        })?;
    }
    if wanted(Section::Live) {
        let packets = if options.quick { 1 << 17 } else { 1 << 20 };
        let effort = Effort { repetitions: if options.quick { 3 } else { 7 }, packets };
        live::measure(&mut report, effort, options.cpu)?;
    }
    if wanted(Section::Sustained) {
        let seconds = options.seconds.unwrap_or(if options.quick { 10 } else { 60 });
        sustained::measure(&mut report, seconds)?;
    }
    print!("{}", report.table());
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(file, text).with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(())
}
