//! The domain: what is asked for, what the data plane has to do, and what people are told.
//!
//! Plain values. No clock, no I/O, and nothing of the API that objects came from.

mod desired;
mod object;
mod pool;
mod problem;
mod report;
mod service;

pub use desired::{Backends, Desired, DesiredBackend, DesiredEntry, Role, ServiceKey};
pub use object::{ObjectRef, Objects, Place};
pub use pool::{AddressRange, BadRange, Pool};
pub use problem::{Problem, Severity};
pub use report::{BackendReport, PortReport, ServiceReport, ServiceState, VipReport};
pub use service::{
    ANNOTATION_ADDRESSES, ANNOTATION_POOL, ANNOTATION_SHARING, Endpoint, EndpointPort, EndpointSlice, Family,
    FamilyPolicy, LOAD_BALANCER_CLASS, Protocol, Service, ServicePort, TargetPort,
};
