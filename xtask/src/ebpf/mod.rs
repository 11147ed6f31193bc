//! `cargo xtask build-ebpf`: the kernel side.

mod linker;
mod toolchain;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use self::linker::Linker;
pub use self::linker::llvm_prefix;
use self::toolchain::{Core, TARGET, Toolchain};
use crate::setup::{self, packages};
use crate::{process, workspace};

/// Builds every binary of `lb-ebpf`, installing the toolchain first where it is missing. Each gives
/// `target/ebpf/NAME.o`, without DWARF but with BTF, and `target/ebpf/NAME.debug.o` with both.
pub fn build() -> Result<()> {
    let toolchain = ensure_toolchain()?;
    eprintln!(
        "Kernel programs: {} {} (LLVM {}), {}",
        toolchain.rustc.display(),
        toolchain.release,
        toolchain.llvm_major,
        toolchain.why
    );
    let linker = ensure_linker(toolchain.llvm_major)?;
    let built = workspace::executables(&mut cargo_build(&toolchain, &linker.path())?)?;
    if built.is_empty() {
        bail!("cargo built no binary of lb-ebpf");
    }
    built.iter().try_for_each(|object| publish(&object.path, &object.target, toolchain.llvm_major))
}

/// Installs compiler and linker for the kernel programs, where they are missing.
pub fn ensure_tools() -> Result<()> {
    ensure_linker(ensure_toolchain()?.llvm_major)?;
    Ok(())
}

fn ensure_toolchain() -> Result<Toolchain> {
    match toolchain::choose(&toolchain::candidates()) {
        Ok(found) => Ok(found),
        Err(none) if none.overridden => Err(none.into()),
        Err(none) => {
            eprintln!("{none}");
            setup::ensure(&packages::for_purpose(packages::Purpose::Kernel))?;
            Ok(toolchain::choose(&toolchain::candidates())?)
        }
    }
}

fn ensure_linker(llvm_major: u32) -> Result<Linker> {
    let linker = Linker::new(llvm_major);
    // llvm-strip and libLLVM come from the same package, so it is needed even for a cached linker.
    setup::ensure(&[packages::llvm(llvm_major)])?;
    if !linker.is_installed() {
        linker.install()?;
    }
    Ok(linker)
}

fn cargo_build(toolchain: &Toolchain, linker: &Path) -> Result<Command> {
    let mut command = match &toolchain.cargo {
        Some(cargo) => {
            let mut command = Command::new(cargo);
            command.current_dir(workspace::root());
            command
        }
        None => workspace::cargo(),
    };
    clean_env(&mut command)
        .env("RUSTC", &toolchain.rustc)
        // aya-ebpf uses `asm_experimental_arch`.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(linker)?.join("\u{1f}"))
        .args(["build", "--package", "lb-ebpf", "--bins", "--release", "--target", TARGET, "--target-dir"])
        .arg(workspace::ebpf_dir());
    if toolchain.core == Core::FromSource {
        command.args(["-Z", "build-std=core"]);
    }
    Ok(command)
}

fn rustflags(linker: &Path) -> Result<Vec<String>> {
    let cargo_home = match std::env::var_os("CARGO_HOME") {
        Some(home) => PathBuf::from(home),
        None => std::env::home_dir().context("neither CARGO_HOME nor HOME is set")?.join(".cargo"),
    };
    Ok(vec![
        // BTF is made from debug information.
        "-Cdebuginfo=2".into(),
        format!("-Clinker={}", linker.display()),
        "-Clink-arg=--btf".into(),
        "-Ctarget-cpu=v3".into(),
        // One load for a field at an odd offset, instead of one per byte. Told to the linker, which
        // generates the code; as a `-Ctarget-feature` it draws a warning and changes nothing more.
        "-Clink-arg=--cpu-features=+allows-misaligned-mem-access".into(),
        // The same object wherever it is built.
        format!("--remap-path-prefix={}=/pointsman", workspace::root().display()),
        format!("--remap-path-prefix={}=/cargo", cargo_home.display()),
    ])
}

/// Removes what would leak from the outer cargo or the user's shell into a build with another
/// toolchain: compilers, flags, target directories, a library path.
pub fn clean_env(command: &mut Command) -> &mut Command {
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(is_leaking) {
            command.env_remove(name);
        }
    }
    command
}

fn is_leaking(name: &str) -> bool {
    // These say where and how crates are fetched and how cargo talks, not what is built.
    const KEPT: [&str; 7] = [
        "CARGO_HOME",
        "CARGO_HTTP_",
        "CARGO_NET_",
        "CARGO_REGISTR",
        "CARGO_SOURCE_",
        "CARGO_TERM_",
        "CARGO_BUILD_JOBS",
    ];
    let is_tool = name.starts_with("CARGO") || name.starts_with("RUSTC") || name.starts_with("RUSTDOC");
    let is_exact = ["RUSTUP_TOOLCHAIN", "RUSTFLAGS", "LD_LIBRARY_PATH"].contains(&name);
    is_exact || (is_tool && !KEPT.iter().any(|kept| name.starts_with(kept)))
}

/// Puts both variants in place; an unchanged object keeps its timestamp, so nothing that embeds it
/// is compiled again.
fn publish(object: &Path, name: &str, llvm_major: u32) -> Result<()> {
    let dir = workspace::ebpf_dir();
    let stripped = object.with_extension("stripped");
    let strip = llvm_prefix(llvm_major).join("bin/llvm-strip");
    let mut command = Command::new(strip);
    command.arg("--strip-debug").arg("-o").arg(&stripped).arg(object);
    let output = process::stdout(&mut command)?;
    if !output.is_empty() {
        bail!("llvm-strip: {output}");
    }
    copy_if_changed(object, &dir.join(format!("{name}.debug.o")))?;
    let shipped = dir.join(format!("{name}.o"));
    copy_if_changed(&stripped, &shipped)?;
    eprintln!("{}: {} bytes", shipped.display(), shipped.metadata()?.len());
    Ok(())
}

fn copy_if_changed(from: &Path, to: &Path) -> Result<()> {
    let new = std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if std::fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    // Renamed into place: a build that runs at the same time sees the old or the new object whole.
    let temporary = to.with_extension(format!("o.{}", std::process::id()));
    std::fs::write(&temporary, new).with_context(|| format!("cannot write {}", temporary.display()))?;
    std::fs::rename(&temporary, to).with_context(|| format!("cannot write {}", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_selects_compilers_and_flags_is_cleared() {
        for name in [
            "CARGO",
            "CARGO_TARGET_DIR",
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_MANIFEST_DIR",
            "CARGO_BUILD_TARGET",
            "RUSTC",
            "RUSTC_WRAPPER",
            "RUSTFLAGS",
            "RUSTUP_TOOLCHAIN",
            "LD_LIBRARY_PATH",
        ] {
            assert!(is_leaking(name), "{name}");
        }
    }

    #[test]
    fn what_says_how_crates_are_fetched_is_kept() {
        for name in
            ["CARGO_HOME", "CARGO_HTTP_PROXY", "CARGO_NET_OFFLINE", "CARGO_REGISTRIES_X_INDEX", "PATH"]
        {
            assert!(!is_leaking(name), "{name}");
        }
    }

    #[test]
    fn an_unchanged_object_keeps_its_timestamp() {
        let dir = std::env::temp_dir().join(format!("xtask-copy-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (from, to) = (dir.join("from"), dir.join("to.o"));
        std::fs::write(&from, "1").unwrap();
        copy_if_changed(&from, &to).unwrap();
        let first = to.metadata().unwrap().modified().unwrap();
        copy_if_changed(&from, &to).unwrap();
        assert_eq!(to.metadata().unwrap().modified().unwrap(), first);
        std::fs::write(&from, "2").unwrap();
        copy_if_changed(&from, &to).unwrap();
        assert_eq!(std::fs::read(&to).unwrap(), b"2");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
