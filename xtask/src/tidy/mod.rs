//! `cargo xtask tidy`: rules of the house that no compiler checks. ARCHITECTURE.md says why.

mod files;
mod floors;
mod purity;
mod source;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{process, workspace};

/// A file as the checks see it.
struct File {
    /// Relative to the root, e.g. `lb-control/src/plan/ipam.rs`.
    path: String,
    bytes: Vec<u8>,
}

impl File {
    fn text(&self) -> Option<&str> {
        std::str::from_utf8(&self.bytes).ok()
    }

    fn is_rust(&self) -> bool {
        Path::new(&self.path).extension().is_some_and(|extension| extension == "rs")
    }
}

/// One breach of a rule, as `path:line: what, and the way out`.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    path: String,
    line: usize,
    text: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.text)
    }
}

pub fn run() -> Result<()> {
    let files = project_files(&workspace::root())?;
    let mut findings = Vec::new();
    for file in &files {
        findings.extend(files::check(file));
        if let (true, Some(text)) = (file.is_rust(), file.text()) {
            let code = source::blank_comments_and_strings(text);
            findings.extend(floors::check(&file.path, &code));
            findings.extend(purity::check(&file.path, &code));
        }
    }
    findings.iter().for_each(|finding| eprintln!("{finding}"));
    lock_is_in_sync()?;
    if !findings.is_empty() {
        bail!("tidy: {} findings", findings.len());
    }
    eprintln!("tidy: {} files are in order", files.len());
    Ok(())
}

/// Everything that is committed, or would be by `git add .`.
fn project_files(root: &Path) -> Result<Vec<File>> {
    let mut git = Command::new("git");
    git.current_dir(root).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let list = process::stdout(&mut git).context("tidy asks git which files are the project's")?;
    let paths = list.split('\0').filter(|path| !path.is_empty());
    paths
        .map(|path| (path, root.join(path)))
        // Deleted but not yet committed, or a link to elsewhere.
        .filter(|(_, full)| full.symlink_metadata().is_ok_and(|meta| meta.is_file()))
        .map(|(path, full): (&str, PathBuf)| {
            let bytes = std::fs::read(&full).with_context(|| format!("cannot read {path}"))?;
            Ok(File { path: path.to_owned(), bytes })
        })
        .collect()
}

fn lock_is_in_sync() -> Result<()> {
    let mut command = workspace::cargo();
    command.args(["metadata", "--locked", "--format-version", "1", "--quiet"]);
    process::stdout(&mut command).context("Cargo.lock does not fit the manifests: run `cargo check`")?;
    Ok(())
}
