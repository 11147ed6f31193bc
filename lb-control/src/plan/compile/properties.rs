use std::cell::RefCell;

use ipnet::IpNet;
use lb_common::abi::{Backend, ConnectionLimit, ServiceName, Tick};
use proptest::{collection::vec, prelude::*, sample::select};

use super::*;
use crate::{
    model::Severity,
    plan::compile::testing::{desired, look, paths},
    ports::FakeMaps,
};

/// Lines as [`desired`] reads them. Few Services, VIPs and backends, so that VIPs change hands.
fn world() -> impl Strategy<Value = String> {
    let backend = (1..7u8, select(vec!["", "", "*2", "*3", "*0", "~"]));
    let ranges = vec(select(&RANGES[..]), 0..4);
    let affinity = select(vec![
        "",
        "",
        "@60",
        "@7200",
        "!maglev",
        "^5",
        "@60 ^7/20",
        "!maglev @60",
        "!least-connections",
    ]);
    let clients = proptest::option::of((ranges, affinity)).prop_map(Option::unwrap_or_default);
    let entry = proptest::option::weighted(0.8, (0..4u8, vec(backend, 0..6), clients));
    vec(entry, 4).prop_map(|entries| {
        let mut text = String::new();
        for (vip, entry) in entries.into_iter().enumerate() {
            let Some((name, backends, (ranges, affinity))) = entry else { continue };
            let mut line = format!("s{name} {vip} 80: {affinity}");
            for range in ranges {
                line += &format!(" <{range}");
            }
            for (last, how) in backends.into_iter().collect::<BTreeMap<_, _>>() {
                line += &format!(" .{last}{how}");
            }
            text += &format!("{line}\n");
        }
        text
    })
}

/// Nested, distinct, of another family, with host bits.
const RANGES: [&str; 6] =
    ["10.1.0.0/16", "10.1.1.0/24", "10.2.0.0/16", "10.2.0.7/16", "0.0.0.0/0", "2001:db8::/32"];
/// Clients that differ in which of these let them in.
const CLIENTS: [[u8; 4]; 4] = [[10, 1, 0, 1], [10, 1, 1, 1], [10, 2, 0, 1], [198, 51, 100, 1]];

/// Whether each of [`CLIENTS`] may connect to each VIP.
fn allowed(maps: &FakeMaps) -> BTreeMap<SocketAddr, Vec<bool>> {
    let vips = maps.vips().unwrap();
    let of = |service| CLIENTS.iter().map(|client| maps.is_allowed(service, IpAddr::from(*client))).collect();
    vips.into_iter().map(|(vip, service)| (vip.socket(), of(service))).collect()
}

/// Maps that look at what packets would meet after every write, and fail at times.
struct Watched {
    maps: FakeMaps,
    failing: Vec<bool>,
    writes: usize,
    now: Duration,
    /// Regions that packets on their way may still read, until when, and what they must find.
    read: RefCell<Vec<(Duration, Region, Vec<u32>)>>,
    /// Who may connect, before the step and after it.
    verdicts: [BTreeMap<SocketAddr, Vec<bool>>; 2],
}

impl Watched {
    fn new(limits: Limits) -> Self {
        Self {
            maps: FakeMaps::new(limits),
            failing: vec![],
            writes: 0,
            now: Duration::ZERO,
            read: RefCell::default(),
            verdicts: Default::default(),
        }
    }

    /// No client meets anything but what it met before or will meet afterwards.
    fn check_clients(&self) {
        let [before, after] = &self.verdicts;
        for (vip, now) in allowed(&self.maps) {
            for (number, now) in now.into_iter().enumerate() {
                let known = [before, after].map(|verdicts| verdicts.get(&vip).map(|all| all[number]));
                assert!(
                    known.contains(&Some(now)),
                    "{:?} to {vip}: {now}, before and after {known:?}",
                    CLIENTS[number]
                );
            }
        }
    }
}

impl Watched {
    fn check(&self) {
        look(&self.maps);
        for (until, region, slots) in self.read.borrow().iter().filter(|(until, ..)| *until > self.now) {
            assert_eq!(
                self.maps.slots(region.first, region.count).unwrap(),
                *slots,
                "used again before {until:?}"
            );
        }
    }
}

impl MapStore for Watched {
    fn apply(&mut self, op: &MapOp) -> anyhow::Result<()> {
        self.writes += 1;
        if self.failing.get(self.writes - 1).copied().unwrap_or(false) {
            anyhow::bail!("by script");
        }
        if let MapOp::SetService { index, .. } = op {
            let old = self.maps.service(*index);
            let slots = self.maps.slots(old.first_slot, old.slot_count())?;
            let region = Region { first: old.first_slot, count: old.slot_count() };
            self.read.get_mut().push((self.now + Settings::default().grace, region, slots));
        }
        self.maps.apply(op)?;
        self.check();
        if !self.verdicts[1].is_empty() {
            self.check_clients();
        }
        Ok(())
    }
    fn limits(&self) -> Limits {
        self.maps.limits()
    }
    fn vips(&self) -> anyhow::Result<Vec<(Vip, u32)>> {
        self.maps.vips()
    }
    fn services(&self) -> anyhow::Result<Vec<(u32, Service)>> {
        self.maps.services()
    }
    fn service_names(&self) -> anyhow::Result<Vec<(u32, ServiceName)>> {
        self.maps.service_names()
    }
    fn backends(&self) -> anyhow::Result<Vec<(u32, Backend)>> {
        self.maps.backends()
    }
    fn slots(&self, first: u32, count: u32) -> anyhow::Result<Vec<u32>> {
        self.maps.slots(first, count)
    }
    fn source_ranges(&self) -> anyhow::Result<Vec<(u32, IpNet)>> {
        self.maps.source_ranges()
    }
    fn affinity_timeouts(&self) -> anyhow::Result<Vec<(u32, Tick)>> {
        self.maps.affinity_timeouts()
    }
    fn connection_limits(&self) -> anyhow::Result<Vec<(u32, ConnectionLimit)>> {
        self.maps.connection_limits()
    }
    fn snat_addresses(&self) -> anyhow::Result<Vec<[u8; 16]>> {
        self.maps.snat_addresses()
    }
    fn config(&self) -> anyhow::Result<Option<Config>> {
        self.maps.config()
    }
}

/// Maps of a desired state.
fn expected_maps(desired: &Desired) -> FakeMaps {
    let mut maps = FakeMaps::new(Limits::default());
    let mut compiler = Compiler::new(Limits::default(), Settings::default());
    go(&mut compiler, &mut maps, desired, 1, Duration::ZERO);
    maps
}

/// What [`look`] has to show for a desired state.
fn expected(desired: &Desired) -> String {
    look(&expected_maps(desired))
}

/// How many ranges, timeouts and limits there are: none is left over.
fn remains(maps: &FakeMaps) -> (usize, usize, usize) {
    let limits = maps.connection_limits().unwrap().len();
    (maps.source_ranges().unwrap().len(), maps.affinity_timeouts().unwrap().len(), limits)
}

fn go(
    compiler: &mut Compiler,
    maps: &mut dyn MapStore,
    desired: &Desired,
    device: u8,
    now: Duration,
) -> (usize, Vec<Failure>) {
    let delta = compiler.reconcile(desired, &paths(desired, device), &Config::default(), Scope::All, now);
    assert_eq!(delta.problems, [], "nothing is short here");
    (delta.ops().count(), apply(&delta, maps, compiler, now))
}

/// One step: where to, through which device, seconds since the last step, which writes fail,
/// whether the agent dies afterwards.
type Step = (String, u8, u64, Vec<bool>, bool);

fn step() -> impl Strategy<Value = Step> {
    let failing = vec(proptest::bool::weighted(0.05), 0..60);
    (world(), 1..4u8, 0..3u64, failing, proptest::bool::weighted(0.2))
}

/// What somebody may do to the maps by hand.
fn damage() -> impl Strategy<Value = MapOp> {
    let index = 0..12u32;
    let backend = (any::<u8>(), 0..4u8, 0..4u32, 0..3u16).prop_map(|(address, state, service, snat)| {
        let mut wide = [0; 16];
        wide[..4].copy_from_slice(&[10, 0, 0, address % 8]);
        let (port, family) = (8080u16.to_be_bytes(), 4 + (address % 2) * 2);
        let (snat_first, snat_count) = (snat * 100, snat);
        Backend { address: wide, port, state, family, service, snat_first, snat_count, ..Backend::default() }
    });
    let name = (0..5u8, 0..5u8).prop_map(|(name, vip)| {
        let key = super::testing::key(&format!("s{name} {vip} 80"));
        Box::new(super::name::service_name(&key, "http"))
    });
    let name = prop_oneof![name, Just(Box::default())];
    let count = prop_oneof![0..9u32, (0..9u32).prop_map(|count| count | 3 << 24), Just(u32::MAX)];
    prop_oneof![
        (index.clone(), select(&RANGES[..4])).prop_map(|(service, range)| {
            let range = range.parse::<IpNet>().unwrap().trunc();
            MapOp::AllowSource { service, range }
        }),
        (index.clone(), select(&RANGES[..]))
            .prop_map(|(service, range)| { MapOp::ForbidSource { service, range: range.parse().unwrap() } }),
        (index.clone(), 0..3u32).prop_map(|(service, ticks)| MapOp::SetAffinityTimeout { service, ticks }),
        (index.clone(), 0..3u32).prop_map(|(service, rate)| {
            MapOp::SetConnectionLimit { service, limit: ConnectionLimit { rate, burst: rate } }
        }),
        (index.clone(), backend).prop_map(|(index, value)| MapOp::SetBackend { index, value }),
        (index.clone(), name).prop_map(|(index, value)| MapOp::SetServiceName { index, value }),
        (index.clone(), 0..30u32, count).prop_map(|(index, first_slot, count_and_flags)| MapOp::SetService {
            index,
            value: Service { first_slot, count_and_flags }
        }),
        (index.clone(), vec(0..20u32, 1..9))
            .prop_map(|(first, backends)| MapOp::SetSlots { first, backends }),
        (index.clone(), 0..6u8).prop_map(|(service, last)| MapOp::SetVip {
            vip: Vip::new(IpAddr::from([192, 0, 2, last]), 80, 6),
            service
        }),
        (0..6u8).prop_map(|last| MapOp::DeleteVip { vip: Vip::new(IpAddr::from([192, 0, 2, last]), 80, 6) }),
        (index, any::<[u8; 16]>()).prop_map(|(index, address)| MapOp::SetSnatAddress { index, address }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Whatever fails and whenever the agent dies: at every moment a VIP leads to its own
    /// Service's backends, and in the end to all of them; survivors keep their places.
    #[test]
    fn every_prefix_is_whole_and_retries_converge(steps in vec(step(), 1..8)) {
        let mut maps = Watched::new(Limits::default());
        let mut compiler = Compiler::adopt(&maps, Settings::default()).unwrap();
        let mut seats: BTreeMap<(ServiceKey, SocketAddr), u32> = BTreeMap::new();
        for (text, device, seconds, failing, dies) in steps {
            maps.now += Duration::from_secs(seconds);
            (maps.failing, maps.writes) = (failing, 0);
            let now = maps.now;
            let desired = desired(&text);
            let wanted = expected_maps(&desired);
            maps.verdicts = [allowed(&maps.maps), allowed(&wanted)];
            let mut rounds = 0;
            loop {
                let (_, failures) = go(&mut compiler, &mut maps, &desired, device, now);
                if failures.is_empty() {
                    break;
                }
                rounds += 1;
                prop_assert!(rounds < 80, "{failures:?}");
                if dies {
                    maps.read.get_mut().clear();
                    compiler = Compiler::adopt(&maps, Settings::default()).unwrap();
                }
            }
            prop_assert_eq!(look(&maps.maps), look(&wanted));
            prop_assert_eq!(remains(&maps.maps), remains(&wanted));
            if dies {
                // A packet on its way does not outlast the time that a restart takes.
                maps.read.get_mut().clear();
                compiler = Compiler::adopt(&maps, Settings::default()).unwrap();
            }
            let (ops, _) = go(&mut compiler, &mut maps, &desired, device, now);
            prop_assert_eq!(ops, 0, "nothing changed");
            let mut seen = BTreeMap::new();
            for (key, entry) in &desired.entries {
                for address in entry.backends.keys() {
                    let index = compiler.backend_index(key, address).unwrap();
                    let place = (key.clone(), *address);
                    prop_assert_eq!(seats.get(&place).copied().unwrap_or(index), index);
                    seen.insert(place, index);
                }
            }
            seats = seen;
        }
    }

    /// Whatever somebody writes into the maps is put right, by the agent that knows better and by
    /// one that only knows the maps.
    #[test]
    fn damage_is_repaired(text in world(), damage in vec(damage(), 1..6), restart in any::<bool>()) {
        let desired = desired(&text);
        let mut maps = FakeMaps::new(Limits::default());
        let mut compiler = Compiler::adopt(&maps, Settings::default()).unwrap();
        go(&mut compiler, &mut maps, &desired, 1, Duration::ZERO);
        for op in &damage {
            maps.apply(op).unwrap();
        }
        if restart {
            compiler = Compiler::adopt(&maps, Settings::default()).unwrap();
        } else {
            compiler.reload(&maps).unwrap();
        }
        let (_, failures) = go(&mut compiler, &mut maps, &desired, 1, Duration::ZERO);
        prop_assert!(failures.is_empty());
        prop_assert_eq!(look(&maps), expected(&desired));
        prop_assert_eq!(remains(&maps), remains(&expected_maps(&desired)));
        compiler.reload(&maps).unwrap();
        let (ops, _) = go(&mut compiler, &mut maps, &desired, 1, Duration::ZERO);
        prop_assert_eq!(ops, 0);
        let mut compiler = Compiler::adopt(&maps, Settings::default()).unwrap();
        let (ops, _) = go(&mut compiler, &mut maps, &desired, 1, Duration::ZERO);
        prop_assert_eq!(ops, 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Maps that are too small: packets meet nothing wrong, and what fits again is served.
    #[test]
    fn short_maps_stay_whole(
        worlds in vec((world(), 0..3u64, any::<bool>()), 1..8),
        services in 1..5u32, backends in 2..12u32, slots in 1..16u32, vips_v4 in 1..5u32,
        source_ranges_v4 in 1..5u32,
    ) {
        let limits = Limits { services, backends, slots, vips_v4, source_ranges_v4, ..Limits::default() };
        let mut maps = Watched::new(limits);
        let mut compiler = Compiler::adopt(&maps, Settings::default()).unwrap();
        for (text, seconds, purge) in worlds {
            // Slots of a Service that is short are changed in place: what packets on their way
            // may read is not what it was, but it is right.
            maps.read.get_mut().clear();
            maps.now += Duration::from_secs(seconds);
            if purge {
                compiler.flows_purged(&compiler.freed_backends());
            }
            let desired = desired(&text);
            let delta = compiler.reconcile(&desired, &paths(&desired, 1), &Config::default(), Scope::All, maps.now);
            let is_short = delta.problems.iter().any(|problem| problem.severity == Severity::Error);
            prop_assert_eq!(delta.retry_at.is_some(), is_short);
            let now = maps.now;
            let failures = apply(&delta, &mut maps, &mut compiler, now);
            prop_assert!(failures.is_empty(), "{failures:?}");
        }
        // A single small Service fits once everything else is gone and has rested.
        for text in ["", "s0 0 80: .1", "s0 0 80: .1"] {
            maps.now += Duration::from_secs(10);
            compiler.flows_purged(&compiler.freed_backends());
            let now = maps.now;
            let desired = desired(text);
            let delta = compiler.reconcile(&desired, &paths(&desired, 1), &Config::default(), Scope::All, now);
            apply(&delta, &mut maps, &mut compiler, now);
        }
        prop_assert_eq!(look(&maps.maps), "s0 192.0.2.0:80/TCP: 10.0.0.1:8080\n");
    }
}
