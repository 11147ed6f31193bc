//! Puts a kernel in place, and starts it.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::archive::{self, Archive};
use super::catalogue::{Kernel, Machine};

/// Few words of the kernel's own, and an end when it panics.
const QUIET: &str = "quiet loglevel=3 panic=-1 rdinit=/init";
const QEMU: &str = "qemu-system-x86";

/// A kernel that lies ready.
pub struct Installed {
    pub image: PathBuf,
    /// Where its modules lie.
    pub modules: PathBuf,
    /// Where the emulator was unpacked, for one that needs it.
    emulator: Option<PathBuf>,
}

/// Fetches what is not there yet. What is there stays as it is: removing `directory` renews it.
pub fn install(kernel: &Kernel, directory: &Path) -> Result<Installed> {
    let root = directory.join(kernel.name);
    unless_there(&root, |partial| {
        let archive = Archive::open(kernel.release, directory)?;
        let package = archive.newest(kernel.package)?;
        eprintln!("Unpacking {package} of Debian {} into {}", kernel.release, root.display());
        archive.unpack(&package, partial)
    })?;
    let emulator = match kernel.machine {
        Machine::UserMode => None,
        Machine::Emulated => {
            let emulator = directory.join("qemu");
            unless_there(&emulator, |partial| {
                eprintln!("Unpacking {QEMU} into {}: it runs kernels in software", emulator.display());
                archive::unpack_with_dependencies(QEMU, partial)
            })?;
            Some(emulator)
        }
    };
    let (image, modules) = match kernel.machine {
        Machine::UserMode => (root.join("usr/bin/linux.uml"), root.join("usr/lib/uml/modules")),
        Machine::Emulated => (image_in(&root.join("boot"))?, modules_in(&root)),
    };
    Ok(Installed { image, modules, emulator })
}

/// Fills a directory beside the place and renames, so that what is there is whole.
fn unless_there(root: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if root.exists() {
        return Ok(());
    }
    // Not `with_extension`: names have dots.
    let mut partial = root.as_os_str().to_owned();
    partial.push(format!(".partial-{}", std::process::id()));
    let partial = PathBuf::from(partial);
    fs::create_dir_all(&partial)?;
    let result = fill(&partial)
        .and_then(|()| fs::rename(&partial, root).with_context(|| format!("cannot make {}", root.display())));
    if result.is_err() {
        fs::remove_dir_all(&partial).ok();
    }
    result
}

fn image_in(boot: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(boot).with_context(|| format!("no kernel in {}", boot.display()))?;
    let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let is_image =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-"));
    paths.find(is_image).with_context(|| format!("no kernel in {}", boot.display()))
}

/// Packages since trixie say `/usr/lib` themselves.
fn modules_in(root: &Path) -> PathBuf {
    let merged = root.join("usr/lib/modules");
    if merged.exists() { merged } else { root.join("lib/modules") }
}

impl Installed {
    /// The command that runs the kernel with this root, and its console as its own output. It leaves
    /// nothing outside of `scratch`.
    pub fn command(&self, initramfs: &Path, megabytes: u32, scratch: &Path) -> Command {
        match &self.emulator {
            None => {
                let mut command = Command::new(&self.image);
                command
                    .arg(format!("mem={megabytes}M"))
                    .arg(option("initrd=", initramfs))
                    .arg(option("uml_dir=", scratch))
                    .args(QUIET.split(' '))
                    .args(["con=null", "con0=null,fd:1"])
                    // Where the file that is its memory lies; it is unlinked at once.
                    .env("TMPDIR", scratch);
                command
            }
            Some(root) => emulated(root, &self.image, initramfs, megabytes),
        }
    }
}

fn emulated(root: &Path, image: &Path, initramfs: &Path, megabytes: u32) -> Command {
    let mut command = Command::new(root.join("usr/bin/qemu-system-x86_64"));
    let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib", "lib"];
    let libraries = std::env::join_paths(libraries.map(|part| root.join(part))).unwrap_or_default();
    command.env("LD_LIBRARY_PATH", libraries);
    for firmware in ["usr/share/qemu", "usr/share/seabios"] {
        command.arg("-L").arg(root.join(firmware));
    }
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        // Hardware virtualization hangs on machines that are virtual themselves.
        // Emulated, cmpxchg16b can leave flags that make the kernel fault (seen with qemu 7.2 in the
        // allocator of 6.12): kernels go without it.
        .args(["-accel", "tcg", "-cpu", "max,-cx16", "-smp", "1"])
        .arg("-m")
        .arg(format!("{megabytes}M"))
        .args(["-chardev", "file,id=console,path=/dev/stdout", "-serial", "chardev:console"])
        .arg("-kernel")
        .arg(image)
        .arg("-initrd")
        .arg(initramfs)
        .arg("-append")
        .arg(format!("console=ttyS0 {QUIET}"));
    command
}

fn option(name: &str, value: &Path) -> OsString {
    let mut text = OsString::from(name);
    text.push(value);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process;

    fn installed(emulator: Option<PathBuf>) -> Installed {
        Installed { image: "/k/vmlinuz".into(), modules: "/k/lib/modules".into(), emulator }
    }

    #[test]
    fn a_user_mode_kernel_is_started_as_a_program() {
        let line = process::describe(&installed(None).command(Path::new("/i"), 512, Path::new("/s")));
        assert!(line.starts_with("/k/vmlinuz mem=512M initrd=/i uml_dir=/s "), "{line}");
        assert!(line.contains("rdinit=/init"), "{line}");
    }

    #[test]
    fn an_emulated_kernel_gets_one_slow_processor_and_a_console() {
        let line =
            process::describe(&installed(Some("/q".into())).command(Path::new("/i"), 512, Path::new("/s")));
        assert!(line.starts_with("/q/usr/bin/qemu-system-x86_64 -L /q/usr/share/qemu"), "{line}");
        for part in ["-accel tcg", "-kernel /k/vmlinuz", "-initrd /i", "-no-reboot", "console=ttyS0"] {
            assert!(line.contains(part), "{part}: {line}");
        }
    }

    #[test]
    fn what_could_not_be_filled_is_not_there() {
        let place = std::env::temp_dir().join(format!("xtask-unless-{}", std::process::id()));
        unless_there(&place, |_| anyhow::bail!("no network")).unwrap_err();
        assert!(!place.exists());
        unless_there(&place, |partial| Ok(fs::write(partial.join("whole"), "")?)).unwrap();
        assert!(place.join("whole").exists());
        unless_there(&place, |_| panic!("it is there")).unwrap();
        fs::remove_dir_all(place).unwrap();
    }
}
