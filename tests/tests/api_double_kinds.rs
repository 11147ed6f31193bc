//! The other kinds that Pointsman reads and writes, and the other ways to write them; of the double
//! and of real clusters alike.

use anyhow::{Context, Result};
use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{ConfigMap, Event, Node, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Error,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use pointsman_tests::apiserver::cluster::with_cluster;
use serde_json::{Value, json};

fn code<T: std::fmt::Debug>(result: Result<T, Error>) -> (u16, String) {
    match result.expect_err("a failure") {
        Error::Api(status) => (status.code, status.reason),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_lease_is_held_by_who_knows_its_version() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<Lease> = Api::namespaced(cluster.client(), &cluster.namespace("lease").await?);
        let lease = |holder: &str| -> Lease {
            serde_json::from_value(json!({
                "metadata": { "name": "one" },
                "spec": { "holderIdentity": holder, "leaseDurationSeconds": 15, "renewTime": "2026-01-01T00:00:00.000000Z" },
            }))
            .expect("a Lease")
        };
        let create = PostParams::default();
        let made = api.create(&create, &lease("a")).await?;
        assert_eq!(made.metadata.generation, None);
        assert_eq!(code(api.create(&create, &lease("b")).await), (409, "AlreadyExists".into()));
        // Who does not say what is replaced is refused.
        assert_eq!(code(api.replace("one", &create, &lease("b")).await), (422, "Invalid".into()));
        let mut taken = lease("b");
        taken.metadata.resource_version = made.metadata.resource_version.clone();
        api.replace("one", &create, &taken).await?;
        assert_eq!(code(api.replace("one", &create, &taken).await), (409, "Conflict".into()));
        // A merge patch may say it too.
        let version = made.metadata.resource_version.clone();
        let patch = Patch::Merge(json!({
            "metadata": { "resourceVersion": version }, "spec": { "holderIdentity": "c" },
        }));
        assert_eq!(code(api.patch("one", &PatchParams::default(), &patch).await), (409, "Conflict".into()));
        // Times keep their microseconds.
        let read = json!(api.get("one").await?);
        assert_eq!(read["spec"]["renewTime"], "2026-01-01T00:00:00.000000Z");
        // One that is not there is created by an update.
        let mut fresh = lease("a");
        fresh.metadata.name = Some("two".into());
        api.replace("two", &create, &fresh).await?;
        Ok(())
    })
}

#[test]
fn an_endpoint_slice_counts_its_generations() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<EndpointSlice> = Api::namespaced(cluster.client(), &cluster.namespace("slices").await?);
        let slice: EndpointSlice = serde_json::from_value(json!({
            "metadata": { "name": "one", "labels": { "kubernetes.io/service-name": "web" } },
            "addressType": "IPv4",
            "endpoints": [{ "addresses": ["10.0.0.1"], "conditions": { "ready": true }, "nodeName": "edge" }],
            "ports": [{ "port": 8080 }],
        }))?;
        let made = api.create(&PostParams::default(), &slice).await?;
        assert_eq!(made.metadata.generation, Some(1));
        let port = json!(made.ports)[0].clone();
        assert_eq!((&port["name"], &port["protocol"]), (&json!(""), &json!("TCP")));
        let patch = Patch::Merge(json!({ "metadata": { "labels": { "a": "b" } } }));
        let labelled = api.patch("one", &PatchParams::default(), &patch).await?;
        let patch = Patch::Merge(json!({ "endpoints": [] }));
        let emptied = api.patch("one", &PatchParams::default(), &patch).await?;
        assert!(emptied.metadata.generation > made.metadata.generation);
        assert!(labelled.metadata.generation >= made.metadata.generation);
        for (kind, address) in [("IPv5", "10.0.0.1"), ("IPv4", "2001:db8::1"), ("IPv4", "127.0.0.1")] {
            let mut wrong = slice.clone();
            wrong.metadata.name = Some("two".into());
            wrong.address_type = kind.into();
            wrong.endpoints = serde_json::from_value(json!([{ "addresses": [address] }]))?;
            let refused = code(api.create(&PostParams::default(), &wrong).await);
            assert_eq!(refused, (422, "Invalid".into()), "{kind} {address}");
        }
        Ok(())
    })
}

#[test]
fn a_node_has_a_status_of_its_own() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<Node> = Api::all(cluster.client());
        let name = cluster.name("node");
        let node: Node = serde_json::from_value(json!({
            "metadata": { "name": name, "labels": { "kubernetes.io/hostname": name } },
            "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.7" }] },
        }))?;
        let test = async {
            // A kubelet registers with its status.
            let made = api.create(&PostParams::default(), &node).await?;
            assert_eq!(json!(made.status)["addresses"][0]["address"], "192.0.2.7");
            let ready = |status: &str| {
                Patch::Strategic(json!({
                    "status": { "conditions": [{ "type": "Ready", "status": status }] },
                }))
            };
            let patched = api.patch_status(&name, &PatchParams::default(), &ready("True")).await?;
            assert_eq!(json!(patched.status)["conditions"][0]["status"], "True");
            let other = Patch::Strategic(json!({
                "status": { "conditions": [{ "type": "NetworkUnavailable", "status": "False" }] },
            }));
            api.patch_status(&name, &PatchParams::default(), &other).await?;
            let after = api.patch_status(&name, &PatchParams::default(), &ready("False")).await?;
            assert_eq!(json!(after.status)["conditions"].as_array().map(Vec::len), Some(2));
            // Not by the main resource.
            let after = api.patch(&name, &PatchParams::default(), &ready("True")).await?;
            let conditions = json!(after.status)["conditions"].clone();
            let found = conditions.as_array().into_iter().flatten().find(|found| found["type"] == "Ready");
            assert_eq!(found.context("a condition")?["status"], "False");
            anyhow::Ok(())
        };
        let outcome = test.await;
        api.delete(&name, &DeleteParams::default()).await?;
        outcome
    })
}

#[test]
fn patches_of_every_type_are_understood() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<Service> = Api::namespaced(cluster.client(), &cluster.namespace("patches").await?);
        let service: Service = serde_json::from_value(json!({
            "metadata": { "name": "one", "finalizers": ["pointsman.dev/a"] },
            "spec": { "ports": [{ "port": 80, "name": "http" }, { "port": 443, "name": "https" }] },
        }))?;
        api.create(&PostParams::default(), &service).await?;
        let none = PatchParams::default();
        let strategic = Patch::Strategic(json!({
            "metadata": { "finalizers": ["pointsman.dev/b"] },
            "spec": { "ports": [{ "port": 443, "targetPort": 8443 }] },
        }));
        let after = api.patch("one", &none, &strategic).await?;
        assert_eq!(json!(after.spec)["ports"].as_array().map(Vec::len), Some(2));
        assert_eq!(
            json!(after.spec)["ports"].as_array().and_then(|ports| {
                ports.iter().find(|port| port["port"] == 443).map(|port| port["targetPort"].clone())
            }),
            Some(json!(8443))
        );
        let mut finalizers = after.metadata.finalizers.clone().unwrap_or_default();
        finalizers.sort();
        assert_eq!(finalizers, ["pointsman.dev/a", "pointsman.dev/b"]);
        let patch =
            |operations: Value| -> Result<Patch<()>> { Ok(Patch::Json(serde_json::from_value(operations)?)) };
        let test = patch(json!([
            { "op": "test", "path": "/metadata/resourceVersion", "value": after.metadata.resource_version },
            { "op": "remove", "path": "/metadata/finalizers" },
        ]))?;
        let after = api.patch("one", &none, &test).await?;
        assert_eq!(after.metadata.finalizers, None);
        assert_eq!(code(api.patch("one", &none, &test).await), (422, "Invalid".into()));
        Ok(())
    })
}

#[test]
fn events_are_the_same_in_both_groups() -> Result<()> {
    with_cluster(async |cluster| {
        let namespace = cluster.namespace("events").await?;
        let events: Api<k8s_openapi::api::events::v1::Event> = Api::namespaced(cluster.client(), &namespace);
        let event = serde_json::from_value(json!({
            "metadata": { "name": "one" }, "eventTime": "2026-01-01T00:00:00.000000Z", "type": "Normal",
            "reason": "Allocated", "action": "Allocate", "note": "192.0.2.1",
            "reportingController": "pointsman.dev/controller", "reportingInstance": "edge",
            "regarding": { "kind": "Service", "name": "web", "namespace": namespace },
        }))?;
        events.create(&PostParams::default(), &event).await?;
        let core: Api<Event> = Api::namespaced(cluster.client(), &namespace);
        let seen = core.get("one").await?;
        assert_eq!(
            (seen.message.as_deref(), seen.involved_object.name.as_deref()),
            (Some("192.0.2.1"), Some("web"))
        );
        let list = core.list(&ListParams::default().fields("involvedObject.name=web")).await?;
        assert_eq!(list.items.len(), 1);
        let patch = Patch::Merge(
            json!({ "series": { "count": 2, "lastObservedTime": "2026-01-01T00:00:01.000000Z" } }),
        );
        let after = events.patch("one", &PatchParams::default(), &patch).await?;
        assert_eq!(after.series.context("a series")?.count, 2);
        assert_eq!(after.note.as_deref(), Some("192.0.2.1"));
        Ok(())
    })
}

#[test]
fn a_collection_is_deleted_by_selector() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<ConfigMap> = Api::namespaced(cluster.client(), &cluster.namespace("collection").await?);
        for (name, label) in [("a", "yes"), ("b", "yes"), ("c", "no")] {
            let object =
                serde_json::from_value(json!({ "metadata": { "name": name, "labels": { "mine": label } } }))?;
            api.create(&PostParams::default(), &object).await?;
        }
        api.delete_collection(&DeleteParams::default(), &ListParams::default().labels("mine=yes")).await?;
        let left = api.list(&ListParams::default().labels("mine")).await?;
        let names: Vec<_> = left.items.into_iter().filter_map(|object| object.metadata.name).collect();
        assert_eq!(names, ["c"]);
        Ok(())
    })
}

#[test]
fn what_is_owned_goes_with_its_owner() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<ConfigMap> = Api::namespaced(cluster.client(), &cluster.namespace("owner").await?);
        let make = async |name: &str, owners: Value| -> Result<ConfigMap> {
            let object =
                serde_json::from_value(json!({ "metadata": { "name": name, "ownerReferences": owners } }))?;
            Ok(api.create(&PostParams::default(), &object).await?)
        };
        let owner = make("owner", json!([])).await?;
        let reference = json!([{
            "apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner.metadata.uid,
        }]);
        make("owned", reference).await?;
        api.delete("owner", &DeleteParams::background()).await?;
        let gone =
            kube::runtime::wait::await_condition(api.clone(), "owned", |object: Option<&ConfigMap>| {
                object.is_none()
            });
        gone.await?;
        Ok(())
    })
}
