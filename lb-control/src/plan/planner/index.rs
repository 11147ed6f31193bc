//! Which slices and VirtualIPs belong to a Service.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

use super::service_of;
use crate::model::{EndpointSlice, Few, ObjectChange, ObjectRef, Objects};

/// By Service.
#[derive(Default)]
pub(super) struct Index {
    slices: HashMap<ObjectRef, Few<ObjectRef>>,
    virtual_ips: HashMap<ObjectRef, Few<IpAddr>>,
    unclaimed: BTreeSet<ObjectRef>,
}

impl Index {
    /// Follows a change. `objects` are as before it.
    pub(super) fn change(&mut self, change: &ObjectChange, objects: &Objects) {
        match change {
            ObjectChange::Slice(object, new) => {
                let old = objects.slices.get(object).and_then(|slice| service_of(slice));
                let owner = new.as_ref().and_then(|slice| service_of(slice));
                if new.is_some() && owner.is_none() {
                    self.unclaimed.insert(object.clone());
                } else {
                    self.unclaimed.remove(object);
                }
                if old != owner {
                    old.into_iter().for_each(|service| take(&mut self.slices, &service, object));
                    owner.into_iter().for_each(|service| put(&mut self.slices, service, object.clone()));
                }
            }
            ObjectChange::VirtualIp(address, new) => {
                let none = Few::default();
                let old = objects.virtual_ips.get(address).map_or(&none, |vip| &vip.services);
                let new = new.as_ref().map_or(&none, |vip| &vip.services);
                let gone = old.iter().filter(|service| !new.contains(service));
                gone.for_each(|service| take(&mut self.virtual_ips, service, address));
                let added = new.iter().filter(|service| !old.contains(service));
                added.for_each(|service| put(&mut self.virtual_ips, service.clone(), *address));
            }
            _ => {}
        }
    }

    /// A Service's slices, in the order of their names.
    pub(super) fn slices<'a>(
        &'a self,
        service: &ObjectRef,
        objects: &'a Objects,
    ) -> impl Iterator<Item = &'a EndpointSlice> {
        let names = self.slices.get(service).into_iter().flat_map(Few::iter);
        names.filter_map(|name| objects.slices.get(name)).map(AsRef::as_ref)
    }

    /// The addresses that VirtualIPs give to a Service.
    pub(super) fn virtual_ips(&self, service: &ObjectRef) -> impl Iterator<Item = IpAddr> {
        self.virtual_ips.get(service).into_iter().flat_map(Few::iter).copied()
    }

    /// Slices that say of no Service that they are its.
    pub(super) fn unclaimed(&self) -> impl Iterator<Item = &ObjectRef> {
        self.unclaimed.iter()
    }
}

fn put<V: Ord>(map: &mut HashMap<ObjectRef, Few<V>>, service: ObjectRef, value: V) {
    map.entry(service).or_default().insert(value);
}

fn take<V: Ord>(map: &mut HashMap<ObjectRef, Few<V>>, service: &ObjectRef, value: &V) {
    if let Some(values) = map.get_mut(service) {
        values.remove(value);
        if values.is_empty() {
            map.remove(service);
        }
    }
}
