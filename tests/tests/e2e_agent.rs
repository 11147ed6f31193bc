//! The agent ends, dies and comes back.

use std::fs;

use anyhow::Result;
use lb_control::dataplane::PinDirectory;
use pointsman_tests::{
    lab::{
        Agent, Lab,
        agent::list,
        is_proxied,
        manifest::{ECHO, HTTP, UDP},
        wait_for,
    },
    traffic::{
        client::{check_round_robin, who_answers},
        ping_pong::{PingPong, be_patient, retransmissions},
        probe,
        udp_flows::UdpFlows,
    },
    world::{World, both, web},
};
use serde_json::Value;

/// TCP segments that anybody in the lab has sent again.
fn lost(lab: &Lab) -> Result<u64> {
    lab.backends.iter().chain([lab.client.as_ref()]).map(retransmissions).sum()
}

/// The line of `ip` that names the XDP program of a device.
fn xdp(lab: &Lab, device: &str) -> Result<Option<String>> {
    let text = lab.edge.run(["ip", "-d", "link", "show", "dev", device])?;
    Ok(text.lines().find(|line| line.contains("prog/xdp")).map(str::to_owned))
}

fn addresses(lab: &Lab) -> Result<String> {
    lab.edge.run(["ip", "-o", "addr", "show", "dev", "uplink"])
}

fn agent_pid(status: &Value) -> Option<u64> {
    status["agent"]["pid"].as_u64()
}

#[test]
fn killed_and_started_again_no_packet_is_lost() -> Result<()> {
    let Some(world) = World::new(3)? else { return Ok(()) };
    for end in world.lab.backends.iter().chain([world.lab.client.as_ref()]) {
        be_patient(end)?;
    }
    let (mut agent, status) = world.web_in_kernel(&[1, 2, 3])?;
    let udp: Vec<UdpFlows> = both(&status, UDP)?
        .into_iter()
        .map(|to| UdpFlows::start(&world.lab.client, to, 3))
        .collect::<Result<_>>()?;
    let flows: Vec<PingPong> = both(&status, ECHO)?
        .into_iter()
        .map(|to| PingPong::start(&world.lab.client, to, 3))
        .collect::<Result<_>>()?;
    for _ in 0..3 {
        let before = agent_pid(&agent.wait_ready()?);
        agent.kill();
        for flows in &flows {
            flows.wait_exchanges(30)?;
        }
        for flows in &udp {
            flows.wait_exchanges(30)?;
        }
        // Connections are still taken with no agent there.
        check_round_robin(&who_answers(&world.lab.client, both(&status, HTTP)?[0], 6)?, 3)?;
        agent.run()?;
        agent.wait_status("the next agent", |status| agent_pid(status) != before)?;
        for flows in &flows {
            flows.wait_exchanges(30)?;
        }
        for flows in &udp {
            flows.wait_exchanges(30)?;
        }
    }
    for flows in flows {
        let report = flows.stop()?;
        assert!(report.broken.is_empty(), "{report:?}");
    }
    for flows in udp {
        flows.stop()?;
    }
    assert_eq!(lost(&world.lab)?, 0, "segments had to be sent again");
    Ok(())
}

#[test]
fn changes_made_while_it_was_dead_are_applied() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let (mut agent, status) = world.web(&[1])?;
    let [to, _] = both(&status, HTTP)?;
    agent.kill();
    agent.write_config(&web(&[2]))?;
    if is_proxied() {
        // Nobody listens at the VIP, which is still there: clients need not wait.
        assert!(probe::tcp(&world.lab.client, to)?.at_once());
    } else {
        assert_eq!(who_answers(&world.lab.client, to, 2)?, ["b1"; 2]);
    }
    agent.run()?;
    agent.wait_ready()?;
    assert_eq!(both(&agent.wait_ready()?, HTTP)?[0], to, "the VIP changed");
    assert_eq!(who_answers(&world.lab.client, to, 3)?, ["b2"; 3]);
    Ok(())
}

#[test]
fn sigterm_leaves_nothing_behind() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let before = addresses(&world.lab)?;
    let (mut agent, status) = world.web(&[1])?;
    let [to, to6] = both(&status, HTTP)?;
    let during = addresses(&world.lab)?;
    assert!(during.contains(&to.ip().to_string()) && during.contains(&to6.ip().to_string()), "{during}");
    if is_proxied() {
        assert!(!world.lab.pin_directory().exists(), "the proxy pins nothing");
    } else {
        let links = PinDirectory::new(&world.lab.pin_directory()).links();
        assert_eq!(fs::read_dir(links)?.count(), 2, "a link for each device");
    }
    let ended = agent.sigterm()?;
    assert!(ended.success(), "{ended}");
    assert_eq!(addresses(&world.lab)?, before);
    for device in ["uplink", "lan"] {
        // The kernel detaches by a work queue (kernel/bpf/syscall.c, bpf_link_put).
        wait_for("the XDP program to go", || Ok(xdp(&world.lab, device)?.is_none().then_some(())))?;
    }
    assert!(!world.lab.pin_directory().exists(), "pins are left");
    agent.run()?;
    agent.wait_ready()?;
    assert_eq!(who_answers(&world.lab.client, to, 1)?, ["b1"]);
    Ok(())
}

#[test]
fn an_address_of_the_user_stays() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    // The first address of the pool, and one outside of it.
    world.lab.edge.ip_batch("addr add 203.0.113.0/32 dev uplink\n addr add 192.0.2.77/32 dev uplink")?;
    let before = addresses(&world.lab)?;
    let (mut agent, _) = world.web(&[1])?;
    agent.write_config("")?;
    agent.wait_status("no Services", |status| list(status, "services").is_empty())?;
    let after = addresses(&world.lab)?;
    assert!(after.contains("203.0.113.0/32") && after.contains("192.0.2.77/32"), "{after}");
    agent.write_config(&web(&[1]))?;
    agent.wait_ready()?;
    agent.sigterm()?;
    assert_eq!(addresses(&world.lab)?, before);
    Ok(())
}

#[test]
fn programs_are_native() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let agent = Agent::start_with(&world.lab, &web(&[1]), &["--datapath", "auto"])?;
    let status = agent.wait_ready()?;
    let devices = list(&status, "devices");
    assert!(devices.len() == 2 && devices.iter().all(|device| device["mode"] == "xdp-native"), "{status:#}");
    for device in ["uplink", "lan"] {
        assert!(xdp(&world.lab, device)?.is_some());
    }
    Ok(())
}
