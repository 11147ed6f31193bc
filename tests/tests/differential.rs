//! The kernel's programs take every journey beside the host, and must do the same to every packet.

use pointsman_tests::each_journey;

macro_rules! tests {
    ($($module:ident { $($name:ident),+ })+) => {
        mod xdp {$(pub mod $module {
            use pointsman_tests::kit::journeys;
            use pointsman_tests::kit::kernel::Kernel;
            use pointsman_tests::kit::pair::Pair;
            use pointsman_tests::object_or_skip;

            $(#[test]
            fn $name() {
                let mut pair = Pair::new(Kernel::load(&object_or_skip!()).unwrap());
                journeys::$module::$name(&mut pair);
                pair.compare();
            })+
        })+}

        mod cached {$(pub mod $module {
            use pointsman_tests::kit::host::Hook;
            use pointsman_tests::kit::journeys;
            use pointsman_tests::kit::kernel::{CACHE_SLOTS, Kernel};
            use pointsman_tests::kit::pair::Pair;
            use pointsman_tests::object_or_skip;

            $(#[test]
            fn $name() {
                let kernel = Kernel::load_with_cache(&object_or_skip!(), Hook::Xdp, CACHE_SLOTS).unwrap();
                let mut pair = Pair::new(kernel).with_cache();
                journeys::$module::$name(&mut pair);
                pair.compare();
            })+
        })+}

        mod classifier {$(pub mod $module {
            use pointsman_tests::kit::host::Hook;
            use pointsman_tests::kit::journeys;
            use pointsman_tests::kit::kernel::Kernel;
            use pointsman_tests::kit::pair::Pair;
            use pointsman_tests::object_or_skip;

            $(#[test]
            fn $name() {
                let mut pair = Pair::new(Kernel::load_as(&object_or_skip!(), Hook::Tc).unwrap());
                journeys::$module::$name(&mut pair);
                pair.compare();
            })+
        })+}
    };
}

each_journey!(tests);

/// A super-packet is edited like any other, and stays one.
#[test]
fn super_packets_leave() {
    use pointsman_tests::kit::device::{Action, Device};
    use pointsman_tests::kit::journeys::local::{Local, set_up_local};
    use pointsman_tests::kit::kernel::Kernel;
    use pointsman_tests::kit::packet::flags::{ACK, PSH};
    use pointsman_tests::kit::seen;
    use pointsman_tests::kit::world::Ip;
    use pointsman_tests::object_or_skip;

    let mut kernel = Kernel::load(&object_or_skip!()).unwrap();
    let device: &mut dyn Device = &mut kernel;
    set_up_local(device, 1);
    let mut frames = Vec::new();
    for ip in Ip::BOTH {
        let local = Local::open(device, ip, 1, 40_000);
        frames.push((ip, local.connection().backend_segment(PSH | ACK, &[9; 3_000]).build()));
    }
    for (ip, frame) in frames {
        let (action, bytes) = kernel.leave_as(&frame, Some(1_000));
        assert_eq!(action, Action::Pass);
        let seen = seen::read(&bytes).unwrap();
        assert_eq!((seen.source, seen.payload().len()), (ip.vip(), 3_000));
    }
}

mod random {
    use pointsman_tests::kit::host::Hook;
    use pointsman_tests::kit::kernel::{CACHE_SLOTS, Kernel};
    use pointsman_tests::kit::pair::Pair;
    use pointsman_tests::kit::random::{Source, Traffic};
    use pointsman_tests::object_or_skip;

    fn run(seed: u64) {
        go_on(seed, Pair::new(Kernel::load(&object_or_skip!()).unwrap()));
    }

    fn go_on(seed: u64, mut pair: Pair) {
        pair.compare_every = 50;
        let mut traffic = Traffic::new(&mut pair, Source::Seed(seed));
        for _ in 0..10_000 {
            traffic.step(&mut pair);
        }
        pair.compare();
    }

    /// The programs of TC, by test runs.
    #[test]
    fn classifiers() {
        go_on(6, Pair::new(Kernel::load_as(&object_or_skip!(), Hook::Tc).unwrap()));
    }

    /// The programs of TC on a device, with unfinished checksums, super-packets, tags beside packets.
    fn run_on_a_device(seed: u64) {
        let kernel = Kernel::load_as(&object_or_skip!(), Hook::Tc).unwrap();
        match Pair::on_a_device(kernel, Source::Seed(!seed)) {
            Ok(pair) => go_on(seed, pair),
            Err(error) => println!("SKIP: {error:#}"),
        }
    }

    #[test]
    fn device_1() {
        run_on_a_device(1);
    }

    #[test]
    fn device_2() {
        run_on_a_device(2);
    }

    #[test]
    fn with_flow_cache() {
        let kernel = Kernel::load_with_cache(&object_or_skip!(), Hook::Xdp, CACHE_SLOTS).unwrap();
        go_on(5, Pair::new(kernel).with_cache());
    }

    #[test]
    fn seed_1() {
        run(1);
    }

    #[test]
    fn seed_2() {
        run(2);
    }

    #[test]
    fn seed_3() {
        run(3);
    }

    #[test]
    fn seed_4() {
        run(4);
    }
}
