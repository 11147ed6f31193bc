//! Just enough of `/openapi/v3` for kubectl to see that the server validates fields itself, and to
//! leave validation to it.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::{discovery, kinds::group_version, store::Store};

/// The answer to a path; `None` when it is none of these.
#[must_use]
pub fn answer(store: &Store, path: &str) -> Option<Value> {
    let rest = path.strip_prefix("/openapi/v3")?;
    if rest.is_empty() || rest == "/" {
        let versions: BTreeSet<String> =
            store.registry.iter().map(|kind| place(&kind.group, &kind.version)).collect();
        let paths: Map<String, Value> = versions
            .into_iter()
            .map(|place| {
                let url = format!("/openapi/v3/{place}?hash={}", store.revision());
                (place, json!({ "serverRelativeURL": url }))
            })
            .collect();
        return Some(json!({ "paths": paths }));
    }
    let wanted = rest.trim_start_matches('/');
    let kinds = store.registry.iter().filter(|kind| place(&kind.group, &kind.version) == wanted);
    let mut paths = Map::new();
    for kind in kinds {
        let namespace = if kind.namespaced { "/namespaces/{namespace}" } else { "" };
        let parameter = json!({
            "name": "fieldValidation", "in": "query", "schema": { "type": "string", "uniqueItems": true },
        });
        let operation = json!({
            "parameters": [parameter],
            "x-kubernetes-action": "patch",
            "x-kubernetes-group-version-kind":
                { "group": kind.group, "version": kind.version, "kind": kind.kind },
        });
        paths.insert(format!("/{wanted}{namespace}/{}/{{name}}", kind.plural), json!({ "patch": operation }));
    }
    (!paths.is_empty()).then(|| {
        json!({
            "openapi": "3.0.0",
            "info": { "title": "Kubernetes", "version": format!("v1.{}.0", discovery::MINOR) },
            "paths": paths, "components": { "schemas": {} },
        })
    })
}

fn place(group: &str, version: &str) -> String {
    let prefix = if group.is_empty() { "api" } else { "apis" };
    format!("{prefix}/{}", group_version(group, version))
}
