//! What happens around writes beyond the object itself: namespaces that end, definitions that make
//! kinds, and the versions of one object.

use std::sync::Arc;

use serde_json::Value;

use super::{
    allocation, definitions,
    failure::{Failure, Outcome},
    kinds::{CRD_STORAGE, Kind},
    objects::{finalizers, is_deleting, now},
    store::{Key, Object, Store, key_of},
};

/// Fails unless a new object's namespace takes new objects.
///
/// # Errors
/// When it is missing (404) or being deleted (403).
pub fn ensure_namespace(store: &Store, kind: &Kind, namespace: &str, object: &Value) -> Outcome<()> {
    if !kind.namespaced {
        return Ok(());
    }
    if namespace.is_empty() {
        return Err(Failure::bad_request("an empty namespace may not be set during creation"));
    }
    match store.get("namespaces", &(String::new(), namespace.to_owned())) {
        None => Err(Failure::not_found("", "namespaces", namespace)),
        Some(found) if is_deleting(&found) => {
            let why = format!(
                "unable to create new content in namespace {namespace} because it is being terminated"
            );
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            let mut failure = Failure::forbidden(&kind.group, &kind.plural, name, &why);
            failure.details["causes"] = serde_json::json!([{
                "reason": "NamespaceTerminating",
                "message": format!("namespace {namespace} is being terminated"),
                "field": "metadata.namespace",
            }]);
            Err(failure)
        }
        Some(_) => Ok(()),
    }
}

/// When an object is found valid: what needs others to be looked at.
///
/// # Errors
/// When it cannot be stored beside them.
pub fn after_validation(store: &mut Store, kind: &Kind, new: &mut Value) -> Outcome<()> {
    if &*kind.storage != "services" {
        return Ok(());
    }
    let causes = allocation::allocate(store, new);
    if causes.is_empty() {
        return Ok(());
    }
    let name = new["metadata"]["name"].as_str().unwrap_or_default();
    Err(Failure::invalid(&kind.group, &kind.kind, name, &causes))
}

/// When an object is stored.
pub fn after_write(store: &mut Store, kind: &Kind, object: &Object) {
    if &*kind.storage == CRD_STORAGE {
        definitions::install(store, object);
    }
}

/// Whether an object has to wait for something else than finalizers: a namespace for its content.
#[must_use]
pub fn holds(object: &Value) -> bool {
    object["kind"] == "Namespace"
        && object["spec"]["finalizers"].as_array().is_some_and(|list| !list.is_empty())
}

/// When an object is marked as deleted, before it is stored.
pub fn mark(object: &mut Value) {
    if object["kind"] == "Namespace" {
        object["status"]["phase"] = "Terminating".into();
    }
}

/// When an object that is marked as deleted is stored.
pub fn after_mark(store: &mut Store, _kind: &Kind, object: &Object) {
    if object["kind"] == "Namespace" {
        empty(store, &key_of(object).1);
    }
}

/// Before an object is removed or marked.
pub fn before_removal(store: &mut Store, kind: &Kind, object: &Value) {
    if &*kind.storage == CRD_STORAGE {
        definitions::empty(store, object);
    }
}

/// When an object is gone.
pub fn after_removal(store: &mut Store, kind: &Kind, object: &Object) {
    if &*kind.storage == CRD_STORAGE {
        definitions::uninstall(store, object);
    } else if kind.custom.is_some() {
        definitions::finish(store, kind);
    }
    // What the garbage collector does.
    for (storage, key) in store.orphans(object["metadata"]["uid"].as_str().unwrap_or_default()) {
        end(store, &storage, key);
    }
    let namespace = key_of(object).0;
    if !namespace.is_empty() {
        finish_namespace(store, &namespace);
    }
}

/// Removes an object, or marks it as deleted while it has finalizers.
pub fn end(store: &mut Store, storage: &Arc<str>, key: Key) {
    let Some(object) = store.get(storage, &key) else { return };
    if finalizers(&object).is_empty() {
        store.remove(storage, &key);
    } else if !is_deleting(&object) {
        let mut marked = Value::clone(&object);
        marked["metadata"]["deletionTimestamp"] = now().into();
        marked["metadata"]["deletionGracePeriodSeconds"] = 0.into();
        store.put(storage, key, marked);
    }
}

/// Deletes what is in a namespace, as the namespace controller does.
fn empty(store: &mut Store, namespace: &str) {
    for (storage, key) in store.keys_in_namespace(namespace) {
        end(store, &storage, key);
    }
    finish_namespace(store, namespace);
}

/// Removes a namespace that waited for its content.
fn finish_namespace(store: &mut Store, namespace: &str) {
    let key: Key = (String::new(), namespace.to_owned());
    let storage: Arc<str> = "namespaces".into();
    let Some(object) = store.get(&storage, &key) else { return };
    if !is_deleting(&object) || !store.keys_in_namespace(namespace).is_empty() {
        return;
    }
    let mut last = Value::clone(&object);
    last["spec"]["finalizers"] = serde_json::json!([]);
    if finalizers(&last).is_empty() {
        store.replace_quietly(&storage, &key, last);
        store.remove(&storage, &key);
    } else {
        store.put(&storage, key, last);
    }
}
