//! Who manages which fields: `metadata.managedFields`, after
//! `sigs.k8s.io/structured-merge-diff/merge/update.go`.

use serde_json::{Value, json};

use super::{
    failure::{Failure, Outcome},
    fields::{self, Set},
    kinds::Kind,
    objects::now,
    shape::Shape,
    strategy::{Part, remove},
};

/// Who writes, and how.
#[derive(Clone, Debug, Default)]
pub struct Manager {
    /// The name.
    pub name: String,
    /// Whether this is a patch of any type.
    pub patch: bool,
    /// Whether this is a server-side apply, which has settled who manages what.
    pub applied: bool,
}

/// What one manager has.
#[derive(Clone, Debug, PartialEq)]
struct Entry {
    manager: String,
    operation: String,
    subresource: String,
    api_version: String,
    time: String,
    fields: Set,
}

impl Entry {
    fn read(value: &Value) -> Self {
        let text = |field: &str| value[field].as_str().unwrap_or_default().to_owned();
        Self {
            manager: text("manager"),
            operation: text("operation"),
            subresource: text("subresource"),
            api_version: text("apiVersion"),
            time: text("time"),
            fields: Set::from_json(&value["fieldsV1"]),
        }
    }

    fn to_json(&self) -> Value {
        let mut entry = json!({
            "manager": self.manager, "operation": self.operation, "apiVersion": self.api_version,
            "time": self.time, "fieldsType": "FieldsV1", "fieldsV1": self.fields.to_json(),
        });
        if !self.subresource.is_empty() {
            entry["subresource"] = self.subresource.clone().into();
        }
        entry
    }

    /// As conflicts name it.
    fn title(&self) -> String {
        let mut title = format!("\"{}\"", self.manager);
        if !self.subresource.is_empty() {
            title += &format!(" with subresource \"{}\"", self.subresource);
        }
        if self.operation == "Update" {
            title += &format!(" using {}", self.api_version);
        }
        title
    }
}

fn entries(object: &Value) -> Vec<Entry> {
    object["metadata"]["managedFields"].as_array().into_iter().flatten().map(Entry::read).collect()
}

fn set_entries(object: &mut Value, mut entries: Vec<Entry>) {
    entries.retain(|entry| !entry.fields.is_empty());
    entries.sort_by(|a, b| {
        let key = |entry: &Entry| {
            (entry.operation.clone(), entry.time.clone(), entry.manager.clone(), entry.subresource.clone())
        };
        key(a).cmp(&key(b))
    });
    if entries.is_empty() {
        remove(&mut object["metadata"], "managedFields");
    } else {
        object["metadata"]["managedFields"] = entries.iter().map(Entry::to_json).collect();
    }
}

/// Fields that nobody manages: those that say which object it is, and those of the server.
const NOBODYS: [&str; 11] = [
    "name",
    "namespace",
    "creationTimestamp",
    "selfLink",
    "uid",
    "generation",
    "managedFields",
    "resourceVersion",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "clusterName",
];

/// An object as far as a request to one part of it can manage it.
fn manageable(kind: &Kind, part: Part, object: &Value) -> Value {
    let mut object = object.clone();
    for field in ["apiVersion", "kind"] {
        remove(&mut object, field);
    }
    match part {
        Part::Main if kind.status => {
            remove(&mut object, "status");
            // A namespace's only spec is a finalizer that the server sets.
            if &*kind.storage == "namespaces" {
                remove(&mut object, "spec");
            }
        }
        Part::Main => {}
        Part::Status if kind.custom.is_some() => {
            let status = object["status"].take();
            return if status.is_null() { json!({}) } else { json!({ "status": status }) };
        }
        Part::Status => remove(&mut object, "spec"),
    }
    for field in NOBODYS {
        remove(&mut object["metadata"], field);
    }
    if object["metadata"].as_object().is_none_or(serde_json::Map::is_empty) {
        remove(&mut object, "metadata");
    }
    object
}

fn subresource(part: Part) -> &'static str {
    match part {
        Part::Main => "",
        Part::Status => "status",
    }
}

/// Notes in `new` who manages what after a change that is no apply: what changed is the writer's.
pub fn update(kind: &Kind, part: Part, manager: &Manager, old: Option<&Value>, new: &mut Value) {
    if manager.applied {
        return keep_unchanged(old, new);
    }
    let shape = Shape::root(kind);
    // As in Kubernetes, where new objects are compared with an empty one of their type: these are
    // there from the start and nobody's.
    let before = old.map_or_else(
        || match kind.custom {
            Some(_) => json!({ "metadata": {} }),
            None => json!({ "metadata": {}, "spec": {}, "status": {} }),
        },
        |old| manageable(kind, part, old),
    );
    let after = manageable(kind, part, new);
    let difference = fields::compare(&before, &after, &shape);
    let touched = difference.changed.union(&difference.removed);
    let mut all = old.map(entries).unwrap_or_default();
    let is_own = |entry: &Entry| {
        entry.manager == manager.name
            && entry.operation == "Update"
            && entry.subresource == subresource(part)
            && entry.api_version == kind.api_version()
    };
    for entry in all.iter_mut().filter(|entry| !is_own(entry)) {
        entry.fields = entry.fields.difference(&touched);
    }
    let at = all.iter().position(is_own).unwrap_or_else(|| {
        all.push(own(kind, part, &manager.name, "Update"));
        all.len() - 1
    });
    all[at].fields = all[at].fields.difference(&difference.removed).union(&difference.changed);
    if !difference.changed.is_empty() {
        all[at].time = now();
    }
    set_entries(new, all);
}

fn own(kind: &Kind, part: Part, manager: &str, operation: &str) -> Entry {
    Entry {
        manager: manager.to_owned(),
        operation: operation.to_owned(),
        subresource: subresource(part).to_owned(),
        api_version: kind.api_version(),
        time: now(),
        fields: Set::default(),
    }
}

/// An apply that changes nothing but times changes nothing.
fn keep_unchanged(old: Option<&Value>, new: &mut Value) {
    let Some(old) = old else { return };
    let timeless = |object: &Value| {
        let mut entries = entries(object);
        entries.iter_mut().for_each(|entry| entry.time.clear());
        entries.sort_by_key(|entry| entry.title() + &entry.operation);
        let mut object = object.clone();
        remove(&mut object["metadata"], "managedFields");
        (object, entries)
    };
    if timeless(old) == timeless(new) {
        *new = old.clone();
    }
}

/// An object with what a manager wants of it, and with who manages what then.
///
/// # Errors
/// When others manage what would change, and it is not forced.
pub fn applied(
    kind: &Kind,
    part: Part,
    manager: &str,
    force: bool,
    live: &Value,
    config: &Value,
) -> Outcome<Value> {
    let shape = Shape::root(kind);
    let wanted = manageable(kind, part, config);
    let set = fields::of(&wanted, &shape);
    let mut all = entries(live);
    let is_own = |entry: &Entry| {
        entry.manager == manager && entry.operation == "Apply" && entry.subresource == subresource(part)
    };
    let before = all.iter().find(|entry| is_own(entry)).cloned();
    let mut merged = live.clone();
    fields::merge(&mut merged, &wanted, &shape);
    // What this manager applied before, does not any more, and nobody else manages, goes.
    let mut gone = before.as_ref().map(|entry| entry.fields.difference(&set)).unwrap_or_default();
    for entry in all.iter().filter(|entry| !is_own(entry)) {
        gone = gone.difference(&entry.fields.parents());
    }
    gone.difference(&set.parents()).remove_from(&mut merged, &shape);
    let difference = fields::compare(&manageable(kind, part, live), &manageable(kind, part, &merged), &shape);
    let mut conflicts = Vec::new();
    for entry in all.iter_mut().filter(|entry| !is_own(entry)) {
        let disputed = entry.fields.intersection(&difference.changed);
        conflicts.extend(disputed.paths().into_iter().map(|path| (entry.title(), path)));
        entry.fields = entry.fields.difference(&difference.changed).difference(&difference.removed);
    }
    if !conflicts.is_empty() && !force {
        return Err(Failure::apply_conflict(&conflicts));
    }
    all.retain(|entry| !is_own(entry));
    let mut entry = own(kind, part, manager, "Apply");
    if let Some(before) = before.filter(|before| before.fields == set) {
        entry.time = before.time;
    }
    entry.fields = set;
    all.push(entry);
    set_entries(&mut merged, all);
    Ok(merged)
}
