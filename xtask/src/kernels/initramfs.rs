//! The root of a virtual machine: an archive in the kernel's own format (`newc` of cpio, see
//! Documentation/driver-api/early-userspace/buffer-format.rst), which can hold what an ordinary user
//! could not make, like devices.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::image::libraries;
use crate::process;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// An archive under way.
#[derive(Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    names: BTreeSet<String>,
}

impl Initramfs {
    /// A root with the console, where the first process finds its input and output.
    pub fn new() -> Self {
        let mut root = Self::default();
        for directory in ["dev", "proc", "sys", "run", "tmp", "etc"] {
            root.directory(directory);
        }
        root.entry("dev/console", CHARACTER_DEVICE, (5, 1), &[]);
        root.entry("dev/null", CHARACTER_DEVICE, (1, 3), &[]);
        root
    }

    /// A file that can be executed, and the directories that it lies in. What is there already stays.
    pub fn file(&mut self, path: &str, content: &[u8]) {
        let path = path.trim_start_matches('/');
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
        self.entry(path, PROGRAM, (0, 0), content);
    }

    /// A program of this machine with the libraries that it needs, without debug information.
    pub fn program(&mut self, path: &str, program: &Path) -> Result<()> {
        self.file(path, &stripped(program)?);
        for library in libraries(program)? {
            let content = fs::read(&library).with_context(|| format!("cannot read {}", library.display()))?;
            self.file(&library.display().to_string(), &content);
        }
        Ok(())
    }

    /// The archive's bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn directory(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
        self.entry(path, DIRECTORY, (0, 0), &[]);
    }

    fn entry(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        if !self.names.insert(name.to_owned()) {
            return;
        }
        let (number, links, size) = (self.names.len() as u32, 1, content.len() as u32);
        // Magic; then inode, mode, user, group, links, time, size, device of the file (major and
        // minor), device that it is, size of the name, checksum.
        self.bytes.extend_from_slice(b"070701");
        for field in [number, mode, 0, 0, links, 0, size, 0, 0, major, minor, name.len() as u32 + 1, 0] {
            write!(self.bytes, "{field:08x}").expect("memory can be written to");
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

fn stripped(program: &Path) -> Result<Vec<u8>> {
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let copy: PathBuf = std::env::temp_dir().join(format!("xtask-strip-{}-{name}", std::process::id()));
    let strip = process::probe(Command::new("strip").arg("-o").arg(&copy).arg(program));
    // Without `strip` it is only larger.
    let result = fs::read(if strip.is_some() { &copy } else { program });
    fs::remove_file(&copy).ok();
    result.with_context(|| format!("cannot read {}", program.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_directories_come_first_and_once() {
        let mut root = Initramfs::default();
        root.file("/a/b/one", b"12345");
        root.file("/a/b/two", b"");
        let bytes = root.finish();
        assert_eq!(bytes.len() % 4, 0);
        let mut names = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            assert_eq!(&bytes[at..at + 6], b"070701", "at {at}");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[at + 6 + n * 8..at + 14 + n * 8]).unwrap();
                usize::from_str_radix(text, 16).unwrap()
            };
            let (size, name_size) = (field(6), field(11));
            let name = &bytes[at + 110..at + 110 + name_size - 1];
            names.push((String::from_utf8(name.to_vec()).unwrap(), size));
            at = (at + 110 + name_size).next_multiple_of(4) + size.next_multiple_of(4);
        }
        let names: Vec<_> = names.iter().map(|(name, size)| (name.as_str(), *size)).collect();
        assert_eq!(names, [("a", 0), ("a/b", 0), ("a/b/one", 5), ("a/b/two", 0), ("TRAILER!!!", 0)]);
    }
}
