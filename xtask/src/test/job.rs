//! One test in a process group of its own, with a time limit.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::discover::Test;

/// How often an interrupt is looked for while a test runs.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
/// Time to clean up between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(5);

/// Runs the test with its output going to `log`. `None` when it was ended for taking longer than
/// `timeout`, or because `interrupted` was set.
pub fn run(
    test: &Test,
    env: &[(OsString, OsString)],
    log: &Path,
    timeout: Duration,
    interrupted: &AtomicBool,
) -> Result<Option<ExitStatus>> {
    // A file, not a pipe: a process that the test leaves behind cannot keep us waiting.
    let output = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut child = Command::new(&test.binary)
        .args([test.name.as_str(), "--exact", "--nocapture"])
        .envs(env.iter().cloned())
        .env("CARGO_MANIFEST_DIR", &test.package_dir)
        .current_dir(&test.package_dir)
        .stdin(Stdio::null())
        .stderr(output.try_clone()?)
        .stdout(output)
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start {}", test.binary.display()))?;
    let group = Pid::from_child(&child);
    let ended = wait(&mut child, timeout, interrupted)?;
    if ended.is_none() {
        // Asked first, so that agents and labs take down what they set up.
        let _ = kill_process_group(group, Signal::TERM);
        wait(&mut child, GRACE, &AtomicBool::new(false))?;
    }
    // Whatever the test started and did not end is in its group; the group may well be empty.
    let _ = kill_process_group(group, Signal::KILL);
    child.wait()?;
    Ok(ended)
}

fn wait(child: &mut Child, timeout: Duration, interrupted: &AtomicBool) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + timeout;
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).context("pidfd_open")?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if interrupted.load(Ordering::Relaxed) || Instant::now() >= deadline {
            return Ok(None);
        }
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&TICK)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("poll on a test's process"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(text: &str) -> (Test, std::path::PathBuf) {
        use std::os::unix::fs::PermissionsExt;
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("xtask-job-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let binary = dir.join("run");
        std::fs::write(&binary, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&binary, std::fs::Permissions::from_mode(0o755)).unwrap();
        let test = Test {
            suite: "core".into(),
            package: "p".into(),
            target: "t".into(),
            name: "n".into(),
            ignored: false,
            binary,
            package_dir: dir.clone(),
        };
        (test, dir)
    }

    #[test]
    fn output_and_status_are_those_of_the_test() {
        let (test, dir) = script("echo out $1; echo err >&2; exit 3");
        let log = dir.join("log");
        let status = run(&test, &[], &log, Duration::from_secs(60), &AtomicBool::new(false)).unwrap();
        assert_eq!(status.unwrap().code(), Some(3));
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "out n\nerr\n");
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_test_that_hangs_is_ended_with_what_it_started() {
        let (test, dir) = script("sleep 1000 & echo $! > child; wait");
        let log = dir.join("log");
        let status = run(&test, &[], &log, Duration::from_millis(500), &AtomicBool::new(false)).unwrap();
        assert_eq!(status, None);
        let child: i32 = std::fs::read_to_string(dir.join("child")).unwrap().trim().parse().unwrap();
        // Gone, or a zombie that init has not reaped yet.
        let gone = || match std::fs::read_to_string(format!("/proc/{child}/stat")) {
            Ok(stat) => stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')),
            Err(_) => true,
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !gone() {
            assert!(Instant::now() < deadline, "process {child} is still there");
            std::thread::yield_now();
        }
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn an_interrupt_ends_the_test_early() {
        let (test, dir) = script("exec sleep 1000");
        let started = Instant::now();
        let status =
            run(&test, &[], &dir.join("log"), Duration::from_secs(600), &AtomicBool::new(true)).unwrap();
        assert_eq!(status, None);
        assert!(started.elapsed() < Duration::from_secs(60));
        std::fs::remove_dir_all(dir).unwrap();
    }
}
