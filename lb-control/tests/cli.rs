//! The command as it is run: what it prints where, and how it ends.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use anyhow::Result;
use lb_common::abi::{DropReason, DropStats};
use lb_control::http::{self, Inspect};
use lb_control::view::{AgentView, DropView, FlowView, StatusView};

/// An agent that is not this process's business to run: what it would answer.
struct Answers;

impl Inspect for Answers {
    fn status(&self) -> Result<StatusView> {
        let agent = AgentView {
            pid: 42,
            version: "9.9.9".into(),
            uptime_seconds: 61,
            config_generation: 1,
            last_reload_seconds_ago: None,
        };
        Ok(StatusView { agent: Some(agent), ..StatusView::default() })
    }

    fn flows(&self) -> Result<Vec<FlowView>> {
        let socket = |text: &str| text.parse::<SocketAddr>().unwrap();
        Ok((1..=3)
            .map(|port| FlowView {
                protocol: "TCP".into(),
                client: SocketAddr::new([198, 51, 100, 1].into(), port),
                vip: socket("192.0.2.10:80"),
                snat: socket("10.0.0.1:1024"),
                backend: socket("10.0.0.2:8080"),
                service: "default/web".into(),
                state: "established".into(),
                idle_seconds: 1,
            })
            .collect())
    }

    fn drops(&self) -> Result<Vec<DropView>> {
        Ok(vec![DropView::new(DropReason::NoFlow, DropStats { packets: 7, bytes: 420 })])
    }

    fn ready(&self) -> bool {
        true
    }
}

fn pointsman(socket: &Path, pins: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pointsman"))
        .args(arguments)
        .arg("--socket")
        .arg(socket)
        .arg("--pin-dir")
        .arg(pins)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_is_asked() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let listener = http::bind(&socket).unwrap();
    tokio::spawn(http::serve(listener, Arc::new(Answers), std::future::pending()));
    let ask = async |arguments: &'static [&'static str]| {
        let (socket, pins) = (socket.clone(), directory.path().to_owned());
        tokio::task::spawn_blocking(move || pointsman(&socket, &pins, arguments)).await.unwrap()
    };

    let status = ask(&["status"]).await;
    assert!(status.status.success() && status.stderr.is_empty(), "{status:?}");
    assert!(text(&status.stdout).starts_with("Agent: version 9.9.9, pid 42, up 1m1s"), "{status:?}");

    let json = ask(&["status", "-o", "json"]).await;
    let view: StatusView = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(view, Answers.status().unwrap());

    let flows = ask(&["flows", "--client", "198.51.100.1:2"]).await;
    assert!(text(&flows.stdout).ends_with("\n1 of 3 flows: 1 established.\n"), "{flows:?}");

    let drops = ask(&["drops", "-o", "yaml"]).await;
    assert!(text(&drops.stdout).contains("name: no-flow\n") && drops.status.success(), "{drops:?}");
}

#[test]
fn without_agent_and_pins_both_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("nobody.sock");
    for command in ["status", "flows", "drops"] {
        let output = pointsman(&socket, directory.path(), &[command]);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{command}");
        assert!(output.stdout.is_empty(), "{command}");
        assert!(
            error.starts_with("pointsman: no agent answers on ") && error.contains("nobody.sock"),
            "{error}"
        );
        assert!(error.contains(directory.path().to_str().unwrap()), "{error}");
    }
}

#[test]
fn bad_arguments_end_with_two_and_help_with_zero() {
    let run = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_pointsman")).args(arguments).env_clear().output().unwrap()
    };
    let contradiction = run(&["run", "--link-device", "eth0", "--kubernetes=false"]);
    assert_eq!(contradiction.status.code(), Some(2));
    assert!(text(&contradiction.stderr).contains("add --config PATH"), "{contradiction:?}");
    assert_eq!(run(&["run", "--bogus"]).status.code(), Some(2));
    assert_eq!(run(&["run", "--help"]).status.code(), Some(0));
    let version = run(&["version"]);
    assert!(text(&version.stdout).starts_with(concat!("pointsman ", env!("CARGO_PKG_VERSION"), "\n")));
}
