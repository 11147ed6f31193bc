//! How the kernel divides a table of flows that begin among CPUs.
//!
//! Each CPU has a list of its own of a map with `BPF_F_NO_COMMON_LRU`, takes entries from that, and evicts
//! only from that. All lists are of one length, and every CPU that the machine may ever have gets one
//! (kernel/bpf/bpf_lru_list.c, `bpf_percpu_lru_populate`): virtual machines to which CPUs can be added
//! often count 128 and have four.

use anyhow::{Result, anyhow};
use aya::util::{nr_cpus, online_cpus};

/// A table becomes at most so many times as large for the sake of CPUs that are not there.
const MOST_FOLD: u64 = 4;
/// And at most this large, unless more was asked for: entries take their memory at once.
const MOST_BYTES: u64 = 256 << 20;
/// What the kernel's own part of an entry takes, roughly (`struct htab_elem`, a bucket).
const OVERHEAD: u64 = 64;

/// The CPUs of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpus {
    /// Those that there may ever be.
    pub possible: u32,
    /// Those that run.
    pub online: u32,
}

impl Cpus {
    /// Counts them.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn count() -> Result<Self> {
        let failed = |(path, error)| anyhow!("counting the CPUs by {path}: {error}");
        let possible = u32::try_from(nr_cpus().map_err(failed)?)?.max(1);
        let online = u32::try_from(online_cpus().map_err(failed)?.len())?;
        Ok(Self { possible, online: online.clamp(1, possible) })
    }

    /// How many entries a divided table has to have for the CPUs that run to find as many as `wanted`
    /// together: within bounds. `size` is that of a key and a value, in bytes.
    #[must_use]
    pub fn divided(self, wanted: u32, size: usize) -> u32 {
        let wanted = u64::from(wanted);
        let full = (wanted * u64::from(self.possible)).div_ceil(u64::from(self.online));
        let most = (wanted * MOST_FOLD).min(MOST_BYTES / (size as u64 + OVERHEAD));
        u32::try_from(full.min(most).max(wanted)).unwrap_or(u32::MAX)
    }

    /// How many entries of a divided table as many CPUs can use together.
    #[must_use]
    pub fn usable(self, entries: u32, cpus: u32) -> u32 {
        let cpus = cpus.min(self.possible);
        u32::try_from(u64::from(entries) * u64::from(cpus) / u64::from(self.possible)).unwrap_or(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_that_are_not_there_take_no_room_from_those_that_are() {
        for (possible, online, wanted, divided) in [
            (2, 2, 524_288, 524_288),
            (8, 4, 524_288, 1_048_576),
            (6, 4, 1_001, 1_502),
            // Bounded by how much larger it may become,
            (128, 4, 1_024, 4_096),
            // by its memory,
            (128, 4, 1_000_000, 1_677_721),
            // and never less than was asked for.
            (128, 4, 10_000_000, 10_000_000),
            (128, 4, u32::MAX, u32::MAX),
            (128, 128, 1, 1),
            (128, 4, 0, 0),
        ] {
            assert_eq!(
                Cpus { possible, online }.divided(wanted, 96),
                divided,
                "{possible} {online} {wanted}"
            );
        }
    }

    #[test]
    fn what_some_cpus_can_use_is_their_part() {
        let cpus = Cpus { possible: 128, online: 4 };
        assert_eq!(cpus.usable(524_288, 4), 16_384);
        assert_eq!(cpus.usable(524_288, 1), 4_096);
        assert_eq!(cpus.usable(524_288, 128), 524_288);
        assert_eq!(cpus.usable(u32::MAX, 300), u32::MAX);
    }

    #[test]
    fn this_machine_has_cpus() {
        let cpus = Cpus::count().unwrap();
        assert!((1..=cpus.possible).contains(&cpus.online), "{cpus:?}");
    }
}
