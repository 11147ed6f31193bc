//! Debian packages of any release, fetched by apt and unpacked below `target/kernels`: nothing of
//! the machine is changed, and root is not needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process;

/// Names another archive than the one that the machine's own apt uses, for releases that it no
/// longer has.
pub const MIRROR_ENV: &str = "POINTSMAN_DEBIAN_MIRROR";
/// Where Debian keeps the keys of its archives, those of other releases, too.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// One release of Debian, with lists of its own.
pub struct Archive {
    state: PathBuf,
}

impl Archive {
    /// Fetches the release's list of packages.
    pub fn open(release: &str, directory: &Path) -> Result<Self> {
        let archive = Self { state: directory.join("apt").join(release) };
        let keys = if Path::new(KEYS).exists() { format!("[signed-by={KEYS}] ") } else { String::new() };
        let mirror = mirror()?;
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(archive.state.join(part))?;
        }
        fs::write(archive.state.join("sources.list"), format!("deb {keys}{mirror} {release} main\n"))?;
        process::run(archive.command("apt-get").args(["-qq", "update"])).with_context(|| {
            format!(
                "no Debian {release} at {mirror}; {MIRROR_ENV} can name an archive that has it, \
                 for example one of former releases"
            )
        })?;
        Ok(archive)
    }

    /// An apt that knows this release only, and takes nothing for installed.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let option = |name: &str, value: &Path| format!("{name}={}", value.display());
        for option in [
            option("Dir::Etc::sourcelist", &self.state.join("sources.list")),
            "Dir::Etc::sourceparts=-".into(),
            option("Dir::State::lists", &self.state.join("lists")),
            option("Dir::Cache", &self.state.join("cache")),
            "Dir::State::status=/dev/null".into(),
            // The lists of a release that is no longer supported are not renewed.
            "Acquire::Check-Valid-Until=false".into(),
            "Acquire::Languages=none".into(),
            "APT::Sandbox::User=root".into(),
        ] {
            command.args(["-o", &option]);
        }
        command
    }

    /// The package itself, or what it depends on if it is there for that only.
    pub fn newest(&self, package: &str) -> Result<String> {
        let depends = process::stdout(self.command("apt-cache").args(["depends", "--important", package]))?;
        Ok(newest_image(&depends).unwrap_or_else(|| package.to_owned()))
    }

    /// Puts the package's files below `root`.
    pub fn unpack(&self, package: &str, root: &Path) -> Result<()> {
        fetch(self.command("apt-get"), &[package.to_owned()], root)
    }
}

/// Unpacks a package and everything that it needs and the machine lacks, as the machine's own apt
/// would install it; installing it might remove what the user has.
pub fn unpack_with_dependencies(package: &str, root: &Path) -> Result<()> {
    let mut simulation = Command::new("apt-get");
    simulation.args(["install", "--simulate", "--no-install-recommends", package]);
    let steps = match process::probe(&mut simulation) {
        Some(steps) => steps,
        // The lists may be absent; only root can fetch them.
        None => {
            process::run(Command::new("apt-get").args(["update", "-qq"]))?;
            process::stdout(&mut simulation)?
        }
    };
    let packages = installed_by(&steps);
    if packages.is_empty() {
        bail!("apt-get would install nothing for {package}: {steps}");
    }
    fetch(Command::new("apt-get"), &packages, root)
}

fn fetch(mut apt: Command, packages: &[String], root: &Path) -> Result<()> {
    let mut downloads = root.as_os_str().to_owned();
    downloads.push(".packages");
    let downloads = PathBuf::from(downloads);
    fs::create_dir_all(&downloads)?;
    apt.current_dir(&downloads).args(["-qq", "-o", "APT::Sandbox::User=root", "download"]).args(packages);
    process::run(&mut apt)?;
    for entry in fs::read_dir(&downloads)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            // Not said one by one: an emulator is thirty of them.
            process::stdout(Command::new("dpkg-deb").arg("-x").arg(&path).arg(root))?;
        }
    }
    Ok(fs::remove_dir_all(&downloads)?)
}

/// The archive that the machine's apt takes packages from.
fn mirror() -> Result<String> {
    if let Ok(mirror) = std::env::var(MIRROR_ENV) {
        return Ok(mirror);
    }
    let mut ask = Command::new("apt-get");
    ask.args(["indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(CODENAME) $(COMPONENT)"]);
    let targets = process::probe(&mut ask).unwrap_or_default();
    main_archive(&targets)
        .with_context(|| format!("this machine's apt knows no Debian archive: name one by {MIRROR_ENV}"))
}

/// Debian's own archive among those of security fixes, updates and others.
fn main_archive(targets: &str) -> Option<String> {
    targets.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (uri, origin, codename, component) = (words.next()?, words.next()?, words.next()?, words.next()?);
        let is_main = origin == "Debian" && component == "main" && !codename.contains('-');
        is_main.then(|| uri.trim_end_matches('/').to_owned())
    })
}

fn newest_image(depends: &str) -> Option<String> {
    let names = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    names.map(str::trim).find(|name| name.starts_with("linux-image-")).map(str::to_owned)
}

fn installed_by(steps: &str) -> Vec<String> {
    let names = steps.lines().filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next());
    names.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_archive_of_the_release_itself() {
        let targets = "https://security.example/debian-security/ Debian bookworm-security main\n\
                       https://tools.example/apt/ Tools stable main\n\
                       https://mirror.example/debian/ Debian bookworm-updates main\n\
                       https://mirror.example/debian/ Debian bookworm contrib\n\
                       https://mirror.example/debian/ Debian bookworm main\n";
        assert_eq!(main_archive(targets).as_deref(), Some("https://mirror.example/debian"));
        assert_eq!(main_archive(""), None);
    }

    #[test]
    fn a_package_that_stands_for_the_newest_kernel_names_it() {
        let depends = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(newest_image(depends).as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(newest_image("user-mode-linux\n  Depends: libc6\n"), None);
    }

    #[test]
    fn what_would_be_installed_is_read_and_what_would_be_removed_is_not() {
        let steps = "Remv qemu-utils [1:10.0]\nInst seabios (1.16 Debian:12 [all])\nInst qemu-system-x86 (1:7.2)\n\
                     Conf seabios (1.16 Debian:12 [all])\n";
        assert_eq!(installed_by(steps), ["seabios", "qemu-system-x86"]);
    }
}
