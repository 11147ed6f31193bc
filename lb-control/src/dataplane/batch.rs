//! Reads a whole map in a few system calls.
//!
//! Of a hash map, going from key to key, as aya does, starts over whenever the current key has just been removed,
//! and might never end under load; a batch goes by buckets (kernel/bpf/hashtab.c,
//! `__htab_map_lookup_and_delete_batch`). aya has no batches yet.

use std::io;
use std::ops::{ControlFlow, Range};
use std::os::fd::{AsRawFd, BorrowedFd};

use lb_common::abi::Plain;

/// `BPF_MAP_LOOKUP_BATCH`.
const LOOKUP_BATCH: libc::c_long = 24;
/// Entries in one call. A bucket with more makes the kernel ask for more room.
const BATCH: usize = 8_192;

/// The part of `union bpf_attr` that is called `batch`.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Calls `each` for every entry. Entries that come or go meanwhile may be missed.
///
/// # Errors
/// When the kernel refuses.
pub fn for_each<K: Plain, V: Plain>(map: BorrowedFd<'_>, mut each: impl FnMut(K, V)) -> io::Result<()> {
    for_each_while(map, |key, value| {
        each(key, value);
        ControlFlow::Continue(())
    })
}

/// Calls `each` for every entry, until it says to stop. A hash map's entries come in the order of a
/// hash that nobody outside knows (its seed is the kernel's): the first ones are a fair sample.
///
/// # Errors
/// When the kernel refuses.
pub fn for_each_while<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    mut each: impl FnMut(K, V) -> ControlFlow<()>,
) -> io::Result<()> {
    for_each_group(map, 1, 0..usize::MAX, |key, values: &[V]| {
        values.iter().try_for_each(|value| each(key, *value))
    })
}

/// Elements of an array, `count` from `first` on, or fewer if it ends before.
///
/// # Errors
/// When the kernel refuses.
pub fn elements<V: Plain>(map: BorrowedFd<'_>, first: u32, count: u32) -> io::Result<Vec<V>> {
    let mut all = Vec::with_capacity(count as usize);
    if count > 0 {
        let range = first as usize..first as usize + count as usize;
        for_each_group(map, 1, range, |_: u32, values: &[V]| {
            all.extend_from_slice(values);
            ControlFlow::Continue(())
        })?;
    }
    Ok(all)
}

/// Calls `each` for every element of a per-CPU array, with its values on each of the `cpus` possible
/// CPUs. The values' size is a multiple of 8: the kernel rounds up to that.
///
/// # Errors
/// When the kernel refuses.
pub fn for_each_per_cpu<V: Plain>(
    map: BorrowedFd<'_>,
    cpus: usize,
    mut each: impl FnMut(u32, &[V]),
) -> io::Result<()> {
    const { assert!(size_of::<V>().is_multiple_of(8), "values lie closer than the kernel writes them") };
    for_each_group(map, cpus, 0..usize::MAX, |index, values| {
        each(index, values);
        ControlFlow::Continue(())
    })
}

/// Calls `each` for every entry of a map that has `group` values for each key, until it says to stop. Of an array, for those
/// of a range, which is not empty; other maps have no order, and are read as a whole.
fn for_each_group<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    group: usize,
    range: Range<usize>,
    mut each: impl FnMut(K, &[V]) -> ControlFlow<()>,
) -> io::Result<()> {
    // On a machine with many CPUs, the values of one key are many.
    let batch = (BATCH / group).max(1).min(range.len());
    let mut left = range.len();
    let mut keys: Vec<K> = Vec::with_capacity(batch);
    let mut values: Vec<V> = Vec::with_capacity(batch * group);
    // An array's elements are given from the one after this cursor on (`generic_map_lookup_batch` in
    // kernel/bpf/syscall.c).
    let (mut from, mut to) = (u32::try_from(range.start).unwrap_or(u32::MAX).wrapping_sub(1), 0u32);
    let mut first = range.start == 0;
    loop {
        let mut attributes = Attributes {
            in_batch: if first { 0 } else { &raw mut from as u64 },
            out_batch: &raw mut to as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: batch.min(left) as u32,
            map_fd: map.as_raw_fd().cast_unsigned(),
            ..Attributes::default()
        };
        let size = size_of::<Attributes>();
        #[expect(unsafe_code, reason = "a system call that no library wraps")]
        // SAFETY: all pointers lead to room for what the kernel writes: `batch` keys and groups of
        // values of the map's sizes, which the caller vouches for by the types and the size of
        // groups, and a cursor of four bytes.
        let result = unsafe { libc::syscall(libc::SYS_bpf, LOOKUP_BATCH, &raw mut attributes, size) };
        let end = match result {
            0 => false,
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENOENT) => true,
                error => return Err(error),
            },
        };
        let count = (attributes.count as usize).min(batch);
        #[expect(unsafe_code, reason = "the kernel has written that many")]
        // SAFETY: `count` entries are initialized, and `Plain` types have no invalid values.
        unsafe {
            keys.set_len(count);
            values.set_len(count * group);
        }
        for (key, values) in keys.drain(..).zip(values.chunks_exact(group)) {
            if each(key, values).is_break() {
                return Ok(());
            }
        }
        values.clear();
        left = left.saturating_sub(count);
        if end || left == 0 {
            return Ok(());
        }
        (first, from) = (false, to);
    }
}

/// `BPF_MAP_DELETE_ELEM`.
const DELETE_ELEMENT: libc::c_long = 3;

/// The part of `union bpf_attr` for one element.
#[repr(C)]
#[derive(Default)]
struct Element {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `BPF_MAP_LOOKUP_ELEM`.
const LOOKUP_ELEMENT: libc::c_long = 1;

/// Reads one entry; `None` if it is not there.
///
/// # Errors
/// When the kernel refuses.
pub fn lookup<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = std::mem::MaybeUninit::<V>::uninit();
    let mut element = Element {
        map_fd: map.as_raw_fd().cast_unsigned(),
        key: std::ptr::from_ref(key) as u64,
        value: value.as_mut_ptr() as u64,
        ..Element::default()
    };
    #[expect(unsafe_code, reason = "aya reads only from maps that it owns by type")]
    // SAFETY: key and value have the sizes of the map's, which the caller vouches for by their types.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, LOOKUP_ELEMENT, &raw mut element, size_of::<Element>()) };
    match result {
        #[expect(unsafe_code, reason = "the kernel has written it")]
        // SAFETY: all of the value is initialized, and `Plain` types have no invalid values.
        0 => Ok(Some(unsafe { value.assume_init() })),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            error => Err(error),
        },
    }
}

/// `BPF_MAP_UPDATE_ELEM`.
const UPDATE_ELEMENT: libc::c_long = 2;
/// `BPF_NOEXIST`: only if the key is not there.
const IF_NEW: u64 = 1;

/// Writes an entry, or an element of an array.
///
/// # Errors
/// When the kernel refuses.
pub fn update<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    write(map, key, value, 0)
}

/// Writes an entry of a hash map unless the key is there. Says whether it was not.
///
/// # Errors
/// When the kernel refuses.
pub fn insert_new<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<bool> {
    match write(map, key, value, IF_NEW) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

fn write<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K, value: &V, flags: u64) -> io::Result<()> {
    let mut element = Element {
        map_fd: map.as_raw_fd().cast_unsigned(),
        key: std::ptr::from_ref(key) as u64,
        value: std::ptr::from_ref(value) as u64,
        flags,
        ..Element::default()
    };
    #[expect(unsafe_code, reason = "aya writes only to maps that it owns by type")]
    // SAFETY: key and value have the sizes of the map's, which the caller vouches for by their types.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, UPDATE_ELEMENT, &raw mut element, size_of::<Element>()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Removes an entry; it is no error if it is not there.
///
/// # Errors
/// When the kernel refuses.
pub fn remove<K: Plain>(map: BorrowedFd<'_>, key: &K) -> io::Result<()> {
    let mut element = Element {
        map_fd: map.as_raw_fd().cast_unsigned(),
        key: std::ptr::from_ref(key) as u64,
        ..Element::default()
    };
    #[expect(unsafe_code, reason = "aya removes only from maps that it owns by type")]
    // SAFETY: the key has the size of the map's keys, which the caller vouches for by its type.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, DELETE_ELEMENT, &raw mut element, size_of::<Element>()) };
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            error => Err(error),
        },
    }
}
