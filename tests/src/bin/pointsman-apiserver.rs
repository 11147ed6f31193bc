//! The API server double for people, and for processes in network namespaces.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Parser;
use pointsman_tests::apiserver::{ApiServer, Options};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Parser)]
#[command(name = "pointsman-apiserver", about = "A Kubernetes API server double, gone when it ends")]
struct Cli {
    /// Where to listen; port 0 takes any
    #[arg(long, default_value = "127.0.0.1:0")]
    address: SocketAddr,
    /// Listen in this network namespace (a file, e.g. /run/netns/edge)
    #[arg(long, value_name = "FILE")]
    netns: Option<PathBuf>,
    /// Which Kubernetes 1.x to claim to be
    #[arg(long, default_value_t = Options::default().minor)]
    minor: u32,
    /// Enforce roles for all but the administrator
    #[arg(long)]
    rbac: bool,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    let Cli { address, netns, minor, rbac } = cli;
    let server = ApiServer::start_with(&Options { address, namespace: netns, minor, ..Options::default() })?;
    server.enforce_rbac(rbac);
    println!("{}", server.kubeconfig().display());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut ended = signal(SignalKind::terminate())?;
        let mut interrupted = signal(SignalKind::interrupt())?;
        tokio::select! {
            _ = ended.recv() => {}
            _ = interrupted.recv() => {}
        }
        Ok(())
    })
}
