//! Updates that wait for somebody who is busy.

use std::collections::BTreeMap;

use super::Update;
use crate::model::{ObjectChange, ObjectKey, Problem};

/// Several updates as one: of each object only what came last, so that what waits is never more than
/// there are objects, however long it waits.
#[derive(Debug, Default)]
pub struct Waiting {
    something: bool,
    synced: bool,
    changes: BTreeMap<ObjectKey, ObjectChange>,
    problems: Option<Vec<Problem>>,
}

impl Waiting {
    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.something
    }

    /// One more.
    pub fn push(&mut self, update: Update) {
        self.something = true;
        self.synced |= update.synced;
        self.changes.extend(update.changes.into_iter().map(|change| (change.key(), change)));
        if update.problems.is_some() {
            self.problems = update.problems;
        }
    }

    /// All of them, if there is any.
    pub fn take(&mut self) -> Option<Update> {
        let Self { something, synced, changes, problems } = std::mem::take(self);
        something.then(|| Update { synced, changes: changes.into_values().collect(), problems })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::Namespace;

    fn namespace(name: &str, label: Option<&str>) -> ObjectChange {
        let value = label.map(|label| {
            Arc::new(Namespace { name: name.into(), labels: [("l".into(), label.into())].into() })
        });
        ObjectChange::Namespace(name.into(), value)
    }

    #[test]
    fn of_each_object_the_last_counts() {
        let mut waiting = Waiting::default();
        assert!(waiting.is_empty() && waiting.take().is_none());
        for round in 0..1_000 {
            let label = round.to_string();
            let changes = vec![namespace("a", Some(&label)), namespace("b", Some(&label))];
            waiting.push(Update { synced: true, changes, problems: None });
        }
        waiting.push(Update { problems: Some(vec![Problem::error("first")]), ..Update::default() });
        waiting.push(Update {
            changes: vec![namespace("b", None)],
            problems: Some(Vec::new()),
            synced: false,
        });
        let update = waiting.take().expect("something waits");
        assert_eq!(update.changes, [namespace("a", Some("999")), namespace("b", None)]);
        assert!(update.synced && update.problems == Some(Vec::new()));
        assert!(waiting.is_empty());
        // It is no more than what came since.
        waiting.push(Update { problems: Some(Vec::new()), ..Update::default() });
        assert!(waiting.take().is_some_and(|update| !update.synced && update.changes.is_empty()));
    }
}
