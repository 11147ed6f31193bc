//! One stored object, several served versions.

use std::borrow::Cow;

use serde_json::{Value, json};

use super::{
    kinds::Kind,
    strategy::{remove, set},
};

/// Fields of an Event: in core/v1, where they are stored, and in events.k8s.io/v1.
const EVENT_FIELDS: [(&str, &str); 6] = [
    ("message", "note"),
    ("involvedObject", "regarding"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
];

/// An object as a kind shows it.
#[must_use]
pub fn served<'a>(kind: &Kind, object: &'a Value) -> Cow<'a, Value> {
    let version = kind.api_version();
    if object["apiVersion"] == version.as_str() {
        return Cow::Borrowed(object);
    }
    let mut object = object.clone();
    object["apiVersion"] = version.into();
    if kind.group == "events.k8s.io" {
        for (core, events) in EVENT_FIELDS {
            rename(&mut object, core, events);
        }
        rename(&mut object, "reportingComponent", "reportingController");
    }
    Cow::Owned(object)
}

/// An object of a kind as it is stored.
pub fn stored(kind: &Kind, object: &mut Value) {
    if kind.group == "events.k8s.io" {
        for (core, events) in EVENT_FIELDS {
            rename(object, events, core);
        }
        rename(object, "reportingController", "reportingComponent");
        object["apiVersion"] = "v1".into();
    }
    if &*kind.storage == "events" {
        // What core/v1 always has, because its fields are no pointers.
        let defaults = [
            ("source", json!({})),
            ("eventTime", Value::Null),
            ("firstTimestamp", Value::Null),
            ("lastTimestamp", Value::Null),
        ];
        for (field, default) in defaults {
            if object.get(field).is_none() {
                object[field] = default;
            }
        }
    }
}

fn rename(object: &mut Value, from: &str, to: &str) {
    if let Some(value) = object.get(from).cloned() {
        remove(object, from);
        set(object, to, Some(value));
    }
}
