//! What is wrong with the cluster: what its source says, and writes that it does not allow us.

use std::collections::BTreeMap;

use crate::{
    model::Problem,
    plan::controller::{Command, Outcome},
    publish::Call,
};

/// Problems of both.
#[derive(Debug, Default)]
pub struct Refusals {
    source: Vec<Problem>,
    /// By verb and resource: a role lacks a rule for all objects of a kind alike.
    refused: BTreeMap<(&'static str, &'static str), String>,
}

impl Refusals {
    /// What the source says is wrong, and nothing else of it is. Gives everything that is wrong.
    pub fn source(&mut self, problems: Vec<Problem>) -> Vec<Problem> {
        self.source = problems;
        self.all()
    }

    /// What became of a write. Gives everything that is wrong if that is other than before.
    pub fn wrote(&mut self, command: &Command, outcome: &Outcome) -> Option<Vec<Problem>> {
        let Call { verb, resource } = Call::of(command);
        let key = (verb, resource);
        let changed = match outcome {
            // One object stands for all of them: which it is does not matter.
            Outcome::Forbidden(_) if self.refused.contains_key(&key) => false,
            Outcome::Forbidden(why) => self.refused.insert(key, why.clone()).is_none(),
            // Rights come first in the API server: whoever gets that far has them.
            Outcome::Done | Outcome::Conflict(_) | Outcome::Gone => self.refused.remove(&key).is_some(),
            Outcome::Failed(_) => false,
        };
        changed.then(|| self.all())
    }

    fn all(&self) -> Vec<Problem> {
        let refused = self.refused.iter().map(|((verb, resource), why)| {
            Problem::error(format!(
                "RBAC does not let Pointsman {verb} {resource}; it is tried again, and what is served stays: {why}"
            ))
        });
        self.source.iter().cloned().chain(refused).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ObjectRef;

    #[test]
    fn a_refusal_is_told_once_until_it_is_over() {
        let status = |name: &str| Command::ApplyServiceStatus {
            service: ObjectRef::new("default", name),
            uid: String::new(),
            ingress: Vec::new(),
            conditions: Vec::new(),
        };
        let mut refusals = Refusals::default();
        let forbidden = Outcome::Forbidden("no rule".into());
        assert_eq!(refusals.wrote(&status("a"), &Outcome::Done), None);
        let problems = refusals.wrote(&status("a"), &forbidden).expect("news");
        assert!(problems[0].message.contains("patch services/status"), "{problems:?}");
        assert_eq!(refusals.wrote(&status("b"), &forbidden), None, "the same rule");
        assert_eq!(refusals.wrote(&status("b"), &Outcome::Failed("late".into())), None, "says nothing");
        assert_eq!(refusals.source(vec![Problem::error("bad")]).len(), 2);
        assert_eq!(refusals.wrote(&status("b"), &Outcome::Done), Some(vec![Problem::error("bad")]));
    }
}
