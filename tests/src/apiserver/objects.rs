//! Writing objects: create, replace, delete; what `registry/generic/registry/store.go` does.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{
    failure::{Cause, Failure, Outcome},
    hooks,
    kinds::Kind,
    managed::{self, Manager},
    store::{Key, Object, Store},
    strategy::{self, Part, remove, set},
    versions,
};

/// Everything that a write needs to know beside the object.
#[derive(Clone, Debug)]
pub struct Write {
    /// Of what.
    pub kind: Arc<Kind>,
    /// Which part.
    pub part: Part,
    /// Who.
    pub manager: Manager,
    /// Everything as if, but nothing is stored.
    pub dry_run: bool,
    /// Fields that the kind does not have are refused instead of dropped: `fieldValidation=Strict`.
    pub strict: bool,
}

/// What a write did.
#[derive(Clone, Debug)]
pub enum Written {
    /// There is a new object.
    Created(Object),
    /// There was one, and this is what it is now.
    Updated(Object),
    /// It is gone; this is its last state.
    Deleted(Object),
}

impl Written {
    /// The object.
    #[must_use]
    pub fn object(&self) -> &Object {
        let (Self::Created(object) | Self::Updated(object) | Self::Deleted(object)) = self;
        object
    }
}

/// What has to be so for a deletion: `DeleteOptions.preconditions`.
#[derive(Clone, Debug, Default)]
pub struct Preconditions {
    /// `metadata.uid`
    pub uid: Option<String>,
    /// `metadata.resourceVersion`
    pub version: Option<String>,
}

/// The time, as metadata has it.
#[must_use]
pub fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// The object of a request, with name and namespace of the path; an empty name is taken from the body.
///
/// # Errors
/// When the body is of something else than the path says.
pub fn address(kind: &Kind, key: &Key, object: &mut Value) -> Outcome<()> {
    if !object.is_object() {
        return Err(Failure::bad_request("the object provided is unrecognized"));
    }
    for (field, expected) in [("kind", kind.kind.clone()), ("apiVersion", kind.api_version())] {
        match object[field].as_str() {
            None | Some("") => object[field] = expected.into(),
            Some(given) if given == expected => {}
            Some(given) => {
                let what = if field == "kind" { "kind" } else { "API version" };
                let message = format!(
                    "the {what} in the data ({given}) does not match the expected {what} ({expected})"
                );
                return Err(Failure::bad_request(message));
            }
        }
    }
    strategy::ensure_object(object, "metadata");
    let metadata = &mut object["metadata"];
    if !kind.namespaced {
        remove(metadata, "namespace");
    } else if let Some(given) = metadata["namespace"].as_str().filter(|given| !given.is_empty()) {
        if given != key.0 {
            return Err(Failure::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
    } else {
        metadata["namespace"] = key.0.clone().into();
    }
    if !key.1.is_empty() {
        let given = metadata["name"].as_str().unwrap_or_default();
        if !given.is_empty() && given != key.1 {
            let message =
                format!("the name of the object ({given}) does not match the name on the URL ({})", key.1);
            return Err(Failure::bad_request(message));
        }
        metadata["name"] = key.1.clone().into();
    }
    Ok(())
}

/// Stores a new object.
///
/// # Errors
/// When the name is taken, the namespace is missing or ends, or the object is invalid.
pub fn create(store: &mut Store, write: &Write, key: &Key, mut object: Value) -> Outcome<Written> {
    let kind = &write.kind;
    address(kind, key, &mut object)?;
    let version = object["metadata"]["resourceVersion"].as_str().unwrap_or_default();
    if !version.is_empty() && version != "0" && !write.manager.applied {
        return Err(Failure::bad_request("resourceVersion should not be set on objects to be created"));
    }
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
    hooks::ensure_namespace(store, kind, &namespace, &object)?;
    let fresh = system_metadata(store, &mut object["metadata"]);
    let name = generated_name(&mut object["metadata"], &fresh);
    versions::stored(kind, &mut object);
    strategy::prepare_create(kind, write.strict, &mut object)?;
    if kind.generation {
        object["metadata"]["generation"] = 1.into();
    }
    let key = (namespace, name);
    if store.get(&kind.storage, &key).is_some() {
        return Err(Failure::already_exists(&kind.group, &kind.plural, &key.1));
    }
    managed::update(kind, write.part, &write.manager, None, &mut object);
    // Nobody manages what the server gives out.
    hooks::after_validation(store, kind, &mut object)?;
    if write.dry_run {
        return Ok(Written::Created(Arc::new(object)));
    }
    let object = store.put(&kind.storage, key, object);
    hooks::after_write(store, kind, &object);
    Ok(Written::Created(object))
}

/// Sets what only the server sets; gives the uid.
fn system_metadata(store: &mut Store, metadata: &mut Value) -> String {
    for field in
        ["resourceVersion", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "generation"]
    {
        remove(metadata, field);
    }
    let uid = store.uid();
    metadata["uid"] = uid.clone().into();
    drop_empty(metadata);
    metadata["creationTimestamp"] = now().into();
    uid
}

/// `generateName` plus five characters, where there is no name.
fn generated_name(metadata: &mut Value, uid: &str) -> String {
    const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    let name = metadata["name"].as_str().unwrap_or_default();
    let prefix = metadata["generateName"].as_str().unwrap_or_default();
    if !name.is_empty() || prefix.is_empty() {
        return name.to_owned();
    }
    let mut bits = uid
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let mut name = prefix.to_owned();
    for _ in 0..5 {
        name.push(char::from(ALPHABET[(bits >> 32) as usize % ALPHABET.len()]));
        bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    }
    metadata["name"] = name.clone().into();
    name
}

/// Stores a changed object in place of what is there; what `new` is made of is seen by `change`.
///
/// # Errors
/// When it is not there, has changed since, or the change is invalid.
pub fn replace(store: &mut Store, write: &Write, key: &Key, mut new: Value) -> Outcome<Written> {
    let kind = &write.kind;
    address(kind, key, &mut new)?;
    let Some(old) = store.get(&kind.storage, key) else {
        let has_version =
            new["metadata"]["resourceVersion"].as_str().is_some_and(|version| !version.is_empty());
        if write.part == Part::Main && strategy::created_by_update(kind) && !has_version {
            return create(store, write, key, new);
        }
        return Err(Failure::not_found(&kind.group, &kind.plural, &key.1));
    };
    check_versions(kind, &old, &mut new, write)?;
    versions::stored(kind, &mut new);
    keep_metadata(&old, &mut new);
    strategy::prepare_update(kind, write.part, write.strict, &old, &mut new)?;
    check_finalizers(kind, &old, &new)?;
    if kind.generation && write.part == Part::Main && counts(&old, &new) {
        let generation = old["metadata"]["generation"].as_u64().unwrap_or_default();
        new["metadata"]["generation"] = (generation + 1).into();
    }
    managed::update(kind, write.part, &write.manager, Some(&old), &mut new);
    hooks::after_validation(store, kind, &mut new)?;
    if write.dry_run {
        return Ok(Written::Updated(Arc::new(new)));
    }
    if is_finished(&new) {
        let last = remove_last(store, kind, key, new);
        return Ok(Written::Updated(last));
    }
    if *old == new {
        // Nothing is written, and the resource version stays.
        return Ok(Written::Updated(old));
    }
    let object = store.put(&kind.storage, key.clone(), new);
    hooks::after_write(store, kind, &object);
    Ok(Written::Updated(object))
}

fn check_versions(kind: &Kind, old: &Value, new: &mut Value, write: &Write) -> Outcome<()> {
    let name = old["metadata"]["name"].as_str().unwrap_or_default();
    let given = new["metadata"]["resourceVersion"].as_str().unwrap_or_default();
    if given.is_empty() || given == "0" {
        // A patch gets the version of what it was made of.
        if strategy::needs_version(kind) && !write.manager.patch {
            let causes = [Cause {
                reason: "FieldValueInvalid",
                field: "metadata.resourceVersion".into(),
                message: "Invalid value: 0: must be specified for an update".into(),
            }];
            return Err(Failure::invalid(&kind.group, &kind.plural, name, &causes));
        }
    } else if Some(given) != old["metadata"]["resourceVersion"].as_str() {
        return Err(Failure::modified(&kind.group, &kind.plural, name));
    }
    let uid = new["metadata"]["uid"].as_str().unwrap_or_default();
    let current = old["metadata"]["uid"].as_str().unwrap_or_default();
    if !uid.is_empty() && uid != current {
        let why = format!("Precondition failed: UID in precondition: {uid}, UID in object meta: {current}");
        return Err(Failure::conflict(&kind.group, &kind.plural, name, &why));
    }
    Ok(())
}

/// What no update changes.
fn keep_metadata(old: &Value, new: &mut Value) {
    let fields = [
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "resourceVersion",
        "namespace",
    ];
    for field in fields {
        strategy::copy(&old["metadata"], &mut new["metadata"], field);
    }
    remove(&mut new["metadata"], "selfLink");
    drop_empty(&mut new["metadata"]);
}

/// Empty maps and lists of metadata are left out, as Go leaves them out.
fn drop_empty(metadata: &mut Value) {
    for field in ["labels", "annotations", "finalizers", "ownerReferences"] {
        let value = &metadata[field];
        let is_empty = value.as_object().is_some_and(serde_json::Map::is_empty)
            || value.as_array().is_some_and(Vec::is_empty)
            || value.is_null();
        if is_empty {
            remove(metadata, field);
        }
    }
}

fn check_finalizers(kind: &Kind, old: &Value, new: &Value) -> Outcome<()> {
    if !is_deleting(old) {
        return Ok(());
    }
    let had = finalizers(old);
    let fresh: Vec<&str> = finalizers(new).into_iter().filter(|name| !had.contains(name)).collect();
    if fresh.is_empty() {
        return Ok(());
    }
    let quoted: Vec<String> = fresh.iter().map(|name| format!("\"{name}\"")).collect();
    let why = format!(
        "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
        quoted.join(", ")
    );
    let name = old["metadata"]["name"].as_str().unwrap_or_default();
    Err(Failure::invalid(&kind.group, &kind.kind, name, &[Cause::forbidden("metadata.finalizers", &why)]))
}

/// Whether a change is one that `metadata.generation` counts: of anything but metadata and status.
fn counts(old: &Value, new: &Value) -> bool {
    let rest = |object: &Value| {
        let mut object = object.clone();
        for field in ["metadata", "status", "apiVersion", "kind"] {
            remove(&mut object, field);
        }
        object
    };
    rest(old) != rest(new)
}

/// The names of an object's finalizers.
#[must_use]
pub fn finalizers(object: &Value) -> Vec<&str> {
    object["metadata"]["finalizers"].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Whether an object waits for its finalizers.
#[must_use]
pub fn is_deleting(object: &Value) -> bool {
    object["metadata"]["deletionTimestamp"].is_string()
}

fn is_finished(object: &Value) -> bool {
    is_deleting(object) && finalizers(object).is_empty() && !hooks::holds(object)
}

/// Removes an object whose last finalizer went; watchers are shown the object without it.
fn remove_last(store: &mut Store, kind: &Arc<Kind>, key: &Key, last: Value) -> Object {
    store.replace_quietly(&kind.storage, key, last);
    let object = store.remove(&kind.storage, key).unwrap_or_default();
    hooks::after_removal(store, kind, &object);
    object
}

/// Deletes an object, or marks it as deleted while it has finalizers.
///
/// # Errors
/// When it is not there, or is not the one that is meant.
pub fn delete(store: &mut Store, write: &Write, key: &Key, only: &Preconditions) -> Outcome<Written> {
    let kind = &write.kind;
    let Some(old) = store.get(&kind.storage, key) else {
        return Err(Failure::not_found(&kind.group, &kind.plural, &key.1));
    };
    let conditions = [
        ("UID", "uid", &only.uid, "deleted and then recreated"),
        ("ResourceVersion", "resourceVersion", &only.version, "modified"),
    ];
    for (title, field, expected, what) in conditions {
        let current = old["metadata"][field].as_str().unwrap_or_default();
        if let Some(expected) = expected.as_deref().filter(|expected| *expected != current) {
            let why = format!(
                "the {title} in the precondition ({expected}) does not match the {title} in record \
                 ({current}). The object might have been {what}"
            );
            return Err(Failure::conflict(&kind.group, &kind.kind, &key.1, &why));
        }
    }
    if write.dry_run {
        return Ok(Written::Deleted(old));
    }
    hooks::before_removal(store, kind, &old);
    // Which may have put a finalizer on it.
    let old = store.get(&kind.storage, key).unwrap_or(old);
    if finalizers(&old).is_empty() && !hooks::holds(&old) {
        let last = store.remove(&kind.storage, key).unwrap_or(old);
        hooks::after_removal(store, kind, &last);
        return Ok(Written::Deleted(last));
    }
    if is_deleting(&old) {
        return Ok(Written::Updated(old));
    }
    let mut marked = Value::clone(&old);
    let metadata = &mut marked["metadata"];
    metadata["deletionTimestamp"] = now().into();
    metadata["deletionGracePeriodSeconds"] = 0.into();
    let generation = metadata["generation"].as_u64().filter(|generation| *generation > 0);
    set(metadata, "generation", generation.map(|generation| json!(generation + 1)));
    hooks::mark(&mut marked);
    let object = store.put(&kind.storage, key.clone(), marked);
    hooks::after_mark(store, kind, &object);
    Ok(Written::Updated(object))
}
