//! The machine that the numbers are from, and a CPU for the benchmark.

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use serde::Serialize;

/// Named in every report.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Model name of the processor.
    pub processor: String,
    /// Number of CPUs.
    pub cpus: usize,
    /// Version of the kernel.
    pub kernel: String,
}

impl Machine {
    /// Reads what the kernel says of the machine.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn read() -> Result<Self> {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").context("reading /proc/cpuinfo")?;
        let processor = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.to_owned());
        let kernel =
            std::fs::read_to_string("/proc/sys/kernel/osrelease").context("reading the kernel's version")?;
        Ok(Self {
            processor,
            cpus: std::thread::available_parallelism()?.get(),
            kernel: kernel.trim().to_owned(),
        })
    }
}

/// Binds the calling thread to a CPU.
///
/// # Errors
/// When there is no such CPU.
pub fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("binding to CPU {cpu}"))
}

/// CPU time of the calling thread in nanoseconds: other work on the machine does not count.
///
/// # Errors
/// Never on Linux.
pub fn thread_time_ns() -> Result<u64> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    Ok(time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}
