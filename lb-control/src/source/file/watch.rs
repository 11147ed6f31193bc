//! Follows changes of the files.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode},
};
use tokio::{
    sync::{mpsc, watch},
    task::{self, JoinHandle},
    time::{Instant, timeout, timeout_at},
};

use super::{merge::Snapshot, read};

/// When files are read again.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Read once changes have ceased for this long…
    pub quiet: Duration,
    /// …but at the latest this long after the first one.
    pub at_latest: Duration,
    /// Read without any sign of a change: network file systems give none.
    pub rescan: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            quiet: Duration::from_millis(50),
            at_latest: Duration::from_millis(500),
            rescan: Duration::from_secs(30),
        }
    }
}

/// Follows a configuration until it is dropped.
pub struct Watcher {
    /// The newest snapshot; changes only when objects or problems do.
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    task: JoinHandle<()>,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Reads a file or directory and then follows its changes. Blocks for as long as the first reading
/// takes.
///
/// # Errors
/// When there is nothing at the path, or inotify is not to be had. What is wrong inside of files
/// is no error but a problem in the snapshot.
pub fn watch(path: &Path, settings: Settings) -> Result<Watcher> {
    read::list(path).with_context(|| format!("--config {}: cannot be read", path.display()))?;
    let (sender, signs) = mpsc::unbounded_channel();
    let inotify = notify::recommended_watcher(move |event| {
        // The other end is gone only when nobody wants to know any more.
        let _ = sender.send(event);
    })
    .context("cannot watch files (are fs.inotify.max_user_instances or max_user_watches used up?)")?;
    let mut follower =
        Follower { inotify, watched: BTreeMap::new(), reader: read::Reader::new(path.to_owned()) };
    // First watch, then read: a change in between is seen.
    follower.rewatch();
    let first = Arc::new(follower.reader.load());
    let (publish, snapshots) = watch::channel(first);
    let task = tokio::spawn(follow(follower, signs, publish, settings));
    Ok(Watcher { snapshots, task })
}

type Sign = notify::Result<Event>;

async fn follow(
    mut follower: Follower,
    mut signs: mpsc::UnboundedReceiver<Sign>,
    publish: watch::Sender<Arc<Snapshot>>,
    settings: Settings,
) {
    loop {
        match timeout(settings.rescan, signs.recv()).await {
            Ok(None) => return,
            Ok(Some(sign)) => {
                if !follower.concerns(&sign) {
                    continue;
                }
                settle(&mut signs, settings).await;
            }
            Err(_) => {}
        }
        let Ok((snapshot, back)) = task::spawn_blocking(move || {
            // Watches first: a change while reading must give another sign.
            follower.rewatch();
            (follower.reader.load(), follower)
        })
        .await
        else {
            return;
        };
        follower = back;
        publish.send_if_modified(|current| {
            let differs = **current != snapshot;
            if differs {
                *current = Arc::new(snapshot);
            }
            differs
        });
    }
}

/// Waits until no sign has come for a while.
async fn settle(signs: &mut mpsc::UnboundedReceiver<Sign>, settings: Settings) {
    let deadline = Instant::now() + settings.at_latest;
    while let Ok(Some(_)) = timeout_at(deadline.min(Instant::now() + settings.quiet), signs.recv()).await {}
}

/// What of a directory matters.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Interest {
    All,
    Names(BTreeSet<OsString>),
}

struct Watched {
    interest: Interest,
    /// A directory that takes the place of another has another inode, and needs a new watch.
    inode: (u64, u64),
}

struct Follower {
    inotify: RecommendedWatcher,
    watched: BTreeMap<PathBuf, Watched>,
    reader: read::Reader,
}

impl Follower {
    /// Whether a sign is about the configuration. Reading files gives signs too, and directories
    /// on the way to them may be busy with other things.
    fn concerns(&self, sign: &Sign) -> bool {
        let Ok(event) = sign else { return true };
        if let EventKind::Access(kind) = event.kind
            && kind != AccessKind::Close(AccessMode::Write)
        {
            return false;
        }
        if event.need_rescan() || event.paths.is_empty() {
            return true;
        }
        event.paths.iter().any(|path| {
            if self.watched.contains_key(path) {
                return true;
            }
            match path.parent().and_then(|parent| self.watched.get(parent)).map(|watched| &watched.interest) {
                Some(Interest::All) => true,
                Some(Interest::Names(names)) => path.file_name().is_some_and(|name| names.contains(name)),
                None => false,
            }
        })
    }

    /// Watches the directories that matter now. What cannot be watched is left to the rescan.
    fn rewatch(&mut self) {
        let wanted = interests(self.reader.path());
        let watched = std::mem::take(&mut self.watched);
        for (path, old) in watched {
            if wanted.contains_key(&path) && inode(&path) == Some(old.inode) {
                self.watched.insert(path, old);
            } else {
                // Fails when the directory is gone, and its watch with it.
                let _ = self.inotify.unwatch(&path);
            }
        }
        for (path, interest) in wanted {
            if let Some(watched) = self.watched.get_mut(&path) {
                watched.interest = interest;
            } else if let Some(inode) = inode(&path)
                && self.inotify.watch(&path, RecursiveMode::NonRecursive).is_ok()
            {
                self.watched.insert(path, Watched { interest, inode });
            }
        }
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// The directories in which a change can change the configuration.
fn interests(path: &Path) -> BTreeMap<PathBuf, Interest> {
    let mut interests = BTreeMap::new();
    let Ok(path) = std::path::absolute(path) else { return interests };
    let end = trace(&path, &mut interests);
    if end.is_dir() {
        interests.insert(end.clone(), Interest::All);
        for file in read::list(&end).unwrap_or_default() {
            trace(&file, &mut interests);
        }
    }
    interests
}

/// Follows a path to its end, and notes every name on the way that, if it were changed, would make
/// it lead elsewhere: links, the end itself, and what is missing.
fn trace(path: &Path, interests: &mut BTreeMap<PathBuf, Interest>) -> PathBuf {
    /// As the kernel has it (MAXSYMLINKS in include/linux/namei.h).
    const MAXIMUM_LINKS: usize = 40;
    let mut note = |directory: &Path, name: OsString| {
        let interest =
            interests.entry(directory.to_owned()).or_insert_with(|| Interest::Names(BTreeSet::new()));
        if let Interest::Names(names) = interest {
            names.insert(name);
        }
    };
    let mut links = 0;
    let mut rest: Vec<OsString> = segments(path);
    let mut current = PathBuf::from("/");
    while let Some(segment) = rest.pop() {
        if segment == ".." {
            current.pop();
            continue;
        }
        let next = current.join(&segment);
        let metadata = fs::symlink_metadata(&next);
        let is_link = metadata.as_ref().is_ok_and(fs::Metadata::is_symlink);
        if is_link || metadata.is_err() || rest.is_empty() {
            note(&current, segment);
        }
        match fs::read_link(&next) {
            Ok(target) if is_link && links < MAXIMUM_LINKS => {
                links += 1;
                if target.is_absolute() {
                    current = PathBuf::from("/");
                }
                rest.extend(segments(&target));
            }
            _ => current = next,
        }
        if metadata.is_err() {
            break;
        }
    }
    current
}

/// The names in a path, last one first.
fn segments(path: &Path) -> Vec<OsString> {
    let names = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    });
    let mut names: Vec<OsString> = names.collect();
    names.reverse();
    names
}

#[cfg(test)]
mod tests;
