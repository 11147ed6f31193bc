//! What a Service entry asks of its clients: source ranges, connection rate limit and affinity.
//!
//! A packet must not see half of a change. The flag in the Service entry says whether the ranges
//! count, so they are written before it is set and removed after it is taken away; while it stays
//! set, what is new comes before what is old goes: a client that may connect before and after may
//! connect at every moment, and one that may not never can.

use std::{collections::BTreeSet, sync::Arc};

use ipnet::IpNet;
use lb_common::abi::{ConnectionLimit, ServiceFlags, Tick, ticks_from_seconds};

use super::{Batch, Compiler, Entry, Round};
use crate::{
    model::{DesiredEntry, ServiceKey},
    ports::{MapOp, Vip},
};

/// The flags of an entry.
pub(super) fn flags(desired: &DesiredEntry) -> u8 {
    let ranges = if desired.source_ranges.is_empty() { 0 } else { ServiceFlags::SOURCE_RANGES };
    let affinity = if desired.affinity.is_some() { ServiceFlags::AFFINITY } else { 0 };
    let rate = if desired.connection_limit.is_some() { ServiceFlags::CONNECTION_RATE } else { 0 };
    ranges | affinity | rate
}

/// Ranges in the form of the maps: without host bits, each once, those of the VIP's family.
fn normal(key: &ServiceKey, ranges: &[IpNet]) -> BTreeSet<IpNet> {
    let ours = |range: &&IpNet| range.addr().is_ipv4() == key.vip.is_ipv4();
    ranges.iter().filter(ours).map(IpNet::trunc).collect()
}

impl Compiler {
    /// Plans what has to be written before the entry is flipped to its flags; gives what has to be
    /// removed afterwards.
    pub(super) fn plan_clients(
        &self,
        key: &ServiceKey,
        desired: &DesiredEntry,
        entry: &mut Entry,
        batch: &mut Batch,
        round: &mut Round<'_>,
    ) -> Vec<MapOp> {
        let index = entry.index;
        let mut afterwards = Vec::new();
        let ticks = desired.affinity.map_or(0, ticks_from_seconds);
        self.set_timeout(index, ticks, if ticks == 0 { &mut afterwards } else { &mut batch.ops });
        let limit = desired.connection_limit.unwrap_or_default();
        let has_limit = desired.connection_limit.is_some();
        self.set_limit(index, limit, if has_limit { &mut batch.ops } else { &mut afterwards });
        if entry.settled_ranges.as_ref() == Some(&desired.source_ranges) {
            return afterwards;
        }
        let planned = batch.ops.len() + afterwards.len();
        let wanted = normal(key, &desired.source_ranges);
        let obsolete = self.actual.sources.of(index).filter(|range| !wanted.contains(range));
        let obsolete = obsolete.map(|range| MapOp::ForbidSource { service: index, range: *range });
        let vip = Vip::new(key.vip, key.port, key.protocol.number());
        let is_led_here = self.actual.vips.get(&vip) == Some(&index);
        if is_led_here && self.actual.service(index).has(ServiceFlags::SOURCE_RANGES) {
            afterwards.extend(obsolete);
        } else {
            // Remains that do not count yet must not do so for a moment once they could.
            batch.ops.extend(obsolete);
        }
        let is_complete = self.allow(key, index, &wanted, batch, round);
        let is_settled = is_complete && planned == batch.ops.len() + afterwards.len();
        entry.settled_ranges = is_settled.then(|| Arc::clone(&desired.source_ranges));
        afterwards
    }

    /// Plans to add the ranges that are missing, as many as there is room for; says whether that is
    /// all of them.
    fn allow(
        &self,
        key: &ServiceKey,
        index: u32,
        wanted: &BTreeSet<IpNet>,
        batch: &mut Batch,
        round: &mut Round<'_>,
    ) -> bool {
        let is_v4 = key.vip.is_ipv4();
        let (map, limit) = if is_v4 {
            ("src_ranges_v4", self.limits.source_ranges_v4)
        } else {
            ("src_ranges_v6", self.limits.source_ranges_v6)
        };
        let mut left_out = 0;
        for range in wanted.iter().filter(|range| !self.actual.sources.contains(index, range)) {
            let planned = &mut round.planned_ranges[usize::from(!is_v4)];
            if self.actual.sources.used(range) + *planned >= limit as usize {
                left_out += 1;
                continue;
            }
            *planned += 1;
            batch.ops.push(MapOp::AllowSource { service: index, range: *range });
        }
        if left_out > 0 {
            let text = format!(
                "the map {map} is full ({limit} entries): {left_out} of {} source ranges of {key} are left \
                 out, their clients are dropped; list fewer ranges or raise the limit",
                wanted.len()
            );
            round.short_of(key, text);
        }
        left_out == 0
    }

    /// Sets the timeout if it is another.
    fn set_timeout(&self, service: u32, ticks: Tick, ops: &mut Vec<MapOp>) {
        if self.actual.affinity_timeout(service) != ticks {
            ops.push(MapOp::SetAffinityTimeout { service, ticks });
        }
    }

    /// Sets the connection rate limit if it is another.
    fn set_limit(&self, service: u32, limit: ConnectionLimit, ops: &mut Vec<MapOp>) {
        if self.actual.connection_limit(service) != limit {
            ops.push(MapOp::SetConnectionLimit { service, limit });
        }
    }

    /// Removes all that an entry asks of its clients.
    pub(super) fn forget_clients(&self, service: u32, ops: &mut Vec<MapOp>) {
        ops.extend(
            self.actual.sources.of(service).map(|range| MapOp::ForbidSource { service, range: *range }),
        );
        self.set_timeout(service, 0, ops);
        self.set_limit(service, ConnectionLimit::default(), ops);
    }

    /// Removes what of that belongs to no entry.
    pub(super) fn forget_stray_clients(&self, is_stray: impl Fn(&u32) -> bool, ops: &mut Vec<MapOp>) {
        let timeouts = self.actual.affinity_timeouts.keys().copied();
        let limits = self.actual.connection_limits.keys().copied();
        let services: BTreeSet<u32> =
            self.actual.sources.services().chain(timeouts).chain(limits).filter(is_stray).collect();
        for service in services {
            self.forget_clients(service, ops);
        }
    }
}
