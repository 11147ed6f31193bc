//! How many handshakes are not finished.

use std::ops::ControlFlow;
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use aya::maps::MapData;
use lb_common::abi::{Flow, FlowKey, FlowState, Plain, Tick, V4, V6, maps};

use super::flows::{FlowTables, Shown};
use super::{Cpus, batch};
use crate::plan::HalfOpen;

/// Entries after which it is known whether it is worth while to read on.
const SAMPLE: u64 = 8_192;

/// Counts the handshakes in the tables of flows that begin, IPv4 and IPv6, that have seen a packet after
/// the time `after`. Not those with backends on this node, whose SYNs are answered by the backends anyway.
///
/// Of a table with few of them only a sample is read, and of one with many no more than what shows that
/// they are a flood: so this costs little as long as there is none. The room is that of the CPUs that run.
///
/// # Errors
/// When a table cannot be read.
pub fn half_open(tables: &FlowTables, after: Option<Tick>) -> Result<[HalfOpen; 2]> {
    let [v4, v6] = [&tables.tables_v4()[1], &tables.tables_v6()[1]];
    Ok([family::<V4>(v4, after)?, family::<V6>(v6, after)?])
}

/// How many flows the two tables have room for on the CPUs that run; none is counted.
///
/// # Errors
/// When the kernel does not say.
pub fn room(tables: &FlowTables) -> Result<[HalfOpen; 2]> {
    let of = |data, map| Ok::<_, anyhow::Error>(HalfOpen { flows: 0, room: flows_in(data, map)? });
    Ok([of(&tables.tables_v4()[1], V4::TABLES[1])?, of(&tables.tables_v6()[1], V6::TABLES[1])?])
}

/// A flow has two entries.
fn flows_in(data: &MapData, map: maps::Map) -> Result<u64> {
    let info = data.info().with_context(|| format!("asking about the map {}", map.name))?;
    let cpus = Cpus::count()?;
    Ok(u64::from(cpus.usable(info.max_entries(), cpus.online)) / 2)
}

fn family<F: Shown>(data: &MapData, after: Option<Tick>) -> Result<HalfOpen>
where
    FlowKey<F::Address>: Plain,
    Flow<F::Address>: Plain,
{
    let room = flows_in(data, F::TABLES[1])?;
    let mut count = Count::new(room);
    batch::for_each_while(data.fd().as_fd(), |_: FlowKey<F::Address>, flow: Flow<F::Address>| {
        count.take(is_half_open(&flow, after))
    })
    .with_context(|| format!("reading the map {}", F::TABLES[1].name))?;
    Ok(HalfOpen { flows: count.flows, room })
}

fn is_half_open<A>(flow: &Flow<A>, after: Option<Tick>) -> bool {
    let begins = matches!(flow.state(), FlowState::SynSent | FlowState::SynReceived);
    let counts = after.is_none_or(|after| (flow.last_seen.wrapping_sub(after) as i32) > 0);
    begins && counts && !flow.is_reply() && !flow.is_local()
}

/// What was counted so far.
struct Count {
    flows: u64,
    entries: u64,
    /// So many flows are a flood.
    enough: u64,
    /// With fewer in a sample, there are less than half as many in the table even if it is full.
    rare: u64,
}

impl Count {
    fn new(room: u64) -> Self {
        let enough = HalfOpen::flood(room);
        Self { flows: 0, entries: 0, enough, rare: enough * SAMPLE / (4 * room).max(1) }
    }

    /// Takes an entry into account; breaks when the rest would not change what is decided.
    fn take(&mut self, is_half_open: bool) -> ControlFlow<()> {
        self.entries += 1;
        self.flows += u64::from(is_half_open);
        let is_rare = self.entries == SAMPLE && self.flows < self.rare;
        if is_rare || self.flows >= self.enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

#[cfg(test)]
mod tests {
    use lb_common::abi::{FlowFlags, FlowStatus};
    use lb_common::forward::scratch::Scratch;

    use super::*;

    #[test]
    fn only_what_decides_is_read() {
        let read = |room: u64, is_half_open: &dyn Fn(u64) -> bool| {
            let mut count = Count::new(room);
            let _ = (0..100_000).try_for_each(|number| count.take(is_half_open(number)));
            (count.entries, count.flows)
        };
        let every = |other: u64| move |number: u64| number % other == other - 1;
        assert_eq!(read(120_000, &|_| false), (SAMPLE, 0));
        assert_eq!(read(120_000, &every(17)), (SAMPLE, 481));
        assert_eq!(read(120_000, &every(16)), (100_000, 6_250), "it may be a flood");
        assert_eq!(read(120_000, &every(2)), (60_000, 30_000), "it is one");
        assert_eq!(read(400, &every(2)), (200, 100));
        assert_eq!(read(4_000_000, &every(300)), (SAMPLE, 27), "less than one in 240");
        assert_eq!(read(4_000_000, &every(240)), (100_000, 416));
    }

    #[test]
    fn clients_entries_of_handshakes_count() {
        let flow = |state: FlowState, flags, last_seen| {
            let status = FlowStatus { state: state as u8, flags, epoch: 0 };
            Flow { status, last_seen, ..Scratch::new([0; 4]).flow }
        };
        for state in FlowState::ALL {
            let begins = matches!(state, FlowState::SynSent | FlowState::SynReceived);
            assert_eq!(is_half_open(&flow(state, 0, 0), None), begins, "{state:?}");
            assert!(!is_half_open(&flow(state, FlowFlags::REPLY, 0), None), "{state:?}");
            assert!(!is_half_open(&flow(state, FlowFlags::LOCAL, 0), None), "{state:?}");
        }
        for (last_seen, counts) in [(9, false), (10, false), (11, true)] {
            assert_eq!(
                is_half_open(&flow(FlowState::SynSent, 0, last_seen), Some(10)),
                counts,
                "{last_seen}"
            );
        }
        assert!(is_half_open(&flow(FlowState::SynSent, 0, 1), Some(u32::MAX)), "the clock wraps");
    }
}
