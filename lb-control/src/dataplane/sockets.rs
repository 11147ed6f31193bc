//! The programs for sockets of this node: attached to a control group by links that are pinned. All
//! sockets of processes in the group and below it get their backend by them, pods' and the host's alike
//! if it is the root.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail};
use aya::programs::CgroupAttachMode;
use aya::programs::links::FdLink;
use lb_common::abi::maps::{SOCKET_PROGRAMS, SocketProgram};
use tracing::info;

use super::link_update::{link_of_pin, update};
use super::{Kernel, PinDirectory};

/// Magic number of the file system of control groups (`CGROUP2_SUPER_MAGIC`, include/uapi/linux/magic.h).
const CGROUP2_MAGIC: i64 = 0x6367_7270;

/// Of which processes the sockets are served. Read as `auto`, `off` or a path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Cgroup {
    /// Of all on this node.
    Auto,
    /// Of none.
    #[default]
    Off,
    /// Of those in this control group, and below it.
    At(PathBuf),
}

impl FromStr for Cgroup {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            path if path.starts_with('/') => Ok(Self::At(path.into())),
            _ => Err("write auto, off, or the path of a control group, as /sys/fs/cgroup".to_owned()),
        }
    }
}

impl Cgroup {
    /// The directory of the group; `None` if sockets are not served.
    pub(super) fn directory(&self) -> Result<Option<PathBuf>> {
        match self {
            Self::Off => Ok(None),
            Self::At(path) => Ok(Some(path.clone())),
            Self::Auto => {
                let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading mount points")?;
                let all = mount_points(&mounts);
                match all.iter().find(|path| is_root(path)) {
                    Some(root) => Ok(Some(root.clone())),
                    None if all.is_empty() => bail!(
                        "control groups of version 2 are not mounted: mount them on the node \
                         (mount -t cgroup2 none /sys/fs/cgroup/unified), or use --cgroup=off"
                    ),
                    None => bail!(
                        "the root of the node's control groups is not in sight, but a container's own ({}): \
                         mount the node's /sys/fs/cgroup into the container, or use --cgroup=off",
                        all[0].display()
                    ),
                }
            }
        }
    }
}

/// All but the root have a type (Documentation/admin-guide/cgroup-v2.rst), also where a namespace shows
/// another group as the root.
fn is_root(group: &Path) -> bool {
    group.is_dir() && !group.join("cgroup.type").exists()
}

/// Where control groups of version 2 are mounted, of the text of /proc/PID/mountinfo.
fn mount_points(mountinfo: &str) -> Vec<PathBuf> {
    let of_line = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let is_v2 = after.split(' ').next() == Some("cgroup2");
        let path = before.split(' ').nth(4)?;
        // Of what the kernel writes as numbers (`mangle_path`), paths have spaces at most.
        is_v2.then(|| PathBuf::from(path.replace("\\040", " ")))
    };
    mountinfo.lines().filter_map(of_line).collect()
}

/// The programs for sockets, wherever they are attached.
pub struct SocketHooks {
    pins: PinDirectory,
    cgroup: Cgroup,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Of an earlier agent, or somebody may have changed it.
    Unknown,
    Attached,
    Detached,
    /// They could not be attached: not to be tried at each change.
    Failed,
}

impl SocketHooks {
    /// Attaches nothing yet.
    #[must_use]
    pub fn new(pins: PinDirectory, cgroup: Cgroup) -> Self {
        Self { pins, cgroup, state: State::Unknown }
    }

    /// Whether there is something to do to have them attached, or not, as far as that is known.
    #[must_use]
    pub fn differ(&self, wanted: bool) -> bool {
        match self.state {
            State::Unknown => true,
            State::Attached => !wanted,
            State::Detached => wanted && self.cgroup != Cgroup::Off,
            State::Failed => false,
        }
    }

    /// What is attached has to be looked at: somebody may have detached it. What has failed may be tried
    /// again.
    pub fn recheck(&mut self) {
        self.state = State::Unknown;
    }

    /// Attaches the programs, or replaces those that an earlier agent has left, without a connection in
    /// between; takes them off if sockets are not to be served.
    ///
    /// # Errors
    /// When there is no such control group, or the kernel refuses; what was attached stays.
    pub fn attach(&mut self, programs: &mut Kernel) -> Result<()> {
        let before = std::mem::replace(&mut self.state, State::Failed);
        let Some(directory) = self.cgroup.directory()? else { return self.leave() };
        let group = Group::open(&directory)?;
        for program in SOCKET_PROGRAMS {
            self.attach_one(programs, program, &group)
                .with_context(|| format!("attaching {} to {}", program.name, directory.display()))?;
        }
        self.remove(|number| number != group.number)?;
        self.state = State::Attached;
        if before != State::Attached {
            info!(cgroup = %directory.display(), "sockets of this node are served");
        }
        Ok(())
    }

    fn attach_one(&self, programs: &mut Kernel, program: SocketProgram, group: &Group) -> Result<()> {
        let name = pin_name(group.number, program);
        let path = self.pins.link(&name);
        let program = programs.socket_program(program)?;
        if path.exists() {
            let replaced = link_of_pin(&path)
                .and_then(|link| update(&link, program.fd().map_err(std::io::Error::other)?));
            if replaced.is_ok() {
                return self.pins.keep_link(&path);
            }
            // Detached by somebody, or the group is gone and another has its number.
            remove(&path)?;
        }
        // The kernel lets links of others be there, too, without being asked.
        let id = program.attach(&group.file, CgroupAttachMode::Single)?;
        let link = FdLink::try_from(program.take_link(id)?).map_err(|_| {
            anyhow!("the kernel lacks BPF links for control groups (Linux 5.7 or later has them)")
        })?;
        let path = self.pins.links().join(name);
        link.pin(&path).with_context(|| format!("pinning the link as {}", path.display()))?;
        Ok(())
    }

    /// Takes the programs off: sockets that have a backend keep it.
    ///
    /// # Errors
    /// When a pin cannot be removed.
    pub fn leave(&mut self) -> Result<()> {
        if self.remove(|_| true)? > 0 {
            info!("sockets of this node are not served any more");
        }
        self.state = State::Detached;
        Ok(())
    }

    /// Removes the pins of some groups.
    fn remove(&self, unwanted: impl Fn(u64) -> bool) -> Result<usize> {
        let group = |path: &PathBuf| path.file_name().and_then(|name| parse(&name.to_string_lossy()));
        let mut paths = self.pins.all_links()?;
        paths.retain(|path| group(path).is_some_and(&unwanted));
        // Backwards: what gives sockets a backend goes first.
        let rank = |path: &PathBuf| {
            SOCKET_PROGRAMS.iter().position(|program| path.to_string_lossy().ends_with(program.name))
        };
        paths.sort_by_key(|path| std::cmp::Reverse(rank(path)));
        paths.iter().try_for_each(|path| remove(path))?;
        Ok(paths.len())
    }
}

/// A control group.
struct Group {
    file: File,
    /// What the kernel calls it: the number of its directory.
    number: u64,
}

impl Group {
    fn open(directory: &Path) -> Result<Self> {
        let open = || -> std::io::Result<(File, u64)> {
            let file = File::open(directory)?;
            let number = file.metadata()?.ino();
            Ok((file, number))
        };
        let (file, number) =
            open().with_context(|| format!("opening the control group {}", directory.display()))?;
        let system = nix::sys::statfs::fstatfs(&file)?.filesystem_type().0;
        if system != CGROUP2_MAGIC {
            bail!(
                "{} is no control group of version 2: give --cgroup the path of one, as `mount -t cgroup2` \
                 lists them, or off",
                directory.display()
            );
        }
        Ok(Self { file, number })
    }
}

fn remove(path: &Path) -> Result<()> {
    fs::remove_file(path).with_context(|| format!("removing the pin {}", path.display()))
}

/// The name of a link's pin: of the group's number, so that a link to another group is not taken for it.
fn pin_name(group: u64, program: SocketProgram) -> String {
    format!("cgroup{group}-{}", program.name)
}

/// The group of a pin, if it is one of these.
fn parse(file: &str) -> Option<u64> {
    let (group, name) = file.strip_prefix("cgroup")?.split_once('-')?;
    let group = group.parse().ok()?;
    SOCKET_PROGRAMS.iter().any(|program| program.name == name).then_some(group)
}

/// Whether a pin in the directory of links is one of these.
pub(super) fn is_socket_hook(file: &str) -> bool {
    parse(file).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_pins() {
        assert_eq!(parse(&pin_name(7, SOCKET_PROGRAMS[0])), Some(7));
        for other in ["cgroup7", "7-connect_v4", "cgroupx-connect_v4", "cgroup7-egress", "7-egress"] {
            assert!(!is_socket_hook(other), "{other}");
        }
    }

    #[test]
    fn choices() {
        assert_eq!("auto".parse(), Ok(Cgroup::Auto));
        assert_eq!("off".parse(), Ok(Cgroup::Off));
        assert_eq!("/a/b".parse(), Ok(Cgroup::At("/a/b".into())));
        assert!("a/b".parse::<Cgroup>().unwrap_err().contains("/sys/fs/cgroup"));
    }

    #[test]
    fn mounts_of_version_2() {
        let text = "30 24 0:26 / /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory\n\
                    31 24 0:27 / /sys/fs/cgroup/uni\\040fied rw,nosuid shared:10 - cgroup2 cgroup2 rw\n\
                    32 24 0:27 /../.. /host/cgroup ro - cgroup2 cgroup2 rw\n\
                    no mount\n";
        let paths = ["/sys/fs/cgroup/uni fied", "/host/cgroup"].map(PathBuf::from);
        assert_eq!(mount_points(text), paths);
    }

    #[test]
    fn a_directory_that_is_no_group_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let error = Group::open(directory.path()).err().unwrap();
        assert!(error.to_string().contains("no control group of version 2"), "{error}");
        let error = Group::open(&directory.path().join("gone")).err().unwrap();
        assert!(error.to_string().contains("opening the control group"), "{error}");
    }
}
