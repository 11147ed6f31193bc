//! Real TCP and UDP through the load balancer, IPv4 and IPv6.

use std::{sync::Arc, thread};

use anyhow::Result;
use pointsman_tests::{
    lab::manifest::{ECHO, HTTP, UDP},
    traffic::{
        bulk,
        client::{
            check_round_robin, connect, half_close, tally, udp_exchange, udp_socket, who_answers,
            who_answers_udp,
        },
        load::Load,
    },
    world::{World, both},
};

#[test]
fn tcp_goes_round_exactly() -> Result<()> {
    let Some(world) = World::new(3)? else { return Ok(()) };
    let (_agent, status) = world.web(&[1, 2, 3])?;
    for to in both(&status, HTTP)? {
        check_round_robin(&who_answers(&world.lab.client, to, 30)?, 3)?;
    }
    Ok(())
}

#[test]
fn udp_goes_round_exactly_and_a_socket_stays_with_its_backend() -> Result<()> {
    let Some(world) = World::new(3)? else { return Ok(()) };
    let (_agent, status) = world.web(&[1, 2, 3])?;
    for to in both(&status, UDP)? {
        check_round_robin(&who_answers_udp(&world.lab.client, to, 30)?, 3)?;
        let socket = world.lab.client.enter(|| udp_socket(to))??;
        let first = udp_exchange(&socket, b"first")?;
        for _ in 0..10 {
            assert_eq!(udp_exchange(&socket, b"again")?, first);
        }
    }
    Ok(())
}

#[test]
fn shares_are_exact_over_many_cpus_and_threads() -> Result<()> {
    let Some(world) = World::new(3)? else { return Ok(()) };
    let (_agent, status) = world.web(&[1, 2, 3])?;
    let [to, _] = both(&status, HTTP)?;
    let report = Load::start(&world.lab.client, to, 8, 600).finish()?;
    assert!(report.errors.is_empty(), "{report:?}");
    assert!(report.answers.values().eq([&200; 3]), "{report:?}");
    Ok(())
}

#[test]
fn a_gibibyte_each_way_is_intact() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let (_agent, status) = world.web(&[1])?;
    for (seed, to) in (1..).zip(both(&status, ECHO)?) {
        assert_eq!(bulk::echo(&connect(&world.lab.client, to)?, 1 << 30, seed)?, "b1");
    }
    Ok(())
}

#[test]
fn half_closed_connections_go_on() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let (_agent, status) = world.web(&[1, 2])?;
    for to in both(&status, ECHO)? {
        for size in [1, 1_000, 1_000_000] {
            let stream = connect(&world.lab.client, to)?;
            let payload = vec![b'x'; size];
            if size < 100_000 {
                half_close(&stream, &payload)?;
            } else {
                // Too much to be written before anything is read.
                bulk::echo(&stream, size as u64, 3)?;
            }
        }
    }
    Ok(())
}

#[test]
fn ten_thousand_short_connections_without_an_error() -> Result<()> {
    let Some(world) = World::new(3)? else { return Ok(()) };
    let (_agent, status) = world.web(&[1, 2, 3])?;
    let client = Arc::clone(&world.lab.client);
    let loads: Vec<_> =
        both(&status, HTTP)?.into_iter().map(|to| Load::start(&client, to, 4, 5_000)).collect();
    for load in loads {
        let report = load.finish()?;
        assert!(report.errors.is_empty(), "{report:?}");
        assert_eq!(report.answers.values().sum::<usize>(), 5_000, "{report:?}");
    }
    Ok(())
}

#[test]
fn fragmented_datagrams_arrive_both_ways() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let (_agent, status) = world.web(&[1, 2])?;
    for to in both(&status, UDP)? {
        let names: Result<Vec<String>> = (0..6)
            .map(|_| udp_exchange(&world.lab.client.enter(|| udp_socket(to))??, &[b'f'; 3000]))
            .collect();
        assert_eq!(tally(&names?).len(), 2);
    }
    Ok(())
}

#[test]
fn many_streams_at_once() -> Result<()> {
    let Some(world) = World::new(3)? else { return Ok(()) };
    let (_agent, status) = world.web(&[1, 2, 3])?;
    let [to, _] = both(&status, ECHO)?;
    let streams = (0..9).map(|_| connect(&world.lab.client, to)).collect::<Result<Vec<_>>>()?;
    let names: Result<Vec<String>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(&streams)
            .map(|(seed, stream)| scope.spawn(move || bulk::echo(stream, 3_000_000, seed)))
            .collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow::anyhow!("panicked"))?).collect()
    });
    assert!(tally(&names?).values().eq([&3; 3]));
    Ok(())
}
