//! The Pointsman agent. ARCHITECTURE.md explains the floors; a module imports only from floors
//! below its own.

pub mod dataplane;
