//! What the executor writes, with no other rights than those that it is deployed with.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use k8s_openapi::{
    api::{core::v1::Service, events::v1::Event},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, ResourceExt,
    api::{DynamicObject, ListParams, Patch, PatchParams, PostParams},
    core::{ApiResource, GroupVersionKind},
};
use lb_control::{
    crd,
    model::{Condition, FIELD_MANAGER, ObjectRef},
    plan::controller::{ALLOCATED, Command, EventTarget, FINALIZER, Outcome},
    publish::Executor,
};
use pointsman_tests::apiserver::{ApiServer, Effect, Filter, Verb, cluster};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::timeout;

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// All objects that `kubectl apply -k deploy/base` makes, roles among them.
const DEPLOYED: &str = include_str!("../../deploy/base/pointsman.yaml");

type Counted = Arc<Mutex<Vec<(&'static str, &'static str, u16)>>>;

/// An executor that leads, an administrator who looks, and a Service.
struct World {
    server: ApiServer,
    admin: Client,
    executor: Executor,
    counted: Counted,
    service: ObjectRef,
    uid: String,
}

impl World {
    async fn new() -> Result<Self> {
        let server = ApiServer::start()?;
        let admin = server.client()?;
        let definitions: Api<CustomResourceDefinition> = Api::all(admin.clone());
        for definition in crd::definitions() {
            definitions.create(&PostParams::default(), &definition).await?;
        }
        deploy_roles(&admin).await?;
        server.enforce_rbac(true);
        let counted = Counted::default();
        let count = counted.clone();
        let executor = Executor::new(
            server.client_as("pointsman-system", "pointsman")?,
            "edge-1",
            Arc::new(move |verb, resource, status| {
                count.lock().unwrap_or_else(PoisonError::into_inner).push((verb, resource, status));
            }),
        );
        executor.leads(true);
        let service = ObjectRef::new("default", "web");
        let made = serde_json::from_value(json!({
            "metadata": { "name": "web", "finalizers": ["example.com/theirs"] },
            "spec": { "type": "LoadBalancer", "ports": [{ "port": 80 }] },
        }))?;
        let made = services(&admin).create(&PostParams::default(), &made).await?;
        let uid = made.uid().context("a uid")?;
        Ok(Self { server, admin, executor, counted, service, uid })
    }

    /// Has a command carried out.
    async fn outcome(&mut self, command: Command) -> Result<Outcome> {
        self.executor.submit(command.clone());
        let (done, outcome) = self.next().await?;
        assert_eq!(done, command);
        Ok(outcome)
    }

    async fn next(&mut self) -> Result<(Command, Outcome)> {
        timeout(PATIENCE, self.executor.outcomes.recv()).await?.context("the executor has ended")
    }

    async fn service(&self) -> Result<Service> {
        Ok(services(&self.admin).get("web").await?)
    }

    fn apply(&self, ingress: &[&str], conditions: Vec<Condition>) -> Command {
        let ingress = ingress.iter().map(|text| ip(text)).collect();
        Command::ApplyServiceStatus {
            service: self.service.clone(),
            uid: self.uid.clone(),
            ingress,
            conditions,
        }
    }
}

fn run(test: impl AsyncFnOnce(World) -> Result<()>) -> Result<()> {
    if cluster::is_real() {
        println!("only the double has roles and definitions for this test alone");
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { test(World::new().await?).await })
}

async fn deploy_roles(admin: &Client) -> Result<()> {
    for document in DEPLOYED.split("\n---") {
        let object: Value = serde_saphyr::from_str(document)?;
        let kind = object["kind"].as_str().unwrap_or_default();
        if kind != "ClusterRole" && kind != "ClusterRoleBinding" {
            continue;
        }
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("rbac.authorization.k8s.io", "v1", kind));
        let object = DynamicObject::deserialize(&object)?;
        Api::all_with(admin.clone(), &resource).create(&PostParams::default(), &object).await?;
    }
    Ok(())
}

fn services(admin: &Client) -> Api<Service> {
    Api::namespaced(admin.clone(), "default")
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn condition(status: &str, reason: &str) -> Condition {
    Condition {
        kind: ALLOCATED.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: "for people".to_owned(),
        observed_generation: 1,
    }
}

fn is_conflict(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Conflict(_))
}

/// `status.loadBalancer.ingress`.
fn ingress(service: &Service) -> Value {
    json!(service)["status"]["loadBalancer"]["ingress"].clone()
}

/// Our condition.
fn written(service: &Service) -> Value {
    json!(service)["status"]["conditions"][0].clone()
}

#[test]
fn a_virtual_ip_from_first_to_last() -> Result<()> {
    run(async |mut world| {
        let address = ip("2001:db8::1");
        let api: Api<crd::VirtualIp> = Api::all(world.admin.clone());
        let services = [world.service.clone()].into();
        let create = Command::CreateVirtualIp {
            address,
            pool: Some("default".into()),
            services,
            node: Some("edge-1".into()),
        };
        assert_eq!(world.outcome(create.clone()).await?, Outcome::Done);
        let name = crd::virtual_ip_name(address);
        let first = api.get(&name).await?;
        assert_eq!(first.spec.address, "2001:db8::1");
        assert_eq!(first.spec.services, [crd::ServiceName::from(&world.service)]);
        // Who else gave it away is found out by its name.
        assert!(is_conflict(&world.outcome(create).await?));

        // The agent's part needs no leader.
        world.executor.leads(false);
        let status = |seen: &crd::VirtualIp, node: Option<&str>| Command::SetVirtualIpStatus {
            address,
            uid: seen.uid().unwrap_or_default(),
            resource_version: seen.resource_version().unwrap_or_default(),
            node: node.map(str::to_owned),
            services: node.map(|_| ObjectRef::new("default", "web")).into_iter().collect(),
        };
        assert_eq!(world.outcome(status(&first, Some("edge-1"))).await?, Outcome::Done);
        // What a former owner sends late does not undo it.
        assert!(is_conflict(&world.outcome(status(&first, Some("edge-2"))).await?));
        let lets_go = status(&api.get(&name).await?, None);
        let status = api.get(&name).await?.status.context("a status")?;
        assert_eq!((status.node.as_deref(), status.services.len()), (Some("edge-1"), 1));
        assert_eq!(world.outcome(lets_go).await?, Outcome::Done);
        let status = api.get(&name).await?.status.unwrap_or_default();
        assert_eq!((status.node, status.services.len()), (None, 0));
        world.executor.leads(true);

        let update = |version: Option<String>| Command::UpdateVirtualIp {
            address,
            resource_version: version.unwrap_or_default(),
            pool: None,
            services: [].into(),
            node: None,
        };
        // What was seen is no longer so.
        assert!(is_conflict(&world.outcome(update(first.resource_version())).await?));
        let now = api.get(&name).await?;
        assert_eq!(world.outcome(update(now.resource_version())).await?, Outcome::Done);
        let last = api.get(&name).await?;
        assert_eq!(last.spec, crd::VirtualIp::of(address).spec);

        let delete = |seen: &crd::VirtualIp| Command::DeleteVirtualIp {
            address,
            uid: seen.uid().unwrap_or_default(),
            resource_version: seen.resource_version().unwrap_or_default(),
        };
        assert!(is_conflict(&world.outcome(delete(&now)).await?));
        assert_eq!(world.outcome(delete(&last)).await?, Outcome::Done);
        assert_eq!(world.outcome(delete(&last)).await?, Outcome::Gone);
        Ok(())
    })
}

#[test]
fn a_services_status_is_applied_and_withdrawn() -> Result<()> {
    run(async |mut world| {
        let apply = world.apply(&["192.0.2.1"], vec![condition("True", "Assigned")]);
        assert_eq!(world.outcome(apply).await?, Outcome::Done);
        let before = world.service().await?;
        assert_eq!(ingress(&before), json!([{ "ip": "192.0.2.1", "ipMode": "VIP" }]));
        assert_eq!(written(&before)["reason"], "Assigned");
        // The time is that of the status, not of what is said about it.
        let since = "2001-02-03T04:05:06Z";
        let patch =
            json!([{ "op": "replace", "path": "/status/conditions/0/lastTransitionTime", "value": since }]);
        let patch = Patch::Json::<()>(serde_json::from_value(patch)?);
        let ours = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        services(&world.admin).patch_status("web", &ours, &patch).await?;
        let took_over = world.apply(&["192.0.2.1"], vec![condition("True", "Adopted")]);
        let outcome = world.outcome(took_over).await?;
        let after = written(&world.service().await?);
        assert_eq!(outcome, Outcome::Done);
        assert_eq!(
            (after["reason"].as_str(), after["lastTransitionTime"].as_str()),
            (Some("Adopted"), Some(since))
        );
        let withdraw = world.apply(&[], Vec::new());
        assert_eq!(world.outcome(withdraw).await?, Outcome::Done);
        assert_eq!(ingress(&world.service().await?), Value::Null);
        Ok(())
    })
}

#[test]
fn what_another_has_published_is_left_alone() -> Result<()> {
    run(async |mut world| {
        let patch =
            Patch::Merge(json!({ "status": { "loadBalancer": { "ingress": [{ "ip": "203.0.113.9" }] } } }));
        services(&world.admin).patch_status("web", &PatchParams::default(), &patch).await?;
        let before = world.service().await?;
        let apply = world.apply(&["192.0.2.1"], vec![condition("True", "Assigned")]);
        assert!(is_conflict(&world.outcome(apply).await?));
        assert_eq!(json!(world.service().await?), json!(before));
        Ok(())
    })
}

#[test]
fn a_service_of_the_same_name_is_another() -> Result<()> {
    run(async |mut world| {
        world.uid = "11111111-2222-3333-4444-555555555555".into();
        let before = json!(world.service().await?);
        let apply = world.apply(&["192.0.2.1"], Vec::new());
        assert!(is_conflict(&world.outcome(apply).await?));
        let add = Command::AddFinalizers {
            service: world.service.clone(),
            uid: world.uid.clone(),
            resource_version: "1".into(),
            finalizers: vec![FINALIZER.into()],
        };
        assert!(is_conflict(&world.outcome(add).await?));
        assert_eq!(json!(world.service().await?), before);
        Ok(())
    })
}

#[test]
fn finalizers_of_others_stay() -> Result<()> {
    run(async |mut world| {
        let (service, uid) = (world.service.clone(), world.uid.clone());
        let finalizers = vec![FINALIZER.to_owned()];
        let resource_version = world.service().await?.resource_version().unwrap_or_default();
        let add = Command::AddFinalizers {
            service: service.clone(),
            uid: uid.clone(),
            resource_version,
            finalizers: finalizers.clone(),
        };
        assert_eq!(world.outcome(add).await?, Outcome::Done);
        let now = world.service().await?;
        assert_eq!(now.finalizers(), ["example.com/theirs", FINALIZER]);
        let resource_version = now.resource_version().unwrap_or_default();
        let remove = Command::RemoveFinalizers { service, uid, resource_version, finalizers };
        assert_eq!(world.outcome(remove).await?, Outcome::Done);
        assert_eq!(world.service().await?.finalizers(), ["example.com/theirs"]);
        Ok(())
    })
}

/// What was decided about an older state of the Service may be wrong by now.
#[test]
fn finalizers_are_for_the_service_that_was_seen() -> Result<()> {
    run(async |mut world| {
        let (service, uid) = (world.service.clone(), world.uid.clone());
        let resource_version = world.service().await?.resource_version().unwrap_or_default();
        let label = Patch::Merge(json!({ "metadata": { "labels": { "a": "b" } } }));
        services(&world.admin).patch("web", &PatchParams::default(), &label).await?;
        let finalizers = vec!["example.com/theirs".to_owned()];
        let (add, remove) = (
            Command::AddFinalizers {
                service: service.clone(),
                uid: uid.clone(),
                resource_version: resource_version.clone(),
                finalizers: vec![FINALIZER.to_owned()],
            },
            Command::RemoveFinalizers { service, uid, resource_version, finalizers },
        );
        for command in [add, remove] {
            assert!(is_conflict(&world.outcome(command).await?));
        }
        assert_eq!(world.service().await?.finalizers(), ["example.com/theirs"]);
        Ok(())
    })
}

#[test]
fn external_ips_and_the_note_of_which_are_ours() -> Result<()> {
    run(async |mut world| {
        for (all, ours) in [(vec!["198.51.100.1", "192.0.2.1"], vec!["192.0.2.1"]), (vec![], vec![])] {
            let set = Command::SetExternalIps {
                service: world.service.clone(),
                resource_version: world.service().await?.resource_version().unwrap_or_default(),
                all: all.iter().map(ToString::to_string).collect(),
                ours: ours.iter().map(ToString::to_string).collect(),
            };
            assert_eq!(world.outcome(set.clone()).await?, Outcome::Done);
            let now = world.service().await?;
            assert_eq!(now.spec.as_ref().and_then(|spec| spec.external_ips.clone()).unwrap_or_default(), all);
            let noted = now.annotations().get(lb_control::model::ANNOTATION_EXTERNAL_IPS).map(String::as_str);
            assert_eq!(noted, ours.first().copied());
            // Built on a version that is gone.
            assert!(is_conflict(&world.outcome(set).await?));
        }
        Ok(())
    })
}

#[test]
fn a_pools_numbers() -> Result<()> {
    run(async |mut world| {
        let api: Api<crd::AddressPool> = Api::all(world.admin.clone());
        let spec = crd::AddressPoolSpec { addresses: vec!["192.0.2.0/24".into()], ..Default::default() };
        api.create(&PostParams::default(), &crd::AddressPool::new("edge", spec)).await?;
        let set = |pool: &str| Command::SetPoolStatus {
            pool: pool.into(),
            assigned: 3,
            available: u64::MAX,
            conditions: vec![condition("True", "Free")],
        };
        assert_eq!(world.outcome(set("edge")).await?, Outcome::Done);
        let status = api.get("edge").await?.status.context("a status")?;
        assert_eq!((status.assigned, status.available, status.conditions.len()), (3, i64::MAX, 1));
        assert_eq!(world.outcome(set("none")).await?, Outcome::Gone);
        // MetalLB's pools are only read.
        world.server.forget_requests();
        assert_eq!(world.outcome(set("metallb.io/metallb-system/edge")).await?, Outcome::Done);
        assert!(world.server.requests().is_empty());
        Ok(())
    })
}

#[test]
fn events_are_told_once() -> Result<()> {
    run(async |mut world| {
        let event = Command::Event {
            about: EventTarget::service(&world.service, &world.uid),
            warning: true,
            reason: "PoolExhausted".into(),
            // Longer than the API server takes, which counts bytes.
            note: "ä".repeat(1_024),
        };
        world.executor.submit(event.clone());
        world.executor.submit(event);
        let api: Api<Event> = Api::namespaced(world.admin.clone(), "default");
        let other = Command::Event {
            about: EventTarget::service(&world.service, &world.uid),
            warning: false,
            reason: "Last".into(),
            note: "marks the end".into(),
        };
        world.executor.submit(other);
        let told = timeout(PATIENCE, async {
            loop {
                let events = api.list(&ListParams::default()).await?.items;
                if events.iter().any(|event| event.reason.as_deref() == Some("Last")) {
                    return anyhow::Ok(events);
                }
                tokio::task::yield_now().await;
            }
        })
        .await??;
        let first: Vec<_> =
            told.iter().filter(|event| event.reason.as_deref() == Some("PoolExhausted")).collect();
        assert_eq!(first.len(), 1);
        assert_eq!(first[0].type_.as_deref(), Some("Warning"));
        assert!(first[0].note.as_ref().is_some_and(|note| note.len() <= 1_024), "{:?}", first[0].note);
        assert_eq!(first[0].regarding.as_ref().and_then(|about| about.uid.clone()), Some(world.uid.clone()));
        assert!(world.executor.outcomes.try_recv().is_err(), "nobody hears what became of an Event");
        Ok(())
    })
}

#[test]
fn who_does_not_lead_writes_nothing() -> Result<()> {
    run(async |mut world| {
        world.executor.leads(false);
        world.server.forget_requests();
        let apply = world.apply(&["192.0.2.1"], Vec::new());
        assert!(matches!(world.outcome(apply).await?, Outcome::Failed(_)));
        assert!(world.server.requests().is_empty());
        Ok(())
    })
}

/// What it has read first takes time, in which another may have come to lead.
#[test]
fn who_leads_no_longer_does_not_finish() -> Result<()> {
    run(async |mut world| {
        let slow = Effect::Delay { milliseconds: 1_000 };
        let fault = world.server.faults().add(Filter::of("get", "services"), slow, Some(1));
        world.server.forget_requests();
        let apply = world.apply(&["192.0.2.1"], vec![condition("True", "Assigned")]);
        world.executor.submit(apply.clone());
        timeout(PATIENCE, async {
            // It strikes when the request arrives, which is answered later.
            while world.server.faults().left(fault) > 0 {
                tokio::task::yield_now().await;
            }
        })
        .await?;
        world.executor.leads(false);
        let (done, outcome) = world.next().await?;
        assert_eq!(done, apply);
        assert!(matches!(outcome, Outcome::Failed(_)), "{outcome:?}");
        assert_eq!(ingress(&world.service().await?), Value::Null);
        assert!(!world.server.requests().iter().any(|it| it.verb == Verb::Patch));
        Ok(())
    })
}

/// But what an agent says of its own node, it says whoever leads.
#[test]
fn events_of_a_former_leader_are_not_sent() -> Result<()> {
    run(async |world| {
        let event = |reason: &str| Command::Event {
            about: EventTarget::service(&world.service, &world.uid),
            warning: true,
            reason: reason.into(),
            note: "why".into(),
        };
        world.executor.leads(false);
        world.executor.submit(event("PoolExhausted"));
        world.executor.submit(event("NodeCannotServe"));
        let told = first_events(&world.admin).await?;
        let reasons: Vec<_> = told.iter().filter_map(|event| event.reason.as_deref()).collect();
        assert_eq!(reasons, ["NodeCannotServe"], "in the order in which they came");
        Ok(())
    })
}

/// The Events that there are, once there is one.
async fn first_events(admin: &Client) -> Result<Vec<Event>> {
    let api: Api<Event> = Api::namespaced(admin.clone(), "default");
    timeout(PATIENCE, async {
        loop {
            let events = api.list(&ListParams::default()).await?.items;
            if !events.is_empty() {
                return Ok(events);
            }
            tokio::task::yield_now().await;
        }
    })
    .await?
}

#[test]
fn an_event_that_does_not_arrive_is_sent_again() -> Result<()> {
    run(async |world| {
        world.server.faults().error(Filter::of("create", "events"), 500, None, 1);
        world.executor.submit(Command::Event {
            about: EventTarget::service(&world.service, &world.uid),
            warning: true,
            reason: "PoolExhausted".into(),
            note: "no free address".into(),
        });
        assert_eq!(first_events(&world.admin).await?.len(), 1);
        Ok(())
    })
}

/// Only of what agents say of their own node: it is told as it is by then.
#[test]
fn agents_hear_of_events_that_are_not_told() -> Result<()> {
    run(async |mut world| {
        let about = EventTarget::service(&world.service, &world.uid);
        let event = |reason: &str, note: usize| Command::Event {
            about: about.clone(),
            warning: true,
            reason: reason.into(),
            note: format!("{note}"),
        };
        world.server.faults().error(Filter::of("create", "events"), 403, None, 2);
        world.executor.submit(event("PoolExhausted", 0));
        let (first, rest) = (event("NodeCannotServe", 1), event("NodeCannotServe", 100));
        world.executor.submit(first.clone());
        let (lost, outcome) = world.next().await?;
        assert_eq!(lost, first);
        assert!(matches!(outcome, Outcome::Failed(_)), "{outcome:?}");
        // More than are told of one object.
        (2..40).for_each(|note| world.executor.submit(event("NodeCannotServe", note)));
        world.executor.submit(rest.clone());
        let lost = timeout(PATIENCE, async {
            loop {
                match world.executor.outcomes.recv().await {
                    Some((lost, Outcome::Failed(_))) if lost == rest => return,
                    Some(_) => {}
                    None => std::future::pending().await,
                }
            }
        });
        lost.await?;
        Ok(())
    })
}

#[test]
fn failures_are_told_and_counted_and_the_rest_goes_on() -> Result<()> {
    run(async |mut world| {
        world.server.faults().error(Filter::of("patch", "services/status"), 500, None, 1);
        // In order, though the first one fails.
        let commands = [world.apply(&["192.0.2.1"], Vec::new()), world.apply(&["192.0.2.2"], Vec::new())];
        for command in &commands {
            world.executor.submit(command.clone());
        }
        let (first, outcome) = world.next().await?;
        assert_eq!(first, commands[0]);
        assert!(matches!(outcome, Outcome::Failed(_)), "{outcome:?}");
        assert_eq!(world.next().await?, (commands[1].clone(), Outcome::Done));
        assert_eq!(ingress(&world.service().await?)[0]["ip"], "192.0.2.2");
        let counted = world.counted.lock().unwrap_or_else(PoisonError::into_inner).clone();
        assert_eq!(counted, [("patch", "services/status", 500), ("patch", "services/status", 200)]);
        // Nobody there.
        world.server.faults().down();
        let apply = world.apply(&["192.0.2.3"], Vec::new());
        assert!(matches!(world.outcome(apply).await?, Outcome::Failed(_)));
        Ok(())
    })
}
