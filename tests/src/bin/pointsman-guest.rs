//! The first process of a virtual machine that is started to see what its kernel does with us:
//! `cargo xtask test --kernels`. It prints what happens in lines that xtask reads, and powers off.
//!
//! As `pointsman-guest verify` it loads every program and prints what that cost; as `pointsman-guest proxy
//! ARGUMENT…` it starts the agent with these arguments on a kernel that refuses programs, and is content if it
//! serves a Service all the same.

use std::ffi::CString;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pointsman_tests::kit::kernel::object;
use pointsman_tests::kit::verified::verify_all;
use pointsman_tests::lab::agent::list;
use pointsman_tests::lab::manifest::{HTTP, ServiceSpec, manifest, vip};
use pointsman_tests::lab::{Lab, wait_for};
use serde_json::Value;

/// What to do, in lines: `module PATH`, `env NAME VALUE`, `run SECONDS NAME PROGRAM ARGUMENT…`.
const PLAN: &str = "/plan";
/// What lines for xtask begin with.
const MARK: &str = "@pointsman";
/// Where the output of a program is kept until it has ended.
const OUTPUT: &str = "/tmp/output";

fn main() {
    let mut arguments = std::env::args().skip(1);
    let asked = match arguments.next().as_deref() {
        Some("verify") => Some(verify()),
        Some("proxy") => Some(proxy(&arguments.collect::<Vec<_>>())),
        _ => None,
    };
    if let Some(result) = asked {
        if let Err(error) = result {
            println!("{error:#}");
            std::process::exit(1);
        }
    } else if std::process::id() == 1 {
        let result = be_first();
        if let Err(error) = &result {
            say(&format!("failed {}", one_line(&format!("{error:#}"))));
        }
        say("end");
        let never = reboot(RebootMode::RB_POWER_OFF);
        println!("cannot power off: {never:?}");
    } else {
        eprintln!("this is started by `cargo xtask test --kernels`");
        std::process::exit(2);
    }
}

/// A line of its own, whatever was printed before.
fn say(line: &str) {
    println!("\n{MARK} {line}");
}

fn one_line(text: &str) -> String {
    text.trim().replace('\n', " | ")
}

fn verify() -> Result<()> {
    let object = object().map_err(anyhow::Error::msg)?;
    for verified in verify_all(&object)? {
        let program = verified.program;
        match verified.outcome {
            Ok(cost) => say(&format!("verified {program} {} {}", cost.instructions, cost.stack)),
            Err(refusal) => say(&format!("refused {program} {}", one_line(&refusal))),
        }
    }
    Ok(())
}

/// Starts the agent with a Service whose backend is this process, and connects to the VIP. All that it
/// starts ends with it: `run` sees to that.
fn proxy(arguments: &[String]) -> Result<()> {
    const SOCKET: &str = "/run/proxy.sock";
    const ANSWER: &[u8] = b"from the backend";
    let backend = Lab::backend_address(1, false);
    check("ip", &["address", "add", &format!("{backend}/32"), "dev", "lo"])?;
    let listener = TcpListener::bind((backend, HTTP.target)).context("cannot be a backend")?;
    thread::spawn(move || {
        for stream in listener.incoming() {
            stream.and_then(|mut stream| stream.write_all(ANSWER)).ok();
        }
    });
    fs::create_dir_all("/run/config")?;
    let service = manifest(&[ServiceSpec::new("web", &[HTTP], &[1])]);
    fs::write("/run/config/services.yaml", service)?;
    let agent = std::env::var("POINTSMAN_BIN").context("POINTSMAN_BIN")?;
    let mut running = Command::new(&agent)
        .args(arguments)
        .args(["--config", "/run/config", "--socket", SOCKET])
        .spawn()
        .context("cannot start the agent")?;
    let mut status = Value::Null;
    let served = wait_for("an answer of the backend", || {
        if let Some(status) = running.try_wait()? {
            bail!("the agent has ended: {status}");
        }
        let shown = Command::new(&agent).args(["status", "-o", "json", "--socket", SOCKET]).output()?;
        status = serde_json::from_slice(&shown.stdout).unwrap_or_default();
        let Ok(vip) = vip(&status, "web", false, HTTP) else { return Ok(None) };
        let mut answer = Vec::new();
        let read = TcpStream::connect(vip).and_then(|mut stream| stream.read_to_end(&mut answer));
        Ok((read.is_ok() && answer == ANSWER).then_some(()))
    });
    served.with_context(|| format!("{status:#}"))?;
    let device = list(&status, "devices").first().context("no device")?;
    let text = |key: &str| device[key].as_str().unwrap_or_default();
    println!("served by the {}: {}", text("mode"), text("reason"));
    Ok(())
}

fn be_first() -> Result<()> {
    mount_all()?;
    fs::create_dir_all("/tmp")?;
    say(&format!("kernel {}", fs::read_to_string("/proc/sys/kernel/osrelease")?.trim()));
    check("ip", &["link", "set", "lo", "up"])?;
    let plan = fs::read_to_string(PLAN).context("no plan")?;
    let mut env = vec![("PATH", "/bin"), ("TMPDIR", "/tmp"), ("RUST_BACKTRACE", "1")];
    for line in plan.lines() {
        let mut words = line.split(' ');
        match words.next() {
            Some("module") => load_module(words.next().context("a module without path")?)?,
            Some("env") => env.push(words.next().zip(words.next()).context("half a variable")?),
            Some("run") => {
                let seconds = words.next().unwrap_or_default().parse().context("a time limit")?;
                let (name, program) = words.next().zip(words.next()).context("nothing to run")?;
                let mut command = Command::new(program);
                command.args(words).env_clear().envs(env.iter().copied());
                run(name, command, Duration::from_secs(seconds))?;
            }
            _ => bail!("a line of the plan that nobody understands: {line}"),
        }
    }
    Ok(())
}

fn mount_all() -> Result<()> {
    for (kind, place) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/run"),
        ("bpf", "/sys/fs/bpf"),
        ("cgroup2", "/sys/fs/cgroup"),
    ] {
        fs::create_dir_all(place).ok();
        mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount {place}"))?;
    }
    Ok(())
}

fn check(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", "/bin")
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        bail!("{program}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

fn load_module(path: &str) -> Result<()> {
    let file = fs::File::open(path).with_context(|| format!("no module {path}"))?;
    let no_parameters = CString::default();
    #[expect(unsafe_code, reason = "a system call without a wrapper in libc")]
    // SAFETY: a descriptor and a string that live through the call.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), no_parameters.as_ptr(), 0) };
    if result == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    if error.kind() == std::io::ErrorKind::AlreadyExists {
        return Ok(());
    }
    Err(error).with_context(|| format!("the kernel refuses the module {path}"))
}

/// Runs a program to its end, with its output in between two lines of ours. What takes longer than
/// its time is killed, and whatever it has started and left.
fn run(name: &str, mut command: Command, limit: Duration) -> Result<()> {
    say(&format!("begin {name}"));
    let started = Instant::now();
    // A file, not a pipe: what the program leaves behind cannot keep us waiting.
    let output = fs::File::create(OUTPUT).context("cannot write output")?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("cannot start {command:?}"))?;
    let status = loop {
        match child.try_wait()? {
            None if started.elapsed() < limit => thread::sleep(Duration::from_millis(20)),
            status => break status,
        }
    };
    // The first process of a machine (or of a container) sends this to all others in it.
    kill(Pid::from_raw(-1), Signal::SIGKILL).ok();
    child.wait()?;
    print!("{}", String::from_utf8_lossy(&fs::read(OUTPUT)?));
    let status = status.map_or_else(|| "timeout".to_owned(), |status| status.into_raw().to_string());
    say(&format!("done {name} {status} {}", started.elapsed().as_millis()));
    Ok(())
}
