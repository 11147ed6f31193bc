//! `pointsman doctor`: looks at the node, tries what can be tried, and says what to do.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use super::run::device_name;
use super::show::write;
use super::{Place, PortRange};
use crate::inspect::node::{self, Question};
use crate::plan::doctor::diagnose;
use crate::view::render::{Format, render};

/// Arguments of `pointsman doctor`.
#[derive(Clone, Debug, Args)]
pub struct DoctorArgs {
    /// Device that the VIPs are put on, and that clients come in by; may be repeated
    #[arg(long = "link-device", env = "LINKDEVICE", value_name = "DEVICE", value_parser = device_name)]
    pub link_devices: Vec<String>,
    /// Further devices that clients come in by, separated by commas
    #[arg(long, env = "CLIENT_DEVICES", value_name = "DEVICES", value_delimiter = ',', value_parser = device_name)]
    pub client_devices: Vec<String>,
    /// Also attach the programs to the link devices for a moment, with empty maps, unless an agent or
    /// another program is there already; some drivers stop for a second then
    #[arg(long)]
    pub attach: bool,
    /// Only read: load no program and attach none anywhere
    #[arg(long, conflicts_with = "attach")]
    pub read_only: bool,
    /// Source ports towards backends that an agent is to have; those of the one that runs count first
    #[arg(long, value_name = "FIRST-LAST", default_value_t)]
    pub snat_ports: PortRange,
    /// How to show it; wide lists also what is in order
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value_t)]
    pub output: Format,
    /// Where the agent is found.
    #[command(flatten)]
    pub place: Place,
}

/// Carries it out. A node with errors is not what was asked for: the status is 1.
pub(super) async fn run(args: DoctorArgs) -> Result<ExitCode> {
    let question = Question {
        link_devices: [args.link_devices, args.client_devices].concat(),
        attach: args.attach,
        read_only: args.read_only,
        snat_ports: (args.snat_ports.first, args.snat_ports.last),
        socket: args.place.socket,
        pin_directory: args.place.pin_dir,
    };
    let view = diagnose(&node::facts(&question).await?);
    write(&render(&view, args.output)?)?;
    Ok(if view.has_errors() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
