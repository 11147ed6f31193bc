//! The egress program on kernels without links for TC: as a filter.

use std::{fs, io, path::Path};

use anyhow::{Context, Result};
use aya::{EbpfLoader, programs::SchedClassifier};
use lb_common::abi::maps::EGRESS_PROGRAM;
use lb_control::{
    dataplane::{Classifiers, Direction, PinDirectory},
    net::{Filter, Kernel},
};
use pointsman_tests::{
    kit::kernel::{loader, object},
    lab::{Lab, Options, is_root},
};

fn loaded(object: &[u8]) -> Result<aya::Ebpf> {
    let mut loader: EbpfLoader<'_> = loader();
    let mut ebpf = loader.load(object)?;
    let program: &mut SchedClassifier = ebpf.program_mut(EGRESS_PROGRAM).context("no program")?.try_into()?;
    program.load()?;
    Ok(ebpf)
}

fn filters(lab: &Lab) -> Result<Vec<String>> {
    let text = lab.edge.run(["tc", "filter", "show", "dev", "uplink", "egress"])?;
    Ok(text.lines().filter(|line| line.contains("pointsman_tc")).map(str::to_owned).collect())
}

fn uplink(lab: &Lab) -> Result<u32> {
    let text = lab.edge.run(["cat", "/proc/net/dev_snmp6/uplink"])?;
    let line = text.lines().find_map(|line| line.strip_prefix("ifIndex")).context("no index")?;
    Ok(line.trim().parse()?)
}

/// The number of the program in a line of `tc`.
fn program_id(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace().skip_while(|word| *word != "id");
    words.nth(1)
}

/// What the kernel lists on the device, as the agent sees it.
fn listed(lab: &Lab, index: u32) -> Result<Vec<Filter>> {
    lab.edge.enter(|| -> Result<_> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async { Kernel::connect()?.filters(index, true).await })
    })?
}

/// A filter of ours without the sign is replaced; one of another program is not taken for it.
fn replace_unsigned(lab: &Lab, pins: &PinDirectory, object: &[u8], index: u32) -> Result<()> {
    let mut ebpf = lab.edge.enter(|| loaded(object))??;
    let program: &mut SchedClassifier = ebpf.program_mut(EGRESS_PROGRAM).context("no program")?.try_into()?;
    let mut exits = Classifiers::by_filters(pins.clone(), Direction::Egress);
    let listed = listed(lab, index)?;
    let with_name = |name: &str| {
        let all = listed.iter().map(|filter| (filter.priority, filter.handle, name.to_owned()));
        all.collect::<Vec<_>>()
    };
    exits.find_unsigned(index, with_name("other"));
    assert!(lab.edge.enter(|| exits.attach(program, index, "uplink"))?.is_err());
    exits.find_unsigned(index, with_name(&listed[0].name));
    lab.edge.enter(|| exits.attach(program, index, "uplink"))??;
    exits.keep_only(&[index])
}

/// The filter is missed, and attached anew, also if its queueing discipline is gone with it.
fn somebody_takes_it_away(lab: &Lab, pins: &PinDirectory, object: &[u8], index: u32) -> Result<()> {
    let mut ebpf = lab.edge.enter(|| loaded(object))??;
    let program: &mut SchedClassifier = ebpf.program_mut(EGRESS_PROGRAM).context("no program")?.try_into()?;
    let mut exits = Classifiers::by_filters(pins.clone(), Direction::Egress);
    lab.edge.enter(|| exits.attach(program, index, "uplink"))??;
    let compare = |exits: &mut Classifiers| -> Result<()> {
        let listed = listed(lab, index)?;
        exits.forget_missing(index, listed.into_iter().map(|filter| (filter.priority, filter.handle)));
        Ok(())
    };
    compare(&mut exits)?;
    assert_eq!(exits.attached().count(), 1, "it is there");
    for line in ["filter del dev uplink egress", "qdisc del dev uplink clsact"] {
        lab.edge.run(["tc"].into_iter().chain(line.split(' ')))?;
        compare(&mut exits)?;
        assert_eq!(exits.attached().count(), 0, "{line}");
        lab.edge.enter(|| exits.attach(program, index, "uplink"))??;
        assert_eq!(filters(lab)?.len(), 1, "{line}");
        compare(&mut exits)?;
        assert_eq!(exits.attached().count(), 1, "{line}");
    }
    Ok(())
}

/// What a program can be attached to.
struct Bench {
    object: Vec<u8>,
    lab: Lab,
    pins: PinDirectory,
    /// Of the edge's device towards clients.
    index: u32,
}

impl Bench {
    /// Nothing without root or the programs; the reason is printed.
    fn new() -> Result<Option<Self>> {
        if !is_root() {
            return Ok(None);
        }
        let Ok(object) = object() else {
            println!("SKIP: the kernel programs are not built");
            return Ok(None);
        };
        let lab = Lab::new(Options { backends: 0, ..Options::default() })?;
        let pins = PinDirectory::new(&lab.pin_directory());
        pins.prepare()?;
        let index = uplink(&lab)?;
        Ok(Some(Self { object, lab, pins, index }))
    }
}

/// Attached, adopted and replaced in place by the next agent, and taken off, the pins with it.
#[test]
fn filters_are_adopted_and_replaced() -> Result<()> {
    let Some(Bench { object, lab, pins, index }) = Bench::new()? else { return Ok(()) };
    let attach = |pins: &PinDirectory| -> Result<()> {
        let mut ebpf = loaded(&object)?;
        let program: &mut SchedClassifier =
            ebpf.program_mut(EGRESS_PROGRAM).context("no program")?.try_into()?;
        let mut exits = Classifiers::by_filters(pins.clone(), Direction::Egress);
        exits.attach(program, index, "uplink")?;
        exits.attach(program, index, "uplink")?;
        exits.keep_only(&[index])?;
        assert_eq!(exits.attached().collect::<Vec<_>>(), [(index, "uplink")]);
        Ok(())
    };
    lab.edge.enter(|| attach(&pins))??;
    // The loader is gone, and so is the agent; the filter is not.
    let first = filters(&lab)?;
    lab.edge.enter(|| attach(&pins))??;
    let second = filters(&lab)?;
    assert_eq!((first.len(), second.len()), (1, 1), "{first:?} {second:?}");
    assert_ne!(program_id(&first[0]), program_id(&second[0]), "the program is the next agent's");
    // An agent that is killed between the filter and its sign leaves no sign.
    fs::remove_file(pins.links().join(format!("{index}-clsact")))?;
    assert!(lab.edge.enter(|| attach(&pins))?.is_err(), "it may be somebody else's");
    replace_unsigned(&lab, &pins, &object, index)?;
    let third = filters(&lab)?;
    assert_eq!(third.len(), 1, "{third:?}");
    assert_ne!(program_id(&second[0]), program_id(&third[0]), "the program is the next agent's");
    somebody_takes_it_away(&lab, &pins, &object, index)?;
    let mut next = Classifiers::by_filters(pins.clone(), Direction::Egress);
    lab.edge.enter(|| next.keep_only(&[]))??;
    assert_eq!(filters(&lab)?, Vec::<String>::new());
    let left: Vec<_> = fs::read_dir(pins.links())?.collect();
    assert!(left.is_empty(), "{left:?}");
    // An agent on a newer kernel takes off what an older way has left.
    lab.edge.enter(|| attach(&pins))??;
    lab.edge.enter(|| Classifiers::new(pins.clone(), Direction::Egress).keep_only(&[index]))??;
    assert_eq!(filters(&lab)?, Vec::<String>::new());
    pins.remove()?;
    assert!(!Path::new(&lab.pin_directory()).exists());
    Ok(())
}

/// From here on, the kernel answers this thread as one without links does (bpf(2), `BPF_LINK_CREATE`).
fn refuse_links() -> Result<()> {
    const LINK_CREATE: u32 = 28;
    let instruction = |code: u32, yes, no, value| libc::sock_filter {
        code: u16::try_from(code).unwrap_or_default(),
        jt: yes,
        jf: no,
        k: value,
    };
    // struct seccomp_data: the number of the call, then the architecture, the instruction, six arguments.
    let load = |offset| instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    let is = |value, otherwise| instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, otherwise, value);
    let end = |value| instruction(libc::BPF_RET | libc::BPF_K, 0, 0, value);
    let mut program = [
        load(0),
        is(u32::try_from(libc::SYS_bpf)?, 3),
        load(16),
        is(LINK_CREATE, 1),
        end(libc::SECCOMP_RET_ERRNO | libc::EINVAL.cast_unsigned()),
        end(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: u16::try_from(program.len())?, filter: program.as_mut_ptr() };
    // SAFETY: the program lives until the call returns, and the kernel copies it.
    #[expect(unsafe_code, reason = "nix has no seccomp")]
    let refused = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) != 0
    };
    if refused { Err(io::Error::last_os_error().into()) } else { Ok(()) }
}

/// A filter takes its place, on this device; where there are links, another agent has one again.
#[test]
fn a_link_that_is_refused_is_a_filter() -> Result<()> {
    let Some(Bench { object, lab, pins, index }) = Bench::new()? else { return Ok(()) };
    let attach = || -> Result<bool> {
        let mut ebpf = loaded(&object)?;
        let program: &mut SchedClassifier =
            ebpf.program_mut(EGRESS_PROGRAM).context("no program")?.try_into()?;
        let mut exits = Classifiers::new(pins.clone(), Direction::Egress);
        exits.attach(program, index, "uplink")?;
        exits.attach(program, index, "uplink")?;
        exits.keep_only(&[index])?;
        Ok(exits.uses_filters())
    };
    let has_links = lab.edge.enter(|| attach().map(|uses_filters| !uses_filters))??;
    lab.edge.enter(|| Classifiers::new(pins.clone(), Direction::Egress).keep_only(&[]))??;
    let refused = lab.edge.enter(|| refuse_links().and_then(|()| attach()))??;
    assert!(refused);
    assert_eq!(filters(&lab)?.len(), 1);
    lab.edge.enter(attach)??;
    assert_eq!(filters(&lab)?.len(), usize::from(!has_links));
    lab.edge.enter(|| Classifiers::new(pins.clone(), Direction::Egress).keep_only(&[]))??;
    assert_eq!(filters(&lab)?, Vec::<String>::new());
    pins.remove()?;
    Ok(())
}
