//! The cluster: a double full of Services.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::{
    core::v1::{Namespace, Node, Service},
    discovery::v1::EndpointSlice,
};
use kube::{Api, Client, Resource, api::ListParams};
use lb_control::crd::{self, AddressPool, VirtualIp};
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};

use super::Scale;
use crate::apiserver::{ApiServer, Endpoint};

/// The field manager of what the benchmark itself writes.
pub const MANAGER: &str = "bench";
/// The node that the agent runs on.
pub const NODE: &str = "edge";
/// The namespace of everything.
pub const NAMESPACE: &str = "bench";
/// Where VIPs are from: RFC 2544, section C.2.2.
pub const VIPS: &str = "198.18.0.0/15";
/// Where endpoints are.
pub const ENDPOINTS: &str = "10.64.0.0/10";

/// Objects in one page of a list, as client-go has it.
const PAGE: u32 = 500;
/// Requests at a time while the cluster is filled.
const AT_ONCE: usize = 8;

/// The double and its clients.
pub struct Cluster {
    server: ApiServer,
    client: Client,
    /// Of one thread, so that its CPU time is that of the client.
    runtime: Runtime,
}

/// The name of a Service.
#[must_use]
pub fn name(service: u32) -> String {
    format!("service-{service:05}")
}

fn endpoint(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 64, 0, 1).to_bits() + number)
}

/// The address that a change brings: one that was never used.
#[must_use]
pub fn new_endpoint(scale: Scale, change: u32) -> Ipv4Addr {
    endpoint(scale.services * scale.endpoints + change)
}

impl Cluster {
    /// An API server without Services.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn new() -> Result<Self> {
        let server = ApiServer::start()?;
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let client = {
            let _inside = runtime.enter();
            server.client()?
        };
        let cluster = Self { server, client, runtime };
        for definition in crd::definitions() {
            let path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
            cluster.runtime.block_on(cluster.create(path, &serde_json::to_value(definition)?))?;
        }
        Ok(cluster)
    }

    /// The double.
    #[must_use]
    pub fn server(&self) -> &ApiServer {
        &self.server
    }

    /// Listens in a network namespace, too; with the kubeconfig for it.
    ///
    /// # Errors
    /// When it cannot.
    pub fn listen(&self, namespace: &Path) -> Result<(Endpoint, PathBuf)> {
        let endpoint = self.server.listen(SocketAddr::from(([127, 0, 0, 1], 0)), Some(namespace))?;
        let kubeconfig = self.server.write_kubeconfig("edge", endpoint.address(), None)?;
        Ok((endpoint, kubeconfig))
    }

    /// Makes the node, a pool, the Services and their endpoints.
    ///
    /// # Errors
    /// When the double refuses one.
    pub fn fill(&self, scale: Scale) -> Result<()> {
        let (services, slices) = (
            format!("/api/v1/namespaces/{NAMESPACE}/services"),
            format!("/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"),
        );
        self.runtime.block_on(async {
            self.create("/api/v1/namespaces", &object("v1", "Namespace", NAMESPACE)).await?;
            self.create("/api/v1/nodes", &object("v1", "Node", NODE)).await?;
            let mut pool = object(crd::API_VERSION, "AddressPool", "default");
            pool["spec"] = json!({"addresses": [VIPS]});
            self.create("/apis/pointsman.dev/v1alpha1/addresspools", &pool).await?;
            stream::iter(0..scale.services)
                .map(|number| {
                    let (services, slices) = (&services, &slices);
                    async move {
                        self.create(services, &service(number)).await?;
                        self.create(slices, &slice(scale, number)).await
                    }
                })
                .buffer_unordered(AT_ONCE)
                .try_collect::<()>()
                .await
        })
    }

    async fn create(&self, path: &str, object: &Value) -> Result<()> {
        let uri = format!("{path}?fieldManager={MANAGER}");
        let request = http::Request::post(&uri).header("content-type", "application/json");
        let request = request.body(serde_json::to_vec(object)?)?;
        self.client.request_text(request).await.with_context(|| format!("{uri}: {}", object["metadata"]))?;
        Ok(())
    }

    /// Replaces the first endpoint of a Service.
    ///
    /// # Errors
    /// When the double refuses.
    pub fn replace_endpoint(&self, scale: Scale, service: u32, change: u32) -> Result<()> {
        let path = format!(
            "/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices/{}-0?fieldManager={MANAGER}",
            name(service)
        );
        let mut patch = slice(scale, service);
        patch["endpoints"][0]["addresses"] = json!([new_endpoint(scale, change)]);
        let patch = json!({"endpoints": patch["endpoints"]});
        let request = http::Request::patch(&path).header("content-type", "application/merge-patch+json");
        let request = request.body(serde_json::to_vec(&patch)?)?;
        self.runtime.block_on(self.client.request_text(request)).context(path)?;
        Ok(())
    }

    /// Lists what an agent needs, into objects. Gives how many there were.
    ///
    /// # Errors
    /// When the double does not answer.
    pub fn list_all(&self) -> Result<usize> {
        self.runtime.block_on(async {
            Ok(self.list::<Service>().await?.len()
                + self.list::<EndpointSlice>().await?.len()
                + self.list::<VirtualIp>().await?.len()
                + self.list::<AddressPool>().await?.len()
                + self.list::<Namespace>().await?.len()
                + self.list::<Node>().await?.len())
        })
    }

    async fn list<K>(&self) -> Result<Vec<K>>
    where
        K: Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + std::fmt::Debug,
    {
        let api = Api::<K>::all(self.client.clone());
        let mut parameters = ListParams::default().limit(PAGE);
        let mut all = Vec::new();
        loop {
            let page = api.list(&parameters).await?;
            all.extend(page.items);
            match page.metadata.continue_ {
                Some(token) if !token.is_empty() => parameters = parameters.continue_token(&token),
                _ => return Ok(all),
            }
        }
    }

    /// The address of each Service that has one in its status.
    ///
    /// # Errors
    /// When the double does not answer.
    pub fn vips(&self) -> Result<BTreeMap<String, Ipv4Addr>> {
        let services = self.runtime.block_on(self.list::<Service>())?;
        let address = |service: Service| {
            let ingress = service.status?.load_balancer?.ingress?;
            Some((service.metadata.name?, ingress.first()?.ip.as_ref()?.parse().ok()?))
        };
        Ok(services.into_iter().filter_map(address).collect())
    }
}

fn object(version: &str, kind: &str, name: &str) -> Value {
    json!({"apiVersion": version, "kind": kind, "metadata": {"name": name}})
}

fn service(number: u32) -> Value {
    let name = name(number);
    let mut service = object("v1", "Service", &name);
    service["metadata"]["labels"] = labels(&name);
    service["spec"] = json!({
        "type": "LoadBalancer",
        // There are fewer node ports than Services.
        "allocateLoadBalancerNodePorts": false,
        "selector": {"app.kubernetes.io/name": name},
        "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}],
    });
    service
}

fn labels(name: &str) -> Value {
    json!({
        "app.kubernetes.io/name": name,
        "app.kubernetes.io/managed-by": "Helm",
        "helm.sh/chart": "bench-1.2.3",
    })
}

fn slice(scale: Scale, service: u32) -> Value {
    let name = name(service);
    let mut slice = object("discovery.k8s.io/v1", "EndpointSlice", &format!("{name}-0"));
    slice["metadata"]["labels"] = labels(&name);
    slice["metadata"]["labels"]["kubernetes.io/service-name"] = json!(name);
    slice["addressType"] = json!("IPv4");
    slice["ports"] = json!([{"name": "http", "port": 8080, "protocol": "TCP"}]);
    let one = |place: u32| {
        json!({
            "addresses": [endpoint(service * scale.endpoints + place)],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": format!("worker-{}", (service + place) % 100),
            "zone": format!("zone-{}", place % 3),
            "targetRef": {"kind": "Pod", "namespace": NAMESPACE, "name": format!("{name}-{place}")},
        })
    };
    slice["endpoints"] = (0..scale.endpoints).map(one).collect();
    slice
}
