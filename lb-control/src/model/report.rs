//! What people are told about a Service; `pointsman status` shows it.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::{ObjectRef, Problem, Protocol, Role};

/// Where a Service is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ServiceState {
    /// Has no address yet, and gets one as soon as one is free.
    Pending,
    /// Is served.
    Active,
    /// Has its address, but no backend on any port: connections are refused.
    NoBackends,
    /// Cannot be served until somebody changes it, or what is in its way.
    Failed,
}

/// An address of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VipReport {
    /// The address.
    pub address: IpAddr,
    /// The pool that it lies in, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
}

/// A backend of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendReport {
    /// Address and port.
    pub address: SocketAddr,
    /// Whether it takes new connections.
    pub role: Role,
    /// Its share relative to the others.
    pub weight: u32,
    /// What its health check tells; `None` if nobody asks. If all fail, all take connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<BackendHealth>,
}

/// What a health check tells of a backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BackendHealth {
    /// It works, or has not failed often enough yet.
    Healthy,
    /// It does not; why.
    Unhealthy(String),
}

impl BackendHealth {
    /// Why it does not work; `None` if it does.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        match self {
            Self::Healthy => None,
            Self::Unhealthy(why) => Some(why),
        }
    }
}

/// What health checks tell of a Service's backends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthReport {
    /// How they are asked.
    pub check: String,
    /// How many of those that this node asks did not fail.
    pub healthy: usize,
    /// How many of them did.
    pub unhealthy: usize,
}

/// A port of a Service, with the backends of all its VIPs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortReport {
    /// Name; may be empty.
    pub name: String,
    /// Protocol.
    pub protocol: Protocol,
    /// Port of the VIP.
    pub port: u16,
    /// Backends.
    pub backends: Vec<BackendReport>,
}

/// A Service that is ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceReport {
    /// Namespace and name.
    #[serde(flatten)]
    pub object: ObjectRef,
    /// Where it is in its life.
    pub state: ServiceState,
    /// Its addresses.
    pub vips: Vec<VipReport>,
    /// Its ports.
    pub ports: Vec<PortReport>,
    /// What health checks tell of its backends; `None` without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthReport>,
    /// What is wrong.
    pub problems: Vec<Problem>,
}
