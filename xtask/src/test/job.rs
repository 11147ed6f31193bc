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
    let mut command = Command::new(&test.binary);
    command
        .args([test.name.as_str(), "--exact", "--nocapture"])
        .envs(env.iter().cloned())
        .env("CARGO_MANIFEST_DIR", &test.package_dir)
        .current_dir(&test.package_dir);
    run_command(command, log, timeout, interrupted)
}

/// The same for any command.
pub fn run_command(
    mut command: Command,
    log: &Path,
    timeout: Duration,
    interrupted: &AtomicBool,
) -> Result<Option<ExitStatus>> {
    // A file, not a pipe: a process that the command leaves behind cannot keep us waiting.
    let output = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut child = command
        .stdin(Stdio::null())
        .stderr(output.try_clone()?)
        .stdout(output)
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start {}", command.get_program().display()))?;
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
    use std::path::PathBuf;

    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    /// A test whose "executable" is the shell, reading the script that is its "name".
    fn script(name: &str, text: &str) -> (Test, PathBuf) {
        let dir = std::env::temp_dir().join(format!("xtask-job-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("script"), text).unwrap();
        let test = Test {
            suite: "core".into(),
            package: "p".into(),
            target: "t".into(),
            name: "script".into(),
            ignored: false,
            binary: "/bin/sh".into(),
            package_dir: dir.clone(),
        };
        (test, dir)
    }

    #[test]
    fn output_and_status_are_those_of_the_test() {
        let (test, dir) = script("status", "echo out $1; echo err >&2; exit 3");
        let log = dir.join("log");
        let status = run(&test, &[], &log, LONG, &AtomicBool::new(false)).unwrap();
        assert_eq!(status.unwrap().code(), Some(3));
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "out --exact\nerr\n");
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_test_that_takes_too_long_is_ended() {
        let (test, dir) = script("timeout", "exec sleep 1000");
        let started = Instant::now();
        let limit = Duration::from_millis(100);
        let status = run(&test, &[], &dir.join("log"), limit, &AtomicBool::new(false)).unwrap();
        assert_eq!(status, None);
        assert!(started.elapsed() < Duration::from_secs(60));
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn an_interrupt_ends_the_test_and_what_it_started() {
        let (test, dir) = script("interrupt", "sleep 1000 & echo $! > new; mv new child; wait");
        let (child, interrupted) = (dir.join("child"), AtomicBool::new(false));
        let status = std::thread::scope(|scope| {
            scope.spawn(|| {
                await_that("the script writes its child's number", || child.exists());
                interrupted.store(true, Ordering::Relaxed);
            });
            run(&test, &[], &dir.join("log"), LONG, &interrupted).unwrap()
        });
        assert_eq!(status, None);
        let stat = format!("/proc/{}/stat", std::fs::read_to_string(&child).unwrap().trim());
        await_that("the script's child is gone, or a zombie that init has yet to reap", || {
            match std::fs::read_to_string(&stat) {
                Ok(stat) => stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')),
                Err(_) => true,
            }
        });
        std::fs::remove_dir_all(dir).unwrap();
    }

    fn await_that(what: &str, holds: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !holds() {
            assert!(Instant::now() < deadline, "waited in vain until {what}");
            std::thread::yield_now();
        }
    }
}
