//! The second object: harness, generator, sink and baselines.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{Array, HashMap, MapData, PerCpuArray, ProgramArray};
use aya::programs::{Program, ProgramFd, TestRun, TestRunAttrs, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
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

/// Loads all programs of an object.
///
/// # Errors
/// When the verifier rejects one.
pub fn load(path: &Path, sizes: &[(&str, u32)]) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    for (map, entries) in sizes {
        loader.map_max_entries(map, *entries);
    }
    load_by(&mut loader, path)
}

/// Loads all programs of an object by a loader that was set up for it.
///
/// # Errors
/// When the verifier rejects one.
pub fn load_by(loader: &mut EbpfLoader<'_>, path: &Path) -> Result<Ebpf> {
    let mut ebpf = loader.load_file(path).with_context(|| format!("loading {}", path.display()))?;
    for (name, program) in ebpf.programs_mut() {
        match program {
            Program::Xdp(program) => program.load(),
            Program::SchedClassifier(program) => program.load(),
            _ => bail!("the program {name} is of a kind that is not measured"),
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

/// A handle to a program of an object, to be called by the harness.
///
/// # Errors
/// When it has none of that name.
pub fn handle(ebpf: &mut Ebpf, name: &str) -> Result<ProgramFd> {
    Ok(program(ebpf, name)?.fd()?.try_clone()?)
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
    kind: Kind,
    words: [u64; WORDS],
}

/// What a run came to.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// CPU time per packet.
    pub ns: f64,
    /// XDP action of the last packet.
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
        let mut vips: HashMap<_, VipKey<[u8; 4]>, u32> = take("bare_vips")?.try_into()?;
        vips.insert(VipKey::new(vip, port.to_be_bytes(), 6), 1, 0)?;
        let mut backends: Array<_, [u8; 8]> = take("bare_backends")?.try_into()?;
        for index in 1..=BARE_BACKENDS {
            backends.set(index, [10, 0, 1, index as u8, 0x1f, 0x90, 0, 0], 0)?;
        }
        let kind = Kind { is_ipv6: false, is_udp: false };
        Ok(Self { ebpf, setup, records, target, kind, words: [0; WORDS] })
    }

    /// A handle to one of its programs.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn handle(&mut self, name: &str) -> Result<ProgramFd> {
        handle(&mut self.ebpf, name)
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
    pub fn run(&mut self, target: &ProgramFd, flows: usize, packets: u32) -> Result<Run> {
        self.rewind(flows)?;
        self.target.set(0, target, 0)?;
        let name = if self.kind.is_ipv6 { "harness_v6" } else { "harness_v4" };
        let harness = program(&mut self.ebpf, name)?;
        let data = [0; LENGTH];
        let options = TestRunOptions { data_in: Some(&data), repeat: packets, ..TestRunOptions::new() };
        let before = thread_time_ns()?;
        let result = harness.test_run(options)?;
        let spent = thread_time_ns()? - before;
        Ok(Run { ns: spent as f64 / f64::from(packets), action: result.return_value })
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
