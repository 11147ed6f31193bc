//! The Pointsman agent. ARCHITECTURE.md explains the floors; a module imports only from floors
//! below its own.

pub mod app;
pub mod cli;
pub mod crd;
pub mod dataplane;
pub mod http;
pub mod inspect;
pub mod model;
pub mod net;
pub mod plan;
pub mod ports;
pub mod probe;
pub mod proxy;
pub mod publish;
pub mod source;
pub mod telemetry;
pub mod view;
