//! Takes everything of ours out of a cluster, so that it can do without us: what an uninstallation
//! begins with.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context, Result, bail};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::{
    api::{
        coordination::v1::{Lease, LeaseSpec},
        core::v1::{Node, Service},
    },
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{
    Api, Client, Error, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::lease::record;
use crate::{
    crd,
    model::{ANNOTATION_EXTERNAL_IPS, ANNOTATION_UNINSTALL, FIELD_MANAGER},
    plan::{
        controller::{FINALIZER, FINALIZER_KUBERNETES},
        departure::Departures,
        election::Timing,
    },
};

/// Objects that are changed at a time.
const CONCURRENCY: usize = 8;
/// Objects of one answer to a list.
const PAGE: u32 = 500;
/// How often a Service is tried that changes meanwhile.
const ATTEMPTS: u32 = 5;
/// How often everything is looked through: an agent that led until a moment ago may have had a write
/// on its way.
const ROUNDS: u32 = 3;
/// Holds the Lease of the leader from now on.
const HOLDER: &str = "pointsman-cleanup";
/// For how long no agent leads after the end, if some have not been heard: until then the agents have
/// to be gone.
const SILENCE: i32 = 60;
/// For how long no agent leads after the end, if all have been heard: as after a leader that died. One
/// that the DaemonSet starts again before it is deleted would otherwise lead at once, and write anew.
const REST: i32 = 15;
/// How often the Lease is renewed while objects are changed.
const RENEW: Duration = Duration::from_secs(10);
/// How often Leases are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What is ours beside what is marked as such.
#[derive(Clone, Debug)]
pub struct Cleanup {
    /// The namespace of our Leases.
    pub namespace: String,
    /// The Lease of the one who writes.
    pub leader_lease: String,
    /// Selects the Leases of agents.
    pub agent_selector: String,
    /// Begins their names; the node's name follows.
    pub agent_prefix: String,
    /// How long an agent that leads may take to notice that it does not any more.
    pub patience: Duration,
    /// For how long agents are waited for that are alive, but do not go.
    pub farewell: Duration,
}

impl Cleanup {
    /// With the usual patience.
    #[must_use]
    pub fn new(
        namespace: impl Into<String>,
        leader_lease: &str,
        (agent_selector, agent_prefix): (&str, &str),
    ) -> Self {
        Self {
            agent_prefix: agent_prefix.to_owned(),
            namespace: namespace.into(),
            leader_lease: leader_lease.to_owned(),
            agent_selector: agent_selector.to_owned(),
            patience: Timing::default().give_up,
            farewell: Duration::from_secs(45),
        }
    }

    /// Does it; says what was changed or deleted. It may be done again at any time, and while agents
    /// run: they are asked to let go of everything, and waited for. An agent that does not answer is
    /// named in the outcome; it is asked for as long as it may take it to come back.
    ///
    /// # Errors
    /// When the API server does not let us, or something of ours is still there at the end.
    pub async fn run(&self, client: &Client) -> Result<Removed> {
        let leases = Api::namespaced(client.clone(), &self.namespace);
        let of_leader = || format!("cannot take the Lease {}/{}", self.namespace, self.leader_lease);
        let led = self.ask(&leases, SILENCE).await.with_context(of_leader)?;
        let rest = "the cleanup is not finished, and the agents that heard of it rest: do it again, or have them serve \
                    again (kubectl rollout restart daemonset)";
        self.take_out(client, &leases, led).await.context(rest)
    }

    async fn take_out(&self, client: &Client, leases: &Api<Lease>, led: Option<String>) -> Result<Removed> {
        let departures = self.farewell(leases, led).await.context("cannot wait for the agents")?;
        let mut removed = tokio::select! {
            removed = self.rounds(client) => removed?,
            error = self.keep(leases) => return Err(error),
        };
        removed.unheard = self.unheard(client, &departures).await;
        let mut agents =
            self.patiently(|| self.agents(leases)).await.context("cannot delete the Leases of the agents")?;
        agents.extend(departures.left().iter().cloned());
        removed.leases = agents.len();
        // The last word: who hears it is meant, and who comes later waits until it is over.
        let silence = if removed.unheard.is_empty() { REST } else { SILENCE };
        self.still_ask(leases, silence).await?;
        Ok(removed)
    }

    /// Takes out what is ours until nothing is, as often as an agent may have had a write on its way.
    async fn rounds(&self, client: &Client) -> Result<Removed> {
        let mut removed = Removed::default();
        for round in 1.. {
            let services = self.patiently(|| services(client)).await?;
            let addresses = self.patiently(|| virtual_ips(client)).await?;
            removed.services += services;
            removed.virtual_ips += addresses;
            if services + addresses == 0 {
                break;
            }
            if round == ROUNDS {
                bail!(
                    "something still writes: {services} Services and {addresses} VirtualIPs were ours again; stop \
                     the agents (kubectl delete daemonset) and do this again"
                );
            }
        }
        Ok(removed)
    }

    /// Renews the Lease; ends only when it is not ours any more.
    async fn keep(&self, leases: &Api<Lease>) -> anyhow::Error {
        loop {
            sleep(RENEW).await;
            if let Err(error) = self.still_ask(leases, SILENCE).await {
                return error;
            }
        }
    }

    /// Renews the Lease, if it is still ours.
    async fn still_ask(&self, leases: &Api<Lease>, silence: i32) -> Result<()> {
        let before = self.patiently(|| self.ask(leases, silence)).await;
        let name = || format!("the Lease {}/{}", self.namespace, self.leader_lease);
        match before.with_context(|| format!("cannot renew {}", name()))? {
            None => Ok(()),
            Some(holder) => {
                bail!("{holder} took {} meanwhile: stop the agents (kubectl delete daemonset)", name())
            }
        }
    }

    /// Does something again as long as only the API server is to blame, which may be a moment away.
    async fn patiently<T, E, F>(&self, mut attempt: impl FnMut() -> F) -> Result<T>
    where
        F: Future<Output = Result<T, E>>,
        anyhow::Error: From<E>,
    {
        let started = Instant::now();
        loop {
            let error = match attempt().await.map_err(anyhow::Error::from) {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            if !passes(&error) || started.elapsed() >= self.farewell {
                return Err(error);
            }
            warn!("it is tried again: {error:#}");
            sleep(LOOK.min(self.patience)).await;
        }
    }

    /// Nodes whose agents have not said that they have let go, but for those that are long gone.
    async fn unheard(&self, client: &Client, departures: &Departures) -> BTreeSet<String> {
        let unheard = departures.unheard();
        if unheard.is_empty() {
            return unheard;
        }
        let nodes: Api<Node> = Api::all(client.clone());
        match nodes.list_metadata(&ListParams::default()).await {
            Ok(nodes) => {
                let there: BTreeSet<_> = nodes.into_iter().map(|node| node.name_any()).collect();
                let is_gone = |node: &String| !there.contains(node) && departures.has_run_out(node);
                unheard.into_iter().filter(|node| !is_gone(node)).collect()
            }
            Err(error) => {
                warn!("cannot tell which of these nodes there still are: {error}");
                unheard
            }
        }
    }

    /// Takes the Lease away from whoever leads, and asks all agents to end; who led before us.
    async fn ask(&self, leases: &Api<Lease>, silence: i32) -> Result<Option<String>, Error> {
        for attempt in 1.. {
            let found = leases.get_opt(&self.leader_lease).await?;
            let before = found.as_ref().and_then(|lease| lease.spec.as_ref()?.holder_identity.clone());
            let lease = self.lease(found.as_ref(), silence);
            let written = match found {
                Some(_) => leases.replace(&self.leader_lease, &PostParams::default(), &lease).await,
                None => leases.create(&PostParams::default(), &lease).await,
            };
            match written {
                Ok(_) => return Ok(before.filter(|holder| !holder.is_empty() && holder != HOLDER)),
                // It was just renewed.
                Err(Error::Api(status)) if status.code == 409 && attempt < ATTEMPTS => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Waits until the agents have let go of everything, and who led has noticed that it does not
    /// any more.
    async fn farewell(&self, leases: &Api<Lease>, led: Option<String>) -> Result<Departures> {
        let started = Instant::now();
        let mut departures = Departures::default();
        let agents = ListParams::default().labels(&self.agent_selector);
        loop {
            let all = self.patiently(|| leases.list(&agents)).await?;
            let all = all.iter().map(|lease| (self.node(lease), record(lease))).collect();
            let now = started.elapsed();
            departures.observe(all, now);
            let leads =
                led.as_ref().is_some_and(|led| !departures.left().contains(led) && now < self.patience);
            let stay = now < self.farewell && departures.is_to_be_awaited(now);
            if !leads && !stay {
                return Ok(departures);
            }
            info!(agents = ?departures.unheard(), "waiting until these agents have let go of everything");
            sleep(LOOK.min(self.patience)).await;
            // A change: agents that have been started meanwhile know by it that they are meant, too.
            self.patiently(|| self.ask(leases, SILENCE)).await?;
        }
    }

    /// The node that an agent's Lease is named after.
    fn node(&self, lease: &Lease) -> String {
        let name = lease.name_any();
        name.strip_prefix(&self.agent_prefix).unwrap_or(&name).to_owned()
    }

    fn lease(&self, found: Option<&Lease>, silence: i32) -> Lease {
        let now = MicroTime(Timestamp::now());
        let mut metadata = match found {
            Some(lease) => lease.metadata.clone(),
            None => ObjectMeta { name: Some(self.leader_lease.clone()), ..ObjectMeta::default() },
        };
        metadata
            .annotations
            .get_or_insert_default()
            .insert(ANNOTATION_UNINSTALL.to_owned(), "true".to_owned());
        let spec = LeaseSpec {
            holder_identity: Some(HOLDER.to_owned()),
            lease_duration_seconds: Some(silence),
            acquire_time: Some(now.clone()),
            renew_time: Some(now),
            ..LeaseSpec::default()
        };
        Lease { metadata, spec: Some(spec) }
    }

    /// Deletes the Leases that agents have left; of which nodes.
    async fn agents(&self, leases: &Api<Lease>) -> Result<BTreeSet<String>, Error> {
        let all = leases.list(&ListParams::default().labels(&self.agent_selector)).await?;
        let mut nodes = BTreeSet::new();
        for lease in all {
            if delete(leases, &lease.name_any()).await? {
                nodes.insert(self.node(&lease));
            }
        }
        Ok(nodes)
    }
}

/// Whether it may be over in a moment: no answer, or the API server says that it is not its best time.
fn passes(error: &anyhow::Error) -> bool {
    match error.chain().find_map(|cause| cause.downcast_ref::<Error>()) {
        Some(Error::Api(status)) => matches!(status.code, 409 | 429 | 500..),
        Some(Error::HyperError(_) | Error::Service(_) | Error::ReadEvents(_)) => true,
        _ => false,
    }
}

/// How much was ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Services that had something of ours.
    pub services: usize,
    /// VirtualIPs.
    pub virtual_ips: usize,
    /// Leases of agents, with those that agents deleted themselves.
    pub leases: usize,
    /// Nodes whose agents have not said that they have let go of everything.
    pub unheard: BTreeSet<String>,
}

/// Frees all Services; how many there were to be freed.
async fn services(client: &Client) -> Result<usize> {
    let all: Api<Service> = Api::all(client.clone());
    let mut params = ListParams::default().limit(PAGE);
    let mut count = 0;
    loop {
        let page = all.list(&params).await.context("cannot list Services")?;
        params.continue_token = page.metadata.continue_.clone().filter(|token| !token.is_empty());
        let ours: Vec<Service> = page.into_iter().filter(|service| Ours::of(service).is_any()).collect();
        count += ours.len();
        stream::iter(ours.into_iter().map(Ok::<_, anyhow::Error>))
            .try_for_each_concurrent(CONCURRENCY, |service| async move { free(client, service).await })
            .await?;
        if params.continue_token.is_none() {
            return Ok(count);
        }
    }
}

/// Takes out of a Service what is ours.
async fn free(client: &Client, mut service: Service) -> Result<()> {
    let (namespace, name) = (service.namespace().unwrap_or_default(), service.name_any());
    let api: Api<Service> = Api::namespaced(client.clone(), &namespace);
    for attempt in 1.. {
        let outcome = match try_free(&api, &service).await {
            // It changed meanwhile.
            Err(Error::Api(status)) if status.code == 409 && attempt < ATTEMPTS => api.get_opt(&name).await,
            Err(Error::Api(status)) if status.code == 404 => return Ok(()),
            other => return other.with_context(|| format!("cannot free Service {namespace}/{name}")),
        };
        match outcome.with_context(|| format!("cannot read Service {namespace}/{name}"))? {
            Some(found) => service = found,
            None => return Ok(()),
        }
    }
    Ok(())
}

async fn try_free(api: &Api<Service>, service: &Service) -> Result<(), Error> {
    let name = service.name_any();
    let ours = Ours::of(service);
    let mut version = service.resource_version();
    if ours.status {
        // What is left out of what we apply, and was ours, goes (server-side apply).
        let nothing = json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": name } });
        let parameters = PatchParams::apply(FIELD_MANAGER);
        version = api.patch_status(&name, &parameters, &Patch::Apply(nothing)).await?.resource_version();
    }
    let Some(mut patch) = ours.patch() else { return Ok(()) };
    patch["metadata"]["resourceVersion"] = json!(version);
    api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)
}

/// What a Service has of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Ours {
    /// Fields of its status.
    status: bool,
    /// The finalizers that remain, if some go.
    finalizers: Option<Vec<String>>,
    /// The `externalIPs` that remain, if our mark is there.
    external_ips: Option<Vec<String>>,
}

impl Ours {
    fn of(service: &Service) -> Self {
        let metadata = &service.metadata;
        let entries = metadata.managed_fields.as_deref().unwrap_or_default();
        let status = entries.iter().any(|entry| {
            let fields = entry.fields_v1.as_ref().and_then(|fields| fields.0.get("f:status")?.as_object());
            entry.manager.as_deref() == Some(FIELD_MANAGER)
                && entry.operation.as_deref() == Some("Apply")
                && fields.is_some_and(|fields| !fields.is_empty())
        });
        let spec = service.spec.as_ref();
        let finalizers = metadata.finalizers.as_deref().unwrap_or_default();
        let marked = finalizers.iter().any(|one| one == FINALIZER);
        // The common one may be another's, also a cloud's: ours only beside our own, and without a class.
        let no_class = spec.is_none_or(|spec| spec.load_balancer_class.is_none());
        let goes = |one: &String| one == FINALIZER || (no_class && one == FINALIZER_KUBERNETES);
        let mark = metadata.annotations.as_ref().and_then(|all| all.get(ANNOTATION_EXTERNAL_IPS));
        let external_ips = mark.map(|mark| {
            let ours: BTreeSet<&str> = mark.split(',').map(str::trim).collect();
            let all = spec.and_then(|spec| spec.external_ips.as_deref()).unwrap_or_default();
            all.iter().filter(|ip| !ours.contains(ip.as_str())).cloned().collect()
        });
        Self {
            status,
            finalizers: marked.then(|| finalizers.iter().filter(|one| !goes(one)).cloned().collect()),
            external_ips,
        }
    }

    fn is_any(&self) -> bool {
        self.status || self.finalizers.is_some() || self.external_ips.is_some()
    }

    /// A merge patch that takes it out, apart from the status.
    fn patch(&self) -> Option<Value> {
        let or_null = |list: &[String]| if list.is_empty() { Value::Null } else { json!(list) };
        let mut patch = json!({ "metadata": {} });
        if let Some(finalizers) = &self.finalizers {
            patch["metadata"]["finalizers"] = or_null(finalizers);
        }
        if let Some(external_ips) = &self.external_ips {
            patch["metadata"]["annotations"] = json!({ ANNOTATION_EXTERNAL_IPS: null });
            patch["spec"] = json!({ "externalIPs": or_null(external_ips) });
        }
        (self.finalizers.is_some() || self.external_ips.is_some()).then_some(patch)
    }
}

/// Deletes all VirtualIPs; how many.
async fn virtual_ips(client: &Client) -> Result<usize> {
    let api: Api<crd::VirtualIp> = Api::all(client.clone());
    let names = match api.list_metadata(&ListParams::default()).await {
        Ok(list) => list.into_iter().map(|object| object.name_any()).collect::<Vec<_>>(),
        // Without the definition there are none.
        Err(Error::Api(status)) if status.code == 404 => return Ok(0),
        Err(error) => return Err(error).context("cannot list VirtualIPs"),
    };
    let deleted: Vec<bool> = stream::iter(names)
        .map(|name| {
            let api = api.clone();
            async move { delete(&api, &name).await.with_context(|| format!("cannot delete VirtualIP {name}")) }
        })
        .buffer_unordered(CONCURRENCY)
        .try_collect()
        .await?;
    Ok(deleted.into_iter().filter(|there| *there).count())
}

/// Deletes an object; whether it was there.
async fn delete<K>(api: &Api<K>, name: &str) -> Result<bool, Error>
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    match api.delete(name, &DeleteParams::default()).await {
        Ok(_) => Ok(true),
        Err(Error::Api(status)) if status.code == 404 => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(value: Value) -> Service {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn what_is_anothers_is_not_ours() {
        for value in [
            json!({ "metadata": {} }),
            json!({ "metadata": { "finalizers": [FINALIZER_KUBERNETES, "x.example/y"] } }),
            json!({ "metadata": { "managedFields": [
                { "manager": "other", "operation": "Apply", "fieldsV1": { "f:status": { "f:x": {} } } },
                { "manager": FIELD_MANAGER, "operation": "Apply", "fieldsV1": { "f:status": {} } },
                { "manager": FIELD_MANAGER, "operation": "Update", "fieldsV1": { "f:metadata": {} } },
            ] }, "spec": { "externalIPs": ["192.0.2.1"] } }),
        ] {
            let ours = Ours::of(&service(value.clone()));
            assert!(!ours.is_any() && ours.patch().is_none(), "{value}");
        }
    }

    #[test]
    fn the_common_finalizer_goes_where_we_set_it() {
        let with = |class: Option<&str>| {
            Ours::of(&service(json!({
                "metadata": { "finalizers": [FINALIZER_KUBERNETES, FINALIZER, "x.example/y"] },
                "spec": { "loadBalancerClass": class },
            })))
            .finalizers
            .unwrap()
        };
        assert_eq!(with(None), ["x.example/y"]);
        assert_eq!(with(Some("pointsman.dev/pointsman")), [FINALIZER_KUBERNETES, "x.example/y"]);
    }

    #[test]
    fn only_the_addresses_that_we_wrote_go() {
        let ours = Ours::of(&service(json!({
            "metadata": { "annotations": { ANNOTATION_EXTERNAL_IPS: "192.0.2.1,192.0.2.2" } },
            "spec": { "externalIPs": ["192.0.2.2", "198.51.100.1", "192.0.2.1"] },
        })));
        let patch = ours.patch().unwrap();
        assert_eq!(patch["spec"]["externalIPs"], json!(["198.51.100.1"]));
        assert_eq!(patch["metadata"]["annotations"], json!({ ANNOTATION_EXTERNAL_IPS: null }));
        assert_eq!(patch["metadata"].get("finalizers"), None);
    }
}
