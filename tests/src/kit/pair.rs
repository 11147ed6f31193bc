//! Host and kernel side by side: whatever one does, the other must do too.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Debug;
use std::net::IpAddr;

use etherparse::{SlicedPacket, TcpHeader, TcpOptionElement, TransportSlice};
use lb_common::abi::{Backend, Config, ConnectionLimit, ConnectionRate, Flow, FlowFlags, Service, Tick};
use lb_common::forward::Verdict;

use super::device::{Action, AnyKey, Device};
use super::host::{Hook, Host, Stats};
use super::kernel::{CACHE_SLOTS, FOREVER, Kernel};
use super::offload;
use super::random::Source;
use super::skb::Frame;
use super::tables::{Snapshot, Snapshots};
use super::taps::{INGRESS, PASSED, Taps};
use super::world::BACKEND_DEVICE;

/// Both datapaths.
pub struct Pair {
    /// The core on the host.
    pub host: Host,
    kernel: Kernel,
    wire: Option<(Taps, Source)>,
    /// Tables and counters are compared after every so many packets.
    pub compare_every: usize,
    sent: usize,
    history: VecDeque<Vec<u8>>,
}

/// Packets that are shown when the two differ.
const HISTORY: usize = 12;

impl Pair {
    /// Both, with empty maps.
    #[must_use]
    pub fn new(kernel: Kernel) -> Self {
        let mut host = Host::default();
        host.hook = kernel.hook();
        Self { host, kernel, wire: None, compare_every: 1, sent: 0, history: VecDeque::new() }
    }

    /// The programs of TC on a device; what comes in is as virtual NICs hand it over, by choices of the
    /// source.
    ///
    /// # Errors
    /// See [`Taps::new`].
    pub fn on_a_device(mut kernel: Kernel, source: Source) -> anyhow::Result<Self> {
        let taps = Taps::new(&mut kernel)?;
        let mut pair = Self { wire: Some((taps, source)), ..Self::new(kernel) };
        pair.host.ingress = INGRESS;
        Ok(pair)
    }

    /// With the flow cache on the host as [`Kernel::load_with_cache`] has made it in the kernel.
    #[must_use]
    pub fn with_cache(mut self) -> Self {
        self.host.set_cache(CACHE_SLOTS);
        self.host.cache_lifetime = FOREVER;
        self
    }

    /// Compares all that is remembered and counted.
    ///
    /// # Panics
    /// When it differs.
    pub fn compare(&mut self) {
        let (ours, theirs) = (self.host.snapshots(), self.kernel.snapshots());
        self.compare_tables("IPv4", &ours.v4, &theirs.v4);
        self.compare_tables("IPv6", &ours.v6, &theirs.v6);
        assert_eq!(
            self.host.stats(),
            self.kernel.stats(),
            "counters on the host, in the kernel; {}",
            self.past()
        );
    }

    fn compare_tables<A: Ord + Copy + Debug + PartialEq>(
        &self,
        family: &str,
        ours: &Snapshot<A>,
        theirs: &Snapshot<A>,
    ) {
        for (name, ours, theirs) in [
            ("established", &ours.established, &theirs.established),
            ("transient", &ours.transient, &theirs.transient),
        ] {
            let (ours, theirs) = (comparable(ours), comparable(theirs));
            for (key, flow) in &ours {
                assert_eq!(Some(flow), theirs.get(key), "{family} {name} flow {key:?}; {}", self.past());
            }
            for key in theirs.keys() {
                assert!(
                    ours.contains_key(key),
                    "{family} {name}: only the kernel has {key:?}; {}",
                    self.past()
                );
            }
        }
        assert!(
            ours.fragments.keys().eq(theirs.fragments.keys()),
            "{family} fragments {:?}, {:?}; {}",
            ours.fragments,
            theirs.fragments,
            self.past()
        );
        // The moment apart, as with flows.
        let backends = |snapshot: &Snapshot<A>| -> Vec<_> {
            let affinities = snapshot.affinities.iter();
            affinities.map(|(key, entry)| (*key, entry.backend, entry.generation)).collect()
        };
        assert_eq!(backends(ours), backends(theirs), "{family} affinities; {}", self.past());
        assert!(
            ours.rates.keys().eq(theirs.rates.keys()),
            "{family} rates {:?}, {:?}; {}",
            ours.rates,
            theirs.rates,
            self.past()
        );
        for (key, rate) in &ours.rates {
            // The kernel's clock may tick between two questions of one packet.
            let apart = theirs.rates[key].full_at.wrapping_sub(rate.full_at).cast_signed().unsigned_abs();
            assert!(apart <= ConnectionRate::time(1), "{family} rate of {key:?}; {}", self.past());
        }
    }

    fn past(&self) -> String {
        let packets: Vec<String> = self
            .history
            .iter()
            .map(|packet| packet.iter().map(|byte| format!("{byte:02x}")).collect())
            .collect();
        format!("packet {}; the last ones:\n{}", self.sent, packets.join("\n"))
    }
}

/// Flows without what depends on the moment: the kernel's clock goes on between the two runs.
fn comparable<A: Copy + Ord>(
    table: &BTreeMap<lb_common::abi::FlowKey<A>, Flow<A>>,
) -> BTreeMap<lb_common::abi::FlowKey<A>, Flow<A>> {
    table
        .iter()
        .map(|(key, flow)| {
            let mark = if key.protocol == 17 { 0 } else { flow.mark };
            // The moment at which the kernel is asked for the way again is one by the clock, too.
            let asks_again = flow.status.flags & FlowFlags::OLD_WAY != 0;
            let generation = if asks_again { 0 } else { flow.generation };
            (*key, Flow { last_seen: 0, mark, generation, ..*flow })
        })
        .collect()
}

/// The cookie that the kernel has answered a SYN with, without what the core has added to it: 2 if the SYN
/// names a segment size of 1,360 or more.
fn cookie_in(syn: &[u8], answer: &[u8]) -> Option<u32> {
    fn tcp(frame: &[u8]) -> Option<TcpHeader> {
        match SlicedPacket::from_ethernet(frame).ok()?.transport? {
            TransportSlice::Tcp(tcp) => Some(tcp.to_header()),
            _ => None,
        }
    }
    let answer = tcp(answer).filter(|answer| answer.syn && answer.ack)?;
    let is_large = tcp(syn)?
        .options_iterator()
        .any(|option| matches!(option, Ok(TcpOptionElement::MaximumSegmentSize(1_360..))));
    Some(answer.sequence_number.wrapping_sub(if is_large { 2 } else { 0 }))
}

/// When each flow was last seen.
fn moments<A: Ord>(tables: &Snapshot<A>) -> impl Iterator<Item = Tick> {
    tables.established.values().chain(tables.transient.values()).map(|flow| flow.last_seen)
}

impl Pair {
    fn note(&mut self, packet: &[u8]) {
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(packet.to_vec());
        self.sent += 1;
        self.host.now = Kernel::now();
    }

    /// When the kernel took the packet that it was just given. Its clock may have gone on meanwhile: the
    /// youngest flow tells then. Flows remember more of a packet when it is the first of its tick.
    fn moment(&mut self) -> Tick {
        let (before, after) = (self.host.now, Kernel::now());
        if before == after {
            return before;
        }
        let tables = self.kernel.snapshots();
        let seen = moments(&tables.v4).chain(moments(&tables.v6)).map(|seen| seen.wrapping_sub(before));
        before.wrapping_add(seen.filter(|ago| *ago <= after.wrapping_sub(before)).max().unwrap_or(0))
    }

    /// Both must have done the same.
    fn judge(
        &mut self,
        (verdict, bytes): (Verdict, Vec<u8>),
        theirs: (Action, Vec<u8>),
    ) -> (Action, Vec<u8>) {
        let ours = (Action::from(verdict), bytes);
        // TC knows one way to send.
        let in_kernel = match theirs.0 {
            Action::Redirect if self.host.hook == Hook::Tc => ours.0.sent().unwrap_or(theirs.0),
            other => other,
        };
        assert_eq!(ours.0, in_kernel, "host ({verdict:?}), kernel; {}", self.past());
        // What is dropped is nobody's to see.
        if ours.0 != Action::Drop {
            // In TC the outer tag, if it is new, is beside the packet, where test runs do not show it.
            let is_beside = self.host.hook == Hook::Tc && theirs.1.len() + 4 == ours.1.len();
            let ours = if is_beside { without_outer_tag(&ours.1) } else { ours.1.clone() };
            assert_eq!(ours, theirs.1, "bytes on the host, in the kernel; {}", self.past());
        }
        if self.sent.is_multiple_of(self.compare_every) {
            self.compare();
        }
        ours
    }
}

impl Pair {
    /// Sends a frame by devices. Gives the packet as it would be on the wire.
    fn send_by(&mut self, taps: &mut Taps, packet: &[u8], frame: Frame) -> (Action, Vec<u8>) {
        let Some(received) = frame.clone().received() else {
            // The kernel drops it before any program sees it.
            return (Action::Pass, packet.to_vec());
        };
        let theirs = taps.send(&frame);
        self.host.now = self.moment();
        let answer = theirs.first().and_then(|(_, answer)| cookie_in(packet, &answer.finished()));
        self.host.next_cookie.set(answer);
        let (verdict, ours) = self.host.run_frame(&received);
        let device = match verdict {
            Verdict::Pass | Verdict::Deliver => Some(PASSED),
            Verdict::Transmit => Some(INGRESS),
            // No other device is up.
            Verdict::Redirect(device) => (device == BACKEND_DEVICE).then_some(device),
            Verdict::Drop => None,
        };
        let expected: Vec<_> = device.map(|device| (device, ours.clone())).into_iter().collect();
        assert_eq!(expected, theirs, "host ({verdict:?}), kernel; sent {frame:?}; {}", self.past());
        if self.sent.is_multiple_of(self.compare_every) {
            self.compare();
        }
        if verdict == Verdict::Pass {
            assert_eq!(ours, frame, "what is passed is untouched");
            return (Action::Pass, packet.to_vec());
        }
        (verdict.into(), ours.finished())
    }
}

fn without_outer_tag(frame: &[u8]) -> Vec<u8> {
    [&frame[..12], &frame[16..]].concat()
}

impl Device for Pair {
    fn send(&mut self, packet: &[u8]) -> (Action, Vec<u8>) {
        self.note(packet);
        if let Some((mut taps, mut source)) = self.wire.take() {
            let frame = offload::choose(packet, &mut source);
            let done = self.send_by(&mut taps, packet, frame);
            self.wire = Some((taps, source));
            return done;
        }
        let theirs = self.kernel.send(packet);
        self.host.now = self.moment();
        self.host.next_cookie.set(cookie_in(packet, &theirs.1));
        let (verdict, bytes) = self.host.run(packet);
        self.judge((verdict, bytes), theirs)
    }

    fn leave(&mut self, packet: &[u8]) -> (Action, Vec<u8>) {
        self.note(packet);
        let theirs = self.kernel.leave(packet);
        self.host.now = self.moment();
        let ours = self.host.run_egress(packet);
        self.judge(ours, theirs)
    }

    fn wait(&mut self, ticks: Tick) {
        self.host.age(ticks);
        self.kernel.wait(ticks);
    }

    fn set_vip(&mut self, address: IpAddr, port: u16, protocol: u8, service: u32) {
        self.host.set_vip(address, port, protocol, service);
        self.kernel.set_vip(address, port, protocol, service);
    }

    fn set_service(&mut self, index: u32, service: Service) {
        self.host.set_service(index, service);
        self.kernel.set_service(index, service);
    }

    fn set_source_range(&mut self, service: u32, range: (IpAddr, u32), allowed: bool) {
        self.host.set_source_range(service, range, allowed);
        self.kernel.set_source_range(service, range, allowed);
    }

    fn set_affinity_ticks(&mut self, service: u32, ticks: Tick) {
        self.host.set_affinity_ticks(service, ticks);
        self.kernel.set_affinity_ticks(service, ticks);
    }

    fn set_connection_limit(&mut self, service: u32, limit: ConnectionLimit) {
        self.host.set_connection_limit(service, limit);
        self.kernel.set_connection_limit(service, limit);
    }

    fn set_slot(&mut self, index: u32, backend: u32) {
        self.host.set_slot(index, backend);
        self.kernel.set_slot(index, backend);
    }

    fn set_backend(&mut self, index: u32, backend: Backend) {
        self.host.set_backend(index, backend);
        self.kernel.set_backend(index, backend);
    }

    fn set_snat_address(&mut self, index: u32, address: IpAddr) {
        self.host.set_snat_address(index, address);
        self.kernel.set_snat_address(index, address);
    }

    fn set_config(&mut self, config: Config) {
        self.host.set_config(config);
        self.kernel.set_config(config);
    }

    fn hook(&self) -> Hook {
        self.host.hook
    }

    fn add_device(&mut self, ifindex: u32) {
        self.host.add_device(ifindex);
        self.kernel.add_device(ifindex);
    }

    fn evict(&mut self, key: AnyKey) -> bool {
        let there = self.host.evict(key);
        assert_eq!(there, self.kernel.evict(key), "evicted on the host, in the kernel: {key:?}");
        there
    }

    fn snapshots(&mut self) -> Snapshots {
        self.compare();
        self.host.snapshots()
    }

    fn stats(&mut self) -> Stats {
        self.host.stats()
    }
}
