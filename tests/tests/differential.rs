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
