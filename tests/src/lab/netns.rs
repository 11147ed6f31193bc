//! A named network namespace.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::Write,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};

use super::registry;

/// A network namespace, removed when dropped.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    role: String,
}

impl Namespace {
    /// Makes the namespace `<lab>-<role>`, with the loopback device up and IPv6 addresses usable at
    /// once (no duplicate address detection, no router advertisements).
    ///
    /// # Errors
    /// When not root, or the name is taken.
    pub fn new(lab: &str, role: &str) -> Result<Self> {
        let name = format!("{lab}-{role}");
        registry::add_namespace(&name);
        let namespace = Self { name, role: role.to_owned() };
        check(Command::new("ip").args(["netns", "add", &namespace.name]))?;
        namespace.run(["ip", "link", "set", "lo", "up"])?;
        for (key, value) in [("accept_dad", "0"), ("dad_transmits", "0"), ("accept_ra", "0")] {
            namespace.sysctl(&format!("net/ipv6/conf/default/{key}"), value)?;
        }
        Ok(namespace)
    }

    /// Its name, as `ip netns` takes it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is in the lab: `client`, `edge`, …
    #[must_use]
    pub fn role(&self) -> &str {
        &self.role
    }

    /// The file that `nsenter --net=` takes.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(registry::NETNS_DIR).join(&self.name)
    }

    /// Runs a closure on a thread inside the namespace. Sockets and processes that it makes stay in
    /// the namespace, wherever they are used later.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    ///
    /// # Panics
    /// When the closure does, with the same message.
    pub fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> Result<T> {
        let path = self.path();
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        let entered = thread::scope(|scope| {
            let body = move || -> Result<T> {
                setns(&file, CloneFlags::CLONE_NEWNET).context("setns")?;
                Ok(inside())
            };
            scope.spawn(body).join()
        });
        match entered {
            Ok(value) => value.with_context(|| format!("cannot enter namespace {}", self.name)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Starts a process inside. Unlike with `ip netns exec` it sees the machine's `/sys`, so that
    /// pins are where others find them.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, command: &mut Command) -> Result<Process> {
        let program = command.get_program().to_owned();
        let child = self.enter(|| command.spawn())?;
        let child = child.with_context(|| format!("cannot start {} in {}", program.display(), self.name))?;
        registry::add_process(child.id());
        Ok(Process(child))
    }

    /// Runs a command to its end and gives what it printed.
    ///
    /// # Errors
    /// When it cannot be run or fails; with what it wrote to stderr.
    pub fn run<S: AsRef<OsStr>>(&self, line: impl IntoIterator<Item = S>) -> Result<String> {
        let mut line = line.into_iter();
        let Some(program) = line.next() else { bail!("an empty command line") };
        let mut command = Command::new(program);
        command.args(line);
        self.enter(|| check(&mut command))?.with_context(|| format!("in namespace {}", self.name))
    }

    /// Runs lines of `ip` commands (without `ip`).
    ///
    /// # Errors
    /// With the line that failed.
    pub fn ip_batch(&self, lines: &str) -> Result<()> {
        let lines: Vec<&str> = lines.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let mut command = Command::new("ip");
        command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = self.enter(|| command.spawn())?.context("cannot run ip")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(lines.join("\n").as_bytes()).context("cannot write to ip")?;
        }
        let output = child.wait_with_output().context("cannot wait for ip")?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "in namespace {}: ip: {}\n{}",
            self.name,
            stderr.trim(),
            lines.join("\n")
        );
        Ok(())
    }

    /// Sets `/proc/sys/<key>` of the namespace.
    ///
    /// # Errors
    /// When there is no such setting, or it does not take the value.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = PathBuf::from("/proc/sys").join(key);
        let written = self.enter(|| fs::write(&path, value))?;
        written
            .with_context(|| format!("in namespace {}: cannot set {} to {value}", self.name, path.display()))
    }

    /// Makes a veth device behave like a NIC: whole checksums and no segmentation offload on what
    /// it sends (native XDP rewrites what it sees), and NAPI on what it receives (without it, or an
    /// XDP program, nothing can be redirected to its peer).
    ///
    /// # Errors
    /// When ethtool fails.
    pub fn like_a_nic(&self, device: &str) -> Result<()> {
        self.run(["ethtool", "-K", device, "tx", "off", "gro", "on"]).map(drop)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        registry::remove_namespace(&self.name);
    }
}

/// A process in a namespace, killed when dropped.
#[derive(Debug)]
pub struct Process(Child);

impl Process {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// The process itself: its pipes, its end. Reap it by dropping the `Process`, or with
    /// `try_wait` once nobody else needs the id.
    pub fn child(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        registry::forget_process(self.0.id());
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command to its end.
pub(super) fn check(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {}", output.status, stderr.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
