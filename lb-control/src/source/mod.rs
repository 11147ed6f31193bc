//! Where Services come from.

pub mod convert;
pub mod file;
pub mod kube;
pub mod pools;

use crate::model::{ObjectChange, Problem};

/// What a source tells. The first one is complete: it has every object that there is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Update {
    /// Objects that came, changed or went.
    pub changes: Vec<ObjectChange>,
    /// All that is wrong with the source and its objects, if that is other than before.
    pub problems: Option<Vec<Problem>>,
}
