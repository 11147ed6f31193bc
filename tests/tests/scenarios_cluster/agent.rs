//! An agent of the cluster, on maps in memory.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

use lb_common::abi::{Config, NextHop};
use lb_control::{
    app::{Told, Writer},
    model::{Few, ObjectChange, ObjectRef, Problem},
    plan::{
        self, Addressing, Compiler, Paths, Planner, Scope, Settings,
        controller::{Command, ControllerOptions},
    },
    ports::{FakeMaps, FaultyMaps, Limits},
};

use super::{server::Server, source::Source};

/// More writes than any step takes.
const MANY: u64 = 10_000;

/// Who runs on a node. Nothing happens by itself: it is given its turn.
pub struct Agent {
    pub node: String,
    /// Whether it runs. What a killed agent has left stays in the maps.
    pub is_up: bool,
    pub leads: bool,
    pub maps: FaultyMaps<FakeMaps>,
    pub planner: Planner,
    /// What is wrong with objects, by kind.
    pub problems: Vec<Vec<Problem>>,
    source: Source,
    seen: usize,
    writer: Writer,
    compiler: Compiler,
    /// When the maps are to be looked at although nothing changed.
    retry_at: Option<Duration>,
    served: BTreeMap<IpAddr, Few<ObjectRef>>,
    has_begun: bool,
}

impl Agent {
    pub fn new(node: &str, options: ControllerOptions) -> Self {
        Self::with(node, options, FaultyMaps::new(FakeMaps::new(Limits::default()), []))
    }

    fn with(node: &str, options: ControllerOptions, maps: FaultyMaps<FakeMaps>) -> Self {
        Self {
            node: node.into(),
            is_up: true,
            leads: false,
            planner: Planner::new(options.default_class, node, Addressing::Follows),
            problems: Vec::new(),
            source: Source::default(),
            seen: 0,
            writer: Writer::new(node, options),
            compiler: Compiler::adopt(&maps, Settings::default()).expect("maps of this version"),
            retry_at: None,
            served: BTreeMap::new(),
            has_begun: false,
            maps,
        }
    }

    /// The next agent of the node, which knows nothing but the maps.
    pub fn restart(&mut self, options: ControllerOptions) {
        let maps = std::mem::replace(&mut self.maps, FaultyMaps::new(FakeMaps::new(Limits::default()), []));
        *self = Self::with(&self.node, options, maps);
    }

    pub fn lead(&mut self, leads: bool) {
        self.leads = leads;
        self.writer.leads(leads);
    }

    /// Hears what is new, serves it, and says what it wants written. `is_shaky`: every other write
    /// to the maps fails at first.
    pub fn turn(&mut self, server: &Server, now: Duration, is_shaky: bool) -> Vec<Command> {
        let mut changes: Vec<ObjectChange> = Vec::new();
        let is_first = !self.has_begun;
        if is_first {
            // A list has what is there, and none of what was.
            self.seen = server.log.len();
            let listed = server.objects.iter();
            changes.extend(listed.filter_map(|(key, object)| self.source.take(key, Some(object))));
        }
        for (key, object) in &server.log[self.seen..] {
            changes.extend(self.source.take(key, object.as_ref()));
        }
        self.seen = server.log.len();
        changes.extend(self.source.unreadable());
        let problems = self.source.problems();
        self.problems.resize(problems.len(), Vec::new());
        for (kept, new) in self.problems.iter_mut().zip(problems) {
            *kept = new.unwrap_or(std::mem::take(kept));
        }
        let is_due = self.retry_at.is_some_and(|at| at <= now);
        let is_new = is_first || !changes.is_empty();
        if is_new {
            self.writer.changed(changes.clone(), now);
            let is_writers = |change: &ObjectChange| {
                matches!(change, ObjectChange::Agent(..) | ObjectChange::Unreadable(..))
            };
            changes.retain(|change| !is_writers(change));
            self.planner.apply(changes);
        }
        if is_new || is_due {
            self.program(now, is_shaky);
            self.tell();
        }
        self.has_begun = true;
        self.writer.commands(now)
    }

    pub fn done(
        &mut self,
        command: &Command,
        outcome: &lb_control::plan::controller::Outcome,
        now: Duration,
    ) {
        self.writer.done(command, outcome, now);
    }

    /// Brings the maps to what was decided.
    fn program(&mut self, now: Duration, is_shaky: bool) {
        let paths = self.paths();
        let desired = &self.planner.plan().desired;
        let start = self.maps.writes();
        self.maps.failing = if is_shaky { (start..start + MANY).step_by(2).collect() } else { [].into() };
        for _ in 0..MANY {
            let delta = self.compiler.reconcile(desired, &paths, &Config::default(), Scope::All, now);
            if delta.is_empty() {
                self.retry_at = delta.retry_at;
                return;
            }
            plan::apply(&delta, &mut self.maps, &mut self.compiler, now);
        }
        panic!("node {}: the maps never become what was decided", self.node);
    }

    /// Backends on this node are handed to it; all others are behind device 2.
    fn paths(&self) -> Paths {
        let next_hop = NextHop { ifindex: 2, ..NextHop::default() };
        let path = |address: IpAddr| plan::Path {
            is_local: self.planner.is_local(&address) == Some(true),
            mtu: 1_500,
            is_for_tc: false,
            next_hop: Some(next_hop),
            snat: vec![
                if address.is_ipv4() { "10.0.0.254" } else { "fd00::fe" }.parse().expect("an address"),
            ],
        };
        self.planner.backends().map(|address| (address, Arc::new(path(address)))).collect()
    }

    /// Says what its addresses serve now.
    fn tell(&mut self) {
        let vips = &self.planner.plan().desired.vips;
        for address in self.served.keys().filter(|address| !vips.contains_key(*address)) {
            self.writer.told(Told::Serves((*address, Few::default())));
        }
        for (address, services) in vips.iter().filter(|(address, it)| self.served.get(*address) != Some(*it))
        {
            self.writer.told(Told::Serves((*address, services.clone())));
        }
        self.served.clone_from(vips);
        if !self.has_begun {
            self.writer.told(Told::Begun);
        }
    }
}
