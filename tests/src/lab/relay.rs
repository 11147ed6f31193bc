//! Lets a namespace without a way out reach one server of the machine.

use std::{
    io,
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use anyhow::{Context, Result};

use super::Namespace;

/// Listens on loopback in a namespace and passes connections on to a server outside, until it is
/// dropped.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    is_cut: AtomicBool,
    has_ended: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
}

impl State {
    fn close_all(&self) {
        for stream in self.open.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Relay {
    /// To `server`, as this process reaches it.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn new(namespace: &Namespace, server: SocketAddr) -> Result<Self> {
        let listener = namespace
            .enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?
            .context("cannot listen in the namespace")?;
        let address = listener.local_addr().context("the relay's address")?;
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.has_ended.load(Ordering::SeqCst) {
                    break;
                }
                let Ok(stream) = stream else { continue };
                if !shared.is_cut.load(Ordering::SeqCst) {
                    pass_on(stream, server, &shared);
                }
            }
        });
        Ok(Self { address, state })
    }

    /// Where it listens, in the namespace.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Cuts the server off from the namespace, or joins them again.
    pub fn cut(&self, cut: bool) {
        self.state.is_cut.store(cut, Ordering::SeqCst);
        if cut {
            self.state.close_all();
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.state.has_ended.store(true, Ordering::SeqCst);
        self.state.close_all();
        // The thread ends with the next connection, or with the process of the test.
    }
}

fn pass_on(client: TcpStream, server: SocketAddr, state: &State) {
    let Ok(server) = TcpStream::connect(server) else { return };
    for (from, to) in [(&client, &server), (&server, &client)] {
        let (Ok(mut from), Ok(mut to)) = (from.try_clone(), to.try_clone()) else { return };
        thread::spawn(move || {
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        });
    }
    state.open.lock().unwrap_or_else(PoisonError::into_inner).extend([client, server]);
}
