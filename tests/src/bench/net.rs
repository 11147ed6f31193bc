//! Network namespaces without names: held by an open file, gone with the process whatever happens.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace.
pub struct Namespace {
    file: File,
}

impl Namespace {
    /// Makes one, with its loopback device up.
    ///
    /// # Errors
    /// Without CAP_SYS_ADMIN.
    pub fn new() -> Result<Self> {
        let file = std::thread::scope(|scope| {
            let made = scope.spawn(|| -> Result<File> {
                unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace (needs root)")?;
                Ok(File::open("/proc/thread-self/ns/net")?)
            });
            made.join().map_err(|_| anyhow!("making a network namespace: the thread panicked"))?
        })?;
        let namespace = Self { file };
        namespace.run("ip link set lo up")?;
        Ok(namespace)
    }

    /// Moves the calling thread into the namespace, for good.
    ///
    /// # Errors
    /// Without CAP_SYS_ADMIN.
    pub fn enter(&self) -> Result<()> {
        setns(&self.file, CloneFlags::CLONE_NEWNET).context("entering a network namespace")
    }

    /// Runs a closure in a thread in the namespace.
    ///
    /// # Errors
    /// Those of the closure.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.enter()?;
                work()
            });
            thread.join().map_err(|_| anyhow!("a thread in a network namespace panicked"))?
        })
    }

    /// Runs a command, words separated by spaces; `@` stands for the path of `other`.
    ///
    /// # Errors
    /// When it fails: with what it said.
    pub fn run(&self, line: &str) -> Result<String> {
        self.inside(|| {
            let mut words = line.split_whitespace();
            let program = words.next().context("an empty command")?;
            let output =
                Command::new(program).args(words).output().with_context(|| format!("running `{line}`"))?;
            let errors = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "`{line}` failed: {}", errors.trim());
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        })
    }

    /// Path by which other processes can name it while this one lives.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// Makes a veth pair between this namespace and another, both ends up, with the offloads that veth has.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn link(&self, device: &str, other: &Self, other_device: &str) -> Result<()> {
        let path = other.path();
        self.run(&format!("ip link add {device} type veth peer name {other_device} netns {path}"))?;
        for (namespace, device) in [(self, device), (other, other_device)] {
            namespace.run(&format!("ip link set {device} up"))?;
        }
        Ok(())
    }

    /// The same without offloads that leave checksums unfinished: XDP at the other end would see them.
    ///
    /// # Errors
    /// When `ip` or `ethtool` fails.
    pub fn join(&self, device: &str, other: &Self, other_device: &str) -> Result<()> {
        self.link(device, other, other_device)?;
        for (namespace, device) in [(self, device), (other, other_device)] {
            namespace.run(&format!("ethtool -K {device} tx off tso off gso off gro on"))?;
        }
        Ok(())
    }

    /// Index and Ethernet address of a device.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn device(&self, name: &str) -> Result<(u32, [u8; 6])> {
        let line = self.run(&format!("ip -o link show {name}"))?;
        let parsed = (|| {
            let index = line.split(':').next()?.trim().parse().ok()?;
            let text = line.split("link/ether ").nth(1)?.split_whitespace().next()?;
            let mut address = [0; 6];
            for (byte, part) in address.iter_mut().zip(text.split(':')) {
                *byte = u8::from_str_radix(part, 16).ok()?;
            }
            Some((index, address))
        })();
        parsed.with_context(|| format!("reading what `ip link` says of {name}: {line}"))
    }

    /// Writes a setting below /proc/sys/net.
    ///
    /// # Errors
    /// When there is no such setting.
    pub fn set(&self, name: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/net/{name}");
        self.inside(|| std::fs::write(&path, value).with_context(|| format!("writing {value} to {path}")))
    }
}
