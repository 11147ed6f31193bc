//! Somebody who listens to the source, and objects to be told of.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
pub use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition as Definition;
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, Patch, PatchParams, PostParams, TypeMeta},
    core::GroupVersionKind,
    runtime::wait::{await_condition, conditions},
};
use lb_control::{
    crd,
    model::{ObjectChange, ObjectRef, Objects, Problem},
    source::kube::{Fatal, Timing, Update, watch},
};
use pointsman_tests::apiserver::{ApiServer, Options, metallb};
use serde_json::{Value, json};
use tokio::{sync::mpsc, time::timeout};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// Short waits; a watch is silent after half a second, while bookmarks come ten times as often.
pub fn timing() -> Timing {
    Timing {
        idle: Duration::from_millis(500),
        shortest_wait: Duration::from_millis(20),
        longest_wait: Duration::from_millis(200),
        discovery: Duration::from_millis(50),
    }
}

/// A server of a minor version.
pub fn server_of(minor: u32) -> Result<ApiServer> {
    let bookmark_interval = Duration::from_millis(50);
    ApiServer::start_with(&Options { minor, bookmark_interval, ..Options::default() })
}

/// A server.
pub fn server() -> Result<ApiServer> {
    server_of(36)
}

/// Runs a test.
pub fn run(test: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(test)
}

/// How often it was asked.
pub fn count(server: &ApiServer, verb: &str, resource: &str) -> usize {
    server
        .requests()
        .iter()
        .filter(|request| request.verb.as_str() == verb && request.resource == resource)
        .count()
}

/// Installs our definitions.
pub async fn install(client: &Client) -> Result<()> {
    for definition in crd::definitions() {
        install_one(client, &definition).await?;
    }
    Ok(())
}

async fn install_one(client: &Client, definition: &Definition) -> Result<()> {
    let api: Api<Definition> = Api::all(client.clone());
    api.create(&PostParams::default(), definition).await?;
    let name = definition.metadata.name.clone().context("a name")?;
    let established = await_condition(api, &name, conditions::is_crd_established());
    timeout(PATIENCE, established).await.context("not established")??;
    Ok(())
}

/// A server with our definitions, and a client of it.
pub async fn installed() -> Result<(ApiServer, Client)> {
    let server = server()?;
    let client = server.client()?;
    install(&client).await?;
    Ok((server, client))
}

/// Installs MetalLB's definitions.
pub async fn install_metallb(client: &Client) -> Result<()> {
    for (plural, kind) in metallb::KINDS {
        install_one(client, &serde_json::from_value(metallb::definition(plural, kind).1)?).await?;
    }
    Ok(())
}

/// Creates any object.
pub async fn apply(client: &Client, api_version: &str, kind: &str, object: Value) -> Result<()> {
    let types = TypeMeta { api_version: api_version.into(), kind: kind.into() };
    let resource = ApiResource::from_gvk(&GroupVersionKind::try_from(&types)?);
    let mut object: DynamicObject = serde_json::from_value(object)?;
    object.types = Some(types);
    let name = object.metadata.name.clone().context("a name")?;
    let api: Api<DynamicObject> = match &object.metadata.namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    api.patch(&name, &PatchParams::apply("test"), &Patch::Apply(&object)).await?;
    Ok(())
}

/// Creates a Service in `default`.
pub async fn service(client: &Client, name: &str, port: u16) -> Result<()> {
    let object = json!({
        "metadata": { "name": name, "namespace": "default" },
        "spec": { "type": "LoadBalancer", "ports": [{ "name": "http", "port": port }] },
    });
    apply(client, "v1", "Service", object).await
}

/// Creates an EndpointSlice in `default`.
pub async fn slice(client: &Client, name: &str, address: &str) -> Result<()> {
    let object = json!({
        "metadata": {
            "name": name, "namespace": "default", "labels": { "kubernetes.io/service-name": "web" },
        },
        "addressType": "IPv4", "endpoints": [{ "addresses": [address] }], "ports": [{ "port": 80 }],
    });
    apply(client, "discovery.k8s.io/v1", "EndpointSlice", object).await
}

/// Listens to the source.
pub struct Follower {
    updates: mpsc::Receiver<Result<Update, Fatal>>,
    /// What is there by all that was told.
    pub objects: Objects,
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// What was told since the first update.
    pub changes: Vec<ObjectChange>,
    synced: bool,
}

impl Follower {
    /// Begins to listen.
    pub fn new(client: &Client, timing: Timing) -> Self {
        Self {
            updates: watch(client.clone(), "default".into(), timing),
            objects: Objects::default(),
            problems: Vec::new(),
            changes: Vec::new(),
            synced: false,
        }
    }

    /// One that has been told of everything once.
    pub async fn after_sync(client: &Client) -> Result<Self> {
        let mut follower = Self::new(client, timing());
        follower.synced().await?;
        Ok(follower)
    }

    /// Whether the first update came.
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// Waits for the next update, for some time.
    async fn next(&mut self, patience: Duration) -> Result<Option<Update>> {
        let Ok(received) = timeout(patience, self.updates.recv()).await else { return Ok(None) };
        let update = received.context("the source has ended")??;
        if !update.synced {
            assert!(update.changes.is_empty(), "told before everything is there");
        }
        for change in &update.changes {
            assert!(self.objects.apply(change.clone()), "told though nothing changed: {change:?}");
        }
        if self.synced {
            self.changes.extend(update.changes.iter().cloned());
        }
        self.synced = update.synced;
        if let Some(problems) = &update.problems {
            self.problems.clone_from(problems);
        }
        Ok(Some(update))
    }

    /// The first update that tells everything.
    pub async fn synced(&mut self) -> Result<Update> {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.next(until.saturating_duration_since(Instant::now())).await? {
                Some(update) if update.synced => return Ok(update),
                Some(_) => {}
                None => bail!("never synced: {:?}", self.problems),
            }
        }
    }

    async fn wait(&mut self, what: &str, done: impl Fn(&Self) -> bool) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while !done(self) {
            if Instant::now() > until {
                bail!("in vain: {what}; problems: {:?}; changes: {:?}", self.problems, self.changes);
            }
            // What is waited for may show elsewhere than in an update.
            self.next(Duration::from_millis(20)).await?;
        }
        Ok(())
    }

    /// Waits for objects.
    pub async fn until(&mut self, what: &str, done: impl Fn(&Objects) -> bool) -> Result<()> {
        self.wait(what, |follower| done(&follower.objects)).await
    }

    /// Waits for something elsewhere.
    pub async fn until_that(&mut self, what: &str, done: impl Fn() -> bool) -> Result<()> {
        self.wait(what, |_| done()).await
    }

    /// Waits for a problem that says something.
    pub async fn problem(&mut self, text: &str) -> Result<()> {
        let says =
            |follower: &Self| follower.problems.iter().any(|problem| problem.to_string().contains(text));
        self.wait(text, says).await
    }

    /// Waits until nothing is wrong.
    pub async fn no_problem(&mut self) -> Result<()> {
        self.wait("no problem", |follower| follower.problems.is_empty()).await
    }

    /// Waits for the end.
    pub async fn fatal(&mut self) -> Result<Fatal> {
        loop {
            match timeout(PATIENCE, self.updates.recv()).await?.context("no reason")? {
                Ok(_) => {}
                Err(fatal) => return Ok(fatal),
            }
        }
    }

    /// Services that changes were about after the first update, and whether they were there.
    pub fn changes_of_services(&self) -> impl Iterator<Item = (ObjectRef, bool)> {
        self.changes.iter().filter_map(|change| match change {
            ObjectChange::Service(name, value) => Some((name.clone(), value.is_some())),
            _ => None,
        })
    }
}
