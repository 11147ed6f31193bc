//! What is written to the API server: Leases, and the controller's commands.

mod cleanup;
mod events;
mod executor;
mod lease;
mod requests;

pub use cleanup::{Cleanup, Removed};
pub use executor::{Count, Executor};
pub use lease::{Claim, Hold, hold};
pub use requests::Call;
