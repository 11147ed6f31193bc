//! From what each kind tells to updates of the whole: nothing before everything is there, then
//! batches.

use std::collections::{BTreeMap, BTreeSet};

use tokio::sync::mpsc;

use super::{Fatal, Update, reflect::Note};
use crate::model::{ObjectChange, ObjectKey, Problem};

/// Changes of one update at most after the first, so that the first of them do not wait for long.
const BATCH: usize = 4096;

/// Gathers what the kinds tell.
#[derive(Default)]
pub struct Merge {
    waiting: BTreeSet<&'static str>,
    /// The last one of each object: until everything is there they may be many.
    changes: BTreeMap<ObjectKey, ObjectChange>,
    objects: BTreeMap<&'static str, Vec<Problem>>,
    trouble: BTreeMap<&'static str, Problem>,
    problems_changed: bool,
    synced: bool,
}

impl Merge {
    /// Nothing is told before these have been synced.
    #[must_use]
    pub fn new(waiting: impl IntoIterator<Item = &'static str>) -> Self {
        Self { waiting: waiting.into_iter().collect(), ..Self::default() }
    }

    /// Takes a note over.
    pub fn take(&mut self, note: Note) {
        match note {
            Note::Change(change) => self.change(change),
            Note::Started(kind) => {
                self.waiting.insert(kind);
            }
            Note::Synced(kind) => {
                self.waiting.remove(kind);
            }
            Note::Objects(kind, problems) => {
                self.objects.insert(kind, problems);
                self.problems_changed = true;
            }
            Note::Trouble(kind, Some(problem)) => {
                self.problems_changed |= self.trouble.insert(kind, problem.clone()) != Some(problem);
            }
            Note::Trouble(kind, None) => self.problems_changed |= self.trouble.remove(kind).is_some(),
            Note::Stopped(kind) => {
                self.waiting.remove(kind);
                self.problems_changed |= self.trouble.remove(kind).is_some();
                self.problems_changed |= self.objects.remove(kind).is_some();
            }
        }
    }

    fn change(&mut self, change: ObjectChange) {
        let key = change.key();
        if !self.synced && change.is_gone() {
            // Nobody was told that it was there.
            self.changes.remove(&key);
        } else {
            self.changes.insert(key, change);
        }
    }

    /// Whether another note may join what is gathered.
    #[must_use]
    pub fn has_room(&self) -> bool {
        !self.synced || self.changes.len() < BATCH
    }

    /// What is to be told now.
    pub fn update(&mut self) -> Option<Update> {
        let first = !self.synced && self.waiting.is_empty();
        self.synced |= first;
        let changes = if self.synced { std::mem::take(&mut self.changes) } else { BTreeMap::new() };
        let changes: Vec<_> = changes.into_values().collect();
        let problems = (std::mem::take(&mut self.problems_changed) || first).then(|| self.problems());
        let anything = first || !changes.is_empty() || problems.is_some();
        anything.then_some(Update { synced: self.synced, changes, problems })
    }

    /// All problems. One cause (the server does not answer) that hits many kinds is told once.
    fn problems(&self) -> Vec<Problem> {
        let all: BTreeSet<&Problem> = self.trouble.values().chain(self.objects.values().flatten()).collect();
        all.into_iter().cloned().collect()
    }
}

/// Passes on what is told, until nobody listens or nobody tells any more.
pub async fn run(
    mut merge: Merge,
    mut notes: mpsc::Receiver<Note>,
    updates: mpsc::Sender<Result<Update, Fatal>>,
) {
    loop {
        let note = tokio::select! {
            note = notes.recv() => note,
            () = updates.closed() => return,
        };
        let Some(note) = note else { return };
        merge.take(note);
        while merge.has_room() {
            match notes.try_recv() {
                Ok(note) => merge.take(note),
                Err(_) => break,
            }
        }
        if let Some(update) = merge.update()
            && updates.send(Ok(update)).await.is_err()
        {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there(name: &str) -> Note {
        let node = crate::model::Node { name: name.into(), ..Default::default() };
        Note::Change(ObjectChange::Node(name.into(), Some(node.into())))
    }

    fn change(name: &str) -> Note {
        Note::Change(ObjectChange::Node(name.into(), None))
    }

    #[test]
    fn nothing_is_told_before_all_is_there() {
        let mut merge = Merge::new(["nodes", "services"]);
        merge.take(there("a"));
        merge.take(Note::Synced("nodes"));
        assert_eq!(merge.update(), None);
        merge.take(there("b"));
        merge.take(Note::Synced("services"));
        let update = merge.update().expect("all is there");
        assert!(update.synced);
        assert_eq!(update.changes.len(), 2);
        assert_eq!(update.problems, Some(Vec::new()));
        assert_eq!(merge.update(), None);
        merge.take(change("c"));
        assert_eq!(merge.update().map(|update| update.changes.len()), Some(1));
    }

    /// A relist while another kind cannot be read tells the same objects again and again.
    #[test]
    fn what_waits_is_not_more_than_there_is() {
        let mut merge = Merge::new(["nodes", "services"]);
        let node = |name: &str, excluded| {
            let node = crate::model::Node { name: name.into(), excluded, ..Default::default() };
            Note::Change(ObjectChange::Node(name.into(), Some(node.into())))
        };
        for round in 0..1_000 {
            merge.take(node("a", round % 2 == 0));
            merge.take(node("b", false));
            merge.take(change("b"));
        }
        assert_eq!(merge.changes.len(), 1);
        merge.take(Note::Synced("nodes"));
        merge.take(Note::Synced("services"));
        let update = merge.update().expect("all is there");
        let [ObjectChange::Node(name, Some(node))] = &update.changes[..] else { panic!("{update:?}") };
        assert!(name == "a" && !node.excluded, "the last one");
    }

    #[test]
    fn an_empty_cluster_is_told_too() {
        let mut merge = Merge::new(["nodes"]);
        merge.take(Note::Synced("nodes"));
        assert!(merge.update().is_some_and(|update| update.synced && update.changes.is_empty()));
    }

    #[test]
    fn problems_are_told_at_once_without_changes() {
        let mut merge = Merge::new(["nodes", "services"]);
        merge.take(change("a"));
        merge.take(Note::Trouble("nodes", Some(Problem::error("no answer"))));
        merge.take(Note::Trouble("services", Some(Problem::error("no answer"))));
        let update = merge.update().expect("a problem");
        assert!(!update.synced && update.changes.is_empty());
        assert_eq!(update.problems.unwrap().len(), 1, "one cause");
        merge.take(Note::Trouble("nodes", Some(Problem::error("no answer"))));
        assert_eq!(merge.update(), None, "nothing new");
        merge.take(Note::Trouble("nodes", None));
        merge.take(Note::Trouble("services", None));
        assert_eq!(merge.update().unwrap().problems, Some(Vec::new()));
    }

    #[test]
    fn a_kind_that_comes_or_goes_before_all_is_there() {
        let mut merge = Merge::new(["metallb"]);
        merge.take(Note::Started("pools"));
        merge.take(Note::Synced("metallb"));
        assert_eq!(merge.update(), None);
        merge.take(Note::Objects("pools", vec![Problem::error("bad")]));
        assert!(merge.update().is_some_and(|update| !update.synced));
        merge.take(Note::Stopped("pools"));
        let update = merge.update().expect("nothing to wait for");
        assert!(update.synced && update.problems == Some(Vec::new()));
    }
}
