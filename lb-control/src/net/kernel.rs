//! Netlink: the kernel's tables, and word of their changes.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use futures_util::{StreamExt, TryStreamExt};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkXdp, VlanProtocol,
};
use netlink_packet_route::neighbour::{
    NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::AsyncSocket;
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder, new_connection, new_multicast_connection};
use tokio::task::AbortHandle;

use super::outward::gateway;
use super::way::{Link, LinkKind, Neighbour, Route, Vlan};
use super::{addresses, neighbour_address, route_address};

/// Devices by index.
pub type Links = BTreeMap<u32, Link>;

/// Neighbours by device and address.
pub type Neighbours = HashMap<(u32, IpAddr), Neighbour>;

/// The kernel's tables.
#[derive(Clone)]
pub struct Kernel {
    handle: Handle,
    /// How many lists of neighbours arrive before one fails, once.
    #[cfg(test)]
    pub(super) neighbours_fail_after: std::sync::Arc<std::sync::Mutex<Option<u32>>>,
}

impl Kernel {
    /// Opens a connection; must be called within a tokio runtime, which serves it.
    ///
    /// # Errors
    /// When there are no netlink sockets.
    pub fn connect() -> Result<Self> {
        let (connection, handle, _) = new_connection().context("opening a netlink socket")?;
        tokio::spawn(connection);
        Ok(Self {
            handle,
            #[cfg(test)]
            neighbours_fail_after: std::sync::Arc::default(),
        })
    }

    /// The connection.
    #[must_use]
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// All devices.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn links(&self) -> Result<Links> {
        let messages: Vec<LinkMessage> =
            self.handle.link().get().execute().try_collect().await.context("listing devices")?;
        Ok(messages.iter().map(|message| (message.header.index, read_link(message))).collect())
    }

    /// All neighbours of both families.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn neighbours(&self) -> Result<Neighbours> {
        #[cfg(test)]
        self.fail_on_time()?;
        let mut all = Neighbours::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let request = self.handle.neighbours().get().set_address_family(family);
            let messages: Vec<NeighbourMessage> =
                request.execute().try_collect().await.context("listing neighbours")?;
            all.extend(messages.iter().filter_map(read_neighbour));
        }
        Ok(all)
    }

    /// The route to an address; `None` if there is none.
    ///
    /// # Errors
    /// When the kernel refuses for another reason.
    pub async fn route(&self, destination: IpAddr) -> Result<Option<Route>> {
        let found = self.ask_route(destination, RouteFlags::empty()).await?;
        Ok(found.as_ref().map(read_route))
    }

    pub(super) async fn ask_route(
        &self,
        destination: IpAddr,
        flags: RouteFlags,
    ) -> Result<Option<RouteMessage>> {
        let mut message = match destination {
            IpAddr::V4(address) => {
                RouteMessageBuilder::<std::net::Ipv4Addr>::new().destination_prefix(address, 32).build()
            }
            IpAddr::V6(address) => {
                RouteMessageBuilder::<std::net::Ipv6Addr>::new().destination_prefix(address, 128).build()
            }
        };
        message.header.flags = flags;
        let mut answers = Box::pin(self.handle.route().get(message).execute());
        match answers.next().await {
            Some(Ok(answer)) => Ok(Some(answer)),
            Some(Err(rtnetlink::Error::NetlinkError(error)))
                if matches!(
                    -error.raw_code(),
                    libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL | libc::ENETDOWN
                ) =>
            {
                Ok(None)
            }
            Some(Err(error)) => Err(error).with_context(|| format!("asking for the route to {destination}")),
            None => bail!("asking for the route to {destination}: no answer"),
        }
    }

    /// Makes the kernel resolve a neighbour, and keep it resolved: managed, where the kernel knows
    /// that (Linux 5.16), else once. A permanent neighbour would lose that (`__neigh_update`).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn manage_neighbour(&self, ifindex: u32, address: IpAddr) -> Result<()> {
        let managed = NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed);
        // "Use" as well: a kernel that does not know the attribute may take no notice of it, and
        // would otherwise not even begin to resolve.
        let mut request = self.neighbour(ifindex, address).flags(NeighbourFlags::Use);
        request.message_mut().attributes.push(managed);
        if request.execute().await.is_ok() {
            return Ok(());
        }
        self.use_neighbour(ifindex, address).await
    }

    /// Makes the kernel resolve a neighbour once.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) async fn use_neighbour(&self, ifindex: u32, address: IpAddr) -> Result<()> {
        self.neighbour(ifindex, address)
            .flags(NeighbourFlags::Use)
            .execute()
            .await
            .with_context(|| format!("asking the kernel to resolve the neighbour {address}"))
    }

    /// Lets go of a neighbour that was managed. What the kernel knows of it stays as after ordinary
    /// use, so that the node's own connections notice nothing.
    pub async fn forget_neighbour(&self, ifindex: u32, address: IpAddr, known: Option<&Neighbour>) {
        let result = match known {
            // Somebody made it permanent in the meantime, or has unmanaged it: it is theirs.
            Some(known) if known.is_fixed || !known.managed => return,
            // Without the flag in the request the kernel takes it off the entry.
            Some(Neighbour { mac: Some(mac), .. }) => {
                let request = self.neighbour(ifindex, address).state(NeighbourState::Stale);
                request.link_layer_address(mac).execute().await
            }
            _ => {
                let message = self.neighbour(ifindex, address).message_mut().clone();
                self.handle.neighbours().del(message).execute().await
            }
        };
        // It is no error if it is gone already, alone or with its device.
        if let Err(error) = result {
            tracing::debug!("letting go of the neighbour {address}: {error}");
        }
    }

    fn neighbour(&self, ifindex: u32, address: IpAddr) -> rtnetlink::NeighbourAddRequest {
        self.handle.neighbours().add(ifindex, address).state(NeighbourState::None).replace()
    }
}

impl From<Handle> for Kernel {
    fn from(handle: Handle) -> Self {
        Self {
            handle,
            #[cfg(test)]
            neighbours_fail_after: std::sync::Arc::default(),
        }
    }
}

fn read_link(message: &LinkMessage) -> Link {
    let mut link = Link {
        // Running (RFC 2863): with carrier, and not dormant.
        is_up: message.header.flags.contains(LinkFlags::Up | LinkFlags::Running),
        is_loopback: message.header.flags.contains(LinkFlags::Loopback),
        ..Link::default()
    };
    let mut is_parent_elsewhere = false;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(mac) => link.mac = ethernet(mac),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Link(parent) => link.parent = Some(*parent),
            LinkAttribute::Xdp(xdp) => link.xdp_program = xdp.iter().find_map(read_xdp),
            LinkAttribute::LinkNetNsId(_) => is_parent_elsewhere = true,
            LinkAttribute::LinkInfo(infos) => {
                link.vlan = infos.iter().find_map(read_vlan);
                link.kind = infos.iter().find_map(read_kind).unwrap_or_default();
            }
            LinkAttribute::Controller(master) => link.master = Some(*master),
            _ => {}
        }
    }
    link.parent = link.parent.filter(|_| !is_parent_elsewhere);
    link
}

/// An Ethernet address; all zeros is none (loopback, tunnels).
fn ethernet(bytes: &[u8]) -> Option<[u8; 6]> {
    bytes.try_into().ok().filter(|mac| *mac != [0; 6])
}

fn read_xdp(item: &LinkXdp) -> Option<u32> {
    match item {
        LinkXdp::ProgId(id) => Some(*id),
        _ => None,
    }
}

fn read_kind(info: &LinkInfo) -> Option<LinkKind> {
    match info {
        LinkInfo::Kind(InfoKind::Bridge) => Some(LinkKind::Bridge),
        LinkInfo::Kind(InfoKind::Veth) => Some(LinkKind::Veth),
        LinkInfo::Kind(InfoKind::Vrf) => Some(LinkKind::Vrf),
        _ => None,
    }
}

fn read_vlan(info: &LinkInfo) -> Option<Vlan> {
    let LinkInfo::Data(InfoData::Vlan(vlan)) = info else { return None };
    let is_service_tag = vlan.contains(&InfoVlan::Protocol(VlanProtocol::Ieee8021Ad));
    vlan.iter().find_map(|item| match item {
        InfoVlan::Id(id) => Some(Vlan { id: *id, is_service_tag }),
        _ => None,
    })
}

fn read_neighbour(message: &NeighbourMessage) -> Option<((u32, IpAddr), Neighbour)> {
    let (mut address, mut mac, mut managed) = (None, None, false);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(found) => address = neighbour_address(found),
            NeighbourAttribute::LinkLayerAddress(found) => mac = ethernet(found),
            NeighbourAttribute::ExtFlags(flags) => managed = flags.contains(NeighbourExtFlags::Managed),
            _ => {}
        }
    }
    let is_valid = !matches!(
        message.header.state,
        NeighbourState::Failed | NeighbourState::Incomplete | NeighbourState::None
    );
    let is_fixed = matches!(message.header.state, NeighbourState::Permanent | NeighbourState::Noarp);
    let neighbour = Neighbour { mac: mac.filter(|_| is_valid), managed, is_fixed };
    Some(((message.header.ifindex, address?), neighbour))
}

fn read_route(message: &RouteMessage) -> Route {
    let gateway = gateway(&message.attributes);
    let mut route = Route { kind: message.header.kind, gateway, ..Route::default() };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => route.ifindex = *index,
            RouteAttribute::PrefSource(source) => route.source = route_address(source),
            RouteAttribute::Metrics(metrics) => route.mtu = metrics.iter().find_map(read_mtu),
            _ => {}
        }
    }
    route
}

fn read_mtu(metric: &RouteMetric) -> Option<u32> {
    match metric {
        RouteMetric::Mtu(mtu) if *mtu > 0 => Some(*mtu),
        _ => None,
    }
}

/// Enough for some 10,000 messages while the agent is busy.
const EVENT_BUFFER_BYTES: i32 = 4 << 20;

/// Tells of changes. On a socket of its own: on that of a [`Kernel`], the changes that it makes
/// itself would not arrive.
pub struct Monitor {
    /// What reads the socket. Left alone, it would keep the socket until the next message arrives, and
    /// complain that nobody takes it.
    connection: AbortHandle,
    messages: futures_channel::mpsc::UnboundedReceiver<(
        NetlinkMessage<RouteNetlinkMessage>,
        netlink_sys::SocketAddr,
    )>,
}

/// Whether it tells of nothing but a VIP that we have put on a device, or of the route that the kernel
/// keeps for an address: whoever adds or removes an address is told of by a message of its own.
/// Otherwise each VIP would have all routes asked for.
fn is_echo(message: &RouteNetlinkMessage) -> bool {
    match message {
        RouteNetlinkMessage::NewAddress(address) => addresses::is_ours(address),
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
            route.header.table == libc::RT_TABLE_LOCAL && route.header.protocol == RouteProtocol::Kernel
        }
        _ => false,
    }
}

/// A kind of change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Of routes, rules or devices; or not known, because the kernel had to drop messages.
    Topology,
    /// Of an address.
    Address,
    /// Of a neighbour.
    Neighbour,
}

impl Monitor {
    /// Begins to listen.
    ///
    /// # Errors
    /// When there are no netlink sockets.
    pub fn start() -> Result<Self> {
        let (mut connection, _, messages) = new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ])
        .context("opening a netlink socket for events")?;
        let socket = connection.socket_mut().socket_mut();
        socket.set_rx_buf_sz(EVENT_BUFFER_BYTES).context("enlarging the buffer for netlink events")?;
        let connection = tokio::spawn(connection).abort_handle();
        Ok(Self { connection, messages })
    }

    /// Waits for the next change; `None` when the socket is closed.
    pub async fn next(&mut self) -> Option<Change> {
        loop {
            let (message, _) = self.messages.next().await?;
            let message = match message.payload {
                NetlinkPayload::InnerMessage(message) if is_echo(&message) => continue,
                NetlinkPayload::InnerMessage(message) => message,
                NetlinkPayload::Overrun(_) => return Some(Change::Topology),
                _ => continue,
            };
            return Some(match message {
                RouteNetlinkMessage::NewNeighbour(_) | RouteNetlinkMessage::DelNeighbour(_) => {
                    Change::Neighbour
                }
                RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => Change::Address,
                _ => Change::Topology,
            });
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::Monitor;
    use crate::net::testing::{self, PATIENCE};

    /// Sockets of this thread's network namespace that listen for events of routing.
    fn listening() -> usize {
        let sockets = std::fs::read_to_string("/proc/thread-self/net/netlink").unwrap();
        let fields = sockets.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
        fields.filter(|fields| fields[1] == "0" && u32::from_str_radix(fields[3], 16) != Ok(0)).count()
    }

    #[test]
    fn a_monitor_takes_its_socket_along() {
        testing::run(async |_| {
            let monitor = Monitor::start().unwrap();
            assert_eq!(listening(), 1);
            drop(monitor);
            let closed = async {
                while listening() > 0 {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(PATIENCE, closed).await.expect("nobody needs the socket any more");
        });
    }
}
