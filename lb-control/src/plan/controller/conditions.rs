//! What a Service's conditions and Events say.

use std::net::IpAddr;

use super::{Command, EventTarget};
use crate::{
    model::{Condition, Protocol, Service, Severity},
    plan::ipam::{Assigned, reason},
};

/// Prefix of our conditions.
pub(super) const PREFIX: &str = "pointsman.dev/";
/// Condition: whether the Service has addresses.
pub const ALLOCATED: &str = "pointsman.dev/Allocated";
/// Condition: whether nodes announce all of them.
pub const ANNOUNCED: &str = "pointsman.dev/Announced";

/// Condition: whether all ports are served. Stands only while one is not.
pub const PORTS_SERVED: &str = "pointsman.dev/PortsServed";

/// Whether the addresses of a Service are announced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Announced {
    /// All are, by these nodes.
    By(Vec<(IpAddr, String)>),
    /// One is not, and no node is fit to.
    NoNode(String),
    /// One is not yet.
    Waiting(String),
}

/// Our conditions as they stand.
pub(super) fn present(service: &Service) -> Vec<Condition> {
    let mut ours: Vec<_> =
        service.api.conditions.iter().filter(|it| it.kind.starts_with(PREFIX)).cloned().collect();
    ours.sort_by(|a, b| a.kind.cmp(&b.kind));
    ours
}

/// `a`, `a and b`, `a, b and c`.
fn list(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// Whether it has addresses.
pub(super) fn allocated(service: &Service, assigned: &Assigned) -> Condition {
    let problem = assigned.problems.first();
    let has = assigned.addresses.iter().map(|(address, pool)| match pool {
        Some(pool) => format!("{address} from pool {pool}"),
        None => address.to_string(),
    });
    let reason = match (problem.map(|problem| problem.severity), assigned.reason) {
        (None, _) => "AddressAllocated",
        (Some(_), reason::NO_FREE_ADDRESS) => "PoolExhausted",
        (Some(Severity::Warning), "") => reason::DRAINING,
        (Some(Severity::Error), "") => "AddressRefused",
        (Some(_), reason) => reason,
    };
    let message = problem.map_or_else(|| list(&has.collect::<Vec<_>>()), |problem| problem.message.clone());
    condition(service, ALLOCATED, !assigned.addresses.is_empty(), reason, message)
}

/// Whether they are announced.
pub(super) fn announced(service: &Service, state: &Announced) -> Condition {
    let (holds, reason, message) = match state {
        Announced::By(nodes) => {
            let parts: Vec<_> =
                nodes.iter().map(|(address, node)| format!("{address} by node {node}")).collect();
            (true, "Announced", list(&parts))
        }
        Announced::NoNode(why) => (false, "NoNode", why.clone()),
        Announced::Waiting(why) => (false, "NotServed", why.clone()),
    };
    condition(service, ANNOUNCED, holds, reason, message)
}

/// What of its ports is not served by any node, if there is such.
pub(super) fn unserved_ports(service: &Service) -> Option<Condition> {
    let sctp = service.ports.iter().filter(|port| port.protocol == Protocol::Sctp);
    let ports: Vec<_> = sctp.map(|port| port.port.to_string()).collect();
    let message = format!("SCTP is not supported: port {} is not served; use TCP or UDP", list(&ports));
    (!ports.is_empty()).then(|| condition(service, PORTS_SERVED, false, "ProtocolNotSupported", message))
}

fn condition(service: &Service, kind: &str, holds: bool, reason: &str, message: String) -> Condition {
    Condition {
        kind: kind.into(),
        status: if holds { "True" } else { "False" }.into(),
        reason: reason.into(),
        message,
        observed_generation: service.api.generation,
    }
}

/// An Event for each condition that says something new. Conditions in the API are what was told
/// already, so a new leader tells nothing twice.
pub(super) fn events(service: &Service, old: &[Condition], new: &[Condition]) -> Vec<Command> {
    let told = |it: &Condition| {
        old.iter().any(|old| (&old.kind, &old.reason, &old.message) == (&it.kind, &it.reason, &it.message))
    };
    let about = EventTarget::service(&service.object, &service.api.uid);
    let events = new.iter().filter(|it| !told(it)).map(|it| Command::Event {
        about: about.clone(),
        warning: !matches!(it.reason.as_str(), "AddressAllocated" | "Announced"),
        reason: it.reason.clone(),
        note: it.message.clone(),
    });
    events.collect()
}
