//! The demo ends well, and leaves nothing behind, however it ends.

use std::{
    fs,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pointsman_tests::lab::{
    is_root,
    registry::{BPF_DIR, NETNS_DIR, processes_in},
    wait_for,
};

fn demo() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pointsman-lab"));
    // The demo shows XDP, whatever the other tests run on.
    command
        .env_remove("POINTSMAN_TEST_DATAPATH")
        .arg("demo")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// What there is of the labs of a process.
fn left(owner: u32) -> Result<Vec<String>> {
    let prefix = format!("pm-{owner}-");
    let mut left = Vec::new();
    for directory in [Path::new(NETNS_DIR), Path::new(BPF_DIR), &std::env::temp_dir()] {
        // There is none before the first namespace.
        let Ok(entries) = fs::read_dir(directory) else { continue };
        for entry in entries {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                left.push(entry.path().display().to_string());
            }
        }
    }
    Ok(left)
}

/// Starts a demo, sends it a signal as soon as its agent runs, and gives the agent's process id.
fn break_off(signal: Signal) -> Result<(u32, u32, ExitStatus)> {
    let mut demo: Child = demo().spawn().context("cannot start the demo")?;
    let owner = demo.id();
    let agent = wait_for("the demo's agent", || {
        ensure!(demo.try_wait()?.is_none(), "the demo ended early");
        Ok(processes_in(&format!("pm-{owner}-1-edge")).first().copied())
    })?;
    kill(Pid::from_raw(i32::try_from(owner)?), signal)?;
    Ok((owner, agent, demo.wait()?))
}

fn is_gone(agent: u32) -> Result<()> {
    let running =
        || fs::read_to_string(format!("/proc/{agent}/cmdline")).is_ok_and(|line| line.contains("pm-"));
    wait_for("the agent to end", || Ok((!running()).then_some(())))
}

#[test]
fn interrupted_it_leaves_nothing_behind() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let (owner, agent, status) = break_off(signal)?;
        assert!(!status.success(), "{signal}: {status}");
        is_gone(agent)?;
        assert_eq!(left(owner)?, Vec::<String>::new(), "{signal}");
    }
    Ok(())
}

#[test]
fn killed_it_is_cleared_away_by_the_next_which_runs_well() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let (owner, agent, _) = break_off(Signal::SIGKILL)?;
    let mut next = demo();
    let output =
        next.stdout(Stdio::piped()).stderr(Stdio::piped()).output().context("cannot start the demo")?;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
    assert!(stdout.contains("native") && stdout.contains("Exact round-robin"), "{stdout}");
    is_gone(agent)?;
    assert_eq!(left(owner)?, Vec::<String>::new());
    Ok(())
}
