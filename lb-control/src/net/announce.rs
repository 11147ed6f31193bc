//! Tells the neighbours of a device that an address is here now.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use rtnetlink::Handle;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::way::Link;
use super::{Kernel, Monitor, addresses};

const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const BROADCAST: [u8; 6] = [0xff; 6];
/// ff02::1 on Ethernet (RFC 2464, section 7).
const ALL_NODES: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

/// How long a device that is down is waited for. Whoever asks later is answered by the kernel.
const PATIENCE: Duration = Duration::from_secs(300);

/// Pauses before the repetitions: a frame may be lost on the way, and is when the device came up
/// this moment and its queue is not active yet, which the kernel does not tell (`linkwatch`).
const REPETITIONS: [Duration; 3] =
    [Duration::from_millis(1_000), Duration::from_millis(1_500), Duration::from_millis(2_500)];

/// Announces addresses of ours at once, or once the device can send, and some times more over five
/// seconds.
pub(super) async fn announce_and_repeat(handle: &Handle, index: u32, addresses: &[IpAddr]) {
    let kernel = Kernel::from(handle.clone());
    let begin = async {
        // Listening begins first, so that the moment cannot be missed.
        let monitor = Monitor::start()?;
        anyhow::Ok((announce_now(&kernel, index, addresses).await?, monitor))
    };
    match begin.await {
        Ok((was_ready, monitor)) => {
            let addresses = addresses.to_vec();
            tokio::spawn(async move {
                if let Err(error) = follow_up(&kernel, monitor, was_ready, index, addresses).await {
                    debug!("{error:#}");
                }
            });
        }
        Err(error) => warn!("{error:#}; clients learn the new addresses when they ask"),
    }
}

async fn follow_up(
    kernel: &Kernel,
    mut monitor: Monitor,
    was_ready: bool,
    index: u32,
    addresses: Vec<IpAddr>,
) -> Result<()> {
    if !was_ready {
        let ready = async {
            while !announce_ours(kernel, index, &addresses).await? {
                monitor.next().await.context("the netlink socket for events is closed")?;
            }
            anyhow::Ok(())
        };
        timeout(PATIENCE, ready).await.with_context(|| format!("device {index} stays down"))??;
    }
    drop(monitor);
    for pause in REPETITIONS {
        sleep(pause).await;
        announce_ours(kernel, index, &addresses).await?;
    }
    Ok(())
}

/// Announces those that are still ours: what went in the meantime may be another node's by now.
async fn announce_ours(kernel: &Kernel, index: u32, addresses: &[IpAddr]) -> Result<bool> {
    let ours = addresses::ours(kernel.handle(), index).await?;
    let left: Vec<_> = addresses.iter().copied().filter(|address| ours.contains(address)).collect();
    announce_now(kernel, index, &left).await
}

/// Whether the device was ready.
async fn announce_now(kernel: &Kernel, index: u32, addresses: &[IpAddr]) -> Result<bool> {
    match kernel.links().await?.get(&index) {
        Some(link) if link.is_up => announce(index, link, addresses).map(|()| true),
        // A device that is gone has nobody to tell.
        found => Ok(found.is_none()),
    }
}

/// Sends one announcement for each address, at once. Does nothing on a device without Ethernet
/// address (a tunnel), where nobody keeps link-layer addresses.
pub(super) fn announce(index: u32, link: &Link, addresses: &[IpAddr]) -> Result<()> {
    let Some(mac) = link.mac else { return Ok(()) };
    if addresses.is_empty() || link.is_loopback {
        return Ok(());
    }
    let context = || format!("cannot announce addresses on {}", link.name);
    // Protocol 0: the socket sends and receives nothing.
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0))).with_context(context)?;
    let target = link_address(index).with_context(context)?;
    for address in addresses {
        let sent = match address {
            IpAddr::V4(address) => socket.send_to(&gratuitous_arp(*address, mac), &target),
            IpAddr::V6(address) => socket.send_to(&unsolicited_advertisement(*address, mac), &target),
        };
        sent.with_context(context)?;
    }
    Ok(())
}

/// The socket address of a device.
fn link_address(index: u32) -> io::Result<SockAddr> {
    let index = i32::try_from(index).map_err(io::Error::other)?;
    #[expect(unsafe_code, reason = "socket2 has no safe constructor for link-layer socket addresses")]
    // SAFETY: the storage is zeroed, larger than `sockaddr_ll` and aligned for it, and the length
    // is that of the structure that is written.
    let (_, address) = unsafe {
        SockAddr::try_init(|storage, length| {
            let address = &mut *storage.cast::<libc::sockaddr_ll>();
            address.sll_family = libc::AF_PACKET as libc::sa_family_t;
            address.sll_ifindex = index;
            *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })
    }?;
    Ok(address)
}

/// An ARP announcement: a request whose sender and target are the address (RFC 5227, section 3).
fn gratuitous_arp(address: Ipv4Addr, mac: [u8; 6]) -> Vec<u8> {
    let ip = address.octets();
    let mut frame = Vec::with_capacity(42);
    frame.extend(BROADCAST);
    frame.extend(mac);
    frame.extend(ETHERTYPE_ARP);
    frame.extend([0, 1, 0x08, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(ip);
    frame.extend([0; 6]);
    frame.extend(ip);
    frame
}

/// An unsolicited neighbour advertisement with the Override flag and the target link-layer address
/// (RFC 4861, sections 4.4 and 7.2.6).
fn unsolicited_advertisement(address: Ipv6Addr, mac: [u8; 6]) -> Vec<u8> {
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut message = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    message.extend(address.octets());
    message.extend([2, 1]);
    message.extend(mac);
    let checksum = icmpv6_checksum(address, all_nodes, &message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());

    let mut frame = Vec::with_capacity(86);
    frame.extend(ALL_NODES);
    frame.extend(mac);
    frame.extend(ETHERTYPE_IPV6);
    // Receivers drop anything but hop limit 255 (RFC 4861, section 7.1.2).
    frame.extend([0x60, 0, 0, 0, 0, message.len() as u8, 58, 255]);
    frame.extend(address.octets());
    frame.extend(all_nodes.octets());
    frame.extend(message);
    frame
}

fn icmpv6_checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let words = source.segments().into_iter().chain(destination.segments()).map(u32::from);
    let body = message.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum = words.chain(body).sum::<u32>() + message.len() as u32 + 58;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    #[test]
    fn arp_names_sender_and_target() {
        let frame = gratuitous_arp(Ipv4Addr::new(192, 0, 2, 10), MAC);
        assert_eq!(frame.len(), 42);
        assert_eq!((&frame[..6], &frame[6..12]), (&[0xff; 6][..], &MAC[..]));
        assert_eq!((&frame[28..32], &frame[38..42]), (&[192, 0, 2, 10][..], &[192, 0, 2, 10][..]));
    }

    #[test]
    fn checksum_verifies_to_zero() {
        let address: Ipv6Addr = "2001:db8::10".parse().unwrap();
        let frame = unsolicited_advertisement(address, MAC);
        assert_eq!(frame.len(), 14 + 40 + 32);
        let message = &frame[54..];
        let all_nodes = "ff02::1".parse().unwrap();
        assert_eq!(icmpv6_checksum(address, all_nodes, message), 0);
        // Known-good value, so that sender and check cannot be wrong together: sum of the pseudo
        // header and message by hand: 0x2001+0x0db8+0x10 twice, 0xff02+1, 32+58, 0x8800+0x2000,
        // 0x0201+0x0200+0x0001.
        let by_hand: u32 = 2 * (0x2001 + 0xdb8 + 0x10) + 0xff03 + 90 + 0x8800 + 0x2000 + 0x201 + 0x200 + 1;
        let folded = (by_hand & 0xffff) + (by_hand >> 16);
        assert_eq!(message[2..4], (!(folded as u16)).to_be_bytes());
    }
}
