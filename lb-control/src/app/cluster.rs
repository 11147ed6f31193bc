//! The agent as part of a cluster: what it hears from the API server, and what it writes there.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};
use tracing::{error, info, warn};

use super::{Settings, live::Told, refusals::Refusals, shared::Shared, writer::Writer};
use crate::{
    model::ObjectChange,
    plan::{controller::ControllerOptions, election::Timing},
    publish::{Claim, Count, Executor, Hold, hold},
    source::{
        Update, Waiting,
        kube::{self, Access, Connection, kinds},
    },
    telemetry::metrics::Outcome,
};

/// The Lease of whoever writes for all.
pub const LEADER_LEASE: &str = "pointsman-controller";

/// How the cluster is reached, and what is decided for all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterSettings {
    /// A kubeconfig; without one, the ServiceAccount of the pod.
    pub kubeconfig: Option<PathBuf>,
    /// The namespace of our own Leases.
    pub namespace: Option<String>,
    /// Whether addresses are written to `spec.externalIPs` too.
    pub publish_external_ips: bool,
    /// A watch that says nothing for so long is begun anew.
    pub watch_idle: Duration,
}

/// How long leaving may take.
const LEAVE: Duration = Duration::from_secs(20);
/// How much of that for what this node served. Its Lease is given back afterwards in any case:
/// the data plane has withdrawn by then.
const LET_GO: Duration = Duration::from_secs(3);

/// How long the next agent of this node may take to come, when this one leaves everything to it.
const HANDOVER: Duration = Duration::from_secs(90);

/// The tasks that speak with the API server.
pub struct Cluster {
    leave: Option<oneshot::Sender<Leave>>,
    uninstallation: watch::Receiver<bool>,
    task: JoinHandle<()>,
}

/// How to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// Others take over what this node serves.
    GiveUp,
    /// The next agent of this node goes on.
    Stay,
    /// There will be no agent here.
    Uninstall,
}

impl Cluster {
    /// Begins to watch; the updates are for the agent. Nothing is written before the first of them
    /// that is complete.
    ///
    /// # Errors
    /// When there is no way to the API server at all. One that does not answer is no error.
    pub async fn start(
        settings: &ClusterSettings,
        agent: &Settings,
        served: mpsc::UnboundedReceiver<Told>,
        shared: Arc<Shared>,
    ) -> Result<(Self, mpsc::Receiver<Update>)> {
        let node = agent.node.as_str();
        let access =
            Access { kubeconfig: settings.kubeconfig.clone(), namespace: settings.namespace.clone() };
        let connection = kube::connect(&access).await?;
        info!(server = connection.server, namespace = connection.namespace, node, "Kubernetes");
        let timing = kube::Timing { idle: settings.watch_idle, ..kube::Timing::default() };
        let source = kube::watch(connection.client.clone(), connection.namespace.clone(), timing);
        let options = ControllerOptions {
            default_class: agent.default_class,
            publish_external_ips: settings.publish_external_ips,
            node_lease_grace: Duration::ZERO,
        };
        let (updates, receiver) = mpsc::channel(1);
        let (leave, leaving) = oneshot::channel();
        let tasks = Tasks {
            own: own_lease(&connection, node, &agent.link_device),
            leader: leader_lease(&connection, node),
            executor: Executor::new(connection.client, node, count(&shared)),
            writer: Writer::new(node, options),
            started: Instant::now(),
            updates,
            shared,
        };
        let uninstallation = tasks.leader.ends.clone();
        let task = tokio::spawn(tasks.run(source, served, leaving));
        Ok((Self { leave: Some(leave), uninstallation, task }, receiver))
    }

    /// Waits until somebody uninstalls the agents of the cluster.
    pub async fn uninstallation(&mut self) {
        if self.uninstallation.wait_for(|asked| *asked).await.is_err() {
            std::future::pending().await
        }
    }

    /// Leaves the cluster.
    pub async fn leave(mut self, how: Leave) {
        if let Some(leave) = self.leave.take() {
            let _ = leave.send(how);
        }
        if timeout(LEAVE, &mut self.task).await.is_err() {
            warn!("leaving: the API server does not answer; others take over when our Leases run out");
            self.task.abort();
        }
    }
}

fn count(shared: &Arc<Shared>) -> Count {
    let shared = Arc::clone(shared);
    Arc::new(move |verb, resource, status| {
        shared.recorder.api_write(verb, resource, Outcome::of_status(status));
    })
}

fn own_lease(connection: &Connection, node: &str, link_device: &str) -> Hold {
    let claim = Claim {
        namespace: connection.namespace.clone(),
        name: format!("{}{node}", kinds::AGENT_LEASE_PREFIX),
        identity: node.to_owned(),
        labels: [(kinds::LABEL_AGENT.to_owned(), "true".to_owned())].into(),
        annotations: [
            (kinds::ANNOTATION_LINK_DEVICE.to_owned(), Some(link_device.to_owned())),
            // An earlier agent's are over.
            (kinds::ANNOTATION_UNFIT.to_owned(), None),
            (kinds::ANNOTATION_DATAPATH.to_owned(), None),
            (kinds::ANNOTATION_DATAPATH_REASON.to_owned(), None),
        ]
        .into(),
        node: Some(node.to_owned()),
        timing: Timing::default(),
    };
    hold(connection.client.clone(), claim)
}

fn leader_lease(connection: &Connection, node: &str) -> Hold {
    let claim = Claim {
        namespace: connection.namespace.clone(),
        name: LEADER_LEASE.to_owned(),
        identity: node.to_owned(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        node: None,
        timing: Timing::default(),
    };
    hold(connection.client.clone(), claim)
}

struct Tasks {
    own: Hold,
    leader: Hold,
    executor: Executor,
    writer: Writer,
    started: Instant,
    updates: mpsc::Sender<Update>,
    shared: Arc<Shared>,
}

impl Tasks {
    async fn run(
        mut self,
        mut source: mpsc::Receiver<Result<Update, kube::Fatal>>,
        mut served: mpsc::UnboundedReceiver<Told>,
        mut leaving: oneshot::Receiver<Leave>,
    ) {
        let mut leader = self.leader.holds.clone();
        // An update on its way to the agent: it may be busy, and writing must not wait for it.
        let mut waiting = Waiting::default();
        let mut synced = false;
        let mut refusals = Refusals::default();
        let how = loop {
            let now = self.started.elapsed();
            for command in self.writer.commands(now) {
                self.executor.submit(command);
            }
            let due = self.writer.next_due();
            tokio::select! {
                how = &mut leaving => break how.unwrap_or(Leave::Stay),
                permit = self.updates.reserve(), if !waiting.is_empty() => {
                    // The agent takes no more when it leaves; how it does so is told next.
                    let update = waiting.take();
                    if let (Ok(permit), Some(update)) = (permit, update) {
                        permit.send(update);
                    }
                }
                update = source.recv() => match update {
                    Some(Ok(mut update)) => {
                        update.problems = update.problems.map(|problems| refusals.source(problems));
                        if update.synced {
                            self.writer.changed(update.changes.clone(), self.started.elapsed());
                        }
                        // Neither signs of life of other agents nor objects that cannot be read are
                        // anything to the data plane.
                        let is_writers = |change: &ObjectChange| {
                            matches!(change, ObjectChange::Agent(..) | ObjectChange::Unreadable(..))
                        };
                        update.changes.retain(|change| !is_writers(change));
                        let is_first = update.synced && !synced;
                        synced |= update.synced;
                        if is_first || !update.changes.is_empty() || update.problems.is_some() {
                            waiting.push(update);
                        }
                    }
                    Some(Err(fatal)) => {
                        error!("{fatal}");
                        return;
                    }
                    None => return,
                },
                Some(told) = served.recv() => {
                    annotate(&self.own, &told);
                    self.writer.told(told);
                }
                Some((command, outcome)) = self.executor.outcomes.recv() => {
                    self.writer.done(&command, &outcome, self.started.elapsed());
                    if let Some(problems) = refusals.wrote(&command, &outcome) {
                        waiting.push(Update { problems: Some(problems), ..Update::default() });
                    }
                }
                Ok(()) = leader.changed() => {
                    let leads = *leader.borrow_and_update();
                    self.executor.leads(leads);
                    self.writer.leads(leads);
                    self.shared.recorder.leads(leads);
                }
                () = until(due.map(|due| self.started + due)) => {}
            }
        };
        self.end(how, source, served).await;
    }

    /// Tells the others.
    async fn end(
        mut self,
        how: Leave,
        source: mpsc::Receiver<Result<Update, kube::Fatal>>,
        mut served: mpsc::UnboundedReceiver<Told>,
    ) {
        self.executor.leads(false);
        self.writer.leads(false);
        self.leader.release().await;
        if how == Leave::Stay {
            // The kernel goes on forwarding: an update of the agent must not move addresses.
            return self.own.leave(HANDOVER).await;
        }
        // The data plane has withdrawn: what it said last is here already.
        while let Ok(one) = served.try_recv() {
            self.writer.told(one);
        }
        let Self { own, mut executor, mut writer, started, .. } = self;
        let let_go = let_go(&mut writer, &mut executor, source, started);
        if timeout(LET_GO, let_go).await.is_err() {
            warn!("leaving: what this node served could not be taken back at the API server");
        }
        match how {
            Leave::Uninstall => own.delete().await,
            Leave::GiveUp | Leave::Stay => own.release().await,
        }
    }
}

/// What is told of the node itself, in its Lease: a Node's conditions would need the right to write the
/// status of Nodes, which agents do not have.
fn annotate(lease: &Hold, told: &Told) {
    match told {
        Told::Unfit(why) => lease.annotate(kinds::ANNOTATION_UNFIT, why.clone()),
        Told::Forwards(forwarding) => {
            lease.annotate(kinds::ANNOTATION_DATAPATH, forwarding.ways.clone());
            lease.annotate(kinds::ANNOTATION_DATAPATH_REASON, forwarding.reason.clone());
        }
        Told::Begun
        | Told::Serves(_)
        | Told::Lacks(..)
        | Told::Health(..)
        | Told::Avoids(..)
        | Told::NearlyFull(_) => {}
    }
}

/// Writes that nothing is served here any more, until the API server shows it.
async fn let_go(
    writer: &mut Writer,
    executor: &mut Executor,
    mut source: mpsc::Receiver<Result<Update, kube::Fatal>>,
    started: Instant,
) {
    while !writer.has_let_go() {
        for command in writer.commands(started.elapsed()) {
            executor.submit(command);
        }
        let due = writer.next_due();
        tokio::select! {
            Some(Ok(update)) = source.recv() => writer.changed(update.changes, started.elapsed()),
            Some((command, outcome)) = executor.outcomes.recv() => {
                writer.done(&command, &outcome, started.elapsed());
            }
            () = until(due.map(|due| started + due)) => {}
            else => break,
        }
    }
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// The name of this node, if nobody says another: what Kubernetes takes as well.
///
/// # Errors
/// When the kernel does not say.
pub fn host_name() -> Result<String> {
    let name = nix::unistd::gethostname().context("the name of this host")?;
    Ok(name.to_string_lossy().to_lowercase())
}
