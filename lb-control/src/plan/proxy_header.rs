//! What tells a backend who the client is, ahead of the first byte: the PROXY protocol
//! (<https://www.haproxy.org/download/2.6/doc/proxy-protocol.txt>).

use std::net::{IpAddr, SocketAddr};

use crate::model::ClientAddress;

/// The first twelve bytes of version 2.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const VERSION_AND_COMMAND: u8 = 0x21;
/// A connected stream; the high four bits are the address family.
const STREAM: u8 = 1;

/// A line of text: at most 107 bytes. Both addresses are of one family.
#[must_use]
pub fn version_1(client: SocketAddr, vip: SocketAddr) -> Vec<u8> {
    let family = if client.is_ipv4() { "TCP4" } else { "TCP6" };
    let (from, to) = (client.ip(), vip.ip());
    format!("PROXY {family} {from} {to} {} {}\r\n", client.port(), vip.port()).into_bytes()
}

/// A binary header: 28 bytes for IPv4, 52 for IPv6. Both addresses are of one family.
#[must_use]
pub fn version_2(client: SocketAddr, vip: SocketAddr) -> Vec<u8> {
    let mut addresses = Vec::with_capacity(36);
    for address in [client.ip(), vip.ip()] {
        match address {
            IpAddr::V4(address) => addresses.extend(address.octets()),
            IpAddr::V6(address) => addresses.extend(address.octets()),
        }
    }
    addresses.extend(client.port().to_be_bytes());
    addresses.extend(vip.port().to_be_bytes());
    let family = if client.is_ipv4() { 1 } else { 2 };
    let length = if client.is_ipv4() { 12u16 } else { 36 };
    let mut header = Vec::with_capacity(52);
    header.extend(SIGNATURE);
    header.extend([VERSION_AND_COMMAND, family << 4 | STREAM]);
    header.extend(length.to_be_bytes());
    header.extend(addresses);
    header
}

/// The header of a connection that comes from us and not from a client, as a health check's: `UNKNOWN` in
/// version 1, the command LOCAL in version 2, which is meant for that. Empty where none is awaited.
#[must_use]
pub fn of_nobody(awaited: ClientAddress) -> &'static [u8] {
    match awaited {
        ClientAddress::ProxyV1 => b"PROXY UNKNOWN\r\n",
        ClientAddress::ProxyV2 => b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0",
        ClientAddress::Path | ClientAddress::Transparent => b"",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_nobody_it_says_so() {
        let v2 = of_nobody(ClientAddress::ProxyV2);
        // Version 2 and LOCAL, no address family, nothing behind it (section 2.2).
        assert_eq!((&v2[..12], &v2[12..]), (&SIGNATURE[..], &[0x20, 0, 0, 0][..]));
        assert!(of_nobody(ClientAddress::ProxyV1).ends_with(b"UNKNOWN\r\n"));
        assert!(of_nobody(ClientAddress::Transparent).is_empty());
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn lines() {
        for (client, vip, line) in [
            // The example of the specification, section 2.1.
            ("192.168.0.1:56324", "192.168.0.11:443", "PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"),
            ("[2001:db8::1]:65535", "[fd00::2]:80", "PROXY TCP6 2001:db8::1 fd00::2 65535 80\r\n"),
        ] {
            assert_eq!(String::from_utf8(version_1(address(client), address(vip))).unwrap(), line);
        }
    }

    #[test]
    fn the_longest_line() {
        let longest = address("[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535");
        assert!(version_1(longest, longest).len() <= 107);
    }

    #[test]
    fn binary_headers() {
        let v4 = version_2(address("192.0.2.1:256"), address("198.51.100.2:443"));
        let expected = b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a\x21\x11\x00\x0c\
                         \xc0\x00\x02\x01\xc6\x33\x64\x02\x01\x00\x01\xbb";
        assert_eq!(v4, expected);
        let v6 = version_2(address("[2001:db8::1]:1"), address("[2001:db8::2]:2"));
        assert_eq!(v6.len(), 52);
        assert_eq!(v6[12..16], [0x21, 0x21, 0, 36]);
        assert_eq!((v6[31], v6[47], &v6[48..]), (1, 2, &[0, 1, 0, 2][..]));
    }
}
