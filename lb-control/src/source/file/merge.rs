//! Files to a snapshot, with what was good before. Pure.

use std::{collections::BTreeMap, sync::Arc};

use super::decode::{Decoded, Document, Item};
use crate::model::{ObjectRef, Objects, Problem};

/// What was found where a file should be.
#[derive(Clone, Debug)]
pub enum FileState {
    /// Its content.
    Read(Arc<Decoded>),
    /// It is there, but its content cannot be had; why.
    Unopenable(String),
}

/// What a source knows, and what is wrong with it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// The objects in force.
    pub objects: Objects,
    /// What is wrong, in the order of files and documents.
    pub problems: Vec<Problem>,
}

type Key = (&'static str, ObjectRef);

struct InForce {
    file: String,
    item: Item,
}

/// Remembers what is in force.
#[derive(Default)]
pub struct Merger {
    in_force: BTreeMap<Key, InForce>,
    problems: Vec<Problem>,
}

impl Merger {
    /// Takes in the present state of all files, in their order. What is in force afterwards is
    /// told by [`snapshot`](Self::snapshot).
    pub fn merge(&mut self, files: &[(String, FileState)]) {
        let mut problems = Vec::new();
        let mut candidates: BTreeMap<Key, Vec<&Document>> = BTreeMap::new();
        // Whether objects of the file that are not seen may still be in it.
        let mut keeps: BTreeMap<&str, bool> = BTreeMap::new();
        for (file, state) in files {
            match state {
                FileState::Unopenable(why) => {
                    keeps.insert(file, true);
                    problems.push(unopenable(file, why));
                }
                FileState::Read(decoded) => {
                    keeps.insert(file, !decoded.unreadable.is_empty());
                    problems.extend(decoded.unreadable.iter().cloned().map(still_in_force));
                    problems.extend(decoded.ignored.iter().cloned());
                    for document in &decoded.documents {
                        candidates
                            .entry((document.kind, document.object.clone()))
                            .or_default()
                            .push(document);
                    }
                }
            }
        }
        let mut before = std::mem::take(&mut self.in_force);
        for (key, documents) in &candidates {
            let old = before.remove(key);
            let chosen = choose(documents, old.as_ref(), &mut problems);
            if let Some(in_force) = decide(chosen, old, &mut problems) {
                self.in_force.insert(key.clone(), in_force);
            }
        }
        self.in_force.extend(
            before.into_iter().filter(|(_, old)| keeps.get(old.file.as_str()).copied().unwrap_or(false)),
        );
        problems.sort_by(|a, b| a.place.cmp(&b.place));
        self.problems = problems;
    }

    /// Takes in that the configuration as a whole cannot be had. Everything stays in force.
    pub fn missing(&mut self, path: &str, why: &str) {
        self.problems = vec![
            Problem::error(format!("{why}; what was read before stays in force"))
                .at(&crate::model::Place { file: path.to_owned(), ..Default::default() }),
        ];
    }

    /// What is in force, and what is wrong.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let mut objects = Objects::default();
        for ((_, object), in_force) in &self.in_force {
            match &in_force.item {
                Item::Service(service) => {
                    objects.services.insert(object.clone(), service.clone());
                }
                Item::Slice(slice) => {
                    objects.slices.insert(object.clone(), slice.clone());
                }
                Item::Pool(pool) => {
                    objects.pools.insert(object.name.clone(), pool.clone());
                }
            }
        }
        Snapshot { objects, problems: self.problems.clone() }
    }
}

fn unopenable(file: &str, why: &str) -> Problem {
    let place = crate::model::Place { file: file.to_owned(), ..Default::default() };
    Problem::error(format!("{why}; what was read from it before stays in force")).at(&place)
}

fn still_in_force(mut problem: Problem) -> Problem {
    problem.message.push_str("; objects of this file that are missing now stay in force");
    problem
}

/// Of several objects with one name, the one that is in force, or else the first.
fn choose<'a>(
    documents: &[&'a Document],
    old: Option<&InForce>,
    problems: &mut Vec<Problem>,
) -> &'a Document {
    let chosen = old
        .and_then(|old| documents.iter().find(|document| document.place.file == old.file))
        .unwrap_or(&documents[0]);
    for other in documents.iter().filter(|other| other.place != chosen.place) {
        problems.push(
            Problem::error(format!("is defined a second time; the one in {} counts", chosen.place))
                .at(&other.place)
                .about(other.kind, &other.object),
        );
    }
    chosen
}

fn decide(document: &Document, old: Option<InForce>, problems: &mut Vec<Problem>) -> Option<InForce> {
    match &document.item {
        Ok(item) => {
            // Equal content keeps its `Arc`: whoever follows compares pointers.
            let item = match old {
                Some(old) if old.item == *item => old.item,
                _ => item.clone(),
            };
            Some(InForce { file: document.place.file.clone(), item })
        }
        Err(errors) => {
            let suffix = if old.is_some() { "; its last good version stays in force" } else { "" };
            problems.extend(errors.iter().cloned().map(|mut problem| {
                problem.message.push_str(suffix);
                problem
            }));
            old
        }
    }
}
