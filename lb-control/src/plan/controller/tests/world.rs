//! A cluster: an API server, controllers, agents.

use std::{
    collections::{BTreeMap, VecDeque},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use super::server::Server;
use crate::{
    model::{AgentLease, Few, Node, ObjectChange, ObjectRef, Objects, Service},
    plan::{
        controller::{Command, Controller, ControllerOptions, Outcome, agent_status},
        testing,
    },
};

pub const OPTIONS: ControllerOptions = ControllerOptions {
    default_class: true,
    publish_external_ips: false,
    node_lease_grace: Duration::from_secs(2),
};

/// What happens to a command on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It does not arrive.
    Lost,
    /// It arrives, and the answer does not.
    AnswerLost,
    /// It arrives twice.
    Twice,
}

pub struct Agent {
    pub is_alive: bool,
    /// Why it cannot serve.
    pub unfit: Option<String>,
    pub live: BTreeMap<IpAddr, Few<ObjectRef>>,
    /// Renews its Lease, but never says what it serves.
    pub is_silent: bool,
}

impl Agent {
    pub fn new() -> Self {
        Self { is_alive: true, unfit: None, live: BTreeMap::new(), is_silent: false }
    }
}

pub struct Leader {
    pub controller: Controller,
    /// How much of the log it has seen.
    seen: usize,
}

pub struct World {
    pub server: Server,
    pub leaders: Vec<Leader>,
    pub agents: BTreeMap<String, Agent>,
    pub now: Duration,
    pub faults: VecDeque<Fault>,
    /// Everything that was given out.
    pub commands: Vec<Command>,
    /// Whether safety is checked with every command. Not where people interfere by hand.
    pub checks: bool,
    pub options: ControllerOptions,
}

impl World {
    pub fn new(nodes: &[&str]) -> Self {
        let mut world = Self {
            server: Server::default(),
            leaders: Vec::new(),
            agents: BTreeMap::new(),
            now: Duration::from_secs(1000),
            faults: VecDeque::new(),
            commands: Vec::new(),
            checks: true,
            options: OPTIONS,
        };
        for name in nodes {
            let node = Node { name: (*name).into(), ..Node::default() };
            world.server.put(ObjectChange::Node((*name).into(), Some(Arc::new(node))));
            world.agents.insert((*name).into(), Agent::new());
        }
        world.renew();
        world.elect();
        world
    }

    /// One more leader, which knows everything.
    pub fn elect(&mut self) {
        let mut controller = Controller::new(self.options);
        for change in Objects::default().changes_to(&self.server.objects) {
            controller.change(change, self.now);
        }
        self.leaders.push(Leader { controller, seen: self.server.log.len() });
    }

    /// All leaders go, and another comes.
    pub fn restart(&mut self) {
        self.leaders.clear();
        self.elect();
    }

    pub fn pool(&mut self, text: &str) {
        let pool = testing::pool(text);
        self.server.put(ObjectChange::Pool(pool.key(), Some(Arc::new(pool))));
    }

    pub fn service(&mut self, text: &str) -> ObjectRef {
        let service = testing::service(text);
        let object = service.object.clone();
        self.server.put_service(service);
        object
    }

    pub fn get(&self, object: &ObjectRef) -> &Service {
        self.server.service(object).unwrap_or_else(|| panic!("{object} is gone"))
    }

    pub fn edit(&mut self, object: &ObjectRef, edit: impl FnOnce(&mut Service)) {
        let mut service = self.get(object).clone();
        edit(&mut service);
        self.server.write_service(service);
    }

    /// Lets time pass in which nobody does anything but renew and see Leases. An agent that the
    /// leaders take to be dead for lack of news is one that may serve what others are given: that
    /// cannot be told from here, and is not what is tested.
    pub fn elapse(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            self.renew();
        }
    }

    /// Agents renew their Leases, and all leaders see it.
    pub fn renew(&mut self) {
        for (node, agent) in &self.agents {
            if agent.is_alive {
                let lease = AgentLease {
                    node: node.clone(),
                    holder: node.clone(),
                    renewed: self.now.as_secs().to_string(),
                    duration: Duration::from_secs(15),
                    link_device: Some("eth0".into()),
                    unfit: agent.unfit.clone(),
                };
                self.server.put(ObjectChange::Agent(node.clone(), Some(Arc::new(lease))));
            }
        }
        for leader in 0..self.leaders.len() {
            self.watch(leader, usize::MAX);
        }
    }

    /// Lets a leader see so many changes at most.
    pub fn watch(&mut self, leader: usize, at_most: usize) {
        let leader = &mut self.leaders[leader];
        let end = self.server.log.len().min(leader.seen.saturating_add(at_most));
        for change in &self.server.log[leader.seen..end] {
            leader.controller.change(change.clone(), self.now);
        }
        leader.seen = end;
    }

    /// Lets a leader decide, and carries out what it wants. Returns how much that was.
    pub fn decide(&mut self, leader: usize) -> usize {
        let commands = self.leaders[leader].controller.decide(self.now);
        for command in &commands {
            let outcome = self.carry_out(command);
            self.leaders[leader].controller.done(command, &outcome, self.now);
        }
        let count = commands.len();
        self.commands.extend(commands);
        count
    }

    fn carry_out(&mut self, command: &Command) -> Outcome {
        let fault = if matches!(command, Command::Event { .. }) { None } else { self.faults.pop_front() };
        if fault == Some(Fault::Lost) {
            return Outcome::Failed("it got lost".into());
        }
        // Of two leaders at once neither knows what the other is about to do. They are rare and short;
        // what holds even then is what the API server sees to, and that all comes right in the end.
        if self.checks && self.leaders.len() == 1 {
            self.server.check_before(command, |node| self.is_alive(node));
        }
        let outcome = self.server.run(command);
        if fault == Some(Fault::Twice) {
            self.server.run(command);
        }
        if self.checks {
            self.server.check(command, |node| self.is_alive(node));
        }
        if fault == Some(Fault::AnswerLost) { Outcome::Failed("no answer".into()) } else { outcome }
    }

    fn is_alive(&self, node: &str) -> bool {
        self.agents.get(node).is_some_and(|agent| agent.is_alive)
    }

    /// Lets an agent do what the VirtualIPs say, and say so.
    pub fn agent(&mut self, node: &str) -> usize {
        let agent = self.agents.get_mut(node).unwrap();
        if !agent.is_alive || agent.is_silent {
            return 0;
        }
        let virtual_ips = self.server.objects.virtual_ips.values();
        let mine = virtual_ips.filter(|it| it.node.as_deref() == Some(node) && !it.services.is_empty());
        agent.live = mine.map(|it| (it.address, it.services.clone())).collect();
        let commands = agent_status(node, &self.server.objects.virtual_ips, &agent.live);
        for command in &commands {
            self.server.run(command);
        }
        commands.len()
    }

    /// Everybody acts until nobody has anything to do at this time.
    pub fn calm(&mut self) {
        for _ in 0..200 {
            let mut acts = 0;
            for leader in 0..self.leaders.len() {
                self.watch(leader, usize::MAX);
                acts += self.decide(leader);
                self.watch(leader, usize::MAX);
            }
            for node in self.agents.keys().cloned().collect::<Vec<_>>() {
                acts += self.agent(&node);
            }
            if acts == 0 && self.leaders.iter().all(|it| it.seen == self.server.log.len()) {
                return;
            }
        }
        panic!("no rest: {:#?}", &self.commands[self.commands.len() - 8..]);
    }

    /// Lets time pass.
    pub fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            if self.now.as_secs().is_multiple_of(5) {
                self.renew();
            }
            self.calm();
        }
    }

    /// Commands since the last call, without Events and statuses of pools.
    pub fn writes(&mut self) -> Vec<Command> {
        let commands = std::mem::take(&mut self.commands);
        let is_write = |it: &Command| !matches!(it, Command::Event { .. } | Command::SetPoolStatus { .. });
        commands.into_iter().filter(is_write).collect()
    }

    /// Reasons of Events since the last call.
    pub fn events(&mut self) -> Vec<String> {
        let commands = std::mem::take(&mut self.commands);
        let reasons = commands.into_iter().filter_map(|it| match it {
            Command::Event { reason, .. } => Some(reason),
            _ => None,
        });
        reasons.collect()
    }

    /// Addresses that a Service shows.
    pub fn shown(&self, object: &ObjectRef) -> Vec<String> {
        let ingress = self.get(object).api.ingress.iter().filter_map(|it| it.ip);
        ingress.map(|it| it.to_string()).collect()
    }

    /// `address services node live_node/live` of every VirtualIP.
    pub fn virtual_ips(&self) -> Vec<String> {
        let names =
            |set: &Few<ObjectRef>| set.iter().map(|it| it.name.as_str()).collect::<Vec<_>>().join("+");
        let line = |it: &Arc<crate::model::VirtualIp>| {
            let node = |node: &Option<String>| node.clone().unwrap_or("-".into());
            format!(
                "{} {} {} {}/{}",
                it.address,
                names(&it.services),
                node(&it.node),
                node(&it.live_node),
                names(&it.live)
            )
        };
        self.server.objects.virtual_ips.values().map(line).collect()
    }
}
