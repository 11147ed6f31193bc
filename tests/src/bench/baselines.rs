//! The second object: harness, generator, sink and baselines.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{Array, HashMap, MapData, PerCpuArray, ProgramArray};
use aya::programs::{Program, ProgramFd, SchedClassifier, TestRun, TestRunAttrs, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader, TestRunResult};
use lb_common::abi::VipKey;

use super::machine::thread_time_ns;
use super::packets::{FLOWS, Kind, LENGTH, Segment, Tuple, packet, record};

/// Where `cargo xtask build-ebpf` leaves an object, unless the environment says otherwise.
///
/// # Errors
/// When it is not there.
pub fn object(name: &str, variable: &str) -> Result<PathBuf> {
    let built =
        || Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/ebpf")).join(format!("{name}.o"));
    let path = std::env::var_os(variable).map_or_else(built, PathBuf::from);
    ensure!(
        path.is_file(),
        "there is no {}: run `cargo xtask build-ebpf`, or name the object in {variable}",
        path.display()
    );
    Ok(path)
}

/// Loads all programs of an object that are for packets.
///
/// # Errors
/// When the verifier rejects one.
pub fn load(path: &Path, sizes: &[(&str, u32)]) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    for (map, entries) in sizes {
        loader.map_max_entries(map, *entries);
    }
    load_by(&mut loader, path, &[Hook::Xdp, Hook::Tc])
}

/// Loads the programs of an object for `hooks` by a loader that was set up for it.
///
/// # Errors
/// When the verifier rejects one.
pub fn load_by(loader: &mut EbpfLoader<'_>, path: &Path, hooks: &[Hook]) -> Result<Ebpf> {
    let mut ebpf = loader.load_file(path).with_context(|| format!("loading {}", path.display()))?;
    for (name, program) in ebpf.programs_mut() {
        match program {
            Program::Xdp(program) if hooks.contains(&Hook::Xdp) => program.load(),
            Program::SchedClassifier(program) if hooks.contains(&Hook::Tc) => program.load(),
            _ => continue,
        }
        .with_context(|| format!("loading the program {name}"))?;
    }
    Ok(ebpf)
}

/// A program of an object.
///
/// # Errors
/// When it has none of that name.
pub fn program<'e>(ebpf: &'e mut Ebpf, name: &str) -> Result<&'e mut Xdp> {
    let program = ebpf.program_mut(name).with_context(|| format!("the object lacks the program {name}"))?;
    Ok(program.try_into()?)
}

/// A classifier of an object.
///
/// # Errors
/// When it has none of that name.
pub fn classifier<'e>(ebpf: &'e mut Ebpf, name: &str) -> Result<&'e mut SchedClassifier> {
    let program = ebpf.program_mut(name).with_context(|| format!("the object lacks the program {name}"))?;
    Ok(program.try_into()?)
}

/// Where a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Frames come in.
    Xdp,
    /// Packets come in, or leave.
    Tc,
}

/// A handle to a program, to be called by the harness.
#[derive(Debug)]
pub struct Target {
    fd: ProgramFd,
    /// Which harness can call it.
    pub hook: Hook,
}

impl Target {
    /// Another handle to the same program.
    ///
    /// # Errors
    /// When there are no file descriptors left.
    pub fn try_clone(&self) -> Result<Self> {
        Ok(Self { fd: self.fd.try_clone()?, hook: self.hook })
    }

    /// What program arrays take.
    #[must_use]
    pub fn fd(&self) -> &ProgramFd {
        &self.fd
    }
}

/// A handle to a program of an object, to be called by the harness.
///
/// # Errors
/// When it has none of that name, or one that is not for packets.
pub fn handle(ebpf: &mut Ebpf, name: &str) -> Result<Target> {
    let program = ebpf.program(name).with_context(|| format!("the object lacks the program {name}"))?;
    let hook = match program {
        Program::Xdp(_) => Hook::Xdp,
        Program::SchedClassifier(_) => Hook::Tc,
        _ => bail!("the program {name} is not for packets"),
    };
    Ok(Target { fd: program.fd()?.try_clone()?, hook })
}

/// Words of the setup after the template.
const MASK: usize = LENGTH / 8;
const UDP: usize = MASK + 2;
const DEVICE: usize = MASK + 3;
const WORDS: usize = MASK + 4;

/// The loaded object.
pub struct Bench {
    ebpf: Ebpf,
    setup: Array<MapData, [u64; WORDS]>,
    records: Array<MapData, [u64; 2]>,
    target: ProgramArray<MapData>,
    tc_target: ProgramArray<MapData>,
    template: [u8; LENGTH],
    kind: Kind,
    words: [u64; WORDS],
}

/// What a run came to.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// CPU time per packet.
    pub ns: f64,
    /// XDP or TC action of the last packet.
    pub action: u32,
}

/// Backends of the bare NAT: as many as the product has.
const BARE_BACKENDS: u32 = 3;

impl Bench {
    /// Loads it; `flows` is the size of the bare NAT's tables.
    ///
    /// # Errors
    /// When the object is missing or rejected.
    pub fn load(vip: [u8; 4], port: u16, flows: u32) -> Result<Self> {
        let path = object("pointsman-bench-ebpf", "POINTSMAN_BENCH_EBPF_OBJECT")?;
        let mut ebpf = load(&path, &[("bare_flows", flows), ("bare_own_flows", flows)])?;
        let mut take = |name: &str| ebpf.take_map(name).with_context(|| format!("the object lacks {name}"));
        let setup = take("bench_setup")?.try_into()?;
        let records = take("bench_records")?.try_into()?;
        let target = take("bench_target")?.try_into()?;
        let tc_target = take("bench_tc_target")?.try_into()?;
        let mut vips: HashMap<_, VipKey<[u8; 4]>, u32> = take("bare_vips")?.try_into()?;
        vips.insert(VipKey::new(vip, port.to_be_bytes(), 6), 1, 0)?;
        let mut backends: Array<_, [u8; 8]> = take("bare_backends")?.try_into()?;
        for index in 1..=BARE_BACKENDS {
            backends.set(index, [10, 0, 1, index as u8, 0x1f, 0x90, 0, 0], 0)?;
        }
        let kind = Kind { is_ipv6: false, is_udp: false };
        let template = [0; LENGTH];
        Ok(Self { ebpf, setup, records, target, tc_target, template, kind, words: [0; WORDS] })
    }

    /// A handle to one of its programs.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn handle(&mut self, name: &str) -> Result<Target> {
        handle(&mut self.ebpf, name)
    }

    /// The program that does nothing at a hook: what the harness itself costs.
    ///
    /// # Errors
    /// When the object lacks it.
    pub fn nothing(&mut self, hook: Hook) -> Result<Target> {
        self.handle(if hook == Hook::Tc { "tc_nothing" } else { "nothing" })
    }

    /// One of its programs.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn program(&mut self, name: &str) -> Result<&mut Xdp> {
        program(&mut self.ebpf, name)
    }

    /// Packets that the sink has counted, on all CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn sunk(&self) -> Result<u64> {
        let map = self.ebpf.map("bench_sunk").context("the object lacks bench_sunk")?;
        let sunk: PerCpuArray<_, u64> = map.try_into()?;
        Ok(sunk.get(&0, 0)?.iter().sum())
    }

    /// Sets the packets of the next runs: a segment of each tuple, in their order.
    ///
    /// # Errors
    /// When there are too many, or the maps cannot be written.
    pub fn aim(
        &mut self,
        kind: Kind,
        segment: Segment,
        tuples: &[Tuple],
        macs: ([u8; 6], [u8; 6]),
        device: u32,
    ) -> Result<()> {
        ensure!(tuples.len() <= FLOWS, "{} flows are more than {FLOWS}", tuples.len());
        let template = packet(kind, segment, &tuples[0], macs);
        for (word, bytes) in self.words.iter_mut().zip(template.chunks_exact(8)) {
            *word = u64::from_ne_bytes(std::array::from_fn(|index| bytes[index]));
        }
        self.words[UDP] = kind.is_udp.into();
        self.words[DEVICE] = device.into();
        self.kind = kind;
        self.template = template;
        for (index, tuple) in (0..).zip(tuples) {
            self.records.set(index, record(kind, segment, tuple), 0)?;
        }
        Ok(())
    }

    /// Starts over with the first of `flows` packets.
    fn rewind(&mut self, flows: usize) -> Result<()> {
        ensure!(flows.is_power_of_two(), "{flows} is not a power of two");
        self.words[MASK] = flows as u64 - 1;
        Ok(self.setup.set(0, self.words, 0)?)
    }

    /// Runs a program on `packets` packets, cycled over the first `flows` of those aimed at.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn run(&mut self, target: &Target, flows: usize, packets: u32) -> Result<Run> {
        self.rewind(flows)?;
        match (target.hook, self.kind.is_ipv6) {
            (Hook::Xdp, is_ipv6) => {
                self.target.set(0, &target.fd, 0)?;
                let name = if is_ipv6 { "harness_v6" } else { "harness_v4" };
                timed(program(&mut self.ebpf, name)?, &[0; LENGTH], packets)
            }
            (Hook::Tc, false) => {
                self.tc_target.set(0, &target.fd, 0)?;
                // The kernel looks at it when it makes the packet.
                let template = self.template;
                timed(classifier(&mut self.ebpf, "tc_harness_v4")?, &template, packets)
            }
            (Hook::Tc, true) => bail!("there is no harness for IPv6 in TC"),
        }
    }

    /// Sends live frames by the device aimed at. Gives the CPU time that it took in nanoseconds.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn generate(&mut self, flows: usize, packets: u32) -> Result<u64> {
        self.rewind(flows)?;
        let generator = program(&mut self.ebpf, "generate")?;
        let data = [0; LENGTH];
        let attrs = TestRunAttrs::new().xdp_live_frames(64);
        let options =
            TestRunOptions { data_in: Some(&data), repeat: packets, attrs, ..TestRunOptions::new() };
        let before = thread_time_ns()?;
        generator.test_run(options)?;
        Ok(thread_time_ns()? - before)
    }
}

fn timed<P>(harness: &P, data: &[u8; LENGTH], packets: u32) -> Result<Run>
where
    P: for<'o> TestRun<Opts<'o> = TestRunOptions<'o>, Result = TestRunResult>,
{
    let options = TestRunOptions { data_in: Some(data), repeat: packets, ..TestRunOptions::new() };
    let before = thread_time_ns()?;
    let result = harness.test_run(options)?;
    let spent = thread_time_ns()? - before;
    Ok(Run { ns: spent as f64 / f64::from(packets), action: result.return_value })
}
