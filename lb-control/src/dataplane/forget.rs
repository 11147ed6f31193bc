//! Takes flows out of their tables: both entries, or none.
//!
//! A client's entry without its reply entry would be the end of a connection: its packets go on by the
//! fast path, which does not miss the other one, and the answers go to the node's own stack, which
//! resets it. System calls remove one entry each, and packets come in between.

use std::hash::Hash;
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result};
use aya::maps::MapData;
use lb_common::abi::{FLOW_VERSION_BITS, Flow, FlowKey, Plain, maps};
use lb_common::forward::cache;
use lb_common::forward::ip::IpFamily;

use super::batch;

/// What a version grows by. The kernel's programs count them up by one, atomically, and this agent
/// cannot: what they add between its reading and its writing is lost. With a larger step, no number from
/// before comes back for that; with one that is not too large, none comes back by going round the 16
/// bits that a copy remembers while it is good.
const STEP: u64 = 64;

/// A flow table while flows are taken out.
pub(super) trait Entries<K, V> {
    /// The entry as it is now.
    fn get(&mut self, key: &K) -> Result<Option<V>>;

    /// Removes it; then no copy of it is used any more.
    fn remove(&mut self, key: &K) -> Result<()>;

    /// Puts an entry back that was removed, unless there is another one by now.
    fn put_back(&mut self, key: &K, value: &V) -> Result<()>;
}

/// Removes an entry, and its partner if it has one, if both are there and over by now. The client's entry
/// is the one to name first: a reply entry without it does no harm. Says whether they are gone.
///
/// # Errors
/// When the table cannot be read or written.
pub(super) fn forget<K, V>(
    table: &mut impl Entries<K, V>,
    key: &K,
    partner: Option<&K>,
    is_over: impl Fn(&V, Option<&V>) -> bool,
) -> Result<bool> {
    let other = match partner {
        Some(partner) => match table.get(partner)? {
            Some(other) => Some(other),
            None => return Ok(false),
        },
        None => None,
    };
    // The tuple may have been used again since the table was read.
    let Some(entry) = table.get(key)? else { return Ok(false) };
    if !is_over(&entry, other.as_ref()) {
        return Ok(false);
    }
    table.remove(key)?;
    let Some(partner) = partner else { return Ok(true) };
    match table.get(partner)? {
        Some(other) if !is_over(&entry, Some(&other)) => {
            table.put_back(key, &entry)?;
            Ok(false)
        }
        Some(_) => {
            table.remove(partner)?;
            Ok(true)
        }
        None => Ok(true),
    }
}

/// A flow table of the kernel.
pub(super) struct KernelTable<'m, F> {
    table: BorrowedFd<'m>,
    name: &'static str,
    /// Of a table whose flows are copied.
    versions: Option<BorrowedFd<'m>>,
    family: std::marker::PhantomData<F>,
}

impl<'m, F: IpFamily> KernelTable<'m, F> {
    /// A table by its map; with the versions of flows if CPUs may have copies of them.
    pub(super) fn new(table: &'m MapData, map: maps::Map, versions: Option<&'m MapData>) -> Self {
        Self {
            table: table.fd().as_fd(),
            name: map.name,
            versions: versions.map(|versions| versions.fd().as_fd()),
            family: std::marker::PhantomData,
        }
    }

    /// As `forward::cache::forget`.
    fn renew_version(&self, key: &FlowKey<F::Address>) -> Result<()> {
        let Some(versions) = self.versions else { return Ok(()) };
        let index = cache::hash::<F>(key) >> (32 - FLOW_VERSION_BITS);
        let name = maps::FLOW_VERSIONS.name;
        let version: Option<u64> =
            batch::lookup(versions, &index).with_context(|| format!("reading the map {name}"))?;
        let version = version.unwrap_or_default().wrapping_add(STEP);
        batch::update(versions, &index, &version).with_context(|| format!("writing the map {name}"))
    }
}

impl<F: IpFamily<Address: Hash>> Entries<FlowKey<F::Address>, Flow<F::Address>> for KernelTable<'_, F>
where
    FlowKey<F::Address>: Plain,
    Flow<F::Address>: Plain,
{
    fn get(&mut self, key: &FlowKey<F::Address>) -> Result<Option<Flow<F::Address>>> {
        batch::lookup(self.table, key).with_context(|| format!("reading the map {}", self.name))
    }

    fn remove(&mut self, key: &FlowKey<F::Address>) -> Result<()> {
        batch::remove(self.table, key).with_context(|| format!("removing from the map {}", self.name))?;
        self.renew_version(key)
    }

    fn put_back(&mut self, key: &FlowKey<F::Address>, value: &Flow<F::Address>) -> Result<()> {
        batch::insert_new(self.table, key, value)
            .with_context(|| format!("writing the map {}", self.name))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Entries are their own idle times: from 10 on they are over.
    #[derive(Default)]
    struct Table {
        entries: BTreeMap<&'static str, u32>,
        calls: Vec<String>,
        /// What somebody else does to the table before a call, by its number.
        meanwhile: Option<(usize, &'static str, Option<u32>)>,
    }

    impl Table {
        fn call(&mut self, what: &str, key: &str) {
            if let Some((at, key, idle)) = self.meanwhile
                && at == self.calls.len()
            {
                match idle {
                    Some(idle) => _ = self.entries.insert(key, idle),
                    None => _ = self.entries.remove(key),
                }
            }
            self.calls.push(format!("{what} {key}"));
        }
    }

    impl Entries<&'static str, u32> for Table {
        fn get(&mut self, key: &&'static str) -> Result<Option<u32>> {
            self.call("get", key);
            Ok(self.entries.get(key).copied())
        }

        fn remove(&mut self, key: &&'static str) -> Result<()> {
            self.call("remove", key);
            self.entries.remove(key);
            Ok(())
        }

        fn put_back(&mut self, key: &&'static str, value: &u32) -> Result<()> {
            self.call("put back", key);
            self.entries.entry(key).or_insert(*value);
            Ok(())
        }
    }

    fn table(entries: &[(&'static str, u32)]) -> Table {
        Table { entries: entries.iter().copied().collect(), ..Table::default() }
    }

    fn is_over(entry: &u32, partner: Option<&u32>) -> bool {
        *entry.min(partner.unwrap_or(entry)) >= 10
    }

    #[test]
    fn a_pair_goes_together_the_client_first() {
        let mut table = table(&[("client", 11), ("reply", 12), ("other", 13)]);
        assert!(forget(&mut table, &"client", Some(&"reply"), is_over).unwrap());
        assert_eq!(table.entries, [("other", 13)].into());
        assert_eq!(table.calls, ["get reply", "get client", "remove client", "get reply", "remove reply"]);
    }

    /// Whatever a packet does meanwhile, and whenever: none, or both.
    #[test]
    fn a_packet_in_between_leaves_no_half() {
        // Once the client's entry is gone, no packet finds it.
        for (key, at, is_gone) in [
            ("client", 0, false),
            ("client", 1, false),
            ("client", 2, true),
            ("reply", 0, false),
            ("reply", 1, false),
            ("reply", 2, false),
            ("reply", 3, false),
            ("reply", 4, true),
        ] {
            let mut table = table(&[("client", 11), ("reply", 12)]);
            table.meanwhile = Some((at, key, Some(0)));
            let gone = forget(&mut table, &"client", Some(&"reply"), is_over).unwrap();
            assert_eq!(gone, is_gone, "{key} at {at}");
            assert_eq!(table.entries.len(), if gone { 0 } else { 2 }, "{key} at {at}: {:?}", table.calls);
        }
    }

    #[test]
    fn what_somebody_else_has_removed_is_left_to_the_next_sweep() {
        for key in ["client", "reply"] {
            let mut table = table(&[("client", 11), ("reply", 12)]);
            table.meanwhile = Some((0, key, None));
            assert!(!forget(&mut table, &"client", Some(&"reply"), is_over).unwrap());
            assert_eq!(table.entries.len(), 1);
        }
        let mut table = table(&[("client", 11), ("reply", 12)]);
        table.meanwhile = Some((3, "reply", None));
        assert!(forget(&mut table, &"client", Some(&"reply"), is_over).unwrap());
        assert!(table.entries.is_empty());
    }

    #[test]
    fn an_entry_alone_goes_alone() {
        let mut table = table(&[("reply", 12), ("other", 9)]);
        assert!(forget(&mut table, &"reply", None, is_over).unwrap());
        assert!(!forget(&mut table, &"other", None, is_over).unwrap());
        assert!(!forget(&mut table, &"none", None, is_over).unwrap());
        assert_eq!(table.entries, [("other", 9)].into());
    }
}
