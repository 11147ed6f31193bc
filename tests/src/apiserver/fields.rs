//! Sets of fields, as `metadata.managedFields` has them (`FieldsV1`), and what they are good for:
//! which fields a value has, and which differ between two.

use std::{collections::BTreeMap, fmt::Write as _};

use serde_json::{Map, Value, json};

use super::shape::{ListType, Shape};

/// A set of fields. Steps are named as in FieldsV1: `f:spec`, `k:{"port":80}`, `v:"a"`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Set(BTreeMap<String, Node>);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Node {
    /// Whether the field itself is in the set, beside fields in it.
    member: bool,
    below: Set,
}

impl Set {
    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Reads FieldsV1.
    #[must_use]
    pub fn from_json(value: &Value) -> Self {
        let mut set = Self::default();
        for (step, below) in value.as_object().into_iter().flatten().filter(|(step, _)| *step != ".") {
            let fields = below.as_object();
            let member = fields.is_none_or(|fields| fields.is_empty() || fields.contains_key("."));
            set.0.insert(step.clone(), Node { member, below: Self::from_json(below) });
        }
        set
    }

    /// As FieldsV1.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut fields = Map::new();
        for (step, node) in &self.0 {
            let mut below = node.below.to_json();
            if node.member && !node.below.is_empty() {
                below["."] = json!({});
            }
            fields.insert(step.clone(), below);
        }
        fields.into()
    }

    fn mark(&mut self, step: &str) {
        self.0.entry(step.to_owned()).or_default().member = true;
    }

    fn put(&mut self, step: &str, below: Self) {
        if !below.is_empty() {
            let node = self.0.entry(step.to_owned()).or_default();
            node.below = node.below.union(&below);
        }
    }

    fn combine(&self, other: &Self, member: impl Fn(bool, bool) -> bool + Copy) -> Self {
        let (mut out, none) = (Self::default(), Node::default());
        let steps = self.0.keys().chain(other.0.keys().filter(|step| !self.0.contains_key(*step)));
        for step in steps {
            let (left, right) = (self.0.get(step).unwrap_or(&none), other.0.get(step).unwrap_or(&none));
            let node = Node {
                member: member(left.member, right.member),
                below: left.below.combine(&right.below, member),
            };
            if node.member || !node.below.is_empty() {
                out.0.insert(step.clone(), node);
            }
        }
        out
    }

    /// What is in either.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        self.combine(other, |left, right| left || right)
    }

    /// What is in both.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        self.combine(other, |left, right| left && right)
    }

    /// What is in this one alone.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        self.combine(other, |left, right| left && !right)
    }

    /// The same fields, and each that one of them is in.
    #[must_use]
    pub fn parents(&self) -> Self {
        let parent = |(step, node): (&String, &Node)| {
            (step.clone(), Node { member: true, below: node.below.parents() })
        };
        Self(self.0.iter().map(parent).collect())
    }

    /// The fields, as conflicts name them: `.spec.ports[port=80].name`.
    #[must_use]
    pub fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        self.collect_paths("", &mut paths);
        paths
    }

    fn collect_paths(&self, before: &str, paths: &mut Vec<String>) {
        for (step, node) in &self.0 {
            let path = format!("{before}{}", shown(step));
            if node.member {
                paths.push(path.clone());
            }
            node.below.collect_paths(&path, paths);
        }
    }

    /// Removes the fields of this set from a value, the deepest first; items of lists with them.
    pub fn remove_from(&self, value: &mut Value, shape: &Shape<'_>) {
        for (step, node) in &self.0 {
            if let Some(name) = step.strip_prefix("f:") {
                let Some(fields) = value.as_object_mut() else { continue };
                let mut emptied = false;
                if let Some(below) = fields.get_mut(name) {
                    node.below.remove_from(below, &shape.field(name));
                    emptied = !node.below.is_empty() && is_empty(below);
                }
                if node.member || emptied {
                    fields.remove(name);
                }
            } else if let Some(items) = value.as_array_mut() {
                let list = shape.list_type();
                let inner = shape.item();
                let is_it = |item: &Value| step_of(item, &list, &inner).as_deref() == Some(step);
                if node.member {
                    items.retain(|item| !is_it(item));
                } else if let Some(item) = items.iter_mut().find(|item| is_it(item)) {
                    node.below.remove_from(item, &inner);
                }
            }
        }
    }
}

fn is_empty(value: &Value) -> bool {
    value.as_object().is_some_and(Map::is_empty) || value.as_array().is_some_and(Vec::is_empty)
}

/// `.name`, `[port=80,protocol="TCP"]`, `[="a"]`.
fn shown(step: &str) -> String {
    if let Some(name) = step.strip_prefix("f:") {
        return format!(".{name}");
    }
    if let Some(value) = step.strip_prefix("v:") {
        return format!("[={value}]");
    }
    let keys: Value = serde_json::from_str(step.trim_start_matches("k:")).unwrap_or_default();
    let mut out = String::new();
    for (key, value) in keys.as_object().into_iter().flatten() {
        let comma = if out.is_empty() { "" } else { "," };
        let _ = write!(out, "{comma}{key}={value}");
    }
    format!("[{out}]")
}

/// How an item of a list is named; `None` where lists are one value.
#[must_use]
pub fn step_of(item: &Value, list: &ListType, shape: &Shape<'_>) -> Option<String> {
    match list {
        ListType::Atomic => None,
        ListType::Set => Some(format!("v:{item}")),
        ListType::Map(keys) => {
            let keys: BTreeMap<&str, Value> = keys
                .iter()
                .map(|key| {
                    let value = item.get(key).cloned();
                    (key.as_str(), value.unwrap_or_else(|| shape.default_key(key).into_owned()))
                })
                .collect();
            Some(format!("k:{}", json!(keys)))
        }
    }
}

/// The parts of a value that are owned one by one: `None` when it is one value.
fn parts<'a, 's>(value: &'a Value, shape: &Shape<'s>) -> Option<Vec<(String, &'a Value, Shape<'s>)>> {
    match value {
        Value::Object(fields) if !shape.is_atomic_map() => {
            let part = |(name, value): (&String, &'a Value)| (format!("f:{name}"), value, shape.field(name));
            Some(fields.iter().map(part).collect())
        }
        Value::Array(items) => {
            let (list, inner) = (shape.list_type(), shape.item());
            items
                .iter()
                .map(|item| Some((step_of(item, &list, &inner)?, item, inner.clone())))
                .collect::<Option<_>>()
                // An empty list that is no single value has no parts, and one that is is a value.
                .filter(|_| list != ListType::Atomic)
        }
        _ => None,
    }
}

/// The fields that a value has.
#[must_use]
pub fn of(value: &Value, shape: &Shape<'_>) -> Set {
    let mut set = Set::default();
    for (step, part, inner) in parts(value, shape).unwrap_or_default() {
        let below = of(part, &inner);
        // Items of lists count themselves, beside their fields; so does what has no fields. A list that
        // is owned item by item and has none is nobody's.
        let no_items = part.is_array() && parts(part, &inner).is_some();
        if (below.is_empty() && !no_items) || !step.starts_with("f:") {
            set.mark(&step);
        }
        set.put(&step, below);
    }
    set
}

/// The fields that a new value has, with the maps and lists that they are in.
fn of_new(value: &Value, shape: &Shape<'_>) -> Set {
    let mut set = Set::default();
    for (step, part, inner) in parts(value, shape).unwrap_or_default() {
        set.mark(&step);
        set.put(&step, of_new(part, &inner));
    }
    set
}

/// What two values differ in.
#[derive(Clone, Debug, Default)]
pub struct Difference {
    /// Fields that are new or have another value.
    pub changed: Set,
    /// Fields that are gone.
    pub removed: Set,
}

/// Compares two values.
#[must_use]
pub fn compare(old: &Value, new: &Value, shape: &Shape<'_>) -> Difference {
    let mut out = Difference::default();
    let (olds, news) = (parts(old, shape).unwrap_or_default(), parts(new, shape).unwrap_or_default());
    let olds: BTreeMap<&str, (&Value, &Shape<'_>)> =
        olds.iter().map(|(step, value, shape)| (step.as_str(), (*value, shape))).collect();
    let news: BTreeMap<&str, (&Value, &Shape<'_>)> =
        news.iter().map(|(step, value, shape)| (step.as_str(), (*value, shape))).collect();
    for (step, (new, inner)) in &news {
        match olds.get(step) {
            None => {
                out.changed.put(step, of_new(new, inner));
                out.changed.mark(step);
            }
            Some((old, _)) if old == new => {}
            Some((old, _)) => {
                if parts(old, inner).is_none() || parts(new, inner).is_none() {
                    out.changed.mark(step);
                    out.changed.put(step, of(new, inner));
                    out.removed.put(step, of(old, inner));
                } else {
                    let below = compare(old, new, inner);
                    out.changed.put(step, below.changed);
                    out.removed.put(step, below.removed);
                }
            }
        }
    }
    for (step, (old, inner)) in olds.iter().filter(|(step, _)| !news.contains_key(*step)) {
        out.removed.put(step, of(old, inner));
        out.removed.mark(step);
    }
    out
}

/// Puts what a manager wants into a value.
pub fn merge(target: &mut Value, wanted: &Value, shape: &Shape<'_>) {
    match (&mut *target, wanted) {
        (Value::Object(into), Value::Object(fields)) if !shape.is_atomic_map() => {
            for (name, value) in fields {
                merge(into.entry(name.clone()).or_insert(Value::Null), value, &shape.field(name));
            }
        }
        (Value::Array(into), Value::Array(items)) if shape.list_type() != ListType::Atomic => {
            let (list, inner) = (shape.list_type(), shape.item());
            for item in items {
                let step = step_of(item, &list, &inner);
                match into.iter_mut().find(|old| step_of(old, &list, &inner) == step) {
                    Some(old) => merge(old, item, &inner),
                    None => into.push(item.clone()),
                }
            }
        }
        _ => *target = wanted.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apiserver::kinds::{Kind, Registry};

    fn service() -> std::sync::Arc<Kind> {
        Registry::default().find("", "v1", "services").unwrap()
    }

    fn spec(ports: &Value) -> Value {
        json!({ "spec": { "ports": ports, "selector": { "a": "b" }, "externalIPs": ["1"] } })
    }

    #[test]
    fn the_fields_of_a_value_are_found_and_written_as_kubernetes_does() {
        let kind = service();
        let set = of(&spec(&json!([{ "port": 80, "name": "h" }])), &Shape::root(&kind));
        let expected = json!({ "f:spec": {
            "f:externalIPs": {},
            "f:ports": { "k:{\"port\":80,\"protocol\":\"TCP\"}": { ".": {}, "f:name": {}, "f:port": {} } },
            "f:selector": {},
        } });
        assert_eq!(set.to_json(), expected);
        assert_eq!(Set::from_json(&expected), set);
        let paths = set.paths();
        assert!(paths.contains(&".spec.ports[port=80,protocol=\"TCP\"].name".to_owned()), "{paths:?}");
        let metadata = json!({ "metadata": { "finalizers": ["x"], "labels": { "a": "b" } } });
        let expected =
            json!({ "f:metadata": { "f:finalizers": { "v:\"x\"": {} }, "f:labels": { "f:a": {} } } });
        assert_eq!(of(&metadata, &Shape::root(&kind)).to_json(), expected);
    }

    #[test]
    fn differences_are_found_item_by_item() {
        let kind = service();
        let shape = Shape::root(&kind);
        let old = spec(&json!([{ "port": 80 }, { "port": 81 }]));
        let mut new = spec(&json!([{ "port": 81, "name": "x" }, { "port": 80 }]));
        new["spec"]["selector"] = json!({ "a": "c" });
        let found = compare(&old, &new, &shape);
        assert_eq!(found.changed.paths(), [".spec.ports[port=81,protocol=\"TCP\"].name", ".spec.selector"]);
        assert!(found.removed.is_empty());
        let back = compare(&new, &spec(&json!([{ "port": 81 }])), &shape).removed.paths();
        assert!(back.contains(&".spec.ports[port=80,protocol=\"TCP\"]".to_owned()), "{back:?}");
        assert!(compare(&old, &old, &shape).changed.is_empty());
    }

    #[test]
    fn what_is_merged_can_be_removed_again() {
        let kind = service();
        let shape = Shape::root(&kind);
        let old = spec(&json!([{ "port": 80 }]));
        let wanted =
            json!({ "spec": { "ports": [{ "port": 81, "name": "x" }, { "port": 80, "name": "y" }] } });
        let mut merged = old.clone();
        merge(&mut merged, &wanted, &shape);
        let expected = json!([{ "port": 80, "name": "y" }, { "port": 81, "name": "x" }]);
        assert_eq!(merged["spec"]["ports"], expected);
        of(&wanted, &shape).difference(&of(&old, &shape)).remove_from(&mut merged, &shape);
        assert_eq!(merged, old);
        // With the last item, the list goes too.
        let ports = Set::from_json(
            &json!({ "f:spec": { "f:ports": { "k:{\"port\":80,\"protocol\":\"TCP\"}": {} } } }),
        );
        ports.remove_from(&mut merged, &shape);
        assert!(merged["spec"].get("ports").is_none(), "{merged}");
    }
}
