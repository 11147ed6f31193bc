//! What the controller wants done at the API server, and what became of it.

use std::{borrow::Cow, net::IpAddr};

use crate::model::{Condition, Few, ObjectRef, Pool, PoolOrigin};

/// One write. Each names what it builds on, so that it fails where the object has since changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Creates a VirtualIP. That it exists already is a [`Outcome::Conflict`].
    CreateVirtualIp {
        /// The address, which also names the object.
        address: IpAddr,
        /// The pool that it was taken from, by [`Pool::key`](crate::model::Pool::key).
        pool: Option<String>,
        /// Who it is given to.
        services: Few<ObjectRef>,
        /// Who announces it.
        node: Option<String>,
    },
    /// Replaces the specification of a VirtualIP.
    UpdateVirtualIp {
        /// The address.
        address: IpAddr,
        /// Precondition.
        resource_version: String,
        /// The pool that it was taken from, by [`Pool::key`](crate::model::Pool::key).
        pool: Option<String>,
        /// Who it is given to.
        services: Few<ObjectRef>,
        /// Who announces it.
        node: Option<String>,
    },
    /// Deletes a VirtualIP.
    DeleteVirtualIp {
        /// The address.
        address: IpAddr,
        /// Precondition.
        uid: String,
        /// Precondition: nobody gave it away in the meantime.
        resource_version: String,
    },
    /// Writes the status of a VirtualIP: beside [Events](Topic), what agents write that do not
    /// lead.
    SetVirtualIpStatus {
        /// The address.
        address: IpAddr,
        /// Precondition.
        uid: String,
        /// Precondition: it is still given to this node, and nobody else has spoken since.
        resource_version: String,
        /// The node that serves it; `None` once it has let go.
        node: Option<String>,
        /// Services that it serves.
        services: Few<ObjectRef>,
    },
    /// Adds finalizers to a Service.
    AddFinalizers {
        /// The Service.
        service: ObjectRef,
        /// Precondition.
        uid: String,
        /// Precondition.
        resource_version: String,
        /// Those that are missing; the others stay.
        finalizers: Vec<String>,
    },
    /// Removes finalizers from a Service. That it is gone is as good.
    RemoveFinalizers {
        /// The Service.
        service: ObjectRef,
        /// Precondition.
        uid: String,
        /// Precondition.
        resource_version: String,
        /// Those that go; the others stay.
        finalizers: Vec<String>,
    },
    /// Applies a Service's status under [`FIELD_MANAGER`](crate::model::FIELD_MANAGER), without
    /// force. What is not in it and was ours goes.
    ApplyServiceStatus {
        /// The Service.
        service: ObjectRef,
        /// Precondition.
        uid: String,
        /// `status.loadBalancer.ingress`, each with `ipMode: VIP`; empty: the field is left out.
        ingress: Vec<IpAddr>,
        /// Our conditions.
        conditions: Vec<Condition>,
    },
    /// Writes `spec.externalIPs` and the annotation that says which are ours.
    SetExternalIps {
        /// The Service.
        service: ObjectRef,
        /// Precondition.
        resource_version: String,
        /// The whole list.
        all: Vec<String>,
        /// Those of them that are ours; none: the annotation goes.
        ours: Vec<String>,
    },
    /// Writes the status of a pool.
    SetPoolStatus {
        /// The pool, by [`Pool::key`](crate::model::Pool::key).
        pool: String,
        /// How many of its addresses are held.
        assigned: u64,
        /// How many are free; `u64::MAX` stands for that or more.
        available: u64,
        /// Its conditions.
        conditions: Vec<Condition>,
    },
    /// Writes an Event. Nothing waits for it, and it is not repeated; but see [`Topic`].
    Event {
        /// What it is about.
        about: EventTarget,
        /// Whether its type is Warning instead of Normal.
        warning: bool,
        /// Why, in CamelCase.
        reason: String,
        /// For people.
        note: String,
    },
}

/// What an agent says of a Service as its own node sees it, or of the node, whoever leads. Of the Events of
/// one topic the newest counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Topic {
    /// Whether the node can serve it.
    Serving,
    /// How many of its backends fail their health check.
    Health,
    /// How many of its backends the proxy avoids, since connects to them fail.
    Connects,
    /// Whether the node's tables have room for established flows.
    FlowTables,
}

impl Topic {
    /// All.
    pub const ALL: [Self; 4] = [Self::Serving, Self::Health, Self::Connects, Self::FlowTables];

    /// The reasons of its Events: that something is wrong, and, where that is told, that it is over.
    #[must_use]
    pub const fn reasons(self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::Serving => ("NodeCannotServe", None),
            Self::Health => ("BackendsUnhealthy", Some("BackendsHealthy")),
            Self::Connects => ("BackendsEjected", Some("BackendsReturned")),
            Self::FlowTables => ("FlowTableNearlyFull", Some("FlowTableHasRoom")),
        }
    }

    /// The topic of an Event, by its reason.
    #[must_use]
    pub fn of(reason: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|topic| {
            let (wrong, over) = topic.reasons();
            reason == wrong || Some(reason) == over
        })
    }

    /// Whether it counts something, of which more comes soon when some of it has come.
    #[must_use]
    pub const fn is_counted(self) -> bool {
        match self {
            Self::Serving | Self::FlowTables => false,
            Self::Health | Self::Connects => true,
        }
    }
}

impl Command {
    /// Whether only the leader may have it carried out.
    #[must_use]
    pub fn is_leaders(&self) -> bool {
        match self {
            Self::SetVirtualIpStatus { .. } => false,
            Self::Event { reason, .. } => Topic::of(reason).is_none(),
            _ => true,
        }
    }
}

/// What an Event is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventTarget {
    /// Its `apiVersion`, as in `v1`.
    pub api_version: Cow<'static, str>,
    /// Its kind.
    pub kind: &'static str,
    /// Its name.
    pub object: ObjectRef,
    /// Its identity; may be empty where it is not known.
    pub uid: String,
}

impl EventTarget {
    /// A Service.
    #[must_use]
    pub fn service(object: &ObjectRef, uid: &str) -> Self {
        Self { api_version: "v1".into(), kind: "Service", object: object.clone(), uid: uid.to_owned() }
    }

    /// A node. Its name stands for its identity, as in the kubelet's Events: those who look for Events of a
    /// node (`kubectl describe node`) take both.
    #[must_use]
    pub fn node(name: &str) -> Self {
        let object = ObjectRef::new("", name);
        Self { api_version: "v1".into(), kind: "Node", object, uid: name.to_owned() }
    }

    /// A pool, of our kind or of MetalLB's.
    #[must_use]
    pub fn pool(pool: &Pool) -> Self {
        let (api_version, kind, namespace) = match &pool.origin {
            PoolOrigin::Pointsman => ("pointsman.dev/v1alpha1", "AddressPool", ""),
            PoolOrigin::MetalLb(namespace) => ("metallb.io/v1beta1", "IPAddressPool", &**namespace),
        };
        let object = ObjectRef::new(namespace, &*pool.name);
        Self { api_version: api_version.into(), kind, object, uid: pool.uid.clone() }
    }
}

/// What became of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done; the watch will show it.
    Done,
    /// The object is other than the command takes it to be, exists already, or the fields belong
    /// to somebody else.
    Conflict(String),
    /// There is no such object (any more).
    Gone,
    /// We may not.
    Forbidden(String),
    /// Anything else: no answer, or an error of the server.
    Failed(String),
}
