//! `cargo xtask ci`: what has to pass before a change is merged, cheapest first.

use anyhow::Result;

use crate::{generate, process, setup, test, tidy, workspace};

/// Formatting, lints, house rules, and that what is generated is up to date.
pub fn check() -> Result<()> {
    setup::rust_components()?;
    cargo(&["fmt", "--all", "--check"])?;
    tidy::run()?;
    cargo(&["clippy", "--locked", "--all-targets", "--", "--deny", "warnings"])?;
    // Not a default member: its real target is BPF, this is the host's view of it.
    cargo(&["clippy", "--locked", "--package", "lb-ebpf", "--", "--deny", "warnings"])?;
    generate::check()
}

pub fn run(args: &test::Args) -> Result<()> {
    check()?;
    test::run(args)
}

fn cargo(args: &[&str]) -> Result<()> {
    process::run(workspace::cargo().args(args))
}
