//! What works on this kernel, found by trying: the programs themselves, over maps of their own that
//! are empty and pinned nowhere. With them, every packet passes untouched.

use std::path::Path;
use std::thread;

use anyhow::{Context, Result, anyhow};
use aya::Btf;
use aya::programs::tc::{NlOptions, SchedClassifier, TcAttachOptions, TcAttachType, qdisc_add_clsact};
use aya::programs::xdp::XdpMode;
use aya::programs::{LinkOrder, loaded_programs};
use lb_common::abi::maps::SOCKET_PROGRAMS;
use nix::sched::{CloneFlags, unshare};
use rtnetlink::{LinkVeth, new_connection};

use super::pins::is_bpf_fs;
use super::{Cgroup, Kernel, Sizes};
use crate::plan::doctor::{Ability, BpfFs, Outcome, Program, Trial};

/// Small: nothing is ever put in.
const SIZES: Sizes = Sizes { flows: 1_024, services: 64, backends: 64, source_ranges: 64, flow_cache: 64 };

/// One end of the pair of devices that attaching is tried on.
const OWN_DEVICE: &str = "trial";

/// A device of the node's on which attaching is to be tried, too.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Its index.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// Why nothing is tried there after all.
    pub spared: Option<String>,
}

/// Tries everything: first what needs no device of the node's, then some of those. Nothing stays.
#[must_use]
pub fn run(subjects: &[Subject]) -> Vec<Trial> {
    let mut trials = Vec::new();
    let mut kernel = match Kernel::unpinned(&SIZES) {
        Ok(kernel) => kernel,
        Err(error) => {
            trials.push(trial(Ability::Maps, "", Err(error)));
            return trials;
        }
    };
    trials.push(trial(Ability::Maps, "", Ok(())));
    let xdp = kernel.load_programs();
    let has_xdp = xdp.is_ok();
    trials.push(trial(Ability::XdpPrograms, "", xdp));
    let tc = kernel.ingress_program().map(drop);
    let has_tc = tc.is_ok();
    trials.push(trial(Ability::TcPrograms, "", tc));
    let cookies = kernel.load_cookies();
    // Agents do without those of TC.
    let cookies = cookies.and_then(|()| if has_tc { kernel.load_tc_cookies() } else { Ok(()) });
    trials.push(trial(Ability::CookiePrograms, "", cookies));
    trials.push(trial(Ability::SocketPrograms, "", load_all_for_sockets(&mut kernel)));
    trials.push(trial(Ability::ControlGroup, "", Cgroup::Auto.directory().map(drop)));
    let mut hooks = Hooks { kernel, has_xdp, has_tc };
    match in_own_namespace(&mut hooks) {
        Ok(found) => trials.extend(found),
        Err(error) => {
            let why = format!("{error:#}");
            trials.extend(ALL_WAYS.map(|way| untried(way, "", &why)));
        }
    }
    for subject in subjects {
        match &subject.spared {
            Some(why) => trials.push(untried(Ability::Native, &subject.name, why)),
            None => trials.extend(hooks.attach(subject, &ON_DEVICES)),
        }
    }
    trials
}

/// Attaching them is not tried: in a control group, sockets of others would meet them.
fn load_all_for_sockets(kernel: &mut Kernel) -> Result<()> {
    SOCKET_PROGRAMS.into_iter().try_for_each(|wanted| kernel.socket_program(wanted).map(drop))
}

const ALL_WAYS: [Ability; 4] = [Ability::Native, Ability::Tcx, Ability::Clsact, Ability::Generic];
/// On devices of the node's, a queueing discipline would stay.
const ON_DEVICES: [Ability; 3] = [Ability::Native, Ability::Tcx, Ability::Generic];

fn trial(ability: Ability, device: &str, result: Result<()>) -> Trial {
    let outcome = result.map_or_else(|error| Outcome::Fails(format!("{error:#}")), |()| Outcome::Works);
    Trial { ability, device: device.to_owned(), outcome }
}

fn untried(ability: Ability, device: &str, why: &str) -> Trial {
    Trial { ability, device: device.to_owned(), outcome: Outcome::Untried(why.to_owned()) }
}

/// On a pair of devices in a network namespace of their own, which goes with its thread.
fn in_own_namespace(hooks: &mut Hooks) -> Result<Vec<Trial>> {
    let body = move || -> Result<Vec<Trial>> {
        unshare(CloneFlags::CLONE_NEWNET).context(
            "attaching needs a network namespace to be tried in, and none can be made (CAP_SYS_ADMIN)",
        )?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let (connection, handle, _) = new_connection().context("opening a netlink socket")?;
            tokio::spawn(connection);
            let pair = LinkVeth::new(OWN_DEVICE, "trial-peer").build();
            handle.link().add(pair).execute().await.context("making a pair of devices to try on")
        })?;
        let ifindex = nix::net::if_::if_nametoindex(OWN_DEVICE)?;
        let own = Subject { ifindex, name: OWN_DEVICE.to_owned(), spared: None };
        let mut trials = hooks.attach(&own, &ALL_WAYS);
        trials.iter_mut().for_each(|trial| trial.device.clear());
        Ok(trials)
    };
    let joined = thread::scope(|scope| scope.spawn(body).join());
    joined.unwrap_or_else(|_| Err(anyhow!("the thread of the trial has failed")))
}

/// The programs, as far as the kernel has taken them.
struct Hooks {
    kernel: Kernel,
    has_xdp: bool,
    has_tc: bool,
}

impl Hooks {
    /// Attaches and detaches in each way, one after the other.
    fn attach(&mut self, subject: &Subject, ways: &[Ability]) -> Vec<Trial> {
        let mut trials = Vec::new();
        for way in ways {
            let is_xdp = matches!(way, Ability::Native | Ability::Generic);
            let is_loaded = if is_xdp { self.has_xdp } else { self.has_tc };
            trials.push(if is_loaded {
                trial(*way, &subject.name, self.attach_one(subject, *way))
            } else {
                untried(*way, &subject.name, "the kernel refuses the programs")
            });
        }
        trials
    }

    fn attach_one(&mut self, subject: &Subject, way: Ability) -> Result<()> {
        match way {
            Ability::Native => self.xdp(subject, XdpMode::Driver),
            Ability::Generic => self.xdp(subject, XdpMode::Skb),
            Ability::Tcx => self.tc(subject, TcAttachOptions::TcxOrder(LinkOrder::default())),
            _ => {
                qdisc_add_clsact(&subject.name).context("adding the queueing discipline clsact")?;
                self.tc(subject, TcAttachOptions::Netlink(NlOptions::default()))
            }
        }
    }

    fn xdp(&mut self, subject: &Subject, mode: XdpMode) -> Result<()> {
        let program = self.kernel.entry_program()?;
        let link = program.attach_to_if_index(subject.ifindex, mode)?;
        Ok(program.detach(link)?)
    }

    fn tc(&mut self, subject: &Subject, options: TcAttachOptions) -> Result<()> {
        let program: &mut SchedClassifier = self.kernel.ingress_program()?;
        let link = program.attach_with_options(&subject.name, TcAttachType::Ingress, options)?;
        Ok(program.detach(link)?)
    }
}

/// Whether the kernel describes its types.
#[must_use]
pub fn btf() -> Outcome {
    Btf::from_sys_fs().map_or_else(|error| Outcome::Fails(error.to_string()), |_| Outcome::Works)
}

/// Whether a directory is on a BPF file system, or will be when it is made.
#[must_use]
pub fn bpf_fs(directory: &Path) -> BpfFs {
    let Some(there) = directory.ancestors().find(|path| path.exists()) else {
        return BpfFs::Absent;
    };
    match is_bpf_fs(there) {
        Ok(true) => BpfFs::Mounted,
        Ok(false) => BpfFs::Absent,
        Err(error) => BpfFs::Unknown(format!("{error:#}")),
    }
}

/// A program by the kernel's number of it.
#[must_use]
pub fn program(id: u32) -> Program {
    let mut loaded = loaded_programs().filter_map(Result::ok);
    let name = loaded.find(|program| program.id() == id);
    named(name.as_ref().and_then(|program| program.name_as_str()).unwrap_or_default())
}

/// Programs that are attached in TC by links to what comes in by a device; none on kernels without
/// such links.
#[must_use]
pub fn tcx_programs(device: &str) -> Vec<Program> {
    let found = SchedClassifier::query_tcx(device, TcAttachType::Ingress);
    let programs = found.map(|(_, programs)| programs).unwrap_or_default();
    programs.iter().map(|program| named(program.name_as_str().unwrap_or_default())).collect()
}

/// A program by its name. Ours are told by it.
#[must_use]
pub fn named(name: &str) -> Program {
    Program { name: name.to_owned(), is_ours: name.starts_with("pointsman") }
}
