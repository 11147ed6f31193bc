//! Which agents are alive, and which of those can serve.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use crate::model::AgentLease;

/// For how long an agent has to say that it cannot serve before its addresses move: a cable that is
/// plugged in anew, or a device that is configured anew, is no reason to move them. And for how long
/// it has to be able to serve again before it counts like the others: what comes and goes is no place
/// to move to.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Judges agents by their Leases. Only that a Lease changes counts, and when it did by our own
/// clock: what stands in it was written by another clock.
#[derive(Debug, Default)]
pub struct Liveness {
    /// Added to what Leases say, for the way of a renewal through the API server.
    grace: Duration,
    agents: BTreeMap<String, Agent>,
    expiries: BTreeSet<(Duration, String)>,
    /// When agents that say since a short time that they cannot serve, or can again, are to be believed.
    believed: BTreeSet<(Duration, String)>,
}

#[derive(Debug)]
struct Agent {
    lease: Arc<AgentLease>,
    /// `None`: it is not alive.
    until: Option<Duration>,
    serves: Serves,
}

/// Whether an agent can serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Serves {
    Yes,
    /// It says no. It gets no address more; from then on it loses those that it has.
    Doubted(Duration),
    No,
    /// It says yes again. It keeps the addresses that it has; from then on it gets others.
    Again(Duration),
}

impl Serves {
    /// What follows from what a Lease says now.
    fn next(self, is_unfit: bool, now: Duration) -> Self {
        match (is_unfit, self) {
            (true, Self::Yes | Self::Again(_)) => Self::Doubted(now + PATIENCE),
            (false, Self::Doubted(_) | Self::No) => Self::Again(now + PATIENCE),
            (true, Self::Doubted(_) | Self::No) | (false, Self::Yes | Self::Again(_)) => self,
        }
    }

    /// When it changes by itself.
    fn due(self) -> Option<Duration> {
        match self {
            Self::Doubted(at) | Self::Again(at) => Some(at),
            Self::Yes | Self::No => None,
        }
    }

    /// What it changes to by itself.
    fn settled(self) -> Self {
        match self {
            Self::Doubted(_) | Self::No => Self::No,
            Self::Again(_) | Self::Yes => Self::Yes,
        }
    }
}

/// What others decide by.
#[derive(PartialEq, Eq)]
struct Summary {
    is_alive: bool,
    serves: Serves,
    device: Option<String>,
}

impl Liveness {
    /// Nobody is known yet.
    #[must_use]
    pub fn new(grace: Duration) -> Self {
        Self { grace, ..Self::default() }
    }

    /// Takes over a Lease; `None` when it is gone. Says whether the agent came, went, can or cannot serve
    /// any more, or has another device now.
    pub fn change(&mut self, node: &str, lease: Option<&Arc<AgentLease>>, now: Duration) -> bool {
        let before = self.summary(node);
        let old = self.agents.remove(node);
        let old_serves = old.as_ref().map_or(Serves::Yes, |agent| agent.serves);
        if let Some(at) = old_serves.due() {
            self.believed.remove(&(at, node.to_owned()));
        }
        let old_until = old.as_ref().and_then(|agent| agent.until);
        if let Some(until) = old_until {
            self.expiries.remove(&(until, node.to_owned()));
        }
        if let Some(lease) = lease {
            let renewed = old
                .is_none_or(|old| (&old.lease.renewed, &old.lease.holder) != (&lease.renewed, &lease.holder));
            let until = if renewed { self.until(lease, now) } else { old_until };
            let serves = old_serves.next(lease.unfit.is_some(), now);
            self.put(node, Agent { lease: Arc::clone(lease), until, serves });
        }
        before != self.summary(node)
    }

    fn summary(&self, node: &str) -> Summary {
        Summary {
            is_alive: self.is_alive(node),
            serves: self.agents.get(node).map_or(Serves::Yes, |agent| agent.serves),
            device: self.device(node).map(str::to_owned),
        }
    }

    /// Agents whose time is up, or that are believed by now that they cannot serve, or can again.
    pub fn expire(&mut self, now: Duration) -> Vec<String> {
        let mut expired = Vec::new();
        while self.expiries.first().is_some_and(|(until, _)| *until <= now) {
            let Some((_, node)) = self.expiries.pop_first() else { break };
            if let Some(agent) = self.agents.get_mut(&node) {
                agent.until = None;
            }
            expired.push(node);
        }
        while self.believed.first().is_some_and(|(at, _)| *at <= now) {
            let Some((_, node)) = self.believed.pop_first() else { break };
            if let Some(agent) = self.agents.get_mut(&node) {
                agent.serves = agent.serves.settled();
            }
            expired.push(node);
        }
        expired
    }

    /// When [`expire`](Self::expire) has something to say at the earliest.
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        self.expiries.first().into_iter().chain(self.believed.first()).map(|(at, _)| *at).min()
    }

    /// Nobody looked for a while: whoever has not given up counts as alive from now on.
    pub fn restart(&mut self, now: Duration) {
        self.expiries.clear();
        self.believed.clear();
        for (node, agent) in std::mem::take(&mut self.agents) {
            let until = self.until(&agent.lease, now);
            let serves = Serves::Yes.next(agent.lease.unfit.is_some(), now);
            self.put(&node, Agent { until, serves, ..agent });
        }
    }

    /// Whether the agent of a node is alive.
    #[must_use]
    pub fn is_alive(&self, node: &str) -> bool {
        self.agents.get(node).is_some_and(|agent| agent.until.is_some())
    }

    /// Why the agent of a node cannot serve, if it has said so for long enough.
    #[must_use]
    pub fn unfit(&self, node: &str) -> Option<&str> {
        let agent = self.agents.get(node).filter(|agent| agent.serves == Serves::No)?;
        agent.lease.unfit.as_deref()
    }

    /// Whether the agent of a node says that it cannot serve, for however short a time.
    #[must_use]
    pub fn is_doubted(&self, node: &str) -> bool {
        self.agents.get(node).is_some_and(|agent| matches!(agent.serves, Serves::Doubted(_) | Serves::No))
    }

    /// Whether the agent of a node could not serve until a short time ago.
    #[must_use]
    pub fn is_recovering(&self, node: &str) -> bool {
        self.agents.get(node).is_some_and(|agent| matches!(agent.serves, Serves::Again(_)))
    }

    /// The device that the agent of a node puts addresses on.
    #[must_use]
    pub fn device(&self, node: &str) -> Option<&str> {
        self.agents.get(node)?.lease.link_device.as_deref()
    }

    fn until(&self, lease: &AgentLease, now: Duration) -> Option<Duration> {
        (!lease.holder.is_empty()).then(|| now + lease.duration + self.grace)
    }

    fn put(&mut self, node: &str, agent: Agent) {
        if let Some(until) = agent.until {
            self.expiries.insert((until, node.to_owned()));
        }
        if let Some(at) = agent.serves.due() {
            self.believed.insert((at, node.to_owned()));
        }
        self.agents.insert(node.to_owned(), agent);
    }
}
