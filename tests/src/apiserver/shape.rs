//! Which lists and maps are merged piece by piece, and which are one value: `+listType`,
//! `+mapType` of Kubernetes' types, `x-kubernetes-list-type` of custom ones.

use std::borrow::Cow;

use serde_json::Value;

use super::kinds::Kind;

/// What a list is to those who own parts of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListType {
    /// One value.
    Atomic,
    /// Values that are there or not.
    Set,
    /// Objects that are told apart by these fields.
    Map(Vec<String>),
}

/// A place in the objects of a kind.
#[derive(Clone, Debug)]
pub struct Shape<'a> {
    path: String,
    /// Of a custom kind: the schema of this place.
    schema: Option<&'a Value>,
    /// Whether this is a custom kind, outside of its metadata.
    custom: bool,
}

/// Lists of built-in kinds that are no single value, by the end of their path and their keys. No keys:
/// a set.
const LISTS: [(&str, &[&str]); 19] = [
    (".metadata.finalizers", &[]),
    (".metadata.ownerReferences", &["uid"]),
    (".status.conditions", &["type"]),
    (".status.addresses", &["type"]),
    (".spec.podCIDRs", &[]),
    (".spec.ports", &["port", "protocol"]),
    (".containers[].ports", &["containerPort", "protocol"]),
    (".spec.containers", &["name"]),
    (".spec.initContainers", &["name"]),
    (".spec.volumes", &["name"]),
    (".spec.imagePullSecrets", &["name"]),
    (".spec.topologySpreadConstraints", &["topologyKey", "whenUnsatisfiable"]),
    (".containers[].env", &["name"]),
    (".containers[].volumeMounts", &["mountPath"]),
    (".initContainers[].env", &["name"]),
    (".initContainers[].volumeMounts", &["mountPath"]),
    (".status.podIPs", &["ip"]),
    (".status.loadBalancer.ingress[].ports", &[]),
    (".status.names.shortNames", &[]),
];

/// Maps of built-in kinds that are one value.
const ATOMIC_MAPS: [&str; 6] =
    [".spec.selector", ".matchLabels", ".spec.nodeSelector", ".secretRef", ".involvedObject", ".roleRef"];

impl<'a> Shape<'a> {
    /// The whole object.
    #[must_use]
    pub fn root(kind: &'a Kind) -> Self {
        let schema = kind.custom.as_ref().map(|custom| &custom.schema);
        Self { path: String::new(), schema, custom: schema.is_some() }
    }

    /// A field of it, or the value of a key.
    #[must_use]
    pub fn field(&self, name: &str) -> Self {
        let path = format!("{}.{name}", self.path);
        // The metadata of custom kinds is like that of all.
        let custom = self.custom && path != ".metadata";
        let schema = self.schema.filter(|_| custom).and_then(|schema| {
            let declared = schema["properties"].get(name);
            declared.or_else(|| schema.get("additionalProperties").filter(|any| any.is_object()))
        });
        Self { path, schema, custom }
    }

    /// An item of it.
    #[must_use]
    pub fn item(&self) -> Self {
        let schema = self.schema.and_then(|schema| schema.get("items"));
        Self { path: format!("{}[]", self.path), schema, custom: self.custom }
    }

    /// What it is, being a list.
    #[must_use]
    pub fn list_type(&self) -> ListType {
        if self.custom {
            let schema = self.schema.unwrap_or(&Value::Null);
            let keys = || schema["x-kubernetes-list-map-keys"].as_array().into_iter().flatten();
            return match schema["x-kubernetes-list-type"].as_str() {
                Some("set") => ListType::Set,
                Some("map") => ListType::Map(keys().filter_map(Value::as_str).map(str::to_owned).collect()),
                _ => ListType::Atomic,
            };
        }
        match LISTS.iter().find(|(end, _)| self.path.ends_with(end)) {
            None => ListType::Atomic,
            Some((_, [])) => ListType::Set,
            Some((_, keys)) => ListType::Map(keys.iter().map(|key| (*key).to_owned()).collect()),
        }
    }

    /// Whether it is one value, being a map.
    #[must_use]
    pub fn is_atomic_map(&self) -> bool {
        if self.custom {
            return self.schema.is_some_and(|schema| schema["x-kubernetes-map-type"] == "atomic");
        }
        ATOMIC_MAPS.iter().any(|end| self.path.ends_with(end))
    }

    /// The value of a key of an item that does not have it.
    #[must_use]
    pub fn default_key(&self, key: &str) -> Cow<'a, Value> {
        let declared = self.schema.and_then(|schema| schema["properties"][key].get("default"));
        match declared {
            Some(default) => Cow::Borrowed(default),
            None if key == "protocol" => Cow::Owned("TCP".into()),
            None => Cow::Owned(Value::Null),
        }
    }
}
