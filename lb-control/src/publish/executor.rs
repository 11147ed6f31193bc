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
    time::{Instant, timeout},
};
use tracing::{debug, warn};

use super::{
    events::{Events, Verdict},
    requests::{Call, Requests},
};
use crate::{
    model::{ObjectRef, causes},
    plan::controller::{Command, Outcome},
};

/// Requests at a time.
const CONCURRENCY: usize = 16;
/// How long one request may take.
const ANSWER: Duration = Duration::from_secs(10);

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

    /// Whether only the leader may write it.
    fn is_leaders(&self) -> bool {
        !matches!(self, Self::Status(_) | Self::Event)
    }
}

/// Carries out commands until it is dropped; requests that are under way are finished.
pub struct Executor {
    /// What became of each command. Events are not among them.
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
        if !self.shared.is_news(&command) {
            return;
        }
        let subject = Subject::of(&command);
        let mut queues = self.shared.queues.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = queues.get_mut(&subject) {
            queue.push_back(command);
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
    fn is_news(&self, command: &Command) -> bool {
        let Command::Event { about, reason, note, .. } = command else { return true };
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let verdict = events.admit(about, reason, note, self.started.elapsed());
        if verdict != Verdict::Tell {
            debug!(?verdict, reason, note, "Event is not repeated");
        }
        verdict == Verdict::Tell
    }

    async fn work(&self, subject: &Subject, mut command: Command) {
        loop {
            let outcome = match self.room.acquire().await {
                Ok(_permit) => self.carry_out(subject, &command).await,
                Err(_) => return,
            };
            if !matches!(command, Command::Event { .. }) {
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

    async fn carry_out(&self, subject: &Subject, command: &Command) -> Outcome {
        if subject.is_leaders() && !self.leads.load(Ordering::SeqCst) {
            return Outcome::Failed("another agent leads".to_owned());
        }
        let Call { verb, resource } = Call::of(command);
        let (status, outcome) = match timeout(ANSWER, self.requests.send(command)).await {
            Ok(Ok(())) => (200, Outcome::Done),
            Ok(Err(Error::Api(status))) => {
                let outcome = refusal(&status, verb, resource);
                (status.code, outcome)
            }
            Ok(Err(error)) => (0, Outcome::Failed(causes(&error))),
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
    let causes = status.details.iter().flat_map(|details| &details.causes);
    match status.code {
        404 => Outcome::Gone,
        409 => Outcome::Conflict(status.message.clone()),
        // Nothing new is taken into a namespace that is being deleted (NamespaceLifecycle): no
        // matter of rights.
        403 if causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating") => Outcome::Gone,
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
        assert_eq!(of(json!({"code": 404})), Outcome::Gone);
        assert_eq!(of(json!({"code": 409, "message": "m"})), Outcome::Conflict("m".into()));
        assert_eq!(of(json!({"code": 500, "message": "m"})), Outcome::Failed("m".into()));
    }
}
