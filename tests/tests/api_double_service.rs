//! What an API server makes of Services, of the double and of real clusters alike.

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Service;
use kube::{
    Api, Error,
    api::{Patch, PatchParams, PostParams},
};
use pointsman_tests::apiserver::cluster::with_cluster;
use serde_json::{Value, json};

fn service(name: &str, spec: &Value) -> Service {
    serde_json::from_value(json!({ "metadata": { "name": name }, "spec": spec })).expect("a Service")
}

fn spec(service: &Service) -> Value {
    json!(service.spec)
}

/// The field for which a request was refused as invalid.
fn refused(result: Result<Service, Error>) -> String {
    match result.expect_err("refused") {
        Error::Api(status) if status.code == 422 => {
            let causes = status.details.map(|details| details.causes).unwrap_or_default();
            causes.into_iter().map(|cause| cause.field).collect::<Vec<_>>().join(" ")
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_service_gets_its_defaults() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<Service> = Api::namespaced(cluster.client(), &cluster.namespace("defaults").await?);
        let create = PostParams::default();
        let plain = api.create(&create, &service("plain", &json!({ "ports": [{ "port": 80 }] }))).await?;
        let made = spec(&plain);
        assert_eq!(made["type"], "ClusterIP");
        assert_eq!(made["ports"], json!([{ "port": 80, "protocol": "TCP", "targetPort": 80 }]));
        assert_eq!(made["clusterIPs"], json!([made["clusterIP"]]));
        assert_eq!((&made["ipFamilies"], &made["ipFamilyPolicy"]), (&json!(["IPv4"]), &json!("SingleStack")));
        assert_eq!(
            (&made["sessionAffinity"], &made["internalTrafficPolicy"]),
            (&json!("None"), &json!("Cluster"))
        );
        assert!(made["externalTrafficPolicy"].is_null() && made["sessionAffinityConfig"].is_null(), "{made}");
        assert_eq!(plain.metadata.generation, None);

        let balanced = json!({
            "type": "LoadBalancer", "loadBalancerClass": "pointsman.dev/none",
            "externalTrafficPolicy": "Local", "sessionAffinity": "ClientIP", "ipFamilyPolicy": "PreferDualStack",
            "ports": [{ "port": 53, "protocol": "UDP", "name": "udp" }, { "port": 53, "name": "tcp" }],
        });
        let made = spec(&api.create(&create, &service("balanced", &balanced)).await?);
        assert_eq!(made["allocateLoadBalancerNodePorts"], true);
        assert!(made["healthCheckNodePort"].as_u64().context("a health check port")? >= 30000);
        assert!(made["ports"][0]["nodePort"].as_u64().context("a node port")? >= 30000);
        assert_eq!(made["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"], 10800);
        assert_eq!(made["ipFamilies"], json!(["IPv4", "IPv6"]));
        assert_eq!(made["clusterIPs"].as_array().map(Vec::len), Some(2));

        let bare = json!({
            "type": "LoadBalancer", "loadBalancerClass": "pointsman.dev/none",
            "allocateLoadBalancerNodePorts": false, "ports": [{ "port": 80 }],
        });
        let made = spec(&api.create(&create, &service("bare", &bare)).await?);
        assert!(made["ports"][0]["nodePort"].is_null() && made["healthCheckNodePort"].is_null(), "{made}");
        assert_eq!(made["externalTrafficPolicy"], "Cluster");

        // Nobody manages what was given out.
        let managed = json!(plain.metadata.managed_fields)[0]["fieldsV1"]["f:spec"].clone();
        assert!(managed.get("f:ports").is_some() && managed.get("f:clusterIP").is_none(), "{managed}");

        let headless = json!({ "clusterIP": "None", "selector": { "a": "b" }, "ports": [{ "port": 80 }] });
        let made = spec(&api.create(&create, &service("headless", &headless)).await?);
        assert_eq!(made["clusterIPs"], json!(["None"]));
        Ok(())
    })
}

#[test]
fn what_was_given_out_stays_and_goes_with_the_type() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<Service> = Api::namespaced(cluster.client(), &cluster.namespace("type").await?);
        let balanced = json!({
            "type": "LoadBalancer", "loadBalancerClass": "pointsman.dev/none",
            "externalTrafficPolicy": "Local", "ports": [{ "port": 80 }],
        });
        let made = api.create(&PostParams::default(), &service("one", &balanced)).await?;
        // An update that names nothing of what was given out.
        let mut plain = service("one", &balanced);
        plain.metadata.resource_version = made.metadata.resource_version.clone();
        let same = api.replace("one", &PostParams::default(), &plain).await?;
        assert_eq!(same.spec, made.spec);
        let status = json!({ "status": { "loadBalancer": { "ingress": [{ "ip": "192.0.2.1" }] } } });
        let published = api.patch_status("one", &PatchParams::default(), &Patch::Merge(&status)).await?;
        assert_eq!(
            json!(published.status)["loadBalancer"]["ingress"],
            json!([{ "ip": "192.0.2.1", "ipMode": "VIP" }])
        );

        let patch = Patch::Merge(json!({ "spec": { "type": "ClusterIP" } }));
        let after = api.patch("one", &PatchParams::default(), &patch).await?;
        let spec = spec(&after);
        for field in [
            "loadBalancerClass",
            "healthCheckNodePort",
            "externalTrafficPolicy",
            "allocateLoadBalancerNodePorts",
        ] {
            assert!(spec[field].is_null(), "{field} in {spec}");
        }
        assert!(spec["ports"][0]["nodePort"].is_null(), "{spec}");
        assert_eq!(json!(after.status), json!({ "loadBalancer": {} }));
        let Err(Error::Api(no)) =
            api.patch_status("one", &PatchParams::default(), &Patch::Merge(&status)).await
        else {
            panic!("an address was published for a ClusterIP Service");
        };
        assert_eq!((no.code, no.reason.as_str()), (422, "Invalid"));
        Ok(())
    })
}

#[test]
fn wrong_services_are_refused() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<Service> = Api::namespaced(cluster.client(), &cluster.namespace("wrong").await?);
        let cases = [
            (json!({}), "spec.ports"),
            (json!({ "ports": [{ "port": 0 }] }), "spec.ports[0].port spec.ports[0].targetPort"),
            (json!({ "ports": [{ "port": 1, "protocol": "X" }] }), "spec.ports[0].protocol"),
            (json!({ "ports": [{ "port": 1 }, { "port": 2, "name": "b" }] }), "spec.ports[0].name"),
            (
                json!({ "ports": [{ "port": 1, "name": "a" }, { "port": 2, "name": "a" }] }),
                "spec.ports[1].name",
            ),
            (json!({ "type": "Any", "ports": [{ "port": 1 }] }), "spec.type"),
            (json!({ "loadBalancerClass": "a", "ports": [{ "port": 1 }] }), "spec.loadBalancerClass"),
            (
                json!({ "type": "LoadBalancer", "loadBalancerSourceRanges": ["x"], "ports": [{ "port": 1 }] }),
                "spec.LoadBalancerSourceRanges[0]",
            ),
        ];
        for (spec, field) in cases {
            let result = api.create(&PostParams::default(), &service("wrong", &spec)).await;
            assert_eq!(refused(result), field, "{spec}");
        }
        let balanced =
            json!({ "type": "LoadBalancer", "loadBalancerClass": "a.b/c", "ports": [{ "port": 80 }] });
        api.create(&PostParams::default(), &service("one", &balanced)).await?;
        for patch in [
            json!({ "spec": { "loadBalancerClass": "a.b/d" } }),
            json!({ "spec": { "loadBalancerClass": null } }),
        ] {
            let result = api.patch("one", &PatchParams::default(), &Patch::Merge(&patch)).await;
            assert_eq!(refused(result), "spec.loadBalancerClass", "{patch}");
        }
        Ok(())
    })
}
