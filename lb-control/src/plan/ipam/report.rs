//! What can be said about a pool.

/// The state of a pool, for the status of its object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolReport {
    /// [`Pool::key`](crate::model::Pool::key).
    pub key: String,
    /// How many of its addresses somebody holds.
    pub assigned: u64,
    /// How many more it could give to Services that leave the choice to it; at most `u64::MAX`.
    pub available: u64,
    /// Whether some of its addresses are held by Services that would not get them today.
    pub draining: bool,
    /// The pool that it overlaps, by which it is set aside.
    pub overlaps: Option<String>,
    /// Whether it gives out nothing more.
    pub disabled: bool,
}
