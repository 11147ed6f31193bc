//! Commands that build, and then become another program: demo, lab, bench, fuzz, deny.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::setup::packages::{self, Purpose};
use crate::workspace::{self, Profile};
use crate::{ebpf, process, setup};

const CARGO_DENY: &str = "0.20.2";
const CARGO_FUZZ: &str = "0.13.1";

/// `cargo xtask build`: the kernel programs, and the agent that carries them.
pub fn build_agent(profile: Profile) -> Result<()> {
    ebpf::build()?;
    let built = workspace::build_binaries(profile, &["pointsman"])?;
    println!("{}", built["pointsman"].display());
    Ok(())
}

/// Builds the agent and a binary of the test kit, and becomes the latter; it finds the agent by
/// `POINTSMAN_BIN`.
pub fn with_agent(purpose: Purpose, profile: Profile, binary: &str, args: &[OsString]) -> Result<()> {
    setup::ensure(&packages::for_purpose(purpose))?;
    ebpf::build()?;
    let built = workspace::build_binaries(profile, &["pointsman", binary])?;
    let mut command = Command::new(&built[binary]);
    command.args(args).env("POINTSMAN_BIN", &built["pointsman"]);
    become_program(command)
}

/// `cargo xtask bench`: as [`with_agent`]; `proxy` goes without those to compare with that cannot be
/// installed.
pub fn bench(args: &[OsString]) -> Result<()> {
    let help = args.iter().any(|arg| arg == "--help" || arg == "-h");
    if args.first().is_some_and(|first| first == "proxy")
        && !help
        && let Err(error) = setup::ensure(&packages::for_purpose(Purpose::Proxies))
    {
        eprintln!("Some of the proxies to compare with are left out: {error:#}");
    }
    with_agent(Purpose::Bench, Profile::Release, "pointsman-bench", args)
}

/// Runs a fuzz target; lists the targets when none is given.
pub fn fuzz(args: &[OsString]) -> Result<()> {
    if !workspace::root().join("fuzz/Cargo.toml").exists() {
        bail!("there is no fuzz crate in {}", workspace::root().display());
    }
    if process::probe(Command::new("rustup").args(["which", "--toolchain", "nightly", "rustc"])).is_none() {
        bail!(
            "fuzzing needs a nightly compiler for its instrumentation: `rustup toolchain install nightly`. \
             `cargo xtask test --suite fuzz` replays the corpus without one"
        );
    }
    setup::ensure(&packages::for_purpose(Purpose::Fuzz))?;
    let mut command = Command::new(cargo_tool("cargo-fuzz", CARGO_FUZZ, "it drives libFuzzer")?);
    // Without these it would take the stable cargo that runs this xtask.
    ebpf::clean_env(&mut command).env("RUSTUP_TOOLCHAIN", "nightly").env("CARGO", "cargo");
    command.current_dir(workspace::root()).arg("fuzz");
    match args {
        [] => command.arg("list"),
        // The fuzz crate keeps libFuzzer behind a feature, so that its corpus is replayed without it.
        args => command.args(["run", "--features", "libfuzzer"]).args(args),
    };
    become_program(command)
}

/// Licences, bans and sources of all dependencies, and known advisories, against `deny.toml`. Not a
/// part of `ci`: advisories come from the network and change without us.
pub fn deny(args: &[OsString]) -> Result<()> {
    let mut command = Command::new(cargo_tool("cargo-deny", CARGO_DENY, "it reads deny.toml")?);
    command.current_dir(workspace::root()).arg("check").args(args);
    become_program(command)
}

/// The path of a cargo subcommand, installed into the tools directory when it is not there yet.
fn cargo_tool(name: &str, version: &str, why: &str) -> Result<PathBuf> {
    let root = workspace::tools_dir().join(format!("{name}-{version}"));
    let path = root.join("bin").join(name);
    if !path.exists() {
        eprintln!("Installing {name} {version} into {}: {why}", root.display());
        let mut command = workspace::cargo();
        command.args(["install", name, "--locked", "--version", version, "--root"]).arg(&root);
        process::run(&mut command)?;
    }
    Ok(path)
}

/// Replaces this process, so that signals and the terminal go straight to the program.
fn become_program(mut command: Command) -> Result<()> {
    let line = process::describe(&command);
    eprintln!("+ {line}");
    Err(command.exec()).with_context(|| format!("cannot start `{line}`"))
}
