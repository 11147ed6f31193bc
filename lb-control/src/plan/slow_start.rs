//! Backends that come to others get their share in steps, so that they can warm up.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use crate::model::SlowStart;

/// In how many steps a share grows. The shortest slow start is ten times as many tenths of a second: each
/// Service changes twice a second at most.
pub const STEPS: u32 = 10;

/// The backends of a Service entry that have begun to take connections lately.
#[derive(Clone, Debug, Default)]
pub struct Ramps {
    /// Who took connections when it was last asked.
    took: BTreeSet<SocketAddr>,
    /// Since when those take them whose share still grows.
    since: BTreeMap<SocketAddr, Duration>,
}

impl Ramps {
    /// Takes note of who takes connections at a moment. Those who were first, or are there when an agent
    /// starts, have their full share: there is nobody else.
    pub fn update(
        &mut self,
        takers: impl Iterator<Item = SocketAddr>,
        length: Option<SlowStart>,
        now: Duration,
    ) {
        let Some(length) = length else {
            *self = Self::default();
            return;
        };
        let takers: BTreeSet<_> = takers.collect();
        if !self.took.is_empty() {
            self.since.extend(takers.difference(&self.took).map(|address| (*address, now)));
        }
        self.since.retain(|address, since| takers.contains(address) && now < *since + length.duration());
        self.took = takers;
    }

    /// What a backend's weight is multiplied by: 1 for all unless some share grows. Then it is [`STEPS`]
    /// for those that have their full share.
    #[must_use]
    pub fn factor(&self, backend: &SocketAddr, length: Option<SlowStart>, now: Duration) -> u32 {
        match (self.since.get(backend), length) {
            _ if self.since.is_empty() => 1,
            (Some(since), Some(length)) => step(now.saturating_sub(*since), length),
            _ => STEPS,
        }
    }

    /// When the next share grows.
    #[must_use]
    pub fn next_step(&self, length: Option<SlowStart>, now: Duration) -> Option<Duration> {
        let length = length?;
        let next = |since: &Duration| {
            let step = step(now.saturating_sub(*since), length);
            *since + length.duration() * step / STEPS
        };
        self.since.values().map(next).min()
    }
}

/// The step that a backend is at, from 1 on.
fn step(age: Duration, length: SlowStart) -> u32 {
    let steps = age.as_nanos() * u128::from(STEPS) / length.duration().as_nanos();
    u32::try_from(steps).unwrap_or(STEPS).min(STEPS - 1) + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backends(numbers: &[u8]) -> impl Iterator<Item = SocketAddr> {
        numbers.iter().map(|number| ([10, 0, 0, *number], 80).into())
    }

    #[test]
    fn a_share_grows_to_its_end() {
        let length = Some("30s".parse().unwrap());
        let at = Duration::from_secs;
        let mut ramps = Ramps::default();
        let factors = |ramps: &Ramps, now| {
            backends(&[1, 2, 3]).map(|backend| ramps.factor(&backend, length, now)).collect::<Vec<_>>()
        };
        ramps.update(backends(&[1, 2]), length, at(100));
        assert_eq!((factors(&ramps, at(100)), ramps.next_step(length, at(100))), (vec![1; 3], None));
        ramps.update(backends(&[1, 2, 3]), length, at(200));
        for step in 0..10 {
            let now = at(200 + 3 * u64::from(step));
            ramps.update(backends(&[1, 2, 3]), length, now);
            assert_eq!(factors(&ramps, now), [10, 10, step + 1]);
            assert_eq!(ramps.next_step(length, now), Some(now + at(3)));
            assert_eq!(ramps.next_step(length, now + at(1)), Some(now + at(3)));
        }
        ramps.update(backends(&[1, 2, 3]), length, at(230));
        assert_eq!((factors(&ramps, at(230)), ramps.next_step(length, at(230))), (vec![1; 3], None));
    }

    #[test]
    fn who_goes_and_comes_back_begins_again() {
        let length = Some("30s".parse().unwrap());
        let at = Duration::from_secs;
        let mut ramps = Ramps::default();
        ramps.update(backends(&[1, 2]), length, at(0));
        ramps.update(backends(&[1]), length, at(1));
        ramps.update(backends(&[1, 2]), length, at(10));
        assert_eq!(ramps.next_step(length, at(10)), Some(at(13)));
        ramps.update(backends(&[1, 2]), None, at(11));
        assert_eq!(ramps.next_step(None, at(11)), None);
        // Turned on, it is about those who come from then on.
        ramps.update(backends(&[1, 2]), length, at(12));
        assert_eq!(ramps.next_step(length, at(12)), None);
    }
}
