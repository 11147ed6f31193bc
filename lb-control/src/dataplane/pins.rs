//! Where maps and links are kept while no agent runs.

use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context, Result, bail, ensure};
use lb_common::abi::{ABI_VERSION, maps, previous};
use nix::fcntl::{Flock, FlockArg};
use tracing::info;

use super::takeover::{self, Versions};

/// Magic number of the BPF file system (`BPF_FS_MAGIC`, include/uapi/linux/magic.h).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// Name of the directory of the links' pins in that of a version.
pub(super) const LINKS: &str = "links";

/// Held by the agent that the pins belong to; the kernel lets go of it when the agent dies.
pub struct PinLock {
    _lock: Flock<fs::File>,
    others: Versions,
    pins: PinDirectory,
}

impl PinLock {
    /// To be called by an agent that cannot begin, or ends before it has attached anything: its pins
    /// would keep one of the previous version away, which has left something and could go on with it.
    ///
    /// # Errors
    /// When a pin cannot be removed.
    pub fn give_back(&self) -> Result<()> {
        if !self.others.is_upgrade()
            || !self.pins.previous().exists()
            || !pins_in(&self.pins.links())?.is_empty()
        {
            return Ok(());
        }
        takeover::remove(&self.pins.version())?;
        info!("what map layout v{} has left is as it was: an agent of it can begin again", previous::VERSION);
        Ok(())
    }
}

/// The directory of the pins of this layout version.
#[derive(Clone, Debug)]
pub struct PinDirectory {
    root: PathBuf,
}

impl PinDirectory {
    /// Names the directory; nothing is created.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Creates the directory, and mounts the BPF file system if the default place lacks it.
    ///
    /// # Errors
    /// When the place is not on a BPF file system and none can be mounted.
    pub fn prepare(&self) -> Result<()> {
        self.mount()?;
        let links = self.links();
        fs::create_dir_all(&links)
            .with_context(|| format!("creating the pin directory {}", links.display()))?;
        ensure!(
            is_bpf_fs(&links)?,
            "the pin directory {} is not on a BPF file system; mount one there (mount -t bpf bpf DIR) or use \
             --pin-dir below /sys/fs/bpf",
            self.root.display()
        );
        Ok(())
    }

    /// Prepares the directory, takes over what an agent of the previous layout version has left, and
    /// keeps other agents away for as long as the lock is held.
    ///
    /// # Errors
    /// As [`Self::prepare`]; when another agent is at work here, or a newer one has left its pins. Then
    /// nothing is touched.
    pub fn occupy(&self) -> Result<PinLock> {
        self.mount()?;
        let others = Versions::examine(&self.root)?;
        self.prepare()?;
        let lock = self.lock()?;
        let lock = PinLock { _lock: lock, others, pins: self.clone() };
        if let Err(error) = lock.others.take_over(self) {
            lock.give_back().with_context(|| format!("{error:#}"))?;
            return Err(error);
        }
        Ok(lock)
    }

    /// Whether an agent, of this layout version or another, has left something here.
    #[must_use]
    pub fn has_left(&self) -> bool {
        fs::read_dir(&self.root).is_ok_and(|entries| {
            entries.flatten().any(|entry| {
                let pins = pins_in(&entry.path()).unwrap_or_default();
                pins.iter().any(|pin| !pin.is_dir())
            })
        })
    }

    /// Whether the directory is there, on a BPF file system.
    #[must_use]
    pub fn is_prepared(&self) -> bool {
        let links = self.links();
        links.is_dir() && is_bpf_fs(&links).unwrap_or(false)
    }

    fn mount(&self) -> Result<()> {
        let mount_point = Path::new("/sys/fs/bpf");
        if self.root.starts_with(mount_point) && !is_bpf_fs(mount_point)? {
            mount_bpf_fs(mount_point)?;
        }
        Ok(())
    }

    fn lock(&self) -> Result<Flock<fs::File>> {
        let directory = fs::File::open(self.version())
            .with_context(|| format!("opening {}", self.version().display()))?;
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(lock),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => bail!(
                "another agent keeps its maps in {}: stop it first, or choose another --pin-dir",
                self.version().display()
            ),
            Err((_, error)) => Err(error).with_context(|| format!("locking {}", self.version().display())),
        }
    }

    /// Removes all maps' pins, and keeps the directory, which may be locked.
    pub(super) fn clear(&self) -> Result<()> {
        for pin in pins_in(&self.version())?.iter().filter(|pin| **pin != self.links()) {
            fs::remove_file(pin).with_context(|| format!("removing the pin {}", pin.display()))?;
        }
        Ok(())
    }

    /// Names of the directories beside this one where other layout versions have maps or programs; none
    /// if they cannot be read.
    #[must_use]
    pub fn other_versions(&self) -> Vec<String> {
        let numbers = takeover::in_use(&self.root).unwrap_or_default();
        numbers.into_iter().map(|number| format!("v{number}")).collect()
    }

    fn version(&self) -> PathBuf {
        self.root.join(format!("v{ABI_VERSION}"))
    }

    fn previous(&self) -> PathBuf {
        self.root.join(format!("v{}", previous::VERSION))
    }

    /// Path of a map's pin.
    #[must_use]
    pub fn map(&self, map: maps::Map) -> PathBuf {
        self.path(map.name)
    }

    /// Path of a map's pin of the previous version.
    pub(super) fn previous_map(&self, map: maps::Map) -> PathBuf {
        self.previous().join(map.name)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.version().join(name)
    }

    /// Directory of the links' pins.
    #[must_use]
    pub fn links(&self) -> PathBuf {
        self.version().join(LINKS)
    }

    /// Path of a link's pin, which may still be where an agent of the previous version has left it.
    #[must_use]
    pub fn link(&self, name: &str) -> PathBuf {
        let (own, earlier) = (self.links().join(name), self.previous().join(LINKS).join(name));
        if !own.exists() && earlier.exists() { earlier } else { own }
    }

    /// The pins of all links, those of the previous version included.
    ///
    /// # Errors
    /// When a directory cannot be read.
    pub fn all_links(&self) -> Result<Vec<PathBuf>> {
        let mut all = pins_in(&self.links())?;
        all.extend(pins_in(&self.previous().join(LINKS))?);
        Ok(all)
    }

    /// Whether a link's pin is where the previous version has left it.
    #[must_use]
    pub fn is_earlier(&self, link: &Path) -> bool {
        !link.starts_with(self.links())
    }

    /// To be called when a link has our program: its pin moves here, if it is not here yet. In one step
    /// (`simple_rename` in kernel/bpf/inode.c), so that the link is always held.
    ///
    /// # Errors
    /// When the pin cannot be moved.
    pub fn keep_link(&self, pin: &Path) -> Result<()> {
        let Some(name) = pin.file_name().filter(|_| self.is_earlier(pin)) else { return Ok(()) };
        let own = self.links().join(name);
        fs::rename(pin, &own).with_context(|| format!("moving {} to {}", pin.display(), own.display()))
    }

    /// Removes what the previous version has left, once none of its programs is attached any more.
    ///
    /// # Errors
    /// When a pin cannot be removed.
    pub fn retire_previous(&self) -> Result<()> {
        takeover::retire(&self.previous())
    }

    /// Whether maps are pinned here.
    #[must_use]
    pub fn is_populated(&self) -> bool {
        self.map(maps::CONFIG).exists()
    }

    /// Path to show to people.
    #[must_use]
    pub fn display(&self) -> String {
        self.version().display().to_string()
    }

    /// Removes all pins: what they held goes once nothing else holds it.
    ///
    /// # Errors
    /// When a pin cannot be removed.
    pub fn remove(&self) -> Result<()> {
        for version in [self.previous(), self.version()] {
            takeover::remove(&version)?;
        }
        // Other agents may have theirs next to ours.
        match fs::remove_dir(&self.root) {
            Err(error)
                if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) =>
            {
                Err(error).with_context(|| format!("removing {}", self.root.display()))
            }
            _ => Ok(()),
        }
    }
}

/// Everything in a directory; nothing if it is not there.
pub(super) fn pins_in(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("reading {}", directory.display()))?,
    };
    entries
        .map(|entry| Ok(entry.with_context(|| format!("reading {}", directory.display()))?.path()))
        .collect()
}

/// Removes a directory with its files, but no directory in it.
pub(super) fn remove_files(directory: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        fs::remove_file(entry?.path())?;
    }
    fs::remove_dir(directory)
}

/// Whether a path is on a BPF file system; not if there is none of this name.
pub(super) fn is_bpf_fs(path: &Path) -> Result<bool> {
    match nix::sys::statfs::statfs(path) {
        Ok(stat) => Ok(stat.filesystem_type().0 == BPF_FS_MAGIC),
        Err(nix::errno::Errno::ENOENT) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("asking for the file system of {}", path.display())),
    }
}

fn mount_bpf_fs(path: &Path) -> Result<()> {
    nix::mount::mount(
        Some("bpf"),
        path,
        Some("bpf"),
        nix::mount::MsFlags::MS_NOSUID | nix::mount::MsFlags::MS_NODEV | nix::mount::MsFlags::MS_NOEXEC,
        None::<&str>,
    )
    .with_context(|| {
        format!("{} is not a BPF file system, and mounting one failed (needs CAP_SYS_ADMIN)", path.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pins of both versions, as files: this and the previous one.
    fn both(root: &Path) -> (PinDirectory, PinLock) {
        let pins = PinDirectory::new(root);
        for version in [pins.previous(), pins.version()] {
            fs::create_dir_all(version.join(LINKS)).unwrap();
        }
        fs::write(pins.previous().join(LINKS).join("7-native"), "").unwrap();
        fs::write(pins.map(maps::CONFIG), "").unwrap();
        let others = Versions::examine(root).unwrap();
        let lock = PinLock { _lock: pins.lock().unwrap(), others, pins: pins.clone() };
        (pins, lock)
    }

    #[test]
    fn who_has_attached_nothing_leaves_nothing_beside_the_previous_version() {
        let root = tempfile::tempdir().unwrap();
        let (pins, lock) = both(root.path());
        lock.give_back().unwrap();
        assert!(!pins.version().exists() && pins.previous().join(LINKS).join("7-native").exists());
    }

    #[test]
    fn who_has_attached_something_keeps_all() {
        let root = tempfile::tempdir().unwrap();
        let (pins, lock) = both(root.path());
        fs::write(pins.links().join("7-native"), "").unwrap();
        lock.give_back().unwrap();
        assert!(pins.is_populated());
        // Nobody to go back to.
        fs::remove_file(pins.links().join("7-native")).unwrap();
        fs::remove_dir_all(pins.previous()).unwrap();
        lock.give_back().unwrap();
        assert!(pins.is_populated());
    }
}
