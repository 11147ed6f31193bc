//! What the verifier found out about each program: how much work it was, how much stack it takes.
//!
//! The number of processed instructions can be asked for since Linux 5.16; older kernels, and all of
//! them for the stack, tell it in the verifier's log alone. aya keeps the log of refused programs
//! only, so programs are loaded here by a system call of our own, over maps that aya has made.

use std::collections::HashSet;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use anyhow::{Context, Result, ensure};
use aya::Ebpf;
use aya::maps::{Map, MapData};
use aya_obj::generated::{bpf_attach_type, bpf_attr, bpf_cmd, bpf_prog_type};
use aya_obj::{Function, Object, ProgramSection};

use super::kernel::loader;

/// The closing statistics, and the reason for a refusal without the way to it (BPF_LOG_STATS,
/// include/linux/bpf_verifier.h).
const STATISTICS: u32 = 4;
/// Bytes, more than enough for that.
const LOG_SIZE: usize = 1 << 16;
/// `BPF_F_ANY_ALIGNMENT`: user-mode Linux asks for aligned access although the processor does not.
const ANY_ALIGNMENT: u32 = 2;
/// How many of a refusal's last lines are kept.
const LAST_LINES: usize = 4;

/// A program as the verifier saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    pub program: String,
    /// The cost, or the kernel's refusal with its last words.
    pub outcome: Result<Cost, String>,
}

/// What the limits of the kernel are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Instructions processed; the limit is 1,000,000.
    pub instructions: u32,
    /// Bytes of stack of the function that takes most; along any chain of calls 512 are allowed.
    pub stack: u32,
}

/// Loads each program of an object by itself, in the order of names, and lets go of it.
///
/// # Errors
/// When the object cannot be read or its maps cannot be made; a refused program is no error.
pub fn verify_all(object: &[u8]) -> Result<Vec<Verified>> {
    let maps = loader().load(object).context("cannot make the maps")?;
    let mut parsed = Object::parse(object).context("cannot read the object")?;
    let btf = load_btf(&mut parsed)?;
    link(&mut parsed, &maps)?;
    let mut names: Vec<_> = parsed.programs.keys().cloned().collect();
    names.sort_unstable();
    let verified = names.into_iter().map(|program| {
        let found = &parsed.programs[&program];
        let function =
            parsed.functions.get(&(found.section_index, found.address)).context("a program without code")?;
        let kind = Kind::of(&found.section);
        let outcome = verify(kind, function, &found.license, btf.as_ref().map(AsFd::as_fd));
        Ok(Verified { program, outcome })
    });
    verified.collect()
}

/// What the kernel has to be told about a program.
#[derive(Clone, Copy)]
struct Kind {
    program: bpf_prog_type,
    /// Where it will be attached, if its rules depend on that; 0 if not.
    attach: u32,
}

impl Kind {
    fn of(section: &ProgramSection) -> Self {
        let (program, attach) = match section {
            ProgramSection::Xdp { .. } => (bpf_prog_type::BPF_PROG_TYPE_XDP, 0),
            ProgramSection::CgroupSockAddr { attach_type } => {
                (bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCK_ADDR, bpf_attach_type::from(*attach_type) as u32)
            }
            _ => (bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS, 0),
        };
        Self { program, attach }
    }
}

/// Puts the numbers of maps and the code of called functions into the programs.
fn link(object: &mut Object, maps: &Ebpf) -> Result<()> {
    let wanted = object.maps.clone();
    let numbers: Vec<(&str, RawFd, &aya_obj::Map)> = wanted
        .iter()
        .map(|(name, map)| {
            let made = maps.map(name).with_context(|| format!("the map {name} was not made"))?;
            Ok((name.as_str(), data(made)?.fd().as_fd().as_raw_fd(), map))
        })
        .collect::<Result<_>>()?;
    let code: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
    object.relocate_maps(numbers.into_iter(), &code)?;
    object.relocate_calls(&code)?;
    object.sanitize_functions(aya::features());
    Ok(())
}

fn data(map: &Map) -> Result<&MapData> {
    match map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LruHashMap(data)
        | Map::LpmTrie(data)
        | Map::PerCpuArray(data)
        | Map::DevMapHash(data)
        | Map::ProgramArray(data) => Ok(data),
        other => anyhow::bail!("a map of an unexpected type: {other:?}"),
    }
}

/// The object's types, as far as the kernel knows such: with them, global functions are verified once
/// and not at every call.
fn load_btf(object: &mut Object) -> Result<Option<OwnedFd>> {
    let Some(features) = aya::features().btf() else { return Ok(None) };
    let Some(btf) = object.fixup_and_sanitize_btf(features)? else { return Ok(None) };
    let bytes = btf.to_bytes();
    let mut attributes = zeroed();
    #[expect(unsafe_code, reason = "fields of a C union")]
    // SAFETY: all members of the union are plain numbers.
    let fields = unsafe { &mut attributes.__bindgen_anon_7 };
    fields.btf = bytes.as_ptr() as u64;
    fields.btf_size = bytes.len() as u32;
    bpf(bpf_cmd::BPF_BTF_LOAD, &attributes).map(Some).context("the kernel refuses the object's types")
}

fn verify(
    kind: Kind,
    function: &Function,
    license: &CStr,
    btf: Option<BorrowedFd<'_>>,
) -> Result<Cost, String> {
    let mut log = Vec::new();
    match load(kind, function, license, btf, &mut log) {
        Ok(()) => statistics(&text(&log)).map_err(|error| format!("{error:#}")),
        Err(error) => Err(format!("{error}\n{}", last_lines(&text(&log)))),
    }
}

fn load(
    kind: Kind,
    function: &Function,
    license: &CStr,
    btf: Option<BorrowedFd<'_>>,
    log: &mut Vec<u8>,
) -> io::Result<()> {
    log.clear();
    log.resize(LOG_SIZE, 0);
    let functions = function.func_info.func_info_bytes();
    let mut attributes = zeroed();
    #[expect(unsafe_code, reason = "fields of a C union")]
    // SAFETY: all members of the union are plain numbers.
    let fields = unsafe { &mut attributes.__bindgen_anon_3 };
    fields.prog_type = kind.program as u32;
    fields.expected_attach_type = kind.attach;
    fields.insns = function.instructions.as_ptr() as u64;
    fields.insn_cnt = function.instructions.len() as u32;
    fields.prog_flags = ANY_ALIGNMENT;
    fields.license = license.as_ptr() as u64;
    fields.log_level = STATISTICS;
    fields.log_buf = log.as_mut_ptr() as u64;
    fields.log_size = log.len() as u32;
    if let Some(btf) = btf.filter(|_| function.func_info_rec_size > 0) {
        fields.prog_btf_fd = btf.as_raw_fd() as u32;
        fields.func_info = functions.as_ptr() as u64;
        fields.func_info_cnt = function.func_info.len() as u32;
        fields.func_info_rec_size = function.func_info_rec_size as u32;
    }
    bpf(bpf_cmd::BPF_PROG_LOAD, &attributes).map(drop)
}

fn zeroed() -> bpf_attr {
    #[expect(unsafe_code, reason = "a C union")]
    // SAFETY: a union of plain numbers, for which the kernel wants zeros in what is not used.
    unsafe {
        std::mem::zeroed()
    }
}

/// A bpf(2) that gives a file descriptor.
fn bpf(command: bpf_cmd, attributes: &bpf_attr) -> io::Result<OwnedFd> {
    #[expect(unsafe_code, reason = "a system call without a wrapper in libc")]
    // SAFETY: the attributes and what they point to live through the call; both commands give a
    // descriptor of our own.
    unsafe {
        let result =
            libc::syscall(libc::SYS_bpf, command as u32, &raw const *attributes, size_of::<bpf_attr>());
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(result as RawFd)) }
    }
}

fn text(log: &[u8]) -> String {
    let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
    String::from_utf8_lossy(&log[..end]).into_owned()
}

fn last_lines(log: &str) -> String {
    let is_reason = |line: &&str| {
        !["processed ", "stack depth ", "verification time "].iter().any(|start| line.starts_with(start))
    };
    let lines: Vec<_> = log.lines().filter(is_reason).collect();
    lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
}

/// Reads the log's closing statistics (`print_verification_stats` in kernel/bpf/verifier.c).
fn statistics(log: &str) -> Result<Cost> {
    let after = |start: &str| log.lines().find_map(|line| line.trim().strip_prefix(start));
    let processed = after("processed ").with_context(|| format!("no statistics in the log: {log}"))?;
    let instructions = processed.split(' ').next().unwrap_or_default().parse()?;
    let depths = after("stack depth ").with_context(|| format!("no stack depth in the log: {log}"))?;
    // A number for each function, joined by `+`; since Linux 6.13 ` max N` follows.
    let depths = depths.split(' ').next().unwrap_or_default();
    let depths = depths.split('+').map(str::parse).collect::<Result<Vec<u32>, _>>()?;
    let stack = depths.into_iter().max().unwrap_or(0);
    ensure!(instructions > 0, "no instruction was processed: {log}");
    Ok(Cost { instructions, stack })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "verification time 1480 usec\nstack depth 88+0+312\n\
        processed 2426 insns (limit 1000000) max_states_per_insn 4 total_states 62 peak_states 62 mark_read 8\n";

    #[test]
    fn the_log_tells_instructions_and_the_deepest_stack() {
        assert_eq!(statistics(LOG).unwrap(), Cost { instructions: 2426, stack: 312 });
        let newer = LOG.replace("88+0+312", "88+0+312 max 400");
        assert_eq!(statistics(&newer).unwrap(), Cost { instructions: 2426, stack: 312 });
    }

    #[test]
    fn a_log_without_statistics_is_an_error() {
        assert!(statistics("").is_err());
        assert!(statistics("processed 12 insns (limit 1000000)\n").is_err());
    }

    #[test]
    fn a_refusal_is_explained_by_the_last_lines() {
        let log = (0..20).map(|n| format!("{n}: r0 = 0\n")).collect::<String>()
            + "invalid access\nstack depth 8\nprocessed 7 insns\n";
        let last = last_lines(&log);
        assert!(last.ends_with("19: r0 = 0\ninvalid access"), "{last}");
        assert_eq!(last.lines().count(), LAST_LINES);
    }
}
