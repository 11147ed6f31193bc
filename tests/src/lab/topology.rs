//! How the namespaces are joined.

use std::{
    fmt::Write,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context, Result, ensure};

use super::{
    agent::{Seat, wait_for},
    netns::Namespace,
    registry,
    xdp_pass::XdpPass,
};

/// Where VIPs are taken from.
pub const VIPS_V4: &str = "203.0.113.0/28";
/// Where VIPs are taken from.
pub const VIPS_V6: &str = "2001:db8:f::/120";

/// Number of the backend that is the first pod of the edge.
pub const POD: u8 = 101;
/// Number of the backend that is the edge itself, by its address towards the client: a server that
/// does not choose answers datagrams from there.
pub const HOST: u8 = 200;

/// What is left of 1500 bytes in a VXLAN tunnel over IPv4.
const TUNNEL_MTU: u32 = 1450;

static NEXT: AtomicU32 = AtomicU32::new(1);

/// What the edge's device towards the backends is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lan {
    /// Like a NIC.
    #[default]
    Nic,
    /// A bridge, with the NIC as its port.
    Bridge,
    /// A VXLAN tunnel over the NIC, as of an overlay network.
    Vxlan,
}

/// What a lab has.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Number of backends.
    pub backends: u8,
    /// Puts a router between client and edge; its link to the client has this MTU, yet the client
    /// announces an MSS for 1500 bytes, so that backends learn by ICMP alone.
    pub client_mtu: Option<u32>,
    /// Client, VIPs and backends are on one LAN, and the edge has one device, `uplink`: what comes in
    /// leaves by the same device, and VIPs are found by ARP and neighbour discovery.
    pub one_armed: bool,
    /// Number of pods on the edge itself, behind its bridge `cni0`, with all offloads on.
    pub pods: u8,
    /// What `lan` is.
    pub lan: Lan,
    /// Makes `uplink` a bridge, with the NIC as its port.
    pub uplink_is_bridge: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            backends: 3,
            client_mtu: None,
            one_armed: false,
            pods: 0,
            lan: Lan::Nic,
            uplink_is_bridge: false,
        }
    }
}

/// A client, an edge node and backends. Removed when dropped.
#[derive(Debug)]
pub struct Lab {
    /// Where connections come from.
    pub client: Arc<Namespace>,
    /// Between client and edge, with `Options::client_mtu`.
    pub router: Option<Namespace>,
    /// Where the agent runs: device `uplink` to the client, `lan` to the backends.
    pub edge: Namespace,
    /// The bridge of the LAN.
    pub switch: Namespace,
    /// Backends, with roles `b1`, `b2`, …
    pub backends: Vec<Namespace>,
    /// Pods of the edge, with roles `p1`, `p2`, …: the backends from [`POD`] on.
    pub pods: Vec<Namespace>,
    id: String,
    directory: PathBuf,
    far_ends: Vec<XdpPass>,
}

impl Lab {
    /// Client, edge and backends, every hop routed.
    ///
    /// # Errors
    /// When not root, or a tool is missing.
    pub fn routed(backends: u8) -> Result<Self> {
        Self::new(Options { backends, ..Options::default() })
    }

    /// A lab with these options.
    ///
    /// # Errors
    /// When not root, or a tool is missing.
    pub fn new(options: Options) -> Result<Self> {
        registry::sweep_dead_owners();
        let id = format!("pm-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(&id);
        registry::add_directory(&directory);
        registry::add_directory(&Path::new(registry::BPF_DIR).join(&id));
        let namespace = |role: &str| Namespace::new(&id, role);
        let mut lab = Self {
            client: Arc::new(namespace("client")?),
            router: options.client_mtu.map(|_| namespace("router")).transpose()?,
            edge: namespace("edge")?,
            switch: namespace("switch")?,
            backends: (1..=options.backends).map(|n| namespace(&format!("b{n}"))).collect::<Result<_>>()?,
            pods: (1..=options.pods).map(|n| namespace(&format!("p{n}"))).collect::<Result<_>>()?,
            id: id.clone(),
            directory,
            far_ends: Vec::new(),
        };
        fs::create_dir(&lab.directory).with_context(|| format!("cannot make {}", lab.directory.display()))?;
        ensure!(!options.one_armed || lab.router.is_none(), "a one-armed lab has no router");
        if !options.one_armed {
            lab.join_uplink(options)?;
        }
        lab.join_lan(options)?;
        lab.join_pods()?;
        let far_uplink =
            lab.router.as_ref().map_or((lab.client.as_ref(), "eth0"), |router| (router, "north"));
        let far_uplink = (!options.one_armed).then_some(far_uplink);
        for (namespace, device) in far_uplink.into_iter().chain([(&lab.switch, "edge")]) {
            lab.far_ends.push(XdpPass::attach(namespace, device)?);
        }
        lab.wait_links()?;
        Ok(lab)
    }

    /// Gives the devices of client and backends a queue. Without one, what they send while the other end
    /// has no time is lost at once, and TCP takes that for congestion of the host itself: it tries 15 times
    /// in 7.5 s, then gives the connection up (`tcp_send_probe0` in net/ipv4/tcp_output.c).
    ///
    /// # Errors
    /// When tc cannot.
    pub fn queue_frames(&self) -> Result<()> {
        for namespace in [self.client.as_ref()].into_iter().chain(&self.backends) {
            namespace.run(["tc", "qdisc", "replace", "dev", "eth0", "root", "pfifo", "limit", "50000"])?;
        }
        Ok(())
    }

    /// Every namespace.
    pub fn namespaces(&self) -> impl Iterator<Item = &Namespace> {
        [self.client.as_ref(), &self.edge, &self.switch]
            .into_iter()
            .chain(&self.router)
            .chain(&self.backends)
            .chain(&self.pods)
    }

    /// `pm-<pid>-<n>`: its own name, and the start of the names of its namespaces.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// A directory of its own for files.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where the agent of this lab pins.
    #[must_use]
    pub fn pin_directory(&self) -> PathBuf {
        Path::new(registry::BPF_DIR).join(&self.id)
    }

    /// The edge, for an agent.
    #[must_use]
    pub fn seat(&self) -> Seat<'_> {
        Seat { namespace: &self.edge, directory: self.directory.clone(), pins: self.pin_directory() }
    }

    /// Addresses of backend `n`, from 1; of a pod of the edge, from [`POD`]; of the edge, [`HOST`].
    #[must_use]
    pub fn backend_address(n: u8, v6: bool) -> IpAddr {
        if n == HOST {
            return if v6 {
                IpAddr::V6(Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, 1))
            } else {
                IpAddr::V4(Ipv4Addr::new(10, 1, 0, 1))
            };
        }
        if let Some(pod) = n.checked_sub(POD) {
            return if v6 {
                IpAddr::V6(Ipv6Addr::new(0xfd04, 0, 0, 0, 0, 0, 0, 0x11 + u16::from(pod)))
            } else {
                IpAddr::V4(Ipv4Addr::new(10, 4, 0, 11 + pod))
            };
        }
        if v6 {
            // fd02::11 is written in hexadecimal, 10.2.0.11 is not: they look alike.
            let last = u16::from(n - 1) / 10 * 0x10 + u16::from(n - 1) % 10 + 0x11;
            IpAddr::V6(Ipv6Addr::new(0xfd02, 0, 0, 0, 0, 0, 0, last))
        } else {
            IpAddr::V4(Ipv4Addr::new(10, 2, 0, 10 + n))
        }
    }

    /// Makes the second backend the router to a machine, 10.7.0.2 and fd07::2, by a link of this MTU.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn behind_second_backend(&self, mtu: u32) -> Result<Namespace> {
        let router = &self.backends[1];
        let outside = Namespace::new(self.id(), "outside")?;
        forwarding(router)?;
        router.ip_batch(&format!(
            "link add south mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}
             addr add 10.7.0.1/24 dev south\n addr add fd07::1/64 dev south nodad\n link set south up",
            outside.name(),
        ))?;
        outside.ip_batch(
            "addr add 10.7.0.2/24 dev eth0\n addr add fd07::2/64 dev eth0 nodad\n link set eth0 up
             route add default via 10.7.0.1\n route add ::/0 via fd07::1",
        )?;
        self.edge.ip_batch("route add 10.7.0.0/24 via 10.2.0.12\n route add fd07::/64 via fd02::12")?;
        Ok(outside)
    }

    /// Command line that opens a shell on the edge, with the machine's pins in sight (`ip netns
    /// exec` would hide them behind a fresh `/sys`).
    #[must_use]
    pub fn edge_shell_hint(&self) -> String {
        format!("nsenter --net={}", self.edge.path().display())
    }

    /// The kernel tells devices of a new carrier up to a second late (net/core/link_watch.c); until
    /// then they drop what is sent.
    fn wait_links(&self) -> Result<()> {
        for namespace in self.namespaces() {
            wait_for("links to come up", || {
                let links = namespace.run(["ip", "-o", "link", "show", "type", "veth"])?;
                Ok(links.lines().all(|link| link.contains(" state UP ")).then_some(()))
            })?;
        }
        Ok(())
    }

    fn join_uplink(&self, options: Options) -> Result<()> {
        let Self { client, edge, .. } = self;
        forwarding(edge)?;
        let (gateway4, gateway6) = ("10.1.0.1", "fd01::1");
        if let (Some(router), Some(mtu)) = (&self.router, options.client_mtu) {
            forwarding(router)?;
            veth((client, "eth0"), (router, "south"))?;
            veth((router, "north"), (edge, "uplink"))?;
            router.ip_batch(&format!(
                "addr add 10.1.0.1/24 dev south\n addr add fd01::1/64 dev south nodad\n link set south mtu {mtu} up
                 addr add 10.3.0.2/24 dev north\n addr add fd03::2/64 dev north nodad\n link set north up
                 route add default via 10.3.0.1\n route add ::/0 via fd03::1"
            ))?;
            client.ip_batch(&format!("link set eth0 mtu {mtu}"))?;
            edge.ip_batch(
                "addr add 10.3.0.1/24 dev uplink\n addr add fd03::1/64 dev uplink nodad\n link set uplink up
                 route add default via 10.3.0.2\n route add ::/0 via fd03::2",
            )?;
        } else {
            if options.uplink_is_bridge {
                veth((client, "eth0"), (edge, "wire"))?;
                edge.ip_batch("link add uplink type bridge stp_state 0 mcast_snooping 0\n link set wire master uplink up")?;
            } else {
                veth((client, "eth0"), (edge, "uplink"))?;
            }
            edge.ip_batch(
                "addr add 10.1.0.1/24 dev uplink\n addr add fd01::1/64 dev uplink nodad\n link set uplink up",
            )?;
        }
        client.ip_batch(&format!(
            "addr add 10.1.0.2/24 dev eth0\n addr add fd01::2/64 dev eth0 nodad\n link set eth0 up
             route add default via {gateway4} advmss 1460\n route add ::/0 via {gateway6} advmss 1440"
        ))
    }

    /// As a CNI plug-in with a bridge does it.
    fn join_pods(&self) -> Result<()> {
        if self.pods.is_empty() {
            return Ok(());
        }
        let edge = &self.edge;
        edge.ip_batch(
            "link add cni0 type bridge stp_state 0 mcast_snooping 0\n addr add 10.4.0.1/24 dev cni0
             addr add fd04::1/64 dev cni0 nodad\n link set cni0 up",
        )?;
        for (n, pod) in (POD..).zip(&self.pods) {
            let role = pod.role();
            let (v4, v6) = (Self::backend_address(n, false), Self::backend_address(n, true));
            edge.ip_batch(&format!("link add {role} type veth peer name eth0 netns {}", pod.name()))?;
            edge.ip_batch(&format!("link set {role} master cni0 up"))?;
            pod.ip_batch(&format!(
                "addr add {v4}/24 dev eth0\n addr add {v6}/64 dev eth0 nodad\n link set eth0 up
                 route add default via 10.4.0.1\n route add ::/0 via fd04::1"
            ))?;
        }
        Ok(())
    }

    /// Joins namespaces by a VXLAN tunnel: each with its device below, the tunnel's, and the last byte
    /// of its own and the other's address. Gives what makes the far end a port of the LAN.
    fn join_tunnel(ends: [(&Namespace, &str, &str, u8, u8); 2]) -> Result<String> {
        veth((ends[0].0, ends[0].1), (ends[1].0, ends[1].1))?;
        for (namespace, wire, tunnel, own, other) in ends {
            namespace.ip_batch(&format!(
                "addr add 10.9.0.{own}/24 dev {wire}\n link set {wire} up
                 link add {tunnel} type vxlan id 7 dstport 4789 local 10.9.0.{own} remote 10.9.0.{other} dev {wire}
                 link set {tunnel} mtu {TUNNEL_MTU} up"
            ))?;
        }
        Ok(String::from("link set tunnel master lan up\n"))
    }

    fn join_lan(&self, options: Options) -> Result<()> {
        let Self { client, edge, switch, .. } = self;
        let device = if options.one_armed { "uplink" } else { "lan" };
        switch.ip_batch("link add lan type bridge stp_state 0 mcast_snooping 0\n link set lan up")?;
        forwarding(edge)?;
        let mut ports = String::from("link set edge master lan up\n");
        match options.lan {
            Lan::Nic => veth((edge, device), (switch, "edge"))?,
            Lan::Bridge => {
                // A veth as its port would look like a pod's.
                let ends = [(edge, "wire2", "port", 1, 2), (switch, "edge", "tunnel", 2, 1)];
                ports = Self::join_tunnel(ends)?;
                edge.ip_batch(&format!(
                    "link add {device} mtu {TUNNEL_MTU} type bridge stp_state 0 mcast_snooping 0
                     link set port master {device} up"
                ))?;
            }
            Lan::Vxlan => {
                let ends = [(edge, "wire2", device, 1, 2), (switch, "edge", "tunnel", 2, 1)];
                ports = Self::join_tunnel(ends)?;
            }
        }
        edge.ip_batch(&format!(
            "addr add 10.2.0.1/24 dev {device}\n addr add fd02::1/64 dev {device} nodad\n link set {device} up"
        ))?;
        if options.one_armed {
            veth((client, "eth0"), (switch, "client"))?;
            ports.push_str("link set client master lan up\n");
            client.ip_batch(&format!(
                "addr add 10.2.0.2/24 dev eth0\n addr add fd02::2/64 dev eth0 nodad\n link set eth0 up
                 route add {VIPS_V4} dev eth0\n route add {VIPS_V6} dev eth0"
            ))?;
        }
        for (n, backend) in (1..).zip(&self.backends) {
            veth((backend, "eth0"), (switch, backend.role()))?;
            writeln!(ports, "link set {} master lan up", backend.role())?;
            if options.lan != Lan::Nic {
                backend.ip_batch(&format!("link set eth0 mtu {TUNNEL_MTU}"))?;
            }
            let (v4, v6) = (Self::backend_address(n, false), Self::backend_address(n, true));
            backend.ip_batch(&format!(
                "addr add {v4}/24 dev eth0\n addr add {v6}/64 dev eth0 nodad\n link set eth0 up
                 route add default via 10.2.0.1\n route add ::/0 via fd02::1"
            ))?;
        }
        switch.ip_batch(&ports)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        registry::remove_directory(&self.pin_directory());
        registry::remove_directory(&self.directory);
    }
}

fn forwarding(namespace: &Namespace) -> Result<()> {
    for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        namespace.sysctl(&format!("net/{key}"), "1")?;
    }
    Ok(())
}

/// Joins two namespaces; neither end is ever seen outside.
fn veth(left: (&Namespace, &str), right: (&Namespace, &str)) -> Result<()> {
    left.0.ip_batch(&format!(
        "link add {} type veth peer name {} netns {}",
        left.1,
        right.1,
        right.0.name()
    ))?;
    left.0.like_a_nic(left.1)?;
    right.0.like_a_nic(right.1)
}
