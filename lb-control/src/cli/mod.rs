//! The command line. A flag beats the environment, the environment beats the default.

mod cleanup;
mod doctor;
mod proxy;
mod run;
mod show;
#[cfg(test)]
mod tests;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, CommandFactory, Parser, Subcommand};
use lb_common::abi::{ABI_VERSION, maps};

pub use cleanup::CleanupArgs;
pub use doctor::DoctorArgs;
pub use run::{DatapathChoice, HttpAddress, OnExit, PortRange, RunArgs};
pub use show::{DropsArgs, FlowsArgs, StatusArgs};

use crate::{app, crd, dataplane, http, telemetry};

/// A load balancer for Kubernetes edge nodes: takes connections to the addresses of your Services
/// in XDP, before the kernel's network stack, and spreads them over their backends.
#[derive(Debug, Parser)]
#[command(name = "pointsman", version, max_term_width = 100, arg_required_else_help = true)]
#[command(after_help = "\
Examples:
  pointsman run --link-device eth0 --kubernetes=false --config services.yaml
  pointsman status --watch
  pointsman flows --service default/web --state established
  pointsman drops -o wide
  pointsman doctor --link-device eth0")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the agent: serve Services until SIGTERM
    ///
    /// With --kubernetes=false --config PATH, Services come from files that are read again whenever
    /// they change. Needs root. After a crash, start it again: the kernel went on
    /// forwarding, and no connection is lost.
    Run(Box<RunArgs>),
    /// Show devices, Services, backends, their counters, and what is wrong
    Status(StatusArgs),
    /// Show connections
    Flows(FlowsArgs),
    /// Show why packets were not forwarded
    Drops(DropsArgs),
    /// Look for what keeps this node from serving, and say what to do
    ///
    /// Rights, kernel, settings, devices: what can be tried is tried, in a network namespace of its
    /// own. Works beside a running agent, which it does not disturb, and without one. Ends with
    /// status 1 if it finds an error.
    Doctor(DoctorArgs),
    /// Take everything of Pointsman's out of the cluster, before it is uninstalled
    ///
    /// Finalizers, addresses and conditions of Services, VirtualIPs, Leases. Agents that still run take
    /// their addresses down, and write nothing for a minute after. May be repeated.
    Cleanup(CleanupArgs),
    /// Print the definitions of the resources AddressPool and VirtualIP, for `kubectl apply -f -`
    Crds,
    /// Show versions
    Version,
}

/// Where an agent is found.
#[derive(Clone, Debug, Args)]
pub struct Place {
    /// Unix socket of the agent's API
    #[arg(long, value_name = "PATH", default_value = http::DEFAULT_SOCKET)]
    pub socket: PathBuf,
    /// Where maps and programs are kept while no agent runs; below a BPF file system
    #[arg(long, value_name = "DIR", default_value = maps::PIN_ROOT)]
    pub pin_dir: PathBuf,
}

impl Cli {
    /// Does what was asked for. Gives the status that the process ends with.
    ///
    /// # Errors
    /// When it cannot be done. Arguments that contradict each other end the process with clap's
    /// status, 2.
    pub async fn execute(self) -> Result<ExitCode> {
        match self.command {
            Command::Doctor(args) => return doctor::run(args).await,
            Command::Run(args) => {
                let debug = args.debug;
                let settings = args.settings().unwrap_or_else(|message| contradiction(message));
                telemetry::init(debug)?;
                app::run(settings).await
            }
            Command::Status(args) => show::status(&args).await,
            Command::Flows(args) => show::flows(&args).await,
            Command::Drops(args) => show::drops(&args).await,
            Command::Cleanup(args) => cleanup::run(&args).await,
            Command::Crds => show::write(&definitions()?),
            Command::Version => show::write(&version()),
        }
        .map(|()| ExitCode::SUCCESS)
    }
}

/// Ends the process as clap does for a bad argument.
fn contradiction(message: String) -> ! {
    let mut command = Cli::command();
    command.build();
    let run = command.find_subcommand_mut("run").unwrap_or_else(|| unreachable!("declared above"));
    run.error(clap::error::ErrorKind::ArgumentConflict, message).exit()
}

fn definitions() -> Result<String> {
    let documents: Vec<_> = crd::definitions().iter().map(crd::yaml).collect::<Result<_, _>>()?;
    Ok(documents.join("---\n"))
}

fn version() -> String {
    let programs = match dataplane::object::bytes() {
        Ok(bytes) => format!("{} bytes", bytes.len()),
        Err(_) => "not in this build (cargo xtask build-ebpf, then build again)".to_owned(),
    };
    format!(
        "pointsman {}\nmap layout: v{ABI_VERSION}\nkernel programs: {programs}\n",
        env!("CARGO_PKG_VERSION")
    )
}
