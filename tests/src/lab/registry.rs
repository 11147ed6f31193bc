//! What this process made on the machine, so that nothing is left behind: neither when a test
//! fails, nor on Ctrl-C, nor (at the next start) after `kill -9`.
//!
//! Every name starts with `pm-<pid of the owner>-`.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, Once, PoisonError},
};

use super::control_group::own_group;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Where `ip netns` keeps named namespaces.
pub const NETNS_DIR: &str = "/run/netns";
/// The BPF file system, below which agents of labs pin.
pub const BPF_DIR: &str = "/sys/fs/bpf";

static MADE: Mutex<Made> = Mutex::new(Made {
    namespaces: BTreeSet::new(),
    processes: BTreeSet::new(),
    directories: BTreeSet::new(),
});
static SWEEP: Once = Once::new();

struct Made {
    namespaces: BTreeSet<String>,
    processes: BTreeSet<u32>,
    directories: BTreeSet<PathBuf>,
}

fn made() -> MutexGuard<'static, Made> {
    MADE.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn add_namespace(name: &str) {
    made().namespaces.insert(name.to_owned());
}

pub(super) fn add_process(pid: u32) {
    made().processes.insert(pid);
}

/// To be called before the process is reaped: its id may then be somebody else's.
pub(super) fn forget_process(pid: u32) {
    made().processes.remove(&pid);
}

pub(crate) fn add_directory(path: &Path) {
    made().directories.insert(path.to_owned());
}

pub(super) fn remove_namespace(name: &str) {
    if made().namespaces.remove(name) {
        delete_namespace(name);
    }
}

pub(crate) fn remove_directory(path: &Path) {
    if made().directories.remove(path) {
        delete_directory(path);
    }
}

/// Removes everything that this process made and has not removed yet. For signal handlers (the
/// thread kind): labs that are still in use break.
pub fn remove_all() {
    // Kept locked to the end, so that no other thread makes more or removes the same.
    let mut made = made();
    for pid in std::mem::take(&mut made.processes) {
        terminate(pid);
    }
    for name in std::mem::take(&mut made.namespaces) {
        delete_namespace(&name);
    }
    for path in std::mem::take(&mut made.directories) {
        delete_directory(&path);
    }
    std::mem::forget(made);
}

/// Removes, once, what owners that are no more have left behind.
pub(crate) fn sweep_dead_owners() {
    SWEEP.call_once(|| {
        for name in entries(Path::new(NETNS_DIR)).into_iter().filter(|name| owner_is_dead(name)) {
            eprintln!("lab: removing namespace {name}, left behind by a process that is gone");
            // Its owner made the namespace, so what runs in it was started for the lab.
            for pid in processes_in(&name) {
                terminate(pid);
            }
            delete_namespace(&name);
        }
        for directory in [PathBuf::from(BPF_DIR), std::env::temp_dir()].into_iter().chain(own_group()) {
            for name in entries(&directory).into_iter().filter(|name| owner_is_dead(name)) {
                delete_directory(&directory.join(name));
            }
        }
    });
}

/// Processes in a named namespace.
#[must_use]
pub fn processes_in(namespace: &str) -> Vec<u32> {
    let output = Command::new("ip").args(["netns", "pids", namespace]).output();
    let Ok(output) = output else { return Vec::new() };
    String::from_utf8_lossy(&output.stdout).split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// `pm-<pid>-…` of a process that does not exist.
fn owner_is_dead(name: &str) -> bool {
    let Some((pid, _)) = name.strip_prefix("pm-").and_then(|rest| rest.split_once('-')) else { return false };
    pid.parse::<u32>().is_ok_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

fn entries(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn terminate(pid: u32) {
    let Ok(pid) = i32::try_from(pid) else { return };
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

fn delete_namespace(name: &str) {
    match Command::new("ip").args(["netns", "del", name]).output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            eprintln!("lab: cannot remove {name}: {}", String::from_utf8_lossy(&output.stderr).trim())
        }
        Err(error) => eprintln!("lab: cannot remove {name}: cannot run ip: {error}"),
    }
}

fn delete_directory(path: &Path) {
    // A control group goes in one step; what looks like files in it cannot be removed.
    let removed = fs::remove_dir(path).or_else(|error| match error.kind() {
        io::ErrorKind::DirectoryNotEmpty => fs::remove_dir_all(path),
        _ => Err(error),
    });
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            eprintln!("lab: cannot remove {}: {error}", path.display());
        }
        _ => {}
    }
}
