//! What the agent shows about itself: the answers of its API and the input of the CLI's tables.
//!
//! Plain data. Ages and times are seconds, sizes are bytes, names are camelCase in JSON and YAML.

mod doctor;
mod drops;
mod flows;
pub mod render;
mod status;

pub use doctor::{DoctorView, FindingView, Severity};
pub use drops::{DropView, DropsView};
#[cfg(test)]
pub(crate) use flows::tests::flow as flow_for_tests;
pub use flows::{DEFAULT_FLOW_LIMIT, FlowFilter, FlowView, FlowsView};
pub use status::{
    AgentView, AttachMode, BackendView, ConnectionLimitView, DeviceView, FlowTableView, HealthView, PortView,
    ProblemView, ServedBy, ServiceState, ServiceView, StatusView, TrafficView,
};
