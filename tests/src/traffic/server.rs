//! What runs on a backend.

use std::{
    collections::BTreeMap,
    io,
    net::{Ipv6Addr, SocketAddr, TcpListener as StdTcpListener, UdpSocket as StdUdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    runtime,
    sync::oneshot,
};

use super::http;
use crate::lab::Namespace;

/// HTTP: `/` answers the backend's name, `/healthz` and what begins so 503 while the backend is [said to be ill](Server::set_healthy), `/peer` the client's address and port as the backend sees them, `/bytes/N` that many bytes of a [`super::Pattern`].
pub const HTTP_PORT: u16 = 8080;
/// TCP: every byte comes back; after the client's FIN also `bye <name> <bytes>`, then a FIN.
pub const ECHO_PORT: u16 = 7000;
/// UDP: the datagram comes back behind `<name> `.
pub const UDP_PORT: u16 = 9000;

/// The servers of one backend, for IPv4 and IPv6, on a thread in its namespace. Dropped, its
/// listeners and connections are closed at once.
#[derive(Debug)]
pub struct Server {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    accepted: Arc<AtomicU64>,
    health: Arc<Health>,
}

/// What a backend says of itself, and how often it was asked.
#[derive(Debug, Default)]
pub struct Health {
    is_ill: AtomicBool,
    /// By path.
    asked: Mutex<BTreeMap<String, u64>>,
}

impl Health {
    /// Counts a question; gives the status for the answer.
    pub fn asked(&self, path: &str) -> &'static str {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        *asked.entry(path.to_owned()).or_default() += 1;
        if self.is_ill.load(Ordering::SeqCst) { "503 Service Unavailable" } else { "200 OK" }
    }
}

impl Server {
    /// Starts the servers; they listen when this returns.
    ///
    /// # Errors
    /// When a port is taken.
    pub fn start(namespace: &Namespace) -> Result<Self> {
        let bound = namespace.enter(Sockets::bind)?;
        let sockets = bound.with_context(|| format!("cannot listen on {}", namespace.role()))?;
        let name: Arc<str> = namespace.role().into();
        let accepted = Arc::new(AtomicU64::new(0));
        let runtime = runtime::Builder::new_current_thread().enable_all().build().context("tokio runtime")?;
        let (stop, stopped) = oneshot::channel();
        let count = Arc::clone(&accepted);
        let health = Arc::new(Health::default());
        let own = Arc::clone(&health);
        let body = move || {
            let served = runtime.block_on(async {
                tokio::select! {
                    served = sockets.serve(&name, &count, &own) => served,
                    _ = stopped => Ok(()),
                }
            });
            if let Err(error) = served {
                eprintln!("server {name}: {error}");
            }
        };
        let thread = thread::Builder::new().name(format!("server {}", namespace.role())).spawn(body)?;
        Ok(Self { stop: Some(stop), thread: Some(thread), accepted, health })
    }

    /// Servers on all of these.
    ///
    /// # Errors
    /// When one cannot be started.
    pub fn start_all(namespaces: &[Namespace]) -> Result<Vec<Self>> {
        namespaces.iter().map(Self::start).collect()
    }

    /// What it says of itself from now on.
    pub fn set_healthy(&self, healthy: bool) {
        self.health.is_ill.store(!healthy, Ordering::SeqCst);
    }

    /// How often it was asked how it is, by path.
    #[must_use]
    pub fn asked(&self) -> BTreeMap<String, u64> {
        self.health.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// TCP connections taken so far.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Bound in the namespace, used outside of it.
struct Sockets {
    http: StdTcpListener,
    echo: StdTcpListener,
    udp: StdUdpSocket,
}

impl Sockets {
    /// On the IPv6 wildcard, which takes IPv4 too (`net.ipv6.bindv6only` is 0 in a new namespace).
    fn bind() -> io::Result<Self> {
        let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let sockets = Self {
            http: StdTcpListener::bind(any(HTTP_PORT))?,
            echo: StdTcpListener::bind(any(ECHO_PORT))?,
            udp: StdUdpSocket::bind(any(UDP_PORT))?,
        };
        sockets.http.set_nonblocking(true)?;
        sockets.echo.set_nonblocking(true)?;
        sockets.udp.set_nonblocking(true)?;
        Ok(sockets)
    }

    async fn serve(self, name: &Arc<str>, accepted: &AtomicU64, health: &Arc<Health>) -> io::Result<()> {
        let (http, echo) = (TcpListener::from_std(self.http)?, TcpListener::from_std(self.echo)?);
        let udp = UdpSocket::from_std(self.udp)?;
        let http = accept(http, accepted, |stream| http::serve(stream, Arc::clone(name), Arc::clone(health)));
        let echo = accept(echo, accepted, |stream| tcp_echo(stream, Arc::clone(name)));
        tokio::try_join!(http, echo, udp_echo(udp, name)).map(drop)
    }
}

async fn accept<F>(
    listener: TcpListener,
    accepted: &AtomicU64,
    handle: impl Fn(TcpStream) -> F,
) -> io::Result<()>
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    loop {
        let (stream, _) = listener.accept().await?;
        accepted.fetch_add(1, Ordering::Relaxed);
        stream.set_nodelay(true)?;
        // A broken connection is the client's to notice: it checks what comes back.
        tokio::spawn(handle(stream));
    }
}

async fn tcp_echo(mut stream: TcpStream, name: Arc<str>) -> io::Result<()> {
    let mut buffer = vec![0; 256 * 1024];
    let mut total = 0_u64;
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            break;
        }
        stream.write_all(&buffer[..count]).await?;
        total += count as u64;
    }
    stream.write_all(format!("bye {name} {total}").as_bytes()).await?;
    stream.shutdown().await
}

async fn udp_echo(socket: UdpSocket, name: &str) -> io::Result<()> {
    let mut buffer = vec![0; 65_536];
    loop {
        // ICMP errors for answers that nobody waits for come up here.
        let Ok((count, from)) = socket.recv_from(&mut buffer).await else { continue };
        let answer = [name.as_bytes(), b" ", &buffer[..count]].concat();
        let _ = socket.send_to(&answer, from).await;
    }
}
