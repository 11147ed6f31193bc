//! Services from files: `--config FILE` or `--config DIR`.
//!
//! A directory stands for its `*.yaml`, `*.yml` and `*.json` files in the order of their names; it
//! is not searched recursively, and names that begin with a dot are left out, so that the
//! mounted ConfigMaps of Kubernetes (links into `..data`) work as they are.
//!
//! What works goes on working when something else breaks:
//! - An object that is there but wrong (type error, unknown field, bad value) stays as it last was.
//! - While part of a file cannot be read at all (syntax error), every object that was last read
//!   from that file and does not appear in the rest of it stays as it last was.
//! - A file that cannot be opened keeps all of its objects; so does everything while `--config`
//!   itself is missing. A file that disappears from the directory takes its objects with it, and
//!   so does an empty one.
//! - Of two objects with one name, the one in force stays; otherwise the first one counts.
//!
//! Each of these is a [`Problem`](crate::model::Problem) for as long as it lasts.

mod decode;
mod merge;
mod read;
mod watch;

pub use decode::{Decoded, Document, Item, decode};
pub use merge::{FileState, Merger, Snapshot};
pub use read::Reader;
pub use watch::{Settings, Watcher, watch};
