//! The Kubernetes source against the API server double: what is told of a cluster, and what faults do
//! to it.

#[path = "api_source/harness.rs"]
mod harness;

use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::core::v1::{Node, Service};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams},
};
use lb_control::{
    model::{ObjectChange, ObjectRef},
    source::kube::Timing,
};
use pointsman_tests::apiserver::{ApiServer, Filter, Options, metallb};
use serde_json::json;

use harness::{Follower, apply, install, install_metallb, installed, run, server, service, slice, timing};

fn web(name: &str) -> ObjectRef {
    ObjectRef::new("default", name)
}

#[test]
fn everything_is_there_at_once_and_changes_follow() -> Result<()> {
    run(async {
        let (_server, client) = installed().await?;
        service(&client, "web", 80).await?;
        slice(&client, "web-1", "10.0.0.1").await?;
        apply(
            &client,
            "pointsman.dev/v1alpha1",
            "AddressPool",
            json!({
                "metadata": { "name": "default" }, "spec": { "addresses": ["192.0.2.0/24"] },
            }),
        )
        .await?;
        apply(
            &client,
            "pointsman.dev/v1alpha1",
            "VirtualIP",
            json!({
                "metadata": { "name": "192.0.2.1" },
                "spec": { "address": "192.0.2.1", "services": [{ "namespace": "default", "name": "web" }] },
            }),
        )
        .await?;
        apply(
            &client,
            "v1",
            "Node",
            json!({
                "metadata": { "name": "edge-1", "labels": { "topology.kubernetes.io/zone": "a" } },
            }),
        )
        .await?;
        for (name, label) in [("pointsman-agent-edge-1", "true"), ("pointsman-agent-edge-2", "no")] {
            apply(&client, "coordination.k8s.io/v1", "Lease", json!({
                "metadata": { "name": name, "namespace": "default", "labels": { "pointsman.dev/agent": label } },
                "spec": { "holderIdentity": "x", "leaseDurationSeconds": 15 },
            }))
            .await?;
        }

        let mut follower = Follower::new(&client, timing());
        let first = follower.synced().await?;
        assert_eq!(first.problems, Some(Vec::new()));
        let objects = &follower.objects;
        assert_eq!(objects.services[&web("web")].ports[0].port, 80);
        assert_eq!(objects.slices[&web("web-1")].endpoints[0].address.to_string(), "10.0.0.1");
        assert!(objects.pools["default"].auto_assign);
        assert!(objects.virtual_ips[&"192.0.2.1".parse()?].services.contains(&web("web")));
        assert_eq!(objects.nodes["edge-1"].zone(), Some("a"));
        assert!(objects.namespaces.contains_key("kube-system"));
        assert_eq!(objects.agents.keys().collect::<Vec<_>>(), ["edge-1"], "by label");

        let services: Api<Service> = Api::namespaced(client.clone(), "default");
        service(&client, "other", 81).await?;
        follower.until("a new Service", |objects| objects.services.contains_key(&web("other"))).await?;
        services.delete("web", &DeleteParams::default()).await?;
        follower.until("a Service less", |objects| !objects.services.contains_key(&web("web"))).await?;
        Ok(())
    })
}

#[test]
fn large_lists_of_older_servers_are_read_page_by_page() -> Result<()> {
    run(async {
        let server = ApiServer::start_with(&Options { minor: 24, ..Options::default() })?;
        let client = server.client()?;
        install(&client).await?;
        for number in 0..501 {
            slice(&client, &format!("web-{number}"), "10.0.0.1").await?;
        }
        let follower = Follower::after_sync(&client).await?;
        assert_eq!(follower.objects.slices.len(), 501);
        let lists = harness::count(&server, "list", "endpointslices");
        assert_eq!(lists, 2, "one for each page");
        Ok(())
    })
}

#[test]
fn definitions_that_are_missing_are_waited_for() -> Result<()> {
    run(async {
        let server = server()?;
        let client = server.client()?;
        let mut follower = Follower::new(&client, timing());
        follower.problem("pointsman-crds").await?;
        assert!(!follower.is_synced() && follower.objects.namespaces.is_empty());
        install(&client).await?;
        follower.synced().await?;
        follower.no_problem().await?;
        Ok(())
    })
}

#[test]
fn a_version_that_is_too_old_is_a_difference_and_no_flap() -> Result<()> {
    for minor in [24, 36] {
        run(async move {
            let server = harness::server_of(minor)?;
            let client = server.client()?;
            install(&client).await?;
            for name in ["kept", "goes"] {
                service(&client, name, 80).await?;
            }
            let mut follower = Follower::new(&client, timing());
            follower.synced().await?;

            let silent = server.faults().stall(Filter::of("watch", "services"));
            Api::<Service>::namespaced(client.clone(), "default")
                .delete("goes", &DeleteParams::default())
                .await?;
            service(&client, "comes", 80).await?;
            server.faults().compact();
            server.faults().close_watches(Filter::of("watch", "services"));
            server.faults().lift(silent);

            follower.until("the new Service", |objects| objects.services.contains_key(&web("comes"))).await?;
            follower.until("one less", |objects| !objects.services.contains_key(&web("goes"))).await?;
            let touched: Vec<_> = follower.changes_of_services().collect();
            assert!(!touched.contains(&(web("kept"), true)) && !touched.contains(&(web("kept"), false)));
            assert_eq!(touched.len(), 2, "{touched:?}");
            Ok(())
        })?;
    }
    Ok(())
}

/// As after a restore from a backup: objects change at versions that are older than what was seen.
#[test]
fn versions_that_go_back_are_noticed_and_no_flap() -> Result<()> {
    for minor in [24, 36] {
        run(async move {
            let server = harness::server_of(minor)?;
            let client = server.client()?;
            install(&client).await?;
            for name in ["kept", "changes", "goes"] {
                service(&client, name, 80).await?;
            }
            // So many versions that what comes after the restore stays behind them.
            for port in 1_000..1_200 {
                service(&client, "changes", port).await?;
            }
            // A watch that is silent is listed anew in the end: it must not be that which helps.
            let patient = Timing { idle: Duration::from_secs(600), ..timing() };
            let mut follower = Follower::new(&client, patient);
            follower.synced().await?;
            server.faults().new_epoch(-190);
            service(&client, "changes", 80).await?;
            let services: Api<Service> = Api::namespaced(client.clone(), "default");
            services.delete("goes", &DeleteParams::default()).await?;
            let port = |objects: &lb_control::model::Objects| {
                objects.services.get(&web("changes")).map(|service| service.ports[0].port)
            };
            follower.until("the older state", |objects| port(objects) == Some(80)).await?;
            follower.until("one less", |objects| !objects.services.contains_key(&web("goes"))).await?;
            // It is followed from there.
            service(&client, "comes", 80).await?;
            follower.until("the new one", |objects| objects.services.contains_key(&web("comes"))).await?;
            let touched: Vec<_> = follower.changes_of_services().collect();
            assert!(!touched.iter().any(|(name, _)| *name == web("kept")), "{touched:?}");
            assert!(!touched.contains(&(web("changes"), false)), "{touched:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_watch_that_falls_silent_is_begun_anew() -> Result<()> {
    run(async {
        let (server, client) = installed().await?;
        let mut follower = Follower::after_sync(&client).await?;
        let silent = server.faults().stall(Filter::of("watch", "services"));
        service(&client, "web", 80).await?;
        let watches = harness::count(&server, "watch", "services");
        follower
            .until_that("another watch", || harness::count(&server, "watch", "services") > watches)
            .await?;
        server.faults().lift(silent);
        follower.until("the Service", |objects| objects.services.contains_key(&web("web"))).await?;
        assert_eq!(follower.changes_of_services().count(), 1);
        Ok(())
    })
}

#[test]
fn a_server_that_restarts_changes_nothing() -> Result<()> {
    run(async {
        let (server, client) = installed().await?;
        service(&client, "web", 80).await?;
        let mut follower = Follower::after_sync(&client).await?;
        server.faults().down();
        follower.problem("cannot be reached").await?;
        assert_eq!(follower.problems.len(), 1, "one cause, one problem: {:?}", follower.problems);
        server.faults().up()?;
        follower.no_problem().await?;
        service(&client, "other", 80).await?;
        follower.until("a Service", |objects| objects.services.contains_key(&web("other"))).await?;
        assert_eq!(follower.changes_of_services().collect::<Vec<_>>(), [(web("other"), true)]);

        // As after a restore from a backup: versions lie elsewhere, and the past is forgotten.
        server.faults().new_epoch(1_000_000);
        service(&client, "third", 80).await?;
        follower.until("a Service", |objects| objects.services.contains_key(&web("third"))).await?;
        assert!(follower.changes_of_services().all(|(name, there)| there && name != web("web")));
        Ok(())
    })
}

#[test]
fn a_missing_rule_is_named_and_the_other_kinds_go_on() -> Result<()> {
    run(async {
        let (server, client) = installed().await?;
        let mut follower = Follower::after_sync(&client).await?;
        let refused = server.faults().error(Filter::of("watch", "endpointslices"), 403, None, u32::MAX);
        server.faults().close_watches(Filter::of("watch", "endpointslices"));
        follower.problem("apiGroups [\"discovery.k8s.io\"], resources [\"endpointslices\"]").await?;
        service(&client, "web", 80).await?;
        follower.until("another kind", |objects| objects.services.contains_key(&web("web"))).await?;
        server.faults().lift(refused);
        follower.no_problem().await?;
        slice(&client, "web-1", "10.0.0.1").await?;
        follower.until("the kind again", |objects| objects.slices.contains_key(&web("web-1"))).await?;
        Ok(())
    })
}

#[test]
fn an_old_server_ends_it() -> Result<()> {
    run(async {
        let server = harness::server_of(20)?;
        let mut follower = Follower::new(&server.client()?, timing());
        let fatal = follower.fatal().await?;
        assert!(fatal.to_string().contains("v1.20.0") && fatal.to_string().contains("1.21"), "{fatal}");
        Ok(())
    })
}

#[test]
fn a_bad_object_stays_as_it_was() -> Result<()> {
    run(async {
        let (_server, client) = installed().await?;
        service(&client, "web", 80).await?;
        let mut follower = Follower::after_sync(&client).await?;
        let services: Api<Service> = Api::namespaced(client.clone(), "default");
        let annotate = |value: serde_json::Value| {
            Patch::Merge(json!({
                "metadata": { "annotations": { "pointsman.dev/load-balancer-ips": value } },
                "spec": { "ports": [{ "name": "http", "port": 81 }] },
            }))
        };
        services.patch("web", &PatchParams::default(), &annotate(json!("nonsense"))).await?;
        follower.problem("Service default/web: metadata.annotations").await?;
        assert_eq!(follower.objects.services[&web("web")].ports[0].port, 80);
        services.patch("web", &PatchParams::default(), &annotate(json!(null))).await?;
        follower.until("the port", |objects| objects.services[&web("web")].ports[0].port == 81).await?;
        follower.no_problem().await?;
        Ok(())
    })
}

#[test]
fn metallb_is_noticed_when_it_comes_and_when_it_goes() -> Result<()> {
    run(async {
        let (_server, client) = installed().await?;
        let mut follower = Follower::after_sync(&client).await?;
        install_metallb(&client).await?;
        let metadata = json!({ "name": "default", "namespace": "default" });
        for (kind, spec) in [
            ("IPAddressPool", json!({ "addresses": ["198.51.100.0/24"] })),
            ("L2Advertisement", json!({})),
            ("BGPAdvertisement", json!({ "ipAddressPools": ["default"] })),
        ] {
            apply(&client, "metallb.io/v1beta1", kind, json!({ "metadata": metadata, "spec": spec })).await?;
        }
        follower
            .until("MetalLB's objects", |objects| {
                objects.pools.contains_key("metallb.io/default/default") && objects.advertisements.len() == 2
            })
            .await?;
        let definitions: Api<harness::Definition> = Api::all(client);
        for (plural, kind) in metallb::KINDS {
            let name = metallb::definition(plural, kind).0;
            definitions.delete(&name, &DeleteParams::default()).await?;
        }
        follower
            .until("nothing of MetalLB", |objects| {
                objects.pools.is_empty() && objects.advertisements.is_empty()
            })
            .await?;
        follower.no_problem().await?;
        Ok(())
    })
}

#[test]
fn heartbeats_do_not_come_through() -> Result<()> {
    run(async {
        let (_server, client) = installed().await?;
        apply(&client, "v1", "Node", json!({ "metadata": { "name": "edge-1" } })).await?;
        let mut follower = Follower::after_sync(&client).await?;
        let nodes: Api<Node> = Api::all(client.clone());
        let beat = Patch::Merge(json!({ "metadata": { "annotations": { "beat": "1" } } }));
        nodes.patch("edge-1", &PatchParams::default(), &beat).await?;
        let label = Patch::Merge(json!({ "metadata": { "labels": { "last": "1" } } }));
        nodes.patch("edge-1", &PatchParams::default(), &label).await?;
        follower.until("the label", |objects| objects.nodes["edge-1"].labels.contains_key("last")).await?;
        let of_nodes = follower.changes.iter().filter(|change| matches!(change, ObjectChange::Node(..)));
        assert_eq!(of_nodes.count(), 1);
        Ok(())
    })
}
