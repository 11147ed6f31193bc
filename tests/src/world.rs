//! What the end-to-end suites start from: a lab, its servers, and a Service `web`.

use std::net::SocketAddr;

use anyhow::Result;
use serde_json::Value;

use crate::{
    lab::{
        Agent, Lab, Options, in_kernel, is_root,
        manifest::{ECHO, HTTP, Port, ServiceSpec, UDP, manifest, vip},
    },
    traffic::Server,
};

/// A lab with servers on all backends. Its agent is a value of its own, so that tests can end it.
#[derive(Debug)]
pub struct World {
    /// Of each backend; to be dropped one by one for backends that die.
    pub servers: Vec<Server>,
    /// The lab.
    pub lab: Lab,
}

impl World {
    /// Nothing without root; the reason is printed.
    ///
    /// # Errors
    /// When the lab or a server cannot be started.
    pub fn new(backends: u8) -> Result<Option<Self>> {
        Self::with(Options { backends, ..Options::default() })
    }

    /// As [`Self::new`], with options.
    ///
    /// # Errors
    /// When the lab or a server cannot be started.
    pub fn with(options: Options) -> Result<Option<Self>> {
        if !is_root() {
            return Ok(None);
        }
        let lab = Lab::new(options)?;
        let mut servers = Server::start_all(&lab.backends)?;
        servers.extend(Server::start_all(&lab.pods)?);
        Ok(Some(Self { servers, lab }))
    }

    /// The agent with a Service `web` of all ports and these backends, and its status once it is
    /// served.
    ///
    /// # Errors
    /// When it is not in time.
    pub fn web(&self, backends: &[u8]) -> Result<(Agent<'_>, Value)> {
        self.web_with(backends, &[])
    }

    /// As [`Self::web`], by an agent that forwards in the kernel in every run.
    ///
    /// # Errors
    /// When it is not in time.
    pub fn web_in_kernel(&self, backends: &[u8]) -> Result<(Agent<'_>, Value)> {
        self.web_with(backends, in_kernel())
    }

    fn web_with(&self, backends: &[u8], flags: &[&str]) -> Result<(Agent<'_>, Value)> {
        let agent = Agent::start_with(&self.lab, &web(backends), flags)?;
        let status = agent.wait_ready()?;
        Ok((agent, status))
    }
}

/// The configuration of [`World::web`].
#[must_use]
pub fn web(backends: &[u8]) -> String {
    manifest(&[web_service(backends)])
}

/// The Service of [`World::web`].
#[must_use]
pub fn web_service(backends: &[u8]) -> ServiceSpec {
    ServiceSpec::new("web", &[HTTP, ECHO, UDP], backends)
}

/// IPv4 and IPv6 address of a port of the Service `web`.
///
/// # Errors
/// When it lacks one.
pub fn both(status: &Value, port: Port) -> Result<[SocketAddr; 2]> {
    Ok([vip(status, "web", false, port)?, vip(status, "web", true, port)?])
}
