//! Objects that cannot be read.

use std::sync::Arc;

use super::World;
use crate::{
    model::{Concern, ObjectChange, ObjectRef, Unreadable},
    plan::controller::Command,
};

/// Something in an object cannot be read; `None`: it was mended.
fn unreadable(world: &mut World, name: &str, concern: Concern, reason: Option<&str>) {
    let object = ObjectRef::new("default", name);
    let value = reason.map(|reason| Unreadable {
        api_version: "v1".into(),
        kind: "Service",
        object: object.clone(),
        uid: "u".into(),
        concern,
        reasons: vec![reason.to_owned()],
    });
    world.server.put(ObjectChange::Unreadable(("Service", object), value.map(Arc::new)));
}

/// What Events say since the last call.
fn notes(world: &mut World) -> Vec<String> {
    world.calm();
    let commands = std::mem::take(&mut world.commands);
    let notes = commands.into_iter().filter_map(|command| match command {
        Command::Event { warning: true, note, .. } => Some(note),
        _ => None,
    });
    notes.collect()
}

#[test]
fn it_is_told_at_the_object_once_per_change() {
    let mut world = World::new(&["n1"]);
    unreadable(&mut world, "web", Concern::Class(None), Some("first"));
    assert_eq!(notes(&mut world), ["first"]);
    world.pass(60);
    assert!(notes(&mut world).is_empty(), "nothing new");
    unreadable(&mut world, "web", Concern::Class(None), Some("second"));
    assert_eq!(notes(&mut world), ["second"]);
    unreadable(&mut world, "web", Concern::Class(None), None);
    assert!(notes(&mut world).is_empty(), "it was mended");
}

#[test]
fn of_others_nothing_is_said() {
    let mut world = World::new(&["n1"]);
    world.service("ours");
    notes(&mut world);
    let of = |name: &str| Concern::Of(ObjectRef::new("default", name));
    for (name, concern, is_told) in [
        ("a", Concern::Always, true),
        ("b", Concern::Never, false),
        ("c", Concern::Class(Some(crate::model::LOAD_BALANCER_CLASS.into())), true),
        ("d", Concern::Class(Some("example.com/other".into())), false),
        ("e", of("ours"), true),
        ("f", of("theirs"), false),
    ] {
        unreadable(&mut world, name, concern, Some("bad"));
        assert_eq!(!notes(&mut world).is_empty(), is_told, "{name}");
    }
}
