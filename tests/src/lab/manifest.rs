//! The Kubernetes YAML of a lab.

use std::{
    fmt::{self, Display, Formatter, Write},
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context, Result};
use serde_json::Value;

use super::{
    agent::list,
    topology::{Lab, VIPS_V4, VIPS_V6},
};
use crate::traffic::{ECHO_PORT, HTTP_PORT, UDP_PORT};

/// A dual-stack `LoadBalancer` Service and its EndpointSlices.
#[derive(Clone, Debug)]
pub struct ServiceSpec {
    /// Name, in namespace `default`.
    pub name: String,
    /// Ports.
    pub ports: Vec<Port>,
    /// Backends by number; the EndpointSlices are always there.
    pub backends: Vec<u8>,
    /// Those of them that are terminating: they keep established connections, and get no new ones.
    pub terminating: Vec<u8>,
    /// Annotations.
    pub annotations: Vec<(String, String)>,
}

/// A port of a Service and of its endpoints.
#[derive(Clone, Copy, Debug)]
pub struct Port {
    /// Name.
    pub name: &'static str,
    /// `TCP` or `UDP`.
    pub protocol: &'static str,
    /// On the VIP.
    pub port: u16,
    /// On the backends.
    pub target: u16,
}

/// HTTP on TCP port 80.
pub const HTTP: Port = Port { name: "http", protocol: "TCP", port: 80, target: HTTP_PORT };
/// The TCP echo on port 7.
pub const ECHO: Port = Port { name: "stream", protocol: "TCP", port: 7, target: ECHO_PORT };
/// The UDP echo on port 53.
pub const UDP: Port = Port { name: "echo", protocol: "UDP", port: 53, target: UDP_PORT };

impl ServiceSpec {
    /// A Service with these ports and backends.
    #[must_use]
    pub fn new(name: &str, ports: &[Port], backends: &[u8]) -> Self {
        Self {
            name: name.to_owned(),
            ports: ports.to_vec(),
            backends: backends.to_vec(),
            terminating: Vec::new(),
            annotations: Vec::new(),
        }
    }

    /// With an annotation.
    #[must_use]
    pub fn annotated(mut self, key: &str, value: &str) -> Self {
        self.annotations.push((key.to_owned(), value.to_owned()));
        self
    }

    /// With a terminating backend.
    #[must_use]
    pub fn terminating(mut self, backend: u8) -> Self {
        self.terminating.push(backend);
        self
    }

    fn slice(&self, v6: bool) -> Result<String, fmt::Error> {
        let family = if v6 { "IPv6" } else { "IPv4" };
        let mut yaml = format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {0}-{1}\n  labels: \
             {{kubernetes.io/service-name: {0}}}\naddressType: {family}\nports:\n",
            self.name,
            family.to_lowercase()
        );
        for port in &self.ports {
            writeln!(yaml, "- {{name: {}, protocol: {}, port: {}}}", port.name, port.protocol, port.target)?;
        }
        if self.backends.is_empty() {
            yaml.push_str("endpoints: []\n");
            return Ok(yaml);
        }
        yaml.push_str("endpoints:\n");
        for n in &self.backends {
            let (address, terminating) = (Lab::backend_address(*n, v6), self.terminating.contains(n));
            writeln!(
                yaml,
                "- addresses: ['{address}']\n  conditions: {{ready: {}, serving: true, terminating: {terminating}}}",
                !terminating
            )?;
        }
        Ok(yaml)
    }
}

impl Display for ServiceSpec {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "---\napiVersion: v1\nkind: Service\nmetadata:\n  name: {}\n", self.name)?;
        if !self.annotations.is_empty() {
            f.write_str("  annotations:\n")?;
            for (key, value) in &self.annotations {
                writeln!(f, "    {key}: '{value}'")?;
            }
        }
        f.write_str("spec:\n  type: LoadBalancer\n  ipFamilyPolicy: RequireDualStack\n  ports:\n")?;
        for Port { name, protocol, port, target } in &self.ports {
            writeln!(f, "  - {{name: {name}, protocol: {protocol}, port: {port}, targetPort: {target}}}")?;
        }
        f.write_str(&self.slice(false)?)?;
        f.write_str(&self.slice(true)?)
    }
}

/// The whole configuration: these Services, and the pool of the lab's VIPs.
#[must_use]
pub fn manifest(services: &[ServiceSpec]) -> String {
    let mut yaml = format!(
        "apiVersion: pointsman.dev/v1alpha1\nkind: AddressPool\nmetadata:\n  name: lab\nspec:\n  addresses: \
         ['{VIPS_V4}', '{VIPS_V6}']\n"
    );
    for service in services {
        yaml.push_str(&service.to_string());
    }
    yaml
}

/// Where clients reach a port of a Service, according to a status.
///
/// # Errors
/// When it has no VIP of that family.
pub fn vip(status: &Value, service: &str, v6: bool, port: Port) -> Result<SocketAddr> {
    let vips = list(status, "services").iter().filter(|found| found["name"] == service);
    let mut vips = vips.flat_map(|service| list(service, "vips")).filter_map(Value::as_str);
    let vip = vips.find_map(|vip| vip.parse::<IpAddr>().ok().filter(|vip| vip.is_ipv6() == v6));
    let vip = vip.with_context(|| format!("{service} has no VIP of that family in {status:#}"))?;
    Ok(SocketAddr::new(vip, port.port))
}

#[cfg(test)]
mod tests {
    use lb_control::source::file::decode;

    use super::{ECHO, HTTP, ServiceSpec, UDP, manifest};

    #[test]
    fn is_understood() {
        let web =
            ServiceSpec::new("web", &[HTTP, UDP], &[1, 2]).annotated("pointsman.dev/allow-shared-ip", "key");
        let idle = ServiceSpec::new("idle", &[ECHO], &[]);
        let decoded = decode("services.yaml", &manifest(&[web.terminating(2), idle]));
        assert!(decoded.unreadable.is_empty() && decoded.ignored.is_empty(), "{decoded:?}");
        assert_eq!(decoded.documents.len(), 7);
        let wrong: Vec<_> = decoded.documents.iter().filter(|document| document.item.is_err()).collect();
        assert!(wrong.is_empty(), "{wrong:?}");
    }
}
