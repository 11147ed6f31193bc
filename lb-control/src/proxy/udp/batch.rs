//! Datagrams by the batch: many with a system call, and many of one client as one packet.
//!
//! Where the kernel puts datagrams of a flow together (UDP_GRO, since Linux 5.0) it hands them over as one
//! buffer with the size of each, and takes such a buffer to send (UDP_SEGMENT, since 4.18). Their
//! boundaries are never lost: each of them is as long as the first, but for the last.

use std::{
    cell::RefCell,
    io::{IoSlice, IoSliceMut},
    net::{SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg,
        sendmsg,
    },
};

/// At most so many buffers are filled with one system call.
pub const BATCH: usize = 32;
/// Bytes of a buffer: any datagram, and what the kernel puts together at most.
pub const SIZE: usize = 1 << 16;
/// The kernel takes so many datagrams as one (64 before Linux 6.9), ...
const MAXIMUM_SEGMENTS: usize = 64;
/// ... and so many bytes: what an IPv4 packet has room for.
const MAXIMUM_BYTES: usize = 65_507;

/// Buffers, each of [`SIZE`]. Memory is used as far as datagrams reach.
pub type Buffers = Vec<Box<[u8]>>;

/// What is in a buffer: one datagram, or several of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// The sender.
    pub from: SocketAddr,
    /// Bytes in all.
    pub length: usize,
    /// Bytes of each datagram; the last may be shorter.
    pub segment: usize,
}

/// One datagram to be sent, or several.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'a> {
    /// Where to; `None` on a connected socket.
    pub to: Option<SocketAddr>,
    /// All of their bytes.
    pub bytes: &'a [u8],
    /// Bytes of each; the last may be shorter.
    pub segment: usize,
}

/// What became of datagrams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// So many are on their way.
    pub datagrams: u64,
    /// With so many bytes.
    pub bytes: u64,
    /// So many were not taken.
    pub lost: u64,
    /// Why the last one was not.
    pub error: Option<Errno>,
}

/// Fills up to `count` buffers. Less than `count` means that there is no more.
///
/// # Errors
/// The socket's error, `EAGAIN` if there is nothing.
pub fn receive(socket: &OwnedFd, buffers: &mut [Box<[u8]>], into: &mut Vec<Received>) -> Result<(), Errno> {
    into.clear();
    // New headers each time: the kernel writes into them how much it used, which is then all the room there
    // is. Few small allocations, far below the cost of the system call.
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(buffers.len(), Some(cmsg_space!(i32)));
    let mut slices: Vec<_> = buffers.iter_mut().map(|buffer| [IoSliceMut::new(buffer)]).collect();
    let results =
        recvmmsg(socket.as_raw_fd(), &mut headers, slices.iter_mut(), MsgFlags::MSG_DONTWAIT, None)?;
    for message in results {
        let segments = message.cmsgs().into_iter().flatten().find_map(|message| match message {
            ControlMessageOwned::UdpGroSegments(size) => usize::try_from(size).ok().filter(|size| *size > 0),
            _ => None,
        });
        let Some(from) = message.address.as_ref().and_then(plain) else { continue };
        let length = message.bytes;
        into.push(Received { from, length, segment: segments.unwrap_or(length) });
    }
    Ok(())
}

fn plain(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddrV4::new(v4.ip(), v4.port()).into());
    }
    let v6 = address.as_sockaddr_in6()?;
    Some(SocketAddrV6::new(v6.ip(), v6.port(), 0, v6.scope_id()).into())
}

thread_local! {
    /// Each thread has its own; with each use they are written anew.
    static HEADERS: RefCell<MultiHeaders<SockaddrStorage>> =
        RefCell::new(MultiHeaders::preallocate(BATCH * 2, None));
}

/// Sends in order, with as few system calls as it takes. `widest` is the longest datagram that is sent several at once, and shrinks when the
/// kernel does not take that, as where it exceeds a device's MTU.
pub fn send(socket: &OwnedFd, all: &[Outgoing<'_>], widest: &mut usize) -> Sent {
    let mut sent = Sent::default();
    let mut rest = all;
    // What goes out one by one, until others that can go together follow.
    let mut single: Vec<Outgoing<'_>> = Vec::with_capacity(all.len().min(BATCH * 2));
    while let Some(first) = rest.first() {
        let together = together(rest, *widest);
        if together > 1 || first.length_of_many() {
            one_by_one(socket, &single, &mut sent);
            single.clear();
            let (these, others) = rest.split_at(together);
            rest = others;
            if first.segment > *widest || !at_once(socket, these, &mut sent, widest) {
                let datagrams: Vec<_> = these.iter().flat_map(Outgoing::datagrams).collect();
                one_by_one(socket, &datagrams, &mut sent);
            }
        } else {
            single.push(*first);
            rest = &rest[1..];
        }
    }
    one_by_one(socket, &single, &mut sent);
    sent
}

fn one_by_one(socket: &OwnedFd, all: &[Outgoing<'_>], sent: &mut Sent) {
    let mut rest = all;
    while !rest.is_empty() {
        let some = &rest[..rest.len().min(BATCH * 2)];
        match batch(socket, some) {
            Ok(count) => {
                sent.datagrams += count as u64;
                sent.bytes += rest[..count].iter().map(|one| one.bytes.len() as u64).sum::<u64>();
                rest = &rest[count..];
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                (sent.lost, sent.error) = (sent.lost + rest.len() as u64, Some(Errno::EAGAIN));
                return;
            }
            Err(error) => {
                (sent.lost, sent.error) = (sent.lost + 1, Some(error));
                rest = &rest[1..];
            }
        }
    }
}

fn batch(socket: &OwnedFd, some: &[Outgoing<'_>]) -> Result<usize, Errno> {
    const FLAGS: MsgFlags = MsgFlags::MSG_DONTWAIT.union(MsgFlags::MSG_NOSIGNAL);
    if let [one] = some {
        let slices = [IoSlice::new(one.bytes)];
        let to = one.to.map(SockaddrStorage::from);
        return sendmsg(socket.as_raw_fd(), &slices, &[], FLAGS, to.as_ref()).map(|_| 1);
    }
    let slices: Vec<_> = some.iter().map(|one| [IoSlice::new(one.bytes)]).collect();
    let to: Vec<_> = some.iter().map(|one| one.to.map(SockaddrStorage::from)).collect();
    HEADERS.with_borrow_mut(|headers| {
        sendmmsg(socket.as_raw_fd(), headers, &slices, to, [], FLAGS).map(Iterator::count)
    })
}

/// Sends several as one packet, which the kernel or the device takes apart again. False if they did not
/// go that way, and may go another.
fn at_once(socket: &OwnedFd, these: &[Outgoing<'_>], sent: &mut Sent, widest: &mut usize) -> bool {
    const FLAGS: MsgFlags = MsgFlags::MSG_DONTWAIT.union(MsgFlags::MSG_NOSIGNAL);
    let Some(first) = these.first() else { return true };
    let Ok(segment) = u16::try_from(first.segment) else { return false };
    let slices: Vec<_> = these.iter().map(|one| IoSlice::new(one.bytes)).collect();
    let to = first.to.map(SockaddrStorage::from);
    let control = [ControlMessage::UdpGsoSegments(&segment)];
    let result = loop {
        match sendmsg(socket.as_raw_fd(), &slices, &control, FLAGS, to.as_ref()) {
            Err(Errno::EINTR) => {}
            result => break result,
        }
    };
    let count: usize = these.iter().map(|one| one.datagrams().count()).sum();
    match result {
        Ok(bytes) => {
            sent.datagrams += count as u64;
            sent.bytes += bytes as u64;
            true
        }
        // Too long for the way's MTU, no checksums by the device, or a kernel that does not know it.
        Err(Errno::EINVAL | Errno::EMSGSIZE | Errno::EIO | Errno::EOPNOTSUPP) => {
            *widest = first.segment - 1;
            false
        }
        Err(error) => {
            (sent.lost, sent.error) = (sent.lost + count as u64, Some(error));
            true
        }
    }
}

impl<'a> Outgoing<'a> {
    fn length_of_many(&self) -> bool {
        self.segment > 0 && self.bytes.len() > self.segment
    }

    /// Bytes of the last of them.
    #[must_use]
    pub fn last_length(&self) -> u16 {
        let length = match self.bytes.len() {
            0 => 0,
            all => (all - 1) % self.segment.max(1) + 1,
        };
        u16::try_from(length).unwrap_or(u16::MAX)
    }

    /// Each of them.
    fn datagrams(&self) -> impl Iterator<Item = Outgoing<'a>> + use<'a> {
        let to = self.to;
        let one = move |bytes: &'a [u8]| Outgoing { to, bytes, segment: bytes.len() };
        let empty = self.bytes.is_empty().then(|| one(self.bytes));
        empty.into_iter().chain(self.bytes.chunks(self.segment.max(1)).map(one))
    }
}

/// How many of the first can go as one packet: to one client, each as long as the first, but for the last.
fn together(all: &[Outgoing<'_>], widest: usize) -> usize {
    let first = all[0];
    if first.segment == 0 || first.segment > widest || !first.bytes.len().is_multiple_of(first.segment) {
        return 1;
    }
    let (mut bytes, mut count) = (first.bytes.len(), 1);
    for one in &all[1..] {
        let longer = bytes + one.bytes.len();
        let fits = longer <= MAXIMUM_BYTES && longer.div_ceil(first.segment) <= MAXIMUM_SEGMENTS;
        let is_alike = one.to == first.to && one.segment <= first.segment && !one.bytes.is_empty();
        // Only the very last datagram may be shorter, so several shorter ones never fit.
        let is_one = one.bytes.len() <= one.segment;
        if !fits || !is_alike || (one.segment < first.segment && !is_one) {
            break;
        }
        (bytes, count) = (longer, count + 1);
        if !one.bytes.len().is_multiple_of(first.segment) {
            break;
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use proptest::prelude::*;

    use super::*;

    fn outgoing(to: Option<SocketAddr>, bytes: &[u8], segment: usize) -> Outgoing<'_> {
        Outgoing { to, bytes, segment }
    }

    fn lengths(segments: &[(usize, usize)], widest: usize) -> usize {
        let bytes = [0; 70_000];
        let all: Vec<_> =
            segments.iter().map(|(length, each)| outgoing(None, &bytes[..*length], *each)).collect();
        together(&all, widest)
    }

    #[test]
    fn who_goes_together() {
        assert_eq!(lengths(&[(9, 9)], 99), 1);
        assert_eq!(lengths(&[(9, 9), (9, 9), (9, 9)], 99), 3);
        assert_eq!(lengths(&[(9, 9), (9, 9)], 8), 1, "too long");
        assert_eq!(lengths(&[(9, 9), (3, 3), (9, 9)], 99), 2, "a short one is the last");
        assert_eq!(lengths(&[(9, 9), (10, 10)], 99), 1, "a longer one is none of them");
        assert_eq!(lengths(&[(9, 9), (0, 0), (9, 9)], 99), 1, "nothing is no part of anything");
        assert_eq!(lengths(&[(0, 0), (0, 0)], 99), 1);
        assert_eq!(lengths(&[(27, 9), (20, 9), (9, 9)], 99), 2, "several, the last of them short");
        assert_eq!(lengths(&[(20, 9), (9, 9)], 99), 1);
        assert_eq!(lengths(&[(18, 9), (8, 4)], 99), 1, "several shorter ones");
        assert_eq!(lengths(&[(1, 1); 99], 99), MAXIMUM_SEGMENTS);
        assert_eq!(lengths(&[(30_000, 30_000); 3], 65_507), 2);
    }

    fn pair() -> (UdpSocket, UdpSocket) {
        let [a, b] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        a.connect(b.local_addr().unwrap()).unwrap();
        b.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
        (a, b)
    }

    fn send(datagrams: &[(Vec<u8>, usize)], widest: &mut usize) -> (Sent, Vec<Vec<u8>>) {
        let (from, to) = pair();
        let all: Vec<_> = datagrams.iter().map(|(bytes, segment)| outgoing(None, bytes, *segment)).collect();
        let sent = super::send(&from.into(), &all, widest);
        let mut buffer = vec![0; SIZE];
        let mut receive = || to.recv(&mut buffer).map(|length| buffer[..length].to_vec()).unwrap();
        let got = (0..sent.datagrams).map(|_| receive()).collect();
        (sent, got)
    }

    #[test]
    fn what_the_kernel_does_not_take_at_once_goes_one_by_one() {
        // More than the loopback device's MTU.
        let big = vec![7; 65_500];
        let mut widest = SIZE;
        let (sent, got) = send(&[(big.clone(), 32_750)], &mut widest);
        assert_eq!((sent.datagrams, sent.lost, got.len()), (2, 0, 2));
        let mut none = 0;
        let (sent, got) = send(&[(big, 32_750), (vec![], 0)], &mut none);
        assert_eq!(
            (sent.datagrams, got.iter().map(Vec::len).collect::<Vec<_>>()),
            (3, vec![32_750, 32_750, 0])
        );
    }

    #[test]
    fn several_arrive_as_one_buffer_with_their_size() {
        let (from, to) = pair();
        nix::sys::socket::setsockopt(&to, nix::sys::socket::sockopt::UdpGroSegment, &true).unwrap();
        let address = from.local_addr().unwrap();
        let bytes: Vec<u8> = (0..2_500u32).map(|number| number as u8).collect();
        let sent = super::send(&from.into(), &[outgoing(None, &bytes, 1_000)], &mut SIZE.clone());
        assert_eq!((sent.datagrams, sent.bytes), (3, 2_500));
        let mut buffers: Buffers = vec![vec![0; SIZE].into(); 4];
        let mut received = Vec::new();
        receive(&to.into(), &mut buffers, &mut received).unwrap();
        assert_eq!(received, [Received { from: address, length: 2_500, segment: 1_000 }]);
        assert_eq!(buffers[0][..2_500], bytes);
    }

    #[test]
    fn nothing_to_receive_is_an_error() {
        let (_, to) = pair();
        let mut buffers: Buffers = vec![vec![0; SIZE].into(); 2];
        assert_eq!(receive(&to.into(), &mut buffers, &mut Vec::new()), Err(Errno::EAGAIN));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever goes together: the same datagrams arrive, in order.
        #[test]
        fn boundaries_are_kept(
            parts in prop::collection::vec((1usize..40, 1usize..400, any::<u8>()), 1..12),
            widest in prop_oneof![Just(0), Just(100), Just(SIZE)],
        ) {
            let parts: Vec<_> = parts
                .into_iter()
                .map(|(segment, length, seed)| {
                    // Empty ones, too.
                    let length = if seed % 5 == 0 { 0 } else { length };
                    let byte = |at: usize| (at as u8).wrapping_add(seed);
                    ((0..length).map(byte).collect::<Vec<u8>>(), if length == 0 { 0 } else { segment * 8 })
                })
                .collect();
            let expected: Vec<Vec<u8>> = parts
                .iter()
                .flat_map(|(bytes, segment)| outgoing(None, bytes, *segment).datagrams().collect::<Vec<_>>())
                .map(|one| one.bytes.to_vec())
                .collect();
            let (sent, got) = send(&parts, &mut { widest });
            prop_assert_eq!((sent.lost, sent.error), (0, None));
            prop_assert_eq!(got, expected);
        }
    }
}
