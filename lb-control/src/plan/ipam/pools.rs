//! Pools in the order in which they are used.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use super::{Refusal, holders::Holders};
use crate::model::{ANNOTATION_POOL, Family, Pool, Problem, Service};

/// Pools in the order in which they are used.
pub(super) struct Pools<'a> {
    ordered: Vec<&'a Pool>,
    set_aside: BTreeMap<&'a str, String>,
    /// Where to go on looking, by pool and family: everything before is held.
    cursors: HashMap<(usize, Family), Cursor>,
}

#[derive(Clone, Copy)]
struct Cursor {
    range: usize,
    next: Option<IpAddr>,
}

impl<'a> Pools<'a> {
    /// Sets aside every pool that overlaps one before it, by name, and says so.
    pub fn new(pools: &'a BTreeMap<String, Arc<Pool>>) -> (Self, Vec<Problem>) {
        let mut ordered: Vec<&Pool> = Vec::new();
        let mut set_aside = BTreeMap::new();
        let mut problems = Vec::new();
        for pool in pools.values() {
            let overlap = ordered.iter().find_map(|other| {
                let (mine, theirs) = (&pool.ranges, &other.ranges);
                let index =
                    mine.iter().position(|range| theirs.iter().any(|theirs| theirs.overlaps(range)))?;
                Some((index, &other.name))
            });
            let Some((index, other)) = overlap else {
                ordered.push(pool);
                continue;
            };
            let message = format!("overlaps AddressPool {other}");
            let object = crate::model::ObjectRef::new("", pool.name.clone());
            let mut problem = Problem::error(format!(
                "{message}; {} is set aside: it gives no new addresses until one of them is changed",
                pool.name
            ))
            .about("AddressPool", &object)
            .field(format!("spec.addresses[{index}]"));
            problem.place.clone_from(&pool.place);
            problems.push(problem);
            set_aside.insert(pool.name.as_str(), message);
        }
        ordered.sort_by(|a, b| (a.priority, &a.name).cmp(&(b.priority, &b.name)));
        (Self { ordered, set_aside, cursors: HashMap::new() }, problems)
    }

    pub fn get(&self, index: usize) -> &'a Pool {
        self.ordered[index]
    }

    /// The pool that has an address.
    pub fn of(&self, address: IpAddr) -> Option<&'a Pool> {
        self.ordered.iter().copied().find(|pool| pool.contains(address))
    }

    /// The pools that may serve a Service, best one first.
    pub fn eligible(&self, service: &Service) -> Result<Vec<usize>, Refusal> {
        let Some(name) = &service.pool else {
            return Ok((0..self.ordered.len()).filter(|index| self.ordered[*index].auto_assign).collect());
        };
        if let Some(index) = self.ordered.iter().position(|pool| pool.name == *name) {
            return Ok(vec![index]);
        }
        let field = format!("metadata.annotations[{ANNOTATION_POOL}]");
        Err(match self.set_aside.get(name.as_str()) {
            Some(why) => Refusal::waiting(&field, format!("AddressPool {name} is set aside: it {why}")),
            None => Refusal::waiting(&field, format!("there is no AddressPool {name}")),
        })
    }

    /// Whether a Service may keep an address that it has. An address that is in no pool any more
    /// is kept: pools shrink, Services are not renumbered. One in another pool than the Service
    /// names is not: somebody asked for that pool.
    pub fn may_keep(&self, service: &Service, address: IpAddr) -> bool {
        match (&service.pool, self.of(address)) {
            (Some(wanted), Some(pool)) => pool.name == *wanted,
            _ => true,
        }
    }

    /// Addresses have become free: look from the beginning.
    pub fn rewind(&mut self) {
        self.cursors.clear();
    }

    /// The lowest address that nobody holds. Costs as much as addresses were taken since the last
    /// time.
    pub fn lowest_free(&mut self, pool: usize, family: Family, holders: &Holders<'_>) -> Option<IpAddr> {
        let from = self.ordered[pool];
        let mut ranges: Vec<_> = from.ranges.iter().filter(|range| range.family() == family).collect();
        ranges.sort();
        let cursor = self
            .cursors
            .entry((pool, family))
            .or_insert_with(|| Cursor { range: 0, next: ranges.first().map(|range| range.first()) });
        while let Some(range) = ranges.get(cursor.range) {
            while let Some(address) = cursor.next {
                if from.may_choose(address) && !holders.is_held(address) {
                    return Some(address);
                }
                cursor.next = range.after(address);
            }
            cursor.range += 1;
            cursor.next = ranges.get(cursor.range).map(|range| range.first());
        }
        None
    }
}
