//! SYNs from everywhere.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result, anyhow};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, bind, socket},
    unistd::write,
};

use crate::kit::packet::{Body, Spec, Tcp, flags::SYN};
use crate::lab::{
    Lab, Namespace,
    wire::{ethernet_address, link},
};

/// Sends SYNs to one address until it is stopped, each from another source.
#[derive(Debug)]
pub struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Flood {
    /// Begins to send from the client of a lab.
    ///
    /// # Errors
    /// When its device is not as it should be.
    pub fn start(lab: &Lab, to: SocketAddr) -> Result<Self> {
        let source: IpAddr = if to.is_ipv4() { [100, 0, 0, 0].into() } else { "2001:db8:ff::".parse()? };
        let mut spec = Spec::new(
            source,
            to.ip(),
            Body::Tcp(Tcp {
                source: 0xffff,
                destination: to.port(),
                sequence: 1,
                acknowledgment: 0,
                flags: SYN,
                options: Vec::new(),
                payload: Vec::new(),
            }),
        );
        spec.from = ethernet_address(&lab.client, "eth0")?;
        spec.to = ethernet_address(&lab.edge, "uplink")?;
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count, client) = (Arc::clone(&stop), Arc::clone(&sent), Arc::clone(&lab.client));
        let frame = spec.build();
        let thread = thread::spawn(move || run(&client, frame, &stopped, &count));
        Ok(Self { stop, sent, thread: Some(thread) })
    }

    /// Frames sent so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Ends it; gives how many frames were sent.
    ///
    /// # Errors
    /// When the device did not take them.
    pub fn stop(mut self) -> Result<u64> {
        self.join()?;
        Ok(self.sent())
    }

    fn join(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().map_err(|_| anyhow!("the flood's thread panicked"))?
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        let _ = self.join();
    }
}

fn run(client: &Namespace, mut frame: Vec<u8>, stop: &AtomicBool, sent: &AtomicU64) -> Result<()> {
    let socket = client.enter(|| -> Result<_> {
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
        bind(socket.as_raw_fd(), &link("eth0")?)?;
        Ok(socket)
    })??;
    let is_v4 = frame[12..14] == [8, 0];
    let mut number: u64 = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        come_from(&mut frame, is_v4, scatter(number));
        match write(&socket, &frame) {
            Ok(_) => sent.store(number, Ordering::Relaxed),
            // The device's queue is full: the frame is lost, as in any flood.
            Err(Errno::ENOBUFS | Errno::EAGAIN) => {}
            Err(error) => return Err(error).context("cannot send a frame"),
        }
    }
    Ok(())
}

/// A number without order for each number (the multiplier of Fibonacci hashing): no two are the
/// same in their high half within 2^32 in a row.
fn scatter(number: u64) -> u32 {
    (number as u32).wrapping_mul(0x9e37_79b1)
}

/// Sets the source address (its low three bytes, or its low four) and makes the port what keeps the
/// sum of both, so that the TCP checksum stays right.
fn come_from(frame: &mut [u8], is_v4: bool, source: u32) {
    let bytes = source.to_be_bytes();
    let (address, port) = if is_v4 { (26, 34) } else { (34, 54) };
    if is_v4 {
        frame[address + 1..address + 4].copy_from_slice(&bytes[..3]);
        let words = frame[14..34].chunks(2).enumerate().filter(|(index, _)| *index != 5);
        let sum = words.fold(0, |sum, (_, word)| sum + u32::from(u16::from_be_bytes([word[0], word[1]])));
        frame[24..26].copy_from_slice(&(!folded(sum)).to_be_bytes());
        let words = [[0, bytes[0]], [bytes[1], bytes[2]]].map(u16::from_be_bytes);
        frame[port..port + 2].copy_from_slice(&(!folded(words.map(u32::from).iter().sum())).to_be_bytes());
    } else {
        frame[address..address + 4].copy_from_slice(&bytes);
        let words = [[bytes[0], bytes[1]], [bytes[2], bytes[3]]].map(u16::from_be_bytes);
        frame[port..port + 2].copy_from_slice(&(!folded(words.map(u32::from).iter().sum())).to_be_bytes());
    }
}

/// The one's complement sum of 16-bit words.
fn folded(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum + (sum >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::kit::seen;

    /// `seen::read` checks every checksum.
    #[test]
    fn every_frame_is_right_and_from_elsewhere() {
        for (from, to) in [("100.0.0.0", "192.0.2.1"), ("2001:db8:ff::", "2001:db8::1")] {
            let tcp = Tcp {
                source: 0xffff,
                destination: 80,
                sequence: 1,
                acknowledgment: 0,
                flags: SYN,
                options: Vec::new(),
                payload: Vec::new(),
            };
            let mut frame = Spec::new(from.parse().unwrap(), to.parse().unwrap(), Body::Tcp(tcp)).build();
            let is_v4 = from.contains('.');
            let sources: BTreeSet<IpAddr> = (1..1000)
                .map(|number| {
                    come_from(&mut frame, is_v4, scatter(number));
                    seen::read(&frame).unwrap().source
                })
                .collect();
            assert_eq!(sources.len(), 999);
        }
    }
}
