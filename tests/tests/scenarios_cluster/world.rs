//! A cluster: an API server, an agent on every node, and time.

use std::{collections::BTreeMap, time::Duration};

use lb_control::{
    model::ObjectRef,
    plan::controller::{Command, ControllerOptions, Outcome},
};
use serde_json::{Value, json};

use super::{
    agent::Agent,
    server::{Key, Server},
};

/// How often agents renew their Leases.
const RENEWAL: u64 = 5;
/// Seconds in which everything comes to rest: a Lease runs out, and a few failures are waited for.
const SETTLES: u64 = 60;
/// Seconds in which it then has to stay at rest.
const RESTS: u64 = 10;

pub struct World {
    pub server: Server,
    pub agents: BTreeMap<String, Agent>,
    /// Objects by the file that they are written in.
    files: BTreeMap<String, Vec<Key>>,
    options: ControllerOptions,
    now: Duration,
    /// Whether every other write is lost, to the API server and to maps.
    is_shaky: bool,
    writes: u64,
}

impl World {
    pub fn new(is_shaky: bool) -> Self {
        let options = ControllerOptions {
            default_class: true,
            publish_external_ips: false,
            node_lease_grace: Duration::ZERO,
        };
        Self {
            server: Server::default(),
            agents: BTreeMap::new(),
            files: BTreeMap::new(),
            options,
            now: Duration::from_secs(1_000),
            is_shaky,
            writes: 0,
        }
    }

    /// `kubectl apply --prune`: what an earlier version of the file had and this has not goes.
    pub fn file(&mut self, name: &str, text: &str) {
        let mut keys = Vec::new();
        for document in text.split("---\n").filter(|document| !document.trim().is_empty()) {
            let object: Value =
                serde_saphyr::from_str(document).unwrap_or_else(|error| panic!("{name}: {error}"));
            keys.push(Key::of(&object));
            self.server.apply(object);
        }
        let old = self.files.insert(name.to_owned(), keys.clone()).unwrap_or_default();
        for key in old.iter().filter(|key| !keys.contains(key)) {
            self.server.delete(key);
        }
        self.meet_nodes();
    }

    /// `kubectl delete -f`.
    pub fn delete(&mut self, name: &str) {
        for key in self.files.remove(name).expect("the file to delete is there") {
            self.server.delete(&key);
        }
        self.meet_nodes();
    }

    /// Slices of so many endpoints each, from 10.1.0.1 on.
    pub fn slices(&mut self, service: &str, sizes: &[u32]) {
        let mut next = u32::from_be_bytes([10, 1, 0, 1]);
        for (index, size) in sizes.iter().enumerate() {
            let addresses = (next..next + size).map(|it| std::net::Ipv4Addr::from(it).to_string());
            let endpoints: Vec<_> = addresses.map(|it| json!({"addresses": [it]})).collect();
            next += size;
            self.server.apply(json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": {
                    "name": format!("{service}-{index}"), "labels": {"kubernetes.io/service-name": service},
                },
                "ports": [{"port": 8080}], "endpoints": endpoints,
            }));
        }
    }

    /// Another controller writes the addresses of a Service; none clear them.
    pub fn rival(&mut self, service: &str, addresses: &[&str]) {
        let ingress = addresses.iter().map(|ip| json!({"ip": ip, "ipMode": "VIP"})).collect();
        self.server.write_ingress(&ObjectRef::new("default", service), ingress);
    }

    /// Every node that there is has an agent; the first one leads.
    fn meet_nodes(&mut self) {
        let nodes = self.server.objects.keys().filter(|key| key.kind == "Node");
        let nodes: Vec<_> = nodes.map(|key| key.name.clone()).collect();
        self.agents.retain(|node, _| nodes.contains(node));
        for node in nodes {
            let new = || Agent::new(&node, self.options);
            self.agents.entry(node.clone()).or_insert_with(new);
        }
        self.elect();
        self.renew();
    }

    fn elect(&mut self) {
        let mut up = self.agents.values_mut().filter(|agent| agent.is_up);
        if !up.any(|agent| agent.leads)
            && let Some(first) = self.agents.values_mut().find(|agent| agent.is_up)
        {
            first.lead(true);
        }
    }

    /// The next node that is up leads.
    pub fn next_leader(&mut self) {
        let up: Vec<_> = self.agents.values().filter(|it| it.is_up).map(|it| it.node.clone()).collect();
        let leader = up.iter().position(|node| self.agents[node].leads).expect("there is a leader");
        let next = &up[(leader + 1) % up.len()];
        for agent in self.agents.values_mut() {
            agent.lead(agent.node == *next);
        }
    }

    pub fn set_agent(&mut self, node: &str, is_up: bool) {
        let agent = self.agents.get_mut(node).expect("a node");
        if is_up {
            agent.restart(self.options);
        } else {
            agent.lead(false);
            agent.is_up = false;
        }
        self.elect();
        self.renew();
    }

    /// The agent is killed, and started at once.
    pub fn restart(&mut self, node: &str) {
        let leads = self.agents[node].leads;
        self.set_agent(node, true);
        if leads && self.agents.values().filter(|it| it.leads).count() == 0 {
            self.elect();
        }
    }

    /// All agents are started with other options.
    pub fn option(&mut self, option: &str) {
        match option {
            "publish-external-ips" => self.options.publish_external_ips = true,
            "keep-external-ips" => self.options.publish_external_ips = false,
            "own-class-only" => self.options.default_class = false,
            other => panic!("unknown option {other}"),
        }
        for node in self.agents.keys().cloned().collect::<Vec<_>>() {
            self.restart(&node);
        }
    }

    fn renew(&mut self) {
        let up: Vec<_> = self.agents.values().filter(|it| it.is_up).map(|it| it.node.clone()).collect();
        for node in up {
            let name = format!("pointsman-agent-{node}");
            let time =
                jiff::Timestamp::from_second(i64::try_from(self.now.as_secs()).expect("soon")).expect("soon");
            self.server.apply(json!({
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                "metadata": {"name": name, "namespace": "pointsman", "labels": {"pointsman.dev/agent": "true"}},
                "spec": {
                    "holderIdentity": node, "leaseDurationSeconds": 15,
                    "renewTime": format!("{time:.6}"),
                },
            }));
        }
    }

    pub fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            if self.now.as_secs().is_multiple_of(RENEWAL) {
                self.renew();
            }
            self.calm();
        }
    }

    /// Lets everybody act until nobody has anything to do: what waits for time to go by has been done
    /// by then, and what was lost has been repeated. After that nothing may be written any more.
    pub fn settle(&mut self) {
        self.calm();
        self.pass(SETTLES);
        let before = self.server.log.len();
        self.pass(RESTS);
        let late = self.server.log[before..].iter().find(|(key, _)| key.kind != "Lease");
        assert!(late.is_none(), "the cluster never comes to rest: {late:#?}");
    }

    fn calm(&mut self) {
        for _ in 0..200 {
            let before = self.server.log.len();
            let mut acts = 0;
            for node in self.agents.keys().cloned().collect::<Vec<_>>() {
                acts += self.turn(&node);
            }
            if acts == 0 && self.server.log.len() == before {
                return;
            }
        }
        panic!("the cluster never comes to rest: {:#?}", &self.server.log[self.server.log.len() - 8..]);
    }

    fn turn(&mut self, node: &str) -> usize {
        let agent = self.agents.get_mut(node).expect("a node");
        if !agent.is_up {
            return 0;
        }
        let commands = agent.turn(&self.server, self.now, self.is_shaky);
        for command in &commands {
            let is_write = !matches!(command, Command::Event { .. });
            self.writes += u64::from(is_write);
            let outcome = if is_write && self.is_shaky && self.writes.is_multiple_of(2) {
                Outcome::Failed("it got lost".into())
            } else {
                self.server.run(command)
            };
            agent.done(command, &outcome, self.now);
        }
        commands.len()
    }
}
