//! An agent that takes over from one that runs: a new version beside the old one.
//!
//! The new one asks on a socket beside the agent's. The old one gives its listening sockets, lets go
//! of everything else as an agent does that is followed by another, says so, and stays until its own
//! connections have ended. The listening sockets are never closed in between: whoever connects
//! meanwhile waits in their queues.
//!
//! On the wire (a stream): a line of JSON with the sockets' addresses, whose descriptors come along
//! in groups with one byte each, and at the end one more byte.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use tracing::info;

use crate::model::Protocol;
use crate::proxy::Inherited;

/// Version of what is said on the wire.
const VERSION: u32 = 1;
/// Descriptors in one message: the kernel takes 253 (`SCM_MAX_FD` in include/net/scm.h).
const GROUP: usize = 128;
/// How long the other side may be silent. The old agent finishes what it is at, and gives back its Lease.
const PATIENCE: Duration = Duration::from_secs(60);
/// Says that everything is let go of.
const DONE: u8 = b'.';
/// Comes with each group of descriptors.
const HERE: u8 = b'+';

/// Where an agent is asked to hand over.
#[must_use]
pub fn path(socket: &Path) -> PathBuf {
    let mut name = socket.as_os_str().to_owned();
    name.push(".handover");
    name.into()
}

#[derive(Serialize, Deserialize)]
struct Letter {
    version: u32,
    sockets: Vec<Told>,
}

#[derive(Serialize, Deserialize)]
struct Told {
    address: SocketAddr,
    protocol: Protocol,
}

/// The old agent's end.
pub struct Heir(UnixStream);

impl Heir {
    /// Somebody who has asked. Only who might as well end this process gets anything: the same user, or
    /// root.
    ///
    /// # Errors
    /// When it is somebody else.
    pub fn new(stream: UnixStream) -> Result<Self> {
        let user = nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::PeerCredentials)
            .context("asking who wants to take over")?
            .uid();
        let own = nix::unistd::geteuid().as_raw();
        ensure!(user == own || user == 0, "user {user} may not take over from an agent of user {own}");
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self(stream))
    }

    /// Gives the listening sockets.
    ///
    /// # Errors
    /// When the other side is gone.
    pub fn give(&self, sockets: &[Inherited]) -> Result<()> {
        let told = sockets.iter().map(|one| Told { address: one.address, protocol: one.protocol }).collect();
        let mut letter = serde_json::to_vec(&Letter { version: VERSION, sockets: told })?;
        letter.push(b'\n');
        let mut rest = letter.as_slice();
        while !rest.is_empty() {
            let sent = rustix::io::retry_on_intr(|| rustix::net::send(&self.0, rest, SendFlags::NOSIGNAL))
                .context("telling of the listening sockets")?;
            rest = &rest[sent..];
        }
        for group in sockets.chunks(GROUP) {
            let descriptors: Vec<BorrowedFd<'_>> = group.iter().map(|one| one.socket.as_fd()).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(GROUP))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            ensure!(
                ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)),
                "too many descriptors at once"
            );
            sendmsg(&self.0, &[IoSlice::new(&[HERE])], &mut ancillary, SendFlags::NOSIGNAL)
                .context("handing over the listening sockets")?;
        }
        Ok(())
    }

    /// Says that everything is let go of.
    ///
    /// # Errors
    /// When the other side is gone.
    pub fn done(self) -> Result<()> {
        rustix::net::send(&self.0, &[DONE], SendFlags::NOSIGNAL).context("saying that all is handed over")?;
        Ok(())
    }
}

/// Asks the agent that runs to hand over, if there is one, and waits until it has. Blocks.
///
/// # Errors
/// When it does not, or speaks otherwise.
pub fn take(path: &Path) -> Result<Vec<Inherited>> {
    let stream = match UnixStream::connect(path) {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            info!("no agent runs here that could hand over");
            return Ok(Vec::new());
        }
        Err(error) => return Err(error).with_context(|| format!("asking {} to hand over", path.display())),
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    receive(&stream).context("taking over from the agent that runs: stop it, or start without --take-over")
}

fn receive(mut stream: &UnixStream) -> Result<Vec<Inherited>> {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        // One at a time: what follows comes with descriptors, which a longer read would lose.
        stream.read_exact(&mut byte).context("it gave no answer")?;
        if byte == *b"\n" {
            break;
        }
        line.push(byte[0]);
    }
    let letter: Letter = serde_json::from_slice(&line).context("its answer")?;
    ensure!(letter.version == VERSION, "it hands over in another way (version {})", letter.version);
    let mut descriptors: Vec<OwnedFd> = Vec::with_capacity(letter.sockets.len());
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(GROUP))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let mut target = [IoSliceMut::new(&mut byte)];
        let received = rustix::io::retry_on_intr(|| {
            recvmsg(stream, &mut target, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        })
        .context("waiting for it to let go")?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(group) = message {
                descriptors.extend(group);
            }
        }
        match (received.bytes, byte) {
            (0, _) => bail!("it ended before it had let go of everything"),
            (_, [DONE]) => break,
            (_, [HERE]) => {}
            (_, [other]) => bail!("it says {other:#x}, which nobody understands"),
        }
    }
    ensure!(
        descriptors.len() == letter.sockets.len(),
        "{} listening sockets were announced, and {} came: too few file descriptors may be allowed",
        letter.sockets.len(),
        descriptors.len()
    );
    let sockets = letter.sockets.into_iter().zip(descriptors);
    Ok(sockets
        .map(|(told, socket)| Inherited { address: told.address, protocol: told.protocol, socket })
        .collect())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn listeners(count: usize) -> Vec<Inherited> {
        let one = || {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            Inherited { address, protocol: Protocol::Tcp, socket: listener.into() }
        };
        (0..count).map(|_| one()).collect()
    }

    fn hand_over(count: usize) -> (Vec<SocketAddr>, Result<Vec<Inherited>>) {
        let directory = tempfile::tempdir().unwrap();
        let path = path(&directory.path().join("agent.sock"));
        let server = UnixListener::bind(&path).unwrap();
        let old = std::thread::spawn(move || {
            let heir = Heir::new(server.accept().unwrap().0).unwrap();
            let sockets = listeners(count);
            heir.give(&sockets).unwrap();
            heir.done().unwrap();
            sockets.iter().map(|one| one.address).collect()
        });
        let taken = take(&path);
        (old.join().unwrap(), taken)
    }

    #[test]
    fn sockets_arrive_and_still_listen() {
        // More than one group, and none.
        for count in [0, 1, 2 * GROUP + 3] {
            let (addresses, taken) = hand_over(count);
            let taken = taken.unwrap();
            assert_eq!(taken.iter().map(|one| one.address).collect::<Vec<_>>(), addresses);
            if let (Some(one), Some(address)) = (taken.into_iter().last(), addresses.last()) {
                let listener = TcpListener::from(one.socket);
                let _client = std::net::TcpStream::connect(address).unwrap();
                assert_eq!(listener.accept().unwrap().0.local_addr().unwrap(), *address);
            }
        }
    }

    #[test]
    fn nobody_there_is_nothing_to_take() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        assert!(take(&path).unwrap().is_empty());
        drop(UnixListener::bind(&path).unwrap());
        assert!(take(&path).unwrap().is_empty());
    }

    #[test]
    fn who_ends_half_way_is_not_followed() {
        for said in [
            &b""[..],
            b"{}\n",
            b"{\"version\":1,\"sockets\":[]}\n",
            b"{\"version\":9,\"sockets\":[]}\n.",
            b"{\"version\":1,\"sockets\":[{\"address\":\"127.0.0.1:1\",\"protocol\":\"TCP\"}]}\n.",
        ] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("x");
            let server = UnixListener::bind(&path).unwrap();
            let old = std::thread::spawn(move || {
                let (mut stream, _) = server.accept().unwrap();
                io::Write::write_all(&mut stream, said).unwrap();
            });
            let error = format!("{:#}", take(&path).unwrap_err());
            old.join().unwrap();
            assert!(error.contains("without --take-over"), "{error}");
        }
    }
}
