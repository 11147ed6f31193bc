//! The maps of one address family on the host.

use std::cell::{RefCell, UnsafeCell};
use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

use lb_common::abi::{
    Affinity, AffinityKey, CachedFlow, ConnectionRate, Flow, FlowKey, Fragment, FragmentKey, NextHop, VipKey,
};
use lb_common::forward::scratch::Scratch;

use crate::kit::ranges::Ranges;
use crate::kit::tables::Snapshot;

type FlowTable<A> = RefCell<HashMap<FlowKey<A>, Shared<Flow<A>>>>;

/// The maps of one family.
pub struct Family<A, P> {
    pub(super) established: FlowTable<A>,
    pub(super) transient: FlowTable<A>,
    aside: FlowTable<A>,
    /// How many established flow entries there is room for.
    pub capacity: usize,
    /// VIPs.
    pub vips: HashMap<VipKey<A>, u32>,
    pub(super) fragments: RefCell<HashMap<FragmentKey<A>, Rc<Fragment<A>>>>,
    /// Who may connect.
    pub sources: Ranges<A>,
    pub(super) affinity: RefCell<HashMap<AffinityKey<A>, Shared<Affinity>>>,
    pub(super) rates: RefCell<HashMap<AffinityKey<A>, Shared<ConnectionRate>>>,
    /// Next hops by destination: what `bpf_fib_lookup` would say.
    pub routes: BTreeMap<A, NextHop>,
    pub(super) scratch: Box<UnsafeCell<Scratch<A>>>,
    pub(super) cache: Vec<UnsafeCell<CachedFlow<A, P>>>,
}

impl<A: Copy + Ord + Hash, P: Copy> Family<A, P> {
    pub(super) fn new(address: A) -> Self {
        Self {
            established: RefCell::default(),
            transient: RefCell::default(),
            aside: RefCell::default(),
            capacity: usize::MAX,
            vips: HashMap::new(),
            fragments: RefCell::default(),
            sources: Ranges::default(),
            affinity: RefCell::default(),
            rates: RefCell::default(),
            routes: BTreeMap::new(),
            scratch: Box::new(UnsafeCell::new(Scratch::new(address))),
            cache: Vec::new(),
        }
    }

    /// Makes room for as many copies of flows, all of them nobody's: `nothing` is one of those.
    pub(super) fn set_cache(&mut self, slots: u32, nothing: CachedFlow<A, P>) {
        self.cache = (0..slots).map(|_| UnsafeCell::new(nothing)).collect();
    }

    /// All that is remembered.
    pub fn snapshot(&self) -> Snapshot<A> {
        let copy = |table: &FlowTable<A>| table.borrow().iter().map(|(key, flow)| (*key, **flow)).collect();
        Snapshot {
            established: copy(&self.established),
            transient: copy(&self.transient),
            fragments: self
                .fragments
                .borrow()
                .iter()
                .map(|(key, note)| ((key.source, key.destination, key.identification, key.protocol), **note))
                .collect(),
            affinities: self.affinity.borrow().iter().map(|(key, entry)| (*key, **entry)).collect(),
            rates: self.rates.borrow().iter().map(|(key, rate)| (*key, **rate)).collect(),
        }
    }

    /// Changes all flows, fragments, affinities and rates in place.
    pub fn edit(
        &mut self,
        mut flow: impl FnMut(&FlowKey<A>, &mut Flow<A>),
        mut note: impl FnMut(&mut Fragment<A>),
        mut affinity: impl FnMut(&mut Affinity),
        mut rate: impl FnMut(&mut ConnectionRate),
    ) {
        for table in [&mut self.established, &mut self.transient] {
            for (key, entry) in table.get_mut() {
                flow(key, entry);
            }
        }
        for fragment in self.fragments.get_mut().values_mut() {
            let mut changed = **fragment;
            note(&mut changed);
            *fragment = Rc::new(changed);
        }
        self.affinity.get_mut().values_mut().for_each(|entry| affinity(entry));
        self.rates.get_mut().values_mut().for_each(|entry| rate(entry));
    }

    pub(super) fn clear_flows(&mut self) {
        self.established.get_mut().clear();
        self.transient.get_mut().clear();
    }

    /// Takes all established flows out of their table.
    pub fn set_aside(&self) {
        self.aside.borrow_mut().extend(self.established.borrow_mut().drain());
    }

    /// Puts them back.
    pub fn bring_back(&self) {
        self.established.borrow_mut().extend(self.aside.borrow_mut().drain());
    }

    /// What the kernel's LRU does when it needs room; says whether there was such an entry.
    pub fn evict(&mut self, key: &FlowKey<A>) -> bool {
        self.transient.get_mut().remove(key).is_some()
    }
}

/// A map's value in place. As in the kernel it stays valid, but unreachable, when its entry is
/// removed.
pub struct Shared<T>(Rc<UnsafeCell<T>>);

impl<T> Shared<T> {
    pub(in crate::kit) fn new(value: T) -> Self {
        Self(Rc::new(UnsafeCell::new(value)))
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

#[expect(unsafe_code, reason = "map values are shared, as in the kernel")]
impl<T> Deref for Shared<T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: one thread; the core writes through one handle at a time.
        unsafe { &*self.0.get() }
    }
}

#[expect(unsafe_code, reason = "map values are shared, as in the kernel")]
impl<T> DerefMut for Shared<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above.
        unsafe { &mut *self.0.get() }
    }
}
