//! Patches: JSON patch (RFC 6902), JSON merge patch (RFC 7386), strategic merge patch.

use serde_json::{Value, json};

use super::{
    call::Call,
    failure::{Cause, Failure, Outcome},
    kinds::Kind,
    strategy::remove,
};

/// How a patch is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is its name")]
pub enum Type {
    Json,
    Merge,
    Strategic,
    Apply,
}

/// The type of a patch, by the content type of the request.
///
/// # Errors
/// When it is none of the four, or does not fit the kind.
pub fn type_of(kind: &Kind, call: &Call) -> Outcome<Type> {
    match call.content_type.as_str() {
        "application/json-patch+json" => Ok(Type::Json),
        "application/merge-patch+json" => Ok(Type::Merge),
        // Custom kinds have no Go types to take the strategy from.
        "application/strategic-merge-patch+json" if kind.custom.is_none() => Ok(Type::Strategic),
        "application/apply-patch+yaml" | "application/apply-patch+cbor" => Ok(Type::Apply),
        other => Err(Failure::unsupported_media(other)),
    }
}

/// The object with a patch in it.
///
/// # Errors
/// When the patch is malformed or does not fit.
pub fn patched(kind: &Kind, call: &Call, how: Type, old: &Value) -> Outcome<Value> {
    let mut new = old.clone();
    match how {
        Type::Json => {
            let patch: json_patch::Patch = serde_json::from_slice(&call.body)
                .map_err(|error| Failure::bad_request(format!("error decoding patch: {error}")))?;
            json_patch::patch(&mut new, &patch).map_err(|error| {
                let message =
                    format!("the server rejected our request due to an error in our request: {error}");
                let cause = Cause { reason: "FieldValueInvalid", field: "patch".into(), message };
                Failure::invalid(&kind.group, &kind.kind, &call.name, &[cause])
            })?;
        }
        Type::Merge => merge(&mut new, &call.object()?),
        Type::Strategic | Type::Apply => strategic(&mut new, &call.object()?, &mut Vec::new()),
    }
    Ok(new)
}

/// RFC 7386.
pub fn merge(target: &mut Value, patch: &Value) {
    let Some(fields) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (field, value) in fields {
        if value.is_null() {
            remove(target, field);
        } else {
            merge(&mut target[field], value);
        }
    }
}

/// Lists that are merged by a key, as the Go types say with `patchMergeKey`: the ends of their paths.
/// An empty key: a set of plain values.
const MERGED_LISTS: [(&[&str], &str); 17] = [
    (&["metadata", "finalizers"], ""),
    (&["metadata", "ownerReferences"], "uid"),
    (&["status", "conditions"], "type"),
    (&["status", "addresses"], "type"),
    (&["containers", "ports"], "containerPort"),
    (&["spec", "ports"], "port"),
    (&["spec", "containers"], "name"),
    (&["spec", "initContainers"], "name"),
    (&["spec", "volumes"], "name"),
    (&["spec", "imagePullSecrets"], "name"),
    (&["containers", "env"], "name"),
    (&["containers", "volumeMounts"], "mountPath"),
    (&["initContainers", "env"], "name"),
    (&["initContainers", "volumeMounts"], "mountPath"),
    (&["spec", "podCIDRs"], ""),
    (&["status", "podIPs"], "ip"),
    (&["secrets"], "name"),
];

fn merge_key(path: &[String]) -> Option<&'static str> {
    let found = MERGED_LISTS
        .iter()
        .find(|(end, _)| path.len() >= end.len() && path[path.len() - end.len()..].iter().eq(end.iter()));
    found.map(|(_, key)| *key)
}

fn strategic(target: &mut Value, patch: &Value, path: &mut Vec<String>) {
    let Some(fields) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if patch["$patch"] == "replace" || !target.is_object() {
        *target = json!({});
    }
    for (field, value) in fields {
        if field == "$patch" || field.starts_with("$setElementOrder/") || field.starts_with("$retainKeys") {
            continue;
        }
        if let Some(list) = field.strip_prefix("$deleteFromPrimitiveList/") {
            let gone = value.as_array().cloned().unwrap_or_default();
            if let Some(items) = target[list].as_array_mut() {
                items.retain(|item| !gone.contains(item));
            }
            continue;
        }
        path.push(field.clone());
        match (value, merge_key(path)) {
            (Value::Null, _) => remove(target, field),
            (Value::Array(items), Some(key)) => {
                let into = &mut target[field];
                if !into.is_array() {
                    *into = json!([]);
                }
                if let Value::Array(into) = into {
                    merge_list(into, items, key, path);
                }
            }
            _ => strategic(&mut target[field], value, path),
        }
        path.pop();
    }
}

fn merge_list(target: &mut Vec<Value>, patch: &[Value], key: &str, path: &mut Vec<String>) {
    if patch.iter().any(|item| item["$patch"] == "replace") {
        target.clear();
    }
    for item in patch {
        if key.is_empty() {
            if !target.contains(item) {
                target.push(item.clone());
            }
            continue;
        }
        let at = target.iter().position(|old| old[key] == item[key]);
        match (item["$patch"].as_str(), at) {
            (Some("replace"), _) if item.get(key).is_none() => {}
            (Some("delete"), Some(at)) => {
                target.remove(at);
            }
            (Some("delete"), None) => {}
            (_, Some(at)) => strategic(&mut target[at], item, path),
            (_, None) => target.push(item.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merge_patches_as_the_rfc_says() {
        let cases = [
            (json!({ "a": "b" }), json!({ "a": "c" }), json!({ "a": "c" })),
            (json!({ "a": "b" }), json!({ "a": null }), json!({})),
            (json!({ "a": ["b"] }), json!({ "a": "c" }), json!({ "a": "c" })),
            (
                json!({ "a": { "b": "c" } }),
                json!({ "a": { "b": "d", "c": null } }),
                json!({ "a": { "b": "d" } }),
            ),
            (json!({ "a": [{ "b": "c" }] }), json!({ "a": [1] }), json!({ "a": [1] })),
            (json!({ "e": null }), json!({ "a": 1 }), json!({ "e": null, "a": 1 })),
            (json!({}), json!({ "a": { "bb": { "ccc": null } } }), json!({ "a": { "bb": {} } })),
        ];
        for (mut target, patch, expected) in cases {
            merge(&mut target, &patch);
            assert_eq!(target, expected, "{patch}");
        }
    }

    #[test]
    fn strategic_patches_merge_lists_by_key() {
        let old = json!({
            "metadata": { "finalizers": ["a"] },
            "spec": {
                "ports": [{ "port": 80, "name": "http" }, { "port": 443, "name": "tls" }],
                "loadBalancerSourceRanges": ["10.0.0.0/8"],
            },
        });
        let cases = [
            (
                json!({ "spec": { "ports": [{ "port": 80, "targetPort": 8080 }] } }),
                json!([{ "port": 80, "name": "http", "targetPort": 8080 }, { "port": 443, "name": "tls" }]),
            ),
            (
                json!({ "spec": { "ports": [{ "port": 80, "$patch": "delete" }] } }),
                json!([{ "port": 443, "name": "tls" }]),
            ),
            (
                json!({ "spec": { "ports": [{ "port": 81 }, { "$patch": "replace" }] } }),
                json!([{ "port": 81 }]),
            ),
        ];
        for (patch, ports) in cases {
            let mut new = old.clone();
            strategic(&mut new, &patch, &mut Vec::new());
            assert_eq!(new["spec"]["ports"], ports, "{patch}");
        }
        let mut new = old.clone();
        let patch = json!({
            "metadata": { "finalizers": ["b", "a"] },
            "spec": { "loadBalancerSourceRanges": ["1.2.3.0/24"], "ports": null },
        });
        strategic(&mut new, &patch, &mut Vec::new());
        assert_eq!(new["metadata"]["finalizers"], json!(["a", "b"]));
        assert_eq!(new["spec"], json!({ "loadBalancerSourceRanges": ["1.2.3.0/24"] }));
        let patch = json!({ "metadata": { "$deleteFromPrimitiveList/finalizers": ["a"] } });
        strategic(&mut new, &patch, &mut Vec::new());
        assert_eq!(new["metadata"]["finalizers"], json!(["b"]));
    }
}
