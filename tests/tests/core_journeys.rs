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
