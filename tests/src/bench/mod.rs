//! `pointsman-bench`: what a packet costs, and what the control plane costs, beside baselines
//! measured in the same run.

pub mod baselines;
pub mod bulk;
pub mod control;
pub mod cost;
pub mod live;
pub mod machine;
pub mod net;
pub mod packets;
pub mod product;
pub mod proxy;
pub mod report;
pub mod sustained;
mod variants;
