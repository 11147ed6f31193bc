//! What suites of whole agents in a cluster start from: an API server, a lab whose edge reaches it,
//! and agents.

mod account;

use std::{
    fs,
    net::{SocketAddr, ToSocketAddrs},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use kube::{
    Api, Client,
    api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams},
};
use lb_control::crd;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::{
    apiserver::cluster::TestCluster,
    lab::{Agent, ExtraEdge, Lab, Namespace, Options, Seat, is_root, relay::Relay, wait_for},
    traffic::Server,
};

/// Kinds that tests write: kind, group and version, plural.
const KINDS: [(&str, &str, &str, &str); 15] = [
    ("Service", "", "v1", "services"),
    ("Node", "", "v1", "nodes"),
    ("Namespace", "", "v1", "namespaces"),
    ("EndpointSlice", "discovery.k8s.io", "v1", "endpointslices"),
    ("Lease", "coordination.k8s.io", "v1", "leases"),
    ("Event", "events.k8s.io", "v1", "events"),
    ("AddressPool", "pointsman.dev", "v1alpha1", "addresspools"),
    ("VirtualIP", "pointsman.dev", "v1alpha1", "virtualips"),
    ("IPAddressPool", "metallb.io", "v1beta1", "ipaddresspools"),
    ("L2Advertisement", "metallb.io", "v1beta1", "l2advertisements"),
    ("ServiceAccount", "", "v1", "serviceaccounts"),
    ("ClusterRole", RBAC, "v1", "clusterroles"),
    ("ClusterRoleBinding", RBAC, "v1", "clusterrolebindings"),
    ("Role", RBAC, "v1", "roles"),
    ("RoleBinding", RBAC, "v1", "rolebindings"),
];
const RBAC: &str = "rbac.authorization.k8s.io";
/// Those of them that have no namespace.
const CLUSTER_SCOPED: [&str; 6] =
    ["Node", "Namespace", "AddressPool", "VirtualIP", "ClusterRole", "ClusterRoleBinding"];

/// A node without traffic.
pub struct OtherNode {
    /// Its network.
    pub edge: ExtraEdge,
    /// Its way to the API server.
    pub relay: Relay,
    /// Its name.
    pub node: String,
    kubeconfig: PathBuf,
}

/// A cluster, and a lab whose edge is a node of it.
///
/// Objects that have a namespace are in the test's own, unless they are named `NAMESPACE/NAME`.
pub struct ClusterWorld {
    /// Servers on the backends.
    pub servers: Vec<Server>,
    /// Nodes besides the lab's edge.
    pub others: Vec<OtherNode>,
    /// The lab.
    pub lab: Lab,
    /// The cluster.
    pub cluster: TestCluster,
    /// The way from the edge to the API server.
    pub relay: Relay,
    /// The namespace of the Services.
    pub namespace: String,
    /// The name of the edge as a node.
    pub node: String,
    /// For the edge.
    kubeconfig: PathBuf,
    /// For cleanups, which are off the edge.
    cleaner: PathBuf,
    /// More namespaces with Services.
    more_namespaces: std::sync::Mutex<Vec<String>>,
    /// Cluster-scoped objects to be deleted: kind and name.
    made: std::sync::Mutex<Vec<(&'static str, String)>>,
    runtime: Runtime,
    /// Agents act on all of a cluster: on a shared one, only one test at a time.
    _turn: Option<fs::File>,
}

impl ClusterWorld {
    /// Nothing without root; the reason is printed.
    ///
    /// # Errors
    /// When the lab, the cluster or a server cannot be had.
    pub fn new(backends: u8) -> Result<Option<Self>> {
        Self::with(Options { backends, ..Options::default() })
    }

    /// As [`Self::new`], with options.
    ///
    /// # Errors
    /// When the lab, the cluster or a server cannot be had.
    pub fn with(options: Options) -> Result<Option<Self>> {
        if !is_root() {
            return Ok(None);
        }
        let lab = Lab::new(options)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let cluster = runtime.block_on(TestCluster::from_env())?;
        let turn = if cluster.double().is_none() { Some(turn()?) } else { None };
        let (relay, kubeconfig) = reach(&lab.edge, lab.directory(), &cluster)?;
        let cleaner = cluster.kubeconfig().clone();
        let node = cluster.name("edge");
        let mut servers = Server::start_all(&lab.backends)?;
        servers.extend(Server::start_all(&lab.pods)?);
        let world = Self {
            servers,
            namespace: runtime.block_on(cluster.namespace("svc"))?,
            more_namespaces: std::sync::Mutex::default(),
            made: std::sync::Mutex::default(),
            others: Vec::new(),
            lab,
            cluster,
            relay,
            node,
            kubeconfig,
            cleaner,
            runtime,
            _turn: turn,
        };
        for definition in crd::definitions() {
            world.block(world.cluster.install(&definition))?;
        }
        world.node(&world.node, &json!({}))?;
        Ok(Some(world))
    }

    /// Waits for what only exists in the future.
    pub fn block<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// An agent on the edge.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn agent(&self, flags: &[&str]) -> Result<Agent<'_>> {
        self.start(self.lab.seat(), &self.node, &self.kubeconfig, flags)
    }

    /// One more node.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn add_node(&mut self) -> Result<()> {
        let role = format!("edge{}", self.others.len() + 2);
        let edge = ExtraEdge::new(&self.lab, &role)?;
        let (relay, kubeconfig) = reach(&edge.namespace, &edge.seat().directory, &self.cluster)?;
        let node = self.cluster.name(&role);
        self.node(&node, &json!({}))?;
        self.others.push(OtherNode { edge, relay, node, kubeconfig });
        Ok(())
    }

    /// An agent on a node of [`Self::add_node`].
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn other_agent(&self, number: usize, flags: &[&str]) -> Result<Agent<'_>> {
        let other = self.others.get(number).context("no such node")?;
        self.start(other.edge.seat(), &other.node, &other.kubeconfig, flags)
    }

    /// What `pointsman cleanup` says, as an uninstallation runs it: in a pod of its own, off the edge.
    ///
    /// # Errors
    /// When it fails, with what it wrote.
    pub fn clean_up(&self) -> Result<String> {
        let binary = std::env::var_os("POINTSMAN_BIN").context("POINTSMAN_BIN is not set")?;
        let mut command = Command::new(binary);
        command.args(["cleanup", "--namespace", &self.namespace, "--kubeconfig"]);
        let output = command.arg(&self.cleaner).stdin(Stdio::null()).output()?;
        let (said, log) = (String::from_utf8(output.stdout)?, String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "pointsman cleanup: {}\n{said}{log}", output.status);
        Ok(said)
    }

    fn start<'a>(
        &'a self,
        seat: Seat<'a>,
        node: &str,
        kubeconfig: &Path,
        flags: &[&str],
    ) -> Result<Agent<'a>> {
        let standard =
            ["--node-name", node, "--namespace", &self.namespace, "--http-address", METRICS, "--debug=true"];
        Agent::start_in_cluster(&self.lab, seat, kubeconfig, &[&standard, flags].concat())
    }

    /// A node with labels.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn node(&self, name: &str, labels: &Value) -> Result<()> {
        self.apply("Node", name, &json!({"metadata": {"labels": labels}}))
    }

    /// A pool that serves this test's namespace, with addresses of the lab's VIP ranges.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn pool(&self, addresses: &[&str]) -> Result<()> {
        let name = self.cluster.name("pool");
        self.apply(
            "AddressPool",
            &name,
            &json!({"spec": {"addresses": addresses, "namespaces": [self.namespace]}}),
        )
    }

    /// Writes an object, as `kubectl apply` does. Services and slices go to the test's namespace.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn apply(&self, kind: &'static str, name: &str, object: &Value) -> Result<()> {
        let (api, resource, name) = self.api_of(kind, name)?;
        let mut object = object.clone();
        object["apiVersion"] = json!(resource.api_version);
        object["kind"] = json!(kind);
        object["metadata"]["name"] = json!(name);
        let parameters = PatchParams::apply("test").force();
        self.block(api.patch(name, &parameters, &Patch::Apply(&object)))
            .with_context(|| format!("{kind} {name}"))?;
        let mut made = self.made.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let known = made.iter().any(|(other, of)| (*other, of.as_str()) == (kind, name));
        // Namespaces are cleaned up as such.
        if CLUSTER_SCOPED.contains(&kind) && kind != "Namespace" && !known {
            made.push((kind, name.to_owned()));
        }
        Ok(())
    }

    /// Changes an object by a merge patch.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn patch(&self, kind: &str, name: &str, patch: &Value) -> Result<()> {
        let (api, _, name) = self.api_of(kind, name)?;
        self.block(api.patch(name, &PatchParams::default(), &Patch::Merge(patch)))
            .with_context(|| format!("{kind} {name}"))?;
        Ok(())
    }

    /// Applies an object's status as somebody else, who takes whatever fields it wants.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn seize_status(&self, kind: &str, name: &str, manager: &str, status: &Value) -> Result<()> {
        let (api, resource, name) = self.api_of(kind, name)?;
        let object = json!({
            "apiVersion": resource.api_version, "kind": kind, "metadata": {"name": name}, "status": status,
        });
        let parameters = PatchParams::apply(manager).force();
        self.block(api.patch_status(name, &parameters, &Patch::Apply(&object)))
            .with_context(|| format!("{kind} {name}"))?;
        Ok(())
    }

    /// Changes an object's status by a merge patch.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn patch_status(&self, kind: &str, name: &str, patch: &Value) -> Result<()> {
        let (api, _, name) = self.api_of(kind, name)?;
        self.block(api.patch_status(name, &PatchParams::default(), &Patch::Merge(patch)))
            .with_context(|| format!("status of {kind} {name}"))?;
        Ok(())
    }

    /// Deletes an object; it may stay until its finalizers are gone.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn delete(&self, kind: &str, name: &str) -> Result<()> {
        let (api, _, name) = self.api_of(kind, name)?;
        self.block(api.delete(name, &DeleteParams::default())).with_context(|| format!("{kind} {name}"))?;
        Ok(())
    }

    /// An object, if it is there.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub fn get(&self, kind: &str, name: &str) -> Result<Option<Value>> {
        let (api, _, name) = self.api_of(kind, name)?;
        let found = self.block(api.get_opt(name)).with_context(|| format!("{kind} {name}"))?;
        Ok(found.map(serde_json::to_value).transpose()?)
    }

    /// All objects of a kind.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub fn list(&self, kind: &str) -> Result<Vec<Value>> {
        self.list_in(kind, &self.namespace)
    }

    fn list_in(&self, kind: &str, namespace: &str) -> Result<Vec<Value>> {
        let (api, ..) = self.api_of(kind, &format!("{namespace}/"))?;
        let found = self.block(api.list(&kube::api::ListParams::default()))?;
        Ok(found.items.into_iter().map(serde_json::to_value).collect::<Result<_, _>>()?)
    }

    /// Waits until an object is as wanted; `None` stands for none.
    ///
    /// # Errors
    /// When it is not in time; with how it was last.
    pub fn wait(
        &self,
        what: &str,
        (kind, name): (&str, &str),
        wanted: impl Fn(Option<&Value>) -> bool,
    ) -> Result<Option<Value>> {
        let mut last = None;
        let waited = wait_for(what, || {
            last = self.get(kind, name)?;
            Ok(wanted(last.as_ref()).then_some(()))
        });
        waited.with_context(|| format!("{kind} {name} was {:#}", last.clone().unwrap_or_default()))?;
        Ok(last)
    }

    /// A Service without a selector, with one HTTP port, and endpoints on these backends. Both
    /// families.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn service(&self, name: &str, spec: &Value, backends: &[u8]) -> Result<()> {
        let mut all = json!({
            "type": "LoadBalancer",
            "ipFamilyPolicy": "PreferDualStack",
            "ports": [{"name": "http", "port": 80, "targetPort": crate::traffic::HTTP_PORT, "protocol": "TCP"}],
        });
        for (key, value) in spec.as_object().into_iter().flatten() {
            all[key] = value.clone();
        }
        self.apply("Service", name, &json!({"spec": all}))?;
        self.endpoints(name, backends)
    }

    /// The endpoints of a Service of [`Self::service`].
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn endpoints(&self, service: &str, backends: &[u8]) -> Result<()> {
        for (family, v6) in [("IPv4", false), ("IPv6", true)] {
            let endpoints: Vec<_> = backends
                .iter()
                .map(|n| json!({"addresses": [Lab::backend_address(*n, v6)], "conditions": {"ready": true}}))
                .collect();
            self.apply(
                "EndpointSlice",
                &format!("{service}-{}", family.to_lowercase()),
                &json!({
                    "metadata": {"labels": {"kubernetes.io/service-name": bare(service)}},
                    "addressType": family,
                    "ports": [{"name": "http", "port": crate::traffic::HTTP_PORT, "protocol": "TCP"}],
                    "endpoints": endpoints,
                }),
            )?;
        }
        Ok(())
    }

    /// Waits until a Service has so many addresses in its status, and gives them.
    ///
    /// # Errors
    /// When it has not in time.
    pub fn published(&self, service: &str, count: usize) -> Result<Vec<SocketAddr>> {
        let what = format!("{count} addresses of {service} to be published");
        let found = self.wait(&what, ("Service", service), |found| {
            found.is_some_and(|found| ingress(found).len() == count)
        })?;
        let found = found.unwrap_or_default();
        ingress(&found).iter().map(|ip| Ok(SocketAddr::new(ip.parse()?, 80))).collect()
    }

    /// Reasons of the Events about an object.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub fn reasons(&self, object: &str) -> Result<Vec<String>> {
        let (namespace, object) = object.split_once('/').unwrap_or((&self.namespace, object));
        let events = self.list_in("Event", namespace)?;
        let about = events.iter().filter(|event| event["regarding"]["name"] == object);
        Ok(about.filter_map(|event| event["reason"].as_str().map(str::to_owned)).collect())
    }

    /// One more namespace for Services.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn add_namespace(&self, name: &str) -> Result<String> {
        let namespace = self.block(self.cluster.namespace(name))?;
        self.more_namespaces
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .push(namespace.clone());
        Ok(namespace)
    }

    /// What reaches an object, and its name alone.
    fn api_of<'n>(&self, kind: &str, name: &'n str) -> Result<(Api<DynamicObject>, ApiResource, &'n str)> {
        let Some((kind, group, version, plural)) = KINDS.iter().find(|(known, ..)| *known == kind) else {
            bail!("no such kind: {kind}")
        };
        let resource =
            ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural);
        let client: Client = self.cluster.client();
        let (namespace, name) = name.split_once('/').unwrap_or((&self.namespace, name));
        let api = match *kind {
            kind if CLUSTER_SCOPED.contains(&kind) => Api::all_with(client, &resource),
            _ => Api::namespaced_with(client, namespace, &resource),
        };
        Ok((api, resource, name))
    }
}

/// A name without the namespace that may be ahead of it.
#[must_use]
pub fn bare(name: &str) -> &str {
    name.split_once('/').map_or(name, |(_, name)| name)
}

/// The addresses in a Service's status.
#[must_use]
pub fn ingress(service: &Value) -> Vec<String> {
    let ingress = service["status"]["loadBalancer"]["ingress"].as_array();
    let ips = ingress.into_iter().flatten().filter_map(|one| one["ip"].as_str());
    ips.map(str::to_owned).collect()
}

impl Drop for ClusterWorld {
    fn drop(&mut self) {
        // Agents are gone by now: nobody else takes their finalizers off.
        let more = std::mem::take(
            &mut *self.more_namespaces.lock().unwrap_or_else(std::sync::PoisonError::into_inner),
        );
        for namespace in [std::slice::from_ref(&self.namespace), &more].concat() {
            let services = self.list_in("Service", &namespace).unwrap_or_default();
            for service in services.iter().filter_map(|service| service["metadata"]["name"].as_str()) {
                let name = format!("{namespace}/{service}");
                let _ = self.patch("Service", &name, &json!({"metadata": {"finalizers": null}}));
            }
        }
        for (kind, name) in
            std::mem::take(&mut *self.made.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
        {
            let _ = self.delete(kind, &name);
        }
        if let Err(error) = self.block(self.cluster.clean_up()) {
            eprintln!("cleaning up: {error:#}");
        }
    }
}

/// Waits for this test's turn on a cluster that others test with too.
fn turn() -> Result<fs::File> {
    let path = std::env::temp_dir().join("pointsman-test-cluster.lock");
    let file = fs::File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    file.lock().context("cannot lock")?;
    Ok(file)
}

/// A way from a namespace to the API server, and a kubeconfig for it.
fn reach(namespace: &Namespace, directory: &Path, cluster: &TestCluster) -> Result<(Relay, PathBuf)> {
    let text = fs::read_to_string(cluster.kubeconfig()).context("cannot read the kubeconfig")?;
    let config = kube::config::Kubeconfig::from_yaml(&text)?;
    let server = config.clusters.first().and_then(|one| one.cluster.as_ref()?.server.clone());
    let server = server.context("no server in the kubeconfig")?;
    let url = server.as_str();
    let (scheme, authority) = url.split_once("://").context("a URL")?;
    let authority = authority.trim_end_matches('/');
    let mut servers = authority.to_socket_addrs().with_context(|| authority.to_owned())?;
    let relay = Relay::new(namespace, servers.next().context("no address of the API server")?)?;
    // The name in its certificate stays what it is.
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    ensure!(
        host == "127.0.0.1" || scheme == "http",
        "the API server {url} must be on 127.0.0.1 for these tests"
    );
    let path = directory.join("kubeconfig");
    fs::write(&path, text.replace(url, &format!("{scheme}://{}", relay.address())))?;
    Ok((relay, path))
}

/// Where agents serve their metrics, each on its own node.
pub const METRICS: &str = "127.0.0.1:9404";
/// How long a Lease lasts, and a bit.
pub const LEASE: Duration = Duration::from_secs(20);
/// How long it may take until others have what an agent left that said goodbye: less than a Lease.
pub const GOODBYE: Duration = Duration::from_secs(8);
