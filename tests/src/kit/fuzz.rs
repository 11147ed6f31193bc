//! What the fuzzers run, as functions: the committed corpora are replayed through them, too.

use lb_common::abi::{V4, V6};
use lb_common::forward::ip::IpFamily;
use lb_common::forward::parse::{self, Ip, Parse, Part, Transport};
use lb_common::forward::platform::Packet as _;
use lb_common::forward::tcp_options;

use super::host::Host;
use super::random::{Source, Traffic};
use super::view::{Buffer, MAXIMUM_PACKET};

/// Parses any bytes; what is found must lie inside of them.
///
/// # Panics
/// When it does not.
pub fn parse(bytes: &[u8]) {
    let bytes = &bytes[..bytes.len().min(MAXIMUM_PACKET)];
    let mut buffer = Buffer::default();
    buffer.fill(bytes);
    let packet = buffer.view();
    let Some(link) = parse::link(packet) else {
        assert!(bytes.len() < 22);
        return;
    };
    assert!(matches!(link.l3, 14 | 18 | 22) && link.l3 <= bytes.len());
    for whole in [true, false] {
        family::<V4>(&buffer, link.l3, whole, [0; 4]);
        family::<V6>(&buffer, link.l3, whole, [0; 16]);
    }
    assert_eq!(buffer.content(), bytes, "reading changes nothing");
}

fn family<F: IpFamily + Parse>(buffer: &Buffer, l3: usize, whole: bool, address: F::Address) {
    let packet = buffer.view();
    let mut ip = Ip {
        l3,
        l4: 0,
        end: 0,
        fragment_header: 0,
        source: address,
        destination: address,
        protocol: 0,
        hops_left: 0,
        part: Part::Whole,
    };
    if !F::parse(packet, whole, &mut ip) {
        return;
    }
    assert!(ip.l4 >= l3 + F::HEADER_LENGTH && ip.l4 <= ip.end, "{ip:?}");
    assert!(!whole || ip.end <= packet.length(), "{ip:?} in {} bytes", packet.length());
    let mut transport = Transport::default();
    if whole && !matches!(ip.part, Part::Later(_)) && parse::transport(packet, &ip, &mut transport) {
        assert!(ip.l4 + transport.header_length <= ip.end, "{ip:?} {transport:?}");
        tcp_options::timestamp(&Host::default(), &mut 0, ip.l4, &transport);
    }
}

/// Steps of one run at most.
const STEPS: usize = 400;

/// Takes bytes for choices of [`Traffic`] on the host.
///
/// # Panics
/// When a packet is treated as none may be.
pub fn forward(bytes: &[u8]) {
    run(Host::default(), bytes);
}

/// The same as the programs in TC see it: tags beside packets, unfinished checksums, super-packets, packets
/// in pieces, sums of whole packets. The last quarter of the bytes decides on that.
///
/// # Panics
/// When a packet is treated as none may be.
pub fn classify(bytes: &[u8]) {
    let (traffic, offloads) = bytes.split_at(bytes.len() - bytes.len() / 4);
    run(Host::with_offloads(Source::Bytes(offloads.to_vec(), 0)), traffic);
}

fn run(mut host: Host, bytes: &[u8]) {
    let mut traffic = Traffic::new(&mut host, Source::Bytes(bytes.to_vec(), 0));
    for _ in 0..STEPS {
        if !traffic.goes_on() {
            break;
        }
        traffic.step(&mut host);
    }
}
