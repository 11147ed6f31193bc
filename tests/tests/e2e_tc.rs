//! TC in place of XDP, and beside it: devices that XDP cannot send by.

use std::{
    collections::BTreeMap,
    fs,
    io::ErrorKind,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Context, Result};
use aya::maps::{DevMapHash, Map, MapData};
use lb_common::abi::{ABI_VERSION, maps as abi_maps};
use lb_control::{
    dataplane::{KernelMaps, PinDirectory},
    ports::MapStore,
};
use nix::net::if_::if_nametoindex;
use pointsman_tests::{
    lab::{
        Agent, Lan, Options,
        agent::list,
        manifest::{ECHO, HTTP, UDP},
        wait_for,
    },
    traffic::{
        Server, bulk,
        client::{
            check_round_robin, connect, open, tally, udp_exchange, udp_socket, who_answers, who_answers_udp,
        },
        ping_pong::PingPong,
    },
    world::{World, both, web},
};
use serde_json::Value;

/// A datagram that does not fit one packet.
const FRAGMENTED: usize = 3_000;
/// The largest that fits one packet in the lab's tunnel.
const IN_A_TUNNEL: usize = 1_450 - 40 - 8;

/// One that fits the client's link, and not the tunnel.
const FITS_THE_LINK: usize = 1_500 - 40 - 8;

/// How the datapath is attached, by device.
fn modes(status: &Value) -> Result<BTreeMap<&str, &str>> {
    let devices = status["devices"].as_array().context("no devices")?;
    devices
        .iter()
        .map(|device| Some((device["device"].as_str()?, device["mode"].as_str()?)))
        .collect::<Option<_>>()
        .context("a device without name or mode")
}

/// An agent that chooses by device, and its status once it serves.
fn chosen(world: &World) -> Result<(Agent<'_>, Value)> {
    let agent = Agent::start_with(&world.lab, &web(&[1, 2, 3]), &["--datapath", "auto"])?;
    let status = agent.wait_ready()?;
    Ok((agent, status))
}

/// Connections, datagrams of up to this size and bulk, both families.
fn everything_works(world: &World, status: &Value, backends: usize, largest: usize) -> Result<()> {
    let client = &world.lab.client;
    for to in both(status, HTTP)? {
        check_round_robin(&who_answers(client, to, 10 * backends)?, backends)?;
    }
    for to in both(status, UDP)? {
        check_round_robin(&who_answers_udp(client, to, 10 * backends)?, backends)?;
        let names: Result<Vec<String>> = (0..2 * backends)
            .map(|_| udp_exchange(&client.enter(|| udp_socket(to))??, &vec![b'f'; largest]))
            .collect();
        assert_eq!(tally(&names?).len(), backends);
    }
    for (seed, to) in (1..).zip(both(status, ECHO)?) {
        bulk::echo(&connect(client, to)?, 64 << 20, seed)?;
    }
    Ok(())
}

/// A client that sends what does not fit the way to a backend learns so, and its kernel makes fragments
/// that do.
fn learns_mtu(world: &World, status: &Value, mtu: u32) -> Result<()> {
    let client = &world.lab.client;
    for to in both(status, UDP)? {
        let family = if to.is_ipv4() { "-4" } else { "-6" };
        let socket = client.enter(|| udp_socket(to))??;
        wait_for("the client to learn the MTU", || {
            // Once it has, the kernel may say so here.
            let _ = socket.send(&[b'f'; FITS_THE_LINK]);
            let routes = client.run(["ip", family, "route", "show", "cache"])?;
            Ok(routes.contains(&format!("mtu {mtu}")).then_some(()))
        })?;
        let socket = client.enter(|| udp_socket(to))??;
        udp_exchange(&socket, &[b'f'; FITS_THE_LINK])?;
    }
    Ok(())
}

#[test]
fn in_place_of_xdp() -> Result<()> {
    let Some(world) = World::new(3)? else { return Ok(()) };
    let agent = Agent::start_with(&world.lab, &web(&[1, 2, 3]), &["--datapath", "tc"])?;
    let status = agent.wait_ready()?;
    assert_eq!(modes(&status)?, BTreeMap::from([("lan", "tc"), ("uplink", "tc")]));
    everything_works(&world, &status, 3, FRAGMENTED)
}

/// Super-packets and unfinished checksums, as virtual NICs hand them over.
#[test]
fn with_offloads() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    for (namespace, device) in
        [(world.lab.client.as_ref(), "eth0"), (&world.lab.edge, "uplink"), (&world.lab.edge, "lan")]
            .into_iter()
            .chain(world.lab.backends.iter().map(|backend| (backend, "eth0")))
    {
        namespace.run(["ethtool", "-K", device, "tx", "on", "tso", "on", "gso", "on"])?;
    }
    let agent = Agent::start_with(&world.lab, &web(&[1, 2]), &["--datapath", "tc"])?;
    let status = agent.wait_ready()?;
    everything_works(&world, &status, 2, FRAGMENTED)?;
    // Refusals are made out of packets whose checksum is unfinished.
    agent.write_config(&web(&[]))?;
    agent.wait_status("no backend", |status| status["services"][0]["state"] == "no-backends")?;
    for to in both(&status, HTTP)? {
        let refused = world.lab.client.enter(|| open(to))?;
        assert_eq!(refused.map_err(|error| error.kind()).err(), Some(ErrorKind::ConnectionRefused));
    }
    for to in both(&status, UDP)? {
        let socket = world.lab.client.enter(|| udp_socket(to))??;
        socket.send(b"anybody?")?;
        let refused = socket.recv(&mut [0; 100]).map_err(|error| error.kind());
        assert_eq!(refused.err(), Some(ErrorKind::ConnectionRefused));
    }
    Ok(())
}

#[test]
fn backends_behind_a_bridge() -> Result<()> {
    let Some(world) = World::with(Options { lan: Lan::Bridge, ..Options::default() })? else { return Ok(()) };
    let (_agent, status) = chosen(&world)?;
    assert_eq!(modes(&status)?, BTreeMap::from([("lan", "tc"), ("uplink", "xdp-native")]));
    everything_works(&world, &status, 3, IN_A_TUNNEL)?;
    learns_mtu(&world, &status, 1_450)
}

#[test]
fn backends_in_an_overlay() -> Result<()> {
    let Some(world) = World::with(Options { lan: Lan::Vxlan, ..Options::default() })? else { return Ok(()) };
    let (_agent, status) = chosen(&world)?;
    assert_eq!(modes(&status)?, BTreeMap::from([("lan", "tc"), ("uplink", "xdp-native")]));
    everything_works(&world, &status, 3, IN_A_TUNNEL)?;
    learns_mtu(&world, &status, 1_450)
}

/// Not even for a moment: what a flow finds then, it keeps.
#[test]
fn xdp_is_never_led_to_a_device_in_tc() -> Result<()> {
    let Some(world) = World::with(Options { lan: Lan::Vxlan, ..Options::default() })? else { return Ok(()) };
    let (_agent, status) = chosen(&world)?;
    assert_eq!(modes(&status)?, BTreeMap::from([("lan", "tc"), ("uplink", "xdp-native")]));
    let lan = world.lab.edge.enter(|| if_nametoindex("lan"))??;
    let pins = PinDirectory::new(&world.lab.pin_directory());
    let maps = KernelMaps::from_pins(&pins)?;
    let generation = || anyhow::Ok(maps.config()?.context("no settings")?.route_generation);
    let data = MapData::from_pin(pins.map(abi_maps::DEVICES))?;
    let devices: DevMapHash<MapData> = Map::DevMapHash(data).try_into()?;
    let has_ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let seen = scope.spawn(|| {
            let mut seen = 0_u32;
            while !has_ended.load(Ordering::Relaxed) {
                seen += u32::from(devices.get(lan, 0).is_ok());
            }
            seen
        });
        let changed = (1..30).try_for_each(|n| {
            let before = generation()?;
            world.lab.edge.ip_batch(&format!("route add 192.0.2.{n}/32 dev uplink"))?;
            wait_for("the agent to notice", || Ok((generation()? != before).then_some(())))
        });
        has_ended.store(true, Ordering::Relaxed);
        changed?;
        assert_eq!(seen.join().unwrap_or(u32::MAX), 0);
        Ok(())
    })
}

/// Behind a router, whose errors are about packets of the node: they are translated for the client.
fn behind_a_router(datapath: &str) -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let outside = world.lab.behind_second_backend(1_400)?;
    let _server = Server::start(&outside)?;
    let web = web(&[2]).replace("10.2.0.12", "10.7.0.2").replace("fd02::12", "fd07::2");
    let agent = Agent::start_with(&world.lab, &web, &["--datapath", datapath])?;
    let status = agent.wait_ready()?;
    assert_eq!(modes(&status)?, BTreeMap::from([("lan", datapath), ("uplink", datapath)]));
    for to in both(&status, HTTP)? {
        assert_eq!(who_answers(&world.lab.client, to, 2)?, ["outside"; 2]);
    }
    learns_mtu(&world, &status, 1_400)?;
    everything_works(&world, &status, 1, FRAGMENTED)
}

#[test]
fn behind_a_router_by_tc() -> Result<()> {
    behind_a_router("tc")
}

#[test]
fn behind_a_router_by_xdp() -> Result<()> {
    behind_a_router("xdp-native")
}

#[test]
fn clients_behind_a_bridge() -> Result<()> {
    let Some(world) = World::with(Options { uplink_is_bridge: true, ..Options::default() })? else {
        return Ok(());
    };
    let (_agent, status) = chosen(&world)?;
    assert_eq!(modes(&status)?, BTreeMap::from([("lan", "xdp-native"), ("uplink", "tc")]));
    everything_works(&world, &status, 3, FRAGMENTED)
}

/// What it could do otherwise is not done in silence; the other devices serve as they are told.
#[test]
fn one_that_is_forced_and_cannot_is_a_problem() -> Result<()> {
    let Some(world) = World::with(Options { lan: Lan::Vxlan, ..Options::default() })? else { return Ok(()) };
    let agent = Agent::start_with(&world.lab, &web(&[1]), &["--datapath", "xdp-native"])?;
    let status = agent.wait_status("the refusal", |status| {
        list(status, "problems").iter().any(|problem| {
            let message = problem["message"].as_str().unwrap_or_default();
            message.contains("lan: --datapath xdp-native does not work here") && message.ends_with("or auto")
        })
    })?;
    assert_eq!(modes(&status)?, BTreeMap::from([("uplink", "xdp-native")]));
    // The doctor passes it on.
    let refused = agent.cli(&["doctor", "--link-device", "uplink", "--read-only", "-o", "json"]);
    let Err(error) = refused else { panic!("the doctor finds nothing") };
    assert!(format!("{error:#}").contains("exit status: 1"), "{error:#}");
    Ok(())
}

/// Where neither native XDP nor TC works, the link in generic mode that an earlier agent has left gets
/// the new program: no other can be attached beside it.
#[test]
fn generic_stays_where_nothing_better_works() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let mut agent = Agent::start_with(&world.lab, &web(&[1]), &["--datapath", "xdp-generic"])?;
    let before = agent.wait_ready()?;
    let flows = PingPong::start(&world.lab.client, both(&before, ECHO)?[0], 2)?;
    flows.wait_exchanges(10)?;
    agent.kill();
    // What cannot be removed where the pin of TC is to be keeps TC from being attached.
    let links = world.lab.pin_directory().join(format!("v{ABI_VERSION}/links"));
    let mut in_the_way = Vec::new();
    for entry in fs::read_dir(&links)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if let Some(index) = name.strip_suffix("-generic") {
            in_the_way.push(links.join(format!("{index}-ingress")));
        }
    }
    assert_eq!(in_the_way.len(), 2, "one for each device");
    in_the_way.iter().try_for_each(fs::create_dir)?;
    agent.use_flags(&["--datapath", "auto"]);
    agent.run()?;
    let after = agent.wait_ready()?;
    assert_eq!(modes(&after)?, BTreeMap::from([("lan", "xdp-generic"), ("uplink", "xdp-generic")]));
    let programs = |status: &Value| -> Vec<_> {
        list(status, "devices").iter().filter_map(|device| device["programId"].as_u64()).collect()
    };
    let (before, after) = (programs(&before), programs(&after));
    assert!(before.len() == 2 && after.iter().all(|id| !before.contains(id)), "{before:?} {after:?}");
    flows.wait_exchanges(30)?;
    let report = flows.stop()?;
    assert!(report.broken.is_empty(), "{report:?}");
    in_the_way.iter().try_for_each(fs::remove_dir)?;
    assert!(agent.sigterm()?.success(), "{}", agent.log());
    Ok(())
}
