//! The agent: everything put together.

mod agent;
mod cluster;
mod door;
mod ending;
mod feed;
mod flood_guard;
mod handover;
mod live;
mod metrics;
mod refusals;
mod shared;
mod start;
mod trouble;
mod upkeep;
mod writer;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, MissedTickBehavior, interval, interval_at, sleep_until};
use tracing::{info, warn};

use crate::dataplane::collect::Sweep;
use crate::dataplane::{Cgroup, Mode, Sizes};
use crate::http;
use crate::net::Monitor;
use crate::plan::{CookiePhase, CookiePolicy, Verdict};
use crate::probe::Verdicts;
use crate::proxy::Proxy;
use crate::source::Update;

pub use cluster::{ClusterSettings, LEADER_LEASE, host_name};
pub use live::Told;
pub use writer::Writer;

use agent::Agent;
use cluster::{Cluster, Leave};
use door::{Door, Heard};
use ending::Ending;
use flood_guard::FloodGuard;
use handover::Heir;
use live::Live;
use shared::{Published, Shared};
use upkeep::Upkeep;

/// What the agent is started with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where objects come from.
    pub source: Source,
    /// Name of this node; empty if it is not part of a cluster.
    pub node: String,
    /// Whether Services without a class are ours.
    pub default_class: bool,
    /// Device that gets the VIPs, and by whose state this node counts as able to serve.
    pub link_device: String,
    /// Further devices that clients come in by, which get them, too.
    pub client_devices: Vec<String>,
    /// Directory of the pins.
    pub pin_directory: PathBuf,
    /// Unix socket that answers `pointsman status`.
    pub socket: PathBuf,
    /// TCP port of metrics and probes, if any.
    pub http: Option<SocketAddr>,
    /// Whether metrics tell of every backend.
    pub metrics_per_backend: bool,
    /// How packets are forwarded.
    pub datapath: DatapathPolicy,
    /// How the userspace proxy works, where it serves.
    pub proxy: crate::proxy::Settings,
    /// How long connections of the proxy may go on when the agent is asked to end.
    pub drain: Duration,
    /// Of which processes of this node the sockets are served.
    pub cgroup: Cgroup,
    /// Sizes of the maps.
    pub sizes: Sizes,
    /// When SYNs are answered with cookies.
    pub syn_cookies: CookiePolicy,
    /// Source addresses towards backends; if there is none of a family, the node's own.
    pub snat_addresses: Vec<IpAddr>,
    /// First and last source port towards backends.
    pub snat_ports: (u16, u16),
    /// At SIGTERM, leave everything in place for the next agent.
    pub keep_on_exit: bool,
    /// Whether an agent that runs here is asked to hand over.
    pub take_over: bool,
}

/// How packets are forwarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DatapathPolicy {
    /// On each device the first way in the kernel that works; where none does, by the proxy.
    #[default]
    Auto,
    /// In the kernel, in this way alone.
    Only(Mode),
    /// By the proxy alone.
    Proxy,
}

impl DatapathPolicy {
    /// How programs are to be attached; `None` chooses.
    #[must_use]
    pub fn mode(self) -> Option<Mode> {
        match self {
            Self::Only(mode) => Some(mode),
            Self::Auto | Self::Proxy => None,
        }
    }
}

/// Where objects come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A file or a directory.
    Files(PathBuf),
    /// A Kubernetes cluster.
    Cluster(ClusterSettings),
}

impl Settings {
    /// Whether addresses are given out by the cluster's elected writer.
    #[must_use]
    pub fn follows_cluster(&self) -> bool {
        match self.source {
            Source::Files(_) => false,
            Source::Cluster(_) => true,
        }
    }

    /// Whether clients come in by this device, as far as the settings say.
    #[must_use]
    pub fn is_of_clients(&self, device: &str) -> bool {
        self.link_device == device || self.client_devices.iter().any(|one| one == device)
    }

    /// The devices that clients come in by.
    #[must_use]
    pub fn devices_of_clients(&self) -> Vec<String> {
        [&self.link_device].into_iter().chain(&self.client_devices).cloned().collect()
    }
}

/// How long after the first sign of a change its others are waited for.
const DEBOUNCE: Duration = Duration::from_millis(30);
/// How often the network is looked at without any sign of a change. Addresses are renewed by the resync,
/// and here while it is not known yet what is wanted.
const RENEWAL: Duration = Duration::from_secs(10);
/// How often the maps are compared with what they should contain, and addresses are renewed.
const RESYNC: Duration = Duration::from_secs(60);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// When the agent cannot begin: no such device, no right to load programs, a configuration that
/// cannot be read at all. What goes wrong later is reported, and what works goes on.
pub async fn run(settings: Settings) -> Result<()> {
    let mut signals = Signals::new()?;
    // What is wrong with files and settings is told before anything is touched.
    let files = match &settings.source {
        Source::Files(config) => Some(feed::files(config)?),
        Source::Cluster(_) => None,
    };
    start::check(&settings).await?;
    // Descriptors of an agent before this one need room.
    let _ = crate::proxy::raise_descriptors();
    let handover = handover::path(&settings.socket);
    let predecessor = if settings.take_over {
        let path = handover.clone();
        tokio::task::spawn_blocking(move || handover::take(&path)).await??
    } else {
        None
    };
    // The socket is first: it tells whether another agent is at work here.
    let listener = http::bind(&settings.socket)?;
    let mut door = Door::new(http::bind(&handover)?);
    let port = settings.http.map(listen).transpose()?;
    // From here on changes are noticed, so what is read next cannot be outdated unseen.
    let monitor = Monitor::start()?;
    let (live, served) = Live::channel();
    let live = if files.is_some() { Live::untold() } else { live };
    let (mut agent, shared) = Agent::start(&settings, live, predecessor).await?;
    let (mut cluster, updates) = match (&settings.source, files) {
        (Source::Cluster(cluster), _) => {
            let (cluster, updates) = Cluster::start(cluster, &settings, served, Arc::clone(&shared)).await?;
            (Some(cluster), updates)
        }
        (Source::Files(config), None) => (None, feed::files(config)?),
        (Source::Files(_), Some(files)) => (None, files),
    };
    let servers = Servers::start(listener, port, &shared);
    let (end, ending) =
        serve(&mut agent, &shared, updates, monitor, &mut signals, cluster.as_mut(), &mut door).await?;
    drop(door);
    let _ = std::fs::remove_file(&handover);
    if let End::Handover(heir) = end {
        servers.stop().await;
        let _ = std::fs::remove_file(&settings.socket);
        let is_in_cluster = cluster.is_some();
        let proxy = give_up(agent, cluster, &heir).await;
        let served = follow(heir, &mut signals).await;
        drain(proxy, ending.left(Instant::now(), settings.drain), &mut signals).await;
        served?;
        if is_in_cluster {
            // A pod that ends is started again, and would take over in its turn.
            signals.asked().await;
        }
        return Ok(());
    }
    let is_uninstalled = matches!(end, End::Uninstallation);
    let left = ending.left(Instant::now(), settings.drain);
    let left = if is_uninstalled { left } else { left.min(ending::LAST) };
    drain(agent.take_proxy(), left, &mut signals).await;
    leave(agent, cluster, is_uninstalled, settings.keep_on_exit).await?;
    if is_uninstalled {
        rest(&shared, &mut signals).await;
    }
    servers.stop().await;
    let _ = std::fs::remove_file(&settings.socket);
    Ok(())
}

/// Lets go of everything but the proxy, and tells whoever takes over.
async fn give_up(agent: Agent, cluster: Option<Cluster>, heir: &Heir) -> Option<Proxy> {
    let kept = agent.hand_over().await;
    if let Some(cluster) = cluster {
        cluster.leave(Leave::Stay).await;
    }
    // The pins' lock goes with the rest.
    let proxy = agent.into_proxy();
    if let Err(error) = kept {
        warn!("handing over: {error:#}; the next agent has to put it right");
    }
    // In any case: everything is let go of, and an heir who hears nothing would end, too.
    if let Err(error) = heir.done() {
        warn!("handing over: {error:#}");
    }
    proxy
}

/// Goes on accepting until the next agent serves, or this one is to end.
async fn follow(heir: Heir, signals: &mut Signals) -> Result<()> {
    info!("everything but the connections is handed over to the next agent");
    tokio::select! {
        served = heir.serves() => {
            served?;
            // Segments of those who have begun to connect, and of the time before the kernel took over.
            tokio::time::sleep(LAST_ONES).await;
        }
        () = signals.next() => {}
    }
    Ok(())
}

/// How long an agent that has handed over still accepts.
const LAST_ONES: Duration = Duration::from_secs(1);

/// Leaves everything in place for the next agent, or takes it back.
async fn leave(agent: Agent, cluster: Option<Cluster>, is_uninstalled: bool, keeps: bool) -> Result<()> {
    // With nothing to go on with, nothing may stay either: this may be the end of an installation. And
    // nobody would answer for what the proxy has served.
    let is_empty = agent.is_idle() && cluster.is_some() || agent.is_proxied();
    if keeps && !is_uninstalled && !is_empty {
        agent.hand_over().await?;
        if let Some(cluster) = cluster {
            cluster.leave(Leave::Stay).await;
        }
        info!("programs, maps and addresses stay for the next agent");
        return Ok(());
    }
    // What it served is taken back first: whoever follows finds the addresses free.
    let withdrawn = agent.withdraw().await;
    if let Some(cluster) = cluster {
        let how = match is_uninstalled {
            // Whoever uninstalls must not take it for done; a restart of the agent tries again.
            true if withdrawn.is_err() => Leave::Stay,
            true => Leave::Uninstall,
            false => Leave::GiveUp,
        };
        cluster.leave(how).await;
    }
    withdrawn
}

/// Ends the proxy: no new connections, and those that there are have until the deadline, or until somebody
/// presses Ctrl-C. SIGTERM comes once more when a pod that has handed over is taken away.
async fn drain(proxy: Option<Proxy>, deadline: Duration, signals: &mut Signals) {
    let Some(proxy) = proxy else { return };
    let open = proxy.total_connections();
    if open > 0 {
        info!(
            connections = open,
            "the proxy waits until its connections have ended, for {deadline:?} at most"
        );
    }
    tokio::select! {
        reset = proxy.drain(deadline) => {
            if reset > 0 {
                warn!(connections = reset, "connections of the proxy were reset: they had not ended in time");
            }
        }
        _ = signals.interrupt.recv() => {
            signals.has_come = true;
            warn!("SIGINT: connections of the proxy are reset");
        }
    }
}

/// Waits for the end after an uninstallation has begun: if the agent ended by itself, it would be
/// started again, and take everything into use again.
async fn rest(shared: &Shared, signals: &mut Signals) {
    shared.publish(|published| *published = Published::default());
    info!("everything is given back since the agents are uninstalled; to serve again, restart the agent");
    let mut turns = interval(RENEWAL);
    loop {
        tokio::select! {
            () = signals.asked() => return,
            _ = turns.tick() => shared.turn(),
        }
    }
}

/// Why the agent ends its work.
enum End {
    /// SIGTERM or SIGINT.
    Signal,
    /// Another agent takes over; it has the listening sockets already.
    Handover(Heir),
    /// All agents are asked to let go.
    Uninstallation,
}

/// What ends the agent.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// Whether one has come.
    has_come: bool,
}

impl Signals {
    fn new() -> Result<Self> {
        let terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        let interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
        Ok(Self { terminate, interrupt, has_come: false })
    }

    async fn next(&mut self) {
        let name = tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        };
        self.has_come = true;
        info!("{name}: leaving");
    }

    /// Waits for one, unless one has come before.
    async fn asked(&mut self) {
        if !self.has_come {
            self.next().await;
        }
    }
}

/// The agent's loop: one thing after the other, until something ends it. Asked to end, it goes on for the
/// connections of the proxy.
async fn serve(
    agent: &mut Agent,
    shared: &Shared,
    mut updates: mpsc::Receiver<Update>,
    mut monitor: Monitor,
    signals: &mut Signals,
    mut cluster: Option<&mut Cluster>,
    door: &mut Door,
) -> Result<(End, Ending)> {
    let mut health_problems = agent.health_problems();
    let mut verdicts = agent.verdicts();
    let (mut upkeep, mut guard) = (None, None);
    let now = Instant::now();
    let mut renewal = interval_at(now + RENEWAL, RENEWAL);
    let mut resync = interval_at(now + RESYNC, RESYNC);
    renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
    resync.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut network_changed: Option<Instant> = None;
    let mut ending = Ending::default();
    loop {
        shared.turn();
        match agent.pins() {
            None => (upkeep, guard) = (None, None),
            // At first, or the kernel can forward by now.
            Some(pins) if upkeep.is_none() => {
                upkeep = Some(Upkeep::start(pins));
                let is_guarded = agent.watches_floods();
                guard = is_guarded.then(|| FloodGuard::start(pins, agent.cookie_phase()));
            }
            Some(_) => {}
        }
        let (retry, step) = (agent.retry_at(), agent.step_at());
        // Asked to end, it waits for connections, and changes nobody's way any more.
        let try_kernel = agent.try_kernel_at().filter(|_| ending.look_at().is_none());
        tokio::select! {
            biased;
            () = signals.next() => {
                if ending.asked(Instant::now(), agent.connections(), agent.drain()) {
                    return Ok((End::Signal, ending));
                }
                shared.publish(|published| published.is_ending = true);
            }
            () = at(ending.look_at()) => if ending.is_over(Instant::now(), agent.connections()) {
                return Ok((End::Signal, ending));
            },
            () = uninstallation(cluster.as_deref_mut()) => return Ok((End::Uninstallation, ending)),
            update = updates.recv() => {
                let Some(update) = update else { bail!("the source of the configuration has ended; see above") };
                agent.update(update).await;
            }
            change = monitor.next() => {
                let Some(change) = change else { bail!("the netlink socket for events is closed") };
                agent.note(change);
                network_changed.get_or_insert_with(|| Instant::now() + DEBOUNCE);
            }
            () = at(network_changed) => {
                network_changed = None;
                agent.network_changed().await;
            }
            () = at(retry) => agent.retry().await,
            () = at(step) => agent.step(),
            () = at(try_kernel) => agent.try_kernel().await,
            _ = renewal.tick() => {
                agent.network_changed().await;
                agent.tell_avoided();
            }
            _ = resync.tick() => agent.resync().await,
            problems = health_problems.next() => agent.health_troubled(problems),
            found = probed(verdicts.as_mut()) => agent.probed(found).await,
            sweep = swept(upkeep.as_mut()) => agent.swept(&sweep),
            phase = flood(guard.as_mut()) => agent.use_cookies(phase),
            heard = door.next() => match heard.and_then(|heard| endow(heard, agent, door)) {
                Ok(None) => {}
                Ok(Some(heir)) => return Ok((End::Handover(heir), ending)),
                Err(error) => warn!("somebody asked to take over, in vain: {error:#}"),
            },
        }
    }
}

/// Gives whoever asks to take over what it needs for it. Gives back who has all of it.
fn endow(heard: Heard, agent: &Agent, door: &mut Door) -> Result<Option<Heir>> {
    match heard {
        Heard::Asks(heir) => door.give(heir, agent.sockets(), agent.drain()),
        Heard::Has(heir, given) => {
            agent.has_heir(&given)?;
            return Ok(Some(heir));
        }
    }
    Ok(None)
}

/// Those who answer questions.
struct Servers {
    socket: JoinHandle<()>,
    stop: oneshot::Sender<()>,
    port: Option<AbortHandle>,
}

impl Servers {
    fn start(socket: UnixListener, port: Option<TcpListener>, shared: &Arc<Shared>) -> Self {
        let inspect = || Arc::clone(shared) as Arc<dyn http::Inspect>;
        let (stop, stopped) = oneshot::channel::<()>();
        let answers = http::serve(socket, inspect(), async {
            let _ = stopped.await;
        });
        let socket = tokio::spawn(async move {
            if let Err(error) = answers.await {
                warn!("the socket: {error:#}");
            }
        });
        let port = port.map(|port| tokio::spawn(http::serve_port(port, inspect())).abort_handle());
        Self { socket, stop, port }
    }

    async fn stop(self) {
        let _ = self.stop.send(());
        if let Some(port) = self.port {
            port.abort();
        }
        if tokio::time::timeout(Duration::from_secs(2), self.socket).await.is_err() {
            warn!("a request on the socket did not end");
        }
    }
}

fn listen(address: SocketAddr) -> Result<TcpListener> {
    http::listen(address).with_context(|| {
        format!(
            "listening for metrics and probes on {address}: choose another --http-address, or none to do without"
        )
    })
}

/// Waits until the agents of the cluster are uninstalled; for ever if there is none.
async fn uninstallation(cluster: Option<&mut Cluster>) {
    match cluster {
        Some(cluster) => cluster.uninstallation().await,
        None => std::future::pending().await,
    }
}

/// Waits until a flood begins or ends; for ever if nobody looks for one.
async fn flood(guard: Option<&mut FloodGuard>) -> CookiePhase {
    match guard {
        Some(guard) => guard.next().await,
        None => std::future::pending().await,
    }
}

/// Waits until backends turn out to work, or not; for ever if nobody asks them.
async fn probed(verdicts: Option<&mut Verdicts>) -> Vec<Verdict> {
    match verdicts {
        Some(verdicts) => verdicts.next().await,
        None => std::future::pending().await,
    }
}

/// Waits for the next sweep of the flow tables; for ever if there are none.
async fn swept(upkeep: Option<&mut Upkeep>) -> Sweep {
    match upkeep {
        Some(upkeep) => upkeep.next().await,
        None => std::future::pending().await,
    }
}

/// Waits for a moment; for ever if there is none.
async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
