//! Carries out the controller's commands, in order for each object.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use kube::{Client, Error, core::Status};
use tokio::{
    sync::{Semaphore, mpsc},
    time::{Instant, sleep, timeout},
};
use tracing::{debug, warn};

use super::{
    events::{Events, Verdict},
    requests::{Call, Failure, Requests},
};
use crate::{
    model::{ObjectRef, causes},
    plan::controller::{Command, Outcome, Topic},
};

/// Requests at a time.
const CONCURRENCY: usize = 16;
/// How long one request may take.
const ANSWER: Duration = Duration::from_secs(10);
/// How often an Event is sent at most, and the pause after the first time; then it is twice as long.
const EVENT_ATTEMPTS: u32 = 3;
const EVENT_PAUSE: Duration = Duration::from_secs(1);

/// Events that wait at most: they are sent one after the other, and a cluster that changes faster than
/// that has nobody who reads them all.
const EVENTS: usize = 512;

/// Hears of every write: verb and resource as in RBAC, and the HTTP status (0 without an answer).
pub type Count = Arc<dyn Fn(&'static str, &'static str, u16) + Send + Sync>;

/// Objects that commands are about; those about the same one wait for each other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Subject {
    Service(ObjectRef),
    Address(IpAddr),
    /// An address's status, which is the agent's and does not wait for the leader.
    Status(IpAddr),
    Pool(String),
    Event,
}

impl Subject {
    fn of(command: &Command) -> Self {
        match command {
            Command::CreateVirtualIp { address, .. }
            | Command::UpdateVirtualIp { address, .. }
            | Command::DeleteVirtualIp { address, .. } => Self::Address(*address),
            Command::SetVirtualIpStatus { address, .. } => Self::Status(*address),
            Command::AddFinalizers { service, .. }
            | Command::RemoveFinalizers { service, .. }
            | Command::ApplyServiceStatus { service, .. }
            | Command::SetExternalIps { service, .. } => Self::Service(service.clone()),
            Command::SetPoolStatus { pool, .. } => Self::Pool(pool.clone()),
            Command::Event { .. } => Self::Event,
        }
    }
}

/// Carries out commands until it is dropped; requests that are under way are finished.
pub struct Executor {
    /// What became of each command. Of Events only those are among them that agents tell of their own
    /// node ([`Topic`]), and only when they do not arrive, or are too many.
    pub outcomes: mpsc::UnboundedReceiver<(Command, Outcome)>,
    shared: Arc<Shared>,
}

struct Shared {
    requests: Requests,
    count: Count,
    leads: AtomicBool,
    room: Semaphore,
    queues: Mutex<HashMap<Subject, VecDeque<Command>>>,
    outcomes: mpsc::UnboundedSender<(Command, Outcome)>,
    events: Mutex<Events>,
    started: Instant,
}

impl Executor {
    /// `instance` is who Events say that they come from.
    #[must_use]
    pub fn new(client: Client, instance: impl Into<String>, count: Count) -> Self {
        let (sender, outcomes) = mpsc::unbounded_channel();
        let shared = Shared {
            requests: Requests::new(client, instance.into()),
            count,
            leads: AtomicBool::new(false),
            room: Semaphore::new(CONCURRENCY),
            queues: Mutex::default(),
            outcomes: sender,
            events: Mutex::default(),
            started: Instant::now(),
        };
        Self { outcomes, shared: Arc::new(shared) }
    }

    /// Whether commands that only the leader may give are carried out from now on.
    pub fn leads(&self, leads: bool) {
        self.shared.leads.store(leads, Ordering::SeqCst);
    }

    /// Carries out a command once those before it, for the same object, have been.
    pub fn submit(&self, command: Command) {
        let Some(command) = self.shared.news(command) else { return };
        let subject = Subject::of(&command);
        let mut queues = self.shared.queues.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = queues.get_mut(&subject) {
            if subject == Subject::Event && queue.len() >= EVENTS {
                self.shared.not_told(command, "too many Events wait");
            } else {
                queue.push_back(command);
            }
            return;
        }
        queues.insert(subject.clone(), VecDeque::new());
        drop(queues);
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move { shared.work(&subject, command).await });
    }
}

impl Shared {
    /// Events are told once, whoever comes up with them however often.
    fn news(&self, command: Command) -> Option<Command> {
        let Command::Event { about, reason, note, .. } = &command else { return Some(command) };
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let verdict = events.admit(about, reason, note, self.started.elapsed());
        drop(events);
        match verdict {
            Verdict::Tell => return Some(command),
            Verdict::Known => debug!(reason, note, "Event is not repeated"),
            Verdict::TooMany => {
                debug!(reason, note, "Event is not told: too many of its object");
                self.is_lost(command, "too many Events of the object");
            }
        }
        None
    }

    async fn work(&self, subject: &Subject, mut command: Command) {
        loop {
            if matches!(command, Command::Event { .. }) {
                self.tell(command).await;
            } else {
                let Some(outcome) = self.attempt(&command).await else { return };
                // The receiver goes first only when the agent leaves.
                let _ = self.outcomes.send((command, outcome));
            }
            let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
            match queues.get_mut(subject).and_then(VecDeque::pop_front) {
                Some(next) => command = next,
                None => {
                    queues.remove(subject);
                    return;
                }
            }
        }
    }

    /// Once there is room; `None` when there will be none any more.
    async fn attempt(&self, command: &Command) -> Option<Outcome> {
        let _permit = self.room.acquire().await.ok()?;
        Some(self.carry_out(command).await)
    }

    /// Sends an Event, which nobody else tries again. One that did not arrive was not told.
    async fn tell(&self, event: Command) {
        for attempt in 0..EVENT_ATTEMPTS {
            match self.attempt(&event).await {
                Some(Outcome::Done) => return,
                Some(Outcome::Failed(_)) if attempt + 1 < EVENT_ATTEMPTS && self.may_write(&event) => {
                    sleep(EVENT_PAUSE * (1 << attempt)).await;
                }
                _ => break,
            }
        }
        self.not_told(event, "it did not arrive");
    }

    fn not_told(&self, event: Command, why: &str) {
        if let Command::Event { about, reason, note, .. } = &event {
            let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
            events.not_told(about, reason, note);
        }
        self.is_lost(event, why);
    }

    /// Whoever keeps to what was told last has to hear that this was not.
    fn is_lost(&self, event: Command, why: &str) {
        if matches!(&event, Command::Event { reason, .. } if Topic::of(reason).is_some()) {
            let _ = self.outcomes.send((event, Outcome::Failed(why.to_owned())));
        }
    }

    fn may_write(&self, command: &Command) -> bool {
        !command.is_leaders() || self.leads.load(Ordering::SeqCst)
    }

    async fn carry_out(&self, command: &Command) -> Outcome {
        let not_ours = || Outcome::Failed("another agent leads".to_owned());
        if !self.may_write(command) {
            return not_ours();
        }
        let Call { verb, resource } = Call::of(command);
        let may_write = || self.may_write(command);
        let (status, outcome) = match timeout(ANSWER, self.requests.send(command, &may_write)).await {
            Ok(Ok(())) => (200, Outcome::Done),
            Ok(Err(Failure::NotAllowed)) => return not_ours(),
            Ok(Err(Failure::Request(Error::Api(status)))) => {
                let outcome = refusal(&status, verb, resource);
                (status.code, outcome)
            }
            Ok(Err(Failure::Request(error))) => (0, Outcome::Failed(causes(&error))),
            Err(_) => (0, Outcome::Failed(format!("no answer within {} s", ANSWER.as_secs()))),
        };
        (self.count)(verb, resource, status);
        match &outcome {
            Outcome::Forbidden(why) | Outcome::Failed(why) => warn!("{verb} {resource}: {why}"),
            Outcome::Done | Outcome::Conflict(_) | Outcome::Gone => {
                debug!(?command, ?outcome, "{verb} {resource}")
            }
        }
        outcome
    }
}

/// What it means that the API server did not do it.
fn refusal(status: &Status, verb: &str, resource: &str) -> Outcome {
    let causes = || status.details.iter().flat_map(|details| &details.causes);
    match status.code {
        404 => Outcome::Gone,
        409 => Outcome::Conflict(status.message.clone()),
        // A patch that names another uid than the object's is invalid (ValidateObjectMetaUpdate: the
        // field is immutable). It means the same: the object was deleted and created again.
        422 if causes().any(|cause| cause.field == "metadata.uid") => {
            Outcome::Conflict(status.message.clone())
        }
        // Nothing new is taken into a namespace that is being deleted (NamespaceLifecycle): no
        // matter of rights.
        403 if causes().any(|cause| cause.reason == "NamespaceTerminating") => Outcome::Gone,
        403 => Outcome::Forbidden(format!(
            "{}: the ClusterRole of the agent lacks {verb} on {resource}",
            status.message
        )),
        _ => Outcome::Failed(status.message.clone()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn refusals_are_told_apart() {
        let of = |status| refusal(&serde_json::from_value(status).unwrap(), "create", "events");
        let terminating = json!({
            "code": 403, "message": "forbidden: unable to create new content in namespace x",
            "details": {"causes": [{"reason": "NamespaceTerminating"}]},
        });
        assert_eq!(of(terminating), Outcome::Gone);
        let Outcome::Forbidden(why) = of(json!({"code": 403, "message": "forbidden"})) else { panic!() };
        assert!(why.contains("lacks create on events"), "{why}");
        let another = json!({
            "code": 422, "message": "field is immutable",
            "details": {"causes": [{"reason": "FieldValueInvalid", "field": "metadata.uid"}]},
        });
        assert_eq!(of(another), Outcome::Conflict("field is immutable".into()));
        assert_eq!(of(json!({"code": 422, "message": "m"})), Outcome::Failed("m".into()));
        assert_eq!(of(json!({"code": 404})), Outcome::Gone);
        assert_eq!(of(json!({"code": 409, "message": "m"})), Outcome::Conflict("m".into()));
        assert_eq!(of(json!({"code": 500, "message": "m"})), Outcome::Failed("m".into()));
    }
}
