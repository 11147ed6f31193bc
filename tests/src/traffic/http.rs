//! As much of HTTP/1.1 as `curl` and the tests need.

use std::{io, net::SocketAddr, sync::Arc};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

use super::{Pattern, server::Health};

/// Seed of the bytes under `/bytes/N`.
pub const BYTES_SEED: u64 = 80;

/// Answers requests until the client closes or asks to close.
pub async fn serve(stream: TcpStream, name: Arc<str>, health: Arc<Health>) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let Some((path, close)) = request(&mut stream).await? else { return Ok(()) };
        let connection = if close { "close" } else { "keep-alive" };
        let bytes = path.strip_prefix("/bytes/").and_then(|count| count.parse::<usize>().ok());
        let body = if path == "/peer" {
            let peer = stream.get_ref().peer_addr()?;
            format!("{}\n", SocketAddr::new(peer.ip().to_canonical(), peer.port()))
        } else {
            format!("{name}\n")
        };
        let length = bytes.unwrap_or(body.len());
        let status = if path.starts_with("/healthz") { health.asked(&path) } else { "200 OK" };
        let head =
            format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: {connection}\r\n\r\n");
        if let Some(mut left) = bytes {
            stream.write_all(head.as_bytes()).await?;
            let mut pattern = Pattern::new(BYTES_SEED);
            while left > 0 {
                let piece = pattern.next(left.min(128 * 1024));
                stream.write_all(piece).await?;
                let count = piece.len();
                left -= count;
                pattern.advance(count);
            }
        } else {
            // In one piece: a request and its answer are one packet each.
            stream.write_all([head, body].concat().as_bytes()).await?;
        }
        if close {
            return stream.shutdown().await;
        }
    }
}

/// Path of the next request, and whether it is the last on this connection.
async fn request(stream: &mut BufReader<TcpStream>) -> io::Result<Option<(String, bool)>> {
    let mut line = String::new();
    if stream.read_line(&mut line).await? == 0 {
        return Ok(None);
    }
    let path = line.split_whitespace().nth(1).unwrap_or("/").to_owned();
    let mut close = false;
    loop {
        let mut header = String::new();
        stream.read_line(&mut header).await?;
        let header = header.trim().to_ascii_lowercase();
        if header.is_empty() {
            return Ok(Some((path, close)));
        }
        close |= header == "connection: close";
    }
}
