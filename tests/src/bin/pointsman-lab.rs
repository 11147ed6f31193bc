//! The lab for people: `cargo xtask demo`, `cargo xtask lab up|down|shell`.

use std::{
    env, fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::mpsc,
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};
use pointsman_tests::{
    demo,
    lab::{registry, wait_for},
};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Parser)]
#[command(name = "pointsman-lab", about = "A client, an edge node and three backends in network namespaces")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Forward real requests and show who answered, then clean up
    Demo,
    /// Do the same, and keep the lab until Ctrl-C or `down`
    Up,
    /// End the lab that `up` keeps
    Down,
    /// Open a shell in the lab that `up` keeps (default: on the edge)
    Shell {
        /// client, edge, switch, b1, b2 or b3
        #[arg(default_value = "edge")]
        role: String,
    },
}

fn main() -> ExitCode {
    match run(&Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: &Task) -> Result<()> {
    ensure!(geteuid().is_root(), "network namespaces and BPF need root: run this with sudo");
    match task {
        Task::Demo => {
            clean_up_on_signals(|| {})?;
            demo::run(|_| Ok(()))
        }
        Task::Up => up(),
        Task::Down => down(),
        Task::Shell { role } => shell(role),
    }
}

/// Ctrl-C and SIGTERM remove what was made, and end this process.
fn clean_up_on_signals(also: impl FnOnce() + Send + 'static) -> Result<()> {
    on_signals(|| {
        eprintln!("\ninterrupted: removing the lab");
        registry::remove_all();
        also();
        std::process::exit(130);
    })
}

fn on_signals(then: impl FnOnce() + Send + 'static) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        });
        then();
    });
    Ok(())
}

/// Holds the process id and the name of the lab that `up` keeps.
fn state_file() -> PathBuf {
    Path::new("/run/pointsman-lab").to_owned()
}

/// The lab that is up: the process that keeps it, and its name.
fn kept() -> Option<(i32, String)> {
    let text = fs::read_to_string(state_file()).ok()?;
    let (pid, id) = text.trim().split_once(' ')?;
    let pid = pid.parse().ok()?;
    // The lab goes with its process, and its name has the process id in it: both must be there.
    let alive = Path::new("/proc").join(format!("{pid}")).exists() && namespace(id, "edge").exists();
    alive.then(|| (pid, id.to_owned()))
}

fn namespace(id: &str, role: &str) -> PathBuf {
    Path::new(registry::NETNS_DIR).join(format!("{id}-{role}"))
}

fn up() -> Result<()> {
    if let Some((pid, id)) = kept() {
        bail!("the lab {id} is up already (process {pid}); `cargo xtask lab down` ends it");
    }
    clean_up_on_signals(|| drop(fs::remove_file(state_file())))?;
    let result = demo::run(|lab| {
        fs::write(state_file(), format!("{} {}\n", std::process::id(), lab.id()))
            .with_context(|| format!("cannot write {}", state_file().display()))?;
        println!("\nThe lab stays until Ctrl-C here, or `cargo xtask lab down` elsewhere.");
        // The signal handler removes the lab and ends the process; nothing else ends this.
        let (_keep, never) = mpsc::channel::<()>();
        let _ = never.recv();
        Ok(())
    });
    let _ = fs::remove_file(state_file());
    result
}

fn down() -> Result<()> {
    let Some((pid, id)) = kept() else {
        println!("no lab is up");
        return Ok(());
    };
    kill(Pid::from_raw(pid), Signal::SIGTERM).with_context(|| format!("cannot end process {pid}"))?;
    wait_for("the lab to be removed", || {
        Ok((!Path::new("/proc").join(pid.to_string()).exists()).then_some(()))
    })?;
    let _ = fs::remove_file(state_file());
    println!("the lab {id} is gone");
    Ok(())
}

fn shell(role: &str) -> Result<()> {
    let (_, id) = kept().context("no lab is up: `cargo xtask lab up` in another terminal")?;
    let path = namespace(&id, role);
    ensure!(path.exists(), "the lab has no {role}");
    let shell = env::var_os("SHELL").unwrap_or_else(|| "/bin/sh".into());
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", path.display())).arg(&shell).env("PS1", format!("{role}# "));
    Err(command.exec()).context("cannot start nsenter")
}
