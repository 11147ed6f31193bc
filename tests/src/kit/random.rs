//! Traffic without a plan: from a seed, or from the bytes that a fuzzer comes up with.

use lb_common::abi::{
    Backend, BackendFlags, BackendState, Config, ConnectionLimit, IPPROTO_TCP, IPPROTO_UDP, ServiceFlags,
    ticks_from_seconds,
};

use super::device::{Action, AnyKey, Device};
use super::packet::flags::{ACK, FIN, PSH, RST, SYN};
use super::packet::{Body, Spec, Tcp, tcp_options};
use super::seen::{self, SeenBody};
use super::world::{DNS, HTTP, Ip, answer, backend, set_flags, set_up, to_vip, udp};

/// Where choices come from.
pub enum Source {
    /// A generator (splitmix64): the same seed gives the same traffic.
    Seed(u64),
    /// Bytes that are used up; all choices are 0 afterwards.
    Bytes(Vec<u8>, usize),
}

impl Source {
    /// A number below `limit`.
    pub fn below(&mut self, limit: u32) -> u32 {
        match self {
            Self::Seed(state) => {
                *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut mixed = *state;
                mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                ((mixed ^ (mixed >> 31)) % u64::from(limit)) as u32
            }
            Self::Bytes(bytes, used) => {
                let mut value = 0;
                for _ in 0..if limit <= 256 { 1 } else { 4 } {
                    value = value << 8 | u32::from(bytes.get(*used).copied().unwrap_or(0));
                    *used += 1;
                }
                value % limit
            }
        }
    }

    /// One of some values.
    pub fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len() as u32) as usize]
    }

    /// True once in so many times.
    pub fn once_in(&mut self, times: u32) -> bool {
        self.below(times) == times - 1
    }

    /// Whether there is more to come.
    #[must_use]
    pub fn is_used_up(&self) -> bool {
        matches!(self, Self::Bytes(bytes, used) if *used >= bytes.len())
    }
}

/// Clients, backends and a network that do as they like.
pub struct Traffic {
    source: Source,
    /// What was forwarded lately, as its receiver saw it.
    forwarded: Vec<Vec<u8>>,
    /// What was sent lately.
    sent: Vec<Vec<u8>>,
    route_generation: u32,
}

/// Frames that are remembered.
const MEMORY: usize = 64;

/// A test run in the kernel wants an IP header, and one page at most.
const SHORTEST_TO_LEAVE: usize = 14 + 40;

/// A packet that was in order before it was edited still is.
fn still_right(frame: &[u8], edited: &[u8]) {
    if let Ok(before) = seen::read(frame) {
        let after = seen::read(edited);
        assert!(after.is_ok(), "{after:?}\n{frame:02x?}\n{edited:02x?}\n{before:?}");
    }
}

impl Traffic {
    /// Traffic in a world with few ports, so that flows meet.
    pub fn new(device: &mut dyn Device, source: Source) -> Self {
        set_up(device, 3);
        let mut traffic = Self { source, forwarded: Vec::new(), sent: Vec::new(), route_generation: 1 };
        traffic.configure(device);
        traffic
    }

    /// Whether the source has more to say.
    #[must_use]
    pub fn goes_on(&self) -> bool {
        !self.source.is_used_up()
    }

    /// Does one thing: sends some packets, or changes the world.
    ///
    /// # Panics
    /// When a packet is treated as none may be.
    pub fn step(&mut self, device: &mut dyn Device) {
        if self.source.once_in(24) {
            self.change(device);
            return;
        }
        if self.source.once_in(12) {
            self.conversation(device);
            return;
        }
        for mut frame in self.frames() {
            if self.source.once_in(8) {
                self.mutate(&mut frame);
            }
            self.send(device, frame);
        }
    }

    /// A TCP connection by the book, as far as it gets.
    fn conversation(&mut self, device: &mut dyn Device) {
        let ip = self.source.of(&Ip::BOTH);
        let client = self.source.below(6);
        let source = 40_000 + self.source.below(64) as u16;
        let mut numbers = [self.number(), self.number()];
        let clocks = if self.source.once_in(4) { None } else { Some([self.number(), self.number()]) };
        let mut received = None;
        for (from_client, flags) in [
            (true, SYN),
            (false, SYN | ACK),
            (true, ACK),
            (true, PSH | ACK),
            (false, PSH | ACK),
            (true, FIN | ACK),
            (false, FIN | ACK),
            (true, ACK),
        ] {
            if self.source.once_in(10) {
                return;
            }
            let (mine, theirs) = if from_client { (0, 1) } else { (1, 0) };
            let mut tcp = Tcp {
                source,
                destination: HTTP,
                sequence: numbers[mine],
                acknowledgment: if flags & ACK == 0 { 0 } else { numbers[theirs] },
                flags,
                options: clocks.map_or_else(Vec::new, |clocks| {
                    tcp_options(
                        flags & SYN != 0,
                        clocks[mine],
                        if flags & ACK == 0 { 0 } else { clocks[theirs] },
                    )
                }),
                payload: if flags & PSH == 0 { Vec::new() } else { self.payload() },
            };
            numbers[mine] =
                numbers[mine].wrapping_add(tcp.payload.len() as u32 + u32::from(flags & (SYN | FIN) != 0));
            let spec = if from_client {
                to_vip(ip, client, Body::Tcp(tcp))
            } else {
                let Some(received) = &received else { return };
                (tcp.destination, tcp.source) = seen::Seen::ports(received);
                answer(received, Body::Tcp(tcp))
            };
            match self.send(device, spec.build()) {
                Some(bytes) if from_client => received = seen::read(&bytes).ok(),
                Some(_) => {}
                None => return,
            }
        }
    }

    fn send(&mut self, device: &mut dyn Device, frame: Vec<u8>) -> Option<Vec<u8>> {
        let (action, bytes) = device.send(&frame);
        let mut sent = None;
        match action {
            Action::Pass if bytes == frame => sent = self.leave(device, &frame),
            Action::Drop => {}
            Action::Pass | Action::Transmit | Action::Redirect => {
                still_right(&frame, &bytes);
                sent = Some(bytes.clone());
                remember(&mut self.forwarded, bytes);
            }
        }
        remember(&mut self.sent, frame);
        sent
    }

    /// What the node passes may be routed out of it.
    fn leave(&mut self, device: &mut dyn Device, frame: &[u8]) -> Option<Vec<u8>> {
        if !(SHORTEST_TO_LEAVE..=super::view::MAXIMUM_PACKET).contains(&frame.len()) {
            return None;
        }
        let (action, bytes) = device.leave(frame);
        if action == Action::Drop || bytes == frame {
            return None;
        }
        still_right(frame, &bytes);
        remember(&mut self.forwarded, bytes.clone());
        Some(bytes)
    }

    fn configure(&mut self, device: &mut dyn Device) {
        device.set_config(Config {
            route_generation: self.route_generation,
            snat_port_first: 2000,
            snat_port_count: 24,
            ..Config::default()
        });
    }

    fn change(&mut self, device: &mut dyn Device) {
        let ip = self.source.of(&Ip::BOTH);
        let protocol = self.source.of(&[IPPROTO_TCP, IPPROTO_UDP]);
        match self.source.below(8) {
            0 | 1 => {
                // Far from every timeout, so that a clock that ticks between two runs decides nothing.
                let seconds = self.source.of(&[1, 3, 7, 20, 45, 90, 200, 4_000]);
                device.wait(ticks_from_seconds(seconds) + 31);
            }
            2 => self.evict(device),
            3 => {
                let count = self.source.below(4);
                // Most Services let everybody in, or little else would be tried.
                let flags = self.source.of(&[
                    0,
                    0,
                    ServiceFlags::AFFINITY,
                    ServiceFlags::AFFINITY,
                    ServiceFlags::SOURCE_RANGES | ServiceFlags::AFFINITY,
                    ServiceFlags::SOURCE_RANGES,
                    ServiceFlags::CONNECTION_RATE | ServiceFlags::AFFINITY,
                    ServiceFlags::MAGLEV,
                    ServiceFlags::LEAST_CONNECTIONS,
                    ServiceFlags::LEAST_CONNECTIONS | ServiceFlags::AFFINITY,
                    ServiceFlags::MAGLEV | ServiceFlags::AFFINITY,
                ]);
                set_flags(device, ip, protocol, count, flags);
            }
            4 => {
                let number = self.source.below(3);
                let mut entry = backend(ip, protocol, number);
                match self.source.below(8) {
                    0 => entry = Backend::default(),
                    1 => entry.state = BackendState::Terminating as u8,
                    2 => entry.generation = 1 + self.source.below(3),
                    3 => entry.next_hop.vlan = self.source.of(&[[0, 9, 0, 0], [0, 9, 0, 8], [0; 4]]),
                    6 | 7 => entry.flags = BackendFlags::LOCAL,
                    4 => entry.next_hop.ifindex = self.source.of(&[0, 1, 99]),
                    5 if self.source.once_in(2) => entry.mtu = self.source.of(&[60, 600]),
                    _ => entry.snat_count = self.source.of(&[1, 2, 0]),
                }
                device.set_backend(ip.backend_index(protocol, number), entry);
            }
            5 => {
                self.route_generation += 1;
                self.configure(device);
            }
            6 => {
                let all = if ip == Ip::V4 { 32 } else { 128 };
                let length = self.source.of(&[0, all - 12, all - 2, all - 1, all]);
                let client = ip.client(self.source.below(6));
                let allowed = !self.source.once_in(3);
                device.set_source_range(ip.service(protocol), (client, length), allowed);
            }
            _ => {
                let seconds = self.source.of(&[150, 2_000, 86_400]);
                device.set_affinity_ticks(ip.service(protocol), ticks_from_seconds(seconds));
                let limit =
                    ConnectionLimit { rate: self.source.of(&[1, 2]), burst: self.source.of(&[1, 3, 7]) };
                device.set_connection_limit(ip.service(protocol), limit);
            }
        }
    }

    fn evict(&mut self, device: &mut dyn Device) {
        let snapshots = device.snapshots();
        let choice = self.source.below(1 << 16) as usize;
        let keys = snapshots.v4.transient.keys().map(|key| AnyKey::V4(*key));
        let keys: Vec<_> = keys.chain(snapshots.v6.transient.keys().map(|key| AnyKey::V6(*key))).collect();
        if !keys.is_empty() {
            device.evict(keys[choice % keys.len()]);
        }
    }

    fn frames(&mut self) -> Vec<Vec<u8>> {
        let frame = match self.source.below(16) {
            0..=6 => {
                let spec = self.client_packet();
                return self.maybe_fragments(&spec);
            }
            7..=11 => match self.backend_packet() {
                Some(spec) => return self.maybe_fragments(&spec),
                None => return Vec::new(),
            },
            12 | 13 => self.icmp_error(),
            14 => self.recall(false),
            _ => {
                let length = 14 + self.source.below(120);
                Some((0..length).map(|_| self.source.below(256) as u8).collect())
            }
        };
        frame.into_iter().collect()
    }

    fn recall(&mut self, forwarded: bool) -> Option<Vec<u8>> {
        let frames = if forwarded { &self.forwarded } else { &self.sent };
        let count = frames.len() as u32;
        if count == 0 {
            return None;
        }
        let index = self.source.below(count) as usize;
        Some(if forwarded { self.forwarded[index].clone() } else { self.sent[index].clone() })
    }

    fn maybe_fragments(&mut self, spec: &Spec) -> Vec<Vec<u8>> {
        if self.source.once_in(12) {
            let size = self.source.of(&[8, 24, 40, 64]);
            let mut frames = spec.fragments(size);
            if self.source.once_in(3) {
                frames.rotate_left(1);
            }
            frames
        } else {
            vec![spec.build()]
        }
    }

    fn decorate(&mut self, spec: &mut Spec) {
        spec.hops = if self.source.once_in(20) { self.source.of(&[0, 1, 2, 255]) } else { 64 };
        spec.identification = self.source.below(4);
        if self.source.once_in(10) {
            spec.vlan = self.source.of(&[&[5u16][..], &[5, 6], &[9], &[0], &[0, 5], &[9, 8]]).to_vec();
        }
        if self.source.once_in(10) {
            spec.options = vec![1; self.source.below(40) as usize];
            spec.extensions = (0..self.source.below(6))
                .map(|_| (self.source.of(&[0, 60, 43]), vec![1, self.source.of(&[4, 12]), 0, 0]))
                .collect();
        }
        spec.padding = if self.source.once_in(10) { self.source.below(20) as usize } else { 0 };
    }

    fn payload(&mut self) -> Vec<u8> {
        let length = if self.source.once_in(20) { self.source.below(1400) } else { self.source.below(24) };
        let byte = self.source.below(256) as u8;
        (0..length).map(|index| byte.wrapping_add(index as u8)).collect()
    }

    fn segment(&mut self, source: u16, destination: u16) -> Body {
        let flags = self.source.of(&[
            SYN,
            SYN,
            SYN | ACK,
            ACK,
            ACK,
            PSH | ACK,
            FIN | ACK,
            FIN | ACK,
            RST,
            RST | ACK,
            0,
            0xff,
        ]);
        let options = match self.source.below(6) {
            0 | 1 => Vec::new(),
            2 | 3 => tcp_options(flags & SYN != 0, self.number(), self.number()),
            4 => [vec![1], tcp_options(true, self.number(), self.number())].concat(),
            _ => (0..self.source.below(41)).map(|_| self.source.of(&[0, 1, 2, 3, 4, 8, 10, 40])).collect(),
        };
        Body::Tcp(Tcp {
            source,
            destination,
            sequence: self.number(),
            acknowledgment: self.number(),
            flags,
            options,
            payload: self.payload(),
        })
    }

    /// A number of few, so that acknowledgments fit every now and then.
    fn number(&mut self) -> u32 {
        self.source.of(&[0, 1, 2, 1_000, 1_001, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff])
    }

    fn client_packet(&mut self) -> Spec {
        let ip = self.source.of(&Ip::BOTH);
        let client = self.source.below(4);
        let port = 40_000 + self.source.below(8) as u16;
        let body = match self.source.below(5) {
            0..=2 => self.segment(port, HTTP),
            3 => udp(port, DNS, &self.payload()),
            _ => {
                Body::Udp { source: port, destination: DNS, payload: self.payload(), checksum: ip == Ip::V6 }
            }
        };
        let mut spec = to_vip(ip, client, body);
        self.decorate(&mut spec);
        spec
    }

    /// An answer to something that was forwarded; to a client's view of it just as well.
    fn backend_packet(&mut self) -> Option<Spec> {
        let received = seen::read(&self.recall(true)?).ok()?;
        let (source, destination) = received.ports();
        let body = match received.body {
            SeenBody::Tcp { .. } => self.segment(destination, source),
            SeenBody::Udp { .. } => udp(destination, source, &self.payload()),
            SeenBody::Icmp { .. } | SeenBody::Other(_) => return None,
        };
        let mut spec = answer(&received, body);
        self.decorate(&mut spec);
        Some(spec)
    }

    fn icmp_error(&mut self) -> Option<Vec<u8>> {
        let about = self.recall(true)?;
        let received = seen::read(&about).ok()?;
        let ip = if received.source.is_ipv4() { Ip::V4 } else { Ip::V6 };
        let start = 14 + 4 * received.vlan.len();
        let mut payload = about[start..].to_vec();
        if self.source.once_in(2) {
            payload.truncate(self.source.below(80) as usize);
        }
        let kind = match ip {
            Ip::V4 => self.source.of(&[3, 11, 12, 0, 8]),
            Ip::V6 => self.source.of(&[1, 2, 3, 4, 128]),
        };
        let code = self.source.below(5) as u8;
        let body = Body::Icmp { kind, code, rest: [0, 0, 5, 0], payload };
        let mut spec = Spec::new(ip.router(), received.source, body);
        self.decorate(&mut spec);
        Some(spec.build())
    }

    fn mutate(&mut self, frame: &mut Vec<u8>) {
        for _ in 0..=self.source.below(3) {
            let at = self.source.below(frame.len() as u32) as usize;
            match self.source.below(8) {
                0 => frame.truncate(at.max(14)),
                1 => frame.extend(std::iter::repeat_n(0xaa, at)),
                // Most of what decides lies in the first bytes.
                2 => frame[at] = self.source.below(256) as u8,
                _ => {
                    let at = 12 + self.source.below(frame.len().min(80) as u32 - 12) as usize;
                    frame[at] = match self.source.below(3) {
                        0 => self.source.below(256) as u8,
                        1 => frame[at] ^ 1 << self.source.below(8),
                        _ => self.source.of(&[0, 1, 6, 17, 44, 58, 60, 0x45, 0x60, 0x81, 0xff]),
                    };
                }
            }
        }
        frame.truncate(super::view::MAXIMUM_PACKET.min(3000));
    }
}

fn remember(frames: &mut Vec<Vec<u8>>, frame: Vec<u8>) {
    if frames.len() == MEMORY {
        frames.remove(0);
    }
    frames.push(frame);
}
