//! What the maps tell, as people are shown it. The live agent adds what only it knows.

mod entries;
mod flows;
mod metrics;
pub mod node;
mod overlay;
mod pinned;
mod proxied;
#[cfg(test)]
mod testing;
mod traffic;

pub use entries::{NextHops, service_views};
pub use flows::{flow_views, service_refs};
pub use metrics::MapReading;
pub use overlay::overlay;
pub use pinned::{PinnedMaps, device_views, drop_views};
pub use proxied::{Frontends, add_proxied, collect_backends, collect_proxied};
pub use traffic::{Traffic, traffic};
