//! The objects, one counter of resource versions for all of them, and the log of what changed: what
//! etcd is to Kubernetes.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
};

use serde_json::Value;

use super::{
    failure::{Failure, Outcome},
    kinds::Registry,
};

/// Namespace (empty for cluster-scoped objects) and name.
pub type Key = (String, String);

/// An object as it was at some time.
pub type Object = Arc<Value>;

/// One change of one object.
#[derive(Clone, Debug)]
pub struct Change {
    /// The resource version that the change has.
    pub revision: u64,
    /// Which resource.
    pub storage: Arc<str>,
    /// Before; `None` when it was created.
    pub old: Option<Object>,
    /// After; `None` when it was deleted.
    pub new: Option<Object>,
    /// What a watcher is shown: `new`, or what was deleted with the resource version of the deletion.
    pub shown: Object,
}

/// How many changes can be looked back on, unless the log is compacted on purpose.
const LOG: usize = 100_000;
/// How many lists may be read page by page at a time.
const PAGED_LISTS: usize = 64;

/// Everything that survives when the server is "down".
#[derive(Debug)]
pub struct Store {
    /// The kinds that there are.
    pub registry: Registry,
    revision: u64,
    /// Changes up to this one are forgotten.
    compacted: u64,
    objects: HashMap<Arc<str>, BTreeMap<Key, Object>>,
    /// Which objects name an owner, by the owner's uid.
    owned: HashMap<String, BTreeSet<(Arc<str>, Key)>>,
    log: VecDeque<Change>,
    pages: VecDeque<Page>,
    next_uid: u64,
    last_address: u32,
    epoch: u64,
}

/// A list as it was when its first page was read.
#[derive(Debug)]
struct Page {
    storage: Arc<str>,
    revision: u64,
    items: Arc<Vec<Object>>,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            registry: Registry::default(),
            revision: 1,
            compacted: 0,
            objects: HashMap::new(),
            owned: HashMap::new(),
            log: VecDeque::new(),
            pages: VecDeque::new(),
            next_uid: 0,
            last_address: 1,
            epoch: 0,
        }
    }
}

impl Store {
    /// The latest resource version.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Changes up to this one are forgotten.
    #[must_use]
    pub fn compacted(&self) -> u64 {
        self.compacted
    }

    /// How often the counter was set anew; watches of an older epoch end.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// A `metadata.uid`: random enough to differ, regular enough to be recognised.
    pub fn uid(&mut self) -> String {
        self.next_uid += 1;
        let now = jiff::Timestamp::now().as_nanosecond();
        let bits = (now as u64) ^ (u64::from(std::process::id()) << 40);
        format!(
            "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
            bits >> 32 & 0xffff_ffff,
            bits >> 16 & 0xffff,
            bits >> 4 & 0xfff,
            self.epoch & 0xfff,
            self.next_uid
        )
    }

    /// A number that no Service's address has yet. 1 is the API server's own.
    pub fn next_address(&mut self) -> u32 {
        self.last_address += 1;
        self.last_address
    }

    /// One object.
    #[must_use]
    pub fn get(&self, storage: &str, key: &Key) -> Option<Object> {
        self.objects.get(storage)?.get(key).cloned()
    }

    /// All objects of a resource, or those of one namespace, ordered by namespace and name.
    #[must_use]
    pub fn list(&self, storage: &str, namespace: Option<&str>) -> Vec<Object> {
        let Some(objects) = self.objects.get(storage) else { return Vec::new() };
        match namespace {
            None => objects.values().cloned().collect(),
            Some(namespace) => objects
                .range((namespace.to_owned(), String::new())..)
                .take_while(|((of, _), _)| of == namespace)
                .map(|(_, object)| object.clone())
                .collect(),
        }
    }

    /// All resources that have an object in this namespace, with the objects' keys.
    #[must_use]
    pub fn keys_in_namespace(&self, namespace: &str) -> Vec<(Arc<str>, Key)> {
        let all = self.objects.iter().flat_map(|(storage, objects)| {
            objects.keys().filter(|key| key.0 == namespace).map(|key| (storage.clone(), key.clone()))
        });
        let mut all: Vec<_> = all.collect();
        all.sort();
        all
    }

    /// The objects that are left without an owner now that this one is gone.
    pub fn orphans(&mut self, uid: &str) -> Vec<(Arc<str>, Key)> {
        let mut named: Vec<_> = self.owned.remove(uid).unwrap_or_default().into_iter().collect();
        // Another owner may have been named since, or may still be there.
        named.retain(|(storage, key)| {
            self.get(storage, key).is_some_and(|object| {
                let mut owners = owners(&object).peekable();
                owners.peek().is_some() && owners.all(|owner| owner == uid)
            })
        });
        named
    }

    /// Stores an object, with the next resource version in it; gives it as it is stored.
    pub fn put(&mut self, storage: &Arc<str>, key: Key, mut object: Value) -> Object {
        self.revision += 1;
        object["metadata"]["resourceVersion"] = self.revision.to_string().into();
        let object = Arc::new(object);
        for owner in owners(&object) {
            self.owned.entry(owner.to_owned()).or_default().insert((storage.clone(), key.clone()));
        }
        let old = self.objects.entry(storage.clone()).or_default().insert(key, object.clone());
        self.append(storage, old, Some(object.clone()), object.clone());
        object
    }

    /// Removes an object; gives it as watchers are shown it.
    pub fn remove(&mut self, storage: &Arc<str>, key: &Key) -> Option<Object> {
        let old = self.objects.get_mut(storage)?.remove(key)?;
        self.revision += 1;
        let mut last = Value::clone(&old);
        last["metadata"]["resourceVersion"] = self.revision.to_string().into();
        let last = Arc::new(last);
        self.append(storage, Some(old), None, last.clone());
        Some(last)
    }

    /// Changes an object without an entry in the log: for what is removed at once, so that its last
    /// state is the one that watchers are shown.
    pub fn replace_quietly(&mut self, storage: &Arc<str>, key: &Key, object: Value) {
        if let Some(stored) = self.objects.get_mut(storage).and_then(|objects| objects.get_mut(key)) {
            *stored = Arc::new(object);
        }
    }

    fn append(&mut self, storage: &Arc<str>, old: Option<Object>, new: Option<Object>, shown: Object) {
        let change = Change { revision: self.revision, storage: storage.clone(), old, new, shown };
        self.log.push_back(change);
        while self.log.len() > LOG {
            if let Some(first) = self.log.pop_front() {
                self.compacted = first.revision;
            }
        }
    }

    /// Changes of one resource after a resource version, at most `limit`, and the version up to which
    /// they were looked for.
    ///
    /// # Errors
    /// When the log does not go back that far.
    pub fn changes(&self, storage: &str, after: u64, limit: usize) -> Outcome<(Vec<Change>, u64)> {
        if after < self.compacted {
            let message = format!("too old resource version: {after} ({})", self.compacted);
            return Err(Failure::expired(message));
        }
        // Revisions in the log have no gaps, except that the first is not known.
        let first = self.log.front().map_or(self.revision + 1, |change| change.revision);
        let skip = usize::try_from((after + 1).saturating_sub(first)).unwrap_or(usize::MAX);
        let mut found = Vec::new();
        for change in self.log.iter().skip(skip) {
            if &*change.storage == storage {
                found.push(change.clone());
                if found.len() == limit {
                    return Ok((found, change.revision));
                }
            }
        }
        Ok((found, self.revision))
    }

    /// Forgets all changes so far, and the pages of lists that are being read.
    pub fn compact(&mut self) {
        self.compacted = self.revision;
        self.log.clear();
        self.pages.clear();
    }

    /// Goes on counting somewhere else, as after a restore from a backup: `by` may be negative.
    pub fn new_epoch(&mut self, by: i64) {
        self.revision = self.revision.saturating_add_signed(by).max(1);
        self.epoch += 1;
        self.compact();
    }

    /// Keeps a list for its later pages.
    pub fn keep_page(&mut self, storage: &Arc<str>, revision: u64, items: Vec<Object>) {
        self.pages.push_back(Page { storage: storage.clone(), revision, items: Arc::new(items) });
        if self.pages.len() > PAGED_LISTS {
            self.pages.pop_front();
        }
    }

    /// The list that was kept at this resource version.
    #[must_use]
    pub fn page(&self, storage: &str, revision: u64) -> Option<Arc<Vec<Object>>> {
        let found =
            self.pages.iter().rev().find(|page| &*page.storage == storage && page.revision == revision);
        found.map(|page| page.items.clone())
    }

    /// All objects of a resource as they were at a resource version.
    ///
    /// # Errors
    /// When the log does not go back that far.
    pub fn list_at(&self, storage: &str, namespace: Option<&str>, revision: u64) -> Outcome<Vec<Object>> {
        let (changes, _) = self.changes(storage, revision, usize::MAX)?;
        let mut objects: BTreeMap<Key, Object> =
            self.list(storage, namespace).into_iter().map(|object| (key_of(&object), object)).collect();
        for change in changes.iter().rev() {
            let key = key_of(&change.shown);
            if namespace.is_some_and(|namespace| namespace != key.0) {
                continue;
            }
            match &change.old {
                Some(old) => objects.insert(key, old.clone()),
                None => objects.remove(&key),
            };
        }
        Ok(objects.into_values().collect())
    }
}

/// The uids of an object's owners.
fn owners(object: &Value) -> impl Iterator<Item = &str> {
    let references = object["metadata"]["ownerReferences"].as_array().into_iter().flatten();
    references.filter_map(|reference| reference["uid"].as_str())
}

/// Namespace and name of an object.
#[must_use]
pub fn key_of(object: &Value) -> Key {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    (text("namespace"), text("name"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn put(store: &mut Store, name: &str, value: u32) -> u64 {
        let object = json!({ "metadata": { "namespace": "a", "name": name }, "value": value });
        store.put(&"things".into(), key_of(&object), object);
        store.revision()
    }

    #[test]
    fn the_past_can_be_listed_until_it_is_compacted() {
        let mut store = Store::default();
        put(&mut store, "one", 1);
        let then = put(&mut store, "two", 1);
        put(&mut store, "one", 2);
        store.remove(&"things".into(), &("a".into(), "two".into())).unwrap();
        put(&mut store, "three", 1);
        let values = |objects: Vec<Object>| -> Vec<(String, u64)> {
            objects.iter().map(|object| (key_of(object).1, object["value"].as_u64().unwrap())).collect()
        };
        let past = values(store.list_at("things", Some("a"), then).unwrap());
        assert_eq!(past, [("one".into(), 1), ("two".into(), 1)]);
        assert_eq!(values(store.list("things", None)), [("one".into(), 2), ("three".into(), 1)]);
        assert!(store.list_at("things", Some("b"), then).unwrap().is_empty());
        store.compact();
        assert_eq!(store.list_at("things", None, then).unwrap_err().code, 410);
        assert_eq!(store.list_at("things", None, store.revision()).unwrap().len(), 2);
    }

    #[test]
    fn changes_are_found_by_resource_and_in_parts() {
        let mut store = Store::default();
        let start = store.revision();
        for value in 0..5 {
            put(&mut store, "one", value);
            let other = json!({ "metadata": { "name": "x" } });
            store.put(&"others".into(), key_of(&other), other);
        }
        let (first, upto) = store.changes("things", start, 3).unwrap();
        assert_eq!(first.len(), 3);
        assert!(first[0].old.is_none() && first[1].old.is_some());
        let (rest, upto) = store.changes("things", upto, 3).unwrap();
        assert_eq!((rest.len(), upto), (2, store.revision()));
        store.compact();
        assert!(store.changes("things", upto, 3).unwrap().0.is_empty());
        put(&mut store, "one", 9);
        assert_eq!(store.changes("things", upto, 3).unwrap().0.len(), 1);
        assert!(store.changes("things", start, 3).is_err());
    }

    #[test]
    fn a_new_epoch_forgets_what_came_before() {
        let mut store = Store::default();
        let before = put(&mut store, "one", 1);
        store.new_epoch(1000);
        assert_eq!(store.revision(), before + 1000);
        assert!(store.changes("things", before, 1).is_err());
        let now = put(&mut store, "two", 1);
        assert_eq!(store.changes("things", now - 1, 9).unwrap().0.len(), 1);
    }
}
