//! Processes of load balancers: started so that they never outlive the benchmark, and what they use.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::bench::net::Namespace;

/// A process and its descendants, killed when dropped and when the benchmark dies.
#[derive(Debug)]
pub struct Process(Child);

impl Process {
    /// Starts a program in a namespace; what it says goes to `log`.
    ///
    /// Must be called by the main thread: the kernel ends the child with the thread that started it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(namespace: &Namespace, line: &[OsString], log: &Path) -> Result<Self> {
        ensure!(is_main_thread()?, "a process of the benchmark has to be started by its main thread");
        let log = File::create(log).with_context(|| format!("creating {}", log.display()))?;
        // The process namespace takes workers along, also those of a master that was killed.
        let child = Command::new("nsenter")
            .arg(format!("--net={}", namespace.path()))
            .args(["--", "setpriv", "--pdeathsig", "KILL", "--"])
            .args(["unshare", "--pid", "--fork", "--kill-child=KILL", "--"])
            .args(line)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {}", line[0].display()))?;
        Ok(Self(child))
    }

    /// Whether it has ended.
    ///
    /// # Errors
    /// Never on Linux.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.0.try_wait()?.is_some())
    }

    /// Its descendants, without the helper that started them.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn tree(&self) -> Result<Vec<u32>> {
        let mut parents = HashMap::new();
        for entry in fs::read_dir("/proc")? {
            let Some(id) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            // Some end meanwhile.
            let Ok(stat) = fs::read_to_string(format!("/proc/{id}/stat")) else { continue };
            // proc_pid_stat(5): after the name come the state and the parent.
            let after = stat.rsplit_once(") ").map_or("", |(_, after)| after);
            if let Some(parent) = after.split(' ').nth(1).and_then(|parent| parent.parse::<u32>().ok()) {
                parents.insert(id, parent);
            }
        }
        let root = self.0.id();
        let is_below = |id: &u32| {
            let mut at = *id;
            while let Some(parent) = parents.get(&at) {
                if *parent == root {
                    return true;
                }
                at = *parent;
            }
            false
        };
        let mut tree: Vec<u32> = parents.keys().copied().filter(is_below).collect();
        tree.sort_unstable();
        ensure!(!tree.is_empty(), "it has ended");
        Ok(tree)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn is_main_thread() -> io::Result<bool> {
    let task = fs::read_link("/proc/thread-self")?;
    Ok(task.file_name() == Some(std::process::id().to_string().as_ref()))
}

/// The calling thread, as its directory in /proc.
///
/// # Errors
/// When there is no /proc.
pub fn this_thread() -> Result<String> {
    let task = fs::read_link("/proc/thread-self").context("looking for the thread in /proc")?;
    Ok(format!("/proc/{}", task.display()))
}

/// CPU time that was used, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// By the load balancer's processes, softirqs that ran on their account included.
    pub balancer: f64,
    /// By the kernel's softirq threads, for whomever.
    pub softirq: f64,
    /// By the load generator and the server, softirqs that ran on their account included.
    pub ends: f64,
}

impl Usage {
    /// Of everybody: client, load balancer, server and softirq threads.
    #[must_use]
    pub fn path(&self) -> f64 {
        self.balancer + self.softirq + self.ends
    }

    /// What was used since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            balancer: self.balancer - before.balancer,
            softirq: self.softirq - before.softirq,
            ends: self.ends - before.ends,
        }
    }
}

/// Who is looked at.
#[derive(Clone, Debug, Default)]
pub struct Meter {
    /// Process ids of the load balancer.
    pub balancer: Vec<u32>,
    /// Softirq threads, as directories in /proc.
    pub softirq: Vec<String>,
    /// Threads of client and server, as directories in /proc.
    pub ends: Vec<String>,
}

impl Meter {
    /// What has been used so far.
    ///
    /// # Errors
    /// When one of them is gone.
    pub fn read(&self) -> Result<Usage> {
        let mut usage = Usage::default();
        for id in &self.balancer {
            for task in fs::read_dir(format!("/proc/{id}/task")).context("the load balancer has ended")? {
                // Threads may end meanwhile.
                usage.balancer += on_cpu(&task?.path()).unwrap_or_default();
            }
        }
        for thread in &self.softirq {
            usage.softirq += on_cpu(Path::new(thread))?;
        }
        for thread in &self.ends {
            usage.ends += on_cpu(Path::new(thread))?;
        }
        Ok(usage)
    }
}

/// Seconds that a thread was on a CPU: as utime + stime, but exact (sum_exec_runtime).
fn on_cpu(thread: &Path) -> Result<f64> {
    let text = fs::read_to_string(thread.join("schedstat"))
        .with_context(|| format!("reading the CPU time of {}", thread.display()))?;
    Ok(text.split(' ').next().unwrap_or_default().parse::<f64>()? / 1e9)
}

/// The kernel's softirq threads, as directories in /proc.
///
/// # Errors
/// When /proc cannot be read.
pub fn softirq_threads() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        if fs::read_to_string(path.join("comm")).is_ok_and(|name| name.starts_with("ksoftirqd/")) {
            found.push(path.display().to_string());
        }
    }
    Ok(found)
}

/// Anonymous memory of processes in bytes; what is shared is split among those who share it.
///
/// # Errors
/// When one of them has ended.
pub fn anonymous(processes: &[u32]) -> Result<f64> {
    let mut kibibytes = 0.0;
    for id in processes {
        let text = fs::read_to_string(format!("/proc/{id}/smaps_rollup")).context("reading its memory")?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pss_Anon:"));
        let value = line.and_then(|line| line.trim().strip_suffix(" kB")).context("no Pss_Anon")?;
        kibibytes += value.trim().parse::<f64>()?;
    }
    Ok(kibibytes * 1024.0)
}

/// How many pipes processes hold.
///
/// # Errors
/// When one of them has ended.
pub fn pipes(processes: &[u32]) -> Result<usize> {
    let mut pipes = HashSet::new();
    for id in processes {
        for entry in fs::read_dir(format!("/proc/{id}/fd")).context("reading its files")? {
            let Ok(target) = fs::read_link(entry?.path()) else { continue };
            if target.to_string_lossy().starts_with("pipe:") {
                pipes.insert(target);
            }
        }
    }
    Ok(pipes.len())
}
