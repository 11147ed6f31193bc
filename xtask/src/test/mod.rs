//! `cargo xtask test`: builds everything and runs every test in a process of its own.
//!
//! A process each, because aya caches what the kernel supports per process, because tests change
//! their thread's network namespace, and so that a test that hangs can be ended with everything it
//! started. libtest can list and run single tests, so this takes no tool to be installed first.

mod discover;
pub mod interrupt;
pub mod job;
pub mod outcome;
pub mod report;
mod runner;
mod upgrade;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};

use self::discover::Test;
use self::outcome::Summary;
use crate::setup::{self, packages};
use crate::workspace::{self, Profile};
use crate::{AlreadyReported, ebpf, kernels, process};

/// Suites that need nothing of the kernel: no packages, no kernel object, no agent.
const PURE_SUITES: [&str; 2] = [discover::CORE, discover::FUZZ];
/// What the paths of the tests of upgrades contain.
const UPGRADE_TESTS: &str = "e2e_upgrade";
/// The suite that needs helm and kubectl.
const DEPLOY_SUITE: &str = "deploy";

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Only this suite: core (unit tests), fuzz (replay of the corpus), doc (examples in
    /// documentation), or the name of an integration test, up to its first underscore: datapath,
    /// scenarios, e2e, api, … May be given several times
    #[arg(long = "suite", value_name = "NAME")]
    suites: Vec<String>,
    /// Only tests whose path (`crate::target::test`) contains this
    filter: Option<String>,
    /// How many tests run at a time [default: one per CPU, at least 2]
    #[arg(long)]
    jobs: Option<usize>,
    /// Ends a test that takes longer, with everything it started
    #[arg(long, value_name = "SECONDS", default_value_t = 180)]
    timeout: u64,
    /// Runs the whole selection this many times
    #[arg(long, default_value_t = 1)]
    repeat: u32,
    /// How the agents of the end-to-end tests forward: xdp-native, tc, xdp-generic [default: what an agent
    /// chooses itself]
    #[arg(long, value_name = "PATH", value_parser = ["auto", "xdp-native", "tc", "xdp-generic", "proxy"])]
    datapath: Option<String>,
    /// Only the tests of upgrades, from the agent of this commit, whose map layout is the previous one; it
    /// is built in a temporary checkout
    #[arg(long, value_name = "COMMIT", conflicts_with_all = ["suites", "filter", "kernels"])]
    upgrade_from: Option<String>,
    /// Instead of the tests on this machine: loads every program and runs a core set of tests on other
    /// kernels, in virtual machines: 6.1-uml (quick), 5.10, 6.1, 6.12 [default: all]
    #[arg(long, value_name = "NAME", num_args = 0.., conflicts_with_all = ["suites", "filter", "repeat"])]
    kernels: Option<Vec<String>>,
}

impl Args {
    fn wants(&self, suite: &str) -> bool {
        self.suites.is_empty() || self.suites.iter().any(|wanted| wanted == suite)
    }

    /// What the paths of the tests have to contain.
    fn filter(&self) -> Option<&str> {
        self.upgrade_from.as_ref().map(|_| UPGRADE_TESTS).or(self.filter.as_deref())
    }

    fn is_pure(&self) -> bool {
        !self.suites.is_empty()
            && self.suites.iter().all(|suite| PURE_SUITES.contains(&suite.as_str()) || suite == "doc")
    }
}

pub fn run(args: &Args) -> Result<()> {
    if let Some(names) = &args.kernels {
        return kernels::run(names);
    }
    if !args.is_pure() {
        setup::ensure(&packages::for_purpose(packages::Purpose::Test))?;
        ebpf::build()?;
    }
    let selection: &[_] = match args.upgrade_from {
        Some(_) => &["--bin", "pointsman", "--test", UPGRADE_TESTS],
        None => &["--bins", "--tests"],
    };
    let built = workspace::build(Profile::Dev, selection)?;
    let agent = built.iter().find(|artifact| !artifact.harness && artifact.target == "pointsman");
    let mut tests = discover::workspace(&built)?;
    if args.wants(discover::FUZZ) {
        tests.extend(discover::fuzz()?);
    }
    // Long ones first, so that none is still running alone at the end.
    tests.sort_by_key(|test| test.suite == discover::CORE);
    let tests = select(args, tests)?;
    let doc_tests = args.wants("doc") && args.filter().is_none();
    if tests.is_empty() && !doc_tests {
        bail!("no test matches {}", args.filter().unwrap_or("this selection"));
    }
    let skip_is_failure = std::env::var("CI").is_ok_and(|value| value == "true" || value == "1");
    let mut env: Vec<_> =
        agent.map(|agent| ("POINTSMAN_BIN".into(), agent.path.clone().into())).into_iter().collect();
    if tests.iter().any(|test| test.suite == DEPLOY_SUITE) {
        let tools = setup::kubernetes::ensure()?;
        env.push(("POINTSMAN_HELM".into(), tools.helm.into()));
        env.push(("POINTSMAN_KUBECTL".into(), tools.kubectl.into()));
        env.push(("POINTSMAN_XTASK".into(), own_path()?.into()));
    }
    if let Some(datapath) = &args.datapath {
        env.push(("POINTSMAN_TEST_DATAPATH".into(), datapath.into()));
    }
    if let Some(commit) = &args.upgrade_from {
        env.push((upgrade::OLD_AGENT_ENV.into(), upgrade::agent_of(commit)?.into()));
    }
    let settings = runner::Settings {
        jobs: args.jobs.unwrap_or_else(default_jobs).max(1),
        timeout: Duration::from_secs(args.timeout),
        log_dir: log_dir()?,
        env,
    };
    let mut summary = Summary::default();
    for round in 1..=args.repeat {
        if args.repeat > 1 {
            eprintln!("Round {round} of {}", args.repeat);
        }
        summary.add(&runner::run(&tests, &settings)?);
    }
    if doc_tests {
        summary.add(&doc()?);
    }
    let skips_count = summary.skipped > 0 && skip_is_failure;
    if summary.failed > 0 {
        eprintln!("The output of failed tests is also in {}", settings.log_dir.display());
    } else if skips_count {
        eprintln!("Skipped tests count as failures because CI=true; the reasons are above");
    }
    // The very last line, for people and for CI alike.
    println!("{}", report::closing_line(&summary));
    if summary.failed > 0 || skips_count { Err(AlreadyReported.into()) } else { Ok(()) }
}

fn select(args: &Args, tests: Vec<Test>) -> Result<Vec<Test>> {
    let known = |suite: &str| suite == "doc" || tests.iter().any(|test| test.suite == suite);
    if let Some(unknown) = args.suites.iter().find(|suite| !known(suite)) {
        let mut names: Vec<_> = tests.iter().map(|test| test.suite.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        bail!("no suite `{unknown}` with any test; there are: {}, doc", names.join(", "));
    }
    let matches = |test: &Test| args.filter().is_none_or(|filter| test.path().contains(filter));
    Ok(tests.into_iter().filter(|test| args.wants(&test.suite) && matches(test)).collect())
}

fn default_jobs() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).max(2)
}

fn log_dir() -> Result<PathBuf> {
    let dir = workspace::root().join("target/test-logs");
    if dir.exists() {
        std::fs::remove_dir_all(&dir)?;
    }
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// Examples in documentation: only rustdoc can compile and run them.
fn doc() -> Result<Summary> {
    let mut command = workspace::cargo();
    command.args(["test", "--doc", "--quiet"]);
    eprintln!("+ {}", process::describe(&command));
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut summary = outcome::doc_summary(&text);
    if !output.status.success() {
        eprint!("{text}{}", String::from_utf8_lossy(&output.stderr));
        // A compile error outside of any example leaves no failed test to count.
        summary.failed = summary.failed.max(1);
    }
    Ok(summary)
}

/// Where this program is. Building the tests may have linked it anew: the kernel then says that the
/// file which runs is deleted (`d_path` in fs/d_path.c), and the new one is at the same place.
fn own_path() -> Result<PathBuf> {
    let path = std::env::current_exe()?;
    Ok(match path.to_str().and_then(|text| text.strip_suffix(" (deleted)")) {
        Some(text) => PathBuf::from(text),
        None => path,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(suites: &[&str], filter: Option<&str>) -> Args {
        Args {
            suites: suites.iter().map(ToString::to_string).collect(),
            filter: filter.map(str::to_owned),
            jobs: None,
            timeout: 1,
            repeat: 1,
            datapath: None,
            upgrade_from: None,
            kernels: None,
        }
    }

    fn tests() -> Vec<Test> {
        [("core", "lb-common", "a::b"), ("e2e", "tests", "tcp::echo"), ("e2e", "tests", "udp::echo")]
            .map(|(suite, target, name)| Test {
                suite: suite.into(),
                package: target.into(),
                target: target.into(),
                name: name.into(),
                ignored: false,
                binary: PathBuf::new(),
                package_dir: PathBuf::new(),
            })
            .to_vec()
    }

    #[test]
    fn selection_is_by_suite_and_filter() {
        let names = |args: Args| -> Vec<String> {
            select(&args, tests()).unwrap().into_iter().map(|test| test.name).collect()
        };
        assert_eq!(names(args(&[], None)), ["a::b", "tcp::echo", "udp::echo"]);
        assert_eq!(names(args(&["e2e"], None)), ["tcp::echo", "udp::echo"]);
        assert_eq!(names(args(&["e2e", "core"], Some("b"))), ["a::b"]);
    }

    #[test]
    fn upgrades_from_a_commit_are_tested_alone() {
        let args = Args { upgrade_from: Some("main".to_owned()), ..args(&[], None) };
        let upgrade = Test { target: "e2e_upgrade".into(), ..tests().remove(1) };
        let all = tests().into_iter().chain([upgrade]).collect();
        let found = select(&args, all).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].target, "e2e_upgrade");
    }

    #[test]
    fn a_misspelt_suite_is_an_error_that_names_the_others() {
        let error = select(&args(&["e2"], None), tests()).unwrap_err().to_string();
        assert!(error.contains("no suite `e2`") && error.contains("core, e2e, doc"), "{error}");
    }

    #[test]
    fn only_pure_suites_go_without_the_kernel() {
        assert!(args(&["core", "doc"], None).is_pure());
        assert!(!args(&["core", "e2e"], None).is_pure());
        assert!(!args(&[], None).is_pure());
    }
}
