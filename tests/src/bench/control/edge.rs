//! The agent's process, and the node that it is on.

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lb_control::dataplane::PinDirectory;

use super::seed::{self, Cluster};
use crate::{
    apiserver::Endpoint,
    lab::{Agent, Lab, in_kernel},
};

/// Where the agent answers probes: the network namespace is its own.
const PROBES: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9100);
/// The agent has come to rest when it has used no more CPU time than this for as long as one look.
const QUIET: Duration = Duration::from_millis(20);
const LOOK: Duration = Duration::from_secs(1);

/// A node with an agent.
pub struct Edge<'lab> {
    agent: Option<Agent<'lab>>,
    lab: &'lab Lab,
    kubeconfig: PathBuf,
    _api: Endpoint,
}

impl<'lab> Edge<'lab> {
    /// A node that reaches the API server, and every endpoint by one gateway.
    ///
    /// # Errors
    /// When the namespace cannot be changed.
    pub fn new(lab: &'lab Lab, cluster: &Cluster) -> Result<Self> {
        let gateway = Lab::backend_address(1, false);
        lab.edge.ip_batch(&format!("route add {} via {gateway}", seed::ENDPOINTS))?;
        let (api, kubeconfig) = cluster.listen(&lab.edge.path())?;
        Ok(Self { agent: None, lab, kubeconfig, _api: api })
    }

    /// Starts the agent.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&mut self) -> Result<()> {
        if let Some(agent) = &mut self.agent {
            return agent.run();
        }
        let probes = PROBES.to_string();
        let own =
            ["--node-name", seed::NODE, "--namespace", seed::NAMESPACE, "--http-address", probes.as_str()];
        // What is measured ends in the maps.
        let flags = [own.as_slice(), in_kernel()].concat();
        self.agent = Some(Agent::start_in_cluster(self.lab, self.lab.seat(), &self.kubeconfig, &flags)?);
        Ok(())
    }

    /// Kills it: all that it made stays.
    pub fn kill(&mut self) {
        if let Some(agent) = &mut self.agent {
            agent.kill();
        }
    }

    /// Kills the agent and takes everything off the node, as a restart of the machine does.
    ///
    /// # Errors
    /// When something stays.
    pub fn forget_everything(&mut self) -> Result<()> {
        self.kill();
        PinDirectory::new(&self.pins()).remove()?;
        self.lab.edge.run(["ip", "address", "flush", "dev", "uplink", "to", seed::VIPS])?;
        Ok(())
    }

    /// Where the agent pins.
    #[must_use]
    pub fn pins(&self) -> PathBuf {
        self.lab.pin_directory()
    }

    /// Whether the agent says that packets are forwarded by the current configuration.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let ask = || -> Result<bool> {
            let mut stream = TcpStream::connect(PROBES)?;
            stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer.starts_with("HTTP/1.1 200"))
        };
        // It answers nothing before it listens.
        matches!(self.lab.edge.enter(ask), Ok(Ok(true)))
    }

    /// Waits until the agent has nothing left to do.
    ///
    /// # Errors
    /// When it never comes to rest.
    pub fn settle(&self) -> Result<()> {
        let begin = Instant::now();
        loop {
            let before = self.cpu()?;
            thread::sleep(LOOK);
            if self.cpu()? - before <= QUIET {
                return Ok(());
            }
            ensure!(begin.elapsed() < super::PATIENCE, "the agent does not come to rest\n{}", self.log_end());
        }
    }

    fn process(&self) -> Result<PathBuf> {
        let id = self.agent.as_ref().and_then(Agent::process_id).context("the agent does not run")?;
        Ok(PathBuf::from(format!("/proc/{id}")))
    }

    /// CPU time that the agent's process has used, user and system.
    ///
    /// # Errors
    /// When it does not run.
    pub fn cpu(&self) -> Result<Duration> {
        let stat = fs::read_to_string(self.process()?.join("stat")).context("reading its CPU time")?;
        // proc_pid_stat(5): after the name come state (3) and others; utime is 14, stime 15.
        let fields: Vec<&str> =
            stat.rsplit_once(") ").context("no name in stat")?.1.split_whitespace().collect();
        let ticks: u64 = fields.get(11).context("no utime")?.parse::<u64>()?
            + fields.get(12).context("no stime")?.parse::<u64>()?;
        // USER_HZ is 100 on all architectures that the agent runs on.
        Ok(Duration::from_millis(ticks * 10))
    }

    /// `VmRSS` or `VmHWM`, in MiB.
    ///
    /// # Errors
    /// When it does not run.
    pub fn memory(&self, field: &str) -> Result<f64> {
        let status = fs::read_to_string(self.process()?.join("status")).context("reading its memory")?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let kibibytes = line.and_then(|line| line.trim().strip_suffix(" kB")).context("no such field")?;
        Ok(kibibytes.trim().parse::<f64>()? / 1024.0)
    }

    /// The last lines that the agent wrote.
    #[must_use]
    pub fn log_end(&self) -> String {
        let log = self.agent.as_ref().map(Agent::log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(20).collect();
        format!("agent's log:\n{}", lines.into_iter().rev().collect::<Vec<_>>().join("\n"))
    }
}
