//! A control group of the lab's own: agents serve the sockets of what runs in it.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, Result, bail};

use super::{registry, topology::Lab};

/// A control group of version 2 below this process's own, whose members are threads. Removed when
/// dropped.
#[derive(Debug)]
pub struct ControlGroup(PathBuf);

impl ControlGroup {
    /// Makes a group, named as the lab.
    ///
    /// # Errors
    /// When control groups of version 2 are not mounted.
    pub fn new(lab: &Lab) -> Result<Self> {
        let path = own_group()?.join(lab.id());
        registry::add_directory(&path);
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let group = Self(path);
        group.write("cgroup.type", "threaded")?;
        Ok(group)
    }

    /// For `--cgroup`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Runs a closure on a thread in the group. Threads and processes that it starts are in it, too;
    /// sockets belong to the group that they were made in.
    ///
    /// # Errors
    /// When the closure fails, or the group cannot be entered.
    ///
    /// # Panics
    /// When the closure does, with the same message.
    pub fn enter<T: Send>(&self, inside: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let body = || {
            // The thread that writes.
            self.write("cgroup.threads", "0")?;
            inside()
        };
        match thread::scope(|scope| scope.spawn(body).join()) {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.0.join(file);
        fs::write(&path, value).with_context(|| format!("cannot write {value} to {}", path.display()))
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        registry::remove_directory(&self.0);
    }
}

/// The directory of the group of this process.
pub(super) fn own_group() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read mounts")?;
    let is_v2 = |line: &&str| line.split(' ').nth(2) == Some("cgroup2");
    let Some(mount) = mounts.lines().find(is_v2).and_then(|line| line.split(' ').nth(1)) else {
        bail!("control groups of version 2 are not mounted");
    };
    let groups = fs::read_to_string("/proc/self/cgroup").context("cannot read the own group")?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    Ok(Path::new(mount).join(own))
}
