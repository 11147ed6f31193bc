//! Scenarios of a whole cluster: Kubernetes YAML as people write it in; what the API then holds of
//! ours, Events, and the maps of the nodes out.
//!
//! Everything that decides is the real thing: the converters of the Kubernetes source, the
//! controller of the leader, planner and compiler of every node's agent. The API server and the maps
//! are in memory, there is no clock, and all of it runs in one thread.
//!
//! A scenario is a file `scenarios_cluster/*.txt`. Its first lines say what it shows; then come steps:
//!
//! ```text
//! == step WHAT HAPPENS
//! -- file web.yaml         kubectl apply --prune: …YAML follows; every Node has an agent at once
//! -- delete web.yaml       kubectl delete -f
//! -- slices web 100 50     EndpointSlices of the Service with so many endpoints each, from 10.1.0.1 on
//! -- rival web 192.0.2.9   another controller writes the Service's ingress; without an address: clears it
//! -- seconds 20            time goes by
//! -- restart n1            the agent is killed and started: it knows the maps and nothing else
//! -- agent n1 down         the agent is killed; `up`: it is started
//! -- leader                the next node leads
//! -- option NAME           agents are started anew with `publish-external-ips`, without it again
//!                          (`keep-external-ips`), or for Services of our class only (`own-class-only`)
//! -- expect [NODE…]        after 70 seconds: all that is ours, and the maps of these nodes
//! …
//! ```
//!
//! What is expected is a state of rest: nothing is written any more in the last ten of those seconds.
//! With `UPDATE=1` the expectations are written anew: read what changed. Every scenario runs twice:
//! the second time every other write, to the API server and to the maps, is lost at first. That must
//! end alike, but for Events, which then also tell of the trouble.

#[path = "scenarios_cluster/agent.rs"]
mod agent;
#[path = "scenarios_cluster/server.rs"]
mod server;
#[path = "scenarios_cluster/source.rs"]
mod source;
#[path = "scenarios_cluster/text.rs"]
mod text;
#[path = "scenarios_cluster/world.rs"]
mod world;

use std::{collections::BTreeSet, fmt::Write, fs, path::Path};

use text::{EVENT, show};
use world::World;

/// Runs a scenario; its text with what came of it in place of what was expected.
fn run(text: &str, is_shaky: bool) -> String {
    let mut world = World::new(is_shaky);
    let mut out = String::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        writeln!(out, "{line}").unwrap();
        if line.starts_with("== ") {
            // Shown if what follows panics.
            println!("{line}{}", if is_shaky { " (with lost writes)" } else { "" });
        }
        let Some(command) = line.strip_prefix("-- ") else { continue };
        let mut block = String::new();
        while let Some(line) = lines.next_if(|line| !line.starts_with("-- ") && !line.starts_with("== ")) {
            block += line;
            block.push('\n');
        }
        let words: Vec<_> = command.split(' ').collect();
        match words[..] {
            ["file", name] => world.file(name, &block),
            ["delete", name] => world.delete(name),
            ["slices", service, ref sizes @ ..] => {
                let sizes: Vec<_> = sizes.iter().map(|size| size.parse().unwrap()).collect();
                world.slices(service, &sizes);
            }
            ["rival", service, ref addresses @ ..] => world.rival(service, addresses),
            ["seconds", count] => world.pass(count.parse().unwrap()),
            ["restart", node] => world.restart(node),
            ["agent", node, state @ ("up" | "down")] => world.set_agent(node, state == "up"),
            ["leader"] => world.next_leader(),
            ["option", option] => world.option(option),
            ["expect", ref nodes @ ..] => {
                world.settle();
                block = show(&mut world, nodes);
                if lines.peek().is_some() {
                    block.push('\n');
                }
            }
            _ => panic!("unknown: -- {command}"),
        }
        out += &block;
    }
    out
}

#[test]
fn scenarios() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios_cluster");
    let mut paths: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    paths.sort();
    assert!(!paths.is_empty(), "no scenarios in {}", directory.display());
    let mut wrong = String::new();
    for path in paths {
        println!("{}", path.display());
        let expected = fs::read_to_string(&path).unwrap();
        let got = run(&expected, false);
        if std::env::var_os("UPDATE").is_some() {
            fs::write(&path, &got).unwrap();
        } else if got != expected {
            writeln!(wrong, "{}:\n{}", path.display(), difference(&expected, &got)).unwrap();
        }
        let (calm, shaky) = (without_events(&got), without_events(&run(&got, true)));
        if shaky != calm {
            writeln!(wrong, "{} with lost writes:\n{}", path.display(), difference(&calm, &shaky)).unwrap();
        }
    }
    assert!(wrong.is_empty(), "{wrong}\nUPDATE=1 takes over what came of it");
}

fn without_events(text: &str) -> String {
    text.lines().filter(|line| !line.starts_with(EVENT)).fold(String::new(), |out, line| out + line + "\n")
}

/// The lines that only one of two texts has.
fn difference(expected: &str, got: &str) -> String {
    let only = |a: &str, b: &str, sign: char| {
        let b: BTreeSet<_> = b.lines().collect();
        let lines = a.lines().filter(|line| !b.contains(line));
        lines.fold(String::new(), |out, line| out + &format!("{sign} {line}\n"))
    };
    only(expected, got, '-') + &only(got, expected, '+')
}
