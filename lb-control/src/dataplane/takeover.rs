//! Pins of other layout versions: of the previous one, which are taken over while packets go on; of
//! older ones, which are removed; of newer ones, which are left alone.
//!
//! Taking over has three steps, and each may be the last one of an agent that is killed: the next one
//! finds what is done and does the rest.
//!
//! 1. The maps that go on ([`CARRIED`]) are pinned here, too, and the programs are loaded over them:
//!    [`Versions::take_over`]. The old programs are attached, and work with the same maps.
//! 2. The new program takes the old one's place in each link, and the link's pin moves here
//!    ([`PinDirectory::keep_link`]). Until then an old program finds those that it calls in the previous
//!    version's own program array, which the kernel empties with its last pin.
//! 3. When no link is left there, what else the previous version has pinned goes: [`retire`].
//!
//! Until the second step nothing has been taken: an agent that cannot begin removes what it has made
//! ([`PinLock::give_back`](super::PinLock::give_back)), so that the earlier one can be started again.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use aya::maps::MapData;
use lb_common::abi::previous::{self, CARRIED, Carried};
use lb_common::abi::{ABI_VERSION, maps};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tracing::{info, warn};

use super::PinDirectory;
use super::classifiers::detach_filter;
use super::pins::{LINKS, pins_in, remove_files};

/// The directory of another version.
#[derive(Debug)]
struct Version {
    number: u32,
    path: PathBuf,
    /// Whether there are links or a complete set of maps, and not only what an agent has left that
    /// could not begin.
    is_in_use: bool,
    /// Whether there are links: then its programs may be attached.
    has_links: bool,
    /// Held for as long as this is; `None` if an agent is at work there.
    lock: Option<Flock<fs::File>>,
}

/// All other versions that have a directory. For as long as this lives, agents of those versions cannot
/// begin.
#[derive(Debug)]
pub struct Versions {
    all: Vec<Version>,
}

impl Versions {
    /// Looks at the directory of all versions, and changes nothing.
    ///
    /// # Errors
    /// When an agent must not begin here: a newer one has been here, or an older one is at work, or
    /// what the previous version has pinned is not what it says.
    pub fn examine(root: &Path) -> Result<Self> {
        let mut all = Vec::new();
        for path in pins_in(root)? {
            let number = path.file_name().and_then(|name| number(&name.to_string_lossy()));
            let Some(number) = number.filter(|number| *number != ABI_VERSION) else { continue };
            let lock = lock(&path)?;
            let (is_in_use, has_links) = (is_in_use(&path)?, has_links(&path)?);
            all.push(Version { number, path, is_in_use, has_links, lock });
        }
        all.sort_by_key(|version| version.number);
        for version in &all {
            refuse(version)?;
            if version.number == previous::VERSION {
                CARRIED.iter().try_for_each(|map| check(map, &version.path))?;
            }
        }
        Ok(Self { all })
    }

    /// Shares the previous version's maps, and removes what older ones have left.
    ///
    /// # Errors
    /// When a pin cannot be made or removed.
    pub fn take_over(&self, pins: &PinDirectory) -> Result<()> {
        for version in self.all.iter().filter(|version| version.number < ABI_VERSION) {
            if version.number == previous::VERSION && version.is_in_use {
                if version.has_links && pins_in(&pins.links())?.is_empty() {
                    // Of an agent that did not get to attach anything, however long ago: since then,
                    // the earlier version may have made maps anew.
                    pins.clear()?;
                }
                let count = carry(&version.path, pins)?;
                info!(
                    maps = count,
                    "taking over from an agent of map layout v{}: its connections go on", version.number
                );
                continue;
            }
            if version.is_in_use {
                warn!(
                    "an agent of map layout v{} was here, which is older than v{}, the oldest that can be taken \
                     over: its maps and programs are removed, and its connections end",
                    version.number,
                    previous::VERSION
                );
            }
            remove(&version.path)?;
        }
        Ok(())
    }
}

impl Versions {
    /// Whether the previous version has left something to take over.
    pub fn is_upgrade(&self) -> bool {
        self.all.iter().any(|version| version.number == previous::VERSION && version.is_in_use)
    }
}

/// The other versions that have maps or programs in the directory of all versions.
///
/// # Errors
/// When a directory cannot be read.
pub(super) fn in_use(root: &Path) -> Result<Vec<u32>> {
    let mut all = Vec::new();
    for path in pins_in(root)? {
        let number = path.file_name().and_then(|name| number(&name.to_string_lossy()));
        if let Some(number) = number.filter(|number| *number != ABI_VERSION)
            && is_in_use(&path)?
        {
            all.push(number);
        }
    }
    all.sort_unstable();
    Ok(all)
}

fn is_in_use(version: &Path) -> Result<bool> {
    Ok(version.join(maps::CONFIG.name).exists() || has_links(version)?)
}

fn has_links(version: &Path) -> Result<bool> {
    Ok(!pins_in(&version.join(LINKS))?.is_empty())
}

/// Removes what the previous version has left, once none of its programs is attached any more. Costs
/// nothing when there is nothing.
///
/// # Errors
/// When a pin cannot be removed.
pub fn retire(previous: &Path) -> Result<()> {
    if !previous.exists() || !pins_in(&previous.join(LINKS))?.is_empty() {
        return Ok(());
    }
    remove(previous)?;
    info!("nothing of map layout v{} is in use any more: its pins are removed", previous::VERSION);
    Ok(())
}

/// Removes the directory of a version, what it holds attached first.
pub(super) fn remove(version: &Path) -> Result<()> {
    let links = version.join(LINKS);
    for pin in pins_in(&links)? {
        detach_filter(&pin);
    }
    for directory in [links.as_path(), version] {
        remove_files(directory).with_context(|| format!("removing the pins in {}", directory.display()))?;
    }
    Ok(())
}

/// The number of a version, from the name of its directory.
fn number(name: &str) -> Option<u32> {
    let digits = name.strip_prefix('v')?;
    let number = digits.parse().ok()?;
    (format!("{number}") == digits).then_some(number)
}

fn lock(path: &Path) -> Result<Option<Flock<fs::File>>> {
    let directory = fs::File::open(path).with_context(|| format!("opening {}", path.display()))?;
    match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error).with_context(|| format!("locking {}", path.display())),
    }
}

/// Whether an agent of this version may begin beside what is there.
fn refuse(version: &Version) -> Result<()> {
    let (number, path) = (version.number, version.path.display());
    // Maps without a link are of one that could not begin: it keeps nobody from going back.
    if version.number > ABI_VERSION && (version.has_links || version.lock.is_none()) {
        bail!(
            "{path} holds maps and programs of a newer agent (map layout v{number}; this one knows v{ABI_VERSION} and \
             v{}): they stay as they are and go on forwarding. Start the newer agent again; or, to go back \
             and lose its connections, run it with --on-exit=withdraw and end it with SIGTERM, or remove the \
             directory (rm -r {path})",
            previous::VERSION
        );
    }
    ensure!(
        version.lock.is_some(),
        "another agent (map layout v{number}) keeps its maps in {path}: end it first, with --on-exit=keep if its \
         connections are to go on, or choose another --pin-dir"
    );
    Ok(())
}

/// Refuses a map that says it is of the previous version and is not: with it, every packet would be
/// misread.
fn check(expected: &Carried, version: &Path) -> Result<()> {
    let path = version.join(expected.name);
    if !path.exists() {
        return Ok(());
    }
    let found = open(&path)?.info()?;
    let kind = found.map_type().ok().map(|kind| kind as u32);
    let is_it = kind == Some(expected.kind as u32)
        && found.key_size() == expected.key_size
        && found.value_size() == expected.value_size;
    ensure!(
        is_it,
        "the map {} is not one of map layout v{} (keys of {} bytes, values of {}; expected {} and {}): an agent \
         that was never released has made it. Remove the directory {} (rm -r), which ends its connections",
        path.display(),
        previous::VERSION,
        found.key_size(),
        found.value_size(),
        expected.key_size,
        expected.value_size,
        version.display()
    );
    Ok(())
}

/// Pins the maps that go on in our directory, too, unless they are there. Gives their number.
fn carry(previous: &Path, pins: &PinDirectory) -> Result<usize> {
    let mut count = 0;
    // Slots may have to grow: `growth`.
    for map in CARRIED.iter().filter(|map| map.name != maps::SLOTS.name) {
        let (from, to) = (previous.join(map.name), pins.path(map.name));
        if to.exists() || !from.exists() {
            continue;
        }
        open(&from)?.pin(&to).with_context(|| format!("pinning {} as {}", from.display(), to.display()))?;
        count += 1;
    }
    Ok(count)
}

fn open(path: &Path) -> Result<MapData> {
    MapData::from_pin(path).with_context(|| format!("opening the pinned map {}", path.display()))
}

#[cfg(test)]
mod tests {
    use lb_common::abi::previous::VERSION;

    use super::*;

    fn at(number: u32, has_links: bool, is_locked: bool) -> Version {
        let directory = tempfile::tempdir().unwrap();
        let lock = if is_locked { None } else { lock(directory.path()).unwrap() };
        Version { number, path: format!("/pins/v{number}").into(), is_in_use: true, has_links, lock }
    }

    #[test]
    fn names_of_directories() {
        assert_eq!(number("v3"), Some(3));
        assert_eq!(number("v12"), Some(12));
        for other in ["3", "v", "v03", "v+3", "v3a", "links", "vv3"] {
            assert_eq!(number(other), None, "{other}");
        }
    }

    #[test]
    fn what_an_agent_may_begin_beside() {
        let newer = ABI_VERSION + 1;
        for (version, word) in [
            (at(newer, true, false), "newer agent"),
            (at(newer, true, true), "newer agent"),
            (at(newer, false, true), "newer agent"),
            (at(previous::VERSION, true, true), "end it first"),
            (at(1, false, true), "end it first"),
        ] {
            let error = refuse(&version).unwrap_err().to_string();
            let path = format!("/pins/v{}", version.number);
            assert!(error.contains(word) && error.contains(&path), "{version:?}: {error}");
        }
        for version in [at(newer, false, false), at(previous::VERSION, true, false), at(1, true, false)] {
            refuse(&version).unwrap();
        }
    }

    #[test]
    fn only_other_versions_are_looked_at_and_nothing_is_made() {
        let root = tempfile::tempdir().unwrap();
        for name in ["v2", "other", &format!("v{ABI_VERSION}")] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        let versions = Versions::examine(root.path()).unwrap();
        assert_eq!(versions.all.iter().map(|version| version.number).collect::<Vec<_>>(), [2]);
        assert!(!versions.all[0].is_in_use);
        assert_eq!(in_use(root.path()).unwrap(), [0; 0]);
        assert_eq!(Versions::examine(&root.path().join("nowhere")).unwrap().all.len(), 0);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 3);
    }

    #[test]
    fn a_version_at_work_is_seen() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("v1");
        fs::create_dir(&path).unwrap();
        let held = lock(&path).unwrap();
        assert!(held.is_some());
        let error = Versions::examine(root.path()).unwrap_err().to_string();
        assert!(error.contains("end it first"), "{error}");
        drop(held);
        Versions::examine(root.path()).unwrap();
    }

    #[test]
    fn the_previous_version_goes_only_when_nothing_is_attached() {
        let root = tempfile::tempdir().unwrap();
        let previous = root.path().join(format!("v{VERSION}"));
        retire(&previous).unwrap();
        fs::create_dir_all(previous.join(LINKS)).unwrap();
        fs::write(previous.join("config"), "").unwrap();
        let link = previous.join(LINKS).join("7-native");
        fs::write(&link, "").unwrap();
        assert_eq!(in_use(root.path()).unwrap(), [VERSION]);
        retire(&previous).unwrap();
        assert!(previous.join("config").exists());
        fs::remove_file(link).unwrap();
        retire(&previous).unwrap();
        assert!(!previous.exists());
    }
}
