//! What entries remember of clients, within what all of them together may.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use crate::plan::Recent;

/// So many clients are remembered for an entry, for affinity and for the limit of connections each.
const OF_AN_ENTRY: usize = 65_536;
/// So many are over all entries, at about a hundred bytes, before each gets no more than its share.
const OF_ALL: usize = 1 << 19;
/// A share is no less.
const LEAST: usize = 64;

/// What all entries remember.
#[derive(Debug)]
pub struct Room {
    all: usize,
    remembered: AtomicUsize,
    /// Entries that remember anybody; one that does for both counts twice.
    holders: AtomicUsize,
}

/// Clients that an entry remembers: those who came last, as far as there is room.
#[derive(Debug)]
pub struct Clients<V: Copy> {
    room: Arc<Room>,
    recent: Recent<IpAddr, V>,
}

impl Default for Room {
    fn default() -> Self {
        Self::new(OF_ALL)
    }
}

impl Room {
    /// For `all` clients; for up to twice as many while some entries have more than their share, and a few of
    /// each entry.
    #[must_use]
    pub fn new(all: usize) -> Self {
        Self { all, remembered: AtomicUsize::new(0), holders: AtomicUsize::new(0) }
    }

    /// Clients that are remembered.
    #[must_use]
    pub fn remembered(&self) -> usize {
        self.remembered.load(Relaxed)
    }

    /// How many one entry may remember. Entries that are not written to keep what they have, also when there
    /// are more to share with.
    fn share(&self) -> usize {
        match self.remembered() {
            few if few < self.all => OF_AN_ENTRY,
            many if many < 2 * self.all => {
                (self.all / self.holders.load(Relaxed).max(1)).clamp(LEAST, OF_AN_ENTRY)
            }
            _ => LEAST,
        }
    }

    fn counts(&self, before: usize, after: usize) {
        if after >= before {
            self.remembered.fetch_add(after - before, Relaxed);
        } else {
            self.remembered.fetch_sub(before - after, Relaxed);
        }
        match (before, after) {
            (0, 1..) => drop(self.holders.fetch_add(1, Relaxed)),
            (1.., 0) => drop(self.holders.fetch_sub(1, Relaxed)),
            _ => {}
        }
    }
}

impl<V: Copy> Clients<V> {
    /// Nobody yet.
    #[must_use]
    pub fn new(room: &Arc<Room>) -> Self {
        Self { room: Arc::clone(room), recent: Recent::new(OF_AN_ENTRY) }
    }

    /// What was written last.
    #[must_use]
    pub fn get(&self, client: &IpAddr) -> Option<V> {
        self.recent.get(client)
    }

    /// Remembers a client.
    pub fn insert(&mut self, client: IpAddr, value: V, now: Duration) {
        let share = self.room.share();
        self.change(|recent| recent.insert_among(share, client, value, now));
    }

    /// Forgets those who were not seen for `time`; all of them without it.
    pub fn age(&mut self, time: Option<Duration>, now: Duration) {
        self.change(|recent| match time {
            Some(time) => recent.age(time, now),
            None => recent.clear(),
        });
    }

    fn change(&mut self, what: impl FnOnce(&mut Recent<IpAddr, V>)) {
        let before = self.recent.len();
        what(&mut self.recent);
        self.room.counts(before, self.recent.len());
    }
}

impl<V: Copy> Drop for Clients<V> {
    fn drop(&mut self) {
        self.room.counts(self.recent.len(), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    fn client(number: usize) -> IpAddr {
        Ipv6Addr::from(number as u128).into()
    }

    /// Whoever makes up clients forgets its own, and leaves others theirs.
    #[test]
    fn all_together_have_room_for_so_many() {
        let room = Arc::new(Room::new(10_000));
        let mut entries: Vec<_> = (0..50).map(|_| Clients::new(&room)).collect();
        let mut calm = Clients::new(&room);
        (0..100).for_each(|number| calm.insert(client(number), number, Duration::ZERO));
        for entry in &mut entries {
            for number in 0..20_000 {
                entry.insert(client(number), number, Duration::ZERO);
                assert_eq!(entry.get(&client(number)), Some(number));
            }
            assert!(room.remembered() <= 2 * 10_000 + 50 * LEAST, "{}", room.remembered());
        }
        assert!((0..100).all(|number| calm.get(&client(number)) == Some(number)));
        entries.clear();
        assert_eq!((room.remembered(), room.holders.load(Relaxed)), (100, 1));
        calm.age(None, Duration::ZERO);
        assert_eq!((room.remembered(), room.holders.load(Relaxed)), (0, 0));
    }
}
