//! One more client, by an uplink of its own.

use anyhow::Result;

use super::{
    extra_edge::ExtraEdge,
    netns::Namespace,
    topology::{Lab, VIPS_V4, VIPS_V6},
    xdp_pass::XdpPass,
};

/// The device of the edge that leads to the client.
pub const UPLINK_2: &str = "uplink2";

/// A client behind the device [`UPLINK_2`] of the edge, which is its default route. Removed when dropped.
#[derive(Debug)]
pub struct ExtraClient {
    /// Its network.
    pub namespace: Namespace,
    far_end: Option<XdpPass>,
}

impl ExtraClient {
    /// Joined to the edge of a lab.
    ///
    /// # Errors
    /// When not root.
    pub fn new(lab: &Lab) -> Result<Self> {
        let mut client = Self { namespace: Namespace::new(lab.id(), "client2")?, far_end: None };
        client.join(lab)?;
        Ok(client)
    }

    /// Makes the device of the edge, which must not be there.
    ///
    /// # Errors
    /// When it is there.
    pub fn join(&mut self, lab: &Lab) -> Result<()> {
        let Self { namespace, far_end } = self;
        namespace
            .ip_batch(&format!("link add eth0 type veth peer name {UPLINK_2} netns {}", lab.edge.name()))?;
        namespace.like_a_nic("eth0")?;
        lab.edge.like_a_nic(UPLINK_2)?;
        lab.edge.ip_batch(&format!(
            "addr add 10.5.0.1/24 dev {UPLINK_2}\n addr add fd05::1/64 dev {UPLINK_2} nodad\n link set {UPLINK_2} up"
        ))?;
        namespace.ip_batch(
            "addr add 10.5.0.2/24 dev eth0\n addr add fd05::2/64 dev eth0 nodad\n link set eth0 up
             route add default via 10.5.0.1\n route add ::/0 via fd05::1",
        )?;
        *far_end = Some(XdpPass::attach(namespace, "eth0")?);
        Ok(())
    }

    /// Takes the edge's address for no router any more: VIPs are on the link.
    ///
    /// # Errors
    /// When the routes are others already.
    pub fn has_vips_on_link(&self) -> Result<()> {
        self.namespace.ip_batch(&format!(
            "route del default\n route del ::/0\n route add {VIPS_V4} dev eth0\n route add {VIPS_V6} dev eth0"
        ))
    }

    /// Joins the device [`UPLINK_2`] of another edge to the same link, whose end here is `br0` from now on.
    ///
    /// # Errors
    /// When one is joined already.
    pub fn join_other(&self, other: &ExtraEdge) -> Result<()> {
        let name = other.namespace.name();
        self.namespace.ip_batch(&format!(
            "addr flush dev eth0\n link add br0 type bridge stp_state 0 mcast_snooping 0
             addr add 10.5.0.2/24 dev br0\n addr add fd05::2/64 dev br0 nodad\n link set br0 up
             link add eth1 type veth peer name {UPLINK_2} netns {name}
             link set eth0 master br0\n link set eth1 master br0 up
             route add {VIPS_V4} dev br0\n route add {VIPS_V6} dev br0"
        ))?;
        other.namespace.ip_batch(&format!("addr add 10.5.0.9/24 dev {UPLINK_2}\n link set {UPLINK_2} up"))
    }

    /// Takes the device away.
    ///
    /// # Errors
    /// When it is not there.
    pub fn leave(&mut self, lab: &Lab) -> Result<()> {
        self.far_end = None;
        lab.edge.ip_batch(&format!("link del {UPLINK_2}"))
    }
}
