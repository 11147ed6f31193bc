//! Whatever happens, in whatever order, with whatever goes wrong on the way.

use std::sync::Arc;

use proptest::prelude::*;

use super::{Fault, World};
use crate::model::{Node, ObjectChange, ObjectRef};

#[derive(Clone, Debug)]
enum Op {
    /// A Service comes or changes.
    Service(u8, &'static str),
    Delete(u8),
    Exclude(u8, bool),
    Agent(u8, bool),
    Pass(u8),
    Fault(Fault),
    /// A leader sees so many changes and decides.
    Lead(u8, u8),
    Act(u8),
    /// Another leader comes beside those that there are.
    Elect,
    Restart,
    Reset(u8),
}

const NODES: [&str; 3] = ["n0", "n1", "n2"];
const SHAPES: [&str; 6] = [
    "",
    "ip=192.0.2.1",
    "ip=192.0.2.2",
    "type=ClusterIP",
    "class=example.com/lb",
    "class=pointsman.dev/pointsman",
];

fn op() -> impl Strategy<Value = Op> {
    let fault = prop_oneof![Just(Fault::Lost), Just(Fault::AnswerLost), Just(Fault::Twice)];
    prop_oneof![
        5 => (0..6_u8, prop::sample::select(&SHAPES[..])).prop_map(|(index, shape)| Op::Service(index, shape)),
        2 => (0..6_u8).prop_map(Op::Delete),
        1 => (0..3_u8, any::<bool>()).prop_map(|(node, excluded)| Op::Exclude(node, excluded)),
        1 => (0..3_u8, any::<bool>()).prop_map(|(node, alive)| Op::Agent(node, alive)),
        1 => (1..30_u8).prop_map(Op::Pass),
        2 => fault.prop_map(Op::Fault),
        8 => (0..2_u8, 0..12_u8).prop_map(|(leader, changes)| Op::Lead(leader, changes)),
        4 => (0..3_u8).prop_map(Op::Act),
        1 => Just(Op::Elect),
        1 => Just(Op::Restart),
        1 => (0..2_u8).prop_map(Op::Reset),
    ]
}

fn run(world: &mut World, op: &Op) {
    match *op {
        Op::Service(index, shape) => {
            // Who shares does so always: commands of a leader that lags are judged by it.
            let share = if index < 3 { String::new() } else { format!("share=k ports={index}/TCP") };
            world.service(&format!("s{index} {shape} {share}"));
        }
        Op::Delete(index) => world.server.delete_service(&ObjectRef::new("default", format!("s{index}"))),
        Op::Exclude(index, excluded) => {
            let name = NODES[usize::from(index)].to_owned();
            let node = Node { name: name.clone(), excluded, ..Node::default() };
            world.server.put(ObjectChange::Node(name, Some(Arc::new(node))));
        }
        Op::Agent(index, alive) => {
            world.agents.get_mut(NODES[usize::from(index)]).unwrap().is_alive = alive;
            world.renew();
        }
        Op::Pass(seconds) => world.elapse(seconds.into()),
        Op::Fault(fault) => world.faults.push_back(fault),
        Op::Lead(leader, changes) => {
            let leader = usize::from(leader) % world.leaders.len();
            world.watch(leader, changes.into());
            world.decide(leader);
        }
        Op::Act(index) => drop(world.agent(NODES[usize::from(index)])),
        Op::Elect if world.leaders.len() < 2 => world.elect(),
        Op::Elect => {}
        Op::Restart => world.restart(),
        Op::Reset(leader) => {
            let leader = usize::from(leader) % world.leaders.len();
            world.leaders[leader].controller.reset();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Safety is checked with every command: see `Server::check` and `Server::check_before`.
    #[test]
    fn everything_comes_to_rest_where_it_belongs(ops in prop::collection::vec(op(), 1..60)) {
        let mut world = World::new(&NODES);
        world.pool("p 192.0.2.1-192.0.2.4");
        for op in &ops {
            run(&mut world, op);
        }
        // One leader wins, and everybody is well.
        world.faults.clear();
        world.leaders.truncate(1);
        for index in 0..3 {
            run(&mut world, &Op::Exclude(index, false));
            run(&mut world, &Op::Agent(index, true));
        }
        world.pass(700);
        world.server.check_at_rest(true);
        for virtual_ip in world.server.objects.virtual_ips.values() {
            prop_assert!(virtual_ip.node.is_some() && virtual_ip.node == virtual_ip.live_node, "{virtual_ip:?}");
            prop_assert_eq!(&virtual_ip.services, &virtual_ip.live);
        }

        world.commands.clear();
        let before = world.server.objects.clone();
        world.pass(400);
        prop_assert_eq!(world.commands.len(), 0, "{:?}", world.commands);
        world.restart();
        world.pass(60);
        prop_assert_eq!(world.events(), Vec::<String>::new());
        prop_assert_eq!(before.services, world.server.objects.services.clone());
        prop_assert_eq!(before.virtual_ips, world.server.objects.virtual_ips.clone());
    }
}
