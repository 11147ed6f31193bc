//! Holds a Lease, or tries to.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::{
    api::{
        coordination::v1::{Lease, LeaseSpec},
        core::v1::Node,
    },
    apimachinery::pkg::apis::meta::v1::{MicroTime, OwnerReference},
    jiff::Timestamp,
};
use kube::{
    Api, Client, Error,
    api::{DeleteParams, ListParams, ObjectMeta, PostParams, Preconditions},
};
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::{debug, info, warn};

use crate::{
    model::{ANNOTATION_UNINSTALL, causes},
    plan::election::{Candidate, Record, Step, Timing},
};

/// How long one request may take.
const ANSWER: Duration = Duration::from_secs(5);

/// Annotations of a Lease by name; `None` stands for none of that name.
pub type Annotations = BTreeMap<String, Option<String>>;

/// How often it is tried to leave a Lease.
const FAREWELLS: u32 = 6;

/// How soon after it was written a Lease is written again because an annotation changed.
const PAUSE: Duration = Duration::from_secs(1);

/// A Lease that is wanted.
#[derive(Clone, Debug)]
pub struct Claim {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Who we are.
    pub identity: String,
    /// Labels that it gets.
    pub labels: BTreeMap<String, String>,
    /// Annotations that it gets; `None`: it is not to have one of this name.
    pub annotations: Annotations,
    /// The node whose it is: when that is deleted, it goes too.
    pub node: Option<String>,
    /// How long it lasts.
    pub timing: Timing,
}

/// Wants a Lease until it is dropped or released.
pub struct Hold {
    /// Whether the Lease is ours.
    pub holds: watch::Receiver<bool>,
    annotations: watch::Sender<Annotations>,
    /// Whether its holder has asked all who want it to end; from then on it is not wanted any more.
    pub ends: watch::Receiver<bool>,
    end: Option<oneshot::Sender<End>>,
    task: JoinHandle<()>,
}

/// How a Lease is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Nobody has to wait for it to run out.
    GiveBack,
    /// It lasts for so long, and somebody goes on.
    Leave(Duration),
    /// Nobody goes on.
    Delete,
}

impl Hold {
    /// Gives the Lease an annotation, or takes it away, within a second if the API server answers.
    pub fn annotate(&self, name: &str, value: Option<String>) {
        self.annotations.send_if_modified(|all| {
            let before = all.insert(name.to_owned(), value.clone());
            before != Some(value)
        });
    }

    /// Gives the Lease back, so that nobody has to wait for it to run out.
    pub async fn release(self) {
        self.end(End::GiveBack).await;
    }

    /// Leaves it to one who comes back within some time.
    pub async fn leave(self, duration: Duration) {
        self.end(End::Leave(duration)).await;
    }

    /// Deletes the Lease, if it is ours.
    pub async fn delete(self) {
        self.end(End::Delete).await;
    }

    async fn end(mut self, how: End) {
        if let Some(end) = self.end.take() {
            let _ = end.send(how);
        }
        let _ = timeout(ANSWER, &mut self.task).await;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Tries to get a Lease, and keeps it.
#[must_use]
pub fn hold(client: Client, claim: Claim) -> Hold {
    let (sender, holds) = watch::channel(false);
    let (annotations, annotated) = watch::channel(claim.annotations.clone());
    let (ending, ends) = watch::channel(false);
    let (end, ended) = oneshot::channel();
    let task = tokio::spawn(async move {
        let mut holder = Holder {
            api: Api::namespaced(client.clone(), &claim.namespace),
            nodes: Api::all(client),
            owner: None,
            candidate: Candidate::new(claim.identity.clone(), claim.timing),
            started: Instant::now(),
            trouble: String::new(),
            sender,
            annotations: annotated,
            ending,
            claim,
        };
        tokio::select! {
            () = holder.run() => {}
            Ok(how) = ended => holder.end(how).await,
        }
    });
    Hold { holds, annotations, ends, end: Some(end), task }
}

struct Holder {
    api: Api<Lease>,
    nodes: Api<Node>,
    /// The node as its owner; `None` if there is none, as far as it was asked for.
    owner: Option<OwnerReference>,
    claim: Claim,
    candidate: Candidate,
    started: Instant,
    /// What went wrong last, so that the log hears it once.
    trouble: String,
    sender: watch::Sender<bool>,
    annotations: watch::Receiver<Annotations>,
    ending: watch::Sender<bool>,
}

impl Holder {
    async fn run(&mut self) {
        loop {
            // Whether or not the API server answers: the time is over when it is over.
            match self.until_over() {
                Some(over) => {
                    let late = tokio::select! {
                        () = self.turn() => false,
                        () = sleep_until(over) => true,
                    };
                    if late {
                        self.tell();
                        continue;
                    }
                }
                None => self.turn().await,
            }
            self.tell();
            if self.candidate.ends() {
                info!(lease = self.claim.name, "its holder asks all who want it to end");
                self.ending.send_replace(true);
                return;
            }
            let next = Instant::now() + self.candidate.pause(self.now());
            let next = self.until_over().map_or(next, |over| over.min(next));
            let pause = sleep(PAUSE);
            let mut annotations = self.annotations.clone();
            tokio::select! {
                () = sleep_until(next) => {}
                // Changes come in bursts: the last one counts.
                () = async { pause.await; changed(&mut annotations).await } => {}
            }
            self.tell();
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn until_over(&self) -> Option<Instant> {
        self.candidate
            .held_until()
            .filter(|_| self.candidate.holds(self.now()))
            .map(|until| self.started + until)
    }

    fn tell(&self) {
        let holds = self.candidate.holds(self.now());
        let changed = self.sender.send_if_modified(|told| std::mem::replace(told, holds) != holds);
        if changed {
            info!(lease = self.claim.name, holds, "lease");
        }
    }

    /// Looks at the Lease, and writes it if it may be ours.
    async fn turn(&mut self) {
        let result = timeout(ANSWER, self.try_turn()).await;
        let trouble = match result {
            Ok(Ok(())) => String::new(),
            Ok(Err(error)) => causes(&error),
            Err(_) => format!("no answer within {} s", ANSWER.as_secs()),
        };
        if trouble != self.trouble && !trouble.is_empty() {
            warn!(lease = self.claim.name, namespace = self.claim.namespace, "lease: {trouble}");
        }
        self.trouble = trouble;
    }

    async fn try_turn(&mut self) -> Result<(), Error> {
        let found = self.api.get_opt(&self.claim.name).await?;
        let record = found.as_ref().map(record);
        if self.candidate.observe(record.as_ref(), self.now()) == Step::Leave {
            return Ok(());
        }
        self.find_owner(found.is_none()).await;
        let sent = self.now();
        let written = match found {
            Some(lease) => {
                let lease = self.renewed(lease);
                self.api.replace(&self.claim.name, &PostParams::default(), &lease).await
            }
            None => {
                let lease = self.renewed(Lease::default());
                self.api.create(&PostParams::default(), &lease).await
            }
        };
        match written {
            Ok(lease) => {
                // What we wrote ourselves is no news at the next look.
                self.candidate.observe(Some(&self::record(&lease)), self.now());
                self.candidate.wrote(sent);
                Ok(())
            }
            Err(Error::Api(status)) if status.code == 409 => {
                debug!(lease = self.claim.name, "somebody else was faster");
                self.candidate.lost();
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Asks for the node. Anew where the Lease is gone: it went with a node that has been made again since.
    /// Without an answer the Lease is not held up: the next time will do.
    async fn find_owner(&mut self, is_gone: bool) {
        let Some(name) = self.claim.node.as_deref() else { return };
        if self.owner.is_some() && !is_gone {
            return;
        }
        // Not `get`, which would be one more right to grant.
        let params = ListParams::default().fields(&format!("metadata.name={name}"));
        self.owner = match self.nodes.list_metadata(&params).await {
            Ok(nodes) => nodes.into_iter().find_map(|node| owner(name, node.metadata)),
            Err(error) => {
                debug!(lease = self.claim.name, "its node: {}", causes(&error));
                None
            }
        };
    }

    /// The Lease with our name and the time. What others have added to it stays.
    fn renewed(&mut self, mut lease: Lease) -> Lease {
        let now = MicroTime(Timestamp::now());
        let metadata = &mut lease.metadata;
        metadata.name = Some(self.claim.name.clone());
        metadata.namespace = Some(self.claim.namespace.clone());
        let annotations = self.annotations.borrow_and_update().clone();
        merge(metadata, &self.claim, &annotations);
        metadata.annotations.get_or_insert_default().remove(ANNOTATION_UNINSTALL);
        if let Some(owner) = &self.owner {
            let owners = metadata.owner_references.get_or_insert_default();
            owners.retain(|one| one.kind != owner.kind);
            owners.push(owner.clone());
        }
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        if spec.holder_identity.as_ref() != Some(&self.claim.identity) {
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(-1).saturating_add(1));
            spec.acquire_time = Some(now.clone());
        }
        spec.holder_identity = Some(self.claim.identity.clone());
        spec.lease_duration_seconds = i32::try_from(self.claim.timing.duration.as_secs()).ok();
        spec.renew_time = Some(now);
        lease
    }

    /// Leaves the Lease, if it is ours.
    async fn end(&mut self, how: End) {
        self.candidate.lost();
        self.tell();
        // A write of ours may just have got its answer: the newest version counts.
        for attempt in 0..FAREWELLS {
            if attempt > 0 {
                sleep(Duration::from_millis(50) * (1 << attempt)).await;
            }
            let mut lease = match self.api.get_opt(&self.claim.name).await {
                Ok(Some(lease)) => lease,
                Ok(None) => return,
                Err(_) => continue,
            };
            let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
            if spec.holder_identity.as_ref() != Some(&self.claim.identity) {
                return;
            }
            match how {
                End::GiveBack => spec.holder_identity = None,
                End::Leave(duration) => spec.lease_duration_seconds = i32::try_from(duration.as_secs()).ok(),
                End::Delete => {}
            }
            spec.renew_time = Some(MicroTime(Timestamp::now()));
            let seen = Preconditions {
                uid: lease.metadata.uid.clone(),
                resource_version: lease.metadata.resource_version.clone(),
            };
            let seen = DeleteParams { preconditions: Some(seen), ..DeleteParams::default() };
            let written = match how {
                End::Delete => self.api.delete(&self.claim.name, &seen).await.is_ok(),
                _ => self.api.replace(&self.claim.name, &PostParams::default(), &lease).await.is_ok(),
            };
            if written {
                return;
            }
        }
    }
}

fn merge(metadata: &mut ObjectMeta, claim: &Claim, annotations: &Annotations) {
    metadata.labels.get_or_insert_default().extend(claim.labels.clone());
    let all = metadata.annotations.get_or_insert_default();
    for (name, value) in annotations {
        match value {
            Some(value) => drop(all.insert(name.clone(), value.clone())),
            None => drop(all.remove(name)),
        }
    }
}

/// A node as an owner, as the kubelet has it of its own Lease: whoever made it need not have a right to
/// the node's finalizers, since it does not hold the node up.
fn owner(name: &str, node: ObjectMeta) -> Option<OwnerReference> {
    (node.name.as_deref() == Some(name)).then_some(())?;
    Some(OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: name.to_owned(),
        uid: node.uid?,
        ..OwnerReference::default()
    })
}

/// Waits for an annotation that is to change.
async fn changed(annotations: &mut watch::Receiver<Annotations>) {
    if annotations.changed().await.is_err() {
        // Nobody will change one any more.
        std::future::pending().await
    }
}

/// What a Lease says, as far as decisions need it.
pub(super) fn record(lease: &Lease) -> Record {
    let spec = lease.spec.clone().unwrap_or_default();
    let seconds = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    let annotations = lease.metadata.annotations.as_ref();
    Record {
        holder: spec.holder_identity.unwrap_or_default(),
        renewed: spec.renew_time.map(|time| time.0.to_string()).unwrap_or_default(),
        duration: Duration::from_secs(seconds.unwrap_or(15)),
        ends: annotations.is_some_and(|all| all.contains_key(ANNOTATION_UNINSTALL)),
    }
}
