//! `cargo xtask test --kernels`: other kernels than the machine's own, in virtual machines that need
//! neither root nor support of the processor.
//!
//! Each boots from memory into `pointsman-guest`, which loads every program, runs a core set of the
//! tests and powers off. What the verifier had to do is compared with a committed budget.

mod archive;
mod budget;
mod catalogue;
mod console;
mod initramfs;
mod machine;
mod modules;
mod plan;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use self::budget::Budget;
use self::catalogue::Kernel;
use self::console::{Ended, Transcript};
use self::plan::Beside;
use crate::setup::{self, packages};
use crate::test::outcome::{self, Outcome, Summary};
use crate::test::{interrupt, job, report};
use crate::{AlreadyReported, workspace};

/// Below the workspace.
const BUDGET: &str = "tests/kernel_budget.txt";
/// Of a guest: half of it is its root.
const MEGABYTES: u32 = 2048;
/// A guest that takes longer than this hangs.
const LIMIT: Duration = Duration::from_secs(3600);

/// Runs on the kernels with these names; on all without any.
pub fn run(names: &[String]) -> Result<()> {
    ensure!(
        cfg!(target_arch = "x86_64"),
        "the kernels are of amd64, and their guests run this machine's programs"
    );
    let kernels = catalogue::select(names)?;
    let directory = workspace::root().join("target/kernels");
    let budget =
        fs::read_to_string(workspace::root().join(BUDGET)).with_context(|| format!("no {BUDGET}"))?;
    let budget = Budget::parse(&budget)?;
    setup::ensure(&packages::for_purpose(packages::Purpose::Kernels))?;
    let built = plan::build()?;
    let mut summary = Summary::default();
    for kernel in kernels {
        let beside = if budget.loads_all(kernel.name) { Beside::Tests } else { Beside::Refusal };
        let (transcript, console) =
            boot(kernel, &built, &directory, beside).with_context(|| format!("kernel {}", kernel.name))?;
        summary.add(&judge(kernel, &transcript, &budget));
        eprintln!("The console of {} is in {}", kernel.name, console.display());
    }
    println!("{}", report::closing_line(&summary));
    if summary.failed > 0 { Err(AlreadyReported.into()) } else { Ok(()) }
}

/// Runs the guest to its end, and reads what it printed.
fn boot(
    kernel: &Kernel,
    built: &plan::Executables,
    directory: &Path,
    beside: Beside,
) -> Result<(Transcript, PathBuf)> {
    fs::create_dir_all(directory)?;
    let installed = machine::install(kernel, directory)?;
    let scratch = directory.join(format!("{}.{}", kernel.name, std::process::id()));
    fs::create_dir_all(&scratch)?;
    let initramfs = scratch.join("initramfs");
    let console = directory.join(format!("{}.log", kernel.name));
    let result = plan::root(built, &installed.modules, beside).and_then(|root| {
        fs::write(&initramfs, root)?;
        let started = Instant::now();
        eprintln!("Starting {}", kernel.name);
        let command = installed.command(&initramfs, MEGABYTES, &scratch);
        let ended = interrupt::watch(|interrupted| {
            let ended = job::run_command(command, &console, LIMIT, interrupted)?;
            ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
            Ok(ended)
        })?;
        eprintln!("{} ended after {} s", kernel.name, started.elapsed().as_secs());
        let text = fs::read(&console)?;
        let mut transcript = console::read(&String::from_utf8_lossy(&text));
        if ended.is_none() {
            transcript.failure.get_or_insert("it was ended for taking too long".to_owned());
        }
        Ok(transcript)
    });
    fs::remove_dir_all(&scratch).with_context(|| format!("cannot remove {}", scratch.display()))?;
    Ok((result?, console))
}

/// Prints what happened on one kernel, and counts it: the programs with their budget are one.
fn judge(kernel: &Kernel, transcript: &Transcript, budget: &Budget) -> Summary {
    let mut summary = Summary::default();
    let mut count = |name: &str, outcome: &Outcome, took: Duration| {
        summary.count(outcome);
        eprintln!("{}", report::named_line(name, outcome, took));
    };
    eprintln!("{} is Linux {}", kernel.name, transcript.release.as_deref().unwrap_or("of unknown release"));
    for found in &transcript.verified {
        // For whoever reads it by program, too.
        println!(
            "kernel={} program={} instructions={} stack={}",
            kernel.name, found.program, found.instructions, found.stack
        );
    }
    for (program, reason) in &transcript.refused {
        println!("kernel={} program={program} refused={reason:?}", kernel.name);
    }
    for ended in &transcript.ended {
        let outcome = match ended.name.as_str() {
            plan::VERIFY => verification(ended, &budget.complaints(kernel.name, transcript)),
            plan::REFUSAL => refusal(ended),
            plan::PROXY => proxy(ended),
            // A guest has everything that tests need.
            _ => match outcome::judge(ended.status, &ended.output) {
                Outcome::Skipped(why) => Outcome::Failed(format!("skipped: {why}")),
                outcome => outcome,
            },
        };
        if matches!(outcome, Outcome::Failed(_)) {
            // Indented: it is the guest's, and no word of this process.
            ended.output.lines().for_each(|line| eprintln!("    {line}"));
        }
        count(&format!("{}::{}", kernel.name, ended.name), &outcome, ended.took);
    }
    if let Some(why) = collapse(transcript) {
        count(&format!("{}::guest", kernel.name), &Outcome::Failed(why), Duration::ZERO);
    }
    summary
}

fn verification(ended: &Ended, complaints: &[String]) -> Outcome {
    match (ended.status, complaints) {
        (None, _) => Outcome::Failed("timed out".into()),
        (Some(status), _) if !status.success() => Outcome::Failed(status.to_string()),
        (_, []) => Outcome::Passed,
        (_, complaints) => Outcome::Failed(format!(
            "{}; make the program simpler or, with a reason, change {BUDGET}",
            complaints.join("; ")
        )),
    }
}

/// The agent ends if the kernel's programs are what it has to use, and says why in a sentence.
fn refusal(ended: &Ended) -> Outcome {
    match ended.status {
        None => Outcome::Failed("timed out".into()),
        Some(status) if status.success() => Outcome::Failed("the agent was content".into()),
        Some(_) if !ended.output.contains(plan::REFUSAL_WORDS) => {
            Outcome::Failed(format!("the agent did not say that the kernel `{}`", plan::REFUSAL_WORDS))
        }
        Some(_) => Outcome::Passed,
    }
}

/// The agent serves without them. Who looks in the guest says what is missing, and that nothing is.
fn proxy(ended: &Ended) -> Outcome {
    match ended.status {
        None => Outcome::Failed("timed out".into()),
        Some(status) if !status.success() => Outcome::Failed(status.to_string()),
        Some(_) if !ended.output.contains(plan::PROXY_WORDS) => {
            Outcome::Failed(format!("it did not end with `{}`", plan::PROXY_WORDS))
        }
        Some(_) => Outcome::Passed,
    }
}

/// Why the guest did not do all that it was to do, if so.
fn collapse(transcript: &Transcript) -> Option<String> {
    match (&transcript.failure, &transcript.unfinished) {
        (Some(failure), _) => Some(failure.clone()),
        (None, Some(unfinished)) => Some(format!("it died during {unfinished}")),
        (None, None) if !transcript.complete => Some("it did not come to its end".to_owned()),
        (None, None) if transcript.ended.is_empty() => Some("it ran nothing".to_owned()),
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL: &str = "@pointsman kernel 6.1\n@pointsman begin verify\n@pointsman verified slow 10 8\n\
        @pointsman done verify 0 10\n";
    const TEST: &str =
        "@pointsman begin a::b\ntest result: ok. 1 passed; 0 failed\n@pointsman done a::b 0 7\n";

    fn summary(text: &str, budget: &str) -> (usize, usize) {
        let summary = judge(&catalogue::ALL[2], &console::read(text), &Budget::parse(budget).unwrap());
        (summary.passed, summary.failed)
    }

    #[test]
    fn a_run_within_its_budget_passes() {
        assert_eq!(summary(&format!("{KERNEL}{TEST}@pointsman end\n"), "6.1 slow 10 8"), (2, 0));
    }

    #[test]
    fn growth_and_tests_that_say_nothing_fail() {
        assert_eq!(summary(&format!("{KERNEL}{TEST}@pointsman end\n"), "6.1 slow 9 8"), (1, 1));
        let mute = TEST.replace("test result", "result");
        assert_eq!(summary(&format!("{KERNEL}{mute}@pointsman end\n"), "6.1 slow 10 8"), (1, 1));
        let skipped = TEST.replace("test result", "SKIP: no root\ntest result");
        assert_eq!(summary(&format!("{KERNEL}{skipped}@pointsman end\n"), "6.1 slow 10 8"), (1, 1));
    }

    #[test]
    fn an_agent_that_is_refused_has_to_say_so() {
        let refusal = |status: &str, words: &str| {
            let text = format!("@pointsman begin refusal\n{words}\n@pointsman done refusal {status} 3\n");
            summary(&format!("{KERNEL}{text}@pointsman end\n"), "6.1 slow 10 8")
        };
        let words = "pointsman: this kernel, Linux 5.10, cannot run the program slow_v4: it lacks a helper";
        assert_eq!(refusal("256", words), (2, 0));
        assert_eq!(refusal("0", words), (1, 1));
        assert_eq!(refusal("timeout", words), (1, 1));
        assert_eq!(refusal("256", "Invalid argument"), (1, 1));
    }

    #[test]
    fn an_agent_that_is_refused_has_to_serve() {
        let proxy = |status: &str, words: &str| {
            let text = format!("@pointsman begin proxy\n{words}\n@pointsman done proxy {status} 3\n");
            summary(&format!("{KERNEL}{text}@pointsman end\n"), "6.1 slow 10 8")
        };
        assert_eq!(proxy("0", plan::PROXY_WORDS), (2, 0));
        assert_eq!(proxy("0", "nothing"), (1, 1));
        assert_eq!(proxy("256", plan::PROXY_WORDS), (1, 1));
        assert_eq!(proxy("timeout", plan::PROXY_WORDS), (1, 1));
    }

    #[test]
    fn a_guest_that_does_not_come_to_its_end_fails() {
        assert_eq!(summary(&format!("{KERNEL}{TEST}"), "6.1 slow 10 8"), (2, 1));
        assert_eq!(summary("Kernel panic\n", "6.1 slow 10 8"), (0, 1));
        assert_eq!(summary("@pointsman end\n", ""), (0, 1));
    }
}
