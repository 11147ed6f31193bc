//! What 10,000 Services with 10 endpoints each cost, in memory: reading, deciding, compiling; and
//! one endpoint's change. `cargo run --release -p lb-control --example plan_scale`

use std::{
    collections::BTreeSet,
    fmt::Write,
    time::{Duration, Instant},
};

use lb_common::abi::Config;
use lb_control::{
    model::{ObjectChange, ObjectRef, Objects},
    plan::{
        self, Addressing, Compiler, Path, Paths, Planner, Scope, Settings, apply,
        ipam::{self, Ipam},
    },
    ports::{FakeMaps, Limits},
    source::file::{FileState, Merger, decode},
};

fn timed<T>(what: &str, run: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = run();
    println!("{what:48} {:10.3} ms", start.elapsed().as_secs_f64() * 1e3);
    result
}

fn manifest(number: u32) -> String {
    let mut text = format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{number}}}\nspec: {{type: LoadBalancer, ports: \
         [{{port: 80}}]}}\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: s{number}, \
         labels: {{kubernetes.io/service-name: s{number}}}}}\naddressType: IPv4\nports: [{{port: 8080}}]\nendpoints:\n"
    );
    for endpoint in 0..10 {
        writeln!(text, "- addresses: [10.{}.{}.{endpoint}]", number >> 8, number & 255).expect("to a string");
    }
    text
}

fn main() {
    let pool = "apiVersion: pointsman.dev/v1alpha1\nkind: AddressPool\nmetadata: {name: p}\nspec: {addresses: \
                [172.16.0.0/16]}\n";
    let text: String = std::iter::once(pool.to_owned()).chain((0..10_000).map(manifest)).collect();
    let decoded = timed("decode 10,000 Services, 100,000 endpoints", || decode("all.yaml", &text));
    let mut merger = Merger::default();
    timed("merge", || merger.merge(&[("all.yaml".into(), FileState::Read(decoded.into()))]));
    let objects = timed("snapshot", || merger.snapshot()).objects;
    let options = ipam::Options { default_class: true, outside_pools: true, deferred_release: false };
    let addressing = Addressing::Decides(Box::new(Ipam::new(options)));
    let mut planner = Planner::new(true, "edge", addressing);
    let changes = Objects::default().changes_to(&objects);
    timed("decide, from scratch", || planner.apply(changes));
    let path = Path { snat: vec![[10, 255, 0, 1].into()], ..Path::default() };
    let paths: Paths = planner.backends().map(|address| (address, path.clone().into())).collect();
    let mut maps = FakeMaps::new(Limits::default());
    let mut compiler = Compiler::new(Limits::default(), Settings::default());
    let config = Config::default();
    let now = Duration::ZERO;
    let delta = timed("compile, from scratch", || {
        compiler.reconcile(&planner.plan().desired, &paths, &config, Scope::All, now)
    });
    println!("    {} operations", delta.ops().count());
    let failures = timed("apply to maps in memory", || apply(&delta, &mut maps, &mut compiler, now));
    assert!(failures.is_empty());
    let object = ObjectRef::new("default", "s5000");
    let mut slice = (*objects.slices[&object]).clone();
    slice.endpoints.pop();
    let change = ObjectChange::Slice(object.clone(), Some(slice.into()));
    let services = timed("decide, one endpoint less", || planner.apply([change])).services;
    assert_eq!(services, BTreeSet::from([object]));
    let delta = timed("compile, that Service", || {
        compiler.reconcile(&planner.plan().desired, &paths, &config, Scope::Services(&services), now)
    });
    println!("    {} operations", delta.ops().count());
    plan::apply(&delta, &mut maps, &mut compiler, now);
    timed("compile, everything, nothing to do", || {
        compiler.reconcile(&planner.plan().desired, &paths, &config, Scope::All, now)
    });
    let mut compiler =
        timed("adopt", || Compiler::adopt(&maps, Settings::default()).expect("maps in memory can be read"));
    let delta = timed("compile after adoption", || {
        compiler.reconcile(&planner.plan().desired, &paths, &config, Scope::All, now)
    });
    assert!(delta.is_empty());
}
