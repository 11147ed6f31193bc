//! Scenarios: Kubernetes YAML in, what people are told and a dump of the maps out.
//!
//! A scenario is a file `scenarios/*.txt`. Its first lines say what it shows; then come steps:
//!
//! ```text
//! == step WHAT HAPPENS
//! -- file web.yaml
//! …YAML; a file stays as it is until a later step has it again
//! -- delete web.yaml
//! -- restart           the agent forgets all but the maps
//! -- seconds 5         time goes by
//! -- purge             flows of freed backends are purged
//! -- fail 0 3          these writes of the step fail; it is then tried again
//! -- expect
//! …
//! ```
//!
//! With `UPDATE=1` the expectations are written anew. Every scenario runs twice: on maps that do
//! what they are told, and on maps where every other write fails at first, which must end alike.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    fs,
    path::Path,
    time::Duration,
};

use lb_common::abi::{Config, NextHop};
use lb_control::{
    model::{Desired, Objects},
    plan::{
        self, Addressing, Compiler, Paths, Planner, Scope, Settings,
        ipam::{Holdings, Ipam, Options},
    },
    ports::{FakeMaps, FaultyMaps, Limits},
    source::file::{FileState, Merger, decode},
};
use pointsman_tests::dump::dump;

type Maps = FaultyMaps<FakeMaps>;

struct World {
    files: BTreeMap<String, String>,
    merger: Merger,
    maps: Maps,
    compiler: Compiler,
    planner: Planner,
    objects: Objects,
    now: Duration,
    /// Whether every other write fails at first.
    shaky: bool,
}

impl World {
    fn new(shaky: bool) -> Self {
        let maps = FaultyMaps::new(FakeMaps::new(Limits::default()), []);
        let compiler = Compiler::adopt(&maps, Settings::default()).unwrap();
        let (files, merger, objects) = Default::default();
        let planner = planner(Holdings::new());
        Self { files, merger, maps, compiler, planner, objects, now: Duration::ZERO, shaky }
    }

    fn restart(&mut self) {
        self.merger = Merger::default();
        self.compiler = Compiler::adopt(&self.maps, Settings::default()).unwrap();
        self.planner = planner(self.compiler.holdings());
        self.objects = Objects::default();
    }

    /// Does what an agent does after a change, until nothing is left to do; what came of it.
    fn settle(&mut self, failing: &[u64]) -> String {
        let files: Vec<_> = self
            .files
            .iter()
            .map(|(name, text)| (name.clone(), FileState::Read(decode(name, text).into())))
            .collect();
        self.merger.merge(&files);
        let snapshot = self.merger.snapshot();
        self.planner.apply(self.objects.changes_to(&snapshot.objects));
        self.objects = snapshot.objects.clone();
        let plan = self.planner.plan();
        let start = self.maps.writes();
        self.maps.failing = failing.iter().map(|number| start + number).collect();
        if self.shaky {
            self.maps.failing = (start..start + 200).step_by(2).collect();
        }
        let paths = paths(&plan.desired);
        let mut out = String::new();
        for _ in 0..200 {
            let delta =
                self.compiler.reconcile(&plan.desired, &paths, &Config::default(), Scope::All, self.now);
            if delta.is_empty() {
                break;
            }
            plan::apply(&delta, &mut self.maps, &mut self.compiler, self.now);
        }
        for problem in snapshot.problems.iter().chain(&plan.problems) {
            writeln!(out, "{:?}: {problem}", problem.severity).unwrap();
        }
        for report in plan.reports.values() {
            writeln!(out, "{} {:?}", report.object, report.state).unwrap();
            for problem in &report.problems {
                writeln!(out, "  {:?}: {problem}", problem.severity).unwrap();
            }
        }
        for (vip, holders) in &plan.desired.vips {
            let holders: Vec<_> = holders.iter().map(ToString::to_string).collect();
            writeln!(out, "address {vip} for {}", holders.join(", ")).unwrap();
        }
        out + &dump(&self.maps).unwrap()
    }
}

/// An agent on the node `edge` that gives out addresses itself.
fn planner(holdings: Holdings) -> Planner {
    let mut ipam = Ipam::new(Options { default_class: true, outside_pools: true, deferred_release: false });
    ipam.adopt(holdings);
    Planner::new(true, "edge", Addressing::Decides(Box::new(ipam)))
}

/// Every backend behind device 2, with one source address per family; 10.9.x.x is not reachable.
fn paths(desired: &Desired) -> Paths {
    let next_hop = NextHop { ifindex: 2, ..NextHop::default() };
    let reachable: BTreeSet<_> = desired
        .backend_addresses()
        .into_iter()
        .filter(|address| !address.to_string().starts_with("10.9."))
        .collect();
    let path = |address: &std::net::IpAddr| plan::Path {
        is_local: false,
        mtu: 1_500,
        is_for_tc: false,
        next_hop: Some(next_hop),
        snat: vec![if address.is_ipv4() { "10.0.0.254" } else { "fd00::fe" }.parse().unwrap()],
    };
    reachable.iter().map(|address| (*address, path(address).into())).collect()
}

/// Runs a scenario; its text with what came of it in place of what was expected.
fn run(text: &str, shaky: bool) -> String {
    let mut world = World::new(shaky);
    let mut out = String::new();
    let mut lines = text.lines().peekable();
    let mut failing = Vec::new();
    while let Some(line) = lines.next() {
        writeln!(out, "{line}").unwrap();
        let Some(command) = line.strip_prefix("-- ") else { continue };
        let mut block = String::new();
        while let Some(line) = lines.next_if(|line| !line.starts_with("-- ") && !line.starts_with("== ")) {
            block += line;
            block.push('\n');
        }
        let (command, argument) = command.split_once(' ').unwrap_or((command, ""));
        match command {
            "file" => drop(world.files.insert(argument.to_owned(), block.clone())),
            "delete" => drop(world.files.remove(argument).expect("the file to delete is there")),
            "restart" => world.restart(),
            "seconds" => world.now += Duration::from_secs(argument.parse().unwrap()),
            "purge" => world.compiler.flows_purged(&world.compiler.freed_backends()),
            "fail" => failing = argument.split(' ').map(|number| number.parse().unwrap()).collect(),
            "expect" => {
                block = world.settle(&std::mem::take(&mut failing));
                if lines.peek().is_some() {
                    block.push('\n');
                }
            }
            other => panic!("unknown command {other}"),
        }
        out += &block;
    }
    out
}

#[test]
fn scenarios() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let mut paths: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    paths.sort();
    assert!(paths.len() >= 8, "scenarios are missing");
    let mut wrong = String::new();
    for path in paths {
        let expected = fs::read_to_string(&path).unwrap();
        let got = run(&expected, false);
        if std::env::var_os("UPDATE").is_some() {
            fs::write(&path, &got).unwrap();
        } else if got != expected {
            writeln!(wrong, "{}:\n{}", path.display(), difference(&expected, &got)).unwrap();
        }
        let shaky = run(&got, true);
        if shaky != got {
            writeln!(wrong, "{} with failing writes:\n{}", path.display(), difference(&got, &shaky)).unwrap();
        }
    }
    assert!(wrong.is_empty(), "{wrong}\nUPDATE=1 takes over what came of it");
}

/// The lines that only one of two texts has.
fn difference(expected: &str, got: &str) -> String {
    let only = |a: &str, b: &str, sign: char| {
        let b: BTreeSet<_> = b.lines().collect();
        a.lines()
            .filter(|line| !b.contains(line))
            .fold(String::new(), |out, line| out + &format!("{sign} {line}\n"))
    };
    only(expected, got, '-') + &only(got, expected, '+')
}
