//! Devices that no way to a backend leads by any more, while replies may still come in by them.
//!
//! A connection keeps the node's address that it was given towards its backend, so its replies come in
//! by the device of that address, wherever routes lead by now. Without a program there, the node's stack
//! would get them, know no such connection, and reset it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// A sweep of the flow tables may have begun before a device was left; the next one has not.
const SWEEPS: u8 = 2;

/// Remembers by which devices replies may come in. By name: a device that is made anew has another
/// index, and gets the same replies.
#[derive(Clone, Debug, Default)]
pub struct Leaving {
    devices: BTreeMap<String, Device>,
}

#[derive(Clone, Debug, Default)]
struct Device {
    /// The node's addresses that connections were given towards backends behind it.
    sources: BTreeSet<IpAddr>,
    /// Whether there may be connections with other addresses, of an agent before this one.
    has_more: bool,
    /// How many sweeps there have been since it was left; `None` while it is in use.
    sweeps: Option<u8>,
}

impl Leaving {
    /// Takes note of a device that an agent before this one has attached the datapath to.
    pub fn adopt(&mut self, device: String) {
        let device = self.devices.entry(device).or_default();
        (device.has_more, device.sweeps) = (true, Some(0));
    }

    /// Takes note of the addresses that connections are given towards backends behind a device.
    pub fn give(&mut self, device: &str, sources: &[IpAddr]) {
        match self.devices.get_mut(device) {
            Some(known) => known.sources.extend(sources),
            None => {
                let sources = sources.iter().copied().collect();
                self.devices.insert(device.to_owned(), Device { sources, ..Device::default() });
            }
        }
    }

    /// Takes note of which devices are in use. Gives those that were until now.
    pub fn look(&mut self, in_use: &BTreeSet<&str>) -> Vec<String> {
        for name in in_use.iter().filter(|name| !self.devices.contains_key(**name)).collect::<Vec<_>>() {
            self.devices.insert((*name).to_owned(), Device::default());
        }
        let mut left = Vec::new();
        for (name, device) in &mut self.devices {
            if in_use.contains(name.as_str()) {
                device.sweeps = None;
            } else if device.sweeps.is_none() {
                device.sweeps = Some(0);
                left.push(name.clone());
            }
        }
        left
    }

    /// Whether a device is to stay attached although it is not in use.
    #[must_use]
    pub fn keeps(&self, device: &str) -> bool {
        self.devices.get(device).is_some_and(|device| device.sweeps.is_some())
    }

    /// Takes note of a sweep, which has found open connections with these addresses of the node. Says
    /// whether some device need not be kept any more.
    pub fn swept(&mut self, sources: &BTreeSet<IpAddr>) -> bool {
        let known: BTreeSet<_> = self.devices.values().flat_map(|device| &device.sources).copied().collect();
        let has_others = !sources.is_subset(&known);
        let before = self.devices.len();
        self.devices.retain(|_, device| {
            device.has_more &= has_others;
            let Some(sweeps) = &mut device.sweeps else { return true };
            *sweeps = sweeps.saturating_add(1);
            *sweeps < SWEEPS || device.has_more || !device.sources.is_disjoint(sources)
        });
        self.devices.len() < before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses<const N: usize>(texts: [&str; N]) -> BTreeSet<IpAddr> {
        texts.into_iter().map(|text| text.parse().unwrap()).collect()
    }

    fn two_devices() -> Leaving {
        let mut leaving = Leaving::default();
        assert!(leaving.look(&["lan1", "lan2"].into()).is_empty());
        leaving.give("lan1", &["10.0.1.1".parse().unwrap()]);
        leaving.give("lan2", &["10.0.2.1".parse().unwrap()]);
        leaving
    }

    #[test]
    fn a_device_is_kept_until_no_connection_has_its_address() {
        let mut leaving = two_devices();
        assert_eq!(leaving.look(&["lan2"].into()), ["lan1"]);
        assert!(leaving.keeps("lan1") && !leaving.keeps("lan2"));
        assert!(leaving.look(&["lan2"].into()).is_empty(), "told once");
        for _ in 0..5 {
            assert!(!leaving.swept(&addresses(["10.0.1.1", "10.0.2.1"])));
        }
        assert!(leaving.swept(&addresses(["10.0.2.1"])));
        assert!(!leaving.keeps("lan1"));
    }

    #[test]
    fn the_sweep_that_runs_while_a_device_is_left_does_not_count() {
        let mut leaving = two_devices();
        leaving.look(&["lan2"].into());
        assert!(!leaving.swept(&addresses([])) && leaving.keeps("lan1"));
        assert!(leaving.swept(&addresses([])) && !leaving.keeps("lan1"));
    }

    #[test]
    fn one_that_is_used_again_begins_anew() {
        let mut leaving = two_devices();
        leaving.look(&["lan2"].into());
        leaving.swept(&addresses([]));
        leaving.look(&["lan1", "lan2"].into());
        assert!(!leaving.keeps("lan1") && !leaving.swept(&addresses([])));
        leaving.look(&["lan2"].into());
        assert!(!leaving.swept(&addresses(["10.0.1.1"])), "its addresses are still known");
        assert!(!leaving.swept(&addresses(["10.0.1.1"])) && leaving.keeps("lan1"));
    }

    #[test]
    fn adopting_a_device_forgets_no_address_of_it() {
        let mut leaving = two_devices();
        leaving.adopt("lan1".to_owned());
        leaving.look(&["lan1", "lan2"].into());
        assert!(!leaving.swept(&addresses([])), "nothing of the earlier agent's is left");
        leaving.look(&["lan2"].into());
        for _ in 0..3 {
            assert!(!leaving.swept(&addresses(["10.0.1.1"])) && leaving.keeps("lan1"));
        }
        assert!(leaving.swept(&addresses([])) && !leaving.keeps("lan1"));
    }

    #[test]
    fn of_an_adopted_device_every_address_may_be_that_is_nobody_elses() {
        let mut leaving = two_devices();
        leaving.adopt("lan3".to_owned());
        leaving.look(&["lan1", "lan2"].into());
        for _ in 0..3 {
            assert!(!leaving.swept(&addresses(["10.0.1.1", "10.0.3.1"])) && leaving.keeps("lan3"));
        }
        assert!(leaving.swept(&addresses(["10.0.1.1", "10.0.2.1"])));
        assert!(!leaving.keeps("lan3"));
    }
}
