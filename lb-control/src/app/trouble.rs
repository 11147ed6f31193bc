//! What is wrong, by what it was tried for.

use std::collections::{BTreeMap, BTreeSet};

use tracing::warn;

use crate::model::{ObjectRef, Problem};

/// What something was tried for; each says anew what is wrong whenever it is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Area {
    /// Reading the objects.
    Source,
    /// The objects themselves.
    Objects,
    /// Reading the state of the network.
    Network,
    /// Attaching programs.
    Devices,
    /// Attaching programs for sockets of this node.
    Sockets,
    /// Serving by the userspace proxy.
    Proxy,
    /// Writing maps.
    Maps,
    /// Keeping flows.
    Flows,
    /// Keeping floods out.
    Floods,
    /// Putting addresses on the device.
    Addresses,
    /// Answering health checks of other load balancers.
    HealthChecks,
}

impl Area {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Source,
        Self::Objects,
        Self::Network,
        Self::Devices,
        Self::Sockets,
        Self::Proxy,
        Self::Maps,
        Self::Flows,
        Self::Floods,
        Self::Addresses,
        Self::HealthChecks,
    ];

    /// As metrics call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Objects => "objects",
            Self::Network => "network",
            Self::Devices => "devices",
            Self::Sockets => "sockets",
            Self::Proxy => "proxy",
            Self::Maps => "maps",
            Self::Flows => "flows",
            Self::Floods => "floods",
            Self::Addresses => "addresses",
            Self::HealthChecks => "health-checks",
        }
    }
}

/// Problems that there are, and those that the log has heard of.
#[derive(Debug, Default)]
pub struct Trouble {
    areas: BTreeMap<Area, Vec<Problem>>,
    logged: BTreeSet<String>,
    /// By Service, for those that have any.
    services: BTreeMap<ObjectRef, Vec<String>>,
    changed: bool,
}

impl Trouble {
    /// Takes everything back that was wrong with something.
    pub fn clear(&mut self, area: Area) {
        self.replace(area, Vec::new());
    }

    /// Says what is wrong with something, and nothing else is.
    pub fn replace(&mut self, area: Area, problems: Vec<Problem>) {
        if self.areas.get(&area).map_or(!problems.is_empty(), |before| *before != problems) {
            self.areas.insert(area, problems);
            self.changed = true;
        }
    }

    /// Says what else is wrong with something.
    pub fn extend(&mut self, area: Area, problems: impl IntoIterator<Item = Problem>) {
        let before = self.areas.get(&area).map_or(0, Vec::len);
        let all = self.areas.entry(area).or_default();
        all.extend(problems);
        self.changed |= all.len() != before;
    }

    /// Takes back what was wrong with some Services, and not with others.
    pub fn forget(&mut self, area: Area, services: &BTreeSet<ObjectRef>) {
        let is_about = |problem: &Problem| problem.object.as_ref().is_some_and(|one| services.contains(one));
        if let Some(all) = self.areas.get_mut(&area) {
            let before = all.len();
            all.retain(|problem| !is_about(problem));
            self.changed |= all.len() != before;
        }
    }

    /// Everything that is wrong, if that is other than at the last call. The log hears of what is
    /// new.
    pub fn news(&mut self) -> Option<Vec<Problem>> {
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        let all: Vec<_> = self.areas.values().flatten().cloned().collect();
        let texts: BTreeSet<_> = all.iter().map(ToString::to_string).collect();
        for text in texts.difference(&self.logged) {
            warn!("{text}");
        }
        self.logged = texts;
        Some(all)
    }

    /// How much is wrong with what.
    pub fn counts(&self) -> BTreeMap<&'static str, usize> {
        Area::ALL.iter().map(|area| (area.name(), self.areas.get(area).map_or(0, Vec::len))).collect()
    }

    /// Tells the log what is new about a Service.
    pub fn of_service(&mut self, object: &ObjectRef, problems: &[Problem]) {
        let texts: Vec<_> = problems.iter().map(ToString::to_string).collect();
        let before = self.services.get(object).map(Vec::as_slice).unwrap_or_default();
        for text in texts.iter().filter(|text| !before.contains(text)) {
            warn!("{text}");
        }
        if texts.is_empty() {
            self.services.remove(object);
        } else {
            self.services.insert(object.clone(), texts);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_are_told_once() {
        let mut trouble = Trouble::default();
        assert_eq!(trouble.news(), None);
        trouble.extend(Area::Maps, [Problem::error("full")]);
        assert_eq!(trouble.news(), Some(vec![Problem::error("full")]));
        assert_eq!(trouble.news(), None);
        trouble.replace(Area::Maps, vec![Problem::error("full")]);
        assert_eq!(trouble.news(), None, "the same again is nothing new");
        trouble.clear(Area::Devices);
        assert_eq!(trouble.news(), None);
        trouble.clear(Area::Maps);
        assert_eq!(trouble.news(), Some(Vec::new()));
    }

    #[test]
    fn what_is_wrong_with_a_service_is_taken_back_alone() {
        let [a, b] = ["a", "b"].map(|name| ObjectRef::new("default", name));
        let full = |service| Problem::error("full").about("Service", service);
        let mut trouble = Trouble::default();
        trouble.extend(Area::Maps, [full(&a), full(&b), Problem::error("other")]);
        trouble.news();
        trouble.forget(Area::Maps, &BTreeSet::from([ObjectRef::new("default", "c")]));
        trouble.forget(Area::Flows, &BTreeSet::from([a.clone()]));
        assert_eq!(trouble.news(), None);
        trouble.forget(Area::Maps, &BTreeSet::from([a.clone()]));
        assert_eq!(trouble.news(), Some(vec![full(&b), Problem::error("other")]));
    }
}
