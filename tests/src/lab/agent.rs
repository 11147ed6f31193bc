//! The agent under test: the real binary, on the edge of a lab.

use std::{
    fs::{self, File},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use super::{
    netns::{Namespace, Process},
    topology::Lab,
};

/// Seconds that the agent may take for anything, unless [`PATIENCE_ENV`] says otherwise. Generous:
/// tests run in parallel on few CPUs.
const PATIENCE: u64 = 30;
/// Seconds, for machines that are much slower than others.
const PATIENCE_ENV: &str = "POINTSMAN_TEST_PATIENCE";

/// Room for flows: more than the busiest test has open or closing.
const MAX_FLOWS: &str = "65536";

/// Where an agent runs, and where its files and pins are.
#[derive(Debug)]
pub struct Seat<'lab> {
    /// Its node.
    pub namespace: &'lab Namespace,
    /// Of its own.
    pub directory: PathBuf,
    /// Where it pins.
    pub pins: PathBuf,
}

/// `pointsman run` on the edge of a lab. When dropped in a failing test, its log is shown.
#[derive(Debug)]
pub struct Agent<'lab> {
    lab: &'lab Lab,
    seat: Seat<'lab>,
    binary: PathBuf,
    flags: Vec<String>,
    kubeconfig: Option<PathBuf>,
    process: Option<Process>,
    /// Agents before this one, which have handed over and finish.
    previous: Vec<Process>,
}

impl<'lab> Agent<'lab> {
    /// As [`Self::start_with`], of another binary.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_from(binary: &Path, lab: &'lab Lab, yaml: &str, flags: &[&str]) -> Result<Self> {
        let mut agent = Self::new(lab, lab.seat(), flags, None)?;
        agent.use_binary(binary);
        agent.write_config(yaml)?;
        agent.run()?;
        Ok(agent)
    }

    /// Writes the configuration and starts the agent that `POINTSMAN_BIN` names.
    ///
    /// # Errors
    /// When `POINTSMAN_BIN` is not set, or the agent cannot be started.
    pub fn start(lab: &'lab Lab, yaml: &str) -> Result<Self> {
        Self::start_with(lab, yaml, &[])
    }

    /// As [`Self::start`], with more flags, which restarts keep.
    ///
    /// # Errors
    /// When `POINTSMAN_BIN` is not set, or the agent cannot be started.
    pub fn start_with(lab: &'lab Lab, yaml: &str, flags: &[&str]) -> Result<Self> {
        Self::start_at(lab.seat(), lab, yaml, flags)
    }

    /// As [`Self::start_with`], on another node, or with files and pins in other places.
    ///
    /// # Errors
    /// When `POINTSMAN_BIN` is not set, or the agent cannot be started.
    pub fn start_at(seat: Seat<'lab>, lab: &'lab Lab, yaml: &str, flags: &[&str]) -> Result<Self> {
        let mut agent = Self::new(lab, seat, flags, None)?;
        agent.write_config(yaml)?;
        agent.run()?;
        Ok(agent)
    }

    /// Starts an agent that takes Services from a cluster, which must be reachable from its seat.
    ///
    /// # Errors
    /// When `POINTSMAN_BIN` is not set, or the agent cannot be started.
    pub fn start_in_cluster(
        lab: &'lab Lab,
        seat: Seat<'lab>,
        kubeconfig: &Path,
        flags: &[&str],
    ) -> Result<Self> {
        let mut agent = Self::new(lab, seat, flags, Some(kubeconfig.to_owned()))?;
        agent.run()?;
        Ok(agent)
    }

    fn new(lab: &'lab Lab, seat: Seat<'lab>, flags: &[&str], kubeconfig: Option<PathBuf>) -> Result<Self> {
        let binary = std::env::var_os("POINTSMAN_BIN").ok_or_else(|| {
            anyhow!(
                "POINTSMAN_BIN is not set: `cargo xtask build` prints the path, `cargo xtask test` sets it"
            )
        })?;
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        Ok(Self { lab, seat, binary: binary.into(), flags, kubeconfig, process: None, previous: Vec::new() })
    }

    /// From its next start on, the agent is this binary.
    pub fn use_binary(&mut self, binary: &Path) {
        binary.clone_into(&mut self.binary);
    }

    /// From its next start on, the agent has these flags in place of those before.
    pub fn use_flags(&mut self, flags: &[&str]) {
        self.flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
    }

    /// The binary.
    #[must_use]
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// The file that the agent watches.
    #[must_use]
    pub fn config_path(&self) -> PathBuf {
        self.seat.directory.join("config/services.yaml")
    }

    /// The socket that `pointsman status` asks.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.seat.directory.join("agent.sock")
    }

    /// Its process, while it runs.
    #[must_use]
    pub fn process_id(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    /// What the agent and its predecessors have written.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.seat.directory.join("agent.log")
    }

    /// Replaces the configuration, in one step.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_config(&self, yaml: &str) -> Result<()> {
        let path = self.config_path();
        // Not next to it: the agent reads every file of the directory.
        let fresh = self.seat.directory.join("services.yaml.new");
        let directory = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(directory)
            .and_then(|()| fs::write(&fresh, yaml))
            .and_then(|()| fs::rename(&fresh, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Starts the agent again after [`Self::kill`] or [`Self::sigterm`].
    ///
    /// # Errors
    /// When it runs, or cannot be started.
    pub fn run(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "the agent runs already");
        let log = File::options().create(true).append(true).open(self.log_path());
        let log = log.with_context(|| format!("cannot open {}", self.log_path().display()))?;
        let mut command = Command::new(&self.binary);
        command.arg("run");
        match &self.kubeconfig {
            Some(path) => command.arg("--kubeconfig").arg(path),
            None => command.arg("--config").arg(self.config_path().parent().unwrap_or(Path::new("/"))),
        };
        if !self.flags.iter().any(|flag| flag == "--max-flows") {
            // Many labs run side by side, and maps take their memory at once.
            command.args(["--max-flows", MAX_FLOWS]);
        }
        command
            .args(["--link-device", "uplink", "--pin-dir"])
            .arg(&self.seat.pins)
            .arg("--socket")
            .arg(self.socket())
            .args(&self.flags)
            .env("KUBERNETES", if self.kubeconfig.is_some() { "true" } else { "false" })
            .env("DATAPATH", datapath())
            // The control groups are the machine's: everybody's sockets would be served.
            .env("CGROUP", "off")
            .env_remove("LEASE_NAMESPACE")
            .env_remove("DEFAULT_CLASS")
            .env_remove("HTTP_ADDRESS")
            .env_remove("METRICS_PER_BACKEND")
            .env_remove("NODE_NAME")
            .env_remove("KUBECONFIG")
            .env_remove("LINKDEVICE")
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("cannot share the log")?)
            .stderr(log);
        self.process = Some(self.seat.namespace.spawn(&mut command)?);
        Ok(())
    }

    /// `kill -9`, and waits for the end.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Asks the agent to end, and waits until it has.
    ///
    /// # Errors
    /// When it does not run, or does not end in time.
    pub fn sigterm(&mut self) -> Result<ExitStatus> {
        self.ask_to_end()?;
        self.ended()
    }

    /// Asks the agent to end, and does not wait.
    ///
    /// # Errors
    /// When it does not run.
    pub fn ask_to_end(&self) -> Result<()> {
        let process = self.process.as_ref().context("the agent does not run")?;
        let pid = i32::try_from(process.id()).context("process id")?;
        kill(Pid::from_raw(pid), Signal::SIGTERM).context("cannot signal the agent")
    }

    /// Waits until the agent's log says something.
    ///
    /// # Errors
    /// When it does not in time.
    pub fn wait_log(&self, text: &str) -> Result<()> {
        let says = wait_for(text, || Ok(self.log().contains(text).then_some(())));
        says.with_context(|| format!("the agent's log:\n{}", self.log()))
    }

    /// Waits until the agent has ended, by itself or after [`Self::ask_to_end`].
    ///
    /// # Errors
    /// When it does not run, or does not end in time.
    pub fn ended(&mut self) -> Result<ExitStatus> {
        let mut process = self.process.take().context("the agent does not run")?;
        wait_for("the agent to end", || Ok(process.child().try_wait()?))
    }

    /// Starts another agent with these flags beside the one that runs, and has it take over.
    ///
    /// # Errors
    /// When none runs, or the new one cannot be started.
    pub fn hand_over(&mut self, flags: &[&str]) -> Result<()> {
        ensure!(self.process.is_some(), "no agent runs that could hand over");
        self.previous.extend(self.process.take());
        self.use_flags(&[flags, &["--take-over"]].concat());
        self.run()
    }

    /// Waits until the last agent that has handed over has ended.
    ///
    /// # Errors
    /// When there is none, or it does not end in time.
    pub fn previous_ended(&mut self) -> Result<ExitStatus> {
        let mut process = self.previous.pop().context("no agent has handed over")?;
        wait_for("the previous agent to end", || Ok(process.child().try_wait()?))
    }

    /// Kills and starts it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn restart(&mut self) -> Result<()> {
        self.kill();
        self.run()
    }

    /// Runs a command of the binary on the edge, such as `["status", "-o", "wide"]`, with this
    /// agent's socket and pins.
    ///
    /// # Errors
    /// When it fails.
    pub fn cli(&self, args: &[&str]) -> Result<String> {
        let binary = self.binary.display().to_string();
        let (socket, pins) = (self.socket().display().to_string(), self.seat.pins.display().to_string());
        let line = [&[binary.as_str()], args, &["--socket", &socket, "--pin-dir", &pins]].concat();
        self.seat.namespace.run(line)
    }

    /// Command lines for people who want to look for themselves.
    #[must_use]
    pub fn hints(&self) -> String {
        let edge = format!("nsenter --net={}", self.seat.namespace.path().display());
        let client = self.lab.client.path();
        format!(
            "{edge}                                  # a shell on the edge\n{edge} {} status --watch --socket {} \
             --pin-dir {}\nnsenter --net={} curl http://VIP/              # as the client\n",
            self.binary.display(),
            self.socket().display(),
            self.seat.pins.display(),
            client.display()
        )
    }

    /// `pointsman status`, as JSON.
    ///
    /// # Errors
    /// When it fails.
    pub fn status(&self) -> Result<Value> {
        let text = self.cli(&["status", "-o", "json"])?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }

    /// Waits until the status is as wanted, and gives it.
    ///
    /// # Errors
    /// When it is not in time, with the last status; when the agent has ended.
    pub fn wait_status(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = String::from("none");
        let waited = wait_for(what, || {
            let process = self.process.as_ref().context("the agent does not run")?;
            let stat = fs::read_to_string(format!("/proc/{}/stat", process.id())).unwrap_or_default();
            ensure!(!stat.contains(") Z "), "the agent has ended");
            match self.status() {
                Ok(status) if wanted(&status) => return Ok(Some(status)),
                Ok(status) => last = format!("{status:#}"),
                Err(error) => last = format!("{error:#}"),
            }
            Ok(None)
        });
        waited.with_context(|| {
            format!("last status: {last}\n{}\nagent's log:\n{}", self.whereabouts(), self.log())
        })
    }

    /// What the process does right now, and whether it answers: for when it seems to hang.
    fn whereabouts(&self) -> String {
        let socket = match UnixStream::connect(self.socket()) {
            Ok(_) => "takes connections".to_owned(),
            Err(error) => error.to_string(),
        };
        let Some(id) = self.process_id() else { return format!("no process; the socket: {socket}") };
        let mut text =
            format!("process {id}; its socket: {socket}; its threads (state, where in the kernel):\n");
        for task in fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten() {
            let read = |file| fs::read_to_string(task.path().join(file)).unwrap_or_default();
            let state = read("stat").rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            let (name, place) = (read("comm"), read("wchan"));
            text += &format!("  {} {} {place}\n", name.trim(), state.unwrap_or('?'));
        }
        text
    }

    /// Waits until a running agent serves every Service, by resolved next hops.
    ///
    /// # Errors
    /// When that is not so in time.
    pub fn wait_ready(&self) -> Result<Value> {
        self.wait_status("all Services to be served", |status| {
            let services = list(status, "services");
            !status["agent"].is_null() && !services.is_empty() && services.iter().all(is_served)
        })
    }
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            for args in [["status", "-o", "wide"].as_slice(), &["drops"]] {
                let shown = self.cli(args).unwrap_or_else(|error| format!("{error:#}\n"));
                eprintln!("--- pointsman {}\n{shown}", args.join(" "));
            }
            eprintln!("--- log of the agent\n{}---", self.log());
        }
        self.process = None;
        self.previous.clear();
    }
}

/// Flags of an agent that forwards in the kernel in every run: for tests of what only programs do, such
/// as packets that flow while no agent runs, pins, SYN cookies, or local backends that see the client.
#[must_use]
pub fn in_kernel() -> &'static [&'static str] {
    if is_proxied() { &["--datapath", "auto"] } else { &[] }
}

/// Whether the agents of this run serve by the userspace proxy, unless a test says otherwise.
#[must_use]
pub fn is_proxied() -> bool {
    datapath() == "proxy"
}

/// How the agents of this run forward packets, unless a test says otherwise: `POINTSMAN_TEST_DATAPATH`.
#[must_use]
pub fn datapath() -> String {
    std::env::var("POINTSMAN_TEST_DATAPATH").unwrap_or_else(|_| "auto".to_owned())
}

/// The elements of an array; none when there is no such array.
#[must_use]
pub fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

/// Whether a Service of a status is active and each of its backends can be sent to.
#[must_use]
pub fn is_served(service: &Value) -> bool {
    service["state"] == "active"
        && list(service, "ports")
            .iter()
            .all(|port| list(port, "backends").iter().all(|backend| backend["nextHopResolved"] == true))
}

/// Asks again and again until there is an answer.
///
/// # Errors
/// What the question fails with, or that time is up.
pub fn wait_for<T>(what: &str, mut question: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let patience = std::env::var(PATIENCE_ENV).ok().and_then(|seconds| seconds.parse().ok());
    let patience = Duration::from_secs(patience.unwrap_or(PATIENCE));
    let deadline = Instant::now() + patience;
    loop {
        if let Some(answer) = question()? {
            return Ok(answer);
        }
        if Instant::now() > deadline {
            bail!("waited {patience:?} in vain for {what}");
        }
        thread::sleep(Duration::from_millis(20));
    }
}
