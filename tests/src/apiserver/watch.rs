//! Watches: `k8s.io/apiserver/pkg/endpoints/handlers/watch.go` over the store's log.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use hyper::body::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{
    call::Call,
    failure::{Cause, Failure, Outcome},
    kinds::Kind,
    read,
    selector::Selector,
    server::Server,
    store::{Change, Object, Store},
    versions,
};

/// How many changes are taken out of the log at a time.
const BATCH: usize = 256;
/// How many events wait for a slow reader.
const QUEUE: usize = 64;
/// When a watch ends that names no time: Kubernetes takes 30 to 60 minutes.
const LIFE: Duration = Duration::from_secs(45 * 60);
/// Ends the initial events of a watch that asked for them.
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

/// A watch that has begun.
#[derive(Debug)]
pub struct Watch {
    kind: Arc<Kind>,
    call: Call,
    user: String,
    selector: Selector,
    bookmarks: bool,
    deadline: Instant,
    /// Changes up to this one were sent.
    position: u64,
    epoch: u64,
    /// Counts the orders to close watches that came before this one began.
    closes: u64,
    /// Sent first.
    first: Vec<Bytes>,
    /// Over after that: it told of an error.
    failed: bool,
}

fn event(kind: &Kind, word: &str, object: &Value) -> Bytes {
    let object = versions::served(kind, object);
    let mut line = format!("{{\"type\":\"{word}\",\"object\":{object}}}").into_bytes();
    line.push(b'\n');
    line.into()
}

fn bookmark(kind: &Kind, revision: u64, initial: bool) -> Bytes {
    let mut metadata = json!({ "resourceVersion": revision.to_string(), "creationTimestamp": null });
    if initial {
        metadata["annotations"] = json!({ INITIAL_EVENTS_END: "true" });
    }
    let object = json!({ "kind": kind.kind, "apiVersion": kind.api_version(), "metadata": metadata });
    let mut line = json!({ "type": "BOOKMARK", "object": object }).to_string().into_bytes();
    line.push(b'\n');
    line.into()
}

fn error(failure: &Failure) -> Bytes {
    let mut line = json!({ "type": "ERROR", "object": failure.to_status() }).to_string().into_bytes();
    line.push(b'\n');
    line.into()
}

/// Begins a watch.
///
/// # Errors
/// When a parameter is malformed. A version that is too old is told as the first event, as the watch
/// cache does.
pub fn begin(store: &Store, kind: &Arc<Kind>, call: &Call, user: &str, closes: u64) -> Outcome<Watch> {
    let selector = read::selector(kind, call)?;
    let version = call.query.get("resourceVersion");
    let asked: u64 = match version {
        "" => 0,
        text => text.parse().map_err(|_| read::bad_version(text))?,
    };
    let initial = check_initial(call)?;
    let bookmarks = call.query.is("allowWatchBookmarks");
    let life = call.query.number("timeoutSeconds")?.filter(|seconds| *seconds > 0).map(Duration::from_secs);
    let mut watch = Watch {
        kind: kind.clone(),
        call: call.clone(),
        user: user.to_owned(),
        selector,
        bookmarks,
        deadline: Instant::now() + life.unwrap_or(LIFE),
        position: store.revision(),
        epoch: store.epoch(),
        closes,
        first: Vec::new(),
        failed: false,
    };
    if asked > store.revision() && (initial.is_some() || asked > store.revision() + 1_000_000_000) {
        return Err(Failure::too_large_version(asked, store.revision()));
    }
    // Without a version, or with 0, what is there comes first as if it had just been added.
    if initial.unwrap_or(asked == 0) {
        let all = store.list(&kind.storage, read::namespace(call));
        let selected = all.iter().filter(|object| watch.selector.matches(object));
        watch.first = selected.map(|object| event(kind, "ADDED", object)).collect();
        if initial == Some(true) && bookmarks {
            watch.first.push(bookmark(kind, watch.position, true));
        }
    } else if asked > 0 {
        watch.position = asked;
        if asked < store.compacted() {
            let message = format!("too old resource version: {asked} ({})", store.compacted());
            watch.first.push(error(&Failure::expired(message)));
            watch.failed = true;
        }
    }
    Ok(watch)
}

/// The parameter `sendInitialEvents`, where it is given.
fn check_initial(call: &Call) -> Outcome<Option<bool>> {
    let given = call.query.get("sendInitialEvents");
    let matching = call.query.get("resourceVersionMatch");
    let field = "resourceVersionMatch";
    if given.is_empty() {
        if !matching.is_empty() {
            let why = "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided";
            return Err(read::bad_options(Cause::forbidden(field, why)));
        }
        return Ok(None);
    }
    if matching != "NotOlderThan" {
        let why = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan";
        return Err(read::bad_options(Cause::forbidden(field, why)));
    }
    Ok(Some(call.query.is("sendInitialEvents")))
}

impl Watch {
    /// What a change is to this watch: an object may come into the selection, change in it, leave it.
    fn show(&self, change: &Change) -> Option<Bytes> {
        let selected = |object: &Option<Object>| {
            object
                .as_ref()
                .filter(|object| self.is_in_namespace(object) && self.selector.matches(object))
                .cloned()
        };
        let word = match (selected(&change.old), selected(&change.new)) {
            (None, None) => return None,
            (None, Some(_)) => "ADDED",
            (Some(_), Some(_)) => "MODIFIED",
            (Some(old), None) => {
                // Shown as it was while it was selected, with the version of the change.
                let mut last = Value::clone(&old);
                last["metadata"]["resourceVersion"] = change.revision.to_string().into();
                return Some(event(&self.kind, "DELETED", &last));
            }
        };
        Some(event(&self.kind, word, &change.shown))
    }

    fn is_in_namespace(&self, object: &Value) -> bool {
        read::namespace(&self.call).is_none_or(|namespace| object["metadata"]["namespace"] == namespace)
    }

    /// Sends events until the time is up, the reader goes away, or a fault ends it.
    pub async fn run(mut self, server: Arc<Server>, sink: mpsc::Sender<Bytes>) {
        let _open = server.record.open_watch(&self.call.plural, &self.user);
        let mut wake = server.wake.subscribe();
        let mut bookmark_at = Instant::now() + server.bookmark_interval;
        loop {
            wake.borrow_and_update();
            if server.faults.closed_since(self.closes, &self.call, &self.user) {
                return;
            }
            if !server.faults.stalls(&self.call, &self.user) && !self.catch_up(&server, &sink).await {
                return;
            }
            let now = Instant::now();
            if now >= self.deadline {
                return;
            }
            if now >= bookmark_at {
                bookmark_at = now + server.bookmark_interval;
                // A watch from the future is silent until then (`cacheWatcher.process` drops what is not
                // newer than what was asked for, bookmarks too).
                let is_ahead = self.position > server.store().revision();
                if self.bookmarks && !is_ahead && !server.faults.stalls(&self.call, &self.user) {
                    let _ = sink.send(bookmark(&self.kind, self.position, false)).await;
                }
            }
            tokio::select! {
                changed = wake.changed() => if changed.is_err() { return },
                () = sink.closed() => return,
                () = tokio::time::sleep_until(self.deadline.min(bookmark_at).into()) => {}
            }
        }
    }

    /// Sends what has happened since; false when the watch is over.
    async fn catch_up(&mut self, server: &Server, sink: &mpsc::Sender<Bytes>) -> bool {
        for line in std::mem::take(&mut self.first) {
            if sink.send(line).await.is_err() {
                return false;
            }
        }
        if self.failed {
            return false;
        }
        loop {
            let (found, upto) = {
                let store = server.store();
                if store.epoch() != self.epoch {
                    return false;
                }
                match store.changes(&self.kind.storage, self.position, BATCH) {
                    Ok((found, upto)) => (Ok(found), upto),
                    Err(failure) => (Err(failure), self.position),
                }
            };
            let found = match found {
                Ok(found) => found,
                Err(failure) => {
                    let _ = sink.send(error(&failure)).await;
                    return false;
                }
            };
            for line in found
                .iter()
                .filter(|change| change.revision > self.position)
                .filter_map(|change| self.show(change))
            {
                if sink.send(line).await.is_err() {
                    return false;
                }
            }
            // A watch may begin in the future: then nothing before that is shown.
            self.position = self.position.max(upto);
            if found.len() < BATCH {
                return true;
            }
        }
    }
}

/// The queue between a watch and its connection.
#[must_use]
pub fn queue() -> (mpsc::Sender<Bytes>, mpsc::Receiver<Bytes>) {
    mpsc::channel(QUEUE)
}
