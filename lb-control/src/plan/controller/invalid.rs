//! Objects that cannot be taken as they are, and telling those who wrote them.

use std::collections::BTreeMap;

use super::{Command, EventTarget};
use crate::model::{ObjectRef, Problem};

/// What is wrong with objects, and whether an Event has told of it.
#[derive(Default)]
pub(super) struct Invalid(BTreeMap<Problem, bool>);

impl Invalid {
    /// Everything that is wrong now. What is wrong anew after it was mended is told anew.
    pub fn are_now(&mut self, problems: &[Problem]) {
        let told = |problem: &Problem| self.0.get(problem).copied().unwrap_or_default();
        self.0 = problems.iter().map(|problem| (problem.clone(), told(problem))).collect();
    }

    /// An Event for each that was not told of.
    pub fn events(&mut self) -> Vec<Command> {
        let untold = self.0.iter_mut().filter(|(_, is_told)| !**is_told);
        let tell = |(problem, is_told): (&Problem, &mut bool)| {
            *is_told = true;
            event(problem)
        };
        untold.filter_map(tell).collect()
    }
}

/// `None` for what is about no object of a kind that people write.
fn event(problem: &Problem) -> Option<Command> {
    let (api_version, kind) = match problem.kind.as_str() {
        "Service" => ("v1", "Service"),
        "EndpointSlice" => ("discovery.k8s.io/v1", "EndpointSlice"),
        "AddressPool" => ("pointsman.dev/v1alpha1", "AddressPool"),
        "IPAddressPool" => ("metallb.io/v1beta1", "IPAddressPool"),
        "L2Advertisement" => ("metallb.io/v1beta1", "L2Advertisement"),
        "BGPAdvertisement" => ("metallb.io/v1beta1", "BGPAdvertisement"),
        _ => return None,
    };
    let object: ObjectRef = problem.object.clone()?;
    let note = match &problem.field {
        Some(field) => format!("{field}: {}", problem.message),
        None => problem.message.clone(),
    };
    Some(Command::Event {
        about: EventTarget { api_version, kind, object, uid: problem.uid.clone() },
        warning: true,
        reason: "Invalid".into(),
        note,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bad(kind: &str, message: &str) -> Problem {
        Problem::error(message).about(kind, &ObjectRef::new("default", "web")).uid(Some("u")).field("spec")
    }

    #[test]
    fn each_is_told_once_until_it_was_mended() {
        let mut invalid = Invalid::default();
        invalid.are_now(&[bad("Service", "a"), Problem::error("no answer"), bad("Node", "b")]);
        let events = invalid.events();
        let about = EventTarget::service(&ObjectRef::new("default", "web"), "u");
        let (warning, reason, note) = (true, "Invalid".to_owned(), "spec: a".to_owned());
        assert_eq!(events, [Command::Event { about, warning, reason, note }]);
        invalid.are_now(&[bad("Service", "a"), bad("AddressPool", "c")]);
        assert_eq!(invalid.events().len(), 1, "the other was told");
        invalid.are_now(&[]);
        assert!(invalid.events().is_empty());
        invalid.are_now(&[bad("Service", "a")]);
        assert_eq!(invalid.events().len(), 1, "it is wrong again");
    }
}
