//! Two hosts, one with the flow cache and one without: nobody who sends and receives packets can tell
//! them apart.

use std::fmt::Debug;
use std::hash::Hash;
use std::net::IpAddr;

use lb_common::abi::{Backend, Config, ConnectionLimit, Flow, FlowFlags, FlowKey, Service, Tick};

use super::device::{Action, AnyKey, Device};
use super::host::{Family, Hook, Host, Stats};
use super::tables::{Snapshot, Snapshots};

/// Both hosts.
pub struct Twins {
    /// With the cache.
    pub cached: Host,
    plain: Host,
    sent: u32,
}

/// Copies that there is room for: few, so that flows push each other out.
const SLOTS: u32 = 64;

/// Packets in a tick.
const PACKETS: u32 = 8;

impl Default for Twins {
    fn default() -> Self {
        let mut cached = Host::default();
        cached.set_cache(SLOTS);
        Self { cached, plain: Host::default(), sent: 0 }
    }
}

/// All flows, in the order of tables and keys.
fn flows<A: Copy + Ord>(tables: &Snapshot<A>) -> Vec<(FlowKey<A>, Flow<A>)> {
    let both = [&tables.established, &tables.transient];
    both.into_iter().flat_map(|table| table.iter().map(|(key, flow)| (*key, *flow))).collect()
}

/// Tells a table what it hears late of established flows when there is a cache: the moment, and the
/// sequence number of that moment, and when the kernel is asked for the way to the client again. All that comes of it is that an idle time ends sooner, or that an
/// RST is judged by a sequence number from a moment before.
fn catch_up<A: Copy + Ord + Hash, P: Copy>(cached: &mut Family<A, P>, plain: &Family<A, P>) {
    let heard = plain.snapshot().established;
    cached.edit(
        |key, flow| {
            if let Some(plain) = heard.get(key) {
                flow.last_seen = plain.last_seen;
                flow.mark = plain.mark;
                if plain.status.flags & FlowFlags::OLD_WAY != 0 {
                    flow.generation = plain.generation;
                }
            }
        },
        |_| {},
        |_| {},
        |_| {},
    );
}

impl Twins {
    /// Compares all that is remembered and counted.
    ///
    /// # Panics
    /// When it differs.
    pub fn compare(&mut self) {
        let (cached, plain) = (self.cached.snapshots(), self.plain.snapshots());
        self.same(&flows(&cached.v4), &flows(&plain.v4));
        self.same(&flows(&cached.v6), &flows(&plain.v6));
        assert_eq!(self.cached.stats(), self.plain.stats(), "counters after {} packets", self.sent);
    }

    fn same<T: Debug + PartialEq>(&self, cached: &[T], plain: &[T]) {
        let only = |these: &[T], those: &[T]| -> Vec<String> {
            these.iter().filter(|flow| !those.contains(flow)).map(|flow| format!("{flow:?}")).collect()
        };
        let (cached, plain) = (only(cached, plain), only(plain, cached));
        assert!(
            cached.is_empty() && plain.is_empty(),
            "after {} packets there are with the cache {cached:#?}, without {plain:#?}",
            self.sent
        );
    }

    fn both<T>(&mut self, mut call: impl FnMut(&mut Host) -> T) -> (T, T) {
        (call(&mut self.cached), call(&mut self.plain))
    }

    fn packet(
        &mut self,
        packet: &[u8],
        call: impl FnMut(&mut Host) -> (Action, Vec<u8>),
    ) -> (Action, Vec<u8>) {
        self.sent += 1;
        if self.sent.is_multiple_of(PACKETS) {
            self.wait(1);
        }
        let (cached, plain) = self.both(call);
        assert_eq!(cached, plain, "with and without the cache, packet {}: {packet:02x?}", self.sent);
        catch_up(&mut self.cached.v4, &self.plain.v4);
        catch_up(&mut self.cached.v6, &self.plain.v6);
        cached
    }
}

impl Device for Twins {
    fn send(&mut self, packet: &[u8]) -> (Action, Vec<u8>) {
        self.packet(packet, |host| host.send(packet))
    }

    fn leave(&mut self, packet: &[u8]) -> (Action, Vec<u8>) {
        self.packet(packet, |host| host.leave(packet))
    }

    fn wait(&mut self, ticks: Tick) {
        self.both(|host| host.wait(ticks));
    }

    fn set_vip(&mut self, address: IpAddr, port: u16, protocol: u8, service: u32) {
        self.both(|host| host.set_vip(address, port, protocol, service));
    }

    fn set_service(&mut self, index: u32, service: Service) {
        self.both(|host| host.set_service(index, service));
    }

    fn set_source_range(&mut self, service: u32, range: (IpAddr, u32), allowed: bool) {
        self.both(|host| host.set_source_range(service, range, allowed));
    }

    fn set_affinity_ticks(&mut self, service: u32, ticks: Tick) {
        self.both(|host| host.set_affinity_ticks(service, ticks));
    }

    fn set_connection_limit(&mut self, service: u32, limit: ConnectionLimit) {
        self.both(|host| host.set_connection_limit(service, limit));
    }

    fn set_slot(&mut self, index: u32, backend: u32) {
        self.both(|host| host.set_slot(index, backend));
    }

    fn set_backend(&mut self, index: u32, backend: Backend) {
        self.both(|host| host.set_backend(index, backend));
    }

    fn set_snat_address(&mut self, index: u32, address: IpAddr) {
        self.both(|host| host.set_snat_address(index, address));
    }

    fn set_config(&mut self, config: Config) {
        self.both(|host| host.set_config(config));
    }

    fn hook(&self) -> Hook {
        self.cached.hook
    }

    fn add_device(&mut self, ifindex: u32) {
        self.both(|host| host.add_device(ifindex));
    }

    fn evict(&mut self, key: AnyKey) -> bool {
        let (cached, plain) = self.both(|host| host.evict(key));
        assert_eq!(cached, plain, "evicted with and without the cache: {key:?}");
        cached
    }

    fn snapshots(&mut self) -> Snapshots {
        self.compare();
        self.cached.snapshots()
    }

    fn stats(&mut self) -> Stats {
        self.cached.stats()
    }
}
