//! Events at objects that cannot be read: whoever wrote them looks there first.

use super::{Command, Controller, EventTarget};
use crate::model::{Concern, LOAD_BALANCER_CLASS, Unreadable};

impl Controller {
    /// An Event for each object of our concern that says something else now that cannot be read.
    pub(super) fn unreadable_steps(&mut self) -> Vec<Command> {
        let keys = std::mem::take(&mut self.dirty.unreadable);
        let found = keys.iter().filter_map(|key| self.objects.unreadable.get(key));
        found.filter(|it| self.concerns_us(&it.concern)).map(|it| event(it)).collect()
    }

    fn concerns_us(&self, concern: &Concern) -> bool {
        match concern {
            Concern::Always => true,
            Concern::Never => false,
            Concern::Class(Some(class)) => class == LOAD_BALANCER_CLASS,
            Concern::Class(None) => self.options.default_class,
            Concern::Of(service) => {
                self.objects.services.get(service).is_some_and(|service| self.is_served(service))
            }
        }
    }
}

fn event(from: &Unreadable) -> Command {
    Command::Event {
        about: EventTarget {
            api_version: from.api_version.clone().into(),
            kind: from.kind,
            object: from.object.clone(),
            uid: from.uid.clone(),
        },
        warning: true,
        reason: "InvalidConfiguration".into(),
        note: from.reasons.join("; "),
    }
}
