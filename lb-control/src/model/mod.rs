//! The domain: what is asked for, what the data plane has to do, and what people are told.
//!
//! Plain values. No clock, no I/O, and nothing of the API that objects came from.

mod api;
mod backend_check;
mod change;
mod client_address;
mod cluster;
mod connection_limit;
mod desired;
mod few;
mod object;
mod pool;
mod problem;
mod report;
mod scheduler;
mod selector;
mod service;
mod unreadable;
mod weights;

pub use api::{ANNOTATION_UNINSTALL, ApiState, Condition, FIELD_MANAGER, Ingress};
pub use backend_check::{BackendCheck, BadCheck, CheckKind, CheckTarget};
pub use change::{ObjectChange, ObjectKey};
pub use client_address::{ClientAddress, UnknownClientAddress};
pub use cluster::{Advertisement, AgentLease, LABEL_EXCLUDE, LABEL_ZONE, Namespace, Node, VirtualIp};
pub use connection_limit::parse_connection_limit;
pub use desired::{Backends, Desired, DesiredBackend, DesiredEntry, Role, ServiceKey};
pub use few::Few;
pub use object::{ObjectRef, Objects, Place};
pub use pool::{AddressRange, BadRange, Pool, PoolOrigin};
pub use problem::{Problem, Severity, causes};
pub use report::{
    BackendHealth, BackendReport, HealthReport, PortReport, ServiceReport, ServiceState, VipReport,
};
pub use scheduler::{BadSlowStart, Scheduler, SlowStart, UnknownScheduler};
pub use selector::{Labels, Operator, Requirement, Selector};
pub use service::{
    ANNOTATION_ADDRESSES, ANNOTATION_CLIENT_ADDRESS, ANNOTATION_CONNECTION_RATE, ANNOTATION_EXTERNAL_IPS,
    ANNOTATION_HEALTH_CHECK, ANNOTATION_POOL, ANNOTATION_SCHEDULER, ANNOTATION_SHARING,
    ANNOTATION_SLICE_WEIGHT, ANNOTATION_SLOW_START, ANNOTATION_WEIGHTS, Endpoint, EndpointPort,
    EndpointSlice, Family, FamilyPolicy, LOAD_BALANCER_CLASS, METALLB_PREFIXES, Protocol, Service,
    ServicePort, TargetPort,
};
pub use unreadable::{Concern, KindAndName, Unreadable};
pub use weights::{BadWeights, Weights};
