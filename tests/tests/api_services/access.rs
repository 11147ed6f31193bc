//! Who may come, and to whom clients come back.

use std::{net::SocketAddr, thread, time::Duration};

use anyhow::{Result, ensure};
use pointsman_tests::{
    cluster_world::ClusterWorld,
    traffic::client::{check_round_robin, who_answers},
};
use serde_json::{Value, json};

use super::kit::{HTTP, POOL, ask, cluster, eventually, serve, service, silent, sticks};

fn ranges(world: &ClusterWorld, ranges: &[&str]) -> Result<()> {
    let spec = if ranges.is_empty() { json!({}) } else { json!({"loadBalancerSourceRanges": ranges}) };
    service(world, "web", &[HTTP], &json!({}), &spec)
}

/// "should only allow access from service loadbalancer source ranges": set, replaced, cleared. The
/// client is 10.1.0.2 and fd01::2.
#[test]
fn source_ranges_are_set_replaced_and_cleared() -> Result<()> {
    cluster(1, |world, _| {
        world.pool(&POOL)?;
        serve(world, "web", &[HTTP], &json!({"loadBalancerSourceRanges": ["10.1.0.2/32"]}), &[1])?;
        let vips = world.published("web", 2)?;
        let v4 = vips.iter().find(|vip| vip.is_ipv4()).copied().unwrap_or(vips[0]);
        let v6 = vips.iter().find(|vip| vip.is_ipv6()).copied().unwrap_or(vips[0]);
        let allows = |what: &str, allowed: SocketAddr, denied: SocketAddr| -> Result<()> {
            eventually(what, || silent(world, denied))?;
            ask(world, allowed).map(drop)
        };
        // The first status that shows an address is one behind which the ranges hold.
        silent(world, v6)?;
        ask(world, v4)?;
        ranges(world, &["fd01::/64", "10.9.0.0/16"])?;
        eventually("IPv6 to be let in", || ask(world, v6))?;
        allows("IPv6 alone", v6, v4)?;
        ranges(world, &["10.1.0.0/24", "10.1.0.0/30", "2001:db8:aaaa::/48"])?;
        eventually("IPv4 to be let in", || ask(world, v4))?;
        allows("IPv4 alone", v4, v6)?;
        ranges(world, &[])?;
        for vip in vips {
            eventually("everybody to be let in", || ask(world, vip))?;
        }
        Ok(())
    })
}

fn affinity(world: &ClusterWorld, spec: &Value) -> Result<()> {
    service(world, "web", &[HTTP], &json!({}), spec)
}

/// "should have session affinity work", "should be able to switch session affinity".
#[test]
fn session_affinity_is_switched() -> Result<()> {
    cluster(3, |world, _| {
        world.pool(&POOL)?;
        serve(world, "web", &[HTTP], &json!({"sessionAffinity": "ClientIP"}), &[1, 2, 3])?;
        for vip in world.published("web", 2)? {
            sticks(world, vip)?;
            affinity(world, &json!({}))?;
            eventually("turns", || check_round_robin(&who_answers(&world.lab.client, vip, 9)?, 3))?;
            affinity(world, &json!({"sessionAffinity": "ClientIP"}))?;
            let first = eventually("one backend", || sticks(world, vip))?;
            ensure!(sticks(world, vip)? == first, "another backend than {first}");
        }
        Ok(())
    })
}

#[test]
fn session_affinity_ends_with_its_timeout() -> Result<()> {
    cluster(3, |world, _| {
        world.pool(&POOL)?;
        let seconds = |seconds: u32| {
            json!({
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}},
            })
        };
        serve(world, "web", &[HTTP], &seconds(2), &[1, 2, 3])?;
        let vip = world.published("web", 2)?[0];
        let first = sticks(world, vip)?;
        let mut others = 0;
        for _ in 0..3 {
            // The time itself is what is tested; each request begins it anew.
            thread::sleep(Duration::from_millis(2_500));
            others += usize::from(ask(world, vip)? != first);
        }
        ensure!(others > 0, "{first} after each pause of more than the timeout");
        Ok(())
    })
}
