//! CustomResourceDefinitions: kinds that come and go.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{
    failure::Cause,
    hooks,
    kinds::{CRD_STORAGE, Custom, Kind, storage},
    names,
    objects::{finalizers, is_deleting, now},
    rules,
    store::{Key, Object, Store, key_of},
    strategy::{ensure_object, remove},
};

/// Holds a definition until its objects are gone.
const CLEANUP: &str = "customresourcecleanup.apiextensions.k8s.io";

/// Fills in what a definition leaves out.
pub fn prepare(definition: &mut Value) {
    ensure_object(definition, "spec");
    let spec = &mut definition["spec"];
    ensure_object(spec, "names");
    let names = &mut spec["names"];
    let kind = names["kind"].as_str().unwrap_or_default().to_owned();
    if names["singular"].as_str().is_none_or(str::is_empty) {
        names["singular"] = kind.to_lowercase().into();
    }
    if names["listKind"].as_str().is_none_or(str::is_empty) {
        names["listKind"] = format!("{kind}List").into();
    }
    if spec.get("conversion").is_none() {
        spec["conversion"] = json!({ "strategy": "None" });
    }
}

/// What is wrong with a definition.
#[must_use]
pub fn check(definition: &Value) -> Vec<Cause> {
    let spec = &definition["spec"];
    let mut causes = Vec::new();
    let (group, plural) = (text(&spec["group"]), text(&spec["names"]["plural"]));
    let expected = format!("{plural}.{group}");
    if definition["metadata"]["name"] != expected.as_str() {
        let why = "must be spec.names.plural+\".\"+spec.group";
        causes.push(Cause::invalid("metadata.name", &definition["metadata"]["name"], why));
    }
    if !names::is_subdomain(group) || !group.contains('.') {
        causes.push(Cause::invalid("spec.group", &spec["group"], "should be a domain with at least one dot"));
    }
    if !["Cluster", "Namespaced"].contains(&text(&spec["scope"])) {
        causes.push(Cause::unsupported("spec.scope", &spec["scope"], &["Cluster", "Namespaced"]));
    }
    let versions: Vec<&Value> = spec["versions"].as_array().into_iter().flatten().collect();
    if versions.iter().filter(|version| version["storage"] == true).count() != 1 {
        let why = "must have exactly one version marked as storage version";
        causes.push(Cause::invalid("spec.versions", &spec["versions"], why));
    }
    for (at, version) in versions.iter().enumerate() {
        let field = format!("spec.versions[{at}].schema.openAPIV3Schema");
        let schema = &version["schema"]["openAPIV3Schema"];
        if schema.is_object() {
            check_schema(schema, &field, &mut causes);
        } else {
            causes.push(Cause::required(field, "schemas are required"));
        }
    }
    causes
}

/// What makes a schema structural, and whether its rules are expressions.
fn check_schema(schema: &Value, field: &str, causes: &mut Vec<Cause>) {
    let any = schema["x-kubernetes-int-or-string"] == true
        || schema["x-kubernetes-preserve-unknown-fields"] == true;
    if schema["type"].as_str().is_none_or(str::is_empty) && !any {
        causes
            .push(Cause::required(format!("{field}.type"), "must not be empty for specified object fields"));
    }
    for (at, rule) in schema["x-kubernetes-validations"].as_array().into_iter().flatten().enumerate() {
        if let Err(why) = rules::compile(text(&rule["rule"])) {
            let field = format!("{field}.x-kubernetes-validations[{at}].rule");
            causes.push(Cause::invalid(field, &rule["rule"], &why));
        }
    }
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        check_schema(schema, &format!("{field}.properties[{name}]"), causes);
    }
    for below in ["items", "additionalProperties"] {
        if schema[below].is_object() {
            check_schema(&schema[below], &format!("{field}.{below}"), causes);
        }
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Serves the kinds of a definition; says so in its status when that is new.
pub fn install(store: &mut Store, definition: &Object) {
    let spec = &definition["spec"];
    let (group, plural) = (text(&spec["group"]), text(&spec["names"]["plural"]));
    store.registry.remove(group, plural);
    for version in spec["versions"].as_array().into_iter().flatten() {
        if version["served"] == true {
            store.registry.add(kind(spec, version));
        }
    }
    let conditions = definition["status"]["conditions"].as_array();
    if conditions.is_some_and(|conditions| !conditions.is_empty()) {
        return;
    }
    let mut established = Value::clone(definition);
    let condition = |kind: &str, reason: &str, message: &str| {
        json!({
            "type": kind, "status": "True", "reason": reason, "message": message,
            "lastTransitionTime": now(),
        })
    };
    let stored = spec["versions"].as_array().into_iter().flatten().find(|version| version["storage"] == true);
    established["status"] = json!({
        "acceptedNames": spec["names"],
        "conditions": [
            condition("NamesAccepted", "NoConflicts", "no conflicts found"),
            condition("Established", "InitialNamesAccepted", "the initial names have been accepted"),
        ],
        "storedVersions": [stored.map(|version| version["name"].clone())],
    });
    store.put(&CRD_STORAGE.into(), key_of(definition), established);
}

fn kind(spec: &Value, version: &Value) -> Kind {
    let names = &spec["names"];
    let (group, plural) = (text(&spec["group"]), text(&names["plural"]));
    let short = names["shortNames"].as_array().into_iter().flatten().filter_map(Value::as_str);
    Kind {
        group: group.to_owned(),
        version: text(&version["name"]).to_owned(),
        plural: plural.to_owned(),
        singular: text(&names["singular"]).to_owned(),
        kind: text(&names["kind"]).to_owned(),
        list_kind: text(&names["listKind"]).to_owned(),
        short_names: short.map(str::to_owned).collect(),
        namespaced: spec["scope"] == "Namespaced",
        status: version["subresources"].get("status").is_some(),
        generation: true,
        storage: storage(group, plural),
        custom: Some(Arc::new(Custom {
            schema: version["schema"]["openAPIV3Schema"].clone(),
            columns: version["additionalPrinterColumns"].as_array().cloned().unwrap_or_default(),
        })),
    }
}

fn objects_of(definition: &Value) -> Arc<str> {
    storage(text(&definition["spec"]["group"]), text(&definition["spec"]["names"]["plural"]))
}

/// Deletes the objects of a definition that is to be deleted. While some wait for their finalizers, it
/// waits too.
pub fn empty(store: &mut Store, definition: &Value) {
    let storage = objects_of(definition);
    for object in store.list(&storage, None) {
        hooks::end(store, &storage, key_of(&object));
    }
    if !store.list(&storage, None).is_empty() && !finalizers(definition).contains(&CLEANUP) {
        let mut held = definition.clone();
        let mut names: Vec<Value> = finalizers(definition).into_iter().map(Value::from).collect();
        names.push(CLEANUP.into());
        held["metadata"]["finalizers"] = names.into();
        store.put(&CRD_STORAGE.into(), key_of(definition), held);
    }
}

/// Stops to serve the kinds of a definition that is gone.
pub fn uninstall(store: &mut Store, definition: &Value) {
    let spec = &definition["spec"];
    store.registry.remove(text(&spec["group"]), text(&spec["names"]["plural"]));
}

/// Lets a definition go that waited for the object that is gone now.
pub fn finish(store: &mut Store, kind: &Kind) {
    let key: Key = (String::new(), format!("{}.{}", kind.plural, kind.group));
    let Some(definition) = store.get(CRD_STORAGE, &key) else { return };
    if !is_deleting(&definition) || !store.list(&kind.storage, None).is_empty() {
        return;
    }
    let mut rest: Vec<Value> = finalizers(&definition).into_iter().map(Value::from).collect();
    rest.retain(|name| name != CLEANUP);
    let mut last = Value::clone(&definition);
    if rest.is_empty() {
        remove(&mut last["metadata"], "finalizers");
        store.replace_quietly(&CRD_STORAGE.into(), &key, last);
        store.remove(&CRD_STORAGE.into(), &key);
        uninstall(store, &definition);
    } else {
        last["metadata"]["finalizers"] = rest.into();
        store.put(&CRD_STORAGE.into(), key, last);
    }
}
