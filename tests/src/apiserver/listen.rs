//! Where the server listens: addresses that can go down and come back, each for itself.

use std::{
    fs::File,
    io,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use anyhow::{Context, Result};
use futures::stream;
use http_body_util::{BodyExt, Either, Full, StreamBody};
use hyper::{
    Request, Response,
    body::{Bytes, Frame, Incoming},
    header,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use nix::sched::{CloneFlags, setns};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    runtime::Handle,
    sync::{mpsc, watch},
};

use super::server::{Reply, Server};

/// An address, reserved even while nothing listens on it.
#[derive(Debug)]
pub struct Endpoint {
    address: SocketAddr,
    namespace: Option<PathBuf>,
    server: Arc<Server>,
    runtime: Handle,
    /// Bound and never listened on, so that nobody else is given the port meanwhile.
    _reserved: TcpSocket,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    stop: watch::Sender<bool>,
    /// Closed by the last task of this endpoint.
    ended: mpsc::Receiver<()>,
}

/// A socket in a network namespace (a file that `setns` takes), or in the current one.
fn socket(namespace: Option<&PathBuf>, address: SocketAddr) -> Result<TcpSocket> {
    let make = || -> io::Result<TcpSocket> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        socket.set_reuseport(true)?;
        socket.bind(address)?;
        Ok(socket)
    };
    let made = match namespace {
        None => make(),
        Some(path) => {
            let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
            // On a thread of its own: the namespace of this one must not change.
            let inside = move || -> io::Result<TcpSocket> {
                setns(&file, CloneFlags::CLONE_NEWNET)?;
                make()
            };
            thread::scope(|scope| scope.spawn(inside).join().expect("does not panic"))
        }
    };
    made.with_context(|| format!("cannot bind to {address}"))
}

impl Endpoint {
    /// Starts to listen.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub fn new(
        server: Arc<Server>,
        runtime: Handle,
        address: SocketAddr,
        namespace: Option<PathBuf>,
    ) -> Result<Self> {
        let reserved = socket(namespace.as_ref(), address)?;
        let address = reserved.local_addr()?;
        let endpoint =
            Self { address, namespace, server, runtime, _reserved: reserved, running: Mutex::default() };
        endpoint.up()?;
        Ok(endpoint)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Listens again.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub fn up(&self) -> Result<()> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if running.is_some() {
            return Ok(());
        }
        let socket = socket(self.namespace.as_ref(), self.address)?;
        let _inside = self.runtime.enter();
        let listener = socket.listen(1024).with_context(|| format!("cannot listen on {}", self.address))?;
        let (stop, stopped) = watch::channel(false);
        let (alive, ended) = mpsc::channel(1);
        self.runtime.spawn(accept(self.server.clone(), listener, stopped, alive));
        *running = Some(Running { stop, ended });
        Ok(())
    }

    /// Refuses connections and closes those that are open; returns when that is done.
    pub fn down(&self) {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Running { stop, mut ended }) = running else { return };
        let _ = stop.send(true);
        let wait = || self.runtime.block_on(async { while ended.recv().await.is_some() {} });
        // A thread of the caller's runtime must not block on ours.
        thread::scope(|scope| scope.spawn(wait).join().expect("does not panic"));
    }
}

async fn accept(
    server: Arc<Server>,
    listener: TcpListener,
    mut stopped: watch::Receiver<bool>,
    alive: mpsc::Sender<()>,
) {
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopped.changed() => return,
        };
        let Ok((stream, _)) = stream else { continue };
        tokio::spawn(serve(server.clone(), stream, stopped.clone(), alive.clone()));
    }
}

async fn serve(
    server: Arc<Server>,
    stream: TcpStream,
    mut stopped: watch::Receiver<bool>,
    _alive: mpsc::Sender<()>,
) {
    let _ = stream.set_nodelay(true);
    let service = service_fn(|request| respond(server.clone(), request));
    let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // How it ends is the client's business.
        _ = connection => {}
        _ = stopped.wait_for(|stopped| *stopped) => {}
    }
}

type Events = Pin<Box<dyn stream::Stream<Item = Result<Frame<Bytes>, io::Error>> + Send>>;
type Body = Either<Full<Bytes>, StreamBody<Events>>;

/// Answers one request; an error closes the connection.
async fn respond(server: Arc<Server>, request: Request<Incoming>) -> io::Result<Response<Body>> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let reply = server.answer(&head.method, &head.uri, &head.headers, body).await;
    let builder = Response::builder().header(header::CACHE_CONTROL, "no-cache, private");
    let response = match reply {
        Reply::Nothing => return Err(io::ErrorKind::ConnectionReset.into()),
        Reply::Full { code, body, retry_after } => {
            let json = matches!(body.first(), Some(b'{' | b'['));
            let content = if json { "application/json" } else { "text/plain; charset=utf-8" };
            let mut builder = builder.status(code).header(header::CONTENT_TYPE, content);
            if let Some(seconds) = retry_after {
                builder = builder.header(header::RETRY_AFTER, seconds);
            }
            builder.body(Either::Left(Full::new(body.into())))
        }
        Reply::Stream(source) => {
            let events = stream::unfold(source, async |mut source| {
                source.recv().await.map(|event| (Ok(Frame::data(event)), source))
            });
            let events: Events = Box::pin(events);
            let builder = builder.header(header::CONTENT_TYPE, "application/json");
            builder.body(Either::Right(StreamBody::new(events)))
        }
    };
    response.map_err(io::Error::other)
}
