//! bpf-linker: turns the bitcode of all crates into one BPF object with BTF. It embeds LLVM, and
//! must have the LLVM major of the rustc that wrote the bitcode.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::{process, workspace};

const VERSION: &str = "0.13.0";

/// The linker built against one LLVM major.
pub struct Linker {
    llvm_major: u32,
}

impl Linker {
    pub fn new(llvm_major: u32) -> Self {
        Self { llvm_major }
    }

    fn install_root(&self) -> PathBuf {
        workspace::tools_dir().join(format!("bpf-linker-{VERSION}-llvm{}", self.llvm_major))
    }

    pub fn path(&self) -> PathBuf {
        self.install_root().join("bin/bpf-linker")
    }

    pub fn is_installed(&self) -> bool {
        self.path().exists()
    }

    /// Builds and installs the linker (about a minute; kept in the tools directory).
    pub fn install(&self) -> Result<()> {
        let (major, root) = (self.llvm_major, self.install_root());
        let prefix = llvm_prefix(major);
        let lib = prefix.join("lib");
        if !prefix.join("bin/llvm-config").exists() {
            bail!(
                "{}: no llvm-config there. Install llvm-{major}-dev, or point LLVM_PREFIX at an LLVM {major}",
                prefix.display()
            );
        }
        eprintln!(
            "Installing bpf-linker {VERSION} for LLVM {major} into {}: it links the kernel programs",
            root.display()
        );
        let mut command = workspace::cargo();
        super::clean_env(&mut command)
            .env("LLVM_PREFIX", &prefix)
            .env("CARGO_ENCODED_RUSTFLAGS", format!("-L\u{1f}{}", lib.display()))
            .args(["install", "bpf-linker", "--locked", "--version", VERSION])
            .args(["--no-default-features", "--features", &format!("llvm-{major}"), "--root"])
            .arg(&root)
            // Its own directory, so that a half-built one never mixes with the project's.
            .arg("--target-dir")
            .arg(root.join("build"));
        process::run(&mut command)?;
        std::fs::remove_dir_all(root.join("build")).context("cannot remove bpf-linker's build directory")
    }
}

/// Where LLVM of this major is installed: `LLVM_PREFIX`, or Debian's place.
pub fn llvm_prefix(major: u32) -> PathBuf {
    std::env::var_os("LLVM_PREFIX").map_or_else(|| debian_llvm(major), PathBuf::from)
}

fn debian_llvm(major: u32) -> PathBuf {
    Path::new("/usr/lib").join(format!("llvm-{major}"))
}
