//! Uninstalling, and who leads, against the API server double.

#[path = "api_source/harness.rs"]
#[allow(dead_code, unused_imports, reason = "made for another suite")]
mod harness;

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result};
use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{Node, Service},
};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use lb_control::{
    crd,
    plan::election::Timing,
    publish::{Claim, Cleanup, Hold, Removed, hold},
};
use pointsman_tests::apiserver::Filter;
use serde_json::json;
use tokio::time::timeout;

use harness::{apply, installed, run, server};

const LEADER: &str = "pointsman-controller";

fn cleanup() -> Cleanup {
    let mut cleanup = Cleanup::new("default", LEADER, ("pointsman.dev/agent=true", "pointsman-agent-"));
    cleanup.patience = Duration::from_millis(300);
    cleanup.farewell = Duration::from_secs(5);
    cleanup
}

fn claim(identity: &str) -> Claim {
    let milliseconds = Duration::from_millis;
    Claim {
        namespace: "default".into(),
        name: LEADER.into(),
        identity: identity.into(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        node: None,
        timing: Timing {
            // A Lease's duration is in whole seconds.
            duration: Duration::from_secs(1),
            give_up: milliseconds(600),
            renew: milliseconds(100),
            retry: milliseconds(50),
        },
    }
}

async fn until(hold: &mut Hold, leads: bool) -> Result<()> {
    let wanted = hold.holds.wait_for(|now| *now == leads);
    timeout(Duration::from_secs(10), wanted).await.with_context(|| format!("never: {leads}"))??;
    Ok(())
}

/// A Service with all that we write into one, and something of others.
async fn taken(client: &Client, name: &str) -> Result<()> {
    harness::service(client, name, 80).await?;
    let api: Api<Service> = Api::namespaced(client.clone(), "default");
    let patch = json!({
        "metadata": {
            "finalizers": ["service.kubernetes.io/load-balancer-cleanup", "pointsman.dev/cleanup", "x.example/y"],
            "annotations": { "pointsman.dev/external-ips": "192.0.2.1", "kept": "yes" },
        },
        "spec": { "externalIPs": ["198.51.100.1", "192.0.2.1"] },
    });
    api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await?;
    let status = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": name },
        "status": {
            "loadBalancer": { "ingress": [{ "ip": "192.0.2.1", "ipMode": "VIP" }] },
            "conditions": [{
                "type": "pointsman.dev/Allocated", "status": "True", "reason": "AddressAllocated", "message": "",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }],
        },
    });
    api.patch_status(name, &PatchParams::apply("pointsman"), &Patch::Apply(status)).await?;
    Ok(())
}

#[test]
fn nothing_of_ours_remains_and_nothing_of_others_goes() -> Result<()> {
    run(async {
        let (server, client) = installed().await?;
        taken(&client, "web").await?;
        harness::service(&client, "foreign", 80).await?;
        let api: Api<Service> = Api::namespaced(client.clone(), "default");
        let foreign = Patch::Merge(json!({ "metadata": {
            "finalizers": ["service.kubernetes.io/load-balancer-cleanup"],
        } }));
        let foreign = api.patch("foreign", &PatchParams::default(), &foreign).await?;
        apply(
            &client,
            "pointsman.dev/v1alpha1",
            "VirtualIP",
            json!({
                "metadata": { "name": "192.0.2.1" }, "spec": { "address": "192.0.2.1" },
            }),
        )
        .await?;
        apply(&client, "coordination.k8s.io/v1", "Lease", json!({
            "metadata": {
                "name": "pointsman-agent-a", "namespace": "default", "labels": { "pointsman.dev/agent": "true" },
            },
        }))
        .await?;

        assert_eq!(
            cleanup().run(&client).await?,
            Removed { services: 1, virtual_ips: 1, leases: 1, ..Removed::default() }
        );
        let web = api.get("web").await?;
        assert_eq!(web.metadata.finalizers, Some(vec!["x.example/y".into()]));
        let annotations = web.metadata.annotations.context("annotations")?;
        assert_eq!(annotations.keys().collect::<Vec<_>>(), ["kept"]);
        assert_eq!(web.spec.context("spec")?.external_ips, Some(vec!["198.51.100.1".into()]));
        let status = web.status.unwrap_or_default();
        assert!(status.load_balancer.and_then(|status| status.ingress).unwrap_or_default().is_empty());
        assert!(status.conditions.unwrap_or_default().is_empty());
        assert_eq!(api.get("foreign").await?, foreign);
        let vips: Api<crd::VirtualIp> = Api::all(client.clone());
        assert!(vips.list(&ListParams::default()).await?.items.is_empty());

        server.forget_requests();
        assert_eq!(cleanup().run(&client).await?, Removed::default(), "the second time there is nothing");
        let changed = server.requests().into_iter().filter(|request| request.changed);
        assert!(changed.map(|request| request.resource).all(|resource| resource == "leases"));

        let leaving = json!({ "metadata": { "finalizers": null } });
        api.patch("web", &PatchParams::default(), &Patch::Merge(leaving)).await?;
        api.delete("web", &DeleteParams::default()).await?;
        Ok(())
    })
}

#[test]
fn cleaning_up_survives_conflicts_and_missing_definitions() -> Result<()> {
    run(async {
        let server = server()?;
        let client = server.client()?;
        for number in 0..20 {
            taken(&client, &format!("web-{number}")).await?;
        }
        server.faults().error(Filter::of("patch", "services"), 409, None, 3);
        server.faults().error(Filter::of("patch", "services/status"), 409, None, 3);
        assert_eq!(cleanup().run(&client).await?.services, 20);
        Ok(())
    })
}

async fn node(client: &Client, name: &str) -> Result<()> {
    apply(client, "v1", "Node", json!({ "metadata": { "name": name } })).await
}

/// What an agent is called that holds its own Lease.
fn agent(node: &str) -> Claim {
    Claim {
        name: format!("pointsman-agent-{node}"),
        labels: [("pointsman.dev/agent".to_owned(), "true".to_owned())].into(),
        ..claim(node)
    }
}

async fn leases(client: &Client) -> Result<Vec<String>> {
    let all = Api::<Lease>::namespaced(client.clone(), "default").list(&ListParams::default()).await?;
    Ok(all.into_iter().filter_map(|lease| lease.metadata.name).collect())
}

#[test]
fn a_cleanup_waits_until_the_agents_have_let_go() -> Result<()> {
    run(async {
        let server = server()?;
        let client = server.client()?;
        let mut leader = hold(client.clone(), claim("a"));
        until(&mut leader, true).await?;
        let mut own = hold(client.clone(), agent("a"));
        until(&mut own, true).await?;
        let (cleanup, plan) = (cleanup(), client.clone());
        let cleaning = tokio::spawn(async move { cleanup.run(&plan).await });
        timeout(Duration::from_secs(10), leader.ends.wait_for(|asked| *asked)).await??;
        assert!(!*leader.holds.borrow() && !*own.ends.borrow());
        // Far longer than one that led may take to notice.
        let waited = timeout(Duration::from_secs(1), leader.holds.wait_for(|leads| *leads)).await;
        assert!(waited.is_ok_and(|waited| waited.is_err()), "it does not want the Lease any more");
        assert!(!cleaning.is_finished(), "the agent is still there");
        own.delete().await;
        let removed = cleaning.await??;
        assert_eq!((removed.leases, removed.unheard.len()), (1, 0));
        assert_eq!(leases(&client).await?, [LEADER]);
        Ok(())
    })
}

#[test]
fn an_agent_that_does_not_answer_is_told_of_and_asked_for_longer() -> Result<()> {
    run(async {
        let server = server()?;
        let client = server.client()?;
        let mut deaf = hold(client.clone(), agent("deaf"));
        until(&mut deaf, true).await?;
        let cleanup = Cleanup { farewell: Duration::from_millis(500), ..cleanup() };
        let removed = cleanup.run(&client).await?;
        assert_eq!(removed.unheard, ["deaf".to_owned()].into());
        let leader = Api::<Lease>::namespaced(client.clone(), "default").get(LEADER).await?;
        let spec = leader.spec.context("spec")?;
        assert_eq!(spec.holder_identity.as_deref(), Some("pointsman-cleanup"));
        assert!(leader.metadata.annotations.is_some_and(|all| all.contains_key("pointsman.dev/uninstall")));
        // What comes later is not meant: the next installation.
        let mut next = hold(client.clone(), claim("next"));
        let asked = timeout(Duration::from_millis(500), next.ends.wait_for(|asked| *asked)).await;
        assert!(asked.is_err(), "it ended");
        Ok(())
    })
}

/// A pod that is started again before its DaemonSet is deleted.
#[test]
fn who_comes_after_a_cleanup_neither_leads_at_once_nor_ends() -> Result<()> {
    run(async {
        let server = server()?;
        let client = server.client()?;
        cleanup().run(&client).await?;
        let lease = Api::<Lease>::namespaced(client.clone(), "default").get(LEADER).await?;
        let spec = lease.spec.context("spec")?;
        assert_eq!(spec.lease_duration_seconds, Some(15), "nobody has to wait for long");
        let mut next = hold(client.clone(), claim("next"));
        let led = timeout(Duration::from_secs(1), next.holds.wait_for(|leads| *leads)).await;
        assert!(led.is_err(), "it leads");
        assert!(!*next.ends.borrow());
        Ok(())
    })
}

#[test]
fn a_cleanup_goes_on_after_errors_that_pass() -> Result<()> {
    run(async {
        let server = server()?;
        let client = server.client()?;
        taken(&client, "web").await?;
        let mut own = hold(client.clone(), agent("a"));
        until(&mut own, true).await?;
        server.faults().error(Filter::of("list", "leases"), 500, None, 2);
        server.faults().error(Filter::of("list", "services"), 503, None, 2);
        let (cleanup, plan) = (cleanup(), client.clone());
        let cleaning = tokio::spawn(async move { cleanup.run(&plan).await });
        own.delete().await;
        assert_eq!(cleaning.await??.services, 1);
        Ok(())
    })
}

#[test]
fn a_cleanup_that_fails_says_what_became_of_the_agents() -> Result<()> {
    run(async {
        let server = server()?;
        let client = server.client()?;
        server.faults().error(Filter::of("list", "services"), 403, None, 1);
        let error = cleanup().run(&client).await.err().context("it succeeded")?;
        let text = format!("{error:#}");
        assert!(text.contains("rest") && text.contains("kubectl rollout restart daemonset"), "{text}");
        Ok(())
    })
}

#[test]
fn an_agent_whose_node_is_gone_is_not_told_of() -> Result<()> {
    run(async {
        let (_server, client) = installed().await?;
        node(&client, "here").await?;
        for name in ["here", "gone"] {
            apply(&client, "coordination.k8s.io/v1", "Lease", json!({
                "metadata": {
                    "name": format!("pointsman-agent-{name}"), "namespace": "default",
                    "labels": { "pointsman.dev/agent": "true" },
                },
                "spec": {
                    "holderIdentity": name, "leaseDurationSeconds": 1, "renewTime": "2026-01-01T00:00:00.000000Z",
                },
            }))
            .await?;
        }
        let removed = cleanup().run(&client).await?;
        assert_eq!((removed.unheard, removed.leases), (["here".to_owned()].into(), 2));
        Ok(())
    })
}

/// Kubernetes deletes it with the node. One that is made again later is another owner.
#[test]
fn the_lease_of_an_agent_belongs_to_its_node() -> Result<()> {
    run(async {
        let (_server, client) = installed().await?;
        node(&client, "a").await?;
        let nodes: Api<Node> = Api::all(client.clone());
        let leases: Api<Lease> = Api::namespaced(client.clone(), "default");
        let mut own = hold(client.clone(), Claim { node: Some("a".into()), ..agent("a") });
        until(&mut own, true).await?;
        let owner = async || -> Result<_> {
            let lease = leases.get_opt("pointsman-agent-a").await?;
            let owners = lease.and_then(|lease| lease.metadata.owner_references).unwrap_or_default();
            Ok(owners.into_iter().map(|one| (one.kind, one.name, one.uid)).collect::<Vec<_>>())
        };
        let expected = async || -> Result<_> {
            let uid = nodes.get("a").await?.metadata.uid.context("uid")?;
            Ok(vec![("Node".to_owned(), "a".to_owned(), uid)])
        };
        let first = expected().await?;
        assert_eq!(owner().await?, first);
        nodes.delete("a", &DeleteParams::default()).await?;
        node(&client, "a").await?;
        let second = expected().await?;
        assert_ne!(first, second);
        timeout(Duration::from_secs(10), async {
            while owner().await? != second {
                tokio::task::yield_now().await;
            }
            anyhow::Ok(())
        })
        .await??;
        Ok(())
    })
}

#[test]
fn a_lease_is_handed_over_at_once_when_it_is_released() -> Result<()> {
    run(async {
        let server = server()?;
        let client = server.client()?;
        let mut first = hold(client.clone(), claim("a"));
        until(&mut first, true).await?;
        let mut second = hold(client.clone(), claim("b"));
        assert!(!*second.holds.borrow_and_update());
        first.release().await;
        until(&mut second, true).await?;
        let lease = Api::<Lease>::namespaced(client, "default").get(LEADER).await?.spec.context("spec")?;
        assert_eq!(lease.holder_identity.as_deref(), Some("b"));
        assert_eq!(lease.lease_transitions, Some(1));
        Ok(())
    })
}

#[test]
fn a_leader_that_is_cut_off_stops_before_another_begins() -> Result<()> {
    run(async {
        let server = server()?;
        let client = server.client()?;
        let mut first = hold(server.client_as("default", "a")?, claim("a"));
        until(&mut first, true).await?;
        let mut second = hold(client.clone(), claim("b"));
        let a = Filter { user: "system:serviceaccount:default:a".into(), ..Filter::of("", "leases") };
        server.faults().stall(a);
        let mut watched = first.holds.clone();
        until(&mut second, true).await?;
        assert!(!*watched.borrow_and_update(), "it knew before the other led");
        Ok(())
    })
}
