//! The datapath's clock.

use lb_common::abi::{TICK_SHIFT, Tick};
use nix::time::{ClockId, clock_gettime};

/// The time as the kernel programs see it (`bpf_ktime_get_coarse_ns`). 0 if the clock cannot be
/// read, which Linux never answers for this clock.
#[must_use]
pub fn now() -> Tick {
    clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map_or(0, |time| {
        let nanoseconds = time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64;
        (nanoseconds >> TICK_SHIFT) as Tick
    })
}

/// Seconds from one time to a later one.
#[must_use]
pub fn seconds(ticks: Tick) -> f64 {
    f64::from(ticks) * f64::from(1u32 << TICK_SHIFT) / 1e9
}
