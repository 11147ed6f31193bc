//! Pools: which one has an address, and which may serve a Service, in order.

use std::{cmp::Reverse, collections::BTreeMap, net::IpAddr, sync::Arc};

use super::{
    PoolReport, Refusal,
    free::{Free, intervals},
    holders::Holders,
    reason,
};
use crate::model::{ANNOTATION_POOL, Family, Namespace, ObjectRef, Pool, PoolOrigin, Problem, Service};

/// A pool with what is held of it.
pub(super) struct Slot {
    pub pool: Arc<Pool>,
    /// The pool that it overlaps, as people know it.
    overlaps: Option<String>,
    free: [Free; 2],
    assigned: u64,
}

/// All pools.
#[derive(Default)]
pub(super) struct Pools {
    slots: BTreeMap<String, Slot>,
    /// Keys of those that are not set aside, in the order in which they are used.
    ordered: Vec<String>,
    by_name: BTreeMap<String, Vec<String>>,
    /// Intervals of those that are not set aside: from the first address to the last, and whose.
    intervals: BTreeMap<IpAddr, (IpAddr, String)>,
    problems: Vec<Problem>,
}

/// What people call a pool.
fn title(pool: &Pool) -> String {
    match &pool.origin {
        PoolOrigin::Pointsman => format!("AddressPool {}", pool.name),
        PoolOrigin::MetalLb(namespace) => format!("IPAddressPool {namespace}/{}", pool.name),
    }
}

/// Pools that are for somebody special come first, then by priority; MetalLB's 0 is none, and last.
fn rank(pool: &Pool) -> impl Ord + use<> {
    let priority = match (&pool.origin, pool.priority) {
        (PoolOrigin::MetalLb(_), 0) => i64::from(i32::MAX) + 1,
        (_, priority) => i64::from(priority),
    };
    (Reverse(pool.is_restricted()), priority, pool.name.clone(), pool.key())
}

fn side(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}

impl Slot {
    fn new(pool: &Arc<Pool>, overlaps: Option<String>, holders: &Holders) -> Self {
        let free = [Free::new(pool, Family::V4), Free::new(pool, Family::V6)];
        let mut slot = Self { pool: Arc::clone(pool), overlaps, free, assigned: 0 };
        for interval in intervals(pool) {
            holders.within(interval).for_each(|(address, _)| slot.take(address));
        }
        slot
    }

    fn take(&mut self, address: IpAddr) {
        self.free[side(Family::of(address))].take(address);
        self.assigned += 1;
    }
}

impl Pools {
    /// Takes over other pools. Those that did not change cost nothing. Gives the
    /// intervals of the others, old and new: what is held there has to be looked at.
    pub fn replace(
        &mut self,
        pools: &BTreeMap<String, Arc<Pool>>,
        holders: &Holders,
    ) -> Vec<(IpAddr, IpAddr)> {
        let mut old = std::mem::take(self);
        let mut affected = Vec::new();
        // Ours before MetalLB's: whoever migrates writes the same ranges once more.
        let mut by_claim: Vec<_> = pools.iter().collect();
        by_claim.sort_by_key(|(_, pool)| matches!(pool.origin, PoolOrigin::MetalLb(_)));
        for (key, pool) in by_claim {
            let overlaps = self.claim(key, pool);
            let slot = match old.slots.remove(key) {
                Some(slot) if slot.overlaps == overlaps && slot.pool == *pool => slot,
                other => {
                    affected.extend(other.iter().flat_map(|slot| intervals(&slot.pool)));
                    affected.extend(intervals(pool));
                    Slot::new(pool, overlaps, holders)
                }
            };
            if slot.overlaps.is_none() {
                self.ordered.push(key.clone());
            }
            self.by_name.entry(pool.name.clone()).or_default().push(key.clone());
            self.slots.insert(key.clone(), slot);
        }
        affected.extend(old.slots.values().flat_map(|slot| intervals(&slot.pool)));
        let slots = &self.slots;
        self.ordered.sort_by_cached_key(|key| slots.get(key).map(|slot| rank(&slot.pool)));
        affected
    }

    /// Enters a pool's ranges, unless one overlaps another pool's: then the pool's name.
    fn claim(&mut self, key: &str, pool: &Pool) -> Option<String> {
        let overlap = pool.ranges.iter().enumerate().find_map(|(index, range)| {
            let around = self.intervals.range(..=range.first()).next_back();
            let around = around.filter(|(_, (last, _))| *last >= range.first());
            let inside = || self.intervals.range(range.first()..=range.last()).next();
            let (_, (_, owner)) = around.or_else(inside)?;
            Some((index, owner.clone()))
        });
        if let Some((index, other)) = overlap {
            let other = self.slots.get(&other).map_or(other, |slot| title(&slot.pool));
            let mut problem = Problem::error(format!(
                "overlaps {other}; {} is set aside: it gives no new addresses until one of them is changed",
                pool.name
            ));
            problem = match &pool.origin {
                PoolOrigin::Pointsman => problem.about("AddressPool", &ObjectRef::new("", &*pool.name)),
                PoolOrigin::MetalLb(namespace) => {
                    problem.about("IPAddressPool", &ObjectRef::new(&**namespace, &*pool.name))
                }
            };
            problem = problem.field(format!("spec.addresses[{index}]"));
            problem.place.clone_from(&pool.place);
            self.problems.push(problem);
            return Some(other);
        }
        let own = intervals(pool).into_iter().map(|(first, last)| (first, (last, key.to_owned())));
        self.intervals.extend(own);
        None
    }

    /// What is wrong with them.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// The pool that has an address, by its key.
    pub fn of(&self, address: IpAddr) -> Option<(&str, &Pool)> {
        let (last, key) = self.intervals.range(..=address).next_back()?.1;
        (*last >= address).then_some((key.as_str(), self.get(key)?))
    }

    /// The pool that has an address but is set aside.
    pub fn set_aside(&self, address: IpAddr) -> Option<String> {
        let aside = self.slots.values().filter(|slot| slot.overlaps.is_some());
        aside.map(|slot| &slot.pool).find(|pool| pool.contains(address)).map(|pool| title(pool))
    }

    pub fn get(&self, key: &str) -> Option<&Pool> {
        self.slots.get(key).map(|slot| slot.pool.as_ref())
    }

    /// Whether the labels of namespaces matter to any.
    pub fn select_namespaces(&self) -> bool {
        self.slots.values().any(|slot| !slot.pool.namespace_selectors.is_empty())
    }

    /// Somebody holds an address that nobody held.
    pub fn take(&mut self, address: IpAddr) {
        if let Some(key) = self.of(address).map(|(key, _)| key.to_owned())
            && let Some(slot) = self.slots.get_mut(&key)
        {
            slot.take(address);
        }
    }

    /// Nobody holds the address any more.
    pub fn give(&mut self, address: IpAddr) {
        if let Some(key) = self.of(address).map(|(key, _)| key.to_owned())
            && let Some(slot) = self.slots.get_mut(&key)
        {
            slot.free[side(Family::of(address))].give(address);
            slot.assigned -= 1;
        }
    }

    /// The lowest address of a pool that may be chosen.
    pub fn lowest_free(&self, key: &str, family: Family) -> Option<IpAddr> {
        self.slots.get(key)?.free[side(family)].lowest()
    }

    /// Why a pool gives a Service nothing new.
    pub fn refuses(pool: &Pool, service: &Service, namespace: Option<&Namespace>) -> Option<String> {
        if pool.disabled {
            return Some(format!("{} is disabled", title(pool)));
        }
        (!pool.serves(service, namespace)).then(|| {
            let (title, namespace) = (title(pool), &service.object.namespace);
            format!("{title} does not serve this Service, by its labels or its namespace {namespace}")
        })
    }

    /// Keys of the pools that may serve a Service, best one first.
    pub fn eligible(&self, service: &Service, namespace: Option<&Namespace>) -> Result<Vec<String>, Refusal> {
        let Some(name) = &service.pool else {
            let active = self.ordered.iter().filter(|key| {
                self.get(key)
                    .is_some_and(|pool| pool.auto_assign && Self::refuses(pool, service, namespace).is_none())
            });
            return Ok(active.cloned().collect());
        };
        let field = format!("metadata.annotations[{ANNOTATION_POOL}]");
        let mut refusal = Refusal::waiting(reason::NO_SUCH_POOL, format!("there is no AddressPool {name}"));
        let mut keys = Vec::new();
        for (key, slot) in
            self.by_name.get(name).into_iter().flatten().filter_map(|key| Some((key, self.slots.get(key)?)))
        {
            if let Some(other) = &slot.overlaps {
                let title = title(&slot.pool);
                let text = format!("{title} is set aside: it overlaps {other}");
                refusal = Refusal::waiting(reason::NO_SUCH_POOL, text);
            } else if let Some(text) = Self::refuses(&slot.pool, service, namespace) {
                refusal = Refusal::waiting(reason::POOL_NOT_ALLOWED, text);
            } else {
                keys.push(key.clone());
            }
        }
        if keys.is_empty() { Err(refusal.field(&field)) } else { Ok(keys) }
    }

    /// Why pools give out nothing that would serve a Service which names none. A few suffice: it is
    /// to be read by people.
    pub fn shut(&self, service: &Service, namespace: Option<&Namespace>, family: Family) -> Vec<String> {
        let pools = self.slots.values().filter(|slot| {
            let pool = &slot.pool;
            pool.auto_assign && pool.has_family(family) && pool.serves(service, namespace)
        });
        let shut = pools.filter_map(|slot| match &slot.overlaps {
            _ if slot.pool.disabled => Some(format!("{} is disabled", title(&slot.pool))),
            Some(other) => Some(format!("{} is set aside: it overlaps {other}", title(&slot.pool))),
            None => None,
        });
        shut.take(3).collect()
    }

    /// The state of every pool. `drained`: which have addresses that are held by Services that would
    /// not get them today.
    pub fn reports(&self, holders: &Holders, drained: impl Fn(&str) -> bool) -> Vec<PoolReport> {
        let reports = self.slots.iter().map(|(key, slot)| {
            let aside = slot.overlaps.is_some();
            let available = slot.free.iter().map(Free::count).fold(0, u64::saturating_add);
            PoolReport {
                key: key.clone(),
                assigned: if aside { 0 } else { slot.assigned },
                available: if aside || slot.pool.disabled { 0 } else { available },
                draining: drained(key) || aside && self.strands(&slot.pool, holders),
                overlaps: slot.overlaps.clone(),
                disabled: slot.pool.disabled,
            }
        });
        reports.collect()
    }

    /// Whether somebody holds an address of a pool that no other pool stands for.
    fn strands(&self, pool: &Pool, holders: &Holders) -> bool {
        let mut held = intervals(pool).into_iter().flat_map(|interval| holders.within(interval));
        held.any(|(address, _)| self.of(address).is_none())
    }
}
