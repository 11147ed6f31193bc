//! `cargo xtask gen`: what is derived from the code and committed, so that it can be read and
//! installed without building anything.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::setup::kubernetes;
use crate::workspace::{self, Profile};
use crate::{AlreadyReported, process};

/// Where definitions go: for kubectl and kustomize, and into their chart.
const DEFINITIONS: [&str; 2] = ["deploy/crds", "deploy/chart/pointsman-crds/files"];
/// The chart with its defaults, for those who use no Helm.
const BASE: &str = "deploy/base/pointsman.yaml";

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Change nothing; fail when the resource definitions in deploy are not those of the code
    #[arg(long)]
    check: bool,
}

pub fn run(args: &Args) -> Result<()> {
    if args.check { check() } else { write() }
}

/// Definitions only: the base needs Helm, and is compared with the chart by the suite `deploy`.
pub fn check() -> Result<()> {
    let expected = definition_files()?;
    let mut stale = Vec::new();
    for (path, text) in &expected {
        if std::fs::read_to_string(workspace::root().join(path)).ok().as_ref() != Some(text) {
            stale.push(format!("{} is not what the code says", path.display()));
        }
    }
    for path in leftovers(&expected)? {
        stale.push(format!("{} is of no resource of ours", path.display()));
    }
    if stale.is_empty() {
        eprintln!("gen: {} files are as the code says", expected.len());
        return Ok(());
    }
    for line in stale {
        eprintln!("{line}");
    }
    eprintln!("Run `cargo xtask gen` and commit what it changes");
    Err(AlreadyReported.into())
}

fn write() -> Result<()> {
    let expected = definition_files()?;
    for path in leftovers(&expected)? {
        std::fs::remove_file(workspace::root().join(path))?;
    }
    for (path, text) in expected {
        replace(&path, &text)?;
    }
    replace(Path::new(BASE), &base()?)
}

fn replace(path: &Path, text: &str) -> Result<()> {
    let path = workspace::root().join(path);
    if std::fs::read_to_string(&path).ok().as_deref() == Some(text) {
        return Ok(());
    }
    std::fs::create_dir_all(path.parent().unwrap_or(&path))?;
    eprintln!("Writing {}", path.display());
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Paths below the workspace, and what belongs there.
fn definition_files() -> Result<BTreeMap<PathBuf, String>> {
    let built = workspace::build_binaries(Profile::Dev, &["pointsman"])?;
    let text = process::stdout(Command::new(&built["pointsman"]).arg("crds"))?;
    let mut files = BTreeMap::new();
    for document in text.split("---\n").filter(|document| !document.trim().is_empty()) {
        let name = definition_name(document)
            .with_context(|| format!("`pointsman crds` printed a document without a name:\n{document}"))?;
        for directory in DEFINITIONS {
            files.insert(Path::new(directory).join(format!("{name}.yaml")), document.to_owned());
        }
    }
    if files.is_empty() {
        bail!("`pointsman crds` printed nothing");
    }
    Ok(files)
}

fn definition_name(document: &str) -> Option<&str> {
    let (_, metadata) = document.split_once("\nmetadata:\n")?;
    metadata.lines().next()?.strip_prefix("  name: ")
}

/// Files beside the definitions that nothing generates any more.
fn leftovers(expected: &BTreeMap<PathBuf, String>) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for directory in DEFINITIONS {
        let Ok(entries) = std::fs::read_dir(workspace::root().join(directory)) else { continue };
        for entry in entries {
            let path = Path::new(directory).join(entry?.file_name());
            let is_definition = path.to_string_lossy().ends_with(".pointsman.dev.yaml");
            if is_definition && !expected.contains_key(&path) {
                found.push(path);
            }
        }
    }
    Ok(found)
}

/// The chart with its defaults, without what only Helm can use.
fn base() -> Result<String> {
    let tools = kubernetes::ensure()?;
    let mut command = Command::new(&tools.helm);
    command.current_dir(workspace::root()).args(["template", "pointsman", "deploy/chart/pointsman"]);
    command.args(["--namespace", "pointsman-system", "--set", "cleanup.enabled=false"]);
    Ok(without_helm(&process::stdout(&mut command)?))
}

/// Drops the labels that say that Helm looks after an object.
fn without_helm(text: &str) -> String {
    let is_helms = |line: &str| {
        let line = line.trim_start();
        line.starts_with("helm.sh/chart:") || line == "app.kubernetes.io/managed-by: Helm"
    };
    let lines = text.lines().filter(|line| !is_helms(line) && !line.starts_with("# Source: "));
    let heading = "# Generated from deploy/chart/pointsman by `cargo xtask gen`.\n".to_owned();
    lines.fold(heading, |text, line| text + line + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_are_named_by_their_metadata() {
        assert_eq!(definition_name("kind: X\nmetadata:\n  name: a.b\nspec:\n  name: c\n"), Some("a.b"));
        assert_eq!(definition_name("kind: X\nspec:\n  name: c\n"), None);
    }

    #[test]
    fn the_base_names_no_helm() {
        let text = "---\n# Source: x\nmetadata:\n  labels:\n    helm.sh/chart: p-1\n    a: b\n    \
                    app.kubernetes.io/managed-by: Helm\n";
        let expected = "# Generated from deploy/chart/pointsman by `cargo xtask gen`.\n---\nmetadata:\n  \
                        labels:\n    a: b\n";
        assert_eq!(without_helm(text), expected);
    }
}
