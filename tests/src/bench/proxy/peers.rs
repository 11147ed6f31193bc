//! Who is compared: how they are configured and started.

use std::ffi::OsString;
use std::fs;
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lb_control::dataplane::PinDirectory;

use super::lab::{Lab, Site};
use super::process::Process;
use super::{agent, idle};

/// How long a load balancer may take until it serves.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long one attempt may take.
const LOOK: Duration = Duration::from_secs(1);
/// Where Debian keeps the module.
const STREAM_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
/// Connections at once: two files each, of the 20,000 that a process may have on a small machine.
const MAXIMUM_CONNECTIONS: u32 = 9_000;

/// A way from the client to the backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Routed by the kernel: nobody in between.
    Direct,
    /// The agent, `--datapath proxy`.
    Ours,
    /// HAProxy, `mode tcp`.
    Haproxy,
    /// With `option splice-auto`.
    HaproxySplice,
    /// nginx's stream module.
    Nginx,
    /// With a listening socket for each worker.
    NginxReuseport,
    /// `tokio::io::copy_bidirectional`.
    Copy,
    /// The agent, with what `--datapath auto` chooses.
    KernelAuto,
    /// The agent, `--datapath tc`.
    KernelTc,
}

impl Peer {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Direct,
        Self::Ours,
        Self::Haproxy,
        Self::HaproxySplice,
        Self::Nginx,
        Self::NginxReuseport,
        Self::Copy,
        Self::KernelAuto,
        Self::KernelTc,
    ];

    /// Those whose best is the goal.
    pub const RIVALS: [Self; 4] = [Self::Haproxy, Self::HaproxySplice, Self::Nginx, Self::NginxReuseport];

    /// As reports name it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Ours => "pointsman proxy",
            Self::Haproxy => "haproxy",
            Self::HaproxySplice => "haproxy splice",
            Self::Nginx => "nginx",
            Self::NginxReuseport => "nginx reuseport",
            Self::Copy => "copy_bidirectional",
            Self::KernelAuto => "pointsman auto",
            Self::KernelTc => "pointsman tc",
        }
    }

    /// Whether it ends connections and makes others: such have memory for each.
    #[must_use]
    pub fn is_proxy(self) -> bool {
        !matches!(self, Self::Direct | Self::KernelAuto | Self::KernelTc)
    }

    /// Why it cannot be measured here, if so.
    ///
    /// # Errors
    /// When the agent cannot be run.
    pub fn missing(self) -> Result<Option<String>> {
        let lacks = |program: &str| Command::new(program).arg("-v").output().is_err();
        Ok(match self {
            Self::Haproxy | Self::HaproxySplice => {
                lacks("haproxy").then(|| "there is no haproxy: install Debian's package haproxy".to_owned())
            }
            Self::Nginx | Self::NginxReuseport => (lacks("nginx") || !Path::new(STREAM_MODULE).exists())
                .then(|| {
                    "there is no nginx with streams: install nginx-light, libnginx-mod-stream".to_owned()
                }),
            Self::Ours if !agent::has_proxy()? => Some("this agent has no --datapath proxy".to_owned()),
            _ => None,
        })
    }
}

/// A load balancer in its place.
pub struct Runner {
    /// Who.
    pub peer: Peer,
    /// Where.
    pub site: Site,
    directory: PathBuf,
    process: Option<Process>,
}

impl Runner {
    /// Gives it a node and starts it.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(peer: Peer, lab: &Lab, number: u8, directory: &Path) -> Result<Self> {
        let mut site = lab.site(number)?;
        // Native XDP sees checksums that are not finished otherwise.
        site.look_like_nics(lab, peer == Peer::KernelAuto)?;
        let directory = directory.join(format!("{number}"));
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        let mut runner = Self { peer, site, directory, process: None };
        runner.restart(lab)?;
        Ok(runner)
    }

    /// Starts it afresh.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn restart(&mut self, lab: &Lab) -> Result<()> {
        self.process = None;
        if let Some(line) = self.line()? {
            self.process = Some(Process::start(&self.site.node, &line, &self.log())?);
        }
        self.wait(lab).with_context(|| format!("{} does not serve\n{}", self.peer.name(), self.said()))
    }

    /// Where clients reach it.
    #[must_use]
    pub fn address(&self) -> SocketAddrV4 {
        match self.peer {
            Peer::Direct => self.site.backends()[0],
            Peer::Ours | Peer::KernelAuto | Peer::KernelTc => self.site.vip(),
            _ => self.site.own(),
        }
    }

    /// Its processes.
    ///
    /// # Errors
    /// When it has ended.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let tree = self.process.as_ref().map_or(Ok(Vec::new()), Process::tree);
        tree.with_context(|| format!("{}\n{}", self.peer.name(), self.said()))
    }

    fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    /// The end of what it has written.
    #[must_use]
    pub fn said(&self) -> String {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(20).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// Its command line, with whatever it reads written before.
    fn line(&self) -> Result<Option<Vec<OsString>>> {
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        let write = |text: String| -> Result<OsString> {
            let path = self.directory.join("config");
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
            Ok(path.into())
        };
        Ok(Some(match self.peer {
            Peer::Direct => return Ok(None),
            Peer::Haproxy | Peer::HaproxySplice => {
                let splice = self.peer == Peer::HaproxySplice;
                [words(&["haproxy", "-db", "-f"]), vec![write(haproxy(&self.site, splice))?]].concat()
            }
            Peer::Nginx | Peer::NginxReuseport => {
                let reuseport = self.peer == Peer::NginxReuseport;
                let config = write(nginx(&self.site, reuseport, &self.directory))?;
                let prefix = self.directory.clone().into();
                [words(&["nginx", "-p"]), vec![prefix, "-c".into(), config]].concat()
            }
            Peer::Copy => {
                let mut line = vec![std::env::current_exe()?.into(), "relay".into()];
                line.push(self.site.own().to_string().into());
                line.extend(self.site.backends().iter().map(|backend| backend.to_string().into()));
                line
            }
            Peer::Ours => agent::line(&self.site, &self.directory, "proxy")?,
            Peer::KernelAuto => agent::line(&self.site, &self.directory, "auto")?,
            Peer::KernelTc => agent::line(&self.site, &self.directory, "tc")?,
        }))
    }

    fn wait(&mut self, lab: &Lab) -> Result<()> {
        let begin = Instant::now();
        let address = self.address();
        loop {
            let once = || idle::open(address, LOOK).map(drop);
            let error = match lab.client.inside(|| Ok(once()))? {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            if let Some(process) = &mut self.process
                && process.has_ended()?
            {
                bail!("it has ended");
            }
            ensure!(begin.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain: {error:#}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.process = None;
        if matches!(self.peer, Peer::Ours | Peer::KernelAuto | Peer::KernelTc) {
            // What is attached goes with the devices; pins would stay.
            let _ = PinDirectory::new(&agent::pins(&self.site)).remove();
        }
    }
}

fn haproxy(site: &Site, splice: bool) -> String {
    let splice = if splice { "  option splice-auto\n" } else { "" };
    let mut text = format!(
        "global\n  nbthread 2\n  maxconn {MAXIMUM_CONNECTIONS}\n  maxpipes 500\ndefaults\n  mode tcp\n\
         {splice}  timeout connect 5s\n  timeout client 10m\n  timeout server 10m\n\
         listen bench\n  bind {} backlog 4096\n  balance roundrobin\n",
        site.own()
    );
    for (place, backend) in site.backends().iter().enumerate() {
        text += &format!("  server b{place} {backend}\n");
    }
    text
}

fn nginx(site: &Site, reuseport: bool, directory: &Path) -> String {
    let (directory, reuseport) = (directory.display(), if reuseport { " reuseport" } else { "" });
    let servers: String = site.backends().iter().map(|backend| format!(" server {backend};")).collect();
    format!(
        "load_module {STREAM_MODULE};\ndaemon off;\nuser root;\nworker_processes 2;\nworker_rlimit_nofile 20000;\n\
         pid {directory}/pid;\nerror_log stderr warn;\nevents {{ worker_connections 16384; }}\n\
         stream {{\n  access_log off;\n  upstream backends {{{servers} }}\n  server {{\n    \
         listen {}{reuseport} backlog=4096;\n    proxy_pass backends;\n    proxy_connect_timeout 5s;\n    \
         proxy_timeout 10m;\n    tcp_nodelay on;\n  }}\n}}\n",
        site.own()
    )
}
