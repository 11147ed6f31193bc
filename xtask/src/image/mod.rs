//! `cargo xtask image`: a container image without a container engine.
//!
//! The image is an OCI layout in a tar file, which `docker load`, `podman load`, `ctr images import`
//! and `skopeo copy oci-archive:` take. It holds the agent and the shared libraries that it needs;
//! there is no shell. The same commit gives the same image on the same machine.

mod layout;
mod rootfs;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

pub use self::rootfs::libraries;

use crate::workspace::{self, Profile};
use crate::{ebpf, process};

#[derive(clap::Args, Debug)]
pub struct Args {
    /// The tar file [default: target/image/pointsman-VERSION-ARCHITECTURE.tar]
    #[arg(long, value_name = "PATH")]
    output: Option<PathBuf>,
    /// An agent that is built already [default: a release build]
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
    /// Only fill this directory with what the image holds, for a Dockerfile
    #[arg(long, value_name = "DIR", conflicts_with = "output")]
    rootfs: Option<PathBuf>,
    /// What it is called by those who load it
    #[arg(long, value_name = "NAME", default_value = "pointsman.dev/pointsman")]
    name: String,
}

pub fn run(args: &Args) -> Result<()> {
    let binary = match &args.binary {
        Some(binary) => binary.clone(),
        None => {
            ebpf::build()?;
            workspace::build_binaries(Profile::Release, &["pointsman"])?
                .remove("pointsman")
                .unwrap_or_default()
        }
    };
    if let Some(directory) = &args.rootfs {
        std::fs::create_dir_all(directory)?;
        return rootfs::fill(directory, &binary);
    }
    let architecture = architecture();
    let default = format!("target/image/pointsman-{}-{architecture}.tar", env!("CARGO_PKG_VERSION"));
    let output = args.output.clone().unwrap_or_else(|| workspace::root().join(default));
    let parent = output.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent)?;
    let work = Scratch::new(parent)?;
    let (root, layout) = (work.0.join("rootfs"), work.0.join("layout"));
    std::fs::create_dir_all(&root)?;
    rootfs::fill(&root, &binary)?;
    let about = layout::About {
        name: format!("{}:{}", args.name, env!("CARGO_PKG_VERSION")),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        architecture,
        revision: git(&["rev-parse", "HEAD"]).unwrap_or_default(),
        seconds: commit_seconds(),
    };
    layout::write(&root, &layout, &about)?;
    let whole = work.0.join("image.tar");
    layout::tar(&layout, &whole, about.seconds)?;
    std::fs::rename(&whole, &output).with_context(|| format!("cannot put {} in place", output.display()))?;
    println!("{}", output.display());
    Ok(())
}

/// Go's names, which OCI uses.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn git(args: &[&str]) -> Option<String> {
    let text = process::probe(Command::new("git").current_dir(workspace::root()).args(args))?;
    Some(text.trim().to_owned())
}

/// Time of the commit, so that building it again gives the same bytes; without git, the beginning of
/// time.
fn commit_seconds() -> u64 {
    git(&["show", "--no-patch", "--format=%ct", "HEAD"]).and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// A directory that goes with the value, beside the output so that renaming works.
struct Scratch(PathBuf);

impl Scratch {
    fn new(parent: &Path) -> Result<Self> {
        let path = parent.join(format!(".image-{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}
