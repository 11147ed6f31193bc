//! The kernel's programs take every journey beside the host, and must do the same to every packet.

use pointsman_tests::each_journey;

macro_rules! tests {
    ($($module:ident { $($name:ident),+ })+) => {
        $(mod $module {
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
        })+
    };
}

each_journey!(tests);

mod random {
    use pointsman_tests::kit::kernel::Kernel;
    use pointsman_tests::kit::pair::Pair;
    use pointsman_tests::kit::random::{Source, Traffic};
    use pointsman_tests::object_or_skip;

    fn run(seed: u64) {
        let mut pair = Pair::new(Kernel::load(&object_or_skip!()).unwrap());
        pair.compare_every = 50;
        let mut traffic = Traffic::new(&mut pair, Source::Seed(seed));
        for _ in 0..10_000 {
            traffic.step(&mut pair);
        }
        pair.compare();
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
