//! The userspace proxy: when it serves, change-overs, its end, what backends learn of clients.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::unix::{
        fs::{PermissionsExt, symlink},
        net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use lb_common::abi::ABI_VERSION;
use pointsman_tests::{
    lab::{
        Agent, Lab,
        agent::{Seat, list, wait_for},
        manifest::{ECHO, HTTP, Port, ServiceSpec, UDP, manifest, vip},
    },
    traffic::{
        Server,
        client::{
            check_round_robin, connect, http_name, tally, udp_exchange, udp_socket, who_answers,
            who_answers_udp,
        },
        load::Load,
        ping_pong::PingPong,
        probe,
    },
    world::{World, both, web, web_service},
};
use serde_json::Value;

const PROXY: &[&str] = &["--datapath", "proxy"];
const KERNEL: &[&str] = &["--datapath", "auto"];

fn start<'lab>(world: &'lab World, yaml: &str, flags: &[&str]) -> Result<(Agent<'lab>, Value)> {
    let agent = Agent::start_with(&world.lab, yaml, flags)?;
    let status = agent.wait_ready()?;
    Ok((agent, status))
}

/// How the link device is served, and why.
fn uplink(status: &Value) -> (String, String) {
    let device = list(status, "devices").iter().find(|device| device["device"] == "uplink");
    let text = |key: &str| device.and_then(|device| device[key].as_str()).unwrap_or_default().to_owned();
    (text("mode"), text("reason"))
}

/// Who serves the ports of a Service.
fn served_by(status: &Value, service: &str) -> Vec<String> {
    let services = list(status, "services").iter().filter(|found| found["name"] == service);
    let ports = services.flat_map(|service| list(service, "ports"));
    ports.map(|port| port["servedBy"].as_str().unwrap_or_default().to_owned()).collect()
}

/// A binary that lacks the right to load programs.
fn without_bpf(lab: &Lab) -> Result<PathBuf> {
    run_by(lab, "setpriv --bounding-set -bpf,-sys_admin,-perfmon")
}

/// The binary as another program runs it.
fn run_by(lab: &Lab, program: &str) -> Result<PathBuf> {
    let path = lab.directory().join("run-by");
    let binary = std::env::var("POINTSMAN_BIN").context("POINTSMAN_BIN")?;
    fs::write(&path, format!("#!/bin/sh\nexec {program} {binary} \"$@\"\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

fn goes_round(world: &World, status: &Value, backends: usize) -> Result<()> {
    for to in both(status, HTTP)? {
        check_round_robin(&who_answers(&world.lab.client, to, 3 * backends)?, backends)?;
    }
    for to in both(status, UDP)? {
        let names = who_answers_udp(&world.lab.client, to, 3 * backends)?;
        check_round_robin(&names, backends)?;
    }
    Ok(())
}

#[test]
fn where_the_kernel_refuses_programs_it_serves() -> Result<()> {
    let Some(world) = World::new(3)? else { return Ok(()) };
    let mut agent = Agent::start_from(&without_bpf(&world.lab)?, &world.lab, &web(&[1, 2, 3]), KERNEL)?;
    let status = agent.wait_ready()?;
    let (mode, reason) = uplink(&status);
    assert_eq!(mode, "proxy");
    assert!(
        reason.starts_with("this kernel cannot forward:") && reason.contains("pointsman doctor"),
        "{reason}"
    );
    assert!(served_by(&status, "web").iter().all(|by| by == "proxy"), "{status:#}");
    goes_round(&world, &status, 3)?;
    assert!(agent.sigterm()?.success());
    assert!(
        !world.lab.pin_directory().join("v4").exists()
            || fs::read_dir(world.lab.pin_directory())?.count() == 0
    );
    // Forced, it fails instead.
    agent.use_flags(&["--datapath", "tc"]);
    agent.run()?;
    assert!(!agent.ended()?.success());
    Ok(())
}

/// What the kernel lacked at the start comes while the agent runs: a file system for pins.
#[test]
fn a_kernel_that_can_forward_by_now_takes_over() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let (directory, pins) = (world.lab.directory(), world.lab.pin_directory());
    let plain = directory.join("plain");
    fs::create_dir_all(&plain)?;
    fs::create_dir_all(&pins)?;
    symlink(&plain, directory.join("pins"))?;
    let seat = Seat { pins: directory.join("pins/here"), ..world.lab.seat() };
    let agent = Agent::start_at(seat, &world.lab, &web(&[1, 2]), KERNEL)?;
    let status = agent.wait_ready()?;
    assert!(uplink(&status).1.contains("is not on a BPF file system"), "{status:#}");
    assert!(served_by(&status, "web").iter().all(|by| by == "proxy"), "{status:#}");
    let flows: Vec<_> = both(&status, ECHO)?
        .into_iter()
        .map(|to| PingPong::start(&world.lab.client, to, 2))
        .collect::<Result<_>>()?;
    symlink(&pins, directory.join("mounted"))?;
    fs::rename(directory.join("mounted"), directory.join("pins"))?;
    let status = agent.wait_status("the kernel", |status| uplink(status).0 == "xdp-native")?;
    assert!(served_by(&status, "web").iter().all(|by| by == "kernel"), "{status:#}");
    goes_round(&world, &status, 2)?;
    for flows in flows {
        flows.wait_exchanges(30)?;
        let report = flows.stop()?;
        assert!(report.broken.is_empty(), "{report:?}");
    }
    assert_eq!(agent.log().matches("this kernel cannot forward").count(), 1, "{}", agent.log());
    // Flow tables are swept, which needs the pins.
    agent.wait_status("a sweep", |status| !list(status, "flowTables").is_empty())?;
    Ok(())
}

#[test]
fn chosen_it_needs_nothing_in_the_kernel() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let (mut agent, status) = start(&world, &web(&[1, 2]), PROXY)?;
    assert_eq!(uplink(&status), ("proxy".into(), "by --datapath".into()));
    goes_round(&world, &status, 2)?;
    let pins = world.lab.pin_directory();
    assert!(!pins.exists() || fs::read_dir(&pins)?.next().is_none(), "pins are left");
    let wide = agent.cli(&["status", "-o", "wide"])?;
    assert!(wide.contains("proxy"), "{wide}");
    let counted = agent.status()?;
    let ports = list(&list(&counted, "services")[0], "ports").to_vec();
    let http = ports.iter().find(|port| port["name"] == "http").context("no port http")?;
    assert_eq!(http["counters"]["newFlows"], 6, "{http:#}");
    assert!(agent.sigterm()?.success());
    let left = world.lab.edge.run(["ip", "-o", "address", "show", "dev", "uplink"])?;
    let [to, _] = both(&status, HTTP)?;
    assert!(!left.contains(&to.ip().to_string()), "{left}");
    Ok(())
}

/// From the kernel to the proxy and back, by agents that follow one another, under load.
#[test]
fn change_overs_break_nothing() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let (mut agent, status) = start(&world, &web(&[1, 2]), KERNEL)?;
    assert!(served_by(&status, "web").iter().all(|by| by == "kernel"));
    let [http, _] = both(&status, HTTP)?;
    let load = Load::start(&world.lab.client, http, 2, u64::MAX);
    let mut flows = Vec::new();
    for (flags, by) in [(PROXY, "proxy"), (KERNEL, "kernel"), (PROXY, "proxy")] {
        for to in both(&status, ECHO)? {
            flows.push(PingPong::start(&world.lab.client, to, 3)?);
        }
        load.wait_requests(100).with_context(|| format!("before {by}"))?;
        let drain = ["--drain-seconds", "60"];
        agent.hand_over(&[flags, &drain].concat())?;
        agent.wait_status("the other path", |status| {
            !list(status, "services").is_empty() && served_by(status, "web").iter().all(|found| found == by)
        })?;
        load.wait_requests(200).with_context(|| format!("after {by}\n{}", agent.log()))?;
        for (number, flows) in flows.iter().enumerate() {
            flows.wait_exchanges(30).with_context(|| {
                let look = |line: &[&str]| world.lab.edge.run(line).unwrap_or_default();
                format!(
                    "{number} after {by}\n{}{}\n{}\n{}",
                    look(&["ss", "-tanpi"]),
                    agent.cli(&["flows"]).unwrap_or_default(),
                    agent.cli(&["drops"]).unwrap_or_default(),
                    agent.log()
                )
            })?;
        }
    }
    for flows in flows {
        let report = flows.stop()?;
        assert!(report.broken.is_empty(), "{report:?}");
    }
    let report = load.stop()?;
    assert!(report.errors.is_empty() && report.answers.len() == 2, "{report:?}\n{}", agent.log());
    Ok(())
}

/// Programs that an earlier agent has left stay for the flows that need them.
#[test]
fn what_the_kernel_has_is_finished_there() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let (mut agent, status) = start(&world, &web(&[1]), &["--datapath", "auto", "--on-exit", "keep"])?;
    let [to, _] = both(&status, ECHO)?;
    let flows = PingPong::start(&world.lab.client, to, 2)?;
    assert!(agent.sigterm()?.success());
    flows.wait_exchanges(20)?;
    agent.use_flags(PROXY);
    agent.run()?;
    let status = agent.wait_ready()?;
    assert!(served_by(&status, "web").iter().all(|by| by == "proxy"));
    goes_round(&world, &status, 1)?;
    flows.wait_exchanges(50)?;
    assert!(world.lab.pin_directory().join(format!("v{ABI_VERSION}/config")).exists(), "flows need it");
    assert!(flows.stop()?.broken.is_empty());
    Ok(())
}

/// What the agent says of itself at its port.
fn ready(lab: &Lab) -> Result<String> {
    let mut stream = lab.edge.enter(|| TcpStream::connect("127.0.0.1:9404"))??;
    stream.write_all(b"GET /readyz HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

#[test]
fn its_end_waits_for_connections_and_serves_meanwhile() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let flags = ["--datapath", "proxy", "--drain-seconds", "600", "--http-address", "[::]:9404"];
    let (mut agent, status) = start(&world, &web(&[1]), &flags)?;
    let ([echo, _], client) = (both(&status, ECHO)?, &world.lab.client);
    let mut stream = connect(client, echo)?;
    exchange(&mut stream)?;
    assert!(ready(&world.lab)?.contains("200"));
    agent.ask_to_end()?;
    agent.wait_log("serving until the proxy's connections have ended")?;
    assert!(ready(&world.lab)?.contains("503"), "it is about to end");
    // Whoever comes is served, and by the backends that there are now.
    exchange(&mut connect(client, echo)?)?;
    goes_round(&world, &status, 1)?;
    agent.write_config(&web(&[1, 2]))?;
    for to in both(&status, HTTP)? {
        wait_for("the new backend", || Ok((who_answers(client, to, 1)? == ["b2"]).then_some(())))?;
    }
    exchange(&mut stream)?;
    assert!(agent.status().is_ok(), "it waits");
    drop(stream);
    assert!(agent.ended()?.success());
    assert!(probe::tcp(client, echo)?.error.is_some(), "nobody serves");
    Ok(())
}

#[test]
fn its_end_takes_no_longer_than_told() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    for (seconds, is_asked_again) in [("0", false), ("2", false), ("600", true)] {
        let flags = ["--datapath", "proxy", "--drain-seconds", seconds];
        let (mut agent, status) = start(&world, &web(&[1]), &flags)?;
        let [to, _] = both(&status, ECHO)?;
        let mut stream = connect(&world.lab.client, to)?;
        exchange(&mut stream)?;
        agent.ask_to_end()?;
        if is_asked_again {
            agent.wait_log("for 600s at most")?;
            exchange(&mut stream)?;
            agent.ask_to_end()?;
        }
        assert!(agent.ended()?.success());
        let error = exchange(&mut stream).expect_err("it is reset").downcast::<std::io::Error>()?;
        assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
    }
    Ok(())
}

fn exchange(stream: &mut TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(b"ping")?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)?;
    ensure!(answer == *b"ping", "{answer:?}");
    Ok(())
}

/// An agent takes over, again and again, while clients connect without a pause.
#[test]
fn upgrades_refuse_nobody() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let (mut agent, status) = start(&world, &web(&[1, 2]), PROXY)?;
    let [http, http6] = both(&status, HTTP)?;
    let loads = [
        Load::start(&world.lab.client, http, 2, u64::MAX),
        Load::start(&world.lab.client, http6, 1, u64::MAX),
    ];
    let [echo, _] = both(&status, ECHO)?;
    for _ in 0..3 {
        let flows = PingPong::start(&world.lab.client, echo, 2)?;
        agent.hand_over(PROXY)?;
        agent.wait_ready()?;
        for load in &loads {
            load.wait_requests(100)?;
        }
        flows.wait_exchanges(30)?;
        assert!(flows.stop()?.broken.is_empty());
        assert!(agent.previous_ended()?.success());
    }
    for load in loads {
        let report = load.stop()?;
        assert!(report.errors.is_empty(), "{report:?}\n{}", agent.log());
    }
    Ok(())
}

/// More sockets than the agent could have twice.
#[test]
fn as_many_ports_as_there_can_be_are_handed_over() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let binary = run_by(&world.lab, "prlimit --nofile=1400")?;
    let service = |number: u16| {
        let ports: Vec<_> = (1000 + 100 * number..)
            .take(90)
            .map(|port| Port { name: format!("p{port}").leak(), protocol: "TCP", port, target: HTTP.target })
            .collect();
        ServiceSpec::new(&format!("many-{number}"), &ports, &[1])
    };
    let services: Vec<_> = (0..4).map(service).chain([web_service(&[1])]).collect();
    let mut agent = Agent::start_from(&binary, &world.lab, &manifest(&services), PROXY)?;
    let status = agent.wait_ready()?;
    let [http, _] = both(&status, HTTP)?;
    let load = Load::start(&world.lab.client, http, 1, u64::MAX);
    load.wait_requests(10)?;
    agent.hand_over(PROXY)?;
    agent.wait_ready()?;
    assert!(agent.previous_ended()?.success(), "{}", agent.log());
    load.wait_requests(10)?;
    let report = load.stop()?;
    assert!(report.errors.is_empty(), "{report:?}\n{}", agent.log());
    let last = services[3].ports[89];
    who_answers(&world.lab.client, vip(&status, "many-3", true, last)?, 1)?;
    Ok(())
}

/// Whoever asks to take over and then says no more, or does not even ask, holds up nothing.
#[test]
fn changes_are_followed_while_somebody_at_the_hand_over_is_silent() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let (agent, _) = start(&world, &web(&[1]), PROXY)?;
    let path = agent.socket().with_extension("sock.handover");
    let mut turn = 0;
    for request in [&b""[..], b"pointsman: take over\n"] {
        // On a busy machine its time may be up first.
        let is_waited_for = (0..5).try_fold(false, |is_waited_for, _| -> Result<bool> {
            if is_waited_for {
                return Ok(true);
            }
            let mut silent = UnixStream::connect(&path)?;
            silent.write_all(request)?;
            silent.read_exact(&mut vec![0; request.len().min(1)])?;
            turn += 1;
            let name = format!("late-{turn}");
            agent.write_config(&manifest(&[web_service(&[1]), ServiceSpec::new(&name, &[HTTP], &[1])]))?;
            agent.wait_status(&name, |status| {
                list(status, "services").iter().any(|one| one["name"] == name)
            })?;
            silent.set_nonblocking(true)?;
            let end = silent.read_to_end(&mut Vec::new());
            Ok(end.is_err_and(|error| error.kind() == ErrorKind::WouldBlock))
        })?;
        assert!(is_waited_for, "it was turned away before the change was followed\n{}", agent.log());
    }
    Ok(())
}

/// While something cannot be served, the agent before goes on accepting.
#[test]
fn the_one_before_waits_until_everything_is_served() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let blocker = world.lab.edge.enter(|| TcpListener::bind("[::]:99"))??;
    let port = Port { name: "late", protocol: "TCP", port: 99, target: HTTP.target };
    let yaml = manifest(&[web_service(&[1]), ServiceSpec::new("late", &[port], &[1])]);
    let mut agent = Agent::start_with(&world.lab, &yaml, PROXY)?;
    agent.kill();
    // The test is the agent before, and has no sockets to give.
    let path = agent.socket().with_extension("sock.handover");
    let _ = fs::remove_file(&path);
    let before = UnixListener::bind(&path)?;
    agent.use_flags(&[PROXY, &["--take-over"]].concat());
    agent.run()?;
    let (mut heir, _) = before.accept()?;
    heir.read_exact(&mut [0; b"pointsman: take over\n".len()])?;
    heir.write_all(b"{\"version\":1,\"drain_seconds\":1,\"sockets\":[]}\n")?;
    let mut said = [0];
    heir.read_exact(&mut said)?;
    assert_eq!(said, *b"+", "it has what there is");
    drop(before);
    fs::remove_file(&path)?;
    heir.write_all(b".")?;
    let status = agent.wait_status("a problem", |status| status.to_string().contains("listening on"))?;
    heir.set_nonblocking(true)?;
    let error = heir.read(&mut said).expect_err("it does not serve");
    assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
    heir.set_nonblocking(false)?;
    drop(blocker);
    heir.set_read_timeout(Some(Duration::from_secs(30)))?;
    heir.read_exact(&mut said)?;
    assert_eq!(said, *b"!", "it serves");
    who_answers(&world.lab.client, vip(&status, "late", false, port)?, 1)?;
    Ok(())
}

/// What a backend hears first: a header of the PROXY protocol, then the client's bytes.
fn first_bytes(world: &World, way: &str, flags: &[&str]) -> Result<Vec<(Vec<u8>, SocketAddr, IpAddr)>> {
    let listener = world.lab.backends[0].enter(|| TcpListener::bind("[::]:0"))??;
    let port = Port { name: "told", protocol: "TCP", port: 99, target: listener.local_addr()?.port() };
    let told = ServiceSpec::new("told", &[port], &[1]).annotated("pointsman.dev/client-address", way);
    let agent = Agent::start_with(&world.lab, &manifest(&[told, web_service(&[1])]), flags)?;
    let status = agent.wait_ready()?;
    assert_eq!(served_by(&status, "told"), ["proxy"; 2]);
    if flags == KERNEL {
        assert_eq!(served_by(&status, "web"), ["kernel"; 6], "others are the kernel's");
    }
    let mut heard = Vec::new();
    for v6 in [false, true] {
        let to = vip(&status, "told", v6, port)?;
        let mut stream = connect(&world.lab.client, to)?;
        stream.write_all(b"hello")?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let (mut accepted, peer) = listener.accept()?;
        let mut bytes = Vec::new();
        accepted.read_to_end(&mut bytes)?;
        accepted.write_all(b"answer")?;
        drop(accepted);
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        assert_eq!(answer, "answer");
        heard.push((bytes, stream.local_addr()?, peer.ip()));
    }
    Ok(heard)
}

#[test]
fn backends_are_told_who_the_client_is() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    for (flags, [(v4, client, _), (v6, client6, _)]) in
        [(PROXY, first_bytes(&world, "proxy-v1", PROXY)?), (KERNEL, first_bytes(&world, "proxy-v1", KERNEL)?)]
            .map(|(flags, heard)| (flags, <[_; 2]>::try_from(heard).expect("both families")))
    {
        let text = String::from_utf8(v4)?;
        let expected = format!("PROXY TCP4 {} ", client.ip());
        assert!(text.starts_with(&expected) && text.ends_with(" 99\r\nhello"), "{flags:?} {text:?}");
        assert!(text.contains(&format!(" {} 99\r\n", client.port())), "{text:?}");
        let text = String::from_utf8(v6)?;
        assert!(text.starts_with(&format!("PROXY TCP6 {} ", client6.ip())), "{text:?}");
    }
    let heard = first_bytes(&world, "proxy-v2", PROXY)?;
    for ((bytes, client, _), (family, length)) in heard.iter().zip([(0x11, 12), (0x21, 36)]) {
        // The PROXY protocol, section 2.2: signature, version and command, family and protocol, length.
        assert_eq!(bytes[..12], *b"\r\n\r\n\0\r\nQUIT\n");
        assert_eq!(
            (bytes[12], bytes[13], u16::from_be_bytes([bytes[14], bytes[15]])),
            (0x21, family, length)
        );
        let source = match client.ip() {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        assert_eq!(bytes[16..16 + source.len()], source);
        assert_eq!(bytes[16 + usize::from(length)..], *b"hello");
    }
    Ok(())
}

/// Behind a router whose next link takes less than the client's: the client hears of it, and what it sends
/// arrives from then on.
#[test]
fn a_client_of_udp_learns_the_mtu_of_the_way() -> Result<()> {
    const MTU: usize = 1_400;
    let Some(world) = World::new(2)? else { return Ok(()) };
    let outside = world.lab.behind_second_backend(MTU.try_into()?)?;
    let _server = Server::start(&outside)?;
    let yaml = web(&[2]).replace("10.2.0.12", "10.7.0.2").replace("fd02::12", "fd07::2");
    let (agent, status) = start(&world, &yaml, PROXY)?;
    let client = &world.lab.client;
    for to in both(&status, UDP)? {
        let family = if to.is_ipv4() { "-4" } else { "-6" };
        let socket = client.enter(|| udp_socket(to))??;
        assert_eq!(udp_exchange(&socket, b"small")?, "outside");
        // Once is enough: the proxy's kernel makes fragments of what comes later.
        socket.send(&[b'f'; MTU])?;
        wait_for("the client to learn the MTU", || {
            let routes = client.run(["ip", family, "route", "show", "cache"])?;
            Ok(routes.contains(&format!("mtu {MTU}")).then_some(()))
        })?;
        // As a client that was told may be by the next call.
        let _ = socket.take_error()?;
        assert_eq!(udp_exchange(&socket, &[b'f'; MTU])?, "outside");
    }
    // The sessions have gone on.
    let ports = list(&list(&agent.status()?, "services")[0], "ports").to_vec();
    let udp = ports.iter().filter(|port| port["protocol"] == "UDP");
    let sessions: Vec<_> = udp.map(|port| port["counters"]["newFlows"].as_u64()).collect();
    assert_eq!(sessions, [Some(1), Some(1)], "{ports:#?}");
    Ok(())
}

#[test]
fn a_dead_backend_is_passed_over() -> Result<()> {
    let Some(World { mut servers, lab }) = World::new(3)? else { return Ok(()) };
    let servers_left = servers.split_off(2);
    let dying = servers.pop();
    let world = World { servers, lab };
    let (_agent, status) = start(&world, &web(&[1, 2, 3]), PROXY)?;
    let [to, _] = both(&status, HTTP)?;
    drop(dying);
    // Refused by its host at once: the next one gets the connection.
    let names = who_answers(&world.lab.client, to, 12)?;
    let tally = tally(&names);
    assert_eq!(tally.len(), 2, "{tally:?}");
    drop(servers_left);
    Ok(())
}

#[test]
fn fifty_thousand_short_connections_without_an_error() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let (_agent, status) = start(&world, &web(&[1, 2]), PROXY)?;
    let [to, _] = both(&status, HTTP)?;
    let report = Load::start(&world.lab.client, to, 4, 50_000).finish()?;
    assert!(report.errors.is_empty(), "{report:?}");
    let answers: usize = report.answers.values().copied().sum();
    assert_eq!(answers, 50_000, "{report:?}");
    let name = world.lab.client.enter(|| http_name(to))??;
    assert!(!name.is_empty());
    Ok(())
}

/// The link device is replaced by one that programs cannot be attached to, and comes back.
#[test]
fn a_device_that_programs_cannot_serve_is_served_until_it_is_replaced() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let (agent, status) = start(&world, &web(&[1, 2]), KERNEL)?;
    let edge = &world.lab.edge;
    edge.ip_batch("link set uplink name other\ntuntap add uplink mode tun\nlink set uplink up\n")?;
    let status_then = agent.wait_status("the proxy", |status| uplink(status).0 == "proxy")?;
    assert!(uplink(&status_then).1.contains("no Ethernet device"), "{status_then:#}");
    goes_round(&world, &status, 2)?;
    let flows: Vec<_> = both(&status, ECHO)?
        .into_iter()
        .map(|to| PingPong::start(&world.lab.client, to, 2))
        .collect::<Result<_>>()?;
    edge.ip_batch("link delete uplink\nlink set other name uplink\n")?;
    agent.wait_status("the kernel", |status| uplink(status).0 == "xdp-native")?;
    for flows in &flows {
        flows.wait_exchanges(30)?;
    }
    for to in both(&status, HTTP)? {
        check_round_robin(&who_answers(&world.lab.client, to, 4)?, 2)?;
    }
    assert!(served_by(&agent.status()?, "web").iter().all(|by| by == "kernel"));
    for flows in flows {
        let report = flows.stop()?;
        assert!(report.broken.is_empty(), "{report:?}");
    }
    Ok(())
}
