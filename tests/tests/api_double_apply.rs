//! Server-side apply and subresources, of the double and of real clusters alike.

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use kube::{
    Api, Error,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use pointsman_tests::apiserver::cluster::with_cluster;
use serde_json::{Value, json};

/// Managers are never named as the agent is: on a shared cluster, one that runs for another test would
/// take back what it believes to be its own.
fn apply(manager: &str) -> PatchParams {
    PatchParams::apply(manager)
}

fn config(data: &Value) -> Patch<Value> {
    Patch::Apply(json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "one" }, "data": data,
    }))
}

/// The fields for which an apply was refused.
fn conflicts<T: std::fmt::Debug>(result: Result<T, Error>) -> Vec<String> {
    match result.expect_err("a conflict") {
        Error::Api(status) if status.code == 409 => {
            let causes = status.details.map(|details| details.causes).unwrap_or_default();
            causes.into_iter().map(|cause| cause.field).collect()
        }
        other => panic!("{other:?}"),
    }
}

fn data(object: &ConfigMap) -> Value {
    json!(object.data.clone().unwrap_or_default())
}

#[test]
fn managers_own_what_they_apply() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<ConfigMap> = Api::namespaced(cluster.client(), &cluster.namespace("apply").await?);
        // An apply creates.
        let made = api.patch("one", &apply("a"), &config(&json!({ "x": "1", "y": "1" }))).await?;
        // The same again changes nothing.
        let same = api.patch("one", &apply("a"), &config(&json!({ "x": "1", "y": "1" }))).await?;
        assert_eq!(same.metadata.resource_version, made.metadata.resource_version);
        // Another may say the same, and then both own it.
        api.patch("one", &apply("b"), &config(&json!({ "x": "1", "z": "1" }))).await?;
        let refused = api.patch("one", &apply("b"), &config(&json!({ "x": "2", "z": "1" }))).await;
        assert_eq!(conflicts(refused), [".data.x"]);
        // What one stops to apply stays while the other does, and goes otherwise.
        let after = api.patch("one", &apply("a"), &config(&json!({}))).await?;
        assert_eq!(data(&after), json!({ "x": "1", "z": "1" }));
        // An apply that creates has to name its object, beside the path.
        let nameless = Patch::Apply(json!({ "apiVersion": "v1", "kind": "ConfigMap" }));
        api.patch("one", &apply("c"), &nameless).await?;
        let Err(Error::Api(refused)) = api.patch("two", &apply("c"), &nameless).await else {
            panic!("an apply without a name was taken");
        };
        assert_eq!((refused.code, refused.reason.as_str()), (400, "BadRequest"));
        // Now nobody is in the way.
        let after = api.patch("one", &apply("b"), &config(&json!({ "x": "2" }))).await?;
        assert_eq!(data(&after), json!({ "x": "2" }));
        // Force takes.
        let after = api.patch("one", &apply("a").force(), &config(&json!({ "x": "3" }))).await?;
        assert_eq!(data(&after), json!({ "x": "3" }));
        let refused = api.patch("one", &apply("b"), &config(&json!({ "x": "2" }))).await;
        assert_eq!(conflicts(refused), [".data.x"]);
        Ok(())
    })
}

#[test]
fn an_update_takes_ownership_of_what_it_changes() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<ConfigMap> = Api::namespaced(cluster.client(), &cluster.namespace("update").await?);
        api.patch("one", &apply("a"), &config(&json!({ "x": "1", "y": "1" }))).await?;
        let patch = Patch::Merge(json!({ "data": { "x": "2" } }));
        api.patch(
            "one",
            &PatchParams { field_manager: Some("hand".into()), ..PatchParams::default() },
            &patch,
        )
        .await?;
        let refused = api.patch("one", &apply("a"), &config(&json!({ "x": "1", "y": "1" }))).await;
        assert_eq!(conflicts(refused), [".data.x"]);
        // With the same value, both own it.
        api.patch("one", &apply("a"), &config(&json!({ "x": "2", "y": "1" }))).await?;
        let managers = api.get("one").await?.metadata.managed_fields.context("managers")?;
        let fields = json!(managers.iter().map(|entry| &entry.fields_v1).collect::<Vec<_>>());
        assert_eq!(
            fields,
            json!([
                { "f:data": { "f:x": {}, "f:y": {} } },
                { "f:data": { "f:x": {} } },
            ])
        );
        let owners: Vec<(String, String)> = managers
            .iter()
            .filter(|entry| json!(entry.fields_v1)["f:data"].get("f:x").is_some())
            .map(|entry| {
                (entry.manager.clone().unwrap_or_default(), entry.operation.clone().unwrap_or_default())
            })
            .collect();
        assert_eq!(owners, [("a".into(), "Apply".into()), ("hand".into(), "Update".into())]);
        Ok(())
    })
}

fn balanced(name: &str) -> Service {
    serde_json::from_value(json!({
        "metadata": { "name": name },
        "spec": {
            "type": "LoadBalancer", "loadBalancerClass": "pointsman.dev/none",
            "ports": [{ "port": 80 }],
        },
    }))
    .expect("a Service")
}

fn ingress(addresses: &[&str]) -> Patch<Value> {
    let ingress: Vec<Value> =
        addresses.iter().map(|address| json!({ "ip": address, "ipMode": "VIP" })).collect();
    Patch::Apply(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "one" },
        "status": { "loadBalancer": { "ingress": ingress } },
    }))
}

fn addresses(service: &Service) -> Vec<String> {
    let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = status.and_then(|status| status.ingress.clone()).unwrap_or_default();
    ingress.into_iter().filter_map(|ingress| ingress.ip).collect()
}

#[test]
fn a_status_is_published_by_apply() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<Service> = Api::namespaced(cluster.client(), &cluster.namespace("status").await?);
        let made = api.create(&PostParams::default(), &balanced("one")).await?;
        let spec = made.spec.clone();
        let first = api.patch_status("one", &apply("publisher"), &ingress(&["192.0.2.1"])).await?;
        assert_eq!(addresses(&first), ["192.0.2.1"]);
        assert_eq!(first.spec, spec);
        let same = api.patch_status("one", &apply("publisher"), &ingress(&["192.0.2.1"])).await?;
        assert_eq!(same.metadata.resource_version, first.metadata.resource_version);
        // The list is one value: another manager cannot add to it.
        let refused = api.patch_status("one", &apply("rival"), &ingress(&["192.0.2.2"])).await;
        assert_eq!(conflicts(refused), [".status.loadBalancer.ingress"]);
        let both =
            api.patch_status("one", &apply("publisher"), &ingress(&["192.0.2.2", "192.0.2.3"])).await?;
        assert_eq!(addresses(&both), ["192.0.2.2", "192.0.2.3"]);
        // Nothing is left of it when it is not applied any more.
        let nothing = Patch::Apply(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": "one" },
        }));
        let cleared = api.patch_status("one", &apply("publisher"), &nothing).await?;
        assert_eq!(addresses(&cleared), Vec::<String>::new());
        Ok(())
    })
}

#[test]
fn a_status_is_no_part_of_the_main_resource() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<Service> = Api::namespaced(cluster.client(), &cluster.namespace("main").await?);
        let mut with_status = balanced("one");
        with_status.status =
            serde_json::from_value(json!({ "loadBalancer": { "ingress": [{ "ip": "192.0.2.9" }] } }))?;
        let made = api.create(&PostParams::default(), &with_status).await?;
        assert_eq!(addresses(&made), Vec::<String>::new());
        api.patch_status("one", &apply("publisher"), &ingress(&["192.0.2.1"])).await?;
        let patch = Patch::Merge(json!({
            "metadata": { "labels": { "a": "b" } },
            "status": { "loadBalancer": { "ingress": [{ "ip": "192.0.2.9" }] } },
        }));
        let after = api.patch("one", &PatchParams::default(), &patch).await?;
        assert_eq!(addresses(&after), ["192.0.2.1"]);
        assert_eq!(after.metadata.labels.context("labels")?["a"], "b");
        let patch = Patch::Merge(json!({ "spec": { "sessionAffinity": "ClientIP" } }));
        let after = api.patch_status("one", &PatchParams::default(), &patch).await?;
        assert_eq!(after.spec.and_then(|spec| spec.session_affinity).as_deref(), Some("None"));
        Ok(())
    })
}

#[test]
fn finalizers_hold_an_object_until_the_last_is_gone() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<ConfigMap> = Api::namespaced(cluster.client(), &cluster.namespace("finalizers").await?);
        let with = |names: &[&str]| {
            Patch::Apply(json!({
                "apiVersion": "v1", "kind": "ConfigMap",
                "metadata": { "name": "one", "finalizers": names },
            }))
        };
        // Finalizers are a set: each manager has its own.
        api.patch("one", &apply("a"), &with(&["pointsman.dev/a"])).await?;
        let both = api.patch("one", &apply("b"), &with(&["pointsman.dev/b"])).await?;
        assert_eq!(both.metadata.finalizers.context("finalizers")?, ["pointsman.dev/a", "pointsman.dev/b"]);
        let deleted = api.delete("one", &DeleteParams::default()).await?;
        let marked = deleted.left().context("the object")?;
        assert!(marked.metadata.deletion_timestamp.is_some());
        let again = api.delete("one", &DeleteParams::default()).await?.left().context("the object")?;
        assert_eq!(again.metadata.resource_version, marked.metadata.resource_version);
        let Err(Error::Api(refused)) = api.patch("one", &apply("c"), &with(&["pointsman.dev/c"])).await
        else {
            panic!("a finalizer was added to what is being deleted");
        };
        assert_eq!((refused.code, refused.reason.as_str()), (422, "Invalid"));
        api.patch("one", &apply("a"), &with(&[])).await?;
        assert_eq!(api.get("one").await?.metadata.finalizers.context("finalizers")?, ["pointsman.dev/b"]);
        api.patch("one", &apply("b"), &with(&[])).await?;
        assert!(api.get_opt("one").await?.is_none());
        Ok(())
    })
}
