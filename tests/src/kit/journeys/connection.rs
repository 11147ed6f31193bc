//! A TCP connection with both of its ends.

use std::net::IpAddr;

use crate::kit::device::{AnyKey, Device};
use crate::kit::packet::flags::{ACK, FIN, PSH, SYN};
use crate::kit::packet::{Body, Spec, Tcp, tcp_options};
use crate::kit::seen::Seen;
use crate::kit::world::{HTTP, HTTP_BACKEND, Ip, answer, forwarded, to_vip};

/// Both ends of a connection, and the numbers that they have reached.
#[derive(Clone, Debug)]
pub struct Connection {
    /// The family.
    pub ip: Ip,
    /// The client's number.
    pub client: u32,
    /// The client's port.
    pub port: u16,
    /// The client's next sequence number.
    pub client_sequence: u32,
    /// The backend's next sequence number.
    pub backend_sequence: u32,
    /// The clocks of both ends, if they use timestamps.
    pub clocks: Option<(u32, u32)>,
    /// Tags that the client's frames carry.
    pub vlan: Vec<u16>,
    /// The last packet that the backend saw.
    pub received: Option<Seen>,
    /// The last timestamps (value) that backend and client saw of each other.
    pub last_values: (u32, u32),
}

impl Connection {
    /// A connection that no packet has been sent of.
    #[must_use]
    pub fn new(ip: Ip, client: u32, port: u16) -> Self {
        Self {
            ip,
            client,
            port,
            client_sequence: 1_000_000,
            backend_sequence: 4_000_000_000,
            clocks: None,
            vlan: Vec::new(),
            received: None,
            last_values: (0, 0),
        }
    }

    /// A connection after its handshake.
    pub fn open(device: &mut dyn Device, ip: Ip, client: u32, port: u16) -> Self {
        let mut connection = Self::new(ip, client, port);
        connection.handshake(device);
        connection
    }

    /// SYN, SYN-ACK, ACK.
    pub fn handshake(&mut self, device: &mut dyn Device) {
        self.from_client(device, SYN, b"");
        self.from_backend(device, SYN | ACK, b"");
        self.from_client(device, ACK, b"");
    }

    /// Both sides close, the client first.
    pub fn close(&mut self, device: &mut dyn Device) {
        self.from_client(device, FIN | ACK, b"");
        self.from_backend(device, FIN | ACK, b"");
        self.from_client(device, ACK, b"");
    }

    /// Data both ways.
    pub fn talk(&mut self, device: &mut dyn Device) {
        self.from_client(device, PSH | ACK, b"GET / HTTP/1.1\r\n\r\n");
        self.from_backend(device, PSH | ACK, b"HTTP/1.1 200 OK\r\n\r\nodd");
        self.from_client(device, ACK, b"");
    }

    /// A segment of the client's, not sent yet.
    #[must_use]
    pub fn client_segment(&self, flags: u8, payload: &[u8]) -> Spec {
        let body = Body::Tcp(Tcp {
            source: self.port,
            destination: HTTP,
            sequence: self.client_sequence,
            acknowledgment: if flags & ACK == 0 { 0 } else { self.backend_sequence },
            flags,
            options: self.clocks.map_or_else(Vec::new, |(client, _)| {
                tcp_options(flags & SYN != 0, client, if flags & ACK == 0 { 0 } else { self.last_values.1 })
            }),
            payload: payload.to_vec(),
        });
        let mut spec = to_vip(self.ip, self.client, body);
        spec.vlan.clone_from(&self.vlan);
        spec
    }

    /// Sends a segment of the client's; gives what the backend sees.
    pub fn from_client(&mut self, device: &mut dyn Device, flags: u8, payload: &[u8]) -> Seen {
        let spec = self.client_segment(flags, payload);
        let seen = forwarded(device, &spec);
        assert_eq!(seen.ports().1, HTTP_BACKEND);
        assert_eq!(seen.flags(), flags);
        if let Some(before) = &self.received {
            assert_eq!((seen.source, seen.destination), (before.source, before.destination), "addresses");
            assert_eq!(seen.ports(), before.ports(), "ports");
            assert_eq!((seen.from, seen.to), (before.from, before.to), "link-layer addresses");
        }
        self.client_sequence = advance(self.client_sequence, flags, payload);
        if let Some((value, _)) = seen.timestamp() {
            self.last_values.0 = value;
        }
        if let Some((client, _)) = &mut self.clocks {
            *client = client.wrapping_add(1);
        }
        self.received = Some(seen.clone());
        seen
    }

    /// A segment of the backend's, not sent yet.
    #[must_use]
    pub fn backend_segment(&self, flags: u8, payload: &[u8]) -> Spec {
        let received = self.received.as_ref().expect("the client begins");
        let (source, destination) = received.ports();
        answer(
            received,
            Body::Tcp(Tcp {
                source: destination,
                destination: source,
                sequence: self.backend_sequence,
                acknowledgment: self.client_sequence,
                flags,
                options: self.clocks.map_or_else(Vec::new, |(_, value)| {
                    tcp_options(flags & SYN != 0, value, self.last_values.0)
                }),
                payload: payload.to_vec(),
            }),
        )
    }

    /// Sends a segment of the backend's; gives what the client sees.
    pub fn from_backend(&mut self, device: &mut dyn Device, flags: u8, payload: &[u8]) -> Seen {
        let spec = self.backend_segment(flags, payload);
        let seen = forwarded(device, &spec);
        let request = self.client_segment(0, b"");
        assert_eq!((seen.source, seen.destination), (self.ip.vip(), self.ip.client(self.client)));
        assert_eq!(seen.ports(), (HTTP, self.port));
        assert_eq!((seen.from, seen.to), (request.to, request.from), "the way back");
        assert_eq!(seen.vlan, self.vlan, "tags of the way back");
        assert_eq!(seen.flags(), flags);
        self.backend_sequence = advance(self.backend_sequence, flags, payload);
        if let Some((value, echo)) = seen.timestamp() {
            self.last_values.1 = value;
            if let Some((client, backend)) = &mut self.clocks {
                // The client gets back the very value that it sent last.
                assert_eq!(echo, client.wrapping_sub(1), "echo of the client's timestamp");
                *backend = backend.wrapping_add(1);
            }
        }
        seen
    }

    /// The key of the client's packets.
    #[must_use]
    pub fn key(&self) -> AnyKey {
        AnyKey::new((self.ip.client(self.client), self.port), (self.ip.vip(), HTTP), 6)
    }

    /// The key of the backend's packets.
    #[must_use]
    pub fn reply_key(&self) -> AnyKey {
        let received = self.received.as_ref().expect("a packet was sent");
        let (source, destination) = received.ports();
        AnyKey::new((received.destination, destination), (received.source, source), 6)
    }

    /// The address of the backend.
    #[must_use]
    pub fn backend(&self) -> IpAddr {
        self.received.as_ref().expect("a packet was sent").destination
    }

    /// The source address and port that the backend sees.
    #[must_use]
    pub fn source(&self) -> (IpAddr, u16) {
        let received = self.received.as_ref().expect("a packet was sent");
        (received.source, received.ports().0)
    }
}

fn advance(sequence: u32, flags: u8, payload: &[u8]) -> u32 {
    let controls = u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
    sequence.wrapping_add(payload.len() as u32).wrapping_add(controls)
}

/// The state and place of both entries: the client's and the reply's.
pub fn states(device: &mut dyn Device, connection: &Connection) -> [Option<(u8, bool)>; 2] {
    let snapshots = device.snapshots();
    [connection.key(), connection.reply_key()].map(|key| match key {
        AnyKey::V4(key) => snapshots.v4.find(&key).map(|(flow, place)| (flow.status.state, place)),
        AnyKey::V6(key) => snapshots.v6.find(&key).map(|(flow, place)| (flow.status.state, place)),
    })
}
