//! What is known of one kind, and what an event changes about it. No I/O.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource as _;

use super::{kinds::Kind, names::Names};
use crate::{
    model::{KindAndName, ObjectChange, ObjectRef, Problem, Unreadable},
    source::convert::FieldError,
};

/// The objects of a kind, in our terms, and what is wrong with those that cannot be taken.
///
/// A list replaces what is known by difference: what it holds is taken over as it comes, and what it
/// turns out not to hold is gone once it is complete. So a list that is taken again (after 410, or
/// of a server that was restarted) tells only what changed meanwhile.
pub struct Known<K: Kind> {
    objects: BTreeMap<K::Key, Arc<K::Value>>,
    bad: BTreeMap<K::Key, Bad>,
    /// What the list that is under way has held so far.
    listed: Option<BTreeSet<K::Key>>,
    bad_changed: bool,
    names: Names,
    /// Objects that can be read no longer, or again, and that nobody was told of yet.
    untold: BTreeMap<KindAndName, Option<Arc<Unreadable>>>,
}

/// An object that cannot be taken as it is.
struct Bad {
    problems: Vec<Problem>,
    unreadable: Arc<Unreadable>,
}

impl<K: Kind> Default for Known<K> {
    fn default() -> Self {
        Self {
            objects: BTreeMap::new(),
            bad: BTreeMap::new(),
            listed: None,
            bad_changed: false,
            names: Names::default(),
            untold: BTreeMap::new(),
        }
    }
}

impl<K: Kind> Known<K> {
    /// A list begins.
    pub fn begin(&mut self) {
        self.listed = Some(BTreeSet::new());
    }

    /// An object is there, or has changed. `None` when that is nothing new.
    pub fn seen(&mut self, raw: &K::Raw) -> Option<ObjectChange> {
        let key = K::key(raw.meta())?;
        if let Some(listed) = &mut self.listed {
            listed.insert(key.clone());
        }
        match K::convert(&key, raw) {
            Ok(mut value) => {
                self.mended(&key);
                if self.objects.get(&key).is_some_and(|known| **known == value) {
                    return None;
                }
                K::share(&mut value, &mut self.names);
                let value = Arc::new(value);
                self.objects.insert(key.clone(), Arc::clone(&value));
                Some(K::change(key, Some(value)))
            }
            Err(errors) => {
                let old = self.objects.get(&key);
                let kept = K::keep(old.map(Arc::as_ref), raw);
                let effect = match (old, &kept) {
                    // The same whether it was seen in order or not, or it would be told twice.
                    (_, Some((_, effect))) => effect,
                    (Some(_), None) => "it stays as it last was",
                    (None, None) => "it is ignored",
                };
                let kept = kept.map(|(kept, _)| kept);
                let is_new = kept.as_ref().is_some_and(|kept| old.is_none_or(|old| **old != *kept));
                self.put_bad(key.clone(), bad::<K>(raw, errors, effect));
                let mut value = kept.filter(|_| is_new)?;
                K::share(&mut value, &mut self.names);
                let value = Arc::new(value);
                self.objects.insert(key.clone(), Arc::clone(&value));
                Some(K::change(key, Some(value)))
            }
        }
    }

    /// An object is gone.
    pub fn deleted(&mut self, metadata: &ObjectMeta) -> Option<ObjectChange> {
        self.forget(K::key(metadata)?)
    }

    /// The list is complete: what it did not hold is gone.
    pub fn complete(&mut self) -> Vec<ObjectChange> {
        let Some(listed) = self.listed.take() else { return Vec::new() };
        let known = self.objects.keys().chain(self.bad.keys());
        let gone: BTreeSet<K::Key> = known.filter(|key| !listed.contains(key)).cloned().collect();
        gone.into_iter().filter_map(|key| self.forget(key)).collect()
    }

    /// What is wrong with objects, if that has changed since it was last asked.
    pub fn problems(&mut self) -> Option<Vec<Problem>> {
        std::mem::take(&mut self.bad_changed)
            .then(|| self.bad.values().flat_map(|bad| &bad.problems).cloned().collect())
    }

    /// Objects that can be read no longer, or again, since it was last asked.
    pub fn unreadable(&mut self) -> Vec<ObjectChange> {
        let untold = std::mem::take(&mut self.untold);
        untold.into_iter().map(|(key, value)| ObjectChange::Unreadable(key, value)).collect()
    }

    fn forget(&mut self, key: K::Key) -> Option<ObjectChange> {
        self.mended(&key);
        self.objects.remove(&key)?;
        Some(K::change(key, None))
    }

    fn put_bad(&mut self, key: K::Key, bad: Bad) {
        let before = self.bad.get(&key);
        self.bad_changed |= before.is_none_or(|before| before.problems != bad.problems);
        if before.is_none_or(|before| before.unreadable != bad.unreadable) {
            self.untold.insert(name_of(&bad), Some(Arc::clone(&bad.unreadable)));
            self.bad.insert(key, bad);
        }
    }

    fn mended(&mut self, key: &K::Key) {
        if let Some(bad) = self.bad.remove(key) {
            self.bad_changed = true;
            self.untold.insert(name_of(&bad), None);
        }
    }
}

fn name_of(bad: &Bad) -> KindAndName {
    (bad.unreadable.kind, bad.unreadable.object.clone())
}

fn bad<K: Kind>(raw: &K::Raw, errors: Vec<FieldError>, effect: &str) -> Bad {
    let metadata = raw.meta();
    let object = ObjectRef::new(
        metadata.namespace.clone().unwrap_or_default(),
        metadata.name.clone().unwrap_or_default(),
    );
    let problems: Vec<Problem> = errors
        .into_iter()
        .map(|error| {
            Problem::error(format!("{} ({effect} until this is mended)", error.message))
                .about(K::NAMES.kind, &object)
                .field(error.field)
        })
        .collect();
    let reason = |problem: &Problem| match &problem.field {
        Some(field) => format!("{field}: {}", problem.message),
        None => problem.message.clone(),
    };
    let unreadable = Unreadable {
        api_version: K::Raw::api_version(&()).into_owned(),
        kind: K::NAMES.kind,
        object,
        uid: metadata.uid.clone().unwrap_or_default(),
        concern: K::concern(raw),
        reasons: problems.iter().map(reason).collect(),
    };
    Bad { problems, unreadable: Arc::new(unreadable) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        model::Concern,
        source::kube::kinds::{Nodes, Pools, Services},
    };

    fn pool(name: &str, addresses: &str) -> <Pools as Kind>::Raw {
        serde_json::from_value(json!({
            "metadata": { "name": name, "resourceVersion": "7" },
            "spec": { "addresses": [addresses] },
        }))
        .unwrap()
    }

    fn is(change: Option<&ObjectChange>, name: &str, there: bool) -> bool {
        matches!(change, Some(ObjectChange::Pool(key, value)) if key == name && value.is_some() == there)
    }

    #[test]
    fn a_second_list_is_a_difference() {
        let mut known = Known::<Pools>::default();
        known.begin();
        for name in ["a", "b", "c"] {
            assert!(is(known.seen(&pool(name, "192.0.2.0/24")).as_ref(), name, true));
        }
        assert_eq!(known.complete(), []);

        known.begin();
        assert_eq!(known.seen(&pool("a", "192.0.2.0/24")), None, "nothing new");
        assert!(is(known.seen(&pool("b", "198.51.100.0/24")).as_ref(), "b", true));
        assert!(is(known.seen(&pool("d", "203.0.113.0/24")).as_ref(), "d", true));
        let gone = known.complete();
        assert_eq!(gone.len(), 1);
        assert!(is(gone.first(), "c", false));
    }

    #[test]
    fn what_comes_during_a_list_and_what_goes_after_it() {
        let mut known = Known::<Pools>::default();
        known.begin();
        known.seen(&pool("a", "192.0.2.0/24"));
        known.complete();
        let raw = pool("a", "192.0.2.0/24");
        assert!(is(known.deleted(raw.meta()).as_ref(), "a", false));
        assert_eq!(known.deleted(raw.meta()), None);
        assert_eq!(known.complete(), [], "no list is under way");
    }

    #[test]
    fn a_bad_object_stays_as_it_was_and_says_why() {
        let mut known = Known::<Pools>::default();
        assert!(known.seen(&pool("a", "192.0.2.0/24")).is_some());
        assert_eq!(known.problems(), None);

        assert_eq!(known.seen(&pool("a", "nonsense")), None);
        assert_eq!(known.seen(&pool("new", "nonsense")), None);
        let problems = known.problems().expect("changed");
        assert_eq!(problems.len(), 2);
        assert_eq!(problems[0].field.as_deref(), Some("spec.addresses[0]"));
        assert!(problems[0].to_string().starts_with("AddressPool a: "), "{}", problems[0]);
        assert!(problems[0].message.contains("as it last was") && problems[1].message.contains("ignored"));
        assert_eq!(known.seen(&pool("a", "nonsense")), None);
        assert_eq!(known.problems(), None, "the same again is no news");

        assert_eq!(known.seen(&pool("a", "192.0.2.0/24")), None, "mended to what it was");
        assert_eq!(known.problems().expect("changed").len(), 1);
        assert_eq!(known.deleted(pool("new", "nonsense").meta()), None, "it was never there");
        assert_eq!(known.problems(), Some(Vec::new()));
    }

    #[test]
    fn who_cannot_be_read_is_named_once_per_change() {
        let mut known = Known::<Pools>::default();
        known.seen(&pool("a", "nonsense"));
        let told = known.unreadable();
        let [ObjectChange::Unreadable((kind, object), Some(unreadable))] = &told[..] else {
            panic!("{told:?}")
        };
        assert_eq!((*kind, object.name.as_str()), ("AddressPool", "a"));
        assert_eq!(unreadable.api_version, "pointsman.dev/v1alpha1");
        assert!(unreadable.reasons[0].starts_with("spec.addresses[0]: "), "{unreadable:?}");
        known.seen(&pool("a", "nonsense"));
        assert_eq!(known.unreadable(), [], "the same again");
        known.seen(&pool("a", "more nonsense"));
        assert_eq!(known.unreadable().len(), 1, "something else");
        known.seen(&pool("a", "192.0.2.0/24"));
        assert!(matches!(&known.unreadable()[..], [ObjectChange::Unreadable(_, None)]));
    }

    /// Which Services it concerns is known even of those that cannot be read.
    #[test]
    fn services_of_others_are_not_our_concern() {
        let concern = |spec: serde_json::Value| {
            let raw = serde_json::from_value(json!({ "metadata": { "name": "web" }, "spec": spec })).unwrap();
            Services::concern(&raw)
        };
        assert_eq!(concern(json!({ "type": "ClusterIP" })), Concern::Never);
        assert_eq!(concern(json!({ "type": "LoadBalancer" })), Concern::Class(None));
        let classed = json!({ "type": "LoadBalancer", "loadBalancerClass": "x.io/y" });
        assert_eq!(concern(classed), Concern::Class(Some("x.io/y".into())));
    }

    #[test]
    fn a_bad_object_that_leaves_the_list_is_gone() {
        let mut known = Known::<Pools>::default();
        known.seen(&pool("a", "192.0.2.0/24"));
        known.seen(&pool("a", "nonsense"));
        known.problems();
        known.begin();
        assert!(is(known.complete().first(), "a", false));
        assert_eq!(known.problems(), Some(Vec::new()));
    }

    #[test]
    fn heartbeats_of_nodes_are_no_change() {
        let node = |version: &str, zone: &str| -> <Nodes as Kind>::Raw {
            serde_json::from_value(json!({ "metadata": {
                "name": "n", "resourceVersion": version, "labels": { "topology.kubernetes.io/zone": zone },
            } }))
            .unwrap()
        };
        let mut known = Known::<Nodes>::default();
        assert!(known.seen(&node("1", "a")).is_some());
        assert!(known.seen(&node("2", "a")).is_none());
        assert!(known.seen(&node("3", "b")).is_some());
    }
}
