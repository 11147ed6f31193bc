//! The kinds that are served: those built in, and those of CustomResourceDefinitions.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::Value;

/// A kind in one version.
#[derive(Clone, Debug)]
pub struct Kind {
    /// Empty for the core group.
    pub group: String,
    /// E.g. `v1`.
    pub version: String,
    /// E.g. `services`, as in paths.
    pub plural: String,
    /// E.g. `service`.
    pub singular: String,
    /// E.g. `Service`.
    pub kind: String,
    /// E.g. `ServiceList`.
    pub list_kind: String,
    /// E.g. `svc`.
    pub short_names: Vec<String>,
    /// Whether its objects live in namespaces.
    pub namespaced: bool,
    /// Whether status is a subresource of its own.
    pub status: bool,
    /// Whether `metadata.generation` counts changes of the spec.
    pub generation: bool,
    /// Which objects these are: versions of one resource share them.
    pub storage: Arc<str>,
    /// Of a custom kind: what its definition says.
    pub custom: Option<Arc<Custom>>,
}

/// What a CustomResourceDefinition says about one version.
#[derive(Debug)]
pub struct Custom {
    /// `openAPIV3Schema`.
    pub schema: Value,
    /// `additionalPrinterColumns`.
    pub columns: Vec<Value>,
}

impl Kind {
    /// `v1`, or `coordination.k8s.io/v1`.
    #[must_use]
    pub fn api_version(&self) -> String {
        group_version(&self.group, &self.version)
    }
}

/// `v1`, or `coordination.k8s.io/v1`.
#[must_use]
pub fn group_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

/// Has a namespace.
const NAMESPACED: u8 = 1;
/// Has a status subresource.
const STATUS: u8 = 2;
/// Counts generations.
const GENERATION: u8 = 4;

/// Group, version, plural, kind, short name, flags.
type Row = (&'static str, &'static str, &'static str, &'static str, &'static str, u8);

/// What `kubectl api-resources` says of them, and whether their strategy sets `metadata.generation`.
/// Services have none, in spite of their spec (`pkg/registry/core/service/strategy.go`).
const BUILT_IN: [Row; 20] = [
    ("", "v1", "namespaces", "Namespace", "ns", STATUS),
    ("", "v1", "nodes", "Node", "no", STATUS),
    ("", "v1", "services", "Service", "svc", NAMESPACED | STATUS),
    ("", "v1", "endpoints", "Endpoints", "ep", NAMESPACED),
    ("", "v1", "events", "Event", "ev", NAMESPACED),
    ("", "v1", "pods", "Pod", "po", NAMESPACED | STATUS | GENERATION),
    ("", "v1", "configmaps", "ConfigMap", "cm", NAMESPACED),
    ("", "v1", "secrets", "Secret", "", NAMESPACED),
    ("", "v1", "serviceaccounts", "ServiceAccount", "sa", NAMESPACED),
    ("events.k8s.io", "v1", "events", "Event", "ev", NAMESPACED),
    ("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice", "", NAMESPACED | GENERATION),
    ("coordination.k8s.io", "v1", "leases", "Lease", "", NAMESPACED),
    ("apps", "v1", "daemonsets", "DaemonSet", "ds", NAMESPACED | STATUS | GENERATION),
    ("apps", "v1", "deployments", "Deployment", "deploy", NAMESPACED | STATUS | GENERATION),
    ("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", "pdb", NAMESPACED | STATUS | GENERATION),
    ("apiextensions.k8s.io", "v1", "customresourcedefinitions", CRD, "crd", STATUS | GENERATION),
    ("rbac.authorization.k8s.io", "v1", "roles", "Role", "", NAMESPACED),
    ("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding", "", NAMESPACED),
    ("rbac.authorization.k8s.io", "v1", "clusterroles", "ClusterRole", "", 0),
    ("rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", "", 0),
];

/// The kind of CustomResourceDefinitions.
pub const CRD: &str = "CustomResourceDefinition";
/// Where they are stored.
pub const CRD_STORAGE: &str = "apiextensions.k8s.io/customresourcedefinitions";

/// Every kind, by group, version and plural.
#[derive(Debug)]
pub struct Registry(BTreeMap<(String, String, String), Arc<Kind>>);

impl Default for Registry {
    fn default() -> Self {
        let mut registry = Self(BTreeMap::new());
        for row in &BUILT_IN {
            registry.add(built_in(row));
        }
        registry
    }
}

fn built_in(&(group, version, plural, kind, short, flags): &Row) -> Kind {
    // Events of both groups are the same objects.
    let storage_group = if plural == "events" { "" } else { group };
    Kind {
        group: group.into(),
        version: version.into(),
        plural: plural.into(),
        singular: kind.to_lowercase(),
        kind: kind.into(),
        list_kind: format!("{kind}List"),
        short_names: if short.is_empty() { Vec::new() } else { vec![short.into()] },
        namespaced: flags & NAMESPACED != 0,
        status: flags & STATUS != 0,
        generation: flags & GENERATION != 0,
        storage: storage(storage_group, plural),
        custom: None,
    }
}

/// Where the objects of a resource are stored.
#[must_use]
pub fn storage(group: &str, plural: &str) -> Arc<str> {
    if group.is_empty() { plural.into() } else { format!("{group}/{plural}").into() }
}

impl Registry {
    /// Adds a kind, or replaces it.
    pub fn add(&mut self, kind: Kind) {
        let key = (kind.group.clone(), kind.version.clone(), kind.plural.clone());
        self.0.insert(key, Arc::new(kind));
    }

    /// Takes out all versions of a resource.
    pub fn remove(&mut self, group: &str, plural: &str) {
        self.0.retain(|_, kind| kind.group != group || kind.plural != plural);
    }

    /// The kind at a path.
    #[must_use]
    pub fn find(&self, group: &str, version: &str, plural: &str) -> Option<Arc<Kind>> {
        self.0.get(&(group.to_owned(), version.to_owned(), plural.to_owned())).cloned()
    }

    /// Every kind, ordered by group, version and plural.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Kind>> {
        self.0.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_of_both_groups_are_the_same_objects() {
        let registry = Registry::default();
        let core = registry.find("", "v1", "events").unwrap();
        let events = registry.find("events.k8s.io", "v1", "events").unwrap();
        assert_eq!(core.storage, events.storage);
        let storages: std::collections::BTreeSet<_> = registry.iter().map(|kind| &kind.storage).collect();
        assert_eq!(storages.len(), BUILT_IN.len() - 1);
    }
}
