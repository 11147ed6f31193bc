//! Listening sockets, and the tasks that accept from them.

use std::{
    io,
    net::{Shutdown, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    pin::pin,
    sync::{
        Arc,
        atomic::{
            AtomicBool,
            Ordering::{Relaxed, SeqCst},
        },
    },
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    libc::{SOCK_CLOEXEC, SOCK_NONBLOCK},
};
use socket2::{Protocol, Socket, Type};
use tokio::{io::Interest, runtime::Handle, sync::Notify, time::sleep};

use super::{
    Settings, connection::Connection, entry::Entry, shared::Shared, source_filter, vip, watch::watch,
};

/// So many connections are accepted before others get their turn.
const BATCH: usize = 64;
/// How long to wait when there is no file descriptor: each time longer, within these bounds.
pub const PAUSES: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(100)];

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    is_closed: AtomicBool,
    closes: Notify,
    /// Another process has it too: what waits to be accepted is not lost with us.
    is_shared: AtomicBool,
    /// Accepted sockets inherit the filter, and need none.
    has_filter: AtomicBool,
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Listener {
    /// A socket that listens. The address need not be there yet.
    ///
    /// # Errors
    /// Those of the kernel: `EADDRINUSE` if a process that does not share it has the address.
    pub fn open(address: SocketAddr, entry: &Entry, settings: &Settings) -> io::Result<Self> {
        let socket = vip::socket(address, Type::STREAM, Protocol::TCP)?;
        let listener = Self::with(socket, entry, settings)?;
        listener.socket.bind(&address.into())?;
        listener.socket.listen(settings.backlog)?;
        Ok(listener)
    }

    /// One that listens already; `None` if it does not. Whoever else has it may have shut it down, which ends
    /// it for all, and it would be readable for ever with nothing to accept.
    ///
    /// # Errors
    /// When its options cannot be set.
    pub fn inherited(socket: OwnedFd, entry: &Entry, settings: &Settings) -> io::Result<Option<Self>> {
        let socket = Socket::from(socket);
        if !socket.is_listener()? {
            return Ok(None);
        }
        socket.set_nonblocking(true)?;
        Self::with(socket, entry, settings).map(Some)
    }

    fn with(socket: Socket, entry: &Entry, settings: &Settings) -> io::Result<Self> {
        // What is accepted inherits these.
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_keepalive(&settings.tcp_keepalive())?;
        let listener = Self {
            socket,
            is_closed: AtomicBool::new(false),
            closes: Notify::new(),
            is_shared: AtomicBool::new(false),
            has_filter: AtomicBool::new(false),
        };
        listener.filter(entry);
        Ok(listener)
    }

    /// Lets the kernel drop what comes from outside of the source ranges. Where it does not, connections
    /// are reset when they have been accepted.
    pub fn filter(&self, entry: &Entry) {
        let table = entry.table();
        let is_v4 = entry.key.vip.is_ipv4();
        let is_set = source_filter::apply(&self.socket, &table.frontend.source_ranges, is_v4);
        self.has_filter.store(is_set, Relaxed);
    }

    /// Another process has the socket, too.
    pub fn has_heir(&self) {
        self.is_shared.store(true, SeqCst);
    }

    /// Accepts no more, and leaves what waits to the kernel, or to another process that has the socket, too.
    pub fn stop(&self) {
        self.is_closed.store(true, SeqCst);
        self.closes.notify_waiters();
    }

    /// Listens no more. What waits to be accepted is served by `worker`; if there is no file descriptor for
    /// it, for as long as there is `patience`, which is used up by that. If another process has the socket,
    /// too, it stays open there.
    pub fn close(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        shared: &Arc<Shared>,
        worker: (&Handle, usize),
        patience: &mut Duration,
    ) {
        self.is_closed.store(true, SeqCst);
        let mut failures = 0;
        loop {
            match self.accept() {
                Accepted::One(socket, peer) => self.serve(socket, peer, entry, shared, worker),
                Accepted::None => break,
                // It may have been that connection alone.
                Accepted::Failed if failures < BATCH => failures += 1,
                Accepted::NoRoom if !self.is_shared.load(SeqCst) && !patience.is_zero() => {
                    shared.shortages.fetch_add(1, Relaxed);
                    thread::sleep(PAUSES[0].min(*patience));
                    *patience = patience.saturating_sub(PAUSES[0]);
                }
                Accepted::Failed | Accepted::NoRoom => break,
            }
        }
        if !self.is_shared.load(SeqCst) {
            // Tasks that still have it would keep it listening otherwise.
            let _ = self.socket.shutdown(Shutdown::Both);
        }
        self.closes.notify_waiters();
    }

    /// Accepts until it is closed.
    pub async fn run(self: Arc<Self>, entry: Arc<Entry>, shared: Arc<Shared>, worker: usize) {
        let mut closed = pin!(self.closes.notified());
        closed.as_mut().enable();
        let handle = Handle::current();
        let mut pause = PAUSES[0];
        let fd = loop {
            if self.is_closed.load(SeqCst) {
                return;
            }
            match watch(Arc::clone(&self), Interest::READABLE) {
                Ok(fd) => break fd,
                // The kernel has no memory, or fs.epoll.max_user_watches are in use.
                Err(_) => sleep(PAUSES[1]).await,
            }
        };
        while !self.is_closed.load(SeqCst) {
            let ready = tokio::select! {
                () = &mut closed => break,
                ready = fd.readable() => ready,
            };
            let Ok(mut ready) = ready else { break };
            for _ in 0..BATCH {
                match self.accept() {
                    Accepted::One(socket, peer) => {
                        pause = PAUSES[0];
                        self.serve(socket, peer, &entry, &shared, (&handle, worker));
                    }
                    Accepted::None => {
                        ready.clear_ready();
                        break;
                    }
                    Accepted::Failed => {}
                    Accepted::NoRoom => {
                        // It waits, and is served when there is room.
                        shared.shortages.fetch_add(1, Relaxed);
                        sleep(pause).await;
                        pause = (pause * 2).min(PAUSES[1]);
                        break;
                    }
                }
            }
            tokio::task::yield_now().await;
        }
    }

    fn serve(
        &self,
        socket: Socket,
        peer: SocketAddr,
        entry: &Arc<Entry>,
        shared: &Arc<Shared>,
        (handle, worker): (&Handle, usize),
    ) {
        if self.has_filter.load(Relaxed) {
            // A filter that stays costs time and lets all pass.
            let _ = socket.detach_filter();
        }
        let place = shared.place(worker);
        let other = shared.handles.get().filter(|_| place != worker).and_then(|all| all.get(place));
        match Connection::begin(shared, entry, if other.is_some() { place } else { worker }) {
            Some(connection) => drop(other.unwrap_or(handle).spawn(connection.serve(socket, peer))),
            None => drop(socket.set_linger(Some(Duration::ZERO))),
        }
    }

    fn accept(&self) -> Accepted {
        match self.socket.accept4(SOCK_CLOEXEC | SOCK_NONBLOCK) {
            Ok((socket, peer)) => {
                peer.as_socket().map_or(Accepted::Failed, |peer| Accepted::One(socket, peer))
            }
            Err(error) => match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
                // No longer a listening socket: closed by us, and about to end.
                Errno::EAGAIN | Errno::EINVAL => Accepted::None,
                Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM => Accepted::NoRoom,
                // accept(2): errors of the new connection, which are not ours.
                _ => Accepted::Failed,
            },
        }
    }
}

enum Accepted {
    One(Socket, SocketAddr),
    /// Nothing waits.
    None,
    /// This one; another may wait.
    Failed,
    /// There are no file descriptors or no memory.
    NoRoom,
}
