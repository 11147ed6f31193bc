//! What this node wants of the API server: the status of the addresses that it has and, while it
//! leads, everything else.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use super::live::{Health, Lack, Told};
use crate::{
    model::{Few, ObjectChange, ObjectRef, VirtualIp},
    plan::{
        Tidings,
        controller::{Command, Controller, ControllerOptions, EventTarget, Outcome, Topic, agent_status_of},
    },
};

/// Waits before a status is written again that could not be written.
const SHORTEST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// A status that is on its way, or has to wait.
#[derive(Clone, Copy, Debug, Default)]
struct Attempt {
    is_under_way: bool,
    failures: u32,
    not_before: Duration,
    /// Whether it was built on what is no longer so: the newer object ends the wait.
    is_outdated: bool,
}

/// Decides what to write. Pure but for what it is told.
pub struct Writer {
    node: String,
    controller: Controller,
    leads: bool,
    /// Whether all objects have been told of.
    synced: bool,
    /// Whether the data plane has looked at everything once: before, an address of which it has not
    /// said that it is served may well be, by what an earlier agent has left.
    begun: bool,
    virtual_ips: BTreeMap<IpAddr, Arc<VirtualIp>>,
    served: BTreeMap<IpAddr, Few<ObjectRef>>,
    dirty: BTreeSet<IpAddr>,
    attempts: BTreeMap<IpAddr, Attempt>,
    /// What this node sees of Services and of itself, since it was looked at last; `None`: nothing any more.
    heard: Vec<(ObjectRef, Topic, Option<Command>)>,
    tidings: Tidings,
}

impl Writer {
    /// For the agent of a node.
    #[must_use]
    pub fn new(node: impl Into<String>, options: ControllerOptions) -> Self {
        Self {
            node: node.into(),
            controller: Controller::new(options),
            leads: false,
            synced: false,
            begun: false,
            virtual_ips: BTreeMap::new(),
            served: BTreeMap::new(),
            dirty: BTreeSet::new(),
            attempts: BTreeMap::new(),
            heard: Vec::new(),
            tidings: Tidings::default(),
        }
    }

    /// Takes over what the source tells.
    pub fn changed(&mut self, changes: Vec<ObjectChange>, now: Duration) {
        for change in changes {
            if let ObjectChange::VirtualIp(address, new) = &change {
                match new {
                    Some(new) => drop(self.virtual_ips.insert(*address, Arc::clone(new))),
                    None => drop(self.virtual_ips.remove(address)),
                }
                if let Some(attempt) = self.attempts.get_mut(address).filter(|it| it.is_outdated) {
                    attempt.not_before = now;
                }
                self.dirty.insert(*address);
            }
            self.controller.change(change, now);
        }
        self.synced = true;
    }

    /// Whether this node leads from now on.
    pub fn leads(&mut self, leads: bool) {
        if self.leads && !leads {
            self.controller.reset();
        }
        self.leads = leads;
    }

    /// What the data plane says of this node.
    pub fn told(&mut self, told: Told) {
        let (address, services) = match told {
            Told::Begun => return self.begun = true,
            // The Lease says it.
            Told::Unfit(_) | Told::Forwards(_) => return,
            Told::Serves(served) => served,
            Told::Lacks(service, lack) => {
                let event = lack.map(|lack| self.lack(&service, &lack));
                return self.heard.push((service, Topic::Serving, event));
            }
            Told::Health(service, health) => {
                let event = health.map(|health| self.health(&service, &health));
                return self.heard.push((service, Topic::Health, event));
            }
            Told::Avoids(service, health) => {
                let event = health.map(|health| self.avoids(&service, &health));
                return self.heard.push((service, Topic::Connects, event));
            }
            Told::NearlyFull(tables) => {
                let about = EventTarget::node(&self.node);
                let event = self.flow_tables(about.clone(), &tables);
                return self.heard.push((about.object, Topic::FlowTables, Some(event)));
            }
        };
        if services.is_empty() {
            self.served.remove(&address);
        } else {
            self.served.insert(address, services);
        }
        self.dirty.insert(address);
    }

    /// What keeps this node from serving a Service: nobody else knows.
    fn lack(&self, service: &ObjectRef, lack: &Lack) -> Command {
        self.event(EventTarget::service(service, &lack.uid), Topic::Serving, true, &lack.why)
    }

    /// How many backends of a Service do not work, as seen from this node.
    fn health(&self, service: &ObjectRef, health: &Health) -> Command {
        let all = health.healthy + health.unhealthy;
        let note = match &health.example {
            None => format!("all {all} backends are healthy"),
            Some((backend, why)) => {
                let of = format!("{} of {all} backends", health.unhealthy);
                format!("the health check fails for {of}, as for {backend}: {why}")
            }
        };
        let about = EventTarget::service(service, &health.uid);
        self.event(about, Topic::Health, health.example.is_some(), &note)
    }

    /// How many backends of a Service the proxy of this node avoids.
    fn avoids(&self, service: &ObjectRef, health: &Health) -> Command {
        let all = health.healthy + health.unhealthy;
        let note = match &health.example {
            None => "the proxy avoids no backend any more that takes connections".to_owned(),
            Some((backend, why)) => {
                format!("the proxy avoids {} of {all} backends, as {backend}: {why}", health.unhealthy)
            }
        };
        let about = EventTarget::service(service, &health.uid);
        self.event(about, Topic::Connects, health.example.is_some(), &note)
    }

    /// Whether the tables of this node have room for established flows.
    fn flow_tables(&self, about: EventTarget, nearly_full: &BTreeSet<&'static str>) -> Command {
        let names: Vec<_> = nearly_full.iter().copied().collect();
        let note = match &names[..] {
            [] => "the tables of established flows have room again".to_owned(),
            names => format!(
                "nearly full: {}. Once a table of established flows is full, further connections work, but a \
                 flood can evict them: raise --max-flows, or share the load among more nodes",
                names.join(", ")
            ),
        };
        self.event(about, Topic::FlowTables, !names.is_empty(), &note)
    }

    fn event(&self, about: EventTarget, topic: Topic, warning: bool, note: &str) -> Command {
        let (wrong, over) = topic.reasons();
        let reason = over.filter(|_| !warning).unwrap_or(wrong).to_owned();
        Command::Event { about, warning, reason, note: format!("node {}: {note}", self.node) }
    }

    /// Commands that are due.
    pub fn commands(&mut self, now: Duration) -> Vec<Command> {
        for (service, topic, event) in std::mem::take(&mut self.heard) {
            match event {
                Some(event) => self.tidings.news(&service, topic, event, now),
                None => self.tidings.over(&service, topic),
            }
        }
        if !self.synced {
            return Vec::new();
        }
        let attempts = &self.attempts;
        let waits = |address: &IpAddr| {
            let attempt = attempts.get(address).copied().unwrap_or_default();
            attempt.is_under_way || now < attempt.not_before
        };
        let due: Vec<IpAddr> =
            self.dirty.iter().filter(|address| self.begun && !waits(address)).copied().collect();
        for address in &due {
            self.dirty.remove(address);
            if let Some(attempt) = self.attempts.get_mut(address) {
                attempt.is_outdated = false;
            }
        }
        let mut commands = self.tidings.take_due(now);
        commands.extend(agent_status_of(&self.node, &due, &self.virtual_ips, &self.served));
        let mut said = BTreeSet::new();
        for command in &commands {
            if let Command::SetVirtualIpStatus { address, .. } = command {
                self.attempts.entry(*address).or_default().is_under_way = true;
                said.insert(*address);
            }
        }
        // What there is nothing to say of any more is not tried again either.
        for address in due.iter().filter(|address| !said.contains(address)) {
            self.attempts.remove(address);
        }
        if self.leads {
            commands.extend(self.controller.decide(now));
        }
        commands
    }

    /// What became of a command. Of Events only those are told that did not arrive.
    pub fn done(&mut self, command: &Command, outcome: &Outcome, now: Duration) {
        if let Command::Event { .. } = command {
            return self.tidings.not_told(command, now);
        }
        let Command::SetVirtualIpStatus { address, uid, resource_version, .. } = command else {
            return self.controller.done(command, outcome, now);
        };
        let known = self.virtual_ips.get(address);
        let is_known_newer =
            known.is_none_or(|it| (&it.uid, &it.resource_version) != (uid, resource_version));
        let attempt = self.attempts.entry(*address).or_default();
        attempt.is_under_way = false;
        match outcome {
            // The watch shows what is there now; a status that did not change is not written again.
            Outcome::Done | Outcome::Gone => {
                self.attempts.remove(address);
            }
            // The watch was faster: what is to be said follows from the newer object.
            Outcome::Conflict(_) if is_known_newer => {
                attempt.not_before = now;
                self.dirty.insert(*address);
            }
            Outcome::Conflict(_) | Outcome::Forbidden(_) | Outcome::Failed(_) => {
                attempt.is_outdated = matches!(outcome, Outcome::Conflict(_));
                let wait = SHORTEST_WAIT.saturating_mul(1 << attempt.failures.min(10)).min(LONGEST_WAIT);
                attempt.failures += 1;
                attempt.not_before = now + wait;
                self.dirty.insert(*address);
            }
        }
    }

    /// When there is something to do even if nothing happens.
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        let attempts =
            self.dirty.iter().filter(|_| self.begun).filter_map(|address| self.attempts.get(address));
        let statuses = attempts.filter(|attempt| !attempt.is_under_way).map(|attempt| attempt.not_before);
        let others = [
            self.controller.next_due().filter(|_| self.leads),
            self.tidings.next_due().filter(|_| self.synced),
        ];
        statuses.chain(others.into_iter().flatten()).min()
    }

    /// Whether everything that this node served has been taken back at the API server. Addresses
    /// may still be given to it: they move once its Lease is given back.
    #[must_use]
    pub fn has_let_go(&self) -> bool {
        let serves =
            |vip: &VirtualIp| vip.live_node.as_deref() == Some(self.node.as_str()) && !vip.live.is_empty();
        self.served.is_empty() && !self.virtual_ips.values().any(|vip| serves(vip))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn virtual_ip(node: &str, live: Option<&str>) -> ObjectChange {
        let services: Few<_> = [ObjectRef::new("default", "web")].into();
        let vip = VirtualIp {
            address: [192, 0, 2, 1].into(),
            pool: None,
            services: services.clone(),
            node: Some(node.into()),
            live_node: live.map(str::to_owned),
            live: if live.is_some() { services } else { Few::default() },
            uid: "u".into(),
            resource_version: "1".into(),
            deleting: false,
        };
        ObjectChange::VirtualIp(vip.address, Some(vip.into()))
    }

    fn served(names: &[&str]) -> Told {
        let services = names.iter().map(|name| ObjectRef::new("default", *name)).collect();
        Told::Serves(([192, 0, 2, 1].into(), services))
    }

    fn writer() -> Writer {
        let options = ControllerOptions {
            default_class: true,
            publish_external_ips: false,
            node_lease_grace: Duration::ZERO,
        };
        let mut writer = Writer::new("me", options);
        writer.told(Told::Begun);
        writer
    }

    /// Its predecessor's programs, maps and addresses serve on while it looks around.
    #[test]
    fn a_new_agent_says_nothing_before_it_has_looked() {
        let mut writer = writer();
        writer.begun = false;
        writer.changed(vec![virtual_ip("me", Some("me"))], START);
        assert!(writer.commands(START).is_empty());
        assert_eq!(writer.next_due(), None);
        writer.told(served(&["web"]));
        writer.told(Told::Begun);
        assert!(writer.commands(START).is_empty(), "all is as it was said");
        writer.told(served(&[]));
        assert_eq!(writer.commands(START).len(), 1);
    }

    const START: Duration = Duration::from_secs(100);

    #[test]
    fn a_status_is_written_once_and_again_after_a_failure() {
        let mut writer = writer();
        writer.told(served(&["web"]));
        assert!(writer.commands(START).is_empty(), "not before all objects are known");
        writer.changed(vec![virtual_ip("me", None)], START);
        let commands = writer.commands(START);
        assert_eq!(commands.len(), 1, "{commands:?}");
        writer.changed(vec![virtual_ip("me", None)], START);
        assert!(writer.commands(START).is_empty(), "it is under way");

        writer.done(&commands[0], &Outcome::Failed("no answer".into()), START);
        assert!(writer.commands(START).is_empty(), "not at once");
        let due = writer.next_due().expect("it is to be tried again");
        assert!(due > START);
        let commands = writer.commands(due);
        assert_eq!(commands.len(), 1);
        writer.done(&commands[0], &Outcome::Done, due);
        writer.changed(vec![virtual_ip("me", Some("me"))], due);
        assert!(writer.commands(due).is_empty());
        assert_eq!(writer.next_due(), None);
    }

    #[test]
    fn failures_are_forgotten_with_what_was_to_be_said() {
        let mut writer = writer();
        writer.told(served(&["web"]));
        writer.changed(vec![virtual_ip("me", None)], START);
        let commands = writer.commands(START);
        writer.done(&commands[0], &Outcome::Failed("no answer".into()), START);
        // It had arrived all the same.
        writer.changed(vec![virtual_ip("me", Some("me"))], START);
        let due = writer.next_due().expect("it is to be looked at again");
        assert!(writer.commands(due).is_empty());
        assert!(writer.attempts.is_empty(), "{:?}", writer.attempts);
    }

    /// As an Event of the node: no Service alone fills them.
    #[test]
    fn full_tables_are_told_at_the_node() {
        let mut writer = writer();
        writer.changed(Vec::new(), START);
        let mut told = |tables: &[&'static str], at: u64| {
            writer.told(Told::NearlyFull(tables.iter().copied().collect()));
            let mut commands = writer.commands(START + Duration::from_secs(at));
            let Some(Command::Event { about, warning, reason, note }) = commands.pop() else { return None };
            assert_eq!((about.kind, about.object.name.as_ref(), about.uid.as_str()), ("Node", "me", "me"));
            assert!(commands.is_empty() && note.len() < 1_000, "{note}");
            Some((warning, reason, note))
        };
        assert_eq!(told(&[], 0), None, "all is well is no news");
        let (warning, reason, note) = told(&["flows_v4", "flows_v6"], 1).expect("news");
        assert!(warning && reason == "FlowTableNearlyFull" && note.contains("flows_v4, flows_v6"), "{note}");
        assert_eq!(told(&[], 2), None, "not at once");
        let (warning, reason, note) = told(&[], 20).expect("news");
        assert!(!warning && reason == "FlowTableHasRoom", "{note}");
        assert_eq!(told(&[], 60), None, "once");
    }

    /// An agent that is late must not overwrite what the next owner has said.
    #[test]
    fn a_status_is_for_the_object_that_was_seen() {
        let mut writer = writer();
        writer.told(served(&["web"]));
        writer.changed(vec![virtual_ip("me", None)], START);
        let commands = writer.commands(START);
        let [Command::SetVirtualIpStatus { uid, resource_version, .. }] = &commands[..] else { panic!() };
        assert_eq!((uid.as_str(), resource_version.as_str()), ("u", "1"));
        // The server knows more than the watch has shown: what that shows is what counts.
        writer.done(&commands[0], &Outcome::Conflict("modified".into()), START);
        assert!(writer.commands(START).is_empty(), "not at once: nothing new is known");
        let newer = |node: &str| {
            let ObjectChange::VirtualIp(address, Some(vip)) = virtual_ip(node, None) else { unreachable!() };
            let vip = VirtualIp { resource_version: "2".into(), ..(*vip).clone() };
            ObjectChange::VirtualIp(address, Some(vip.into()))
        };
        writer.changed(vec![newer("me")], START);
        let commands = writer.commands(START);
        assert!(
            matches!(&commands[..], [Command::SetVirtualIpStatus { resource_version, .. }] if resource_version == "2"),
            "{commands:?}"
        );
        // And if it is another's by then, nothing is said.
        writer.changed(vec![virtual_ip("other", None)], START);
        writer.done(&commands[0], &Outcome::Conflict("modified".into()), START);
        assert!(writer.commands(START).is_empty());
    }

    /// Whoever leads: it is about this node.
    #[test]
    fn what_this_node_cannot_serve_is_told_by_an_event() {
        let mut writer = writer();
        let lack = Lack { uid: "u".into(), why: "the map is full".into() };
        writer.told(Told::Lacks(ObjectRef::new("default", "web"), Some(lack)));
        writer.changed(Vec::new(), START);
        let commands = writer.commands(START);
        let [Command::Event { about, warning: true, note, .. }] = commands.as_slice() else {
            panic!("{commands:?}")
        };
        assert_eq!((about.uid.as_str(), note.as_str()), ("u", "node me: the map is full"));
        assert!(writer.commands(START).is_empty(), "once");
        let [event] = commands.as_slice() else { unreachable!("looked at above") };
        writer.done(event, &Outcome::Failed("too many".into()), START);
        let due = writer.next_due().expect("it is told again");
        assert!(due > START);
        assert_eq!(writer.commands(due), commands);
        writer.done(event, &Outcome::Failed("too many".into()), due);
        writer.told(Told::Lacks(ObjectRef::new("default", "web"), None));
        assert!(writer.commands(due * 2).is_empty(), "it is served by now");
        assert_eq!(writer.next_due(), None);
    }

    /// Of many that fail at about the same time, and of whatever becomes of them.
    #[test]
    fn how_many_backends_work_is_told_as_it_is_by_then() {
        let mut writer = writer();
        writer.changed(Vec::new(), START);
        let mut told = Vec::new();
        let counts = (1..=100).chain((0..100).rev());
        for (second, unhealthy) in (100..).zip(counts) {
            let example = (unhealthy > 0).then(|| (([10, 0, 0, 1], 80).into(), "HTTP 503".to_owned()));
            let health = Health { uid: "u".into(), healthy: 100 - unhealthy, unhealthy, example };
            writer.told(Told::Health(ObjectRef::new("default", "web"), Some(health)));
            told.extend(writer.commands(Duration::from_secs(second)));
        }
        while let Some(due) = writer.next_due() {
            told.extend(writer.commands(due));
        }
        let said: Vec<_> = told
            .iter()
            .map(|command| match command {
                Command::Event { reason, note, warning, .. } => (reason.as_str(), note.as_str(), *warning),
                other => panic!("{other:?}"),
            })
            .collect();
        let first = "node me: the health check fails for 4 of 100 backends, as for 10.0.0.1:80: HTTP 503";
        assert_eq!(said[0], ("BackendsUnhealthy", first, true));
        assert_eq!(said.last(), Some(&("BackendsHealthy", "node me: all 100 backends are healthy", false)));
        assert!(said.len() < 10, "{said:?}");
    }

    #[test]
    fn it_has_let_go_when_the_api_server_knows() {
        let mut writer = writer();
        writer.changed(vec![virtual_ip("me", Some("me"))], START);
        writer.told(served(&["web"]));
        assert!(writer.commands(START).is_empty() && !writer.has_let_go());
        writer.told(served(&[]));
        assert_eq!(writer.commands(START).len(), 1, "it serves nothing any more");
        assert!(!writer.has_let_go());
        writer.changed(vec![virtual_ip("me", None)], START);
        assert!(writer.has_let_go());
        // What the API server shows after the agent's own last write, until the leader moves it.
        let ObjectChange::VirtualIp(address, Some(vip)) = virtual_ip("me", Some("me")) else {
            unreachable!("made above")
        };
        let vip = VirtualIp { live: Few::default(), ..(*vip).clone() };
        writer.changed(vec![ObjectChange::VirtualIp(address, Some(vip.into()))], START);
        assert!(writer.has_let_go());
    }
}
