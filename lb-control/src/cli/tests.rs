//! Arguments. The environment cannot be changed safely in a process with threads, so what depends on
//! it is parsed in a child process, with an environment made for it.

use std::process::Command as Process;

use clap::error::ErrorKind;

use super::*;
use crate::app::DatapathPolicy;
use crate::dataplane::Mode;

/// Arguments for a child process, one a line.
const CHILD_ARGUMENTS: &str = "POINTSMAN_TEST_ARGUMENTS";
/// Comes before what a child process tells.
const MARK: &str = "parsed: ";

fn parse(arguments: &[&str]) -> Result<Cli, clap::Error> {
    Cli::try_parse_from([&["pointsman"], arguments].concat())
}

fn run_args(arguments: &[&str]) -> RunArgs {
    match parse(&[&["run", "--link-device", "eth0"], arguments].concat()).unwrap().command {
        Command::Run(args) => *args,
        other => panic!("{other:?}"),
    }
}

/// In a child process that [`parsed`] has started: tells it what was parsed. False in the parent.
fn told_parent() -> bool {
    let Ok(arguments) = std::env::var(CHILD_ARGUMENTS) else { return false };
    let arguments: Vec<&str> = arguments.lines().collect();
    match parse(&[&["run"], &arguments[..]].concat()) {
        Ok(Cli { command: Command::Run(args) }) => println!(
            "{MARK}{} {} {} {}",
            args.link_device,
            args.kubernetes,
            args.debug,
            args.kubeconfig.unwrap_or_default().display()
        ),
        other => println!("{MARK}{:?}", other.map_err(|error| error.kind())),
    }
    true
}

/// Device, Kubernetes, debug and kubeconfig as parsed with nothing else in the environment.
fn parsed(environment: &[(&str, &str)], arguments: &[&str]) -> String {
    let output = Process::new(std::env::current_exe().unwrap())
        .args(["--exact", "cli::tests::flag_beats_environment_beats_default", "--nocapture"])
        .env_clear()
        .env(CHILD_ARGUMENTS, arguments.join("\n"))
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (_, told) = text.split_once(MARK).unwrap_or_else(|| panic!("{text}"));
    told.lines().next().unwrap().trim_end().to_owned()
}

#[test]
fn flag_beats_environment_beats_default() {
    if told_parent() {
        return;
    }
    let environment =
        [("LINKDEVICE", "eth7"), ("KUBERNETES", "false"), ("DEBUG", "true"), ("KUBECONFIG", "/env")];
    assert_eq!(parsed(&[], &["--link-device", "eth0"]), "eth0 true false");
    assert_eq!(parsed(&environment, &[]), "eth7 false true /env");
    let flags = ["--link-device", "eth0", "--kubernetes", "true", "--debug=false", "--kubeconfig", "/flag"];
    assert_eq!(parsed(&environment, &flags), "eth0 true false /flag");
    assert_eq!(parsed(&[("DEBUG", "0")], &["--link-device", "eth0", "--debug"]), "eth0 true true");
}

#[test]
fn nonsense_in_the_environment_is_refused() {
    assert_eq!(parsed(&[], &[]), "Err(MissingRequiredArgument)");
    assert_eq!(parsed(&[("LINKDEVICE", "eth0"), ("KUBERNETES", "maybe")], &[]), "Err(ValueValidation)");
    assert_eq!(parsed(&[("LINKDEVICE", "")], &[]), "Err(ValueValidation)");
}

#[test]
fn definitions_are_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn defaults_are_those_of_the_datapath() {
    let settings = run_args(&["--kubernetes=false", "--config", "x.yaml"]).settings().unwrap();
    assert_eq!(settings.pin_directory, std::path::Path::new(maps::PIN_ROOT));
    assert_eq!(settings.socket, std::path::Path::new(http::DEFAULT_SOCKET));
    assert_eq!((settings.sizes.flows, settings.snat_ports), (maps::DEFAULT_FLOWS, (1024, 32_767)));
    assert_eq!((settings.datapath, settings.keep_on_exit), (DatapathPolicy::Auto, false));
    assert_eq!(settings.snat_addresses, [] as [std::net::IpAddr; 0]);
    assert_eq!((settings.http, settings.metrics_per_backend), (None, false), "files ask for no port");
}

#[test]
fn the_port_of_metrics_is_an_address_or_none() {
    let read = |text: &str| text.parse::<HttpAddress>();
    assert_eq!(read("none"), Ok(HttpAddress::Nowhere));
    assert_eq!(read("[::]:9404"), Ok(HttpAddress::At("[::]:9404".parse().unwrap())));
    for text in ["", "9404", ":9404", "localhost:9404", "::1:x"] {
        assert!(read(text).unwrap_err().contains("ADDRESS:PORT"), "{text}");
    }
    let flags =
        ["--kubernetes=false", "--config", "x", "--http-address", "127.0.0.1:1", "--metrics-per-backend"];
    let settings = run_args(&flags).settings().unwrap();
    assert_eq!((settings.http, settings.metrics_per_backend), (Some("127.0.0.1:1".parse().unwrap()), true));
}

#[test]
fn settings_are_taken_from_the_flags() {
    let flags = [
        "--kubernetes=false",
        "--config",
        "dir",
        "--datapath",
        "xdp-generic",
        "--on-exit",
        "keep",
        "--snat-address",
        "10.0.0.1",
        "--snat-address",
        "2001:db8::1",
        "--snat-ports",
        "2000-2999",
        "--max-flows",
        "1000",
        "--max-services",
        "10",
        "--max-backends",
        "100",
        "--max-source-ranges",
        "50",
        "--socket",
        "/s",
        "--pin-dir",
        "/p",
    ];
    let settings = run_args(&flags).settings().unwrap();
    assert_eq!((settings.datapath, settings.keep_on_exit), (DatapathPolicy::Only(Mode::Generic), true));
    assert_eq!(settings.snat_addresses.len(), 2);
    assert_eq!(settings.snat_ports, (2000, 2999));
    let sizes = settings.sizes;
    assert_eq!((sizes.flows, sizes.services, sizes.backends, sizes.source_ranges), (1000, 10, 100, 50));
    assert_eq!((settings.socket.to_str(), settings.pin_directory.to_str()), (Some("/s"), Some("/p")));
}

#[test]
fn contradictions_name_the_way_out() {
    let refusal = |flags: &[&str]| run_args(flags).settings().unwrap_err();
    assert!(refusal(&["--kubernetes=false"]).contains("--config PATH"));
    assert!(
        refusal(&["--kubernetes=true", "--config", "x.yaml"]).contains("use x.yaml, add --kubernetes=false")
    );
}

#[test]
fn ranges_of_ports() {
    let range = |text: &str| text.parse::<PortRange>();
    assert_eq!(range("1-65535"), Ok(PortRange { first: 1, last: 65_535 }));
    assert_eq!(range("80-80").unwrap().to_string(), "80-80");
    assert_eq!(PortRange::default().to_string(), "1024-32767");
    assert!(range("0-9").unwrap_err().contains("port 0"));
    assert!(range("9-8").unwrap_err().contains("9 is above 8"));
    for text in ["", "80", "80-", "-80", "1-65536", "a-b"] {
        assert!(range(text).unwrap_err().contains("FIRST-LAST"), "{text}");
    }
}

#[test]
fn names_of_devices_are_those_of_the_kernel() {
    for name in ["eth0", "a", "fifteen-letters", "ü"] {
        assert!(parse(&["run", "--link-device", name]).is_ok(), "{name}");
    }
    for name in ["", ".", "..", "sixteen-letters.", "a/b", "eth0:1", "a b"] {
        let error = parse(&["run", "--link-device", name]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ValueValidation, "{name}: {error}");
    }
}

#[test]
fn watching() {
    let seconds = |arguments: &[&str]| match parse(&[&["status"], arguments].concat()).map(|cli| cli.command)
    {
        Ok(Command::Status(args)) => Ok(args.watch),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error.kind()),
    };
    assert_eq!(seconds(&[]), Ok(None));
    assert_eq!(seconds(&["--watch"]), Ok(Some(2)));
    assert_eq!(seconds(&["--watch=5", "-o", "wide"]), Ok(Some(5)));
    assert_eq!(seconds(&["--watch=0"]), Err(ErrorKind::ValueValidation));
}

#[test]
fn filters_of_flows() {
    let Command::Flows(args) =
        parse(&["flows", "--service", "default/web", "--client", "192.0.2.1", "--limit", "0"])
            .unwrap()
            .command
    else {
        panic!("not flows")
    };
    let filter = args.filter();
    assert_eq!(
        (filter.service.as_deref(), filter.client.as_deref()),
        (Some("default/web"), Some("192.0.2.1"))
    );
    assert_eq!((filter.limit, filter.backend, filter.state), (Some(0), None, None));
}
