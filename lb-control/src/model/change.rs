//! What sources tell: objects that came, changed or went.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use super::{
    Advertisement, AgentLease, EndpointSlice, KindAndName, Namespace, Node, ObjectRef, Objects, Pool,
    Service, Unreadable, VirtualIp,
};

/// An object as it is now; `None` when it is gone.
#[derive(Clone, Debug, PartialEq)]
pub enum ObjectChange {
    /// A Service of any type.
    Service(ObjectRef, Option<Arc<Service>>),
    /// An EndpointSlice.
    Slice(ObjectRef, Option<Arc<EndpointSlice>>),
    /// A pool, by its key: see [`Pool::key`].
    Pool(String, Option<Arc<Pool>>),
    /// An advertisement.
    Advertisement(ObjectRef, Option<Arc<Advertisement>>),
    /// A namespace.
    Namespace(String, Option<Arc<Namespace>>),
    /// A node.
    Node(String, Option<Arc<Node>>),
    /// A VirtualIP.
    VirtualIp(IpAddr, Option<Arc<VirtualIp>>),
    /// An agent, by its node.
    Agent(String, Option<Arc<AgentLease>>),
    /// An object that cannot be taken as it is; `None` when it can again, or is gone.
    Unreadable(KindAndName, Option<Arc<Unreadable>>),
}

/// Which object a change is about. Orders by kind: what others refer to first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ObjectKey {
    /// A namespace.
    Namespace(String),
    /// A node.
    Node(String),
    /// A pool.
    Pool(String),
    /// An advertisement.
    Advertisement(ObjectRef),
    /// A Service.
    Service(ObjectRef),
    /// An EndpointSlice.
    Slice(ObjectRef),
    /// A VirtualIP.
    VirtualIp(IpAddr),
    /// An agent.
    Agent(String),
    /// An object that cannot be taken as it is.
    Unreadable(KindAndName),
}

impl ObjectChange {
    /// The object that it is about.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        match self {
            Self::Namespace(key, _) => ObjectKey::Namespace(key.clone()),
            Self::Node(key, _) => ObjectKey::Node(key.clone()),
            Self::Pool(key, _) => ObjectKey::Pool(key.clone()),
            Self::Advertisement(key, _) => ObjectKey::Advertisement(key.clone()),
            Self::Service(key, _) => ObjectKey::Service(key.clone()),
            Self::Slice(key, _) => ObjectKey::Slice(key.clone()),
            Self::VirtualIp(key, _) => ObjectKey::VirtualIp(*key),
            Self::Agent(key, _) => ObjectKey::Agent(key.clone()),
            Self::Unreadable(key, _) => ObjectKey::Unreadable(key.clone()),
        }
    }

    /// Whether the object is gone.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Namespace(_, value) => value.is_none(),
            Self::Node(_, value) => value.is_none(),
            Self::Pool(_, value) => value.is_none(),
            Self::Advertisement(_, value) => value.is_none(),
            Self::Service(_, value) => value.is_none(),
            Self::Slice(_, value) => value.is_none(),
            Self::VirtualIp(_, value) => value.is_none(),
            Self::Agent(_, value) => value.is_none(),
            Self::Unreadable(_, value) => value.is_none(),
        }
    }
}

fn put<K: Ord, V: PartialEq>(map: &mut BTreeMap<K, Arc<V>>, key: K, value: Option<Arc<V>>) -> bool {
    match value {
        Some(value) => {
            let differs = map.get(&key).is_none_or(|old| *old != value);
            map.insert(key, value);
            differs
        }
        None => map.remove(&key).is_some(),
    }
}

impl Objects {
    /// Takes a change over; says whether anything is other than before.
    pub fn apply(&mut self, change: ObjectChange) -> bool {
        match change {
            ObjectChange::Service(key, value) => put(&mut self.services, key, value),
            ObjectChange::Slice(key, value) => put(&mut self.slices, key, value),
            ObjectChange::Pool(key, value) => put(&mut self.pools, key, value),
            ObjectChange::Advertisement(key, value) => put(&mut self.advertisements, key, value),
            ObjectChange::Namespace(key, value) => put(&mut self.namespaces, key, value),
            ObjectChange::Node(key, value) => put(&mut self.nodes, key, value),
            ObjectChange::VirtualIp(key, value) => put(&mut self.virtual_ips, key, value),
            ObjectChange::Agent(key, value) => put(&mut self.agents, key, value),
            ObjectChange::Unreadable(key, value) => put(&mut self.unreadable, key, value),
        }
    }

    /// What leads from these objects to others. The same `Arc` is taken to be unchanged.
    #[must_use]
    pub fn changes_to(&self, new: &Self) -> Vec<ObjectChange> {
        let mut changes = Vec::new();
        differ(&self.namespaces, &new.namespaces, ObjectChange::Namespace, &mut changes);
        differ(&self.nodes, &new.nodes, ObjectChange::Node, &mut changes);
        differ(&self.pools, &new.pools, ObjectChange::Pool, &mut changes);
        differ(&self.advertisements, &new.advertisements, ObjectChange::Advertisement, &mut changes);
        differ(&self.services, &new.services, ObjectChange::Service, &mut changes);
        differ(&self.slices, &new.slices, ObjectChange::Slice, &mut changes);
        differ(&self.virtual_ips, &new.virtual_ips, ObjectChange::VirtualIp, &mut changes);
        differ(&self.agents, &new.agents, ObjectChange::Agent, &mut changes);
        differ(&self.unreadable, &new.unreadable, ObjectChange::Unreadable, &mut changes);
        changes
    }
}

fn differ<K: Ord + Clone, V: PartialEq>(
    old: &BTreeMap<K, Arc<V>>,
    new: &BTreeMap<K, Arc<V>>,
    make: impl Fn(K, Option<Arc<V>>) -> ObjectChange,
    changes: &mut Vec<ObjectChange>,
) {
    let gone = old.keys().filter(|key| !new.contains_key(key));
    changes.extend(gone.map(|key| make(key.clone(), None)));
    for (key, value) in new {
        let same = old.get(key).is_some_and(|old| Arc::ptr_eq(old, value) || old == value);
        if !same {
            changes.push(make(key.clone(), Some(Arc::clone(value))));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(name: &str, label: &str) -> Arc<Namespace> {
        Arc::new(Namespace { name: name.into(), labels: [("l".into(), label.into())].into() })
    }

    #[test]
    fn changes_lead_from_one_state_to_the_other() {
        let mut old = Objects::default();
        for name in ["a", "b", "c"] {
            old.namespaces.insert(name.into(), namespace(name, "1"));
        }
        let mut new = old.clone();
        new.namespaces.remove("a");
        new.namespaces.insert("b".into(), namespace("b", "2"));
        new.namespaces.insert("c".into(), namespace("c", "1"));
        new.namespaces.insert("d".into(), namespace("d", "1"));

        let changes = old.changes_to(&new);
        assert_eq!(changes.len(), 3, "an equal object is no change: {changes:?}");
        for change in changes {
            assert!(old.apply(change.clone()));
            assert!(!old.apply(change), "the second time it is nothing new");
        }
        assert_eq!(old, new);
    }
}
