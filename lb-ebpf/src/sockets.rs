//! Programs for sockets of this node: what the kernel hands over, and what it takes.

use core::ffi::c_void;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval};
use aya_ebpf::programs::SockAddrContext;
use lb_common::abi::{SocketKey, SocketPeer, V4, V6, VlanTags};
use lb_common::forward::parse::Link;
use lb_common::forward::platform::{ChecksumChange, EditFailed, Packet, ResizeFailed};
use lb_common::forward::socket::{self, Answer, Caller, Remote, Sockets};
use lb_common::forward::wire::Wire;

use crate::datapath::{Hook, Kernel, words};
use crate::maps;

/// Where sockets name, or are told, a remote end.
pub type Socket = Kernel<SockAddrContext>;

/// What the kernel asks about a call: 1 lets it go on.
const GO_ON: i32 = 1;
const FAIL: i32 = 0;
/// As a client learns it of a port where nobody listens.
const ECONNREFUSED: i32 = 111;

/// There is none.
#[derive(Clone, Copy)]
pub struct NoPacket;

impl Packet for NoPacket {
    #[inline(always)]
    fn length(self) -> usize {
        0
    }

    #[inline(always)]
    fn head<'p, T: Wire>(self) -> Option<&'p mut T> {
        None
    }

    #[inline(always)]
    fn at<'p, T: Wire>(self, _offset: usize) -> Option<&'p mut T> {
        None
    }
}

impl Hook for SockAddrContext {
    type Packet = NoPacket;
    const ON_WIRE: bool = false;
    const ANY_DEVICE: bool = true;
    const IS_INTERRUPTED: bool = true;

    #[inline(always)]
    fn packet(&self) -> NoPacket {
        NoPacket
    }

    #[inline(always)]
    fn pull(&self, _bytes: u32) {}

    #[inline(always)]
    fn add_to_checksum(&self, _change: ChecksumChange) -> Result<(), EditFailed> {
        Err(EditFailed)
    }

    #[inline(always)]
    fn add_to_sum(&self, _change: u32) {}

    #[inline(always)]
    fn take_out_options(&self, _bytes: u32) -> Result<(), ResizeFailed> {
        Err(ResizeFailed)
    }

    #[inline(always)]
    fn is_unfinished(&self, _offset: usize) -> bool {
        false
    }

    #[inline(always)]
    fn link(&self) -> Option<Link> {
        None
    }

    #[inline(always)]
    fn set_tags(_datapath: &Socket, _link: &Link, _tags: VlanTags) -> Result<(), EditFailed> {
        Err(EditFailed)
    }

    #[inline(always)]
    fn largest_on_wire(&self, _l3: usize, _headers: usize) -> usize {
        0
    }

    #[inline(always)]
    fn move_head(&self, _bytes: i32) -> Result<(), ResizeFailed> {
        Err(ResizeFailed)
    }

    #[inline(always)]
    fn move_tail(&self, _bytes: i32) -> Result<(), ResizeFailed> {
        Err(ResizeFailed)
    }

    #[inline(always)]
    fn device(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.as_ptr()
    }
}

macro_rules! sockets {
    ($($family:ty),+) => {$(
        impl Sockets<$family> for Socket {
            type PeerRef = &'static mut SocketPeer;

            #[inline(always)]
            fn peer(&self, key: &SocketKey) -> Option<Self::PeerRef> {
                // SAFETY: the kernel keeps the value's memory while the program runs. Another CPU may give
                // it to another socket meanwhile: the worst that can come of it is a datagram that goes to
                // a backend of another Service.
                maps::SOCKETS.get_ptr_mut(key).map(|peer| unsafe { &mut *peer })
            }

            #[inline(always)]
            fn insert_peer(&self, key: &SocketKey, peer: &SocketPeer) {
                let _ = maps::SOCKETS.insert(key, peer, BPF_ANY.into());
            }
        }
    )+};
}

sockets!(V4, V6);

/// What a socket does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Connect,
    Send,
    /// It is told who has sent a datagram, or asks for its peer.
    Look,
}

/// A field of the call's description: the verifier wants it accessed as it is declared.
macro_rules! read {
    ($socket:expr, $($field:tt)+) => {
        // SAFETY: the context is the program's own.
        unsafe { (&raw const (*$socket.context.sock_addr).$($field)+).read_volatile() }
    };
}

macro_rules! write {
    ($socket:expr, $value:expr, $($field:tt)+) => {
        // SAFETY: as for reading.
        unsafe { (&raw mut (*$socket.context.sock_addr).$($field)+).write_volatile($value) }
    };
}

/// A call of a socket of IPv4. `HAS_REASON`: the kernel lets a program say why it refuses.
#[inline(always)]
pub fn v4<const HAS_REASON: bool>(context: SockAddrContext, call: Call) -> i32 {
    let socket = Socket { context };
    let mut remote = Remote { address: read!(socket, user_ip4).to_ne_bytes(), port: port_of(&socket) };
    let answer = ask::<V4>(&socket, call, &mut remote);
    if let Answer::Replaced = answer {
        write!(socket, u32::from_ne_bytes(remote.address), user_ip4);
        set_port(&socket, remote.port);
    }
    verdict::<HAS_REASON>(answer)
}

/// A call of a socket of IPv6, which may be about IPv4.
#[inline(always)]
pub fn v6<const HAS_REASON: bool>(context: SockAddrContext, call: Call) -> i32 {
    let socket = Socket { context };
    let parts = [
        read!(socket, user_ip6[0]),
        read!(socket, user_ip6[1]),
        read!(socket, user_ip6[2]),
        read!(socket, user_ip6[3]),
    ];
    let mut address = [0; 16];
    for (bytes, part) in address.chunks_exact_mut(4).zip(parts) {
        bytes.copy_from_slice(&part.to_ne_bytes());
    }
    let port = port_of(&socket);
    let answer = match socket::mapped(&address) {
        Some(address) => {
            let mut remote = Remote { address, port };
            let answer = ask::<V4>(&socket, call, &mut remote);
            if let Answer::Replaced = answer {
                // The other words stay: they are what makes it a mapped one.
                write!(socket, u32::from_ne_bytes(remote.address), user_ip6[3]);
                set_port(&socket, remote.port);
            }
            answer
        }
        None => {
            let mut remote = Remote { address, port };
            let answer = ask::<V6>(&socket, call, &mut remote);
            if let Answer::Replaced = answer {
                let [a, b, c, d] = words(&remote.address);
                write!(socket, a, user_ip6[0]);
                write!(socket, b, user_ip6[1]);
                write!(socket, c, user_ip6[2]);
                write!(socket, d, user_ip6[3]);
                set_port(&socket, remote.port);
            }
            answer
        }
    };
    verdict::<HAS_REASON>(answer)
}

#[inline(always)]
fn ask<F>(socket: &Socket, call: Call, remote: &mut Remote<F::Address>) -> Answer
where
    F: lb_common::forward::ip::IpFamily,
    Socket: Sockets<F>,
{
    // SAFETY: the context is the program's own.
    let cookie = unsafe { bpf_get_socket_cookie(socket.context.as_ptr()) };
    let protocol = read!(socket, protocol) as u8;
    if let Call::Look = call {
        return socket::seen::<_, F>(socket, cookie, protocol, remote);
    }
    // SAFETY: as above.
    let network = unsafe { bpf_get_netns_cookie(socket.context.as_ptr()) };
    let caller = Caller { socket: cookie, network, protocol };
    match call {
        Call::Connect => socket::connect::<_, F>(socket, &caller, remote),
        _ => socket::send::<_, F>(socket, &caller, remote),
    }
}

#[inline(always)]
fn verdict<const HAS_REASON: bool>(answer: Answer) -> i32 {
    if answer != Answer::Refuse {
        return GO_ON;
    }
    if HAS_REASON {
        // SAFETY: no pointers.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
    }
    FAIL
}

/// The port lies in the first two bytes of its field.
#[inline(always)]
fn port_of(socket: &Socket) -> [u8; 2] {
    let [high, low, ..] = read!(socket, user_port).to_ne_bytes();
    [high, low]
}

#[inline(always)]
fn set_port(socket: &Socket, [high, low]: [u8; 2]) {
    write!(socket, u32::from_ne_bytes([high, low, 0, 0]), user_port);
}
