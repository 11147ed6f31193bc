//! Who is asked whether he works, for which Services, and who does not.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use crate::{
    model::{CheckTarget, Few, ObjectRef},
    plan::resolve::Unhealthy,
};

#[derive(Default)]
pub(super) struct Targets {
    /// Only Services that have some.
    of: HashMap<ObjectRef, BTreeSet<CheckTarget>>,
    services: BTreeMap<CheckTarget, Few<ObjectRef>>,
    /// Only of those that are asked.
    unhealthy: Unhealthy,
}

impl Targets {
    pub(super) fn is_asked(&self, target: &CheckTarget) -> bool {
        self.services.contains_key(target)
    }

    /// A Service that it is asked for, always the same as long as the Services are.
    pub(super) fn asked_for(&self, target: &CheckTarget) -> Option<&ObjectRef> {
        self.services.get(target)?.iter().next()
    }

    #[cfg(test)]
    pub(super) fn asked(&self) -> BTreeSet<CheckTarget> {
        self.services.keys().cloned().collect()
    }

    pub(super) fn unhealthy(&self) -> &Unhealthy {
        &self.unhealthy
    }

    /// Whom a Service has asked from now on. Notes in `before` who was asked so far.
    pub(super) fn replace(
        &mut self,
        service: &ObjectRef,
        new: BTreeSet<CheckTarget>,
        before: &mut BTreeMap<CheckTarget, bool>,
    ) {
        let old = self.of.remove(service).unwrap_or_default();
        for target in old.symmetric_difference(&new) {
            before.entry(target.clone()).or_insert_with(|| self.services.contains_key(target));
            let services = self.services.entry(target.clone()).or_default();
            if new.contains(target) {
                services.insert(service.clone());
            } else {
                services.remove(service);
            }
            if services.is_empty() {
                self.services.remove(target);
            }
        }
        if !new.is_empty() {
            self.of.insert(service.clone(), new);
        }
    }

    /// After all Services are through: who is asked now and was not before, or the other way round.
    /// Nothing is known any more of those who are not.
    pub(super) fn settle(&mut self, before: BTreeMap<CheckTarget, bool>) -> BTreeSet<CheckTarget> {
        let others = before.into_iter().filter(|(target, was)| self.is_asked(target) != *was);
        let others: BTreeSet<_> = others.map(|(target, _)| target).collect();
        for target in &others {
            self.unhealthy.remove(target);
        }
        others
    }

    /// Takes over who works and who does not, and gives the Services that this is something to. Of those
    /// who are not asked any more, word may still be on its way.
    pub(super) fn learn(
        &mut self,
        verdicts: impl IntoIterator<Item = (CheckTarget, Option<Arc<str>>)>,
    ) -> BTreeSet<ObjectRef> {
        let mut concerned = BTreeSet::new();
        for (target, why) in verdicts {
            let Some(services) = self.services.get(&target) else { continue };
            if self.unhealthy.get(&target) == why.as_ref() {
                continue;
            }
            concerned.extend(services.iter().cloned());
            match why {
                Some(why) => drop(self.unhealthy.insert(target, why)),
                None => drop(self.unhealthy.remove(&target)),
            }
        }
        concerned
    }
}
