//! Where things are, and how the project's own crates are built.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::process;

/// Names another directory for the tools that xtask installs (default `target/tools`), so that
/// several checkouts or a CI cache can share them.
pub const TOOLS_ENV: &str = "POINTSMAN_TOOLS";

/// The root of the workspace.
pub fn root() -> PathBuf {
    // As `cargo run` says, not as it was when this was compiled: checkouts may share a target
    // directory, and with it this executable.
    let manifest =
        std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&manifest).parent().expect("xtask lies in the workspace's root").to_path_buf()
}

/// Where the kernel objects go. Always below the workspace, whatever `CARGO_TARGET_DIR` says:
/// `lb-control/build.rs` looks for them here.
pub fn ebpf_dir() -> PathBuf {
    root().join("target/ebpf")
}

/// Where installed tools are kept.
pub fn tools_dir() -> PathBuf {
    std::env::var_os(TOOLS_ENV).map_or_else(|| root().join("target/tools"), PathBuf::from)
}

/// The cargo that runs this xtask, or the one in `PATH`.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Profile {
    Dev,
    Release,
}

impl Profile {
    pub fn from_release_flag(release: bool) -> Self {
        if release { Self::Release } else { Self::Dev }
    }

    fn args(self) -> &'static [&'static str] {
        match self {
            Self::Dev => &[],
            Self::Release => &["--release"],
        }
    }
}

/// One executable that cargo built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Artifact {
    /// Directory of the package, e.g. `…/lb-control`.
    pub package_dir: PathBuf,
    /// Name of the target, e.g. `pointsman` or `e2e`.
    pub target: String,
    /// True for integration tests (`tests/…`), false for bins and unit tests of a lib.
    pub integration_test: bool,
    /// True when built with the test harness.
    pub harness: bool,
    pub path: PathBuf,
}

/// Builds with the given selection (`--bin x`, `--tests`, …) and returns the executables.
pub fn build(profile: Profile, selection: &[&str]) -> Result<Vec<Artifact>> {
    executables(cargo().arg("build").args(profile.args()).args(selection))
}

/// Runs a `cargo build` and returns the executables that it made or found up to date.
pub fn executables(command: &mut Command) -> Result<Vec<Artifact>> {
    let line = process::describe(command);
    eprintln!("+ {line}");
    command.arg("--message-format=json-render-diagnostics").stdout(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot start `{line}`"))?;
    let output = child.stdout.take().expect("stdout is piped");
    let mut artifacts = Vec::new();
    for line in BufReader::new(output).lines() {
        artifacts.extend(parse_artifact(&line?));
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("`{line}` failed: {status}");
    }
    Ok(artifacts)
}

/// Builds the named binaries of the workspace and returns the path of each.
pub fn build_binaries(profile: Profile, names: &[&str]) -> Result<BTreeMap<String, PathBuf>> {
    let mut selection = Vec::new();
    for name in names {
        selection.extend(["--bin", name]);
    }
    let built: BTreeMap<_, _> =
        build(profile, &selection)?.into_iter().map(|artifact| (artifact.target, artifact.path)).collect();
    match names.iter().find(|name| !built.contains_key(**name)) {
        Some(missing) => bail!("cargo built no binary `{missing}`: does its crate still define it?"),
        None => Ok(built),
    }
}

fn parse_artifact(line: &str) -> Option<Artifact> {
    let message: Value = serde_json::from_str(line).ok()?;
    if message["reason"] != "compiler-artifact" {
        return None;
    }
    Some(Artifact {
        path: PathBuf::from(message["executable"].as_str()?),
        package_dir: Path::new(message["manifest_path"].as_str()?).parent()?.to_path_buf(),
        target: message["target"]["name"].as_str()?.to_owned(),
        integration_test: message["target"]["kind"].as_array()?.iter().any(|kind| kind == "test"),
        harness: message["profile"]["test"].as_bool()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_read_from_cargos_messages() {
        let line = r#"{"reason":"compiler-artifact","package_id":"path+file:///w/tests#pointsman-tests@0.1.0",
            "manifest_path":"/w/tests/Cargo.toml","target":{"kind":["test"],"name":"e2e"},
            "profile":{"test":true},"filenames":["/t/e2e-1"],"executable":"/t/e2e-1","fresh":true}"#;
        let expected = Artifact {
            package_dir: "/w/tests".into(),
            target: "e2e".into(),
            integration_test: true,
            harness: true,
            path: "/t/e2e-1".into(),
        };
        assert_eq!(parse_artifact(line), Some(expected));
    }

    #[test]
    fn libraries_and_other_messages_are_passed_over() {
        let library = r#"{"reason":"compiler-artifact","manifest_path":"/w/a/Cargo.toml",
            "target":{"kind":["lib"],"name":"a"},"profile":{"test":false},"executable":null}"#;
        for line in [library, r#"{"reason":"build-finished","success":true}"#, "not json", ""] {
            assert_eq!(parse_artifact(line), None, "{line}");
        }
    }
}
