//! Where Services come from.

pub mod convert;
pub mod file;
pub mod kube;
pub mod pools;

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

impl Update {
    /// This one and then the next, as one.
    #[must_use]
    pub fn followed_by(mut self, next: Self) -> Self {
        self.changes.extend(next.changes);
        Self {
            synced: self.synced || next.synced,
            changes: self.changes,
            problems: next.problems.or(self.problems),
        }
    }
}
