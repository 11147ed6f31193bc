//! Custom kinds: schemas, rules, subresources; of the double and of real clusters alike.

use anyhow::{Context, Result};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Error,
    api::{
        ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams,
        PostParams,
    },
    discovery::Scope,
};
use pointsman_tests::apiserver::cluster::{TestCluster, with_cluster};
use serde_json::{Value, json};

/// A cluster-scoped kind `Thing` in a group of this test's own.
fn definition(group: &str) -> CustomResourceDefinition {
    let spec = json!({
        "type": "object", "required": ["address"],
        "x-kubernetes-validations": [
            { "rule": "!has(self.low) || !has(self.high) || self.low <= self.high", "message": "low is above high" },
        ],
        "properties": {
            "address": { "type": "string", "maxLength": 15, "pattern": "^[0-9.]+$",
                "x-kubernetes-validations": [{ "rule": "self == oldSelf", "message": "may not change" }] },
            "low": { "type": "integer", "minimum": 1 },
            "high": { "type": "integer" },
            "mode": { "type": "string", "enum": ["a", "b"], "default": "a" },
            "services": { "type": "array", "maxItems": 2, "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
                "items": { "type": "object", "required": ["name"], "properties": {
                    "name": { "type": "string" }, "note": { "type": "string" },
                } } },
        },
    });
    let status = json!({ "type": "object", "properties": { "node": { "type": "string" } } });
    serde_json::from_value(json!({
        "metadata": { "name": format!("things.{group}") },
        "spec": {
            "group": group, "scope": "Cluster",
            "names": { "plural": "things", "singular": "thing", "kind": "Thing", "shortNames": ["th"] },
            "versions": [{
                "name": "v1", "served": true, "storage": true, "subresources": { "status": {} },
                "schema": { "openAPIV3Schema": {
                    "type": "object", "properties": { "spec": spec, "status": status },
                } },
            }],
        },
    }))
    .expect("a definition")
}

/// The installed kind.
async fn things(cluster: &TestCluster) -> Result<(Api<DynamicObject>, ApiResource)> {
    let group = format!("{}.example.com", cluster.name("g"));
    cluster.install(&definition(&group)).await?;
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(&group, "v1", "Thing"), "things");
    Ok((Api::all_with(cluster.client(), &resource), resource))
}

fn thing(resource: &ApiResource, name: &str, spec: &Value) -> DynamicObject {
    let mut object = DynamicObject::new(name, resource);
    object.data = json!({ "spec": spec });
    object
}

fn refused<T: std::fmt::Debug>(result: Result<T, Error>) -> Vec<(String, String)> {
    match result.expect_err("refused") {
        Error::Api(status) if status.code == 422 => {
            let causes = status.details.map(|details| details.causes).unwrap_or_default();
            causes.into_iter().map(|cause| (cause.field, cause.message)).collect()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_schema_is_enforced() -> Result<()> {
    with_cluster(async |cluster| {
        let (api, resource) = things(&cluster).await?;
        let cases = [
            (json!({}), "spec.address", "Required value"),
            (json!({ "address": 1 }), "spec.address", "must be of type string"),
            (json!({ "address": "x" }), "spec.address", "should match '^[0-9.]+$'"),
            (json!({ "address": "1", "low": 0 }), "spec.low", "should be greater than or equal to 1"),
            (json!({ "address": "1", "mode": "c" }), "spec.mode", "Unsupported value: \"c\""),
            (json!({ "address": "1", "low": 2, "high": 1 }), "spec", "low is above high"),
            (
                json!({ "address": "1", "services": [{ "name": "a" }, { "name": "a" }] }),
                "spec.services[1]",
                "Duplicate value",
            ),
            (
                json!({ "address": "1", "services": [{ "name": "a" }, { "name": "b" }, { "name": "c" }] }),
                "spec.services",
                "Too many: 3: must have at most 2 items",
            ),
        ];
        for (spec, field, said) in cases {
            let causes = refused(api.create(&PostParams::default(), &thing(&resource, "wrong", &spec)).await);
            let found = causes.iter().any(|(where_, message)| where_ == field && message.contains(said));
            assert!(found, "{spec}: {causes:?}");
        }
        let causes = refused(
            api.create(&PostParams::default(), &thing(&resource, "a:b", &json!({ "address": "1" }))).await,
        );
        assert_eq!(causes[0].0, "metadata.name");
        Ok(())
    })
}

#[test]
fn unknown_fields_go_and_defaults_come() -> Result<()> {
    with_cluster(async |cluster| {
        let (api, resource) = things(&cluster).await?;
        let unknown = thing(&resource, "one", &json!({ "address": "1", "other": { "x": 1 } }));
        let made = api.create(&PostParams::default(), &unknown).await?;
        assert_eq!(made.data["spec"], json!({ "address": "1", "mode": "a" }));
        assert_eq!(made.metadata.generation, Some(1));
        let list = api.list(&ListParams::default()).await?;
        assert_eq!(list.items.len(), 1);
        assert_eq!(list.items[0].types.as_ref().map(|types| types.kind.as_str()), Some("Thing"));
        Ok(())
    })
}

#[test]
fn rules_about_changes_hold() -> Result<()> {
    with_cluster(async |cluster| {
        let (api, resource) = things(&cluster).await?;
        api.create(&PostParams::default(), &thing(&resource, "one", &json!({ "address": "1" }))).await?;
        let patch = Patch::Merge(json!({ "spec": { "address": "2" } }));
        let causes = refused(api.patch("one", &PatchParams::default(), &patch).await);
        assert!(causes[0].0 == "spec.address" && causes[0].1.contains("may not change"), "{causes:?}");
        // A replacement has to say what it replaces.
        let same = thing(&resource, "one", &json!({ "address": "1" }));
        let blind = api.replace("one", &PostParams::default(), &same).await;
        assert_eq!(refused(blind)[0].0, "metadata.resourceVersion");
        Ok(())
    })
}

#[test]
fn the_status_is_a_part_of_its_own() -> Result<()> {
    with_cluster(async |cluster| {
        let (api, resource) = things(&cluster).await?;
        let mut with_status = thing(&resource, "one", &json!({ "address": "1" }));
        with_status.data["status"] = json!({ "node": "x" });
        let made = api.create(&PostParams::default(), &with_status).await?;
        assert!(made.data["status"].is_null());
        let status = json!({
            "apiVersion": resource.api_version, "kind": "Thing", "metadata": { "labels": { "a": "b" } },
            "spec": { "low": 5, "address": "1" }, "status": { "node": "edge" },
        });
        let after = api.patch_status("one", &PatchParams::apply("agent"), &Patch::Apply(&status)).await?;
        assert_eq!(after.data["status"], json!({ "node": "edge" }));
        assert!(after.data["spec"]["low"].is_null() && after.metadata.labels.is_none());
        assert_eq!(after.metadata.generation, Some(1));
        let spec = json!({ "spec": { "low": 5 }, "status": { "node": "other" } });
        let after = api.patch("one", &PatchParams::default(), &Patch::Merge(&spec)).await?;
        assert_eq!((&after.data["spec"]["low"], &after.data["status"]["node"]), (&json!(5), &json!("edge")));
        assert_eq!(after.metadata.generation, Some(2));
        // Metadata is not counted.
        let label = Patch::Merge(json!({ "metadata": { "labels": { "a": "b" } } }));
        assert_eq!(api.patch("one", &PatchParams::default(), &label).await?.metadata.generation, Some(2));
        Ok(())
    })
}

#[test]
fn lists_are_owned_item_by_item() -> Result<()> {
    with_cluster(async |cluster| {
        let (api, resource) = things(&cluster).await?;
        let with = |services: Value| {
            Patch::Apply(json!({
                "apiVersion": resource.api_version, "kind": "Thing", "metadata": { "name": "one" },
                "spec": { "address": "1", "services": services },
            }))
        };
        api.patch("one", &PatchParams::apply("a"), &with(json!([{ "name": "x", "note": "1" }]))).await?;
        api.patch("one", &PatchParams::apply("b"), &with(json!([{ "name": "y" }]))).await?;
        let refused =
            api.patch("one", &PatchParams::apply("b"), &with(json!([{ "name": "x", "note": "2" }]))).await;
        let Err(Error::Api(conflict)) = refused else { panic!("{refused:?}") };
        let causes = conflict.details.map(|details| details.causes).unwrap_or_default();
        assert_eq!(causes[0].field, ".spec.services[name=\"x\"].note");
        let after = api.patch("one", &PatchParams::apply("a"), &with(json!([]))).await?;
        assert_eq!(after.data["spec"]["services"], json!([{ "name": "y" }]));
        // With the last item, the list goes too.
        let after = api.patch("one", &PatchParams::apply("b"), &with(json!([]))).await?;
        assert!(after.data["spec"].get("services").is_none(), "{}", after.data);
        Ok(())
    })
}

#[test]
fn a_kind_is_discovered_and_goes_with_its_definition() -> Result<()> {
    with_cluster(async |cluster| {
        let (api, resource) = things(&cluster).await?;
        let group = kube::discovery::group(&cluster.client(), &resource.group).await?;
        let (found, capabilities) = group.recommended_kind("Thing").context("the kind")?;
        assert_eq!((found.plural.as_str(), capabilities.scope), ("things", Scope::Cluster));
        assert!(capabilities.subresources.iter().any(|(sub, _)| sub.plural == "status"));
        let mut held = thing(&resource, "one", &json!({ "address": "1" }));
        held.metadata.finalizers = Some(vec!["pointsman.dev/test".into()]);
        api.create(&PostParams::default(), &held).await?;
        let definitions: Api<CustomResourceDefinition> = Api::all(cluster.client());
        let name = format!("things.{}", resource.group);
        definitions.delete(&name, &DeleteParams::default()).await?;
        // The object holds its definition.
        let marked =
            kube::runtime::wait::await_condition(api.clone(), "one", |object: Option<&DynamicObject>| {
                object.is_some_and(|object| object.metadata.deletion_timestamp.is_some())
            });
        marked.await?;
        assert!(definitions.get_opt(&name).await?.is_some());
        let free = Patch::Merge(json!({ "metadata": { "finalizers": null } }));
        api.patch("one", &PatchParams::default(), &free).await?;
        let uid = |object: Option<&CustomResourceDefinition>| object.is_none();
        kube::runtime::wait::await_condition(definitions, &name, uid).await?;
        Ok(())
    })
}
