//! Others who write the same status, and how not to fight them.

use std::{collections::BTreeMap, time::Duration};

use super::flights::pause;
use crate::model::{ObjectRef, Service};

/// After such a time without a quarrel the next one is the first again.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(900);

struct Quarrel {
    times: u32,
    last: Duration,
    until: Duration,
    /// Whether an Event told of it.
    is_told: bool,
}

/// Services whose status somebody else writes too.
#[derive(Default)]
pub(super) struct Rivals(BTreeMap<ObjectRef, Quarrel>);

impl Rivals {
    /// The API server refused what we apply, because the field belongs to somebody else. Says
    /// whether that is news.
    pub fn refused(&mut self, service: &ObjectRef, now: Duration) -> bool {
        let quarrel = self.count(service, now);
        quarrel.until = now + pause(quarrel.times);
        !std::mem::replace(&mut quarrel.is_told, true)
    }

    /// A Service that is ours changed. What we published and somebody took away is put back at once
    /// the first time, and ever later from then on. Says whether a rival is to be told of.
    pub fn observe(&mut self, old: &Service, new: &Service, now: Duration) -> bool {
        let lost =
            old.api.ingress_is_ours && !old.api.ingress.is_empty() && old.api.ingress != new.api.ingress;
        if lost {
            let quarrel = self.count(&new.object, now);
            quarrel.until = match quarrel.times {
                1 => now,
                times => now + pause(times - 1),
            };
            // Once may be a mishap.
            return quarrel.times > 1 && !std::mem::replace(&mut quarrel.is_told, true);
        }
        // It lets go of it by itself.
        if new.api.ingress.is_empty()
            && !old.api.ingress.is_empty()
            && let Some(quarrel) = self.0.get_mut(&new.object).filter(|quarrel| quarrel.times == 1)
        {
            quarrel.until = now;
        }
        false
    }

    /// Until when not to write its status.
    pub fn blocked(&self, service: &ObjectRef, now: Duration) -> Option<Duration> {
        self.0.get(service).map(|quarrel| quarrel.until).filter(|until| *until > now)
    }

    /// The Service is gone, or no longer ours.
    pub fn forget(&mut self, service: &ObjectRef) {
        self.0.remove(service);
    }

    fn count(&mut self, service: &ObjectRef, now: Duration) -> &mut Quarrel {
        let new = || Quarrel { times: 0, last: now, until: now, is_told: false };
        let quarrel = self.0.entry(service.clone()).or_insert_with(new);
        if now >= quarrel.last + FORGOTTEN_AFTER {
            *quarrel = new();
        }
        quarrel.times = quarrel.times.saturating_add(1);
        quarrel.last = now;
        quarrel
    }
}
