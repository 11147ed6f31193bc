//! Every metric that there is. docs/metrics.md is made of this table; a test compares them.

use std::fmt::Write;

/// What kind of number a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows; begins anew when what it counts does.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution.
    Histogram,
}

impl Kind {
    /// As in the type line of the exposition.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// A metric.
#[derive(Debug, PartialEq, Eq)]
pub struct Metric {
    /// Name; that of a counter ends in `_total`.
    pub name: &'static str,
    /// Kind.
    pub kind: Kind,
    /// Names of its labels, in the order in which their values are given.
    pub labels: &'static [&'static str],
    /// What it says.
    pub help: &'static str,
}

macro_rules! metrics {
    ($($constant:ident = $kind:ident $name:literal [$($label:literal),*] $help:literal;)+) => {
        $(
            #[doc = $help]
            pub static $constant: Metric =
                Metric { name: $name, kind: Kind::$kind, labels: &[$($label),*], help: $help };
        )+
        /// All of them, in the order of the documentation.
        pub static ALL: &[&Metric] = &[$(&$constant),+];
    };
}

metrics! {
    BUILD_INFO = Gauge "pointsman_build_info" ["version", "map_layout"]
        "Always 1; the labels tell the agent's version and that of its maps.";
    UPTIME = Gauge "pointsman_uptime_seconds" []
        "Time since the agent started.";
    READY = Gauge "pointsman_ready" []
        "1 if the first configuration is in use and a program is attached, or the proxy serves, and the agent was not asked to end, as /readyz.";
    LEADER = Gauge "pointsman_leader" []
        "1 on the node whose agent gives out addresses and writes the status of Services.";

    SOURCE_SYNCED = Gauge "pointsman_source_synced" []
        "1 once all objects were read.";
    SOURCE_UPDATES = Counter "pointsman_source_updates_total" []
        "Batches of changes that were taken into use.";
    SOURCE_AGE = Gauge "pointsman_source_last_update_age_seconds" []
        "Time since the last of them; absent before the first.";
    UPDATE_DURATION = Histogram "pointsman_update_apply_seconds" []
        "Time from when a batch of changes is taken up until the maps have it.";
    RESYNCS = Counter "pointsman_resyncs_total" []
        "Comparisons of the maps with what they should contain.";
    RESYNC_REPAIRS = Counter "pointsman_resync_repairs_total" []
        "Map operations that such a comparison asked for. Anything but 0 deserves a look: somebody \
         else writes the maps, or a change of the network was missed.";
    PROBLEMS = Gauge "pointsman_problems" ["area"]
        "What is wrong right now; `pointsman status` tells it in words. The area `services` holds \
         the problems of single Services.";
    API_WRITES = Counter "pointsman_api_writes_total" ["verb", "resource", "outcome"]
        "Writes to the Kubernetes API. The outcome conflict means that somebody else changed or owns it.";

    SERVICES = Gauge "pointsman_services" ["state"]
        "Services that are ours.";
    VIPS = Gauge "pointsman_vips" []
        "Addresses that our Services have.";
    VIPS_PLACED = Gauge "pointsman_vips_placed" []
        "Addresses that this node has on its link device.";
    BACKENDS = Gauge "pointsman_backends" ["state"]
        "Backends in the datapath, one for each endpoint of each port of each VIP.";
    CHECKED_BACKENDS = Gauge "pointsman_checked_backends" ["namespace", "service", "state"]
        "Backends of Services with a health check, as this node finds them: healthy or unhealthy. Only of \
         addresses that this node has.";
    BACKEND_HEALTHY = Gauge "pointsman_backend_healthy"
        ["namespace", "service", "protocol", "port", "backend"]
        "1 if the backend's health check does not fail, else 0; only with --metrics-per-backend.";
    HEALTH_PROBES = Counter "pointsman_health_probes_total" ["result"]
        "Questions whether a backend works. Not-asked: this node lacked descriptors, ports or memory for it.";
    POOL_ADDRESSES = Gauge "pointsman_pool_addresses" ["pool"]
        "Addresses that a pool can give out.";
    POOL_ASSIGNED = Gauge "pointsman_pool_assigned_addresses" ["pool"]
        "Addresses of a pool that Services have.";

    SERVICE_PACKETS = Counter "pointsman_service_packets_total"
        ["namespace", "service", "protocol", "vip", "port", "direction"]
        "Packets that were forwarded; direction in is from clients, out is to clients.";
    SERVICE_BYTES = Counter "pointsman_service_bytes_total"
        ["namespace", "service", "protocol", "vip", "port", "direction"]
        "Their bytes, Ethernet header included.";
    SERVICE_NEW_FLOWS = Counter "pointsman_service_new_flows_total"
        ["namespace", "service", "protocol", "vip", "port"]
        "Connections (UDP: sessions) that were given a backend.";
    SERVICE_REFUSED = Counter "pointsman_service_refused_total"
        ["namespace", "service", "protocol", "vip", "port"]
        "Connections and packets that were answered with a refusal.";
    BACKEND_PACKETS = Counter "pointsman_backend_packets_total"
        ["namespace", "service", "protocol", "vip", "port", "backend", "direction"]
        "As of the Service, for each backend; only with --metrics-per-backend.";
    BACKEND_BYTES = Counter "pointsman_backend_bytes_total"
        ["namespace", "service", "protocol", "vip", "port", "backend", "direction"]
        "As of the Service, for each backend; only with --metrics-per-backend.";
    BACKEND_NEW_FLOWS = Counter "pointsman_backend_new_flows_total"
        ["namespace", "service", "protocol", "vip", "port", "backend"]
        "As of the Service, for each backend; only with --metrics-per-backend.";
    DROPPED_PACKETS = Counter "pointsman_dropped_packets_total" ["reason"]
        "Packets that were not forwarded; `pointsman drops` explains the reasons.";
    DROPPED_BYTES = Counter "pointsman_dropped_bytes_total" ["reason"]
        "Their bytes, Ethernet header included.";

    PROXY_CONNECTIONS = Gauge "pointsman_proxy_connections" []
        "Connections (UDP: sessions) that the userspace proxy has; absent while it serves nothing.";
    PROXY_MAX_CONNECTIONS = Gauge "pointsman_proxy_max_connections" []
        "TCP connections that the userspace proxy may have, by --proxy-max-connections or by the limit of open files, of which ports and sessions of UDP take their part.";
    PROXY_REFUSED = Counter "pointsman_proxy_refused_total" ["reason"]
        "Connections that the userspace proxy refused or could not pass on.";
    PROXY_HELD_BYTES = Gauge "pointsman_proxy_held_bytes" []
        "Bytes that the userspace proxy holds for receivers that are slower than their senders.";
    PROXY_FULL_BUFFERS = Counter "pointsman_proxy_full_buffers_total" []
        "How often the userspace proxy, at --proxy-max-buffers, read no more than a receiver took.";
    PROXY_SHORTAGES = Counter "pointsman_proxy_shortages_total" []
        "How often connections of the userspace proxy had to wait, to be accepted or for a socket to their backend, for want of file descriptors or memory.";
    PROXY_ICMP_ERRORS = Counter "pointsman_proxy_icmp_errors_total" ["result"]
        "ICMP errors for clients of the userspace proxy whose datagrams no backend took; not sent for want of CAP_NET_RAW, or because there were too many in a second.";
    PROXY_LOST_DATAGRAMS = Counter "pointsman_proxy_lost_datagrams_total" ["direction"]
        "Datagrams that the userspace proxy did not pass on, because a socket had no room for them or the way none for their length; direction in is from clients, out is to clients.";
    PROXY_EJECTED = Gauge "pointsman_proxy_ejected_backends" []
        "Backends that the userspace proxy avoids for a while, since connects to them failed.";

    FLOWS = Gauge "pointsman_flows" ["stage"]
        "Connections and sessions at the last sweep of the tables, some seconds ago: established, \
         and transient ones that begin or end.";
    UNPROTECTED_FLOWS = Gauge "pointsman_unprotected_flows" []
        "TCP connections that are established but counted as transient, because the table of established \
         flows had no room for them: a flood can evict them.";
    FLOWS_FORGOTTEN = Counter "pointsman_flows_forgotten_total" []
        "Flows that sweeps took out of the tables because they were over.";
    SYN_COOKIES = Gauge "pointsman_syn_cookies" []
        "2 while SYNs are answered with cookies, 1 while those that were given out are only accepted, else 0.";
    MAP_ENTRIES = Gauge "pointsman_map_entries" ["map"]
        "Entries of a map that are in use. A flow has two. Flow tables: at the last sweep.";
    MAP_MAX_ENTRIES = Gauge "pointsman_map_max_entries" ["map"]
        "Entries that a map has room for.";
    DEVICE_INFO = Gauge "pointsman_device_info" ["device", "mode", "reason"]
        "Always 1, for each device with the program; the mode tells how it is attached, the reason why so.";
}

/// The table as Markdown.
#[must_use]
pub fn markdown() -> String {
    let mut text = "| metric | kind | labels | meaning |\n|---|---|---|---|\n".to_owned();
    for metric in ALL {
        let labels: Vec<_> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | {} |",
            metric.name,
            metric.kind.name(),
            labels.join(", "),
            metric.help
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_follow_the_conventions() {
        let mut names = BTreeSet::new();
        for metric in ALL {
            let name = metric.name;
            assert!(names.insert(name), "{name} is there twice");
            assert!(name.starts_with("pointsman_"), "{name}");
            let plain = |text: &str| text.chars().all(|char| char.is_ascii_lowercase() || char == '_');
            assert!(plain(name) && metric.labels.iter().all(|label| plain(label)), "{name}");
            assert_eq!(name.ends_with("_total"), metric.kind == Kind::Counter, "{name}");
            assert!(metric.help.ends_with('.') && !metric.help.contains('|'), "{name}");
        }
    }

    #[test]
    fn the_documentation_is_up_to_date() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
        let text = std::fs::read_to_string(path).unwrap();
        let table: String =
            text.lines().filter(|line| line.starts_with('|')).map(|line| format!("{line}\n")).collect();
        assert_eq!(table, markdown(), "docs/metrics.md should have this table:\n{}", markdown());
    }
}
