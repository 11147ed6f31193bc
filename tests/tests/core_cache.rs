//! The flow cache changes nothing that is seen from outside: journeys and random traffic on a host
//! with it, beside one without.

use lb_common::abi::{CACHE_TICKS, Tick, V4, V6};
use lb_common::forward::cache::{self, Place};
use pointsman_tests::each_journey;
use pointsman_tests::kit::device::{AnyKey, Device};
use pointsman_tests::kit::host::Host;
use pointsman_tests::kit::journeys::connection::Connection;
use pointsman_tests::kit::packet::Body;
use pointsman_tests::kit::packet::flags::{ACK, PSH, SYN};
use pointsman_tests::kit::random::{Source, Traffic};
use pointsman_tests::kit::twins::Twins;
use pointsman_tests::kit::world::{Ip, forwarded, set_up};

macro_rules! tests {
    ($($module:ident { $($name:ident),+ })+) => {
        $(mod $module {
            use pointsman_tests::kit::journeys;
            use pointsman_tests::kit::twins::Twins;

            $(#[test]
            fn $name() {
                let mut twins = Twins::default();
                journeys::$module::$name(&mut twins);
                twins.compare();
            })+
        })+
    };
}

each_journey!(tests);

/// A host with a cache, and a connection on it whose client's direction has a copy.
fn copied(ip: Ip) -> (Host, Connection) {
    let mut host = Host::default();
    host.set_cache(64);
    set_up(&mut host, 1);
    let mut connection = Connection::open(&mut host, ip, 1, 40_000);
    connection.from_client(&mut host, PSH | ACK, b"copied");
    (host, connection)
}

/// When the table last heard of the client.
fn last_seen(host: &mut Host, connection: &Connection) -> Tick {
    let tables = host.snapshots();
    match connection.key() {
        AnyKey::V4(key) => tables.v4.established[&key].last_seen,
        AnyKey::V6(key) => tables.v6.established[&key].last_seen,
    }
}

/// A copy serves in place of the table, and not for long.
#[test]
fn the_table_hears_of_a_flow_now_and_then() {
    for ip in Ip::BOTH {
        let (mut host, mut connection) = copied(ip);
        let first = last_seen(&mut host, &connection);
        host.now += 1;
        connection.from_client(&mut host, PSH | ACK, b"by the copy");
        assert_eq!(last_seen(&mut host, &connection), first, "{ip:?}");
        host.now += CACHE_TICKS;
        connection.from_client(&mut host, PSH | ACK, b"by the table");
        assert_eq!(last_seen(&mut host, &connection), host.now, "{ip:?}");
    }
}

/// Of flows that take turns at one place, the one that is there is served by its copy, until it is no longer
/// in use.
#[test]
fn a_flow_in_use_holds_its_place() {
    for ip in Ip::BOTH {
        let mut host = Host::default();
        host.set_cache(1);
        set_up(&mut host, 1);
        let mut one = Connection::open(&mut host, ip, 1, 40_000);
        let mut other = Connection::open(&mut host, ip, 2, 40_000);
        let by_the_table = |host: &mut Host, connection: &mut Connection| {
            host.now += 1;
            connection.from_client(host, PSH | ACK, b"in turn");
            last_seen(host, connection) == host.now
        };
        assert!(by_the_table(&mut host, &mut one), "{ip:?}");
        for _ in 0..2 {
            for _ in 0..3 {
                assert!(by_the_table(&mut host, &mut other), "{ip:?}");
            }
            assert!(!by_the_table(&mut host, &mut one), "{ip:?}");
        }
        for _ in 0..4 {
            assert!(by_the_table(&mut host, &mut other), "{ip:?}");
        }
        assert!(!by_the_table(&mut host, &mut other), "{ip:?}");
        assert!(by_the_table(&mut host, &mut one), "{ip:?}");
    }
}

/// Whether an RST is believed depends on a sequence number that the table knows.
#[test]
fn the_table_hears_of_a_sequence_number_far_on() {
    for ip in Ip::BOTH {
        let (mut host, connection) = copied(ip);
        host.now += 1;
        let mut spec = connection.client_segment(PSH | ACK, b"far on");
        let Body::Tcp(tcp) = &mut spec.body else { panic!("a connection is TCP") };
        tcp.sequence = tcp.sequence.wrapping_add(2 << 24);
        forwarded(&mut host, &spec);
        assert_eq!(last_seen(&mut host, &connection), host.now, "{ip:?}");
        // The copy that was out of date has not held the place against the new one.
        host.now += 1;
        forwarded(&mut host, &spec);
        assert_ne!(last_seen(&mut host, &connection), host.now, "{ip:?}");
    }
}

/// A flow that the table has no room for was in it for a moment, with one half: a copy that another packet
/// has made of it then is not used.
#[test]
fn no_copy_stays_of_a_flow_that_could_not_be_established() {
    fn copy_all(host: &Host) {
        for (key, flow) in host.v4.snapshot().established {
            cache::keep::<_, V4>(host, &key, &flow, Place::of::<_, V4>(host, &key));
        }
        for (key, flow) in host.v6.snapshot().established {
            cache::keep::<_, V6>(host, &key, &flow, Place::of::<_, V6>(host, &key));
        }
    }
    for ip in Ip::BOTH {
        let mut host = Host::default();
        host.set_cache(64);
        set_up(&mut host, 1);
        (host.v4.capacity, host.v6.capacity) = (1, 1);
        let mut connection = Connection::new(ip, 1, 40_000);
        connection.from_client(&mut host, SYN, b"");
        connection.from_backend(&mut host, SYN | ACK, b"");
        host.meanwhile.set(Some(copy_all));
        connection.from_client(&mut host, ACK, b"");
        assert!(host.meanwhile.take().is_none(), "the table was full");
        host.now += 1;
        connection.from_backend(&mut host, PSH | ACK, b"by the table");
        let tables = host.snapshots();
        let seen = match connection.reply_key() {
            AnyKey::V4(key) => tables.v4.transient[&key].last_seen,
            AnyKey::V6(key) => tables.v6.transient[&key].last_seen,
        };
        assert_eq!(seen, host.now, "{ip:?}");
    }
}

/// Traffic, changes of backends, routes and settings, closes and port reuse in any order.
#[test]
fn random_traffic() {
    for seed in 0..4 {
        let mut twins = Twins::default();
        let mut traffic = Traffic::new(&mut twins, Source::Seed(seed));
        for _ in 0..20 {
            for _ in 0..100 {
                traffic.step(&mut twins);
            }
            twins.compare();
        }
    }
}
