//! What is written to the API server: Leases, and the controller's commands.

mod lease;

pub use lease::{Claim, Hold, hold};
