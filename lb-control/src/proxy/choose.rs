//! Which backend a new connection, or session, gets: as in the kernel (`lb_common::forward`).

use std::{
    net::{IpAddr, SocketAddr},
    sync::{PoisonError, atomic::Ordering::Relaxed},
    time::Duration,
};

use lb_common::{
    abi::{ConnectionRate, FlowKey, Service, ServiceFlags, TICK_SHIFT, Tick, V4, V6},
    forward::{ip::IpFamily, schedule},
};

use super::entry::{Entry, Remembered, Table};
use crate::model::{Role, Scheduler};

impl Entry {
    /// The index of the backend that the next connection of a client gets: none that was `tried`, and
    /// none that is ejected unless there is no other. `None` if there is none left.
    #[must_use]
    pub fn choose(&self, table: &Table, client: SocketAddr, tried: &[usize], now: Duration) -> Option<usize> {
        let Some(timeout) = table.frontend.affinity.filter(|_| !is_lookup(table)) else {
            return self.schedule(table, client, tried, now);
        };
        let known = self.remembered(client.ip(), timeout, now);
        let place = known.and_then(|known| table.backends.iter().position(|one| one.address == known));
        let fits = |index: &usize| {
            table.frontend.backends[*index].role == Role::Active
                && !tried.contains(index)
                && table.backends[*index].admits(now)
        };
        let index = place.filter(fits).or_else(|| self.schedule(table, client, tried, now))?;
        let remembered = Remembered { backend: table.backends[index].address, last: now };
        let mut affinity = self.affinity.lock().unwrap_or_else(PoisonError::into_inner);
        affinity.insert(client.ip(), remembered, now);
        Some(index)
    }

    /// Whether a client may open another connection; if so, it is counted.
    pub(super) fn is_below_limit(&self, table: &Table, client: IpAddr, now: Duration) -> bool {
        let Some(limit) = table.frontend.connection_limit else { return true };
        let client = network(client);
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        let tick = ticks(now);
        let before = rates.get(&client).unwrap_or(ConnectionRate::time(tick));
        let after = limit.take(before, tick);
        let is_below = after != before;
        if is_below {
            rates.insert(client, after, now);
        }
        is_below
    }

    fn remembered(&self, client: IpAddr, timeout: Duration, now: Duration) -> Option<SocketAddr> {
        let affinity = self.affinity.lock().unwrap_or_else(PoisonError::into_inner);
        let known = affinity.get(&client)?;
        (now.saturating_sub(known.last) <= timeout).then_some(known.backend)
    }

    fn schedule(&self, table: &Table, client: SocketAddr, tried: &[usize], now: Duration) -> Option<usize> {
        let slots = &table.frontend.slots;
        let count = u64::try_from(slots.len()).ok().filter(|count| *count > 0)?;
        let is_new = |index: usize| !tried.contains(&index);
        let admits = |index: usize| is_new(index) && table.backends[index].admits(now);
        let first = match table.frontend.scheduler {
            Scheduler::Maglev => self.lookup(table, client),
            _ => usize::try_from(self.turn.fetch_add(1, Relaxed) % count).unwrap_or(0),
        };
        // Whoever is next, and then whoever comes after it.
        let in_turn = || slots[first..].iter().chain(&slots[..first]).map(|index| *index as usize);
        if table.frontend.scheduler == Scheduler::LeastConnections {
            let load = |index: &usize| (table.backends[*index].open() + 1, weight(table, *index));
            // Fractions compared without dividing; of equals `min_by` takes the first.
            let fewest = |candidates: &mut dyn Iterator<Item = usize>| {
                candidates.min_by(|a, b| {
                    let ((open_a, weight_a), (open_b, weight_b)) = (load(a), load(b));
                    (open_a * weight_b).cmp(&(open_b * weight_a))
                })
            };
            let may = |index: &usize| is_new(*index) && !table.backends[*index].is_out(now);
            // Who is asked to admit has its trial: so only the best is. If another worker was first, it is
            // out by now, and so is not asked again.
            while let Some(best) = fewest(&mut in_turn().filter(may)) {
                if table.backends[best].admits(now) {
                    return Some(best);
                }
            }
            return fewest(&mut in_turn().filter(|index| is_new(*index)));
        }
        let next = in_turn().find(|index| admits(*index));
        next.or_else(|| in_turn().find(|index| is_new(*index)))
    }

    fn lookup(&self, table: &Table, client: SocketAddr) -> usize {
        let count = u32::try_from(table.frontend.slots.len()).unwrap_or(u32::MAX);
        let flags = if table.frontend.affinity.is_some() { ServiceFlags::AFFINITY } else { 0 };
        let service = Service::new(0, count, ServiceFlags::MAGLEV | flags);
        let slot = match (client.ip(), self.key.vip) {
            (IpAddr::V4(source), IpAddr::V4(vip)) => {
                schedule::by_client::<V4>(&self.flow(client.port(), source.octets(), vip.octets()), service)
            }
            (IpAddr::V6(source), IpAddr::V6(vip)) => {
                schedule::by_client::<V6>(&self.flow(client.port(), source.octets(), vip.octets()), service)
            }
            // A socket of one family has no peers of the other.
            _ => 0,
        };
        slot as usize
    }

    fn flow<A>(&self, port: u16, source: A, vip: A) -> FlowKey<A> {
        FlowKey {
            source_port: port.to_be_bytes(),
            destination_port: self.key.port.to_be_bytes(),
            protocol: self.key.protocol.number().into(),
            source,
            destination: vip,
        }
    }
}

fn is_lookup(table: &Table) -> bool {
    table.frontend.scheduler == Scheduler::Maglev
}

fn weight(table: &Table, index: usize) -> u64 {
    table.frontend.backends[index].weight.max(1).into()
}

/// What one client has many of is one client.
fn network(client: IpAddr) -> IpAddr {
    match client {
        IpAddr::V4(_) => client,
        IpAddr::V6(address) => {
            let mut octets = address.octets();
            V6::keep_network(&mut octets);
            octets.into()
        }
    }
}

/// A time as limits count it: it wraps.
#[expect(clippy::cast_possible_truncation, reason = "ticks wrap, as the kernel's do")]
fn ticks(now: Duration) -> Tick {
    (now.as_nanos() >> TICK_SHIFT) as Tick
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, sync::Arc};

    use super::*;
    use crate::{
        model::{ClientAddress, ObjectRef, Protocol, ServiceKey},
        plan::{Frontend, FrontendBackend},
    };

    fn entry(scheduler: Scheduler, backends: u8) -> Entry {
        let service = ObjectRef { namespace: "test".into(), name: "web".into() };
        let key = ServiceKey { service, protocol: Protocol::Tcp, vip: [192, 0, 2, 1].into(), port: 80 };
        let backend = |last| FrontendBackend {
            address: ([10, 0, 0, last], 80).into(),
            weight: 1,
            role: Role::Active,
            local: false,
        };
        let frontend = Frontend {
            key,
            backends: (0..backends).map(backend).collect(),
            slots: (0..u32::from(backends)).collect(),
            scheduler,
            source_ranges: Arc::default(),
            affinity: None,
            connection_limit: None,
            client_address: ClientAddress::Path,
        };
        Entry::new(Arc::new(frontend), 1, &Arc::default())
    }

    /// While a backend that failed has more connections than others, nothing is tried there; when it has
    /// the fewest, one connection is.
    #[test]
    fn the_fewest_connections_are_counted_before_a_trial_is_used_up() {
        let entry = entry(Scheduler::LeastConnections, 2);
        let (table, client) = (entry.table(), SocketAddr::from(([198, 51, 100, 1], 9)));
        let choose = |now| entry.choose(&table, client, &[], Duration::from_millis(now)).unwrap();
        (0..5).for_each(|_| table.backends[0].opens());
        (0..3).for_each(|_| table.backends[0].failed(Duration::ZERO));
        for now in [0, 999, 1_000, 1_001, 1_500] {
            assert_eq!(choose(now), 1, "{now}");
        }
        (0..5).for_each(|_| table.backends[0].closes());
        table.backends[1].opens();
        assert_eq!(choose(1_501), 0, "its time is over, and nobody has tried");
        assert_eq!((choose(1_502), choose(2_500)), (1, 1), "one tries");
        assert_eq!(choose(2_501), 0, "nothing was heard of that one");
        table.backends[0].failed(Duration::from_millis(2_600));
        assert_eq!((choose(4_599), choose(4_600)), (1, 0));
    }

    #[test]
    fn who_is_out_is_better_than_nobody() {
        let entry = entry(Scheduler::LeastConnections, 1);
        (0..3).for_each(|_| entry.table().backends[0].failed(Duration::ZERO));
        let client = ([198, 51, 100, 1], 9).into();
        assert_eq!(entry.choose(&entry.table(), client, &[], Duration::ZERO), Some(0));
    }

    /// Whose affinity is over is not remembered, and nobody is once an entry has none any more.
    #[test]
    fn clients_are_forgotten() {
        let room = Arc::default();
        let frontend = entry(Scheduler::RoundRobin, 2).table().frontend.as_ref().clone();
        let limit = lb_common::abi::ConnectionLimit { rate: 10, burst: 100 };
        let sticky = Frontend {
            affinity: Some(Duration::from_secs(60)),
            connection_limit: Some(limit),
            ..frontend.clone()
        };
        let entry = Entry::new(Arc::new(sticky), 1, &room);
        // The clock's time: a change of what is wanted looks at that.
        let begin = crate::proxy::clock::now();
        let come = |last: u8, now| {
            let client = SocketAddr::from(([198, 51, 100, last], 9));
            assert!(entry.is_below_limit(&entry.table(), client.ip(), now));
            entry.choose(&entry.table(), client, &[], now).unwrap()
        };
        let first = come(1, begin);
        come(2, begin);
        assert_eq!(room.remembered(), 4);
        for after in (0..=30).step_by(5) {
            entry.forget_clients(begin + Duration::from_secs(after));
        }
        assert_eq!(room.remembered(), 2, "their buckets are full again");
        assert_eq!(come(1, begin + Duration::from_secs(50)), first);
        for after in (50..=200).step_by(5) {
            entry.forget_clients(begin + Duration::from_secs(after));
        }
        assert_eq!(room.remembered(), 0);
        come(3, begin);
        entry.update(Arc::new(frontend));
        assert_eq!(room.remembered(), 0);
    }
}
