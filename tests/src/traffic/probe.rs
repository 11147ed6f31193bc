//! How a service refuses.

use std::{
    io,
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use super::client::{TIMEOUT, udp_socket, uninterrupted};
use crate::lab::Namespace;

/// What came back, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the socket reported; nothing when the other side answered.
    pub error: Option<io::ErrorKind>,
    /// How long that took.
    pub took: Duration,
}

impl Refusal {
    /// Refused (TCP RST, or ICMP port unreachable), and not by a retransmission or a timeout.
    #[must_use]
    pub fn at_once(&self) -> bool {
        // A lost SYN is sent again after a second (`TCP_TIMEOUT_INIT`, include/net/tcp.h).
        self.error == Some(io::ErrorKind::ConnectionRefused) && self.took < Duration::from_millis(900)
    }
}

/// Tries to connect.
///
/// # Errors
/// When the namespace cannot be entered.
pub fn tcp(from: &Namespace, to: SocketAddr) -> Result<Refusal> {
    from.enter(|| {
        let start = Instant::now();
        let error = TcpStream::connect_timeout(&to, TIMEOUT).err().map(|error| error.kind());
        Refusal { error, took: start.elapsed() }
    })
}

/// Sends a datagram and waits for an answer or an ICMP error.
///
/// # Errors
/// When the namespace cannot be entered, or the datagram cannot be sent.
pub fn udp(from: &Namespace, to: SocketAddr) -> Result<Refusal> {
    let probed = from.enter(|| {
        let socket = udp_socket(to)?;
        let start = Instant::now();
        socket.send(b"anybody there?")?;
        let error = uninterrupted(|| socket.recv(&mut [0; 100])).err().map(|error| error.kind());
        io::Result::Ok(Refusal { error, took: start.elapsed() })
    })?;
    probed.with_context(|| format!("cannot probe {to} from {}", from.role()))
}
