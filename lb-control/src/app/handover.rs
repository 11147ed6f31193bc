//! An agent that takes over from one that runs: a new version beside the old one.
//!
//! The new one asks on a socket beside the agent's. The old one gives its listening sockets, and when the
//! new one has them, lets go of everything else as an agent does that is followed by another. It goes on
//! accepting until the new one says that it serves, then ends when its connections have. So the
//! listening sockets are never closed in between, and somebody accepts at every moment.
//!
//! On the wire (a stream): the request, a line; a line of JSON with the sockets' addresses, whose
//! descriptors come along in groups with one byte each; the new one's byte that it has them; the old
//! one's that it has let go; the new one's that it serves.

use std::collections::BTreeSet;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, Interest};
use tracing::{debug, info};

use crate::model::Protocol;
use crate::proxy::{Inherited, Lent};

/// Version of what is said on the wire.
const VERSION: u32 = 1;
/// What the new agent asks with. Whoever connects and says something else is not answered.
const REQUEST: &[u8] = b"pointsman: take over\n";
/// Descriptors in one message: the kernel takes 253 (`SCM_MAX_FD` in include/net/scm.h).
const GROUP: usize = 128;
/// How long the old agent may be silent: it finishes what it is at, and gives back its Lease.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often the new agent asks, if the old one ends it half way.
const TRIES: u32 = 5;
/// How long it waits before it asks again: what changes the old one's ports seldom comes alone.
const PAUSE: Duration = Duration::from_millis(300);
/// Says that everything is let go of.
const DONE: u8 = b'.';
/// Comes with each group of descriptors, and says that all have come.
const HERE: u8 = b'+';
/// Says that the new agent serves.
const SERVES: u8 = b'!';

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
    /// How long connections of the old agent may go on.
    drain_seconds: u64,
    sockets: Vec<Told>,
}

#[derive(Serialize, Deserialize)]
struct Told {
    address: SocketAddr,
    protocol: Protocol,
}

/// The sockets that another agent has taken, by their inodes, which stand for a socket as long as anybody
/// has it.
pub struct Given(BTreeSet<u64>);

impl Given {
    /// # Errors
    /// When the kernel does not tell of a socket.
    fn new(sockets: &[Lent]) -> Result<Self> {
        sockets.iter().map(inode).collect::<Result<_>>().map(Self)
    }

    /// Whether they are these, no more and no less.
    ///
    /// # Errors
    /// When the kernel does not tell of a socket.
    pub fn has(&self, sockets: &[Lent]) -> Result<bool> {
        Ok(Self::new(sockets)?.0 == self.0)
    }
}

fn inode(socket: &Lent) -> Result<u64> {
    let stat = nix::sys::stat::fstat(&socket.socket);
    Ok(stat.with_context(|| format!("looking at the socket of {}", socket.address))?.st_ino)
}

/// The old agent's end.
pub struct Heir(tokio::net::UnixStream);

impl Heir {
    /// Somebody who has asked. Only who might as well end this process gets anything: the same user, or
    /// root.
    ///
    /// # Errors
    /// When it is somebody else, or asks for something else.
    pub async fn new(mut stream: tokio::net::UnixStream) -> Result<Self> {
        let user = nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::PeerCredentials)
            .context("asking who wants to take over")?
            .uid();
        let own = nix::unistd::geteuid().as_raw();
        ensure!(user == own || user == 0, "user {user} may not take over from an agent of user {own}");
        let mut request = [0; REQUEST.len()];
        stream.read_exact(&mut request).await.context("it asks for nothing")?;
        ensure!(request == *REQUEST, "it asks for something else");
        Ok(Self(stream))
    }

    /// Gives the listening sockets, and waits until they have come.
    ///
    /// # Errors
    /// When the other side is gone, or does not take them.
    pub async fn give(&mut self, sockets: &[Lent], drain: Duration) -> Result<Given> {
        let given = Given::new(sockets)?;
        let told = sockets.iter().map(|one| Told { address: one.address, protocol: one.protocol }).collect();
        let drain_seconds = drain.as_secs();
        let mut letter = serde_json::to_vec(&Letter { version: VERSION, drain_seconds, sockets: told })?;
        letter.push(b'\n');
        let mut rest = letter.as_slice();
        while !rest.is_empty() {
            let send = || Ok(rustix::net::send(&self.0, rest, SendFlags::NOSIGNAL)?);
            let sent = self.0.async_io(Interest::WRITABLE, send).await;
            rest = &rest[sent.context("telling of the listening sockets")?..];
        }
        for group in sockets.chunks(GROUP) {
            let sent = self.0.async_io(Interest::WRITABLE, || send_group(&self.0, group)).await;
            sent.context("handing over the listening sockets")?;
        }
        let mut answer = [0];
        self.0.read_exact(&mut answer).await.context("it did not take the listening sockets")?;
        ensure!(answer == [HERE], "it did not take the listening sockets");
        Ok(given)
    }

    /// Says that everything is let go of.
    ///
    /// # Errors
    /// When the other side is gone.
    pub fn done(&self) -> Result<()> {
        rustix::net::send(&self.0, &[DONE], SendFlags::NOSIGNAL).context("saying that all is handed over")?;
        Ok(())
    }

    /// Waits until the new agent serves.
    ///
    /// # Errors
    /// When it has ended before.
    pub async fn serves(mut self) -> Result<()> {
        let mut said = [0];
        self.0.read_exact(&mut said).await.context("the agent that took over has ended before it served")?;
        ensure!(said == [SERVES], "the agent that took over says {said:?}, which nobody understands");
        Ok(())
    }
}

fn send_group(stream: &tokio::net::UnixStream, group: &[Lent]) -> io::Result<()> {
    let descriptors: Vec<BorrowedFd<'_>> = group.iter().map(|one| one.socket.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(GROUP))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("too many descriptors at once"));
    }
    sendmsg(stream, &[IoSlice::new(&[HERE])], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The new agent's end.
pub struct Predecessor {
    stream: UnixStream,
    /// Its listening sockets.
    pub sockets: Vec<Inherited>,
    /// How long its connections may go on.
    pub drain: Duration,
}

impl Predecessor {
    /// Tells it that this agent serves.
    pub fn we_serve(self) {
        if let Err(error) = rustix::net::send(&self.stream, &[SERVES], SendFlags::NOSIGNAL) {
            debug!("the agent before this one has ended already: {error}");
        }
    }
}

/// Asks the agent that runs to hand over, if there is one, and waits until it has. It may end that half way,
/// since its ports have changed meanwhile, and is asked again, [`TRIES`] times at most. Blocks.
///
/// # Errors
/// When it does not, or speaks otherwise.
pub fn take(path: &Path) -> Result<Option<Predecessor>> {
    take_asking_again(path, PAUSE)
}

fn take_asking_again(path: &Path, pause: Duration) -> Result<Option<Predecessor>> {
    let context = "taking over from the agent that runs: stop it, or start without --take-over";
    let mut tries = 0;
    let mut last = None;
    while tries < TRIES {
        if last.is_some() {
            thread::sleep(pause);
        }
        tries += 1;
        let Some(stream) = connect(path)? else {
            if last.is_some() {
                // It was there: it is about to end, or to be followed by somebody who is not there yet.
                continue;
            }
            info!("no agent runs here that could hand over");
            return Ok(None);
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        match receive(&stream) {
            Ok((sockets, drain)) => return Ok(Some(Predecessor { stream, sockets, drain })),
            Err(error) if has_ended(&error) => {
                info!(tries, "the agent that runs has not handed over: {error:#}");
                last = Some(error);
            }
            Err(error) => return Err(error.context(context)),
        }
    }
    Err(last.unwrap_or_else(|| anyhow!("nobody was asked")).context(context))
}

/// Where somebody listens.
fn connect(path: &Path) -> Result<Option<UnixStream>> {
    match UnixStream::connect(path) {
        Ok(stream) => Ok(Some(stream)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            Ok(None)
        }
        Err(error) => Err(error).with_context(|| format!("asking {} to hand over", path.display())),
    }
}

/// Whether the other side has closed the stream, rather than said something wrong or nothing at all.
fn has_ended(error: &anyhow::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    let cause = error.root_cause().downcast_ref::<io::Error>();
    cause.is_some_and(|cause| matches!(cause.kind(), BrokenPipe | ConnectionReset | UnexpectedEof))
}

fn send(stream: &UnixStream, bytes: &[u8]) -> io::Result<()> {
    rustix::net::send(stream, bytes, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive(mut stream: &UnixStream) -> Result<(Vec<Inherited>, Duration)> {
    send(stream, REQUEST).context("asking for it")?;
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
    let count = letter.sockets.len();
    let mut descriptors: Vec<OwnedFd> = Vec::with_capacity(count);
    while descriptors.len() < count {
        let expected = GROUP.min(count - descriptors.len());
        let (said, group) = receive_one(stream)?;
        ensure!(
            said == HERE && group.len() == expected,
            "{count} listening sockets were announced, and not all came: too few open files may be allowed"
        );
        descriptors.extend(group);
    }
    send(stream, &[HERE]).context("taking the listening sockets")?;
    let (said, _) = receive_one(stream).context("waiting for it to let go")?;
    ensure!(said == DONE, "it says {said:#x}, which nobody understands");
    let sockets = letter.sockets.into_iter().zip(descriptors.into_iter().map(Arc::new));
    let sockets =
        sockets.map(|(told, socket)| Inherited { address: told.address, protocol: told.protocol, socket });
    Ok((sockets.collect(), Duration::from_secs(letter.drain_seconds)))
}

/// A byte, and the descriptors that come with it.
fn receive_one(stream: &UnixStream) -> Result<(u8, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(GROUP))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut target = [IoSliceMut::new(&mut byte)];
    let received =
        rustix::io::retry_on_intr(|| recvmsg(stream, &mut target, &mut ancillary, RecvFlags::CMSG_CLOEXEC))
            .map_err(io::Error::from)
            .context("it does not answer")?;
    if received.bytes == 0 {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof)).context("it has closed the connection");
    }
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(group) = message {
            descriptors.extend(group);
        }
    }
    Ok((byte[0], descriptors))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn listeners(count: usize) -> Vec<TcpListener> {
        (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect()
    }

    fn lent(listener: &TcpListener) -> Lent {
        let address = listener.local_addr().unwrap();
        Lent { address, protocol: Protocol::Tcp, socket: Arc::new(listener.try_clone().unwrap()) }
    }

    async fn heard(stream: UnixStream) -> Result<Heir> {
        stream.set_nonblocking(true).unwrap();
        Heir::new(tokio::net::UnixStream::from_std(stream).unwrap()).await
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    fn hand_over(count: usize) -> (Vec<SocketAddr>, Result<Option<Predecessor>>) {
        let directory = tempfile::tempdir().unwrap();
        let path = path(&directory.path().join("agent.sock"));
        let server = UnixListener::bind(&path).unwrap();
        let old = std::thread::spawn(move || {
            let sockets = listeners(count);
            let served = runtime().block_on(async {
                let mut heir = heard(server.accept().unwrap().0).await.unwrap();
                let all: Vec<_> = sockets.iter().map(lent).collect();
                let given = heir.give(&all, Duration::from_secs(7)).await.unwrap();
                assert!(given.has(&all).unwrap() && !given.has(&[lent(&listeners(1)[0])]).unwrap());
                // One that was closed meanwhile is dead at the other side, too.
                assert!(all.is_empty() || !given.has(&all[1..]).unwrap());
                heir.done().unwrap();
                heir.serves().await
            });
            (sockets.iter().map(|one| one.local_addr().unwrap()).collect(), served)
        });
        let taken = take(&path).map(|taken| {
            let Predecessor { stream, sockets, drain } = taken.unwrap();
            Predecessor { stream: stream.try_clone().unwrap(), sockets: Vec::new(), drain }.we_serve();
            Some(Predecessor { stream, sockets, drain })
        });
        let (addresses, served) = old.join().unwrap();
        served.unwrap();
        (addresses, taken)
    }

    #[test]
    fn sockets_arrive_and_still_listen() {
        // More than one group, and none.
        for count in [0, 1, 2 * GROUP + 3] {
            let (addresses, taken) = hand_over(count);
            let taken = taken.unwrap().unwrap();
            assert_eq!(taken.drain, Duration::from_secs(7));
            let taken = taken.sockets;
            assert_eq!(taken.iter().map(|one| one.address).collect::<Vec<_>>(), addresses);
            if let (Some(one), Some(address)) = (taken.into_iter().last(), addresses.last()) {
                let listener = TcpListener::from(Arc::into_inner(one.socket).unwrap());
                let _client = std::net::TcpStream::connect(address).unwrap();
                assert_eq!(listener.accept().unwrap().0.local_addr().unwrap(), *address);
            }
        }
    }

    #[test]
    fn nobody_there_is_nothing_to_take() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        assert!(take(&path).unwrap().is_none());
        drop(UnixListener::bind(&path).unwrap());
        assert!(take(&path).unwrap().is_none());
    }

    #[test]
    fn an_old_one_that_ends_half_way_is_not_followed() {
        let one = r#"{"version":1,"drain_seconds":1,"sockets":[{"address":"127.0.0.1:1","protocol":"TCP"}]}"#;
        for said in
            ["", "{}\n", r#"{"version":9,"drain_seconds":1,"sockets":[]}"#, one, &format!("{one}\n+.")]
        {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("x");
            let server = UnixListener::bind(&path).unwrap();
            let said = said.to_owned();
            let old = std::thread::spawn(move || {
                let (mut stream, _) = server.accept().unwrap();
                io::Write::write_all(&mut stream, said.as_bytes()).unwrap();
            });
            let error = take_asking_again(&path, Duration::ZERO).map(drop).unwrap_err();
            old.join().unwrap();
            assert!(format!("{error:#}").contains("without --take-over"), "{error:#}");
        }
    }

    /// As an agent does whose ports have changed while they were handed over.
    #[test]
    fn who_is_refused_asks_again() {
        for refusals in [1, TRIES - 1, TRIES] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("x");
            let server = UnixListener::bind(&path).unwrap();
            let old = std::thread::spawn(move || {
                let sockets = listeners(2);
                let all: Vec<_> = sockets.iter().map(lent).collect();
                runtime().block_on(async {
                    for number in 0..TRIES.min(refusals + 1) {
                        let mut heir = heard(server.accept().unwrap().0).await.unwrap();
                        // The first is refused before it has anything.
                        if number > 0 || refusals == 1 {
                            heir.give(&all, Duration::ZERO).await.unwrap();
                        }
                        if number == refusals {
                            heir.done().unwrap();
                        }
                    }
                });
            });
            let taken = take_asking_again(&path, Duration::ZERO);
            old.join().unwrap();
            match taken {
                Ok(taken) => assert!(taken.unwrap().sockets.len() == 2 && refusals < TRIES),
                Err(error) => assert!(refusals == TRIES, "{error:#}"),
            }
        }
    }

    #[test]
    fn who_asks_for_nothing_or_goes_away_gets_nothing() {
        let ends = |said: &[u8]| {
            let (old, mut new) = UnixStream::pair().unwrap();
            io::Write::write_all(&mut new, said).unwrap();
            drop(new);
            heard(old)
        };
        runtime().block_on(async {
            assert!(ends(b"").await.is_err() && ends(b"GET / HTTP/1.1\r\n\r\n....").await.is_err());
            let mut heir = ends(REQUEST).await.unwrap();
            assert!(heir.give(&[lent(&listeners(1)[0])], Duration::ZERO).await.is_err());
        });
    }
}
