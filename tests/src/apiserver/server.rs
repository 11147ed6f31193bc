//! From a request to its answer.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hyper::{HeaderMap, Method, Uri, body::Bytes};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

use super::{
    access::{Access, User},
    apply,
    call::{Call, Verb},
    control, discovery,
    failure::{Failure, Outcome},
    faults::{Effect, Faults, STALL},
    kinds::Kind,
    managed::Manager,
    objects::{self, Preconditions, Write, Written},
    openapi,
    patch::{self, Type},
    read,
    record::{Record, Request},
    reviews,
    store::{Key, Store},
    strategy::Part,
    versions,
    watch::{self as watches, Watch},
};

/// All that the connections share.
#[derive(Debug)]
pub struct Server {
    store: Mutex<Store>,
    /// Counts changes of anything that a watch has to look at.
    pub wake: watch::Sender<u64>,
    /// What goes wrong.
    pub faults: Faults,
    /// What was asked.
    pub record: Record,
    /// Who may ask.
    pub access: Access,
    /// How often a watch gets a bookmark.
    pub bookmark_interval: Duration,
    /// The minor version of Kubernetes that is claimed.
    pub minor: u32,
}

/// An answer.
#[derive(Debug)]
pub enum Reply {
    /// All at once.
    Full {
        /// HTTP status.
        code: u16,
        /// JSON, or plain text.
        body: Vec<u8>,
        /// Seconds, for `Retry-After`.
        retry_after: Option<u32>,
    },
    /// Event after event.
    Stream(mpsc::Receiver<Bytes>),
    /// None: the connection is closed.
    Nothing,
}

/// What a request for objects comes to.
enum Answer {
    Json(u16, Vec<u8>),
    Watch(Box<Watch>),
}

impl Server {
    /// A server with the objects that every cluster has.
    #[must_use]
    pub fn new(minor: u32, bookmark_interval: Duration) -> Self {
        let mut store = Store::default();
        super::bootstrap::fill(&mut store);
        Self {
            store: Mutex::new(store),
            wake: watch::Sender::new(0),
            faults: Faults::default(),
            record: Record::default(),
            access: Access::default(),
            bookmark_interval,
            minor,
        }
    }

    /// The objects. Not to be held over an await.
    pub fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the watches look at what has changed.
    pub fn wake(&self) {
        self.wake.send_modify(|count| *count += 1);
    }

    /// Answers a request.
    pub async fn answer(
        self: &Arc<Self>,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
        body: Bytes,
    ) -> Reply {
        match self.try_answer(method, uri, headers, body).await {
            Ok(reply) => reply,
            Err(failure) => Reply::failure(&failure),
        }
    }

    async fn try_answer(
        self: &Arc<Self>,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
        body: Bytes,
    ) -> Outcome<Reply> {
        match uri.path() {
            "/healthz" | "/readyz" | "/livez" => return Ok(Reply::text("ok")),
            path if path.starts_with(control::PREFIX) => return control::answer(self, method, path, &body),
            _ => {}
        }
        let user = self.access.user(headers)?;
        if let Some(call) = Call::parse(method, uri, headers, body)? {
            return Ok(self.answer_call(call, &user).await);
        }
        let store = self.store();
        let found =
            discovery::answer(&store, uri.path(), self.minor).or_else(|| openapi::answer(&store, uri.path()));
        found.map(|answer| Reply::json(200, &answer)).ok_or_else(Failure::no_such_path)
    }

    async fn answer_call(self: &Arc<Self>, call: Call, user: &User) -> Reply {
        let mut request = Request::new(&call, &user.name);
        let mut silent = false;
        for effect in self.faults.strike(&call, &user.name) {
            match effect {
                Effect::Error { code, retry_after } => {
                    request.code = code;
                    self.record.push(request);
                    return Reply::failure(&Failure::injected(code, retry_after));
                }
                Effect::Delay { milliseconds } => {
                    tokio::time::sleep(Duration::from_millis(milliseconds)).await
                }
                Effect::Stall => tokio::time::sleep(STALL).await,
                Effect::Drop => {
                    self.record.push(request);
                    return Reply::Nothing;
                }
                Effect::DropAfter => silent = true,
            }
        }
        let closes = self.faults.closes();
        let (outcome, changed) = {
            let mut store = self.store();
            let before = store.revision();
            let outcome = self.execute(&mut store, &call, user, closes);
            (outcome, store.revision() != before)
        };
        if changed {
            self.wake();
        }
        let reply = match outcome {
            Ok(Answer::Json(code, body)) => Reply::Full { code, body, retry_after: None },
            Ok(Answer::Watch(watch)) => {
                let (sink, source) = watches::queue();
                tokio::spawn(watch.run(self.clone(), sink));
                Reply::Stream(source)
            }
            Err(failure) => Reply::failure(&failure),
        };
        request.changed = changed;
        request.code = reply.code();
        self.record.push(request);
        if silent { Reply::Nothing } else { reply }
    }

    fn execute(&self, store: &mut Store, call: &Call, user: &User, closes: u64) -> Outcome<Answer> {
        if let Some(answer) = reviews::answer(self, store, call, user)? {
            return Ok(Answer::Json(201, to_bytes(&answer)));
        }
        super::rbac::check(self, store, call, user)?;
        let kind = store
            .registry
            .find(&call.group, &call.version, &call.plural)
            .ok_or_else(Failure::no_such_path)?;
        if !kind.namespaced && !call.namespace.is_empty() {
            return Err(Failure::no_such_path());
        }
        let part = part(&kind, call)?;
        match call.verb {
            Verb::Get => Ok(Answer::Json(200, to_bytes(&read::get(store, &kind, call)?))),
            Verb::List => {
                let list = read::list(store, &kind, call)?;
                Ok(Answer::Json(200, serde_json::to_vec(&list).unwrap_or_default()))
            }
            Verb::Watch => {
                Ok(Answer::Watch(Box::new(watches::begin(store, &kind, call, &user.name, closes)?)))
            }
            Verb::DeleteCollection => delete_all(store, &kind, call),
            _ => {
                let (code, object) = write(store, &kind, part, call)?;
                Ok(Answer::Json(code, to_bytes(&object)))
            }
        }
    }
}

fn to_bytes(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

fn part(kind: &Kind, call: &Call) -> Outcome<Part> {
    match call.subresource.as_str() {
        "" => Ok(Part::Main),
        "status" if kind.status && !matches!(call.verb, Verb::Create | Verb::Delete) => Ok(Part::Status),
        _ => Err(Failure::no_such_path()),
    }
}

fn write(store: &mut Store, kind: &Arc<Kind>, part: Part, call: &Call) -> Outcome<(u16, Value)> {
    let key: Key = (call.namespace.clone(), call.name.clone());
    let mut write = Write {
        kind: kind.clone(),
        part,
        manager: Manager { name: call.manager(), ..Manager::default() },
        dry_run: call.query.get("dryRun") == "All",
        strict: call.query.get("fieldValidation") == "Strict",
    };
    let written = match call.verb {
        Verb::Create => objects::create(store, &write, &key, call.object()?)?,
        Verb::Update => objects::replace(store, &write, &key, call.object()?)?,
        Verb::Patch => {
            let how = patch::type_of(kind, call)?;
            write.manager.patch = true;
            if how == Type::Apply {
                apply::apply(store, write, &key, call)?
            } else {
                let old = store
                    .get(&kind.storage, &key)
                    .ok_or_else(|| Failure::not_found(&kind.group, &kind.plural, &call.name))?;
                let shown = versions::served(kind, &old);
                let new = patch::patched(kind, call, how, &shown)?;
                objects::replace(store, &write, &key, new)?
            }
        }
        _ => {
            let options = delete_options(call)?;
            write.dry_run |= options["dryRun"][0] == "All";
            let written = objects::delete(store, &write, &key, &preconditions(&options))?;
            return Ok((200, deleted(kind, &written)));
        }
    };
    let code = if matches!(written, Written::Created(_)) { 201 } else { 200 };
    Ok((code, versions::served(kind, written.object()).into_owned()))
}

fn delete_options(call: &Call) -> Outcome<Value> {
    if call.body.is_empty() { Ok(json!({})) } else { call.object() }
}

fn preconditions(options: &Value) -> Preconditions {
    let text = |field: &str| options["preconditions"][field].as_str().map(str::to_owned);
    Preconditions { uid: text("uid"), version: text("resourceVersion") }
}

/// Kinds whose deletion is answered with the object: `ReturnDeletedObject`.
const RETURNED: [&str; 3] = ["services", "pods", "serviceaccounts"];

/// The object while it waits for its finalizers, otherwise a Status that says it is gone.
fn deleted(kind: &Kind, written: &Written) -> Value {
    let object = written.object();
    if matches!(written, Written::Updated(_)) || RETURNED.contains(&&*kind.storage) {
        return versions::served(kind, object).into_owned();
    }
    let mut details = json!({
        "name": object["metadata"]["name"], "kind": kind.plural, "uid": object["metadata"]["uid"],
    });
    if !kind.group.is_empty() {
        details["group"] = kind.group.clone().into();
    }
    json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details })
}

fn delete_all(store: &mut Store, kind: &Arc<Kind>, call: &Call) -> Outcome<Answer> {
    let list = read::list(store, kind, call)?;
    let write = Write {
        kind: kind.clone(),
        part: Part::Main,
        manager: Manager::default(),
        dry_run: call.query.get("dryRun") == "All",
        strict: false,
    };
    for object in &list.items {
        let key = super::store::key_of(object);
        objects::delete(store, &write, &key, &Preconditions::default())?;
    }
    Ok(Answer::Json(200, serde_json::to_vec(&list).unwrap_or_default()))
}

impl Reply {
    fn failure(failure: &Failure) -> Self {
        if failure.is_no_path() {
            // Not even a Status: it comes from Go's own handler.
            return Self::Full { code: 404, body: b"404 page not found\n".to_vec(), retry_after: None };
        }
        let body = to_bytes(&failure.to_status());
        Self::Full { code: failure.code, body, retry_after: failure.retry_after }
    }

    /// JSON.
    #[must_use]
    pub fn json(code: u16, value: &Value) -> Self {
        Self::Full { code, body: to_bytes(value), retry_after: None }
    }

    fn text(text: &str) -> Self {
        Self::Full { code: 200, body: text.as_bytes().to_vec(), retry_after: None }
    }

    fn code(&self) -> u16 {
        match self {
            Self::Full { code, .. } => *code,
            Self::Stream(_) => 200,
            Self::Nothing => 0,
        }
    }
}
