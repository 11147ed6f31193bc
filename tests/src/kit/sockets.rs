//! Sockets of the node itself, on the host.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;

use lb_common::abi::{SocketKey, SocketPeer, SocketRole, V4, V6};
use lb_common::forward::socket::{self, Answer, Caller, Remote, Sockets};

use super::device::wide;
use super::host::{Host, Shared, Side};
use super::world::Ip;

/// The map of sockets.
pub type SocketTable = RefCell<HashMap<SocketKey, Shared<SocketPeer>>>;

impl<F: Side> Sockets<F> for Host
where
    F::Address: Hash + Ord,
{
    type PeerRef = Shared<SocketPeer>;

    fn peer(&self, key: &SocketKey) -> Option<Shared<SocketPeer>> {
        self.sockets.borrow().get(key).cloned()
    }

    fn insert_peer(&self, key: &SocketKey, peer: &SocketPeer) {
        self.sockets.borrow_mut().insert(*key, Shared::new(*peer));
    }
}

/// What a socket does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Connects.
    Connect,
    /// Sends a datagram without being connected.
    Send,
    /// Is told who has sent, or asks for its peer.
    Look,
}

impl Host {
    /// A call of a socket; gives the answer and the remote end afterwards.
    pub fn call(&self, caller: &Caller, call: Call, remote: (IpAddr, u16)) -> (Answer, (IpAddr, u16)) {
        match remote.0 {
            IpAddr::V4(address) => {
                let (answer, remote) = self.ask::<V4>(caller, call, address.octets(), remote.1);
                (answer, (remote.address.into(), u16::from_be_bytes(remote.port)))
            }
            IpAddr::V6(address) => {
                let (answer, remote) = self.ask::<V6>(caller, call, address.octets(), remote.1);
                (answer, (remote.address.into(), u16::from_be_bytes(remote.port)))
            }
        }
    }

    fn ask<F: Side>(
        &self,
        caller: &Caller,
        call: Call,
        address: F::Address,
        port: u16,
    ) -> (Answer, Remote<F::Address>)
    where
        F::Address: Hash + Ord,
    {
        let mut remote = Remote { address, port: port.to_be_bytes() };
        let answer = match call {
            Call::Connect => socket::connect::<_, F>(self, caller, &mut remote),
            Call::Send => socket::send::<_, F>(self, caller, &mut remote),
            Call::Look => socket::seen::<_, F>(self, caller.socket, caller.protocol, &mut remote),
        };
        (answer, remote)
    }

    /// What the kernel's LRU does when it needs room; says whether there was such an entry.
    pub fn forget_socket(&self, caller: &Caller, role: SocketRole, ip: Ip, end: (IpAddr, u16)) -> bool {
        let key = SocketKey {
            cookie: if role == SocketRole::Affinity { caller.network } else { caller.socket },
            address: wide(end.0),
            port: end.1.to_be_bytes(),
            family: if ip == Ip::V4 { 4 } else { 6 },
            role: role as u8,
            protocol: caller.protocol,
            reserved: [0; 3],
        };
        self.sockets.borrow_mut().remove(&key).is_some()
    }
}
