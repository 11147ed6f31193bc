//! An API server double: HTTP that kube-rs and kubectl speak to over a kubeconfig, with the parts of
//! Kubernetes that Pointsman depends on, and with faults on demand.
//!
//! What it answers is held against a real API server by `tests/api_double*.rs`, which run against
//! either ([`cluster::TestCluster`]). What they do not ask is as good as unknown.
//!
//! - [`ApiServer::start`] and a client, in one process. Without a token one is the administrator; with
//!   the token of a ServiceAccount ([`ApiServer::client_as`]) roles apply, once they are enforced.
//! - For processes in network namespaces: [`ApiServer::listen`] at an address in each, and
//!   [`ApiServer::write_kubeconfig`]. An address that goes down cuts off that node alone.
//! - [`ApiServer::faults`] makes things go wrong, [`ApiServer::requests`] tells what was asked.
//!
//! Left out on purpose: TLS, protobuf (`kubectl create namespace` sends it; `kubectl apply` does not),
//! admission, controllers other than those that end namespaces and collect garbage, the schemas of
//! built-in kinds beyond Services and EndpointSlices.

mod access;
mod allocation;
mod apply;
mod bootstrap;
mod call;
pub mod cluster;
mod control;
mod definitions;
mod discovery;
mod failure;
mod faults;
mod fields;
mod hooks;
mod kinds;
mod listen;
mod managed;
pub mod metallb;
mod names;
mod objects;
mod openapi;
mod patch;
mod rbac;
mod read;
mod record;
mod reviews;
mod rules;
mod schema;
mod selector;
mod server;
mod service;
mod service_rules;
mod shape;
mod slices;
mod store;
mod strategy;
mod versions;
mod watch;

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::runtime::{Builder, Runtime};

use self::server::Server;
pub use self::{
    call::Verb,
    faults::{Effect, Filter},
    listen::Endpoint,
    record::Request,
};

/// How a server is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it listens first; port 0 for any.
    pub address: SocketAddr,
    /// The network namespace of that address: a file that `setns` takes.
    pub namespace: Option<PathBuf>,
    /// The minor version of Kubernetes that it claims to be.
    pub minor: u32,
    /// How often watches get bookmarks; Kubernetes sends one about every minute.
    pub bookmark_interval: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            address: (Ipv4Addr::LOCALHOST, 0).into(),
            namespace: None,
            minor: discovery::MINOR,
            bookmark_interval: Duration::from_secs(60),
        }
    }
}

/// A server, which ends when it is dropped.
#[derive(Debug)]
pub struct ApiServer {
    server: Arc<Server>,
    endpoint: Endpoint,
    directory: PathBuf,
    runtime: Option<Runtime>,
}

/// Begins the name of a server's directory; its process and a number follow.
const DIRECTORY: &str = "pointsman-api-";

/// Removes the directories of processes that were killed.
fn remove_left_over() {
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix(DIRECTORY)?.split('-').next());
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Distinguishes the servers of one process.
static COUNT: AtomicU32 = AtomicU32::new(0);

impl ApiServer {
    /// Starts a server on any port of the loopback device.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn start() -> Result<Self> {
        Self::start_with(&Options::default())
    }

    /// Starts a server.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn start_with(options: &Options) -> Result<Self> {
        let runtime =
            Builder::new_multi_thread().worker_threads(2).thread_name("apiserver").enable_all().build();
        let runtime = runtime.context("cannot start the API server's threads")?;
        let server = Arc::new(Server::new(options.minor, options.bookmark_interval));
        let handle = runtime.handle().clone();
        let endpoint = Endpoint::new(server.clone(), handle, options.address, options.namespace.clone())?;
        remove_left_over();
        let name = format!("{DIRECTORY}{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(name);
        fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        let double = Self { server, endpoint, directory, runtime: Some(runtime) };
        double.write_kubeconfig("kubeconfig", double.address(), None)?;
        Ok(double)
    }

    /// Listens at one more address, e.g. in another network namespace. It goes up and down for itself.
    ///
    /// # Errors
    /// When it cannot be bound.
    pub fn listen(&self, address: SocketAddr, namespace: Option<&Path>) -> Result<Endpoint> {
        let runtime = self.runtime.as_ref().context("the API server has ended")?.handle().clone();
        Endpoint::new(self.server.clone(), runtime, address, namespace.map(Path::to_owned))
    }

    /// Where it listens first.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.endpoint.address()
    }

    /// E.g. `http://127.0.0.1:33333`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address())
    }

    /// The file with which an administrator speaks to it.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.join("kubeconfig")
    }

    /// Writes a file with which a ServiceAccount (namespace, name), or the administrator, speaks to it
    /// at one of its addresses. It goes with the server.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_kubeconfig(
        &self,
        file: &str,
        address: SocketAddr,
        service_account: Option<(&str, &str)>,
    ) -> Result<PathBuf> {
        let mut user = serde_json::json!({});
        if let Some((namespace, name)) = service_account {
            user["token"] = self.server.access.token(namespace, name).into();
        }
        // YAML is a superset of JSON.
        let text = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "double", "preferences": {},
            "clusters": [{ "name": "double", "cluster": { "server": format!("http://{address}") } }],
            "users": [{ "name": "double", "user": user }],
            "contexts": [{ "name": "double", "context": { "cluster": "double", "user": "double" } }],
        });
        let path = self.directory.join(file);
        fs::write(&path, format!("{text:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// A client for the administrator; to be called inside a tokio runtime.
    ///
    /// # Errors
    /// When the client cannot be built.
    pub fn client(&self) -> Result<kube::Client> {
        Ok(kube::Client::try_from(kube::Config::new(self.url().parse()?))?)
    }

    /// A client with a ServiceAccount's token; to be called inside a tokio runtime.
    ///
    /// # Errors
    /// When the client cannot be built.
    pub fn client_as(&self, namespace: &str, name: &str) -> Result<kube::Client> {
        let mut config = kube::Config::new(self.url().parse()?);
        config.auth_info.token = Some(self.server.access.token(namespace, name).into());
        Ok(kube::Client::try_from(config)?)
    }

    /// All requests for objects so far.
    #[must_use]
    pub fn requests(&self) -> Vec<Request> {
        self.server.record.all()
    }

    /// Forgets the requests so far.
    pub fn forget_requests(&self) {
        self.server.record.clear();
    }

    /// How many watches of a resource (e.g. `services`) are open.
    #[must_use]
    pub fn open_watches(&self, resource: &str) -> usize {
        self.server.record.watches(resource)
    }

    /// What can go wrong.
    #[must_use]
    pub fn faults(&self) -> FaultHandle<'_> {
        FaultHandle(self)
    }

    /// Enforces roles from now on, or no longer. The administrator may do everything.
    pub fn enforce_rbac(&self, on: bool) {
        self.server.access.enforce(on);
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.endpoint.down();
        if let Some(runtime) = self.runtime.take() {
            // Does not wait, so that a server may be dropped on a thread of another runtime.
            runtime.shutdown_background();
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Makes things go wrong.
#[derive(Clone, Copy, Debug)]
pub struct FaultHandle<'a>(&'a ApiServer);

impl FaultHandle<'_> {
    /// Answers the next `times` requests that the filter meets with an error.
    pub fn error(&self, filter: Filter, code: u16, retry_after: Option<u32>, times: u32) -> u64 {
        self.add(filter, Effect::Error { code, retry_after }, Some(times))
    }

    /// Requests and watches that the filter meets get nothing, while their connections stay open.
    pub fn stall(&self, filter: Filter) -> u64 {
        self.add(filter, Effect::Stall, None)
    }

    /// Sets any fault, for a number of requests or until it is lifted.
    pub fn add(&self, filter: Filter, effect: Effect, times: Option<u32>) -> u64 {
        let id = self.0.server.faults.add(filter, effect, times);
        self.0.server.wake();
        id
    }

    /// How often a fault will still strike; 0 when it is over.
    #[must_use]
    pub fn left(&self, id: u64) -> u32 {
        self.0.server.faults.left(id)
    }

    /// Lifts a fault; silent watches go on where they were.
    pub fn lift(&self, id: u64) {
        self.0.server.faults.lift(id);
        self.0.server.wake();
    }

    /// Lifts all faults.
    pub fn clear(&self) {
        self.0.server.faults.clear();
        self.0.server.wake();
    }

    /// Closes open watches, as the API server does when their time is up.
    pub fn close_watches(&self, filter: Filter) {
        self.0.server.faults.close_watches(filter);
        self.0.server.wake();
    }

    /// Forgets the past: who asks for changes since then gets 410.
    pub fn compact(&self) {
        self.0.server.store().compact();
        self.0.server.wake();
    }

    /// Refuses connections at the first address and closes those that are open. Objects stay.
    pub fn down(&self) {
        self.0.endpoint.down();
    }

    /// Listens again.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub fn up(&self) -> Result<()> {
        self.0.endpoint.up()
    }

    /// Resource versions go on somewhere else, and the past is forgotten: as after a restore. Open
    /// watches end.
    pub fn new_epoch(&self, by: i64) {
        self.0.server.store().new_epoch(by);
        self.0.server.wake();
    }
}
