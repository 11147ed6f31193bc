//! Source ranges by the thousand: who is let in, and what happens when the maps have no room for them.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use pointsman_tests::{
    cluster_world::ClusterWorld,
    lab::{Options, in_kernel},
    traffic::ping_pong::PingPong,
};
use serde_json::json;

use super::kit::{
    ECHO, HTTP, POOL, ask, cluster, condition, eventually, read, serve, service, silent, wait_condition,
    wait_event, with,
};

/// Of each family.
const MANY: u16 = 3_000;
/// Writing them takes far less; neither a list that is written again nor another Service waits longer.
const BOUND: Duration = Duration::from_secs(15);

/// Ranges that the client (10.1.0.2, fd01::2) is not in, of both families; `shift` tells lists apart.
fn others(count: u16, shift: u16) -> Vec<String> {
    let numbers = (0..count).map(|n| (n + shift).to_be_bytes());
    let both = numbers.flat_map(|[high, low]| {
        let v4 = Ipv4Addr::new(172, 16 + high / 16, high % 16 * 16, low);
        let v6 = Ipv6Addr::new(0x2001, 0xdb8, u16::from(high), u16::from(low), 0, 0, 0, 0);
        [format!("{v4}/32"), format!("{v6}/64")]
    });
    both.collect()
}

/// The others, and the client's own of some families.
fn list(count: u16, shift: u16, own: &[&str]) -> Vec<String> {
    let mut all = others(count, shift);
    for (n, one) in own.iter().enumerate() {
        // Neither first nor last.
        all.insert(all.len() / 2 + n, (*one).to_owned());
    }
    all
}

fn set(world: &ClusterWorld, name: &str, ranges: &[String]) -> Result<()> {
    service(world, name, &[HTTP, ECHO], &json!({}), &json!({"loadBalancerSourceRanges": ranges}))
}

fn of_family(vips: &[SocketAddr], v6: bool) -> Result<SocketAddr> {
    vips.iter().find(|vip| vip.is_ipv6() == v6).copied().context("an address of this family")
}

#[test]
fn thousands_are_set_replaced_and_cleared() -> Result<()> {
    cluster(1, |world, agent| {
        world.pool(&POOL)?;
        let (own_v4, own_v6) = ("10.1.0.2/32", "fd01::/64");
        let spec = json!({"loadBalancerSourceRanges": list(MANY, 0, &[own_v4])});
        serve(world, "web", &[HTTP, ECHO], &spec, &[1])?;
        let vips = world.published("web", 2)?;
        let (v4, v6) = (of_family(&vips, false)?, of_family(&vips, true)?);
        // The first status that shows an address is one behind which all ranges hold.
        silent(world, v6)?;
        ask(world, v4)?;
        let flow = PingPong::start(&world.lab.client, SocketAddr::new(v4.ip(), ECHO.2), 1)?;

        // One more among thousands, then others altogether.
        let mut started = Instant::now();
        for (shift, own, open, closed) in [
            (0, [own_v4, own_v6].as_slice(), [v4, v6].as_slice(), [].as_slice()),
            (MANY, &[own_v6], &[v6], &[v4]),
            (MANY / 2, &[], &[], &[v4, v6]),
        ] {
            set(world, "web", &list(MANY, shift, own))?;
            for vip in open {
                eventually("to be let in", || ask(world, *vip))?;
            }
            for vip in closed {
                eventually("to be shut out", || silent(world, *vip))?;
            }
            ensure!(started.elapsed() < BOUND, "{:?}", started.elapsed());
            started = Instant::now();
        }
        // Whoever was let in stays; ranges are about new connections.
        flow.wait_exchanges(5)?;
        let report = flow.stop()?;
        ensure!(report.broken.is_empty(), "{report:?}");

        set(world, "web", &[])?;
        for vip in vips {
            eventually("everybody to be let in", || ask(world, vip))?;
        }
        ensure!(started.elapsed() < BOUND, "{:?}", started.elapsed());
        let problems = agent.status()?["problems"].clone();
        ensure!(problems.as_array().is_some_and(Vec::is_empty), "{problems:#}");
        Ok(())
    })
}

/// A list that there is no room for is closed to those that are left out, is told, and heals; what
/// others have stays.
#[test]
fn a_list_without_room_is_closed_and_told() -> Result<()> {
    let options = Options { backends: 1, ..Options::default() };
    // The room is that of a map.
    let flags = [["--max-source-ranges=500"].as_slice(), in_kernel()].concat();
    with(options, &flags, |world, agent| {
        world.pool(&POOL)?;
        let few = json!({"loadBalancerSourceRanges": list(100, 5_000, &["10.1.0.0/24", "fd01::/64"])});
        serve(world, "small", &[HTTP], &few, &[1])?;
        let small = world.published("small", 2)?;
        serve(world, "big", &[HTTP], &json!({}), &[1])?;
        let big = world.published("big", 2)?;
        for vip in small.iter().chain(&big) {
            ask(world, *vip)?;
        }

        let others = list(MANY, 0, &[]);
        service(world, "big", &[HTTP], &json!({}), &json!({"loadBalancerSourceRanges": others}))?;
        wait_event(world, "big", "NodeCannotServe")?;
        wait_condition(world, "big", "Announced", ("False", "NotServed"))?;
        for vip in &big {
            eventually("it to be closed", || silent(world, *vip))?;
        }
        let status = agent.wait_status("a problem", |status| {
            let text = status["problems"].to_string();
            text.contains("src_ranges_v4 is full (500 entries)") && text.contains("raise the limit")
        })?;
        ensure!(status["problems"].to_string().contains("/big"), "{:#}", status["problems"]);
        for vip in &small {
            ask(world, *vip)?;
        }

        service(world, "big", &[HTTP], &json!({}), &few)?;
        for vip in &big {
            eventually("it to be open to the client", || ask(world, *vip))?;
        }
        ensure!(world.published("big", 2)? == big, "other addresses");
        wait_condition(world, "big", "Announced", ("True", "Announced"))?;
        ensure!(condition(&read(world, "small")?, "Announced")["status"] == "True");
        Ok(())
    })
}
