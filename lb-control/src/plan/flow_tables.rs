//! When to say that a table of established flows runs full.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::abi::maps;

use crate::model::Problem;

/// How full a table is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fill {
    /// Entries in use; a flow has two.
    pub entries: usize,
    /// Entries that there is room for.
    pub room: u32,
}

/// Says so from this share on, in percent.
const NEARLY_FULL: u64 = 90;
/// And until it is below this one, so that a table at the border is no news each time.
const ROOMY: u64 = 80;

/// Remembers which tables were said to be nearly full.
#[derive(Debug, Default)]
pub struct FlowTableWatch {
    nearly_full: BTreeSet<&'static str>,
}

impl FlowTableWatch {
    /// What is to be said now, of tables by their name. Tables of flows that begin or end are
    /// not spoken of: under a flood they are full, and are made for it.
    pub fn look(&mut self, tables: &BTreeMap<&'static str, Fill>) -> Vec<Problem> {
        let mut problems = Vec::new();
        for map in [maps::FLOWS_V4, maps::FLOWS_V6] {
            let Some(fill) = tables.get(map.name) else { continue };
            let (used, room) = (fill.entries as u64 * 100, u64::from(fill.room));
            if used > room * NEARLY_FULL {
                self.nearly_full.insert(map.name);
            } else if used < room * ROOMY {
                self.nearly_full.remove(map.name);
            }
            if self.nearly_full.contains(map.name) {
                // Without how many there are: the same words each time are told once.
                problems.push(Problem::warning(format!(
                    "the table of established flows {} is nearly full ({} entries, two for each flow): once it \
                     is, further connections work, but a flood can evict them; raise --max-flows, which takes \
                     effect with new maps, or share the load among more nodes",
                    map.name, fill.room
                )));
            }
        }
        problems
    }

    /// Those that are said to be.
    #[must_use]
    pub fn nearly_full(&self) -> &BTreeSet<&'static str> {
        &self.nearly_full
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn told_from_ninety_percent_until_below_eighty() {
        let mut watch = FlowTableWatch::default();
        for (entries, is_told) in
            [(0, false), (90, false), (91, true), (100, true), (80, true), (79, false), (90, false)]
        {
            let full = Fill { entries: 100, room: 100 };
            let tables = [("flows_v4", Fill { entries, room: 100 }), ("transient_v4", full)].into();
            let problems = watch.look(&tables);
            assert_eq!(problems.len(), usize::from(is_told), "{entries}: {problems:?}");
            assert_eq!(watch.nearly_full().len(), problems.len());
            assert!(
                problems
                    .iter()
                    .all(|problem| problem.message.contains("flows_v4 is nearly full (100 entries"))
            );
        }
    }

    #[test]
    fn each_family_for_itself() {
        let mut watch = FlowTableWatch::default();
        let (full, empty) = (Fill { entries: 99, room: 100 }, Fill { entries: 0, room: 100 });
        assert_eq!(watch.look(&[("flows_v4", full), ("flows_v6", full)].into()).len(), 2);
        assert_eq!(watch.look(&[("flows_v4", empty), ("flows_v6", full)].into()).len(), 1);
    }
}
