//! Which agents are alive.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use crate::model::AgentLease;

/// Judges agents by their Leases. Only that a Lease changes counts, and when it did by our own
/// clock: what stands in it was written by another clock.
#[derive(Debug, Default)]
pub struct Liveness {
    /// Added to what Leases say, for the way of a renewal through the API server.
    grace: Duration,
    agents: BTreeMap<String, Agent>,
    expiries: BTreeSet<(Duration, String)>,
}

#[derive(Debug)]
struct Agent {
    lease: Arc<AgentLease>,
    /// `None`: it is not alive.
    until: Option<Duration>,
}

impl Liveness {
    /// Nobody is known yet.
    #[must_use]
    pub fn new(grace: Duration) -> Self {
        Self { grace, ..Self::default() }
    }

    /// Takes over a Lease; `None` when it is gone. Says whether the agent came, went, or has
    /// another device now.
    pub fn change(&mut self, node: &str, lease: Option<&Arc<AgentLease>>, now: Duration) -> bool {
        let before = (self.is_alive(node), self.device(node).map(str::to_owned));
        let old = self.agents.remove(node);
        let old_until = old.as_ref().and_then(|agent| agent.until);
        if let Some(until) = old_until {
            self.expiries.remove(&(until, node.to_owned()));
        }
        if let Some(lease) = lease {
            let renewed = old
                .is_none_or(|old| (&old.lease.renewed, &old.lease.holder) != (&lease.renewed, &lease.holder));
            let until = if renewed { self.until(lease, now) } else { old_until };
            self.put(node, Arc::clone(lease), until);
        }
        before != (self.is_alive(node), self.device(node).map(str::to_owned))
    }

    /// Agents whose time is up; each is named once.
    pub fn expire(&mut self, now: Duration) -> Vec<String> {
        let mut expired = Vec::new();
        while self.expiries.first().is_some_and(|(until, _)| *until <= now) {
            let Some((_, node)) = self.expiries.pop_first() else { break };
            if let Some(agent) = self.agents.get_mut(&node) {
                agent.until = None;
            }
            expired.push(node);
        }
        expired
    }

    /// When [`expire`](Self::expire) has something to say at the earliest.
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        self.expiries.first().map(|(until, _)| *until)
    }

    /// Nobody looked for a while: whoever has not given up counts as alive from now on.
    pub fn restart(&mut self, now: Duration) {
        self.expiries.clear();
        for (node, agent) in std::mem::take(&mut self.agents) {
            let until = self.until(&agent.lease, now);
            self.put(&node, agent.lease, until);
        }
    }

    /// Whether the agent of a node is alive.
    #[must_use]
    pub fn is_alive(&self, node: &str) -> bool {
        self.agents.get(node).is_some_and(|agent| agent.until.is_some())
    }

    /// The device that the agent of a node puts addresses on.
    #[must_use]
    pub fn device(&self, node: &str) -> Option<&str> {
        self.agents.get(node)?.lease.link_device.as_deref()
    }

    fn until(&self, lease: &AgentLease, now: Duration) -> Option<Duration> {
        (!lease.holder.is_empty()).then(|| now + lease.duration + self.grace)
    }

    fn put(&mut self, node: &str, lease: Arc<AgentLease>, until: Option<Duration>) {
        if let Some(until) = until {
            self.expiries.insert((until, node.to_owned()));
        }
        self.agents.insert(node.to_owned(), Agent { lease, until });
    }
}
