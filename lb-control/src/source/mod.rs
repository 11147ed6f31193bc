//! Where Services come from.

pub mod convert;
pub mod file;
pub mod kube;
pub mod pools;
mod waiting;

pub use waiting::Waiting;

use crate::model::{ObjectChange, Problem};

/// What a source tells. The first one that is `synced` has every object that there is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Update {
    /// Whether the source has read everything. Before, there are no changes, only problems.
    pub synced: bool,
    /// Objects that came, changed or went.
    pub changes: Vec<ObjectChange>,
    /// All that is wrong with the source and its objects, if that is other than before.
    pub problems: Option<Vec<Problem>>,
}
