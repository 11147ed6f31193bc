//! What the proxy is told once.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use socket2::TcpKeepalive;

use crate::model::Protocol;

/// What the proxy is told once.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Threads; 0 for one for each CPU.
    pub workers: usize,
    /// Addresses of the node that backends see; where there is none of a family, the kernel chooses.
    pub sources: Vec<IpAddr>,
    /// How long a backend may take to accept a connection.
    pub connect_timeout: Duration,
    /// How long nothing may pass on a TCP connection. While something is sent but not acknowledged, twice as
    /// long.
    pub idle_timeout_tcp: Duration,
    /// How long nothing may pass in a UDP session that both sides took part in.
    pub idle_timeout_udp: Duration,
    /// How many TCP connections there may be; `None` for as many as file descriptors allow.
    pub max_connections: Option<usize>,
    /// How many bytes TCP connections may hold in buffers and pipes of the process, all together. Then each
    /// reads no more than it can pass on at once.
    pub max_buffers: usize,
    /// After how long without traffic a peer is asked whether it is still there.
    pub keepalive: Duration,
    /// How many connections wait to be accepted, for each listening socket; the kernel cuts it to
    /// `net.core.somaxconn`.
    pub backlog: i32,
    /// Whether each worker has a listening TCP socket of its own for each address (`SO_REUSEPORT`), rather
    /// than all the same one. Then the kernel deals connections out without asking who has time: on CPUs that
    /// have other things to do, those of a worker that has to wait wait with it.
    pub own_listeners: bool,
    /// File descriptors that are left to the rest of the agent.
    pub reserved_descriptors: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            workers: 0,
            sources: Vec::new(),
            connect_timeout: Duration::from_secs(5),
            // Longer than TCP keepalive's two hours would be for nothing: peers that are gone are found.
            idle_timeout_tcp: Duration::from_secs(7_200),
            idle_timeout_udp: Duration::from_secs(180),
            max_connections: None,
            max_buffers: 256 << 20,
            keepalive: Duration::from_secs(60),
            backlog: 4_096,
            own_listeners: false,
            reserved_descriptors: 512,
        }
    }
}

impl Settings {
    /// The number of threads.
    #[must_use]
    pub fn threads(&self) -> usize {
        match self.workers {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            workers => workers,
        }
    }

    /// The address of the node that a backend is to see of a client: the same one for its next connection
    /// from that port.
    pub(super) fn source(&self, backend: SocketAddr, client: SocketAddr) -> Option<IpAddr> {
        let fitting = || self.sources.iter().filter(|one| one.is_ipv4() == backend.is_ipv4());
        let count = fitting().count();
        if count == 0 { None } else { fitting().nth(usize::from(client.port()) % count).copied() }
    }

    pub(super) fn tcp_keepalive(&self) -> TcpKeepalive {
        let between = (self.keepalive / 4).max(Duration::from_secs(1));
        TcpKeepalive::new().with_time(self.keepalive).with_interval(between).with_retries(4)
    }
}

/// A listening socket (TCP), or a bound one (UDP), of this proxy, for the next one. It stays open for as
/// long as it is lent.
#[derive(Clone)]
pub struct Lent {
    /// VIP and port.
    pub address: SocketAddr,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// It.
    pub socket: Arc<dyn AsFd + Send + Sync>,
}

/// One of the proxy before this one.
#[derive(Debug)]
pub struct Inherited {
    /// VIP and port.
    pub address: SocketAddr,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// It.
    pub socket: Arc<OwnedFd>,
}

impl Inherited {
    /// For another agent, as long as this one does not use it.
    #[must_use]
    pub fn lend(&self) -> Lent {
        let socket = Arc::clone(&self.socket);
        Lent { address: self.address, protocol: self.protocol, socket }
    }

    /// For use.
    ///
    /// # Errors
    /// When it is lent, and there is no descriptor for another one.
    pub(super) fn take(self) -> io::Result<OwnedFd> {
        Arc::try_unwrap(self.socket).or_else(|lent| lent.try_clone())
    }
}
