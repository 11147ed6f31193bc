//! Where maps and links are kept while no agent runs.

use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context, Result, bail, ensure};
use lb_common::abi::{ABI_VERSION, maps};
use nix::fcntl::{Flock, FlockArg};

/// Magic number of the BPF file system (`BPF_FS_MAGIC`, include/uapi/linux/magic.h).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// Held by the agent that the pins belong to; the kernel lets go of it when the agent dies.
pub struct PinLock {
    _lock: Flock<fs::File>,
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
    /// When the place is not on a BPF file system and none can be mounted, or holds the pins of
    /// another layout version.
    pub fn prepare(&self) -> Result<()> {
        let mount_point = Path::new("/sys/fs/bpf");
        if self.root.starts_with(mount_point) && !is_bpf_fs(mount_point)? {
            mount_bpf_fs(mount_point)?;
        }
        let links = self.links();
        fs::create_dir_all(&links)
            .with_context(|| format!("creating the pin directory {}", links.display()))?;
        ensure!(
            is_bpf_fs(&links)?,
            "the pin directory {} is not on a BPF file system; mount one there (mount -t bpf bpf DIR) or use \
             --pin-dir below /sys/fs/bpf",
            self.root.display()
        );
        self.refuse_other_versions()
    }

    /// Keeps other agents away for as long as the lock is held.
    ///
    /// # Errors
    /// When another agent is at work here.
    pub fn lock(&self) -> Result<PinLock> {
        let directory = fs::File::open(self.version())
            .with_context(|| format!("opening {}", self.version().display()))?;
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(PinLock { _lock: lock }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => bail!(
                "another agent keeps its maps in {}: stop it first, or choose another --pin-dir",
                self.version().display()
            ),
            Err((_, error)) => Err(error).with_context(|| format!("locking {}", self.version().display())),
        }
    }

    fn refuse_other_versions(&self) -> Result<()> {
        if let Some(name) = self.other_versions().first() {
            bail!(
                "{} holds pins of layout {name}, this agent knows only v{ABI_VERSION}: stop the other agent with \
                 SIGTERM, or remove the directory (which ends its connections)",
                self.root.display()
            );
        }
        Ok(())
    }

    /// Names of the directories beside this one that hold pins of other layout versions; none if they
    /// cannot be read.
    #[must_use]
    pub fn other_versions(&self) -> Vec<String> {
        let own = format!("v{ABI_VERSION}");
        let entries = fs::read_dir(&self.root).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut names: Vec<_> = names.filter(|name| name.starts_with('v') && *name != own).collect();
        names.sort_unstable();
        names
    }

    fn version(&self) -> PathBuf {
        self.root.join(format!("v{ABI_VERSION}"))
    }

    /// Path of a map's pin.
    #[must_use]
    pub fn map(&self, map: maps::Map) -> PathBuf {
        self.version().join(map.name)
    }

    /// Directory of the links' pins.
    #[must_use]
    pub fn links(&self) -> PathBuf {
        self.version().join("links")
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
        for directory in [self.links(), self.version()] {
            remove_files(&directory)
                .with_context(|| format!("removing the pins in {}", directory.display()))?;
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

/// Removes a directory with its files, but no directory in it.
fn remove_files(directory: &Path) -> io::Result<()> {
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
