//! Starts what follows the cluster: the version first, then the kinds, and a look now and then for
//! those that may or may not be there.

use std::{collections::BTreeMap, time::Duration};

use kube::{Api, Client, Error};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};
use tracing::info;

use super::{
    Fatal, Timing, Update,
    backoff::Backoff,
    kinds::{
        Agents, BgpAdvertisements, Kind, L2Advertisements, LABEL_AGENT_SELECTOR, MetalLbPools, Namespaces,
        Nodes, Pools, Services, Slices, VirtualIps,
    },
    merge::{self, Merge},
    reflect::{Note, Reflector, Restores},
    version, words,
};
use crate::{crd::metallb, model::Problem};

/// Notes on their way, so that a burst of events does not wait for each of them.
const NOTES: usize = 1024;
/// Less than an agent's Lease lasts, more than the time between its renewals.
const SILENT_AGENTS: Duration = Duration::from_secs(8);
/// Updates on their way: few, because what waits is gathered in one.
const UPDATES: usize = 2;
/// Time that the server has for a small answer.
const ANSWER: Duration = Duration::from_secs(30);
/// Stands for the first look for MetalLB's kinds, and for troubles with that.
const DISCOVERY: &str = "discovery";

/// Watches a cluster until the receiver is dropped. Leases are read in `namespace`.
///
/// The first update with `synced` tells of everything. A [`Fatal`] is the last thing that comes.
#[must_use]
pub fn watch(client: Client, namespace: String, timing: Timing) -> mpsc::Receiver<Result<Update, Fatal>> {
    let (updates, receiver) = mpsc::channel(UPDATES);
    tokio::spawn(async move {
        let (notes, incoming) = mpsc::channel(NOTES);
        let merge = Merge::new([
            Services::NAMES.plural,
            Slices::NAMES.plural,
            Nodes::NAMES.plural,
            Namespaces::NAMES.plural,
            Agents::NAMES.plural,
            Pools::NAMES.plural,
            VirtualIps::NAMES.plural,
            DISCOVERY,
        ]);
        let restores = Restores::new(0);
        let starter = Starter { client, namespace, timing, notes, restores, tasks: JoinSet::new() };
        // When either ends, so does the other, and all tasks of the starter with it.
        tokio::select! {
            () = merge::run(merge, incoming, updates.clone()) => {}
            fatal = starter.run() => {
                let _ = updates.send(Err(fatal)).await;
            }
        }
    });
    receiver
}

struct Starter {
    client: Client,
    namespace: String,
    timing: Timing,
    notes: mpsc::Sender<Note>,
    restores: Restores,
    tasks: JoinSet<()>,
}

impl Starter {
    async fn run(mut self) -> Fatal {
        let streaming = match self.version().await {
            Ok(streaming) => streaming,
            Err(fatal) => return fatal,
        };
        let client = self.client.clone();
        self.start(self.reflector::<Services>(Api::all(client.clone()), streaming));
        self.start(self.reflector::<Slices>(Api::all(client.clone()), streaming));
        self.start(self.reflector::<Nodes>(Api::all(client.clone()), streaming));
        self.start(self.reflector::<Namespaces>(Api::all(client.clone()), streaming));
        self.start(self.reflector::<Pools>(Api::all(client.clone()), streaming));
        self.start(self.reflector::<VirtualIps>(Api::all(client.clone()), streaming));
        let leases = Api::namespaced(client, &self.namespace);
        // Agents renew every few seconds, this one among them: silence is no rest here, and whoever
        // leads would take all of them for dead.
        let timing = Timing { idle: self.timing.idle.min(SILENT_AGENTS), ..self.timing };
        let agents = Reflector::<Agents>::new(leases, streaming, timing, self.notes.clone(), &self.restores);
        self.start(agents.labelled(LABEL_AGENT_SELECTOR));
        self.discover(streaming).await
    }

    fn reflector<K: Kind>(&self, api: Api<K::Raw>, streaming: bool) -> Reflector<K> {
        Reflector::new(api, streaming, self.timing, self.notes.clone(), &self.restores)
    }

    fn start<K: Kind>(&mut self, reflector: Reflector<K>) {
        self.tasks.spawn(reflector.run(std::future::pending()));
    }

    /// Waits for the server and looks at its version.
    async fn version(&self) -> Result<bool, Fatal> {
        let mut backoff = Backoff::new(self.timing.shortest_wait, self.timing.longest_wait);
        loop {
            let problem = match timeout(ANSWER, self.client.apiserver_version()).await {
                Ok(Ok(info)) => {
                    info!(version = info.git_version, "the API server answers");
                    self.trouble(None).await;
                    return version::check(&info);
                }
                Ok(Err(error)) => words::trouble(&error, "ask for the version"),
                Err(_) => words::unreachable("no answer to /version"),
            };
            self.trouble(Some(problem)).await;
            tokio::time::sleep(backoff.wait()).await;
        }
    }

    async fn trouble(&self, problem: Option<Problem>) {
        let _ = self.notes.send(Note::Trouble(DISCOVERY, problem)).await;
    }

    /// Follows MetalLB's kinds while they are there.
    async fn discover(&mut self, streaming: bool) -> Fatal {
        let mut running: BTreeMap<&'static str, oneshot::Sender<()>> = BTreeMap::new();
        let mut backoff = Backoff::new(self.timing.shortest_wait, self.timing.longest_wait);
        loop {
            while self.tasks.try_join_next().is_some() {}
            match self.metallb_kinds().await {
                Ok(there) => {
                    backoff.reset();
                    self.trouble(None).await;
                    // Dropping the sender stops a task.
                    running.retain(|kind, _| there.iter().any(|other| other == kind));
                    self.start_optional::<MetalLbPools>(&there, &mut running, streaming).await;
                    self.start_optional::<L2Advertisements>(&there, &mut running, streaming).await;
                    self.start_optional::<BgpAdvertisements>(&there, &mut running, streaming).await;
                    let _ = self.notes.send(Note::Synced(DISCOVERY)).await;
                    tokio::time::sleep(self.timing.discovery).await;
                }
                Err(problem) => {
                    let wait = backoff.wait();
                    if backoff.failures() > 1 {
                        self.trouble(Some(problem)).await;
                    }
                    tokio::time::sleep(wait).await;
                }
            }
        }
    }

    async fn start_optional<K: Kind>(
        &mut self,
        there: &[String],
        running: &mut BTreeMap<&'static str, oneshot::Sender<()>>,
        streaming: bool,
    ) where
        K::Raw: kube::Resource<Scope = kube::core::NamespaceResourceScope>,
    {
        let kind = K::NAMES.plural;
        if running.contains_key(kind) || !there.iter().any(|other| other == kind) {
            return;
        }
        info!(kind = K::NAMES.kind, "found in the cluster");
        let (keep, stop) = oneshot::channel::<()>();
        running.insert(kind, keep);
        let _ = self.notes.send(Note::Started(kind)).await;
        let reflector = self.reflector::<K>(Api::all(self.client.clone()), streaming).optional();
        self.tasks.spawn(reflector.run(async {
            let _ = stop.await;
        }));
    }

    /// Resources of MetalLB's group that the server has.
    async fn metallb_kinds(&self) -> Result<Vec<String>, Problem> {
        let version = format!("{}/{}", metallb::GROUP, metallb::VERSION);
        match timeout(ANSWER, self.client.list_api_group_resources(&version)).await {
            Ok(Ok(list)) => Ok(list.resources.into_iter().map(|resource| resource.name).collect()),
            Ok(Err(Error::Api(status))) if status.code == 404 => Ok(Vec::new()),
            Ok(Err(error)) => Err(words::trouble(&error, "look for MetalLB's resources")),
            Err(_) => Err(words::unreachable("no answer to /apis")),
        }
    }
}
