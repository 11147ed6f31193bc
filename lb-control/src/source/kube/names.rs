//! Names that many objects have in common: of nodes, of zones.

use std::{collections::HashSet, sync::Arc};

/// Below so many names nothing is forgotten.
const FEW: usize = 1_024;

/// Keeps one copy of each name.
#[derive(Debug)]
pub struct Names {
    known: HashSet<Arc<str>>,
    /// With so many names it is time to forget those that nobody has any more.
    many: usize,
}

impl Default for Names {
    fn default() -> Self {
        Self { known: HashSet::new(), many: FEW }
    }
}

impl Names {
    /// Replaces a name by the copy that others have.
    pub fn share(&mut self, name: &mut Arc<str>) {
        if let Some(known) = self.known.get(name) {
            *name = Arc::clone(known);
            return;
        }
        if self.known.len() >= self.many {
            self.known.retain(|name| Arc::strong_count(name) > 1);
            self.many = FEW.max(self.known.len() * 2);
        }
        self.known.insert(Arc::clone(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_names_are_one_and_unused_ones_are_forgotten() {
        let mut names = Names::default();
        let mut first: Arc<str> = "worker-1".into();
        names.share(&mut first);
        for number in 0..10 * FEW {
            names.share(&mut format!("gone-{number}").into());
        }
        assert!(names.known.len() <= FEW);
        let mut again: Arc<str> = "worker-1".into();
        names.share(&mut again);
        assert!(Arc::ptr_eq(&first, &again));
    }
}
