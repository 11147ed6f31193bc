//! The controller's decisions: what the leader wants of the API server.

mod command;

pub use command::{Command, EventTarget, Outcome};
