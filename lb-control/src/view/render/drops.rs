//! `pointsman drops`.

use super::Render;
use super::table::Table;
use super::units::{bytes, grouped, plural};
use crate::view::DropsView;

impl Render for DropsView {
    /// Reasons that occurred; `wide` lists the others too.
    fn table(&self, wide: bool) -> String {
        let shown: Vec<_> = self.drops.iter().filter(|drop| wide || drop.packets > 0).collect();
        if shown.is_empty() {
            return "No packet has been dropped (-o wide lists all reasons).\n".to_owned();
        }
        let mut table = Table::new(&["REASON", "KIND", "PACKETS", "BYTES", "EXPLANATION"]);
        for drop in shown {
            table.row(&[
                drop.name.clone(),
                if drop.expected { "expected" } else { "unexpected" }.to_owned(),
                grouped(drop.packets),
                bytes(drop.bytes),
                drop.explanation.clone(),
            ]);
        }
        let sum = |expected| self.drops.iter().filter(|d| d.expected == expected).map(|d| d.packets).sum();
        let (expected, unexpected): (u64, u64) = (sum(true), sum(false));
        format!(
            "{}\n{} dropped or refused: {} expected, {} unexpected.\n",
            table.finish(),
            plural(expected + unexpected, "packet"),
            grouped(expected),
            grouped(unexpected)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lb_common::abi::{DropReason, DropStats};

    #[test]
    fn reasons_that_occurred_are_shown() {
        let counter = |reason: DropReason| match reason {
            DropReason::NoBackend => DropStats { packets: 1_200, bytes: 72_000 },
            DropReason::TableFull => DropStats { packets: 1, bytes: 60 },
            _ => DropStats::default(),
        };
        let view: DropsView = DropReason::ALL.iter().map(|&reason| (reason, counter(reason))).collect();
        let text = view.table(false);
        let (header, first) = (
            "REASON       KIND         PACKETS   BYTES    EXPLANATION\n",
            "no-backend   expected     1,200     70 KiB   A connection",
        );
        assert!(text.starts_with(&format!("{header}{first}")), "{text}");
        assert!(text.contains("\ntable-full   unexpected   1         60 B     The flow tables"), "{text}");
        assert!(
            text.ends_with("\n1,201 packets dropped or refused: 1,200 expected, 1 unexpected.\n"),
            "{text}"
        );
        assert_eq!(view.table(true).lines().count(), DropReason::COUNT + 3);
        assert!(DropsView::default().table(false).starts_with("No packet"));
    }
}
