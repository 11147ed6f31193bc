//! Makes the kernel programs part of the binary.
//!
//! They are built by `cargo xtask build-ebpf`. Without them everything still compiles, so that
//! lints and editors need no BPF toolchain; the agent then says what is missing when it starts.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// Names another object to embed.
const OBJECT_ENV: &str = "POINTSMAN_EBPF_OBJECT";
const DEFAULT_OBJECT: &str = "../target/ebpf/pointsman-ebpf.o";

fn main() {
    println!("cargo:rerun-if-env-changed={OBJECT_ENV}");
    let var = |name| PathBuf::from(env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}")));
    let named = env::var_os(OBJECT_ENV).map(PathBuf::from);
    let object = named.clone().unwrap_or_else(|| var("CARGO_MANIFEST_DIR").join(DEFAULT_OBJECT));
    // The default as cargo resolves it, below this package: checkouts that share a target directory
    // must not be told of one another's object.
    println!("cargo:rerun-if-changed={}", named.as_deref().unwrap_or(Path::new(DEFAULT_OBJECT)).display());
    let bytes = match fs::read(&object) {
        Ok(bytes) => bytes,
        Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => panic!("cannot read the kernel programs {}: {error}", object.display()),
    };
    let embedded = var("OUT_DIR").join("kernel-programs.o");
    write(&embedded, &bytes);
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
}
