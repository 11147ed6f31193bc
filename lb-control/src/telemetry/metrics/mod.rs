//! Metrics for Prometheus: the table of all that there are, values at one time, and counters of
//! what happens in the agent itself.
//!
//! Labels have few values, or those of objects; never the text of an error.

mod recorder;
mod samples;
pub mod table;

pub use recorder::{Outcome, Recorder};
pub use samples::{CONTENT_TYPE, Labels, Samples, labels};
