//! Reads the files; what has not changed is not decoded again.

use std::collections::HashSet;
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    decode::{Decoded, decode},
    merge::{FileState, Merger, Snapshot},
};

/// Reads a configuration again and again.
pub struct Reader {
    path: PathBuf,
    cache: BTreeMap<PathBuf, (Vec<u8>, Arc<Decoded>)>,
    merger: Merger,
}

impl Reader {
    /// For a file or a directory.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, cache: BTreeMap::new(), merger: Merger::default() }
    }

    /// The file or directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads everything. Never fails: what is wrong is in the snapshot.
    pub fn load(&mut self) -> Snapshot {
        match list(&self.path) {
            Ok(paths) => {
                let known: HashSet<_> = paths.iter().collect();
                self.cache.retain(|path, _| known.contains(path));
                let files: Vec<_> = paths
                    .iter()
                    .filter_map(|path| Some((path.display().to_string(), self.read(path)?)))
                    .collect();
                self.merger.merge(&files);
            }
            Err(error) => {
                self.merger.missing(&self.path.display().to_string(), &format!("cannot be read: {error}"))
            }
        }
        self.merger.snapshot()
    }

    /// `None` if the file has gone since the directory was listed.
    fn read(&mut self, path: &Path) -> Option<FileState> {
        let bytes = match read_regular(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // A dangling link is there, and wrong; a name that has gone is not there.
                return fs::symlink_metadata(path)
                    .is_ok()
                    .then(|| FileState::Unopenable(format!("cannot be read: {error}")));
            }
            Err(error) => return Some(FileState::Unopenable(format!("cannot be read: {error}"))),
        };
        if let Some((old, decoded)) = self.cache.get(path)
            && *old == bytes
        {
            return Some(FileState::Read(decoded.clone()));
        }
        let decoded = match str::from_utf8(&bytes) {
            Ok(text) => Arc::new(decode(&path.display().to_string(), text)),
            Err(error) => return Some(FileState::Unopenable(format!("is no UTF-8 text: {error}"))),
        };
        self.cache.insert(path.to_owned(), (bytes, decoded.clone()));
        Some(FileState::Read(decoded))
    }
}

/// Opening a named pipe would wait for somebody to write to it.
fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("is no regular file"));
    }
    fs::read(path)
}

/// The files that a path stands for, in their order.
pub(super) fn list(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !fs::metadata(path)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut paths = Vec::new();
    for entry in fs::read_dir(path)? {
        let path = entry?.path();
        let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        let extension = path.extension().and_then(|extension| extension.to_str());
        if !is_hidden && matches!(extension, Some("yaml" | "yml" | "json")) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}
