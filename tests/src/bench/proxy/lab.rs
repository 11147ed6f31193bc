//! A client, the backends, and between them a node for each load balancer: they do not meet.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::Result;

use crate::bench::net::Namespace;

/// Where the backends listen.
pub const BACKEND_PORT: u16 = 8080;
/// Where the load balancers listen.
pub const PORT: u16 = 80;
/// How many addresses the backends have on each link.
pub const BACKENDS: u8 = 3;
/// Device of a node towards the client.
pub const UPLINK: &str = "l0";
/// Device of a node towards the backends.
pub const DOWNLINK: &str = "l1";

/// Both ends.
pub struct Lab {
    /// Where connections come from.
    pub client: Namespace,
    /// Where they are answered.
    pub backend: Namespace,
}

/// A node, with links of its own to both ends.
pub struct Site {
    /// Where a load balancer runs.
    pub node: Namespace,
    number: u8,
    /// Whether its links look like NICs: packets are no larger than the MTU, and checksums are whole.
    like_nics: bool,
}

/// The most ports, so that those in TIME_WAIT do not run out; and room for bursts of connections.
const SETTINGS: [(&str, &str); 4] = [
    ("ipv4/ip_local_port_range", "1024 65535"),
    ("ipv4/tcp_tw_reuse", "1"),
    ("core/somaxconn", "4096"),
    ("ipv4/tcp_max_syn_backlog", "4096"),
];

impl Lab {
    /// Makes both ends.
    ///
    /// # Errors
    /// Without root.
    pub fn new() -> Result<Self> {
        let (client, backend) = (Namespace::new()?, Namespace::new()?);
        for namespace in [&client, &backend] {
            tune(namespace)?;
        }
        // Otherwise the kernel forgets TIME_WAIT early, which would hide what it costs.
        backend.set("ipv4/tcp_max_tw_buckets", "2000000")?;
        Ok(Self { client, backend })
    }

    /// A node between them; `number` is its own, from 1.
    ///
    /// # Errors
    /// When the kernel or `ip` refuses.
    pub fn site(&self, number: u8) -> Result<Site> {
        let site = Site { node: Namespace::new()?, number, like_nics: false };
        tune(&site.node)?;
        let [c, b] = site.ends();
        self.client.link(&c, &site.node, UPLINK)?;
        site.node.link(DOWNLINK, &self.backend, &b)?;
        self.client.run(&format!("ip addr add 10.1.{number}.1/24 dev {c}"))?;
        site.node.run(&format!("ip addr add 10.1.{number}.2/24 dev {UPLINK}"))?;
        site.node.run(&format!("ip addr add 10.2.{number}.1/24 dev {DOWNLINK}"))?;
        site.node.run(&format!("ip route add default via 10.1.{number}.1"))?;
        for backend in site.backends() {
            self.backend.run(&format!("ip addr add {}/24 dev {b}", backend.ip()))?;
        }
        for there in [format!("{}/32", site.vip().ip()), format!("10.2.{number}.0/24")] {
            self.client.run(&format!("ip route add {there} via 10.1.{number}.2"))?;
        }
        self.backend.run(&format!("ip route add 10.1.{number}.0/24 via 10.2.{number}.1"))?;
        site.node.set("ipv4/ip_forward", "1")?;
        Ok(site)
    }
}

impl Site {
    /// Devices of the client and of the backends towards it.
    fn ends(&self) -> [String; 2] {
        ["c", "b"].map(|end| format!("{end}{}", self.number))
    }

    /// Where the node itself listens.
    #[must_use]
    pub fn own(&self) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::new(10, 1, self.number, 2), PORT)
    }

    /// A VIP that is for it.
    #[must_use]
    pub fn vip(&self) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, self.number), PORT)
    }

    /// The backends as it reaches them.
    #[must_use]
    pub fn backends(&self) -> Vec<SocketAddrV4> {
        let address = |place| Ipv4Addr::new(10, 2, self.number, 10 + place);
        (1..=BACKENDS).map(|place| SocketAddrV4::new(address(place), BACKEND_PORT)).collect()
    }

    /// Turns offloads of all its links off (or on): the kernel then hands over packets of the MTU, with
    /// whole checksums, as a NIC does; GRO stays, as it does with NICs.
    ///
    /// # Errors
    /// When `ethtool` fails.
    pub fn look_like_nics(&mut self, lab: &Lab, like_nics: bool) -> Result<()> {
        if self.like_nics == like_nics {
            return Ok(());
        }
        let features =
            if like_nics { "tx off tso off gso off gro on" } else { "tx on tso on gso on gro off" };
        let [c, b] = self.ends();
        for (namespace, device) in
            [(&lab.client, c.as_str()), (&self.node, UPLINK), (&self.node, DOWNLINK), (&lab.backend, &b)]
        {
            namespace.run(&format!("ethtool -K {device} {features}"))?;
        }
        self.like_nics = like_nics;
        Ok(())
    }
}

fn tune(namespace: &Namespace) -> Result<()> {
    SETTINGS.into_iter().try_for_each(|(name, value)| namespace.set(name, value))
}
