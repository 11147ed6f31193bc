//! `cargo xtask`: everything that builds, tests and shows Pointsman, from a fresh machine.

mod ci;
mod ebpf;
mod generate;
mod image;
mod kernels;
mod process;
mod run;
mod setup;
mod test;
mod tidy;
mod workspace;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::setup::packages::Purpose;
use crate::workspace::Profile;

#[derive(Parser)]
#[command(name = "xtask", bin_name = "cargo xtask", about)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install everything that the project needs and that is missing (the other commands install
    /// what they need themselves)
    Setup,
    /// Build the kernel programs into target/ebpf
    BuildEbpf,
    /// Build the kernel programs and `pointsman`, and print where it lies
    Build {
        #[arg(long)]
        release: bool,
    },
    /// Build and run all tests
    Test(test::Args),
    /// Show the load balancer at work in a lab of network namespaces
    Demo {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Keep the lab to play with: up, down, shell, …
    Lab {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Measure, beside baselines: datapath, control, proxy
    Bench {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Fuzz a target (lists them when none is given); what follows goes to cargo-fuzz
    Fuzz {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Write what is derived from the code and committed: resource definitions, deploy/base
    Gen(generate::Args),
    /// Build a container image, without a container engine
    Image(image::Args),
    /// Check licences, origin and advisories of all dependencies
    Deny {
        /// Only some of the checks: licenses, bans, sources, advisories
        args: Vec<OsString>,
    },
    /// Check the rules of the house that no compiler checks
    Tidy,
    /// Formatting, tidy and lints, without the tests
    Check,
    /// Everything that has to pass: check, then test
    Ci(test::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Task::Setup => setup::all(),
        Task::BuildEbpf => ebpf::build(),
        Task::Build { release } => run::build_agent(Profile::from_release_flag(release)),
        Task::Test(args) => test::run(&args),
        Task::Demo { args } => lab(std::iter::once("demo".into()).chain(args).collect()),
        Task::Lab { args } => lab(args),
        Task::Bench { args } => run::bench(&args),
        Task::Fuzz { args } => run::fuzz(&args),
        Task::Gen(args) => generate::run(&args),
        Task::Image(args) => image::run(&args),
        Task::Deny { args } => run::deny(&args),
        Task::Tidy => tidy::run(),
        Task::Check => ci::check(),
        Task::Ci(args) => ci::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !error.is::<AlreadyReported>() {
                eprintln!("error: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}

/// A failure that has been shown in full: nothing is to be printed after it.
#[derive(Debug)]
struct AlreadyReported;

impl std::fmt::Display for AlreadyReported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("failed as reported above")
    }
}

impl std::error::Error for AlreadyReported {}

fn lab(args: Vec<OsString>) -> anyhow::Result<()> {
    run::with_agent(Purpose::Lab, Profile::Dev, "pointsman-lab", &args)
}
