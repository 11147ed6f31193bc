//! Every program passes the kernel's verifier, within the budget of `tests/verifier_budget.txt`.

use std::collections::BTreeMap;

use aya::programs::{CgroupSockAddr, SchedClassifier, Xdp};
use lb_common::abi::maps::{
    CALLED_PROGRAMS, COOKIE_PROGRAMS, EGRESS_PROGRAM, ENTRY_PROGRAM, INGRESS_PROGRAM, SOCKET_PROGRAMS,
    TC_CALLED_PROGRAMS, TC_COOKIE_PROGRAMS,
};
use pointsman_tests::kit::kernel::loader;
use pointsman_tests::object_or_skip;

/// Lines of a program's name and how many instructions the verifier may process for it.
const BUDGET: &str = include_str!("../verifier_budget.txt");

fn budget() -> BTreeMap<&'static str, u32> {
    BUDGET
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .map(|line| {
            let (name, limit) = line.split_once(' ').expect("a name and a number");
            (name, limit.trim().parse().expect("a number"))
        })
        .collect()
}

#[test]
fn programs_stay_within_their_budget() {
    let budget = budget();
    let mut ebpf = loader().load(&object_or_skip!()).unwrap();
    let mut over = Vec::new();
    let mut check = |name: &str, processed: Option<u32>| {
        let processed = processed.expect("Linux 5.16 tells");
        let limit = budget.get(name).unwrap_or_else(|| panic!("{name} has no budget"));
        println!("{name}: {processed} of {limit}");
        if processed > *limit {
            over.push(format!("{name}: {processed} instructions, {limit} are allowed"));
        }
    };
    for name in CALLED_PROGRAMS.into_iter().chain(COOKIE_PROGRAMS).chain([ENTRY_PROGRAM]) {
        let program: &mut Xdp = ebpf.program_mut(name).unwrap().try_into().unwrap();
        program.load().unwrap_or_else(|error| panic!("the kernel rejects {name}: {error}"));
        check(name, program.info().unwrap().verified_instruction_count());
    }
    for name in
        TC_CALLED_PROGRAMS.into_iter().chain(TC_COOKIE_PROGRAMS).chain([INGRESS_PROGRAM, EGRESS_PROGRAM])
    {
        let program: &mut SchedClassifier = ebpf.program_mut(name).unwrap().try_into().unwrap();
        program.load().unwrap_or_else(|error| panic!("the kernel rejects {name}: {error}"));
        check(name, program.info().unwrap().verified_instruction_count());
    }
    for name in SOCKET_PROGRAMS.into_iter().flat_map(|program| program.variants()) {
        let program: &mut CgroupSockAddr = ebpf.program_mut(name).unwrap().try_into().unwrap();
        program.load().unwrap_or_else(|error| panic!("the kernel rejects {name}: {error}"));
        check(name, program.info().unwrap().verified_instruction_count());
    }
    assert!(over.is_empty(), "{over:?}; make the program simpler or, with a reason, raise the budget");
}
