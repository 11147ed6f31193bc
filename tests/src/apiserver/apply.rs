//! Server-side apply.

use serde_json::json;

use super::{
    call::Call,
    failure::{Failure, Outcome},
    managed,
    objects::{self, Write, Written},
    store::{Key, Store},
    strategy::{Part, copy},
    versions,
};

/// Applies what a manager wants to an object, or creates it.
///
/// # Errors
/// When others manage what it would change, or the object is invalid.
pub fn apply(store: &mut Store, mut write: Write, key: &Key, call: &Call) -> Outcome<Written> {
    let mut config = call.object()?;
    let manager = call.query.get("fieldManager");
    if manager.is_empty() {
        return Err(Failure::bad_request(
            "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch",
        ));
    }
    let kind = write.kind.clone();
    // Unlike elsewhere, both are required.
    for field in ["apiVersion", "kind"] {
        if config[field].as_str().is_none_or(str::is_empty) {
            return Err(Failure::bad_request(format!("invalid object type: {field} is not set")));
        }
    }
    let named = config["metadata"]["name"].as_str().is_some_and(|name| !name.is_empty());
    if config["metadata"]["managedFields"].as_array().is_some_and(|list| !list.is_empty()) {
        return Err(Failure::bad_request("metadata.managedFields must be nil"));
    }
    objects::address(&kind, key, &mut config)?;
    let force = call.query.is("force");
    write.manager.applied = true;
    match store.get(&kind.storage, key) {
        // What is there has a name already.
        None if write.part == Part::Main && !named => Err(Failure::bad_request(format!(
            "the name of the object ({} based on URL) was undeterminable: name must be provided",
            key.1
        ))),
        None if write.part == Part::Main => {
            let empty = json!({ "apiVersion": config["apiVersion"], "kind": config["kind"], "metadata": config["metadata"] });
            let new = managed::applied(&kind, write.part, manager, force, &empty, &config)?;
            objects::create(store, &write, key, new)
        }
        None => Err(Failure::not_found(&kind.group, &kind.plural, &key.1)),
        Some(old) => {
            let live = versions::served(&kind, &old);
            let mut new = managed::applied(&kind, write.part, manager, force, &live, &config)?;
            if config["metadata"].get("resourceVersion").is_some() {
                copy(&config["metadata"], &mut new["metadata"], "resourceVersion");
            }
            if config["metadata"].get("uid").is_some() {
                copy(&config["metadata"], &mut new["metadata"], "uid");
            }
            objects::replace(store, &write, key, new)
        }
    }
}
