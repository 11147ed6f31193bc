//! Charts and kustomize base, with the real helm and kubectl.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use clap::{CommandFactory, Parser};
use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        batch::v1::Job,
        core::v1::{Namespace, ServiceAccount},
        networking::v1::NetworkPolicy,
        rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use lb_control::{cli::Cli, crd};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

/// A program that `cargo xtask test` installs; prints why when the test cannot run.
fn program(variable: &str) -> Option<PathBuf> {
    let found = std::env::var_os(variable).map(PathBuf::from);
    if found.is_none() {
        println!("SKIP: {variable} is not set; `cargo xtask test` installs the program and sets it");
    }
    found
}

fn deploy(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    root.join("deploy").join(path).display().to_string()
}

/// Runs with a home of its own: no repositories, plugins or credentials of whoever runs the tests.
fn run(program: &Path, args: &[&str]) -> Output {
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new(program);
    command.args(args).env_clear().env("PATH", "/usr/bin:/bin").env("HOME", home.path());
    command.output().unwrap()
}

fn text(output: &Output) -> String {
    let both = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    String::from_utf8(both).unwrap()
}

fn objects(yaml: &str) -> Vec<Value> {
    let documents = yaml.split("\n---\n").map(|document| document.trim_start_matches("---\n"));
    let values = documents.map(|document| serde_saphyr::from_str::<Value>(document).unwrap());
    values.filter(|value| !value.is_null()).collect()
}

/// What `helm install` would create.
fn template(helm: &Path, release: &str, namespace: &str, set: &[&str]) -> Vec<Value> {
    let chart = deploy("chart/pointsman");
    let mut args = vec!["template", release, &chart, "--namespace", namespace];
    args.extend(set.iter().flat_map(|set| ["--set-json", *set]));
    let output = run(helm, &args);
    assert!(output.status.success(), "{}", text(&output));
    objects(&String::from_utf8(output.stdout).unwrap())
}

fn of_kind<'a>(objects: &'a [Value], kind: &str) -> Vec<&'a Value> {
    objects.iter().filter(|object| object["kind"] == kind).collect()
}

/// Fields that are not of the API vanish on the way through the type.
fn check_typed<T: DeserializeOwned + Serialize>(object: &Value) {
    let typed: T =
        serde_json::from_value(object.clone()).unwrap_or_else(|error| panic!("{error}: {object:#}"));
    assert_eq!(&serde_json::to_value(typed).unwrap(), object);
}

fn check_object(object: &Value) {
    match object["kind"].as_str().unwrap_or_default() {
        "ClusterRole" => check_typed::<ClusterRole>(object),
        "ClusterRoleBinding" => check_typed::<ClusterRoleBinding>(object),
        "CustomResourceDefinition" => check_typed::<CustomResourceDefinition>(object),
        "DaemonSet" => check_typed::<DaemonSet>(object),
        "Job" => check_typed::<Job>(object),
        "Namespace" => check_typed::<Namespace>(object),
        "NetworkPolicy" => check_typed::<NetworkPolicy>(object),
        "Role" => check_typed::<Role>(object),
        "RoleBinding" => check_typed::<RoleBinding>(object),
        "ServiceAccount" => check_typed::<ServiceAccount>(object),
        other => panic!("no type for {other}: {object:#}"),
    }
}

fn identity(object: &Value) -> String {
    let metadata = &object["metadata"];
    format!("{} {} {}", object["kind"], metadata["namespace"], metadata["name"])
}

#[test]
fn helm_finds_nothing_to_complain_about() {
    let Some(helm) = program("POINTSMAN_HELM") else { return };
    for chart in ["chart/pointsman", "chart/pointsman-crds"] {
        let output = run(&helm, &["lint", "--strict", &deploy(chart)]);
        assert!(output.status.success(), "{}", text(&output));
    }
}

#[test]
fn every_setting_gives_objects_that_the_api_knows() {
    let Some(helm) = program("POINTSMAN_HELM") else { return };
    let settings: [&[&str]; 6] = [
        &[],
        &["securityContext={\"privileged\":true}"],
        &["serviceAccount={\"create\":false,\"name\":\"other\"}", "rbac.create=false"],
        &["networkPolicy.enabled=false", "cleanup.enabled=false", "nodeSelector={}", "tolerations=[]"],
        &["securityContext.seLinuxOptions={\"type\":\"spc_t\"}", "imagePullSecrets=[{\"name\":\"key\"}]"],
        &[
            "datapath=\"tc\"",
            "cgroup=\"off\"",
            "extraArgs=[\"--max-flows=1000\"]",
            "extraEnv=[{\"name\":\"A\",\"value\":\"b\"}]",
            "podAnnotations={\"a\":\"b\"}",
            "podLabels={\"c\":\"d\"}",
            "resources={}",
            "affinity={\"nodeAffinity\":{}}",
        ],
    ];
    for set in settings {
        let objects = template(&helm, "edge", "lb", set);
        assert_eq!(of_kind(&objects, "DaemonSet").len(), 1, "{set:?}");
        objects.iter().for_each(check_object);
    }
}

#[test]
fn the_agent_has_what_it_needs_and_no_more() {
    let Some(helm) = program("POINTSMAN_HELM") else { return };
    let objects = template(
        &helm,
        "edge",
        "lb",
        &["linkDevice=\"bond0\"", "clientDevices=[\"eth1\",\"eth2\"]", "debug=true", "httpPort=1234"],
    );
    let pod = of_kind(&objects, "DaemonSet")[0]["spec"]["template"]["spec"].clone();
    assert_eq!((&pod["hostNetwork"], &pod["dnsPolicy"]), (&json!(true), &json!("ClusterFirstWithHostNet")));
    let agent = &pod["containers"][0];
    let security = &agent["securityContext"];
    assert_eq!(
        security["capabilities"],
        json!({ "drop": ["ALL"], "add": ["BPF", "NET_ADMIN", "NET_BIND_SERVICE", "NET_RAW", "PERFMON"] })
    );
    assert_eq!(
        (&security["privileged"], &security["allowPrivilegeEscalation"], &security["readOnlyRootFilesystem"]),
        (&json!(false), &json!(false), &json!(true))
    );
    let env = |name: &str| {
        let all = agent["env"].as_array().unwrap();
        all.iter().find(|one| one["name"] == name).map(|one| one["value"].clone())
    };
    assert_eq!(env("LINKDEVICE"), Some(json!("bond0")));
    assert_eq!(env("CLIENT_DEVICES"), Some(json!("eth1,eth2")));
    assert_eq!(env("DEBUG"), Some(json!("true")));
    assert_eq!(env("KUBERNETES"), Some(json!("true")));
    assert_eq!(env("DEFAULT_CLASS"), Some(json!("true")));
    assert_eq!(agent["ports"][0]["containerPort"], json!(1234));
    assert!(agent["args"].as_array().unwrap().contains(&json!("--http-address=[::]:1234")));

    // Only with privileges a mount may travel to the node.
    assert!(!pod.to_string().contains("Bidirectional"));
    let objects = template(&helm, "edge", "lb", &["securityContext.privileged=true"]);
    let agent = &of_kind(&objects, "DaemonSet")[0]["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(agent["securityContext"]["privileged"], json!(true));
    assert_eq!(agent["securityContext"]["capabilities"], Value::Null);
    assert!(agent["volumeMounts"].to_string().contains("Bidirectional"));
}

#[test]
fn the_agent_understands_its_arguments() {
    let Some(helm) = program("POINTSMAN_HELM") else { return };
    let command = Cli::command();
    let run = command.find_subcommand("run").unwrap();
    let known: BTreeSet<_> =
        run.get_arguments().filter_map(|argument| argument.get_env()?.to_str()).collect();
    for set in
        [&["clientDevices=[\"eth1\"]"][..], &["securityContext.privileged=true", "onExit=\"withdraw\""]]
    {
        let objects = template(&helm, "edge", "lb", set);
        let agent = &of_kind(&objects, "DaemonSet")[0]["spec"]["template"]["spec"]["containers"][0];
        let args = agent["args"].as_array().unwrap().iter().map(|argument| argument.as_str().unwrap());
        // As the environment would say.
        let args = ["pointsman"].into_iter().chain(args).chain(["--link-device", "eth0"]);
        Cli::try_parse_from(args).unwrap_or_else(|error| panic!("{error}"));
        for variable in agent["env"].as_array().unwrap() {
            let name = variable["name"].as_str().unwrap();
            // The Leases' namespace is no argument.
            assert!(known.contains(name), "nothing reads {name}");
        }
    }
}

#[test]
fn wrong_values_are_refused() {
    let Some(helm) = program("POINTSMAN_HELM") else { return };
    for (set, field) in [
        ("linkDevice=\"\"", "linkDevice"),
        ("linkDevice=\"a-name-that-is-too-long\"", "linkDevice"),
        ("clientDevices=[\"eth1,eth2\"]", "clientDevices"),
        ("debug=\"yes\"", "debug"),
        ("httpPort=70000", "httpPort"),
        ("httpAddress=\"::\"", "httpAddress"),
        ("onExit=\"stay\"", "onExit"),
        ("image.digest=\"latest\"", "digest"),
        ("image.pullPolicy=\"Sometimes\"", "pullPolicy"),
        ("securityContext.capabilities=[\"CAP_BPF\"]", "capabilities"),
        ("hostPaths.bpf=\"sys/fs/bpf\"", "bpf"),
        ("cgroup=\"sys/fs/cgroup\"", "cgroup"),
        ("nodeSelector={\"a\":1}", "nodeSelector"),
        ("updateStrategy.type=\"Recreate\"", "type"),
        ("cleanup.timeout=0", "timeout"),
        ("linkdevice=\"eth0\"", "linkdevice"),
        ("image.registry=\"x\"", "registry"),
    ] {
        let output = run(&helm, &["template", "edge", &deploy("chart/pointsman"), "--set-json", set]);
        let text = text(&output);
        assert!(!output.status.success(), "{set} passed");
        assert!(
            text.contains("values don't meet the specifications") && text.contains(field),
            "{set}: {text}"
        );
    }
}

#[test]
fn two_releases_do_not_meet() {
    let Some(helm) = program("POINTSMAN_HELM") else { return };
    let mut seen = BTreeSet::new();
    for (release, namespace) in [("pointsman", "one"), ("pointsman", "two"), ("edge", "one")] {
        for object in template(&helm, release, namespace, &[]) {
            assert!(seen.insert(identity(&object)), "{} is there twice", identity(&object));
        }
    }
    // The pods of one are not the pods of another in the same namespace.
    let labels = |release: &str| {
        let objects = template(&helm, release, "one", &[]);
        of_kind(&objects, "DaemonSet")[0]["spec"]["selector"]["matchLabels"].clone()
    };
    assert_ne!(labels("pointsman"), labels("edge"));
}

#[test]
fn the_base_is_the_chart_with_its_defaults() {
    let (Some(helm), Some(kubectl)) = (program("POINTSMAN_HELM"), program("POINTSMAN_KUBECTL")) else {
        return;
    };
    let output = run(&kubectl, &["kustomize", &deploy("base")]);
    assert!(output.status.success(), "{}", text(&output));
    let mut base = objects(&String::from_utf8(output.stdout).unwrap());
    base.iter().for_each(check_object);
    base.retain(|object| !matches!(object["kind"].as_str(), Some("Namespace" | "CustomResourceDefinition")));
    let mut chart = template(&helm, "pointsman", "pointsman-system", &["cleanup.enabled=false"]);
    for object in &mut chart {
        let labels = object["metadata"]["labels"].as_object_mut().unwrap();
        assert!(labels.remove("helm.sh/chart").is_some());
        assert_eq!(labels.remove("app.kubernetes.io/managed-by"), Some(json!("Helm")));
    }
    base.sort_by_key(identity);
    chart.sort_by_key(identity);
    assert_eq!(base, chart, "run `cargo xtask gen`");
}

#[test]
fn definitions_are_those_of_the_code() {
    let (Some(helm), Some(kubectl)) = (program("POINTSMAN_HELM"), program("POINTSMAN_KUBECTL")) else {
        return;
    };
    let output = run(&kubectl, &["kustomize", &deploy("crds")]);
    assert!(output.status.success(), "{}", text(&output));
    let read = |yaml: &str| -> Vec<CustomResourceDefinition> {
        let mut all = objects(yaml);
        all.sort_by_key(identity);
        all.into_iter().map(|object| serde_json::from_value(object).unwrap()).collect()
    };
    assert_eq!(read(&String::from_utf8(output.stdout).unwrap()), crd::definitions());
    for keep in [true, false] {
        let set = format!("keep={keep}");
        let output = run(&helm, &["template", "crds", &deploy("chart/pointsman-crds"), "--set", &set]);
        assert!(output.status.success(), "{}", text(&output));
        let mut definitions = read(&String::from_utf8(output.stdout).unwrap());
        for definition in &mut definitions {
            let policy = definition
                .metadata
                .annotations
                .take()
                .and_then(|mut all| all.remove("helm.sh/resource-policy"));
            assert_eq!(policy.as_deref(), keep.then_some("keep"));
            assert!(definition.metadata.labels.take().is_some());
        }
        assert_eq!(definitions, crd::definitions());
    }
}
