//! Our resource definitions: what the API server takes and what it refuses.

use std::net::IpAddr;

use anyhow::{Context, Result};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Error,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams},
};
use lb_control::{crd, model::AddressRange};
use pointsman_tests::apiserver::cluster::{TestCluster, with_cluster};
use serde_json::{Value, json};

/// The definition of a kind, in a group of this test's own: others may use the real one just now.
async fn install(cluster: &TestCluster, kind: &str) -> Result<(Api<DynamicObject>, ApiResource)> {
    let mut definition: CustomResourceDefinition =
        crd::definitions().into_iter().find(|one| one.spec.names.kind == kind).context("no such kind")?;
    let plural = definition.spec.names.plural.clone();
    let group = format!("{}.pointsman.dev", cluster.name(&plural));
    definition.metadata.name = Some(format!("{plural}.{group}"));
    definition.spec.group.clone_from(&group);
    cluster.install(&definition).await?;
    let version = &definition.spec.versions[0].name;
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(&group, version, kind), &plural);
    Ok((Api::all_with(cluster.client(), &resource), resource))
}

fn object(resource: &ApiResource, name: &str, spec: Value) -> DynamicObject {
    let mut object = DynamicObject::new(name, resource);
    object.data = json!({ "spec": spec });
    object
}

/// What the API server has against it; nothing when it is taken.
fn objection<T>(result: Result<T, Error>) -> Result<Option<String>> {
    match result {
        Ok(_) => Ok(None),
        Err(Error::Api(status)) if status.code == 422 => Ok(Some(status.message)),
        Err(error) => Err(error.into()),
    }
}

/// Asks without creating anything.
fn dry_run() -> PostParams {
    PostParams { dry_run: true, ..PostParams::default() }
}

const NO_RANGE: &str = "must be a CIDR";
const HOST_BITS: &str = "has host bits set";
const BACKWARDS: &str = "ends before it begins";

#[test]
fn ranges_are_checked_before_any_agent_sees_them() -> Result<()> {
    with_cluster(async |cluster| {
        let (api, resource) = install(&cluster, "AddressPool").await?;
        for (text, expected) in [
            ("192.0.2.0/24", None),
            ("192.0.2.1/32", None),
            ("0.0.0.0/0", None),
            ("255.255.255.254/31", None),
            ("192.0.2.1-192.0.2.9", None),
            ("192.0.2.1 - 192.0.2.1", None),
            ("10.0.0.255-10.0.1.0", None),
            ("2001:db8::/120", None),
            ("::/0", None),
            ("2001:db8::1-2001:DB8::ff", None),
            ("1:2:3:4:5:6:7:8-1:2:3:4:5:6:7:9", None),
            ("192.0.2.1/24", Some(HOST_BITS)),
            ("128.0.0.0/0", Some(HOST_BITS)),
            ("192.0.2.9-192.0.2.1", Some(BACKWARDS)),
            ("10.1.0.0-10.0.255.255", Some(BACKWARDS)),
            ("192.0.2.1", Some(NO_RANGE)),
            ("192.0.2.0/33", Some(NO_RANGE)),
            ("192.0.2.256/32", Some(NO_RANGE)),
            ("192.0.2.01/32", Some(NO_RANGE)),
            ("192.0.2.1-::1", Some(NO_RANGE)),
            ("::1::2/64", Some(NO_RANGE)),
            ("1:2:3:4:5:6:7:8:9/128", Some(NO_RANGE)),
            ("2001:db8::/129", Some(NO_RANGE)),
            ("edge", Some(NO_RANGE)),
            ("", Some("should be at least 1 chars long")),
        ] {
            let pool = object(&resource, "pool", json!({ "addresses": [text] }));
            let found = objection(api.create(&dry_run(), &pool).await)?;
            match (&found, expected) {
                (None, None) => {}
                (Some(found), Some(expected)) if found.contains(expected) => {}
                _ => panic!("`{text}`: {found:?} instead of {expected:?}"),
            }
            // All that is refused here would be refused by the agent, and what is taken is of use.
            assert_eq!(text.parse::<AddressRange>().is_ok(), expected.is_none(), "{text}");
        }
        Ok(())
    })
}

#[test]
fn a_pool_has_its_limits_and_defaults() -> Result<()> {
    with_cluster(async |cluster| {
        let (api, resource) = install(&cluster, "AddressPool").await?;
        let ranges = |count: usize| -> Vec<_> { (0..count).map(|n| format!("10.0.{n}.0/24")).collect() };
        for (spec, expected) in [
            (json!({ "addresses": ranges(64) }), None),
            (json!({ "addresses": ranges(65) }), Some("spec.addresses")),
            (json!({ "addresses": [] }), Some("spec.addresses")),
            (json!({}), Some("spec.addresses")),
            (json!({ "addresses": ranges(1), "namespaces": ["Shop"] }), Some("spec.namespaces[0]")),
            (json!({ "addresses": ranges(1), "namespaces": ["a", "a"] }), Some("spec.namespaces[1]")),
            (json!({ "addresses": ranges(1), "priority": "first" }), Some("spec.priority")),
            (
                json!({ "addresses": ranges(1), "serviceSelectors": [{}, { "matchLabels": { "a": "b" } }] }),
                None,
            ),
        ] {
            let found = objection(api.create(&dry_run(), &object(&resource, "pool", spec.clone())).await)?;
            match (&found, expected) {
                (None, None) => {}
                (Some(found), Some(expected)) if found.contains(expected) => {}
                _ => panic!("{spec}: {found:?} instead of {expected:?}"),
            }
        }
        let pool =
            api.create(&dry_run(), &object(&resource, "pool", json!({ "addresses": ranges(1) }))).await?;
        let expected = json!({
            "addresses": ranges(1), "autoAssign": true, "avoidBuggyIPs": false, "priority": 0, "disabled": false,
        });
        assert_eq!(pool.data["spec"], expected);
        Ok(())
    })
}

#[test]
fn a_virtual_ip_is_named_after_its_address_for_good() -> Result<()> {
    with_cluster(async |cluster| {
        let (api, resource) = install(&cluster, "VirtualIP").await?;
        for (name, address, expected) in [
            ("192.0.2.2", "192.0.2.1", Some("must be named after its address")),
            ("2001-db8", "2001:db8::", Some("must be named after its address")),
            ("edge", "edge", Some("must be an IPv4 or IPv6 address")),
            ("192.0.2.1", "192.0.2.1", None),
        ] {
            let vip = object(&resource, name, json!({ "address": address }));
            let found = objection(api.create(&dry_run(), &vip).await)?;
            match (&found, expected) {
                (None, None) => {}
                (Some(found), Some(expected)) if found.contains(expected) => {}
                _ => panic!("{name} {address}: {found:?} instead of {expected:?}"),
            }
        }
        for (address, other) in [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")] {
            let name = crd::virtual_ip_name(address.parse::<IpAddr>()?);
            let services = json!([{ "namespace": "a", "name": "b" }]);
            let vip = object(&resource, &name, json!({ "address": address, "services": services }));
            api.create(&PostParams::default(), &vip).await?;
            assert!(
                matches!(api.create(&PostParams::default(), &vip).await, Err(Error::Api(status)) if status.code == 409)
            );
            let patch = Patch::Merge(json!({ "spec": { "address": other } }));
            let found = objection(api.patch(&name, &PatchParams::default(), &patch).await)?;
            assert!(found.is_some_and(|found| found.contains("cannot be changed")));
            // What is served is told by another than who gives it out.
            let status = json!({ "node": "edge-1", "services": services });
            let patch = Patch::Merge(json!({ "status": status, "spec": { "node": "edge-2" } }));
            let vip = api.patch_status(&name, &PatchParams::default(), &patch).await?;
            assert_eq!((&vip.data["status"], &vip.data["spec"]["node"]), (&status, &Value::Null));
        }
        Ok(())
    })
}
