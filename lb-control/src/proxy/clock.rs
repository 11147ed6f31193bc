//! The proxy's clock.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Time since boot, to a few milliseconds. Zero if the clock cannot be read, which Linux never answers
/// for this one.
#[must_use]
pub fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map_or(Duration::ZERO, Duration::from)
}

/// The same in milliseconds.
#[must_use]
pub fn milliseconds() -> u64 {
    in_milliseconds(now())
}

/// A time in milliseconds.
#[must_use]
pub fn in_milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
