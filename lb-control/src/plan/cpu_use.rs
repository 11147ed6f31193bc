//! Which part of a table that is divided among CPUs is in use.
//!
//! A flow takes room on the CPU on which it begins. Of a machine with many CPUs, a few may get all
//! packets (a network card has as many queues as it has): a flood fills what they have, and most of the table
//! stays empty.

use super::HalfOpen;

/// A CPU is in use if it begins at least one flow in so many of the busiest one's.
const SHARE: u64 = 8;
/// So many flows for each CPU, on average, tell how they are spread.
const ENOUGH: u64 = 16;

/// Finds out how many CPUs begin flows, by counters that are read now and then.
#[derive(Debug, Default)]
pub struct CpuUse {
    /// What had begun on each CPU when this was last told, or first asked.
    since: Option<Vec<u64>>,
    /// How many begin flows; not known yet without.
    cpus: Option<u64>,
}

impl CpuUse {
    /// Whether it matters: whether there are as many handshakes as would be a flood if all came to one of
    /// the `online` CPUs. The room is that of all these together.
    #[must_use]
    pub fn matters(half_open: &[HalfOpen; 2], online: u32) -> bool {
        let one = |family: &HalfOpen| HalfOpen::flood(family.room / u64::from(online.max(1)));
        half_open.iter().any(|family| family.room > 0 && family.flows >= one(family))
    }

    /// Takes into account how many flows each CPU has ever begun.
    pub fn look(&mut self, began: Vec<u64>, online: u32) {
        let Some(since) = &self.since else {
            self.since = Some(began);
            return;
        };
        let before = since.iter().copied().chain(std::iter::repeat(0));
        let grown: Vec<u64> =
            began.iter().zip(before).map(|(now, before)| now.saturating_sub(before)).collect();
        if grown.iter().sum::<u64>() >= ENOUGH * u64::from(online) {
            let busiest = grown.iter().copied().max().unwrap_or_default();
            let in_use = grown.iter().filter(|grown| **grown > 0 && **grown * SHARE >= busiest);
            self.cpus = Some(in_use.count() as u64);
            self.since = Some(began);
        }
    }

    /// Forgets all: packets may come to other CPUs the next time.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// The same handshakes in the room of the CPUs in use; in that of all, as long as those are not known.
    #[must_use]
    pub fn part(&self, half_open: [HalfOpen; 2], online: u32) -> [HalfOpen; 2] {
        let online = u64::from(online.max(1));
        let cpus = self.cpus.map_or(online, |cpus| cpus.clamp(1, online));
        half_open.map(|family| HalfOpen { room: family.room * cpus / online, ..family })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: u64 = 262_144;

    fn half_open(flows: u64) -> [HalfOpen; 2] {
        [HalfOpen { flows, room: ROOM }, HalfOpen { flows: 0, room: ROOM / 2 }]
    }

    /// The room on 64 CPUs after a look at counters that have grown by this.
    fn room(grown: &[u64]) -> u64 {
        let mut cpus = CpuUse::default();
        cpus.look(vec![1_000; 64], 64);
        cpus.look((0..64).map(|cpu| 1_000 + grown.get(cpu).copied().unwrap_or(0)).collect(), 64);
        cpus.part(half_open(0), 64)[0].room
    }

    #[test]
    fn room_is_where_flows_begin() {
        assert_eq!(room(&[1_000; 64]), ROOM);
        assert_eq!(room(&[10_000; 8]), ROOM / 8);
        assert_eq!(room(&[10_000]), ROOM / 64);
        // What a few connections of the node's own pods begin elsewhere is no room for a flood.
        let mut grown = [5; 64];
        grown[..4].fill(10_000);
        assert_eq!(room(&grown), ROOM / 16);
        assert_eq!(room(&[1_023]), ROOM, "too few to tell");
        assert_eq!(room(&[0; 64]), ROOM);
    }

    #[test]
    fn few_flows_tell_after_a_while() {
        let mut cpus = CpuUse::default();
        for second in 0..=3 {
            assert_eq!(cpus.part(half_open(0), 64)[0].room, ROOM, "{second}");
            cpus.look(vec![second * 500, 0], 64);
        }
        assert_eq!(cpus.part(half_open(0), 64)[0].room, ROOM / 64);
        cpus.look(vec![3 * 500, 0], 64);
        assert_eq!(cpus.part(half_open(0), 64)[0].room, ROOM / 64, "it is as it was");
        cpus.forget();
        assert_eq!(cpus.part(half_open(0), 64)[0].room, ROOM);
    }

    /// Eight of 64 CPUs get packets: what they have room for is less than what is a flood of the whole table.
    #[test]
    fn a_flood_of_a_few_cpus_is_seen() {
        let full = half_open(ROOM / 8);
        assert!(full[0].flows < HalfOpen::flood(full[0].room));
        assert!(CpuUse::matters(&full, 64));
        let mut cpus = CpuUse::default();
        cpus.look(vec![0; 64], 64);
        cpus.look((0..64).map(|cpu| if cpu < 8 { 9_000 } else { 0 }).collect(), 64);
        let part = cpus.part(full, 64)[0];
        assert!(part.flows >= HalfOpen::flood(part.room), "{part:?}");
    }

    #[test]
    fn it_matters_from_what_is_a_flood_of_one_cpu() {
        assert!(!CpuUse::matters(&half_open(1_023), 64));
        assert!(CpuUse::matters(&half_open(1_024), 64));
        assert!(!CpuUse::matters(&[HalfOpen::default(); 2], 64), "tables that could not be asked");
    }
}
