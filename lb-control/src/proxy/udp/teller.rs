//! Tells clients, by ICMP, that nobody got their datagrams.

use std::{
    net::{SocketAddr, SocketAddrV6},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use lb_common::abi::{ConnectionLimit, ConnectionRate, TICK_SHIFT, Tick};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::plan::unreachable::{Undelivered, Unreachable, packet};

/// As the kernel's own: `net.ipv4.icmp_msgs_per_sec`, and somewhat more at once than its 50.
const LIMIT: ConnectionLimit = ConnectionLimit { rate: 1_000, burst: 250 };

/// Sends ICMP errors from VIPs, as many as there may be in a second.
#[derive(Debug)]
pub struct Teller {
    v4: Option<Socket>,
    v6: Option<Socket>,
    full_at: Mutex<u64>,
    told: AtomicU64,
    untold: AtomicU64,
}

/// ICMP errors for clients of UDP, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IcmpErrors {
    /// Those that were sent.
    pub told: u64,
    /// Those that were not: for want of CAP_NET_RAW, or because there were too many in a second.
    pub untold: u64,
}

impl Teller {
    /// Without CAP_NET_RAW it counts, and is silent.
    #[must_use]
    pub fn new() -> Self {
        // IPPROTO_RAW: whole packets are sent, and none received (raw(7)).
        let raw = |domain| {
            let socket = Socket::new(domain, Type::RAW.nonblocking().cloexec(), Some(Protocol::from(255)));
            socket.ok()
        };
        Self {
            v4: raw(Domain::IPV4),
            v6: raw(Domain::IPV6),
            full_at: Mutex::default(),
            told: AtomicU64::new(0),
            untold: AtomicU64::new(0),
        }
    }

    /// What was sent, and what was not.
    #[must_use]
    pub fn counts(&self) -> IcmpErrors {
        let [told, untold] = [&self.told, &self.untold].map(|counter| counter.load(Relaxed));
        IcmpErrors { told, untold }
    }

    /// Tells a client, unless others were told too much lately.
    pub fn tell(&self, why: Unreachable, of: &Undelivered<'_>, now: Duration) {
        let is_told = self.may_tell(now) && self.send(why, of);
        let counter = if is_told { &self.told } else { &self.untold };
        counter.fetch_add(1, Relaxed);
    }

    fn send(&self, why: Unreachable, of: &Undelivered<'_>) -> bool {
        // To a raw socket of IPv6 a port would be a protocol.
        let (socket, to) = match of.client {
            SocketAddr::V4(client) => (&self.v4, SocketAddr::from((*client.ip(), 0))),
            SocketAddr::V6(client) => {
                (&self.v6, SocketAddrV6::new(*client.ip(), 0, 0, client.scope_id()).into())
            }
        };
        let packet = packet(why, of);
        let Some(socket) = socket.as_ref().filter(|_| !packet.is_empty()) else { return false };
        socket.send_to(&packet, &SockAddr::from(to)).is_ok()
    }

    fn may_tell(&self, now: Duration) -> bool {
        #[expect(clippy::cast_possible_truncation, reason = "ticks wrap")]
        let now = (now.as_nanos() >> TICK_SHIFT) as Tick;
        let mut full_at = self.full_at.lock().unwrap_or_else(PoisonError::into_inner);
        let before = if *full_at == 0 { ConnectionRate::time(now) } else { *full_at };
        let after = LIMIT.take(before, now);
        *full_at = after;
        after != before
    }
}

impl Default for Teller {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_so_many() {
        let teller = Teller { v4: None, v6: None, ..Teller::new() };
        let many = |now| (0..5_000).filter(|_| teller.may_tell(Duration::from_millis(now))).count();
        assert_eq!(many(100_000), 250);
        // 100 ms are 5 or 6 ticks of 16.8 ms, each worth 16.8.
        assert!((80..=120).contains(&many(100_100)));
        assert_eq!(many(200_000), 250);
    }

    #[test]
    fn without_the_right_it_counts() {
        let teller = Teller { v4: None, v6: None, ..Teller::new() };
        let (client, vip) = ("192.0.2.7:9".parse().unwrap(), "192.0.2.1:9".parse().unwrap());
        let of = Undelivered { client, vip, length: 0, payload: b"" };
        teller.tell(Unreachable::Port, &of, Duration::from_secs(1));
        assert_eq!(teller.counts(), IcmpErrors { told: 0, untold: 1 });
    }
}
