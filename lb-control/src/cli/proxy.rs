//! Arguments about the userspace proxy.

use std::time::Duration;

use clap::Args;

use crate::proxy::Settings;

/// How the userspace proxy works, where it serves.
#[derive(Clone, Debug, Args)]
pub struct ProxyArgs {
    /// Threads of the proxy; 0 for one for each CPU
    #[arg(long, value_name = "NUMBER", default_value_t = 0, help_heading = "Userspace proxy",
          value_parser = clap::value_parser!(u16).range(0..=1_024))]
    pub proxy_workers: u16,
    /// How long a backend may take to accept a connection of the proxy; then the next one is tried
    #[arg(long, value_name = "SECONDS", default_value_t = 5, help_heading = "Userspace proxy",
          value_parser = clap::value_parser!(u64).range(1..=300))]
    pub proxy_connect_seconds: u64,
    /// A TCP connection of the proxy on which nothing passes for so long is ended; whoever is still to take
    /// something has twice as long, and longer while it does
    #[arg(long, value_name = "SECONDS", default_value_t = 7_200, help_heading = "Userspace proxy",
          value_parser = clap::value_parser!(u64).range(1..=864_000))]
    pub proxy_idle_seconds: u64,
    /// TCP connections that the proxy may have at once. Without: as many as file descriptors allow
    #[arg(long, value_name = "NUMBER", help_heading = "Userspace proxy")]
    pub proxy_max_connections: Option<usize>,
    /// What TCP connections of the proxy may hold, all together, in MiB of the agent's memory and of pipes.
    /// Then each reads no more than it can pass on at once
    #[arg(long, value_name = "MIB", default_value_t = 256, help_heading = "Userspace proxy",
          value_parser = clap::value_parser!(u32).range(0..=1_048_576))]
    pub proxy_max_buffers: u32,
    /// How long connections of the proxy may go on when the agent is asked to end, which serves meanwhile, or
    /// has handed over
    #[arg(long, env = "DRAIN_SECONDS", value_name = "SECONDS", default_value_t = 20,
          help_heading = "Userspace proxy", value_parser = clap::value_parser!(u64).range(0..=864_000))]
    pub drain_seconds: u64,
}

impl ProxyArgs {
    /// What the proxy is started with.
    #[must_use]
    pub fn settings(&self) -> Settings {
        Settings {
            workers: self.proxy_workers.into(),
            connect_timeout: Duration::from_secs(self.proxy_connect_seconds),
            idle_timeout_tcp: Duration::from_secs(self.proxy_idle_seconds),
            max_connections: self.proxy_max_connections,
            max_buffers: usize::try_from(self.proxy_max_buffers)
                .unwrap_or(usize::MAX)
                .saturating_mul(1 << 20),
            ..Settings::default()
        }
    }
}
