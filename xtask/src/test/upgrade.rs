//! The agent of another commit, for tests of upgrades from it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::workspace::{TOOLS_ENV, cargo, root, tools_dir};
use crate::{ebpf, process};

/// Names the agent of the version before to the tests.
pub const OLD_AGENT_ENV: &str = "POINTSMAN_OLD_BIN";

/// Builds the agent of a commit in a temporary checkout below `target/upgrade`, and gives its path.
/// One that was built before is used again.
pub fn agent_of(commit: &str) -> Result<PathBuf> {
    let mut question = git(&root());
    question.args(["rev-parse", "--verify", "--quiet", "--end-of-options", &format!("{commit}^{{commit}}")]);
    let found = process::probe(&mut question);
    let id = found.with_context(|| format!("--upgrade-from {commit}: there is no such commit here"))?;
    let id = id.trim();
    let directory = root().join("target/upgrade");
    let agent = directory.join(format!("pointsman-{id}"));
    if agent.exists() {
        return Ok(agent);
    }
    fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;
    // Always at the same place: what dependencies are built into is then shared by all commits.
    let tree = Tree::check_out(directory.join("tree"), id)?;
    let mut command = cargo();
    // Not by the alias, which the outer checkout's configuration has, too.
    ebpf::clean_env(&mut command).current_dir(&tree.path).args([
        "run",
        "--quiet",
        "--package",
        "xtask",
        "--",
        "build",
    ]);
    command.env("CARGO_TARGET_DIR", directory.join("target")).env(TOOLS_ENV, tools_dir());
    eprintln!("Building the agent of {id}");
    let printed = process::stdout(&mut command)?;
    let built = printed.lines().last().unwrap_or_default();
    // Copied aside first, so that an interrupted copy is never taken for the agent.
    let copy = directory.join("copy");
    fs::copy(built, &copy).with_context(|| format!("the build of {id} gave no agent at `{built}`"))?;
    fs::rename(&copy, &agent).with_context(|| format!("naming {}", agent.display()))?;
    Ok(agent)
}

/// A checkout that goes when this is dropped.
struct Tree {
    path: PathBuf,
}

impl Tree {
    fn check_out(path: PathBuf, commit: &str) -> Result<Self> {
        let tree = Self { path };
        // Of a run that was killed.
        tree.remove();
        ensure!(!tree.path.exists(), "{} is in the way: remove it", tree.path.display());
        process::run(
            git(&root()).args(["worktree", "add", "--quiet", "--detach"]).arg(&tree.path).arg(commit),
        )?;
        Ok(tree)
    }

    fn remove(&self) {
        if self.path.exists() {
            process::probe(git(&root()).args(["worktree", "remove", "--force"]).arg(&self.path));
        }
        // Those whose directory has gone by hand.
        process::probe(git(&root()).args(["worktree", "prune"]));
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        self.remove();
    }
}

fn git(directory: &Path) -> std::process::Command {
    let mut command = std::process::Command::new("git");
    command.current_dir(directory);
    command
}
