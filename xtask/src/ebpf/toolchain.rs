//! Which rustc compiles for the BPF target, and why that one.
//!
//! `bpfel-unknown-none` has no prebuilt `core` from rustup, so it takes either a nightly that can
//! build `core` from source, or a distribution's rustc that ships `core` for this target.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process;

/// Forces a rustc, e.g. `/opt/rust/bin/rustc`; it needs the target's `core` or its source.
pub const RUSTC_ENV: &str = "POINTSMAN_EBPF_RUSTC";
pub const TARGET: &str = "bpfel-unknown-none";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// LLVM majors that bpf-linker 0.13.0 can be built against and that can read unaligned packet
/// fields in one instruction (`allows-misaligned-mem-access` came with LLVM 22).
const LLVM_MAJORS: std::ops::RangeInclusive<u32> = 22..=23;

/// Where the target's `core` comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Core {
    /// Shipped compiled, next to this rustc.
    Precompiled,
    /// Compiled by us from the rust-src component: `-Z build-std=core`.
    FromSource,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Named by [`RUSTC_ENV`].
    Override,
    RustupNightly,
    Debian,
}

/// What was found out about one rustc.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub origin: Origin,
    pub rustc: PathBuf,
    /// The cargo of the same toolchain, where it must be used instead of the running one.
    pub cargo: Option<PathBuf>,
    /// E.g. `1.96.0`; `None` when the file does not run.
    pub release: Option<String>,
    pub llvm_major: Option<u32>,
    pub core: Option<Core>,
}

/// A rustc that will do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toolchain {
    pub rustc: PathBuf,
    pub cargo: Option<PathBuf>,
    pub release: String,
    pub llvm_major: u32,
    pub core: Core,
    /// Why this one, and what was passed over.
    pub why: String,
}

/// Why none will do: one reason per candidate.
#[derive(Debug, PartialEq, Eq)]
pub struct NoToolchain {
    pub reasons: Vec<String>,
    /// The user named a rustc that cannot be used: installing another would not help.
    pub overridden: bool,
}

impl std::fmt::Display for NoToolchain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "no rustc here can compile for {TARGET}:")?;
        self.reasons.iter().try_for_each(|reason| write!(f, "\n  {reason}"))?;
        if self.overridden {
            write!(f, "\n{RUSTC_ENV} is set: unset it, or name a rustc with rust-src or with that target")
        } else {
            write!(
                f,
                "\neither `rustup toolchain install nightly --component rust-src`, \
                 or `apt-get install rustc-web libstd-rust-web-dev-bpf` on Debian"
            )
        }
    }
}

impl std::error::Error for NoToolchain {}

/// Takes the first candidate that will do. An override is never passed over silently: when it will
/// not do, nothing else is taken.
pub fn choose(candidates: &[Candidate]) -> Result<Toolchain, NoToolchain> {
    let mut reasons = Vec::new();
    for candidate in candidates {
        match judge(candidate) {
            Ok(mut toolchain) => {
                for reason in &reasons {
                    let _ = write!(toolchain.why, "; passed over {reason}");
                }
                return Ok(toolchain);
            }
            Err(reason) if candidate.origin == Origin::Override => {
                return Err(NoToolchain { reasons: vec![reason], overridden: true });
            }
            Err(reason) => reasons.push(reason),
        }
    }
    Err(NoToolchain { reasons, overridden: false })
}

fn judge(candidate: &Candidate) -> Result<Toolchain, String> {
    let rustc = candidate.rustc.display();
    let (Some(release), Some(llvm_major)) = (&candidate.release, candidate.llvm_major) else {
        return Err(format!("{rustc}: does not run"));
    };
    if !LLVM_MAJORS.contains(&llvm_major) {
        let (low, high) = LLVM_MAJORS.into_inner();
        return Err(format!("{rustc}: its LLVM is {llvm_major}, bpf-linker needs {low} to {high}"));
    }
    let Some(core) = candidate.core else {
        return Err(format!("{rustc}: has neither `core` for the target nor its source (rust-src)"));
    };
    let why = match candidate.origin {
        Origin::Override => format!("named by {RUSTC_ENV}"),
        Origin::RustupNightly => "a rustup nightly with rust-src".to_owned(),
        Origin::Debian => "Debian's rustc with its precompiled BPF core".to_owned(),
    };
    Ok(Toolchain {
        rustc: candidate.rustc.clone(),
        cargo: candidate.cargo.clone(),
        release: release.clone(),
        llvm_major,
        core,
        why,
    })
}

/// Looks at the machine, in the order of preference.
pub fn candidates() -> Vec<Candidate> {
    if let Some(rustc) = std::env::var_os(RUSTC_ENV) {
        return vec![inspect(Origin::Override, PathBuf::from(rustc), None)];
    }
    let mut found = rustup_nightlies();
    if Path::new(DEBIAN_RUSTC).exists() {
        found.push(inspect(Origin::Debian, PathBuf::from(DEBIAN_RUSTC), None));
    }
    found
}

fn rustup_nightlies() -> Vec<Candidate> {
    let Some(list) = process::probe(Command::new("rustup").args(["toolchain", "list"])) else {
        return Vec::new();
    };
    let path_of = |program: &str, toolchain: &str| {
        let path = process::probe(Command::new("rustup").args(["which", "--toolchain", toolchain, program]))?;
        Some(PathBuf::from(path.trim()))
    };
    list.lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| name.starts_with("nightly"))
        .filter_map(|name| {
            let rustc = path_of("rustc", name)?;
            // `-Z build-std` is the business of cargo: it must be the nightly's own.
            Some(inspect(Origin::RustupNightly, rustc, Some(path_of("cargo", name)?)))
        })
        .collect()
}

fn inspect(origin: Origin, rustc: PathBuf, cargo: Option<PathBuf>) -> Candidate {
    let ask = |args: &[&str]| process::probe(super::clean_env(&mut Command::new(&rustc)).args(args));
    let (release, llvm_major) =
        ask(&["-vV"]).map_or((None, None), |version| (release(&version), llvm_major(&version)));
    let dir = |args: &[&str]| ask(args).map(|path| PathBuf::from(path.trim()));
    let precompiled = dir(&["--print", "target-libdir", "--target", TARGET]).is_some_and(|d| has_core(&d));
    let source = dir(&["--print", "sysroot"])
        .is_some_and(|sysroot| sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").exists());
    let core = match (precompiled, source) {
        (true, _) => Some(Core::Precompiled),
        (false, true) => Some(Core::FromSource),
        (false, false) => None,
    };
    Candidate { origin, rustc, cargo, release, llvm_major, core }
}

fn has_core(libdir: &Path) -> bool {
    let is_core = |name: &str| name.starts_with("libcore-") && name.ends_with(".rlib");
    std::fs::read_dir(libdir)
        .is_ok_and(|entries| entries.flatten().any(|entry| entry.file_name().to_str().is_some_and(is_core)))
}

fn release(version: &str) -> Option<String> {
    version.lines().find_map(|line| line.strip_prefix("release: ")).map(str::to_owned)
}

fn llvm_major(version: &str) -> Option<u32> {
    let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    llvm.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(origin: Origin, llvm_major: u32, core: Option<Core>) -> Candidate {
        Candidate {
            origin,
            rustc: format!("/{origin:?}/rustc").into(),
            cargo: None,
            release: Some("1.96.0".into()),
            llvm_major: Some(llvm_major),
            core,
        }
    }

    #[test]
    fn versions_are_read_from_rustc() {
        let version = "rustc 1.96.0 (ac68faa20 2026-05-25)\nbinary: rustc\nhost: x86_64-unknown-linux-gnu\n\
                       release: 1.96.0\nLLVM version: 22.1.8\n";
        assert_eq!(release(version).as_deref(), Some("1.96.0"));
        assert_eq!(llvm_major(version), Some(22));
        assert_eq!(llvm_major("rustc 1.96.0"), None);
    }

    #[test]
    fn the_first_that_will_do_is_taken_and_says_what_was_passed_over() {
        let found = [
            candidate(Origin::RustupNightly, 22, None),
            candidate(Origin::Debian, 22, Some(Core::Precompiled)),
        ];
        let taken = choose(&found).unwrap();
        assert_eq!(taken.rustc, Path::new("/Debian/rustc"));
        assert_eq!(taken.core, Core::Precompiled);
        assert!(taken.why.starts_with("Debian's rustc"), "{}", taken.why);
        assert!(taken.why.contains("passed over /RustupNightly/rustc: has neither"), "{}", taken.why);
    }

    #[test]
    fn a_nightly_with_source_comes_before_debian() {
        let found = [
            candidate(Origin::RustupNightly, 23, Some(Core::FromSource)),
            candidate(Origin::Debian, 22, Some(Core::Precompiled)),
        ];
        assert_eq!(choose(&found).unwrap().core, Core::FromSource);
    }

    #[test]
    fn an_llvm_that_the_linker_cannot_use_is_passed_over() {
        let found = [
            candidate(Origin::RustupNightly, 24, Some(Core::FromSource)),
            candidate(Origin::Debian, 22, Some(Core::Precompiled)),
        ];
        let taken = choose(&found).unwrap();
        assert_eq!(taken.llvm_major, 22);
        assert!(taken.why.contains("LLVM is 24"), "{}", taken.why);
    }

    #[test]
    fn an_override_that_will_not_do_is_an_error_whatever_else_there_is() {
        let found =
            [candidate(Origin::Override, 22, None), candidate(Origin::Debian, 22, Some(Core::Precompiled))];
        let error = choose(&found).unwrap_err();
        assert!(error.overridden);
        assert!(error.to_string().contains(RUSTC_ENV), "{error}");
    }

    #[test]
    fn with_nothing_found_the_error_names_both_ways_out() {
        let error = choose(&[]).unwrap_err().to_string();
        assert!(error.contains("rustup toolchain install nightly --component rust-src"), "{error}");
        assert!(error.contains("apt-get install rustc-web libstd-rust-web-dev-bpf"), "{error}");
    }

    #[test]
    fn a_rustc_that_does_not_run_is_named() {
        let broken = Candidate { release: None, ..candidate(Origin::Debian, 22, Some(Core::Precompiled)) };
        assert!(choose(&[broken]).unwrap_err().reasons[0].contains("does not run"));
    }
}
