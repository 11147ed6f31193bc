//! An agent of another map layout was here before.
//!
//! With `POINTSMAN_OLD_BIN`, the one before is that binary (`cargo xtask test --upgrade-from COMMIT`
//! builds it). Without, it is the agent under test, and what it has pinned is made to look like the
//! previous version's: maps that go on have the same layout in both.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use aya::maps::MapData;
use lb_common::abi::{
    ABI_VERSION,
    maps::{self, PROGRAMS, TC_PROGRAMS},
    previous::{CARRIED, VERSION},
};
use pointsman_tests::{
    lab::{
        Agent, Lab, Options, POD,
        agent::list,
        in_kernel,
        manifest::{ECHO, HTTP, UDP},
        wait_for,
    },
    traffic::{
        client::{check_round_robin, who_answers},
        load::Load,
        ping_pong::{PingPong, Report, be_patient, retransmissions},
        udp_flows::UdpFlows,
    },
    world::{World, both, web},
};
use serde_json::Value;

const P1: u8 = POD;
const PATIENCE: Duration = Duration::from_secs(30);

fn version(lab: &Lab, number: u32) -> PathBuf {
    lab.pin_directory().join(format!("v{number}"))
}

fn names(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Makes the pins of an agent that does not run look like those of the version before. Program arrays
/// stay: the programs that are attached call each other by them.
fn age(lab: &Lab) -> Result<()> {
    let (own, previous) = (version(lab, ABI_VERSION), version(lab, VERSION));
    ensure!(!previous.exists(), "the version before is there already: {:?}", names(&previous));
    fs::rename(own, &previous)?;
    let arrays = [PROGRAMS.name, TC_PROGRAMS.name];
    let kept: BTreeSet<_> = CARRIED.iter().map(|map| map.name).chain(arrays).collect();
    let pinned = maps::ALL.iter().filter(|map| !maps::NOT_PINNED.contains(map));
    for map in pinned.filter(|map| !kept.contains(map.name)) {
        fs::remove_file(previous.join(map.name))?;
    }
    Ok(())
}

/// The agent of the version before, if this run has one of its own.
fn old_binary() -> Option<PathBuf> {
    std::env::var_os("POINTSMAN_OLD_BIN").map(PathBuf::from)
}

/// An agent of the previous version that has served a Service and does not run any more. Its next start
/// is the agent under test.
fn earlier<'lab>(world: &'lab World, backends: &[u8]) -> Result<(Agent<'lab>, Value)> {
    earlier_with(world, backends, &[["--on-exit", "keep"].as_slice(), in_kernel()].concat())
}

fn earlier_with<'lab>(world: &'lab World, backends: &[u8], flags: &[&str]) -> Result<(Agent<'lab>, Value)> {
    let old = old_binary();
    let mut agent = match &old {
        Some(binary) => Agent::start_from(binary, &world.lab, &web(backends), flags)?,
        None => Agent::start_with(&world.lab, &web(backends), flags)?,
    };
    let status = agent.wait_ready()?;
    ensure!(agent.sigterm()?.success(), "the agent before did not end well");
    match old {
        None => age(&world.lab)?,
        Some(_) => agent.use_binary(Path::new(&std::env::var("POINTSMAN_BIN")?)),
    }
    ensure!(version(&world.lab, VERSION).exists(), "the agent before is not of map layout v{VERSION}");
    Ok((agent, status))
}

/// The programs on the devices, by what `bpftool` says.
fn programs(status: &Value) -> BTreeSet<u64> {
    list(status, "devices").iter().filter_map(|device| device["programId"].as_u64()).collect()
}

/// Connections and UDP flows that are used all the time.
struct Traffic {
    tcp: Vec<PingPong>,
    udp: Vec<UdpFlows>,
    load: Vec<Load>,
}

impl Traffic {
    fn start(world: &World, status: &Value) -> Result<Self> {
        let lab = &world.lab;
        for end in lab.backends.iter().chain(&lab.pods).chain([lab.client.as_ref()]) {
            be_patient(end)?;
        }
        let tcp = both(status, ECHO)?.map(|to| PingPong::start(&lab.client, to, 6));
        let udp = both(status, UDP)?.map(|to| UdpFlows::start(&lab.client, to, 3));
        // Not at full speed: of some 300,000 connections one loses a segment, upgrade or not, when ports
        // are used again that fast.
        let pause = Duration::from_millis(5);
        let load = both(status, HTTP)?.map(|to| Load::start_paced(&lab.client, to, 1, u64::MAX, pause));
        Ok(Self {
            tcp: tcp.into_iter().collect::<Result<_>>()?,
            udp: udp.into_iter().collect::<Result<_>>()?,
            load: load.into(),
        })
    }

    fn goes_on(&self) -> Result<()> {
        self.tcp.iter().try_for_each(|flows| flows.wait_exchanges(30))?;
        self.udp.iter().try_for_each(|flows| flows.wait_exchanges(30))?;
        self.load.iter().try_for_each(|load| load.wait_requests(20))
    }

    /// Fails if a connection broke, a request failed, or a packet was lost.
    fn stop(self, lab: &Lab) -> Result<()> {
        let reports: Vec<Report> = self.tcp.into_iter().map(PingPong::stop).collect::<Result<_>>()?;
        self.udp.into_iter().try_for_each(UdpFlows::stop)?;
        let mut requests = 0;
        for load in self.load {
            let report = load.stop()?;
            ensure!(report.errors.is_empty(), "requests failed: {:?}", report.errors);
            requests += report.answers.values().sum::<usize>();
        }
        ensure!(reports.iter().all(|report| report.broken.is_empty()), "connections broke: {reports:?}");
        let ends = lab.backends.iter().chain(&lab.pods).chain([lab.client.as_ref()]);
        let lost: u64 = ends.map(retransmissions).sum::<Result<u64>>()?;
        let exchanges: u64 = reports.iter().map(|report| report.exchanges).sum();
        let longest = reports.iter().map(|report| report.longest).max();
        println!(
            "{exchanges} exchanges, the longest {longest:?}; {requests} requests; {lost} segments sent again"
        );
        ensure!(lost == 0, "{lost} segments had to be sent again");
        Ok(())
    }
}

fn is_done(lab: &Lab) -> bool {
    !version(lab, VERSION).exists() && version(lab, ABI_VERSION).exists()
}

#[test]
fn a_new_agent_takes_over_and_no_packet_is_lost() -> Result<()> {
    let options = Options { backends: 2, pods: 1, ..Options::default() };
    let Some(world) = World::with(options)? else { return Ok(()) };
    let (mut agent, status) = earlier(&world, &[1, 2, P1])?;
    let traffic = Traffic::start(&world, &status)?;
    traffic.goes_on()?;
    agent.run()?;
    wait_for("the pins of the version before to go", || Ok(is_done(&world.lab).then_some(())))?;
    traffic.goes_on()?;
    let after = agent.wait_ready()?;
    if let Some(old) = old_binary() {
        the_old_one_refuses(&world.lab, &mut agent, &old)?;
        traffic.goes_on()?;
    }
    traffic.stop(&world.lab)?;
    assert_eq!(both(&after, HTTP)?, both(&status, HTTP)?);
    assert_eq!(programs(&after).intersection(&programs(&status)).count(), 0, "programs are replaced");
    assert!(!programs(&after).is_empty(), "{after:#}");
    assert!(agent.log().contains("taking over from an agent of map layout"), "{}", agent.log());
    check_round_robin(&who_answers(&world.lab.client, both(&status, HTTP)?[0], 6)?, 3)?;
    // The links are ours: they go with us.
    assert!(names(&version(&world.lab, ABI_VERSION).join("links")).len() >= 2);
    Ok(())
}

/// Back to the version before, and when that refuses, forth again.
fn the_old_one_refuses(lab: &Lab, agent: &mut Agent<'_>, old: &Path) -> Result<()> {
    let new = agent.binary().to_owned();
    let pins = version(lab, ABI_VERSION);
    let before = (names(&pins), names(&pins.join("links")));
    ensure!(agent.sigterm()?.success(), "the agent did not end well");
    agent.use_binary(old);
    agent.run()?;
    let ended = agent.ended()?;
    ensure!(!ended.success(), "the version before did not refuse: {ended}");
    ensure!((names(&pins), names(&pins.join("links"))) == before, "it has touched the pins");
    agent.use_binary(&new);
    agent.run()?;
    agent.wait_ready()?;
    // It may have made its own directory before it saw ours.
    wait_for("what it has left to go", || Ok(is_done(lab).then_some(())))
}

/// Ends the agent by `kill -9` as soon as something is so.
fn kill_when(agent: &mut Agent<'_>, what: &str, is_so: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        ensure!(Instant::now() < deadline, "waited in vain for {what}; the log:\n{}", agent.log());
        std::thread::yield_now();
    }
    agent.kill();
    Ok(())
}

#[test]
fn killed_at_any_step_the_next_agent_finishes() -> Result<()> {
    let options = Options { backends: 1, pods: 1, ..Options::default() };
    let Some(world) = World::with(options)? else { return Ok(()) };
    let (mut agent, status) = earlier(&world, &[1, P1])?;
    let traffic = Traffic::start(&world, &status)?;
    let (own, previous) = (version(&world.lab, ABI_VERSION), version(&world.lab, VERSION));
    let links = |version: &Path| names(&version.join("links")).len();
    let all = links(&previous);
    ensure!(all >= 3, "too few links: {:?}", names(&previous.join("links")));
    let steps: [(&str, &dyn Fn() -> bool); 5] = [
        ("its directory", &|| own.exists()),
        ("the first map", &|| own.join(CARRIED[0].name).exists()),
        ("the last map", &|| own.join("config").exists()),
        ("all maps and the first link", &|| links(&own) > 0),
        ("all links", &|| links(&own) >= all),
    ];
    for (what, is_so) in steps {
        agent.run()?;
        kill_when(&mut agent, what, is_so)?;
        traffic.goes_on().context(what)?;
    }
    agent.run()?;
    wait_for("the pins of the version before to go", || Ok(is_done(&world.lab).then_some(())))?;
    agent.wait_ready()?;
    traffic.goes_on()?;
    traffic.stop(&world.lab)?;
    assert_eq!(links(&own), all);
    Ok(())
}

/// A program that runs the agent under test without what loading programs takes.
fn without_rights(lab: &Lab) -> Result<PathBuf> {
    let path = lab.directory().join("without-rights");
    let binary = std::env::var("POINTSMAN_BIN")?;
    let script = format!("#!/bin/sh\nexec setpriv --bounding-set -net_admin,-sys_admin {binary} \"$@\"\n");
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

#[test]
fn an_agent_that_cannot_begin_leaves_the_way_back_open() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let (mut agent, status) = earlier(&world, &[1, 2])?;
    let new = PathBuf::from(std::env::var("POINTSMAN_BIN")?);
    let [to, _] = both(&status, ECHO)?;
    let flows = PingPong::start(&world.lab.client, to, 2)?;
    let (own, previous) = (version(&world.lab, ABI_VERSION), version(&world.lab, VERSION));
    let before = (names(&previous), names(&previous.join("links")));
    agent.use_binary(&without_rights(&world.lab)?);
    agent.run()?;
    let ended = agent.ended()?;
    assert!(!ended.success(), "{ended}");
    assert!(agent.log().contains("an agent of it can begin again"), "{}", agent.log());
    assert!(!own.exists(), "pins are left: {:?}", names(&own));
    assert_eq!((names(&previous), names(&previous.join("links"))), before);
    flows.wait_exchanges(30)?;
    if let Some(old) = old_binary() {
        agent.use_binary(&old);
        agent.run()?;
        agent.wait_ready()?;
        flows.wait_exchanges(30)?;
        agent.kill();
    }
    // What one has left that was killed before it had attached anything is not taken for the real thing.
    fs::create_dir_all(own.join("links"))?;
    MapData::from_pin(previous.join("drops"))?.pin(own.join("slots"))?;
    agent.use_binary(&new);
    agent.run()?;
    wait_for("the pins of the version before to go", || Ok(is_done(&world.lab).then_some(())))?;
    agent.wait_ready()?;
    flows.wait_exchanges(30)?;
    let report = flows.stop()?;
    assert!(report.broken.is_empty(), "{report:?}");
    Ok(())
}

fn entries(pin: &Path) -> Result<u32> {
    let map = MapData::from_pin(pin).with_context(|| format!("opening {}", pin.display()))?;
    Ok(map.info()?.max_entries())
}

/// Slots move to the larger map, all others keep their size; and sizes that change from start to start
/// disturb nothing.
#[test]
fn slots_grow_and_the_other_maps_keep_their_size() -> Result<()> {
    let Some(world) = World::new(3)? else { return Ok(()) };
    let keep = [["--on-exit", "keep"].as_slice(), in_kernel()].concat();
    let small = [keep.as_slice(), &["--max-backends", "1000", "--max-services", "100"]].concat();
    let (mut agent, status) = earlier_with(&world, &[1, 2, 3], &small)?;
    let slots = entries(&version(&world.lab, VERSION).join("slots"))?;
    let traffic = Traffic::start(&world, &status)?;
    agent.use_flags(&keep);
    agent.run()?;
    wait_for("the pins of the version before to go", || Ok(is_done(&world.lab).then_some(())))?;
    let own = version(&world.lab, ABI_VERSION);
    let grown = entries(&own.join("slots"))?;
    assert!(grown > 10 * slots, "{slots} slots have become {grown}");
    assert_eq!((entries(&own.join("backends"))?, entries(&own.join("services"))?), (1000, 100));
    traffic.goes_on()?;
    agent.wait_ready()?;
    assert!(agent.sigterm()?.success());
    agent.use_flags(&small);
    agent.run()?;
    agent.wait_ready()?;
    assert_eq!(entries(&own.join("slots"))?, grown);
    assert!(agent.log().contains("a pinned map keeps its size"), "{}", agent.log());
    traffic.goes_on()?;
    traffic.stop(&world.lab)?;
    check_round_robin(&who_answers(&world.lab.client, both(&status, HTTP)?[0], 6)?, 3)
}

#[test]
fn a_newer_agents_pins_are_refused_and_left_alone() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let (mut agent, status) = world.web_in_kernel(&[1, 2])?;
    let [to, _] = both(&status, ECHO)?;
    let flows = PingPong::start(&world.lab.client, to, 2)?;
    agent.kill();
    let (own, newer) = (version(&world.lab, ABI_VERSION), version(&world.lab, ABI_VERSION + 1));
    fs::rename(&own, &newer)?;
    let before = (names(&newer), names(&newer.join("links")));
    agent.run()?;
    let ended = agent.ended()?;
    assert!(!ended.success(), "{ended}");
    let log = agent.log();
    let path = newer.display().to_string();
    for words in [path.as_str(), "newer agent", "--on-exit=withdraw", "rm -r"] {
        assert!(log.contains(words), "{words}: {log}");
    }
    assert_eq!((names(&newer), names(&newer.join("links"))), before);
    assert_eq!(names(&world.lab.pin_directory()).len(), 1, "nothing else was made");
    flows.wait_exchanges(30)?;
    // The newer one comes back.
    fs::rename(&newer, &own)?;
    agent.run()?;
    agent.wait_ready()?;
    flows.wait_exchanges(30)?;
    let report = flows.stop()?;
    assert!(report.broken.is_empty(), "{report:?}");
    Ok(())
}

#[test]
fn what_is_too_old_is_removed_and_all_begins_anew() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let (mut agent, status) = world.web_in_kernel(&[1, 2])?;
    agent.kill();
    let old = version(&world.lab, VERSION - 1);
    fs::rename(version(&world.lab, ABI_VERSION), &old)?;
    // An agent of the previous version has been refused beside it.
    fs::create_dir_all(version(&world.lab, VERSION).join("links"))?;
    agent.run()?;
    let after = agent.wait_ready()?;
    assert_eq!(programs(&after).intersection(&programs(&status)).count(), 0, "programs are replaced");
    assert_eq!(names(&world.lab.pin_directory()), BTreeSet::from([format!("v{ABI_VERSION}")]));
    assert!(agent.log().contains("its connections end"), "{}", agent.log());
    check_round_robin(&who_answers(&world.lab.client, both(&after, HTTP)?[0], 4)?, 2)?;
    assert!(agent.sigterm()?.success());
    assert!(!world.lab.pin_directory().exists(), "pins are left");
    Ok(())
}

/// An agent that has nothing to say yet (no configuration that it can read) leaves the programs of the
/// version before attached; told to end, it takes them down with what is its own.
#[test]
fn withdrawn_half_way_nothing_stays() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let (mut agent, _) = world.web_in_kernel(&[1])?;
    agent.kill();
    age(&world.lab)?;
    agent.run()?;
    wait_for("its first map", || Ok(version(&world.lab, ABI_VERSION).join("config").exists().then_some(())))?;
    agent.wait_status("an agent", |status| !status["agent"].is_null())?;
    assert!(agent.sigterm()?.success());
    assert!(!world.lab.pin_directory().exists(), "pins are left: {:?}", names(&world.lab.pin_directory()));
    Ok(())
}
