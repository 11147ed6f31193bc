//! Follows one kind: list, watch, and what to do when either fails.
//!
//! This is `kube::runtime::watcher` again for three reasons: that one does not tell when a watch
//! works again (a kind of which nothing changes would look broken for days), its idle timeout
//! cannot be less than the server's, and it does not tell bookmarks from silence.

use std::{pin::pin, time::Duration};

use futures_util::StreamExt as _;
use kube::{
    Api, Error, Resource as _,
    api::{ListParams, WatchEvent, WatchParams},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout},
};
use tracing::{debug, info};

use super::{
    Timing,
    backoff::Backoff,
    kinds::Kind,
    known::Known,
    version,
    words::{self, Remedy, Verb},
};
use crate::model::{ObjectChange, Problem};

/// What is told about a kind, which goes by the name that RBAC has for it.
#[derive(Debug)]
pub enum Note {
    /// An object came, changed or went.
    Change(ObjectChange),
    /// The first list of it is to be waited for.
    Started(&'static str),
    /// The first list is complete.
    Synced(&'static str),
    /// All that is wrong with its objects.
    Objects(&'static str, Vec<Problem>),
    /// What is wrong with following it; `None` when it works (again).
    Trouble(&'static str, Option<Problem>),
    /// It is not followed any more.
    Stopped(&'static str),
}

/// Objects of one answer to a list, as client-go has it.
const PAGE: u32 = 500;
/// Marks the end of what a streaming list begins with (KEP-3157).
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";
/// A watch that lives that long works.
const SETTLED: Duration = Duration::from_secs(1);
/// An answer has to begin within that time: the API server sends a watch's headers at once.
const ANSWER: Duration = Duration::from_secs(30);

/// Why a step did not work.
enum Failure {
    Api(Verb, Error),
    /// No answer for too long.
    Silent(Verb),
    /// The server's versions went back.
    WentBack,
    /// Nobody listens any more.
    Closed,
}

/// Counts how often anybody has noticed that the server's versions went back: then all kinds are
/// listed anew, since a watch that begins in the server's future is silent and misses what happens.
pub type Restores = watch::Sender<u64>;

/// Follows a kind.
pub struct Reflector<K: Kind> {
    api: Api<K::Raw>,
    labels: Option<&'static str>,
    /// Whether the cluster can do without it.
    optional: bool,
    streaming: bool,
    timing: Timing,
    notes: mpsc::Sender<Note>,
    known: Known<K>,
    /// Version to watch from; `None`: a list is needed.
    version: Option<String>,
    /// The newest version that was seen.
    newest: Option<String>,
    /// Whether the last watch ended otherwise than by what it said: the server may be another by now.
    is_doubtful: bool,
    restores: Restores,
    restored: watch::Receiver<u64>,
    backoff: Backoff,
    synced: bool,
    trouble: Option<Problem>,
}

impl<K: Kind> Reflector<K> {
    /// Follows what `api` reaches. `streaming`: whether to try a streaming list first.
    pub fn new(
        api: Api<K::Raw>,
        streaming: bool,
        timing: Timing,
        notes: mpsc::Sender<Note>,
        restores: &Restores,
    ) -> Self {
        let backoff = Backoff::new(timing.shortest_wait, timing.longest_wait);
        Self {
            api,
            labels: None,
            optional: false,
            streaming,
            timing,
            notes,
            known: Known::default(),
            version: None,
            newest: None,
            is_doubtful: false,
            restores: restores.clone(),
            restored: restores.subscribe(),
            backoff,
            synced: false,
            trouble: None,
        }
    }

    /// Only objects with these labels.
    #[must_use]
    pub fn labelled(mut self, selector: &'static str) -> Self {
        self.labels = Some(selector);
        self
    }

    /// The cluster can do without this kind.
    #[must_use]
    pub fn optional(mut self) -> Self {
        self.optional = true;
        self
    }

    /// Until nobody listens any more, or `stop` is ready; in that case its objects go.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        tokio::select! {
            () = self.follow() => {}
            () = stop => {
                info!(kind = K::NAMES.kind, "not in the cluster any more");
                self.known.begin();
                let _ = self.complete().await;
                let _ = self.notes.send(Note::Stopped(K::NAMES.plural)).await;
            }
        }
    }

    async fn follow(&mut self) {
        loop {
            let began = Instant::now();
            let result = if self.version.is_none() && !self.streaming {
                self.list().await
            } else {
                self.check_and_watch().await
            };
            self.is_doubtful = !matches!(result, Ok(false));
            let wait = match result {
                // A watch that ends as soon as it has begun must not become a loop without pause.
                Ok(true) => (began.elapsed() < SETTLED).then(|| self.backoff.wait()),
                Ok(false) => None,
                Err(Failure::Closed) => return,
                Err(failure) => match self.failed(failure).await {
                    Ok(wait) => wait,
                    Err(_) => return,
                },
            };
            if let Some(wait) = wait {
                tokio::time::sleep(wait).await;
            }
        }
    }

    /// Watches, but asks first whether the server's version is still ahead of ours if it may have been
    /// restored meanwhile.
    async fn check_and_watch(&mut self) -> Result<bool, Failure> {
        if self.is_doubtful && self.version.is_some() {
            let mut params = ListParams { limit: Some(1), ..ListParams::default() };
            params.label_selector = self.labels.map(str::to_owned);
            let list = match timeout(ANSWER.min(self.timing.idle), self.api.list(&params)).await {
                Ok(Ok(list)) => list,
                Ok(Err(error)) => return Err(Failure::Api(Verb::List, error)),
                Err(_) => return Err(Failure::Silent(Verb::List)),
            };
            let now = list.metadata.resource_version.unwrap_or_default();
            if version::went_back(self.newest.as_deref(), &now) {
                return Err(Failure::WentBack);
            }
        }
        self.watch().await
    }

    /// Takes a list page by page.
    async fn list(&mut self) -> Result<bool, Failure> {
        let mut params = ListParams { limit: Some(PAGE), ..ListParams::default() };
        params.label_selector = self.labels.map(str::to_owned);
        self.known.begin();
        loop {
            let page = match timeout(self.timing.idle, self.api.list(&params)).await {
                Ok(Ok(page)) => page,
                Ok(Err(error)) if params.limit.is_some() && words::remedy(&error) == Remedy::Relist => {
                    // The version of the first page is gone: all at once, as client-go's pager does.
                    params.limit = None;
                    params.continue_token = None;
                    self.known.begin();
                    continue;
                }
                Ok(Err(error)) => return Err(Failure::Api(Verb::List, error)),
                Err(_) => return Err(Failure::Silent(Verb::List)),
            };
            for raw in &page.items {
                self.seen(raw).await?;
            }
            params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if params.continue_token.is_none() {
                self.listed(page.metadata.resource_version);
                self.complete().await?;
                return Ok(false);
            }
        }
    }

    /// Watches from the version that is known; without one, from a list that the watch begins with.
    /// Whether it ended early is told by the caller's clock.
    async fn watch(&mut self) -> Result<bool, Failure> {
        let mut initial = self.version.is_none();
        let params = WatchParams {
            label_selector: self.labels.map(str::to_owned),
            send_initial_events: initial,
            ..WatchParams::default()
        };
        // Without a version the server reads consistently, so that a list never leads back in time.
        let version = self.version.clone().unwrap_or_default();
        let started = timeout(ANSWER.min(self.timing.idle), self.api.watch(&params, &version)).await;
        let stream = match started {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(Failure::Api(Verb::Watch, error)),
            Err(_) => return Err(Failure::Silent(Verb::Watch)),
        };
        if initial {
            self.known.begin();
        }
        let mut stream = pin!(stream);
        let mut settled = false;
        loop {
            let patience = if settled { self.timing.idle } else { SETTLED.min(self.timing.idle) };
            let next = tokio::select! {
                next = timeout(patience, stream.next()) => next,
                Ok(()) = self.restored.changed() => {
                    self.forget_version();
                    return Ok(false);
                }
            };
            let event = match next {
                Ok(Some(Ok(event))) => event,
                Ok(Some(Err(error))) => return Err(Failure::Api(Verb::Watch, error)),
                Ok(None) => return Ok(true),
                Err(_) if !settled => {
                    settled = true;
                    self.works().await?;
                    continue;
                }
                Err(_) => {
                    // Not from where it was: a watch that begins in the server's future is silent, too.
                    info!(kind = K::NAMES.kind, idle = ?self.timing.idle, "silent watch: listing again");
                    self.version = None;
                    return Ok(false);
                }
            };
            if let WatchEvent::Error(status) = event {
                return Err(Failure::Api(Verb::Watch, Error::Api(status)));
            }
            settled = true;
            self.works().await?;
            self.backoff.reset();
            initial = self.event(event, initial).await?;
        }
    }

    /// Takes an event over; whether the initial list of a watch is still under way.
    async fn event(&mut self, event: WatchEvent<K::Raw>, initial: bool) -> Result<bool, Failure> {
        let version = match event {
            WatchEvent::Added(raw) | WatchEvent::Modified(raw) => {
                self.seen(&raw).await?;
                raw.meta().resource_version.clone()
            }
            WatchEvent::Deleted(raw) => {
                if let Some(change) = self.known.deleted(raw.meta()) {
                    self.tell(Note::Change(change)).await?;
                }
                raw.meta().resource_version.clone()
            }
            WatchEvent::Bookmark(bookmark) => {
                let version = Some(bookmark.metadata.resource_version);
                if initial && bookmark.metadata.annotations.contains_key(INITIAL_EVENTS_END) {
                    self.listed(version);
                    self.complete().await?;
                    return Ok(false);
                }
                version
            }
            WatchEvent::Error(_) => None,
        };
        if !initial {
            if let Some(version) = version.filter(|version| !version.is_empty()) {
                if version::went_back(self.newest.as_deref(), &version) {
                    return Err(Failure::WentBack);
                }
                self.newest = Some(version.clone());
                self.version = Some(version);
            }
            self.tell_objects().await?;
        }
        Ok(initial)
    }

    /// A list has been read. It counts whatever its version is; if that went back, all kinds are
    /// listed anew.
    fn listed(&mut self, version: Option<String>) {
        let version = version.filter(|version| !version.is_empty());
        if version::went_back(self.newest.as_deref(), version.as_deref().unwrap_or_default()) {
            self.tell_of_restore();
        }
        self.newest.clone_from(&version);
        self.version = version;
    }

    fn tell_of_restore(&mut self) {
        info!(kind = K::NAMES.kind, "the API server's versions went back: all is listed again");
        self.restores.send_modify(|count| *count += 1);
        self.restored.mark_unchanged();
    }

    fn forget_version(&mut self) {
        self.version = None;
        // Whatever comes next is not compared with what was before.
        self.newest = None;
    }

    async fn seen(&mut self, raw: &K::Raw) -> Result<(), Failure> {
        match self.known.seen(raw) {
            Some(change) => self.tell(Note::Change(change)).await,
            None => Ok(()),
        }
    }

    async fn complete(&mut self) -> Result<(), Failure> {
        for change in self.known.complete() {
            self.tell(Note::Change(change)).await?;
        }
        self.tell_objects().await?;
        self.backoff.reset();
        self.works().await?;
        if !std::mem::replace(&mut self.synced, true) {
            debug!(kind = K::NAMES.kind, "first list complete");
            self.tell(Note::Synced(K::NAMES.plural)).await?;
        }
        Ok(())
    }

    /// How long to wait before the next step.
    async fn failed(&mut self, failure: Failure) -> Result<Option<Duration>, Failure> {
        let (problem, patience) = match failure {
            Failure::Closed => return Err(Failure::Closed),
            Failure::WentBack => {
                self.tell_of_restore();
                self.forget_version();
                let wait = self.backoff.wait();
                return Ok((self.backoff.failures() > 1).then_some(wait));
            }
            Failure::Silent(verb) => {
                (words::unreachable(&format!("no answer to a {} of {}", verb.name(), K::NAMES)), 1)
            }
            Failure::Api(verb, error) => {
                let remedy = words::remedy(&error);
                match remedy {
                    Remedy::Unsupported if self.streaming && self.version.is_none() => {
                        debug!(kind = K::NAMES.kind, %error, "no streaming lists: by pages instead");
                        self.streaming = false;
                        return Ok(None);
                    }
                    Remedy::Relist => {
                        info!(kind = K::NAMES.kind, "the version is too old: listing again");
                        self.version = None;
                        let wait = self.backoff.wait();
                        return Ok((self.backoff.failures() > 1).then_some(wait));
                    }
                    // Whoever started this finds out, and stops it.
                    Remedy::Missing if self.optional => {
                        self.version = None;
                        return Ok(Some(self.backoff.wait()));
                    }
                    Remedy::Missing => self.version = None,
                    _ => {}
                }
                // What does not pass by itself is told at once; a connection may break now and then.
                let patience = u32::from(remedy == Remedy::Retry);
                (words::problem(&error, verb, K::NAMES), patience)
            }
        };
        let wait = self.backoff.wait();
        debug!(kind = K::NAMES.kind, ?wait, %problem, "failed");
        if self.backoff.failures() > patience {
            self.tell_trouble(Some(problem)).await?;
        }
        Ok(Some(wait))
    }

    async fn works(&mut self) -> Result<(), Failure> {
        self.tell_trouble(None).await
    }

    async fn tell_trouble(&mut self, trouble: Option<Problem>) -> Result<(), Failure> {
        if self.trouble == trouble {
            return Ok(());
        }
        self.trouble.clone_from(&trouble);
        self.tell(Note::Trouble(K::NAMES.plural, trouble)).await
    }

    async fn tell_objects(&mut self) -> Result<(), Failure> {
        for change in self.known.unreadable() {
            self.tell(Note::Change(change)).await?;
        }
        match self.known.problems() {
            Some(problems) => self.tell(Note::Objects(K::NAMES.plural, problems)).await,
            None => Ok(()),
        }
    }

    async fn tell(&self, note: Note) -> Result<(), Failure> {
        self.notes.send(note).await.map_err(|_| Failure::Closed)
    }
}
