//! Who waits for what.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    ops::Bound,
};

use super::holders::Consent;
use crate::model::{Family, ObjectRef};

/// What may help a Service that does not have all that it wishes. Another configuration of pools
/// always may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// Others holding this address, or nobody.
    Address(IpAddr),
    /// A free address of a pool, by its key.
    Free(String, Family),
    /// Room on an address of those who share.
    Room(Consent),
}

/// Who waits for what. Every Service with a refusal is in here.
#[derive(Default)]
pub(super) struct Waiting {
    all: BTreeMap<ObjectRef, Vec<Wait>>,
    by_address: BTreeMap<IpAddr, BTreeSet<ObjectRef>>,
    by_pool: BTreeMap<(String, Family), BTreeSet<ObjectRef>>,
    by_consent: BTreeMap<Consent, BTreeSet<ObjectRef>>,
}

impl Waiting {
    /// A Service waits for just these; `None`: it does not wait.
    pub fn set(&mut self, object: &ObjectRef, waits: Option<Vec<Wait>>) {
        for wait in self.all.remove(object).into_iter().flatten() {
            match wait {
                Wait::Address(address) => remove(&mut self.by_address, &address, object),
                Wait::Free(pool, family) => remove(&mut self.by_pool, &(pool, family), object),
                Wait::Room(consent) => remove(&mut self.by_consent, &consent, object),
            }
        }
        let Some(waits) = waits else { return };
        for wait in waits.iter().cloned() {
            match wait {
                Wait::Address(address) => self.by_address.entry(address).or_default(),
                Wait::Free(pool, family) => self.by_pool.entry((pool, family)).or_default(),
                Wait::Room(consent) => self.by_consent.entry(consent).or_default(),
            }
            .insert(object.clone());
        }
        self.all.insert(object.clone(), waits);
    }

    /// All who wait for anything.
    pub fn all(&self) -> impl Iterator<Item = &ObjectRef> {
        self.all.keys()
    }

    /// Those who wait for an address.
    pub fn for_address(&self, address: IpAddr) -> impl Iterator<Item = &ObjectRef> {
        self.by_address.get(&address).into_iter().flatten()
    }

    /// Those who wait for room on an address of those who share, after somebody.
    pub fn for_room(&self, consent: &Consent, after: Option<&ObjectRef>) -> impl Iterator<Item = &ObjectRef> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let waiting = self.by_consent.get(consent).into_iter();
        waiting.flat_map(move |objects| objects.range((from, Bound::Unbounded)))
    }

    /// Who waits next for a free address of a pool, after somebody else.
    pub fn next_for(&self, queue: &(String, Family), after: Option<&ObjectRef>) -> Option<&ObjectRef> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.by_pool.get(queue)?.range((from, Bound::Unbounded)).next()
    }
}

fn remove<K: Ord>(map: &mut BTreeMap<K, BTreeSet<ObjectRef>>, key: &K, object: &ObjectRef) {
    if let Some(objects) = map.get_mut(key) {
        objects.remove(object);
        if objects.is_empty() {
            map.remove(key);
        }
    }
}
