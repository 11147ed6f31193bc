//! What there is: `/api`, `/apis`, `/version`, and the lists of resources.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{
    kinds::{Kind, Registry, group_version},
    store::Store,
};

/// The minor version of Kubernetes that is claimed, unless a test asks for another.
pub const MINOR: u32 = 36;

const VERBS: [&str; 8] = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

/// The answer to a path; `None` when it is none of discovery.
#[must_use]
pub fn answer(store: &Store, path: &str, minor: u32) -> Option<Value> {
    let steps: Vec<&str> = path.split('/').filter(|step| !step.is_empty()).collect();
    let registry = &store.registry;
    match steps.as_slice() {
        ["version"] => Some(version(minor)),
        ["api"] => Some(json!({
            "kind": "APIVersions", "versions": ["v1"],
            "serverAddressByClientCIDRs": [],
        })),
        ["apis"] => {
            let groups: Vec<Value> =
                groups(registry).iter().map(|(name, versions)| group(name, versions)).collect();
            Some(json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": groups }))
        }
        ["apis", name] => {
            let groups = groups(registry);
            let mut found = group(name, groups.get(*name)?);
            found["kind"] = "APIGroup".into();
            found["apiVersion"] = "v1".into();
            Some(found)
        }
        ["api", version] => resources(registry, "", version),
        ["apis", group, version] => resources(registry, group, version),
        _ => None,
    }
}

fn version(minor: u32) -> Value {
    json!({
        "major": "1", "minor": minor.to_string(), "gitVersion": format!("v1.{minor}.0"),
        "gitCommit": "", "gitTreeState": "clean", "buildDate": "2026-01-01T00:00:00Z",
        "goVersion": "", "compiler": "", "platform": "linux/amd64",
    })
}

/// Groups other than the core one, with their versions.
fn groups(registry: &Registry) -> BTreeMap<String, Vec<String>> {
    let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
    groups.insert("authorization.k8s.io".into(), vec!["v1".into()]);
    for kind in registry.iter().filter(|kind| !kind.group.is_empty()) {
        let versions = groups.entry(kind.group.clone()).or_default();
        if !versions.contains(&kind.version) {
            versions.push(kind.version.clone());
        }
    }
    for versions in groups.values_mut() {
        versions.sort_by_key(|version| std::cmp::Reverse(priority(version)));
    }
    groups
}

/// Kubernetes' order of versions: v2 before v1 before v1beta1 before v1alpha1 before anything else.
fn priority(version: &str) -> (u8, u32, u32) {
    let number = |text: &str| text.parse::<u32>().ok();
    let parsed = version.strip_prefix('v').and_then(|rest| {
        if let Some(major) = number(rest) {
            return Some((3, major, 0));
        }
        for (word, rank) in [("beta", 2), ("alpha", 1)] {
            if let Some((major, minor)) = rest.split_once(word) {
                return Some((rank, number(major)?, number(minor)?));
            }
        }
        None
    });
    parsed.unwrap_or_default()
}

fn group(name: &str, versions: &[String]) -> Value {
    let entry =
        |version: &String| json!({ "groupVersion": group_version(name, version), "version": version });
    let all: Vec<Value> = versions.iter().map(entry).collect();
    json!({ "name": name, "versions": all, "preferredVersion": all.first() })
}

fn resources(registry: &Registry, group: &str, version: &str) -> Option<Value> {
    let mut resources = Vec::new();
    for kind in registry.iter().filter(|kind| kind.group == group && kind.version == version) {
        resources.push(resource(kind));
        if kind.status {
            resources.push(json!({
                "name": format!("{}/status", kind.plural), "singularName": "",
                "namespaced": kind.namespaced, "kind": kind.kind, "verbs": ["get", "patch", "update"],
            }));
        }
    }
    if (group, version) == ("authorization.k8s.io", "v1") {
        resources.push(json!({
            "name": "selfsubjectaccessreviews", "singularName": "selfsubjectaccessreview",
            "namespaced": false, "kind": "SelfSubjectAccessReview", "verbs": ["create"],
        }));
    }
    (!resources.is_empty()).then(|| {
        json!({
            "kind": "APIResourceList", "apiVersion": "v1",
            "groupVersion": group_version(group, version), "resources": resources,
        })
    })
}

fn resource(kind: &Kind) -> Value {
    let mut resource = json!({
        "name": kind.plural, "singularName": kind.singular, "namespaced": kind.namespaced,
        "kind": kind.kind, "verbs": VERBS,
    });
    if !kind.short_names.is_empty() {
        resource["shortNames"] = kind.short_names.clone().into();
    }
    resource
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_as_kubernetes_does() {
        let mut versions = ["v1alpha1", "v2", "foo", "v1", "v1beta2", "v1beta10", "v10"];
        versions.sort_by_key(|version| std::cmp::Reverse(priority(version)));
        assert_eq!(versions, ["v10", "v2", "v1", "v1beta10", "v1beta2", "v1alpha1", "foo"]);
    }

    #[test]
    fn every_kind_is_discovered() {
        let store = Store::default();
        for kind in store.registry.iter() {
            let prefix = if kind.group.is_empty() { "/api" } else { "/apis" };
            let path = format!("{prefix}/{}", kind.api_version());
            let answer = answer(&store, &path, MINOR).unwrap();
            let names: Vec<&str> = answer["resources"]
                .as_array()
                .unwrap()
                .iter()
                .filter_map(|found| found["name"].as_str())
                .collect();
            assert!(names.contains(&kind.plural.as_str()), "{path} has {names:?}, without {}", kind.plural);
        }
        assert!(answer(&store, "/apis/none/v1", MINOR).is_none());
    }
}
