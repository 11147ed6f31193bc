//! A small world: clients, four Services (TCP and UDP, IPv4 and IPv6), their backends.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use lb_common::abi::{Backend, BackendState, Config, IPPROTO_TCP, IPPROTO_UDP, NextHop, Service};

use super::device::{Action, Device, wide};
use super::packet::{Body, Spec};
use super::seen::{self, Seen};

/// The device towards backends; packets come in by another.
pub const BACKEND_DEVICE: u32 = 7;
/// The port of the TCP Services.
pub const HTTP: u16 = 80;
/// The port of the UDP Services.
pub const DNS: u16 = 53;
/// The port of the TCP backends.
pub const HTTP_BACKEND: u16 = 8080;
/// The port of the UDP backends.
pub const DNS_BACKEND: u16 = 5353;
/// The node's own link-layer address.
pub const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// An address family, with the world's addresses in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ip {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Ip {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    fn address(self, network: u8, host: u32) -> IpAddr {
        let [_, a, b, c] = host.to_be_bytes();
        match self {
            Self::V4 => Ipv4Addr::new(10 + network, a, b, c).into(),
            Self::V6 => {
                Ipv6Addr::new(0x2001, 0xdb8, network.into(), 0, 0, 0, (host >> 16) as u16, host as u16).into()
            }
        }
    }

    /// The VIP.
    #[must_use]
    pub fn vip(self) -> IpAddr {
        self.address(0, 1)
    }

    /// A client.
    #[must_use]
    pub fn client(self, number: u32) -> IpAddr {
        self.address(1, number)
    }

    /// A backend, from 0.
    #[must_use]
    pub fn backend(self, number: u32) -> IpAddr {
        self.address(2, number + 1)
    }

    /// An address of the node towards backends.
    #[must_use]
    pub fn snat(self, number: u32) -> IpAddr {
        self.address(3, number)
    }

    /// A router on the way.
    #[must_use]
    pub fn router(self) -> IpAddr {
        self.address(4, 1)
    }

    /// The index of the Service entry of a protocol.
    #[must_use]
    pub fn service(self, protocol: u8) -> u32 {
        match (self, protocol) {
            (Self::V4, IPPROTO_TCP) => 1,
            (Self::V4, _) => 2,
            (Self::V6, IPPROTO_TCP) => 3,
            (Self::V6, _) => 4,
        }
    }

    /// The index of the first of two source addresses.
    #[must_use]
    pub fn first_snat(self) -> u16 {
        if self == Self::V4 { 10 } else { 20 }
    }

    /// Where the Service's slots are.
    #[must_use]
    pub fn first_slot(self, protocol: u8) -> u32 {
        self.service(protocol) * 512
    }

    /// The index of a backend, from 0.
    #[must_use]
    pub fn backend_index(self, protocol: u8, number: u32) -> u32 {
        // Far more slots than backends share the array: the sets of a test wrap around.
        self.service(protocol) + 8 * (number % 30) + 1
    }
}

/// The link-layer address of a backend.
#[must_use]
pub fn backend_mac(number: u32) -> [u8; 6] {
    [2, 0xbb, 0, 0, (number >> 8) as u8, number as u8]
}

/// The entry of a backend.
#[must_use]
pub fn backend(ip: Ip, protocol: u8, number: u32) -> Backend {
    let port = if protocol == IPPROTO_TCP { HTTP_BACKEND } else { DNS_BACKEND };
    Backend {
        address: wide(ip.backend(number)),
        port: port.to_be_bytes(),
        state: BackendState::Active as u8,
        family: if ip == Ip::V4 { 4 } else { 6 },
        generation: 1,
        service: ip.service(protocol),
        snat_first: ip.first_snat(),
        snat_count: 1,
        next_hop: NextHop {
            ifindex: BACKEND_DEVICE,
            destination_mac: backend_mac(number),
            source_mac: NODE_MAC,
            vlan: [0; 4],
        },
        weight: 1,
        flags: 0,
        reserved: 0,
        mtu: 0,
        reserved_end: [0; 4],
    }
}

/// Fills the maps: every Service has as many backends.
pub fn set_up(device: &mut dyn Device, backends: u32) {
    device.set_config(Config::default());
    device.add_device(BACKEND_DEVICE);
    for ip in Ip::BOTH {
        for number in 0..2 {
            device.set_snat_address(u32::from(ip.first_snat()) + number, ip.snat(number + 1));
        }
        for (protocol, port) in [(IPPROTO_TCP, HTTP), (IPPROTO_UDP, DNS)] {
            device.set_vip(ip.vip(), port, protocol, ip.service(protocol));
            for number in 0..backends.min(30) {
                device.set_backend(ip.backend_index(protocol, number), backend(ip, protocol, number));
            }
            set_slots(device, ip, protocol, backends);
        }
    }
}

/// Gives a Service its slots, and takes all its flags.
pub fn set_slots(device: &mut dyn Device, ip: Ip, protocol: u8, backends: u32) {
    set_flags(device, ip, protocol, backends, 0);
}

/// Gives a Service its slots and flags.
pub fn set_flags(device: &mut dyn Device, ip: Ip, protocol: u8, backends: u32, flags: u8) {
    let first_slot = ip.first_slot(protocol);
    for number in 0..backends {
        device.set_slot(first_slot + number, ip.backend_index(protocol, number));
    }
    device.set_service(ip.service(protocol), Service::new(first_slot, backends, flags));
}

/// A client's packet to the VIP.
#[must_use]
pub fn to_vip(ip: Ip, client: u32, body: Body) -> Spec {
    let mut spec = Spec::new(ip.client(client), ip.vip(), body);
    spec.from = client_mac(client);
    spec.to = NODE_MAC;
    spec
}

/// The link-layer address of a client.
#[must_use]
pub fn client_mac(client: u32) -> [u8; 6] {
    [2, 0xcc, 0, 0, (client >> 8) as u8, client as u8]
}

/// A UDP datagram.
#[must_use]
pub fn udp(source: u16, destination: u16, payload: &[u8]) -> Body {
    Body::Udp { source, destination, payload: payload.to_vec(), checksum: true }
}

/// A backend's answer to a packet that it has received.
#[must_use]
pub fn answer(received: &Seen, body: Body) -> Spec {
    let mut spec = Spec::new(received.destination, received.source, body);
    spec.from = received.to;
    spec.to = received.from;
    spec
}

/// Sends a packet that must be forwarded; gives what its receiver sees. One hop less, the payload
/// untouched, all checksums right.
///
/// # Panics
/// When it is not so.
pub fn forwarded(device: &mut dyn Device, spec: &Spec) -> Seen {
    let frame = spec.build();
    let (action, bytes) = device.send(&frame);
    assert!(
        matches!(action, Action::Redirect | Action::Transmit),
        "{action:?} of {:?}; counters {:?}",
        seen::read(&frame),
        device.stats()
    );
    let seen = seen::read(&bytes).unwrap_or_else(|error| panic!("{error} in {bytes:02x?}, of {spec:?}"));
    assert_eq!(seen.hops, spec.hops - 1, "one hop less");
    match &spec.body {
        Body::Tcp(tcp) => assert_eq!(seen.payload(), tcp.payload, "payload"),
        Body::Udp { payload, .. } => assert_eq!(seen.payload(), payload, "payload"),
        Body::Icmp { .. } | Body::Raw { .. } => {}
    }
    assert_eq!(bytes[bytes.len() - spec.padding..], frame[frame.len() - spec.padding..], "padding");
    seen
}

/// Sends a packet that must be passed untouched.
///
/// # Panics
/// When it is not.
pub fn passed(device: &mut dyn Device, frame: &[u8]) {
    let (action, bytes) = device.send(frame);
    assert_eq!(action, Action::Pass, "{:?} {frame:02x?}", seen::read(frame));
    assert_eq!(bytes, frame, "a packet that is passed is untouched");
}

/// Sends a packet that must be dropped for a reason.
///
/// # Panics
/// When it is not.
pub fn dropped(device: &mut dyn Device, frame: &[u8], reason: lb_common::abi::DropReason) {
    let before = drops(device, reason);
    let (action, _) = device.send(frame);
    assert_eq!(action, Action::Drop, "{:?}", seen::read(frame));
    assert_eq!(drops(device, reason), before + 1, "{reason:?}; counters {:?}", device.stats());
}

/// The number of drops for a reason.
pub fn drops(device: &mut dyn Device, reason: lb_common::abi::DropReason) -> u64 {
    device.stats().drops.get(&(reason as u32)).map_or(0, |drops| drops.packets)
}

/// Sends a packet that must be answered at once; gives the answer.
///
/// # Panics
/// When it is not answered, or by a packet that is malformed.
pub fn answered(device: &mut dyn Device, spec: &Spec) -> Seen {
    let (action, bytes) = device.send(&spec.build());
    assert_eq!(action, Action::Transmit, "answered; counters {:?}", device.stats());
    let seen = seen::read(&bytes).unwrap_or_else(|error| panic!("{error} in {bytes:02x?}"));
    assert_eq!((seen.from, seen.to), (spec.to, spec.from), "sent back where it came from");
    assert_eq!((seen.source, seen.destination), (spec.destination, spec.source));
    assert_eq!(seen.hops, 64);
    assert_eq!(seen.vlan, spec.vlan);
    seen
}
