//! What is told when a node's tables have no room for established flows.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use pointsman_tests::{
    lab::{Options, in_kernel},
    traffic::client::connect,
};
use serde_json::json;

use super::kit::{ECHO, POOL, serve, wait_node_event, with};

/// A table has two entries for each of so many.
const ROOM: usize = 64;

#[test]
fn a_table_that_runs_full_is_told_until_it_has_room() -> Result<()> {
    let options = Options { backends: 1, ..Options::default() };
    let room = ROOM.to_string();
    let flags = [["--max-flows", &room].as_slice(), in_kernel()].concat();
    with(options, &flags, |world, agent| {
        world.pool(&POOL)?;
        let spec = json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"]});
        serve(world, "web", &[ECHO], &spec, &[1])?;
        let vip = SocketAddr::new(world.published("web", 1)?[0].ip(), ECHO.2);
        let streams: Vec<_> = (0..ROOM).map(|_| connect(&world.lab.client, vip)).collect::<Result<_>>()?;
        wait_node_event(world, "FlowTableNearlyFull")?;
        let status = agent.status()?;
        ensure!(status["problems"].to_string().contains("flows_v4 is nearly full"), "{status:#}");
        drop(streams);
        wait_node_event(world, "FlowTableHasRoom")
    })
}
