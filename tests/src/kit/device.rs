//! What a journey talks to: a datapath, be it the host's, the kernel's, or both side by side.

use std::net::IpAddr;

use lb_common::abi::{
    Affinity, Backend, Config, ConnectionLimit, ConnectionRate, Flow, FlowKey, Fragment, IPPROTO_UDP,
    Service, Tick, VipKey,
};
use lb_common::forward::Verdict;

use super::host::{Hook, Host, Stats};
use super::offload;
use super::skb::Frame;
use super::tables::Snapshots;

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Left to the kernel.
    Pass,
    /// Dropped.
    Drop,
    /// Sent back by the device that it came in by.
    Transmit,
    /// Sent by another device.
    Redirect,
}

impl Action {
    /// Itself, if the packet was sent.
    #[must_use]
    pub fn sent(self) -> Option<Self> {
        matches!(self, Self::Transmit | Self::Redirect).then_some(self)
    }
}

impl From<Verdict> for Action {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            // What the kernel does with either is the same.
            Verdict::Pass | Verdict::Deliver => Self::Pass,
            Verdict::Drop => Self::Drop,
            Verdict::Transmit => Self::Transmit,
            Verdict::Redirect(_) => Self::Redirect,
        }
    }
}

/// The key of a flow of either family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnyKey {
    /// IPv4.
    V4(FlowKey<[u8; 4]>),
    /// IPv6.
    V6(FlowKey<[u8; 16]>),
}

impl AnyKey {
    /// The key of a tuple.
    ///
    /// # Panics
    /// When the addresses are of different families.
    #[must_use]
    pub fn new(source: (IpAddr, u16), destination: (IpAddr, u16), protocol: u8) -> Self {
        let (source_port, destination_port) = (source.1.to_be_bytes(), destination.1.to_be_bytes());
        let protocol = protocol.into();
        match (source.0, destination.0) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => Self::V4(FlowKey {
                source: source.octets(),
                destination: destination.octets(),
                source_port,
                destination_port,
                protocol,
            }),
            (IpAddr::V6(source), IpAddr::V6(destination)) => Self::V6(FlowKey {
                source: source.octets(),
                destination: destination.octets(),
                source_port,
                destination_port,
                protocol,
            }),
            _ => panic!("addresses of different families"),
        }
    }
}

/// A datapath under test.
pub trait Device {
    /// Runs a packet through; gives what became of it, and its bytes.
    fn send(&mut self, packet: &[u8]) -> (Action, Vec<u8>);
    /// Runs a packet on its way out of the node through; gives what became of it, and its bytes.
    fn leave(&mut self, packet: &[u8]) -> (Action, Vec<u8>);
    /// Lets time pass.
    fn wait(&mut self, ticks: Tick);
    /// Adds a VIP.
    fn set_vip(&mut self, address: IpAddr, port: u16, protocol: u8, service: u32);
    /// Sets a Service entry.
    fn set_service(&mut self, index: u32, service: Service);
    /// Adds a source range to a Service entry, or removes it: an address and the length of the prefix.
    fn set_source_range(&mut self, service: u32, range: (IpAddr, u32), allowed: bool);
    /// Sets how long a Service entry's affinities last.
    fn set_affinity_ticks(&mut self, service: u32, ticks: Tick);
    /// Sets how many connections a client may open to a Service entry.
    fn set_connection_limit(&mut self, service: u32, limit: ConnectionLimit);
    /// Sets a slot.
    fn set_slot(&mut self, index: u32, backend: u32);
    /// Sets a backend.
    fn set_backend(&mut self, index: u32, backend: Backend);
    /// Sets a source address.
    fn set_snat_address(&mut self, index: u32, address: IpAddr);
    /// Sets the settings.
    fn set_config(&mut self, config: Config);
    /// Where packets come in.
    fn hook(&self) -> Hook;
    /// Allows redirection to a device.
    fn add_device(&mut self, ifindex: u32);
    /// Takes an entry out of the transient table, as the LRU does when it needs room; says whether
    /// it was there.
    fn evict(&mut self, key: AnyKey) -> bool;
    /// All that is remembered.
    fn snapshots(&mut self) -> Snapshots;
    /// The counters.
    fn stats(&mut self) -> Stats;
}

/// An address in 16 bytes; an IPv4 address is in the first four.
#[must_use]
pub fn wide(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => {
            let mut wide = [0; 16];
            wide[..4].copy_from_slice(&address.octets());
            wide
        }
        IpAddr::V6(address) => address.octets(),
    }
}

/// Makes a flow older.
pub fn age_flow<A>(key: &FlowKey<A>, flow: &mut Flow<A>, ticks: Tick) {
    flow.last_seen = flow.last_seen.wrapping_sub(ticks);
    if key.protocol == u32::from(IPPROTO_UDP) && !flow.is_reply() {
        flow.mark = flow.mark.wrapping_sub(ticks);
    }
}

/// Makes a fragment's note older.
pub fn age_fragment<A>(fragment: &mut Fragment<A>, ticks: Tick) {
    fragment.created = fragment.created.wrapping_sub(ticks);
}

/// Makes what is remembered of a client older.
pub fn age_affinity(affinity: &mut Affinity, ticks: Tick) {
    affinity.last_used = affinity.last_used.wrapping_sub(ticks);
}

/// Makes what a client has used of a limit older.
pub fn age_rate(rate: &mut ConnectionRate, ticks: Tick) {
    rate.full_at = rate.full_at.wrapping_sub(ConnectionRate::time(ticks));
}

impl Host {
    /// Makes everything older, which is what time does as seen from a clock that stands still.
    pub fn age(&mut self, ticks: Tick) {
        self.clear_cache();
        self.v4.edit(
            |key, flow| age_flow(key, flow, ticks),
            |fragment| age_fragment(fragment, ticks),
            |affinity| age_affinity(affinity, ticks),
            |rate| age_rate(rate, ticks),
        );
        self.v6.edit(
            |key, flow| age_flow(key, flow, ticks),
            |fragment| age_fragment(fragment, ticks),
            |affinity| age_affinity(affinity, ticks),
            |rate| age_rate(rate, ticks),
        );
    }
}

impl Host {
    /// Runs a frame through that stands for a packet. Gives what would be on the wire.
    fn send_frame(&mut self, packet: &[u8], frame: Frame) -> (Action, Vec<u8>) {
        let Some(received) = frame.clone().received() else { return (Action::Pass, packet.to_vec()) };
        let (verdict, sent) = self.run_frame(&received);
        match verdict {
            Verdict::Pass => {
                assert_eq!(sent, frame.sent(), "what is passed is untouched");
                return (Action::Pass, packet.to_vec());
            }
            Verdict::Redirect(_) | Verdict::Deliver => {
                assert!(sent.has_right_sum(), "{received:?}\n{sent:?}");
            }
            // Answers go to where the packet came from, whose sum nobody looks at.
            Verdict::Transmit | Verdict::Drop => {}
        }
        (verdict.into(), sent.finished())
    }
}

impl Device for Host {
    fn send(&mut self, packet: &[u8]) -> (Action, Vec<u8>) {
        if let Some(mut source) = self.offloads.take() {
            let frame = offload::choose_in_pieces(packet, &mut source);
            self.offloads = Some(source);
            return self.send_frame(packet, frame);
        }
        let (verdict, bytes) = self.run(packet);
        (verdict.into(), bytes)
    }

    fn leave(&mut self, packet: &[u8]) -> (Action, Vec<u8>) {
        let (verdict, bytes) = self.run_egress(packet);
        (verdict.into(), bytes)
    }

    fn wait(&mut self, ticks: Tick) {
        self.now = self.now.wrapping_add(ticks);
    }

    fn set_vip(&mut self, address: IpAddr, port: u16, protocol: u8, service: u32) {
        let port = port.to_be_bytes();
        match address {
            IpAddr::V4(ip) => self.v4.vips.insert(VipKey::new(ip.octets(), port, protocol), service),
            IpAddr::V6(ip) => self.v6.vips.insert(VipKey::new(ip.octets(), port, protocol), service),
        };
    }

    fn set_service(&mut self, index: u32, service: Service) {
        self.services[index as usize] = service;
    }

    fn set_source_range(&mut self, service: u32, (address, length): (IpAddr, u32), allowed: bool) {
        let wide = wide(address);
        match (address, allowed) {
            (IpAddr::V4(_), true) => self.v4.sources.insert(service, &wide, length),
            (IpAddr::V4(_), false) => self.v4.sources.remove(service, &wide, length),
            (IpAddr::V6(_), true) => self.v6.sources.insert(service, &wide, length),
            (IpAddr::V6(_), false) => self.v6.sources.remove(service, &wide, length),
        }
    }

    fn set_affinity_ticks(&mut self, service: u32, ticks: Tick) {
        self.affinity_ticks[service as usize] = ticks;
    }

    fn set_connection_limit(&mut self, service: u32, limit: ConnectionLimit) {
        self.connection_limits[service as usize] = limit;
    }

    fn set_slot(&mut self, index: u32, backend: u32) {
        self.slots[index as usize] = backend;
    }

    fn set_backend(&mut self, index: u32, backend: Backend) {
        self.backends[index as usize] = backend;
    }

    fn set_snat_address(&mut self, index: u32, address: IpAddr) {
        self.snat_addresses[index as usize] = wide(address);
    }

    fn set_config(&mut self, config: Config) {
        self.config = config;
    }

    fn hook(&self) -> Hook {
        self.hook
    }

    fn add_device(&mut self, ifindex: u32) {
        self.devices.insert(ifindex);
    }

    fn evict(&mut self, key: AnyKey) -> bool {
        match key {
            AnyKey::V4(key) => self.v4.evict(&key),
            AnyKey::V6(key) => self.v6.evict(&key),
        }
    }

    fn snapshots(&mut self) -> Snapshots {
        Snapshots { v4: self.v4.snapshot(), v6: self.v6.snapshot() }
    }

    fn stats(&mut self) -> Stats {
        self.stats.borrow().clone()
    }
}
