//! Who manages which fields: `metadata.managedFields`.

use serde_json::Value;

use super::{kinds::Kind, strategy::Part};

/// Who writes, and how.
#[derive(Clone, Debug, Default)]
pub struct Manager {
    /// The name.
    pub name: String,
    /// Whether this is a patch of any type.
    pub patch: bool,
    /// Of a server-side apply: whether it is forced.
    pub apply: Option<bool>,
}

/// Notes in `new` who manages what after a change.
pub fn update(_kind: &Kind, _part: Part, _manager: &Manager, _old: Option<&Value>, _new: &mut Value) {}
