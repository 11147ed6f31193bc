//! Nanoseconds per packet of what is not XDP to a remote backend in turn: TC, backends on this node, the
//! other ways to choose a backend.

use anyhow::{Result, ensure};

use super::baselines::Hook;
use super::cost::{CYCLES, Cost, Effort, PASS, Shape, TC_NEXT, TC_REDIRECT, TCP4, TRANSMIT, shuffled};
use super::packets::{FLOWS, Segment, Tuple, client};
use super::product::{PORT, Scheduling, VIP};
use super::report::Report;

/// Ways to choose a backend, with the number of backends. Of least connections, 16 is as many as are ever
/// compared.
const SCHEDULINGS: [(Scheduling, u8, &str); 4] = [
    (Scheduling::RoundRobin, 3, "in turn, 3 backends"),
    (Scheduling::Maglev, 3, "Maglev, 3 backends"),
    (Scheduling::LeastConnections, 3, "least connections, 3 backends"),
    (Scheduling::LeastConnections, 16, "least connections, 16 backends"),
];

/// Runs one repetition of all of them but [`Cost::in_tc`].
///
/// # Errors
/// When the kernel refuses, or a program does not do what is measured.
pub fn measure(report: &mut Report, effort: Effort) -> Result<()> {
    let clients: Vec<_> = (0..FLOWS).map(|index| client(index, VIP, PORT, 0)).collect();
    for (scheduling, backends, name) in SCHEDULINGS {
        let mut cost = Cost::begin(report, effort, Shape { backends, ..Shape::default() })?;
        cost.product.set_scheduling(scheduling)?;
        cost.aim(TCP4, Segment::Syn, &clients)?;
        let entry = cost.entry.try_clone()?;
        let ns = cost.once(&entry, TRANSMIT)?;
        cost.add(&format!("tcp v4 new flow, {name}"), "ns", ns);
    }
    let mut cost = Cost::begin(report, effort, Shape { in_tc: true, ..Shape::default() })?;
    cost.aim(TCP4, Segment::Syn, &clients)?;
    let ingress = cost.product.ingress_handle()?;
    let ns = cost.once(&ingress, TC_REDIRECT)?;
    cost.add("TC: tcp v4 new flow, fresh tables", "ns", ns);
    drop(cost);
    let mut cost = Cost::begin(report, effort, Shape { in_tc: true, ..Shape::default() })?;
    cost.local(&clients)
}

/// What is expected of the numbers, or to be known of them.
pub fn expect(report: &mut Report) {
    for (.., name) in SCHEDULINGS.into_iter().skip(1) {
        report.expect_ratio(
            &format!("new flow, {name} / in turn"),
            &format!("tcp v4 new flow, {name}"),
            "tcp v4 new flow, in turn, 3 backends",
            None,
            true,
        );
    }
    report.expect_ratio(
        "new flow in TC / in XDP",
        "TC: tcp v4 new flow, fresh tables",
        "tcp v4 new flow, in turn, 3 backends",
        None,
        true,
    );
    for direction in ["to backend", "to client"] {
        for flows in CYCLES {
            let xdp = format!("tcp v4 {direction}, {flows} flows");
            for (prefix, place) in [("TC: tcp v4", "TC"), ("local backend: tcp v4", "local backend")] {
                report.expect_ratio(
                    &format!("{place} / XDP, tcp v4 {direction}, {flows} flows"),
                    &format!("{prefix} {direction}, {flows} flows"),
                    &xdp,
                    None,
                    true,
                );
            }
        }
    }
}

impl Cost<'_> {
    /// The packets of established flows again, in TC.
    pub fn in_tc(&mut self, clients: &[Tuple], replies: &[Tuple]) -> Result<()> {
        let ingress = self.product.ingress_handle()?;
        let nothing = self.bench.nothing(Hook::Tc)?;
        for (direction, segment, tuples) in
            [("to backend", Segment::Ack, clients), ("to client", Segment::Reply, replies)]
        {
            self.aim(TCP4, segment, tuples)?;
            for flows in CYCLES {
                let harness = self.cycle(&nothing, flows, TC_NEXT)?;
                let ns = self.forwarding(&ingress, TCP4, flows, TC_REDIRECT)?;
                self.add(&format!("TC: tcp v4 {direction}, {flows} flows"), "ns", ns - harness);
            }
        }
        Ok(())
    }

    /// Flows to backends on this node: XDP hands them to the stack, TC translates the replies.
    fn local(&mut self, clients: &[Tuple]) -> Result<()> {
        self.product.make_local()?;
        self.prefix = "local backend: ".to_owned();
        let (entry, egress) = (self.entry.try_clone()?, self.product.egress_handle()?);
        self.aim(TCP4, Segment::Syn, clients)?;
        let ns = self.once(&entry, PASS)?;
        self.add("tcp v4 new flow, fresh tables", "ns", ns);
        let replies = self.product.replies(TCP4, clients)?;
        self.aim(TCP4, Segment::SynAck, &replies)?;
        let ns = self.once(&egress, TC_NEXT)?;
        self.add("tcp v4 first answer", "ns", ns);
        self.aim(TCP4, Segment::Ack, clients)?;
        let ns = self.once(&entry, PASS)?;
        self.add("tcp v4 handshake's end (promotion)", "ns", ns);
        for client in clients {
            ensure!(self.product.is_established(TCP4, client)?, "{client:?} is not established");
        }
        let (clients, replies) = (shuffled(clients), shuffled(&replies));
        for (direction, segment, tuples, target, action) in [
            ("to backend", Segment::Ack, &clients, &entry, PASS),
            ("to client", Segment::Reply, &replies, &egress, TC_NEXT),
        ] {
            self.aim(TCP4, segment, tuples)?;
            let nothing = self.bench.nothing(target.hook)?;
            let idle = if target.hook == Hook::Tc { TC_NEXT } else { PASS };
            for flows in CYCLES {
                let harness = self.cycle(&nothing, flows, idle)?;
                let ns = self.forwarding(target, TCP4, flows, action)?;
                self.add(&format!("tcp v4 {direction}, {flows} flows"), "ns", ns - harness);
            }
        }
        Ok(())
    }
}
