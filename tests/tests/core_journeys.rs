//! The forwarding core on the host takes every journey.

use pointsman_tests::each_journey;

macro_rules! tests {
    ($($module:ident { $($name:ident),+ })+) => {
        $(mod $module {
            use pointsman_tests::kit::host::Host;
            use pointsman_tests::kit::journeys;

            $(#[test]
            fn $name() {
                journeys::$module::$name(&mut Host::default());
            })+
        })+
    };
}

each_journey!(tests);

/// When the table of established flows is full, a connection stays where others begin: it works, and
/// moves as soon as there is room.
#[test]
fn a_full_table_takes_nobody_until_there_is_room() {
    use lb_common::abi::FlowState;
    use pointsman_tests::kit::host::Host;
    use pointsman_tests::kit::journeys::connection::{Connection, states};
    use pointsman_tests::kit::world::{Ip, set_up};

    let mut host = Host::default();
    set_up(&mut host, 3);
    (host.v4.capacity, host.v6.capacity) = (5, 5);
    for ip in Ip::BOTH {
        let place = |host: &mut Host, connection: &Connection| states(host, connection);
        let stays = [Some((FlowState::Established as u8, true)); 2];
        let waits = [Some((FlowState::Established as u8, false)); 2];
        let [mut first, second, mut third] =
            [1, 2, 3].map(|client| Connection::open(&mut host, ip, client, 40_000));
        assert_eq!([&first, &second].map(|connection| place(&mut host, connection)), [stays; 2]);
        third.talk(&mut host);
        assert_eq!(place(&mut host, &third), waits, "both halves, or neither");
        first.close(&mut host);
        third.talk(&mut host);
        assert_eq!([&second, &third].map(|connection| place(&mut host, connection)), [stays; 2]);
    }
}
