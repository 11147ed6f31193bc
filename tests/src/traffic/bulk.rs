//! Much data, both ways at once, every byte checked.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    thread,
};

use anyhow::{Context, Result, ensure};

use super::{Pattern, client::uninterrupted};

/// Sends `total` bytes through an echo connection while it reads them back; compares every byte.
/// Gives the name of the backend.
///
/// # Errors
/// With the offset of the first wrong byte, or why the stream ended.
pub fn echo(stream: &TcpStream, total: u64, seed: u64) -> Result<String> {
    thread::scope(|scope| {
        let sender = scope.spawn(|| send(stream, total, Pattern::new(seed)));
        let received = receive(stream, total, Pattern::new(seed));
        if received.is_err() {
            // Or the sender would wait until its time is up.
            let _ = stream.shutdown(Shutdown::Both);
        }
        let sent = sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))?;
        let name = received?;
        sent.map(|()| name)
    })
}

fn send(mut stream: &TcpStream, total: u64, mut pattern: Pattern) -> Result<()> {
    let mut left = total;
    while left > 0 {
        let piece = pattern.next(usize::try_from(left).unwrap_or(usize::MAX).min(256 * 1024));
        let count = piece.len();
        stream.write_all(piece).with_context(|| format!("cannot write after {} bytes", total - left))?;
        pattern.advance(count);
        left -= count as u64;
    }
    stream.shutdown(Shutdown::Write).context("cannot close one half")
}

fn receive(mut stream: &TcpStream, total: u64, mut pattern: Pattern) -> Result<String> {
    let mut buffer = vec![0; 256 * 1024];
    let mut done = 0;
    while done < total {
        let most = usize::try_from(total - done).unwrap_or(usize::MAX).min(buffer.len());
        let count = uninterrupted(|| stream.read(&mut buffer[..most]))
            .with_context(|| format!("cannot read after {done} bytes"))?;
        ensure!(count > 0, "the stream ended after {done} of {total} bytes");
        if let Err(at) = pattern.check(&buffer[..count]) {
            anyhow::bail!("byte {} is wrong", done + at as u64);
        }
        done += count as u64;
    }
    let mut trailer = String::new();
    stream.read_to_string(&mut trailer).context("cannot read the trailer")?;
    let name = trailer.strip_prefix("bye ").and_then(|rest| rest.strip_suffix(&format!(" {total}")));
    name.map(str::to_owned).with_context(|| format!("`{trailer}` is not the trailer of {total} bytes"))
}
