//! What each kind does to an object before it is stored: defaults, fields that clients cannot set,
//! validation.

use serde_json::{Value, json};

use super::{
    definitions,
    failure::{Cause, Failure, Outcome},
    kinds::{CRD_STORAGE, Kind},
    names, schema, service, service_rules, slices,
};

/// Which part of an object a request may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All but the status, where that is a subresource.
    Main,
    /// The status.
    Status,
}

/// Kinds that a PUT creates when they are not there: `AllowCreateOnUpdate` of their strategies.
const CREATED_BY_UPDATE: [&str; 9] = [
    "services",
    "endpoints",
    "events",
    "coordination.k8s.io/leases",
    "rbac.authorization.k8s.io/roles",
    "rbac.authorization.k8s.io/rolebindings",
    "rbac.authorization.k8s.io/clusterroles",
    "rbac.authorization.k8s.io/clusterrolebindings",
    "policy/poddisruptionbudgets",
];

/// Whether a PUT of an object that is not there creates it.
#[must_use]
pub fn created_by_update(kind: &Kind) -> bool {
    CREATED_BY_UPDATE.contains(&&*kind.storage)
}

/// Whether a PUT has to name the resource version that it replaces: where `AllowUnconditionalUpdate`
/// is false.
#[must_use]
pub fn needs_version(kind: &Kind) -> bool {
    kind.custom.is_some()
        || ["coordination.k8s.io/leases", "apiextensions.k8s.io/customresourcedefinitions"]
            .contains(&&*kind.storage)
}

/// Makes a new object what will be stored: without what clients cannot set, with defaults, checked.
///
/// # Errors
/// When it is invalid.
pub fn prepare_create(kind: &Kind, strict: bool, object: &mut Value) -> Outcome<()> {
    // Nodes come with their status: that is how a kubelet registers.
    if kind.status && &*kind.storage != "nodes" {
        remove(object, "status");
    }
    match &*kind.storage {
        "namespaces" => {
            object["spec"] = json!({ "finalizers": ["kubernetes"] });
            object["status"] = json!({ "phase": "Active" });
            let name = object["metadata"]["name"].clone();
            ensure_object(&mut object["metadata"], "labels");
            object["metadata"]["labels"]["kubernetes.io/metadata.name"] = name;
        }
        "pods" => object["status"] = json!({ "phase": "Pending", "qosClass": "BestEffort" }),
        _ => {}
    }
    finish(kind, strict, None, object)
}

/// Makes a changed object what will be stored: parts that this request cannot change are as before.
///
/// # Errors
/// When it is invalid.
pub fn prepare_update(kind: &Kind, part: Part, strict: bool, old: &Value, new: &mut Value) -> Outcome<()> {
    match part {
        Part::Main if kind.status => copy(old, new, "status"),
        Part::Main => {}
        Part::Status if kind.custom.is_some() => {
            // Of a custom resource, nothing but the status (`statusStrategy.PrepareForUpdate`).
            let (status, managed) =
                (new.get("status").cloned(), new["metadata"].get("managedFields").cloned());
            *new = old.clone();
            set(new, "status", status);
            set(&mut new["metadata"], "managedFields", managed);
        }
        Part::Status => copy(old, new, "spec"),
    }
    if &*kind.storage == "namespaces" {
        copy(old, new, "spec");
        if part == Part::Main {
            copy(old, new, "status");
        }
    }
    finish(kind, strict, Some((part, old)), new)
}

fn finish(kind: &Kind, strict: bool, before: Option<(Part, &Value)>, object: &mut Value) -> Outcome<()> {
    if let Some(custom) = &kind.custom {
        let unknown = schema::prune(&custom.schema, object);
        if strict && !unknown.is_empty() {
            let all: Vec<String> = unknown.iter().map(|path| format!("unknown field \"{path}\"")).collect();
            return Err(Failure::bad_request(format!("strict decoding error: {}", all.join(", "))));
        }
        schema::set_defaults(&custom.schema, object);
    }
    let mut causes = names::check_metadata(kind, object);
    causes.extend(specific(kind, before, object));
    if causes.is_empty() {
        return Ok(());
    }
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    Err(Failure::invalid(&kind.group, &kind.kind, name, &causes))
}

fn specific(kind: &Kind, before: Option<(Part, &Value)>, object: &mut Value) -> Vec<Cause> {
    match &*kind.storage {
        "services" => {
            service::prepare(before, object);
            service_rules::check(before, object)
        }
        "discovery.k8s.io/endpointslices" => {
            slices::prepare(object);
            slices::check(before.map(|(_, old)| old), object)
        }
        CRD_STORAGE => {
            definitions::prepare(object);
            definitions::check(object)
        }
        _ => kind.custom.as_ref().map_or_else(Vec::new, |custom| {
            schema::check(&custom.schema, before.map(|(_, old)| old), object)
        }),
    }
}

/// Makes a field the same as in another object, absent when it is absent there.
pub fn copy(from: &Value, to: &mut Value, field: &str) {
    set(to, field, from.get(field).cloned());
}

/// Sets a field, or removes it.
pub fn set(object: &mut Value, field: &str, value: Option<Value>) {
    match value {
        Some(value) => object[field] = value,
        None => remove(object, field),
    }
}

/// Removes a field.
pub fn remove(object: &mut Value, field: &str) {
    if let Some(fields) = object.as_object_mut() {
        fields.remove(field);
    }
}

/// Makes a field an object, if it is none.
pub fn ensure_object(object: &mut Value, field: &str) {
    if !object[field].is_object() {
        object[field] = json!({});
    }
}
