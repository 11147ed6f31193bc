//! `cargo xtask setup`: installs what is missing and says why. It mounts nothing and changes no
//! setting of the machine.

pub mod kubernetes;
pub mod packages;

use std::process::Command;

use anyhow::{Context, Result, bail};

use self::packages::{Package, Purpose};
use crate::process;

/// Installs everything for all purposes.
pub fn all() -> Result<()> {
    crate::ebpf::ensure_tools()?;
    for purpose in [Purpose::Lab, Purpose::Test, Purpose::Bench] {
        ensure(&packages::for_purpose(purpose))?;
    }
    rust_components()?;
    kubernetes::ensure()?;
    eprintln!("Everything that the project needs is installed.");
    Ok(())
}

/// Installs those of the packages that are missing.
///
/// # Errors
/// Without root or without apt: names what is missing, with the command to install it.
pub fn ensure(wanted: &[Package]) -> Result<()> {
    let missing: Vec<_> = wanted.iter().filter(|package| !package.is_present()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let has_apt = process::find_program("apt-get").is_some();
    if !has_apt || !rustix::process::geteuid().is_root() {
        bail!("{}", missing_text(&missing, has_apt));
    }
    for package in &missing {
        eprintln!("Installing {}: {}", package.name, package.why);
    }
    install(&missing)?;
    if let Some(absent) = missing.iter().find(|package| !package.is_present()) {
        bail!("{} is installed, but {:?} is still not there", absent.name, absent.probe);
    }
    Ok(())
}

/// rustup's minimal profile has neither of these.
pub fn rust_components() -> Result<()> {
    for (component, probe) in [("rustfmt", ["fmt", "--version"]), ("clippy", ["clippy", "--version"])] {
        if process::probe(crate::workspace::cargo().args(probe)).is_none() {
            eprintln!("Installing the rustup component {component}: `cargo xtask ci` needs it");
            process::run(Command::new("rustup").args(["component", "add", component]))
                .with_context(|| format!("{component} is missing and rustup could not add it"))?;
        }
    }
    Ok(())
}

fn missing_text(missing: &[&Package], has_apt: bool) -> String {
    let mut text = "packages are missing:\n".to_owned();
    for package in missing {
        text += &format!("  {}: {}\n", package.name, package.why);
    }
    let command = process::describe(&apt_install(missing));
    text += &match has_apt {
        true => format!("as root: apt-get update && {command}"),
        false => format!(
            "there is no apt-get here: install what your distribution calls them; \
             on Debian it would be\n  {command}"
        ),
    };
    text
}

/// The package lists are only fetched when it does not go without: they may be absent (a container
/// image), or name versions that the mirror no longer has.
fn install(missing: &[&Package]) -> Result<()> {
    let lists_know_them = process::probe(apt_install(missing).arg("--simulate")).is_some();
    if lists_know_them && process::run(&mut apt_install(missing)).is_ok() {
        return Ok(());
    }
    process::run(Command::new("apt-get").args(["update", "-qq"]))?;
    process::run(&mut apt_install(missing))
}

fn apt_install(missing: &[&Package]) -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(std::process::Stdio::null())
        // Recommended packages are another gigabyte; and nothing of the user's is removed.
        .args(["install", "-y", "-q", "--no-install-recommends", "--no-remove"])
        .args(missing.iter().map(|package| package.name.as_ref()));
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_root_the_error_is_a_command_that_installs_all_of_it() {
        let wanted = packages::for_purpose(Purpose::Kernel);
        let missing: Vec<_> = wanted.iter().collect();
        let text = missing_text(&missing, true);
        assert!(text.contains("rustc-web: a rustc"), "{text}");
        assert!(
            text.ends_with(
                "as root: apt-get update && apt-get install -y -q --no-install-recommends --no-remove \
                 rustc-web libstd-rust-web-dev-bpf"
            ),
            "{text}"
        );
        assert!(missing_text(&missing, false).contains("no apt-get here"));
    }

    #[test]
    fn nothing_missing_needs_no_root() {
        ensure(&[]).unwrap();
    }
}
