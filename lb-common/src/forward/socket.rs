//! Sockets of this node that turn to a VIP: they get a backend before there is a packet.
//!
//! Packets of this node never meet the programs on devices on their way out, and a backend that calls
//! the VIP might be given itself. So the destination is replaced where a socket names it, and what the
//! socket asks about its peer is answered with the VIP.
//!
//! Source ranges are not looked at: they are about those who come from outside (a process of this node
//! reaches the backends themselves, too), and which address it will have is not known yet.

use core::num::NonZeroU32;
use core::ops::DerefMut;

use super::ip::IpFamily;
use super::platform::Tables;
use super::schedule;
use crate::abi::{
    Backend, BackendState, Service, ServiceFlags, SocketKey, SocketPeer, SocketRole, VipKey, idle_ticks,
};

/// The map of sockets.
pub trait Sockets<F: IpFamily>: Tables<F> {
    /// An entry in place.
    type PeerRef: DerefMut<Target = SocketPeer>;

    /// Looks up what is known.
    fn peer(&self, key: &SocketKey) -> Option<Self::PeerRef>;
    /// Remembers; best effort.
    fn insert_peer(&self, key: &SocketKey, peer: &SocketPeer);
}

/// Whose socket it is.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// The kernel's number of the socket.
    pub socket: u64,
    /// The kernel's number of its network namespace: what stands for the client's address, which is not
    /// known yet.
    pub network: u64,
    /// IANA protocol number.
    pub protocol: u8,
}

/// An address and a port, as the socket names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote<A> {
    /// The address.
    pub address: A,
    /// The port, big-endian.
    pub port: [u8; 2],
}

/// What is to happen to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Goes on as it is.
    Pass,
    /// Goes on with what the remote end was replaced by.
    Replaced,
    /// The call fails: the Service has no backend.
    Refuse,
}

/// A socket is to be connected: each call is a new connection (of UDP: a session), and takes its turn.
#[inline(always)]
pub fn connect<D: Sockets<F>, F: IpFamily>(
    datapath: &D,
    caller: &Caller,
    remote: &mut Remote<F::Address>,
) -> Answer {
    let Some(service) = find::<D, F>(datapath, caller, remote) else { return Answer::Pass };
    begin::<D, F>(datapath, caller, service, remote, &mut SocketPeer::default())
}

/// A datagram is to be sent by a socket that is not connected: the first one to a VIP begins a session,
/// others follow it.
#[inline(always)]
pub fn send<D: Sockets<F>, F: IpFamily>(
    datapath: &D,
    caller: &Caller,
    remote: &mut Remote<F::Address>,
) -> Answer {
    let Some(service) = find::<D, F>(datapath, caller, remote) else { return Answer::Pass };
    let mut key = key::<F>(caller.socket, caller.protocol, remote, SocketRole::Session);
    let Some(known) = datapath.peer(&key) else {
        return first::<D, F>(datapath, caller, service, remote);
    };
    let is_usable = known.service == service
        && datapath.backend(known.backend).is_some_and(|backend| belongs(backend, &known));
    if !is_usable {
        return first::<D, F>(datapath, caller, service, remote);
    }
    let vip = *remote;
    *remote = Remote { address: F::from_wide(&known.address), port: known.port };
    // The table may have forgotten one of the two.
    key.role = SocketRole::Reply as u8;
    key.address = known.address;
    key.port = known.port;
    if datapath.peer(&key).is_none() {
        let reply = SocketPeer { address: F::to_wide(&vip.address), port: vip.port, ..*known };
        datapath.insert_peer(&key, &reply);
    }
    Answer::Replaced
}

/// The first datagram of a session.
#[inline(always)]
fn first<D: Sockets<F>, F: IpFamily>(
    datapath: &D,
    caller: &Caller,
    service: u32,
    remote: &mut Remote<F::Address>,
) -> Answer {
    let key = key::<F>(caller.socket, caller.protocol, remote, SocketRole::Session);
    let mut peer = SocketPeer::default();
    let answer = begin::<D, F>(datapath, caller, service, remote, &mut peer);
    if let Answer::Replaced = answer {
        peer.address = F::to_wide(&remote.address);
        peer.port = remote.port;
        datapath.insert_peer(&key, &peer);
    }
    answer
}

/// A socket is told, or asks, who is at the other end: replaces a backend by the VIP that it stands for.
#[inline(always)]
pub fn seen<D: Sockets<F>, F: IpFamily>(
    datapath: &D,
    socket: u64,
    protocol: u8,
    remote: &mut Remote<F::Address>,
) -> Answer {
    let key = key::<F>(socket, protocol, remote, SocketRole::Reply);
    let Some(vip) = datapath.peer(&key) else { return Answer::Pass };
    remote.address = F::from_wide(&vip.address);
    remote.port = vip.port;
    Answer::Replaced
}

/// The Service entry that a socket turns to. The proxy's listener is on this node: a socket that turns to
/// it needs no help.
#[inline(always)]
fn find<D: Sockets<F>, F: IpFamily>(
    datapath: &D,
    caller: &Caller,
    remote: &Remote<F::Address>,
) -> Option<u32> {
    let service = datapath.vip(&VipKey::new(remote.address, remote.port, caller.protocol))?;
    let is_proxied = datapath.service(service).is_some_and(|entry| entry.has(ServiceFlags::PROXIED));
    if is_proxied { None } else { Some(service) }
}

/// Gives the socket a backend, and remembers which VIP it stands for: that is what `peer` says then.
#[inline(always)]
fn begin<D: Sockets<F>, F: IpFamily>(
    datapath: &D,
    caller: &Caller,
    service: u32,
    remote: &mut Remote<F::Address>,
    peer: &mut SocketPeer,
) -> Answer {
    let Some(entry) = datapath.service(service) else { return Answer::Pass };
    let index = choose::<D, F>(datapath, caller, service, entry, remote);
    let backend = if index == 0 { None } else { datapath.backend(index) };
    let Some(backend) = backend.filter(|found| found.state != 0 && found.family == F::VERSION) else {
        datapath.count_refused(service);
        return Answer::Refuse;
    };
    *peer = SocketPeer {
        address: F::to_wide(&remote.address),
        port: remote.port,
        reserved: [0; 2],
        service,
        backend: index,
        generation: backend.generation,
        last_used: datapath.now(),
    };
    let mut key = key::<F>(caller.network, caller.protocol, remote, SocketRole::Affinity);
    if entry.has(ServiceFlags::AFFINITY) {
        datapath.insert_peer(&key, peer);
    }
    *remote = Remote { address: F::from_wide(&backend.address), port: backend.port };
    // Of a socket that talks to one backend by two VIPs, the later one is seen.
    key.cookie = caller.socket;
    key.role = SocketRole::Reply as u8;
    key.address = backend.address;
    key.port = backend.port;
    datapath.insert_peer(&key, peer);
    datapath.count_new_flow(service, index);
    Answer::Replaced
}

/// The index of the backend that is to have the connection; 0 if there is none.
///
/// Whatever the scheduler, it is the turn that decides: the address of the client is not known yet, and
/// nobody would tell when the connection ends, so it must not be counted as an open one.
#[inline(always)]
fn choose<D: Sockets<F>, F: IpFamily>(
    datapath: &D,
    caller: &Caller,
    service: u32,
    entry: Service,
    remote: &Remote<F::Address>,
) -> u32 {
    let Some(count) = NonZeroU32::new(entry.slot_count()) else { return 0 };
    if entry.has(ServiceFlags::AFFINITY) {
        let key = key::<F>(caller.network, caller.protocol, remote, SocketRole::Affinity);
        if let Some(known) = datapath.peer(&key)
            && known.service == service
            && idle_ticks(datapath.now(), known.last_used) <= datapath.affinity_timeout(service)
            && let Some(backend) = datapath.backend(known.backend)
            && belongs(backend, &known)
            && BackendState::from_raw(backend.state) == BackendState::Active
        {
            return known.backend;
        }
    }
    schedule::in_turn(datapath, service, entry.first_slot, count)
}

/// Whether a backend's entry is still that of the endpoint that was meant.
#[inline(always)]
fn belongs(backend: &Backend, known: &SocketPeer) -> bool {
    backend.state != 0 && backend.generation == known.generation && backend.service == known.service
}

#[inline(always)]
fn key<F: IpFamily>(cookie: u64, protocol: u8, remote: &Remote<F::Address>, role: SocketRole) -> SocketKey {
    SocketKey {
        cookie,
        address: F::to_wide(&remote.address),
        port: remote.port,
        family: F::VERSION,
        role: role as u8,
        protocol,
        reserved: [0; 3],
    }
}

/// The IPv4 address in an IPv6 address that stands for one (RFC 4291, section 2.5.5.2): sockets of IPv6
/// reach IPv4 by those.
#[inline(always)]
#[must_use]
pub fn mapped(address: &[u8; 16]) -> Option<[u8; 4]> {
    match *address {
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] => Some([a, b, c, d]),
        _ => None,
    }
}
