//! `pointsman status`.

use std::fmt::Write;
use std::net::SocketAddr;

use super::Render;
use super::table::{Table, one_line};
use super::units::{bytes, count, seconds};
use crate::view::{AgentView, PortView, ServiceView, StatusView, TrafficView};

impl Render for StatusView {
    fn table(&self, wide: bool) -> String {
        let first = format!("{}{}", agent(self.agent.as_ref()), syn_cookies(&self.syn_cookies));
        let mut sections = vec![first, devices(self), services(self, wide)];
        if self.services.iter().any(|service| service.ports.iter().any(|port| !port.backends.is_empty())) {
            sections.push(backends(self, wide));
        }
        if wide && !self.flow_tables.is_empty() {
            sections.push(flow_tables(self));
        }
        sections.extend(problems(self));
        sections.join("\n")
    }
}

fn agent(agent: Option<&AgentView>) -> String {
    let Some(agent) = agent else {
        return "Agent: not running; what the kernel holds is shown.\n".to_owned();
    };
    let configuration = match agent.last_reload_seconds_ago {
        Some(age) => format!("configuration {} taken {} ago", agent.config_generation, seconds(age)),
        None => "no configuration taken yet".to_owned(),
    };
    format!(
        "Agent: version {}, pid {}, up {}, {configuration}.\n",
        agent.version,
        agent.pid,
        seconds(agent.uptime_seconds)
    )
}

fn syn_cookies(phase: &str) -> &'static str {
    match phase {
        "" => "",
        "accept" => "SYN cookies: those that were given out are accepted.\n",
        _ => "SYN cookies: each SYN is answered with one.\n",
    }
}

fn devices(view: &StatusView) -> String {
    if view.devices.is_empty() {
        return "No device carries the datapath: no packet is forwarded.\n".to_owned();
    }
    let mut table = Table::new(&["DEVICE", "MODE", "PROGRAM", "REASON"]);
    for device in &view.devices {
        let program = device.program_id.map(|id| id.to_string()).unwrap_or_default();
        let reason = device.reason.clone().unwrap_or_default();
        table.row(&[device.device.clone(), device.mode.to_string(), program, reason]);
    }
    table.finish()
}

fn flow_tables(view: &StatusView) -> String {
    let mut table = Table::new(&["FLOW-TABLE", "ENTRIES", "ROOM", "USED"]);
    for of in &view.flow_tables {
        let used = of.entries * 100 / of.room.max(1);
        table.row(&[of.table.clone(), count(of.entries), count(of.room), format!("{used}%")]);
    }
    table.finish()
}

fn services(view: &StatusView, wide: bool) -> String {
    if view.services.is_empty() {
        return "There are no Services.\n".to_owned();
    }
    let mut header =
        vec!["NAMESPACE", "SERVICE", "STATE", "VIP", "PORT", "BACKENDS", "FLOWS", "IN", "OUT", "REFUSED"];
    if wide {
        header.extend([
            "POOL",
            "BY",
            "INDEX",
            "PACKETS-IN",
            "PACKETS-OUT",
            "SOURCES",
            "AFFINITY",
            "SCHEDULER",
            "LIMIT",
        ]);
    }
    let mut table = Table::new(&header);
    for service in &view.services {
        if service.ports.is_empty() {
            let vips: Vec<String> = service.vips.iter().map(ToString::to_string).collect();
            let mut row = service_cells(service);
            row.push(vips.join(","));
            row.resize(header.len(), String::new());
            table.row(&row);
        }
        for port in &service.ports {
            table.row(&port_row(service, port, wide));
        }
    }
    table.finish()
}

fn service_cells(service: &ServiceView) -> Vec<String> {
    vec![service.namespace.clone(), service.name.clone(), service.state.to_string()]
}

fn port_row(service: &ServiceView, port: &PortView, wide: bool) -> Vec<String> {
    let usable = port.backends.iter().filter(|b| b.state == "active" && b.next_hop_resolved).count();
    let mut row = service_cells(service);
    row.extend([
        port.vip.to_string(),
        port_name(port),
        format!("{usable}/{}", port.backends.len()),
        count(port.counters.new_flows),
        bytes(port.counters.bytes_in),
        bytes(port.counters.bytes_out),
        port.counters.refused.map(count).unwrap_or_default(),
    ]);
    if wide {
        row.extend([
            service.pool.clone().unwrap_or_default(),
            port.served_by.name().to_owned(),
            port.service_index.map(|index| index.to_string()).unwrap_or_default(),
            count(port.counters.packets_in),
            count(port.counters.packets_out),
            sources(port),
            port.affinity_seconds.map(seconds).unwrap_or_default(),
            port.scheduler.clone(),
            port.connection_limit
                .map(|limit| format!("{}/s, {} at once", limit.per_second, limit.burst))
                .unwrap_or_default(),
        ]);
    }
    row
}

/// Who may connect; only how many ranges if they are more than one, for there may be thousands.
fn sources(port: &PortView) -> String {
    match port.source_ranges.as_deref() {
        None => "all".to_owned(),
        Some([]) => "none".to_owned(),
        Some([range]) => range.clone(),
        Some(ranges) => format!("{} ranges", ranges.len()),
    }
}

fn port_name(port: &PortView) -> String {
    match port.name.as_str() {
        "" => format!("{}/{}", port.port, port.protocol),
        name => format!("{}/{} ({name})", port.port, port.protocol),
    }
}

fn backends(view: &StatusView, wide: bool) -> String {
    let mut header = vec!["BACKEND", "OF", "STATE", "FLOWS", "IN", "OUT", "NEXT-HOP"];
    if wide {
        header.extend(["WEIGHT", "INDEX", "PACKETS-IN", "PACKETS-OUT"]);
    }
    let mut table = Table::new(&header);
    for service in &view.services {
        for port in &service.ports {
            for backend in &port.backends {
                let TrafficView { packets_in, bytes_in, packets_out, bytes_out, new_flows, .. } =
                    backend.counters;
                let next_hop = match (backend.next_hop_resolved, backend.next_hop.as_str()) {
                    (true, "") => "resolved".to_owned(),
                    (true, next_hop) => next_hop.to_owned(),
                    (false, "") => "unresolved".to_owned(),
                    (false, reason) => format!("unresolved: {reason}"),
                };
                let mut row = vec![
                    SocketAddr::new(backend.address, backend.port).to_string(),
                    format!("{}/{} {}", service.namespace, service.name, vip_port(port)),
                    match &backend.reason {
                        Some(reason) => format!("{} ({reason})", backend.state),
                        None => backend.state.clone(),
                    },
                    count(new_flows),
                    bytes(bytes_in),
                    bytes(bytes_out),
                    next_hop,
                ];
                if wide {
                    row.extend([
                        backend.weight.to_string(),
                        backend.backend_index.map(|index| index.to_string()).unwrap_or_default(),
                        count(packets_in),
                        count(packets_out),
                    ]);
                }
                table.row(&row);
            }
        }
    }
    table.finish()
}

fn vip_port(port: &PortView) -> String {
    format!("{}/{}", SocketAddr::new(port.vip, port.port), port.protocol)
}

fn problems(view: &StatusView) -> Option<String> {
    let mut text = String::new();
    let of_services = view.services.iter().flat_map(|service| {
        service
            .problems
            .iter()
            .map(move |message| (format!("Service {}/{}", service.namespace, service.name), message))
    });
    let others = view.problems.iter().map(|problem| (problem.subject.clone(), &problem.message));
    for (subject, message) in others.chain(of_services) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {}: {}", one_line(&subject), one_line(message));
    }
    (!text.is_empty()).then(|| format!("Problems:\n{text}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::render::{Format, render};
    use crate::view::{
        AttachMode, BackendView, ConnectionLimitView, DeviceView, FlowTableView, ProblemView, ServedBy,
        ServiceState,
    };

    fn example() -> StatusView {
        let backend = |address: &str, resolved: bool, next_hop: &str| BackendView {
            address: address.parse().unwrap(),
            port: 8080,
            state: "active".into(),
            reason: None,
            weight: 1,
            backend_index: Some(4),
            next_hop_resolved: resolved,
            next_hop: next_hop.into(),
            counters: TrafficView {
                new_flows: 12,
                bytes_in: 2_048,
                packets_in: 20,
                ..TrafficView::default()
            },
        };
        let port = PortView {
            name: "http".into(),
            protocol: "TCP".into(),
            vip: "2001:db8::10".parse().unwrap(),
            port: 80,
            served_by: ServedBy::Kernel,
            service_index: Some(3),
            source_ranges: Some(vec!["2001:db8:5::/48".into(), "2001:db8:6::/48".into()]),
            affinity_seconds: Some(10_800),
            connection_limit: Some(ConnectionLimitView { per_second: 100, burst: 200 }),
            scheduler: "maglev".into(),
            backends: vec![
                backend("2001:db8:1::2", true, "02:00:00:00:00:02 on eth1"),
                backend("2001:db8:1::3", false, "no route to 2001:db8:1::3"),
            ],
            counters: TrafficView { new_flows: 24, refused: Some(1), ..TrafficView::default() },
        };
        StatusView {
            agent: Some(AgentView {
                pid: 42,
                version: "0.1.0".into(),
                uptime_seconds: 192,
                config_generation: 2,
                last_reload_seconds_ago: Some(5),
            }),
            devices: vec![DeviceView {
                device: "eth0".into(),
                mode: AttachMode::XdpNative,
                reason: Some("the fastest way works".into()),
                program_id: Some(7),
            }],
            syn_cookies: "answer".into(),
            flow_tables: vec![FlowTableView { table: "flows_v4".into(), entries: 150, room: 200 }],
            services: vec![ServiceView {
                namespace: "default".into(),
                name: "web".into(),
                state: ServiceState::Active,
                vips: vec![port.vip],
                pool: Some("edge".into()),
                health: None,
                ports: vec![port],
                problems: vec!["port 443 is taken by default/other".into()],
            }],
            problems: vec![ProblemView { subject: "a.yaml".into(), message: "unknown\nfield `foo`".into() }],
        }
    }

    #[test]
    fn table_is_what_a_person_reads() {
        let expected = "\
Agent: version 0.1.0, pid 42, up 3m12s, configuration 2 taken 5s ago.
SYN cookies: each SYN is answered with one.

DEVICE   MODE         PROGRAM   REASON
eth0     xdp-native   7         the fastest way works

NAMESPACE   SERVICE   STATE    VIP            PORT            BACKENDS   FLOWS   IN    OUT   REFUSED
default     web       active   2001:db8::10   80/TCP (http)   1/2        24      0 B   0 B   1

BACKEND                OF                                  STATE    FLOWS   IN        OUT   NEXT-HOP
[2001:db8:1::2]:8080   default/web [2001:db8::10]:80/TCP   active   12      2.0 KiB   0 B   02:00:00:00:00:02 on eth1
[2001:db8:1::3]:8080   default/web [2001:db8::10]:80/TCP   active   12      2.0 KiB   0 B   unresolved: no route to 2001:db8:1::3

Problems:
  a.yaml: unknown field `foo`
  Service default/web: port 443 is taken by default/other
";
        assert_eq!(render(&example(), Format::Table).unwrap(), expected);
    }

    #[test]
    fn who_is_unhealthy_is_told_with_why() {
        let mut view = example();
        let backend = &mut view.services[0].ports[0].backends[0];
        (backend.state, backend.reason) = ("unhealthy".into(), Some("HTTP 503".into()));
        let text = render(&view, Format::Table).unwrap();
        assert!(text.contains("80/TCP   unhealthy (HTTP 503)   12 "), "{text}");
        assert!(text.contains("80/TCP (http)   0/2 "), "{text}");
    }

    #[test]
    fn wide_adds_columns_to_the_right() {
        let wide = render(&example(), Format::Wide).unwrap();
        assert!(
            wide.contains(
                "REFUSED   POOL   BY       INDEX   PACKETS-IN   PACKETS-OUT   SOURCES    AFFINITY   SCHEDULER   LIMIT\n"
            ),
            "{wide}"
        );
        assert!(wide.contains("2 ranges   3h         maglev      100/s, 200 at once\n"), "{wide}");
        assert!(
            wide.contains("FLOW-TABLE   ENTRIES   ROOM   USED\nflows_v4     150       200    75%\n"),
            "{wide}"
        );
        let told = |source_ranges: Option<Vec<String>>| {
            sources(&PortView { source_ranges, ..example().services[0].ports[0].clone() })
        };
        assert_eq!(
            [None, Some(vec![]), Some(vec!["10.0.0.0/8".into()])].map(told),
            ["all", "none", "10.0.0.0/8"]
        );
    }

    #[test]
    fn nothing_is_a_sentence() {
        let text = render(&StatusView::default(), Format::Table).unwrap();
        assert!(text.contains("There are no Services."), "{text}");
        assert!(text.contains("not running"), "{text}");
    }

    #[test]
    fn json_and_yaml_come_back_equal() {
        let json = render(&example(), Format::Json).unwrap();
        assert_eq!(serde_json::from_str::<StatusView>(&json).unwrap(), example());
        assert!(json.contains("\"nextHopResolved\": true") && json.contains("\"xdp-native\""), "{json}");
        let yaml = render(&example(), Format::Yaml).unwrap();
        assert_eq!(serde_saphyr::from_str::<StatusView>(&yaml).unwrap(), example());
    }
}
