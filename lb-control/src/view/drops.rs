//! Packets that were not forwarded, by reason.

use lb_common::abi::{DropReason, DropStats};
use serde::{Deserialize, Serialize};

/// Everything that `pointsman drops` shows: every reason, in the order of its number.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropsView {
    /// One element for each reason.
    pub drops: Vec<DropView>,
}

/// The packets of one drop reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropView {
    /// Name of the reason, as in metrics.
    pub name: String,
    /// Whether it occurs in healthy operation.
    pub expected: bool,
    /// Packets.
    pub packets: u64,
    /// Their bytes, Ethernet header included.
    pub bytes: u64,
    /// What it means, in a sentence.
    pub explanation: String,
}

impl DropView {
    /// What was counted for a reason, summed over the CPUs.
    #[must_use]
    pub fn new(reason: DropReason, stats: DropStats) -> Self {
        Self {
            name: reason.name().to_owned(),
            expected: reason.is_expected(),
            packets: stats.packets,
            bytes: stats.bytes,
            explanation: reason.explanation().trim().to_owned(),
        }
    }
}

impl FromIterator<(DropReason, DropStats)> for DropsView {
    fn from_iter<I: IntoIterator<Item = (DropReason, DropStats)>>(counters: I) -> Self {
        Self { drops: counters.into_iter().map(|(reason, stats)| DropView::new(reason, stats)).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_shown_with_its_name_and_its_own_counter() {
        let stats = DropStats { packets: 3, bytes: 180 };
        let view: DropsView = [(DropReason::TableFull, stats)].into_iter().collect();
        let [drop] = &view.drops[..] else { panic!("{view:?}") };
        assert_eq!((drop.name.as_str(), drop.packets, drop.bytes), ("table-full", 3, 180));
        assert!(!drop.expected && drop.explanation.starts_with("The flow tables"), "{drop:?}");
    }
}
