//! What the API server has about a Service beside its specification.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// The name that we go by in `managedFields`.
pub const FIELD_MANAGER: &str = "pointsman";

/// The annotation of the leader's Lease that asks all agents to let go of everything for good.
pub const ANNOTATION_UNINSTALL: &str = "pointsman.dev/uninstall";

/// State of the object that publishing decides by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApiState {
    /// Identity: a Service that was deleted and created again has another.
    pub uid: String,
    /// Version that a change builds on.
    pub resource_version: String,
    /// Generation of the specification.
    pub generation: i64,
    /// It is being deleted and waits for its finalizers.
    pub deleting: bool,
    /// Its finalizers.
    pub finalizers: Vec<String>,
    /// `status.loadBalancer.ingress`.
    pub ingress: Vec<Ingress>,
    /// Whether the ingress is ours by `managedFields`.
    pub ingress_is_ours: bool,
    /// `status.conditions`, ours and others'.
    pub conditions: Vec<Condition>,
    /// `spec.externalIPs`.
    pub external_ips: Vec<String>,
    /// Which of them we wrote, by our own annotation.
    pub our_external_ips: Vec<String>,
}

/// An element of `status.loadBalancer.ingress`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ingress {
    /// The address.
    pub ip: Option<IpAddr>,
    /// Or a name, which we never write.
    pub hostname: Option<String>,
    /// `VIP` or `Proxy`.
    pub ip_mode: Option<String>,
}

/// A condition, as in `metav1.Condition`, without its times.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// What it is about.
    pub kind: String,
    /// Whether it holds: `True`, `False`, `Unknown`.
    pub status: String,
    /// Why, in CamelCase.
    pub reason: String,
    /// Why, for people.
    pub message: String,
    /// Generation of the specification that it is about.
    pub observed_generation: i64,
}
