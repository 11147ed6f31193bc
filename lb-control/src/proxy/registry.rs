//! The tasks of a worker that wait, so that they can be woken when their time is over or when something
//! happened to all of them. It costs a connection no timer, no allocation and no lock.

use std::{
    cell::RefCell,
    task::{Context, Waker},
};

thread_local! {
    static REGISTRY: RefCell<Registry> = const { RefCell::new(Registry { slots: Vec::new(), free: Vec::new() }) };
}

#[derive(Debug)]
struct Registry {
    slots: Vec<Slot>,
    free: Vec<usize>,
}

#[derive(Debug)]
struct Slot {
    waker: Option<Waker>,
    /// In milliseconds of [`super::clock`].
    deadline: u64,
}

/// The place of a task on the list of its worker, which it leaves when this is dropped.
#[derive(Debug, Default)]
pub struct Registration(Option<usize>);

impl Registration {
    /// From now on the task is woken after `deadline` and with [`wake_all`]. A task may not be woken
    /// another way than at the first time.
    pub fn wake_at(&mut self, cx: &Context<'_>, deadline: u64) {
        REGISTRY.with_borrow_mut(|registry| match self.0 {
            Some(index) => registry.slots[index].deadline = deadline,
            None => {
                let slot = Slot { waker: Some(cx.waker().clone()), deadline };
                let index = registry.free.pop().unwrap_or(registry.slots.len());
                if index == registry.slots.len() {
                    registry.slots.push(slot);
                } else {
                    registry.slots[index] = slot;
                }
                self.0 = Some(index);
            }
        });
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let Some(index) = self.0 else { return };
        // At the end of the thread the list may have gone before its tasks.
        let _ = REGISTRY.try_with(|registry| {
            let mut registry = registry.borrow_mut();
            let waker = registry.slots[index].waker.take();
            registry.free.push(index);
            if registry.free.len() == registry.slots.len() {
                (registry.slots, registry.free) = (Vec::new(), Vec::new());
            }
            drop(registry);
            drop(waker);
        });
    }
}

/// Wakes the tasks of this thread whose time is over, each once.
pub fn wake_late(now: u64) {
    REGISTRY.with_borrow_mut(|registry| {
        for slot in &mut registry.slots {
            if slot.deadline <= now {
                slot.deadline = u64::MAX;
                slot.waker.iter().for_each(Waker::wake_by_ref);
            }
        }
    });
}

/// Wakes all tasks of this thread.
pub fn wake_all() {
    REGISTRY.with_borrow(|registry| {
        registry.slots.iter().filter_map(|slot| slot.waker.as_ref()).for_each(Waker::wake_by_ref);
    });
}
