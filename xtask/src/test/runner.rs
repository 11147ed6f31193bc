//! Runs the selected tests, several at a time, and reports each as it ends.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::discover::Test;
use super::outcome::{self, Outcome, Summary};
use super::{interrupt, job, report};

pub struct Settings {
    pub jobs: usize,
    pub timeout: Duration,
    /// Every test's output goes to a file here; those of passed tests are removed.
    pub log_dir: PathBuf,
    /// Added to the environment of each test.
    pub env: Vec<(OsString, OsString)>,
}

#[derive(Default)]
struct Progress {
    summary: Summary,
    failures: Vec<String>,
}

/// # Errors
/// When a test cannot be started at all, or on Ctrl-C; failed tests are counted, not errors.
pub fn run(tests: &[Test], settings: &Settings) -> Result<Summary> {
    let (progress, interrupted) = interrupt::watch(|interrupted| {
        Ok((run_all(tests, settings, interrupted)?, interrupted.load(Ordering::Relaxed)))
    })?;
    for failure in &progress.failures {
        eprintln!("{failure}");
    }
    if interrupted {
        bail!("interrupted after {}", report::closing_line(&progress.summary));
    }
    Ok(progress.summary)
}

fn run_all(tests: &[Test], settings: &Settings, interrupted: &AtomicBool) -> Result<Progress> {
    let next = AtomicUsize::new(0);
    let progress = Mutex::new(Progress::default());
    let worker = || -> Result<()> {
        while let Some(test) = tests.get(next.fetch_add(1, Ordering::Relaxed)) {
            if interrupted.load(Ordering::Relaxed) {
                break;
            }
            let started = Instant::now();
            let (outcome, output) = run_one(test, settings, interrupted)?;
            let mut progress = progress.lock().expect("no worker panics while it reports");
            eprintln!("{}", report::line(test, &outcome, started.elapsed()));
            progress.summary.count(&outcome);
            if let Outcome::Failed(_) = outcome {
                progress.failures.push(report::failure(test, &output));
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..settings.jobs).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a worker does not panic"))
    })?;
    Ok(progress.into_inner().expect("no worker panicked"))
}

fn run_one(test: &Test, settings: &Settings, interrupted: &AtomicBool) -> Result<(Outcome, String)> {
    if test.ignored {
        return Ok((Outcome::Skipped("marked #[ignore]".into()), String::new()));
    }
    let log = log_file(&settings.log_dir, test);
    let status = job::run(test, &settings.env, &log, settings.timeout, interrupted)?;
    let bytes = std::fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
    let output = String::from_utf8_lossy(&bytes).into_owned();
    let outcome = outcome::judge(status, &output);
    if outcome == Outcome::Passed {
        std::fs::remove_file(&log).with_context(|| format!("cannot remove {}", log.display()))?;
    }
    Ok((outcome, output))
}

fn log_file(dir: &Path, test: &Test) -> PathBuf {
    dir.join(format!("{}.log", test.path().replace("::", ".").replace('/', "_")))
}
