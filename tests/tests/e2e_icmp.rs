//! ICMP errors reach the host whose packets they are about.

use std::io::{ErrorKind, Read as _};

use anyhow::Result;
use pointsman_tests::{
    lab::{
        Options, is_proxied,
        manifest::{HTTP, UDP},
    },
    traffic::{
        client::{http_get, open},
        probe,
    },
    world::{World, both},
};

/// The only way for a backend to learn the MTU of the client's link is an ICMP error which the
/// router sends to the VIP.
#[test]
fn backends_learn_the_path_mtu() -> Result<()> {
    let Some(world) = World::with(Options { backends: 1, client_mtu: Some(1400), ..Options::default() })?
    else {
        return Ok(());
    };
    let (_agent, status) = world.web(&[1])?;
    for to in both(&status, HTTP)? {
        let body = world.lab.client.enter(|| http_get(to, "/bytes/200000"))??;
        assert_eq!(body.len(), 200_000);
        // The backend's peers are SNAT addresses: whichever they are, one route has been learned. The
        // proxy has sent the large segments itself.
        let sender = if is_proxied() { &world.lab.edge } else { &world.lab.backends[0] };
        let family = if to.is_ipv4() { "-4" } else { "-6" };
        let routes = sender.run(["ip", family, "route", "show", "cache"])?;
        assert!(routes.contains("mtu 1400"), "no path MTU of 1400 in:\n{routes}");
    }
    Ok(())
}

/// A backend whose server has died says so (port unreachable); its client hears it, about the VIP.
#[test]
fn a_client_hears_that_the_backends_port_is_closed() -> Result<()> {
    let Some(mut world) = World::new(1)? else { return Ok(()) };
    world.servers.clear();
    let (_agent, status) = world.web(&[1])?;
    for to in both(&status, UDP)? {
        let refusal = probe::udp(&world.lab.client, to)?;
        assert!(refusal.at_once(), "{to}: {refusal:?}");
    }
    for to in both(&status, HTTP)? {
        if is_proxied() {
            // It has accepted before it asks the backend, and says so as well as it still can: the reset
            // may come before the client's call returns.
            let read = world.lab.client.enter(|| open(to).and_then(|mut one| one.read(&mut [0; 1])))?;
            assert_eq!(read.map_err(|error| error.kind()).err(), Some(ErrorKind::ConnectionReset), "{to}");
        } else {
            let refusal = probe::tcp(&world.lab.client, to)?;
            assert!(refusal.at_once(), "{to}: {refusal:?}");
        }
    }
    Ok(())
}
