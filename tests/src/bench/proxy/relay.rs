//! The plain relay: what tokio gives for nothing, to compare with.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};

/// Accepts, connects to the backends in turn and copies both ways, until the process is ended.
///
/// # Errors
/// When the address cannot be listened on.
pub fn run(listen: SocketAddr, backends: &[SocketAddr]) -> Result<()> {
    ensure!(!backends.is_empty(), "a relay needs a backend");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(listen).await.with_context(|| format!("listening on {listen}"))?;
        serve(&listener, backends).await
    })
}

async fn serve(listener: &TcpListener, backends: &[SocketAddr]) -> Result<()> {
    static TURN: AtomicUsize = AtomicUsize::new(0);
    loop {
        let Ok((mut client, _)) = listener.accept().await else {
            // Out of files, most likely: others have to end first.
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            continue;
        };
        let backend = backends[TURN.fetch_add(1, Ordering::Relaxed) % backends.len()];
        tokio::spawn(async move {
            // Whoever resets has his reasons.
            let _ = relay(&mut client, backend).await;
        });
    }
}

async fn relay(client: &mut TcpStream, backend: SocketAddr) -> Result<()> {
    client.set_nodelay(true)?;
    let mut server = TcpStream::connect(backend).await?;
    server.set_nodelay(true)?;
    copy_bidirectional(client, &mut server).await?;
    Ok(())
}
