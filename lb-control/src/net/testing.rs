//! Two network namespaces of a test's own, joined by a veth pair. They go with the thread.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::time::Duration;

use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::route::{RouteScope, RouteType};
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::way::Link;
use super::{Kernel, Monitor};

/// How long a test waits for the kernel before it fails.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// The namespace that the code under test is in, and a remote one.
pub(super) struct Lab {
    node_namespace: File,
    remote_namespace: File,
    pub(super) node: Kernel,
    pub(super) remote: Kernel,
}

/// Runs a test in a [`Lab`] whose thread is in the node's namespace.
pub(super) fn run(test: impl AsyncFnOnce(&Lab) + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP: needs root");
        return;
    }
    let thread = std::thread::spawn(move || {
        let new_namespace = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        };
        let remote_namespace = new_namespace();
        let node_namespace = new_namespace();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            setns(&remote_namespace, CloneFlags::CLONE_NEWNET).unwrap();
            let remote = Kernel::connect().unwrap();
            setns(&node_namespace, CloneFlags::CLONE_NEWNET).unwrap();
            let node = Kernel::connect().unwrap();
            test(&Lab { node_namespace, remote_namespace, node, remote }).await;
        });
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

impl Lab {
    /// Joins the namespaces: a device of this name on both sides, ready to send, with these
    /// addresses.
    pub(super) async fn veth(&self, name: &str, node: &[&str], remote: &[&str]) {
        self.node.handle().link().add(LinkVeth::new(name, "peer").build()).execute().await.unwrap();
        let move_away =
            LinkUnspec::new_with_name("peer").setns_by_fd(self.remote_namespace.as_raw_fd()).build();
        self.node.handle().link().set(move_away).execute().await.unwrap();
        let index = index_of(&self.remote, "peer").await;
        self.remote.set(LinkUnspec::new_with_index(index).name(name).build()).await;
        for (side, addresses) in [(&self.node, node), (&self.remote, remote)] {
            side.edit(name, LinkMessageBuilder::up).await;
            for address in addresses {
                side.add_address(name, address).await;
            }
        }
        self.ready(name).await;
    }

    /// Waits until a device can send on both sides.
    pub(super) async fn ready(&self, name: &str) {
        let monitors = [Monitor::start().unwrap(), self.in_remote(|| Monitor::start().unwrap())];
        for (side, mut monitor) in [&self.node, &self.remote].into_iter().zip(monitors) {
            let is_ready = async {
                while !side.device(name).await.1.is_up {
                    monitor.next().await.unwrap();
                }
            };
            tokio::time::timeout(PATIENCE, is_ready).await.expect("the device becomes ready");
        }
    }

    /// Runs something with the thread in the remote namespace.
    pub(super) fn in_remote<T>(&self, run: impl FnOnce() -> T) -> T {
        setns(&self.remote_namespace, CloneFlags::CLONE_NEWNET).unwrap();
        let result = run();
        setns(&self.node_namespace, CloneFlags::CLONE_NEWNET).unwrap();
        result
    }
}

async fn index_of(kernel: &Kernel, name: &str) -> u32 {
    kernel.device(name).await.0
}

impl Kernel {
    /// Fails if it is time to.
    pub(super) fn fail_on_time(&self) -> anyhow::Result<()> {
        let mut left = self.neighbours_fail_after.lock().unwrap();
        match *left {
            Some(0) => *left = None,
            Some(count) => {
                *left = Some(count - 1);
                return Ok(());
            }
            None => return Ok(()),
        }
        anyhow::bail!("no neighbours this time")
    }

    /// Index and state of a device.
    pub(super) async fn device(&self, name: &str) -> (u32, Link) {
        let links = self.links().await.unwrap();
        links.into_iter().find(|(_, link)| link.name == name).unwrap_or_else(|| panic!("no device {name}"))
    }

    pub(super) async fn set(&self, message: LinkMessage) {
        self.handle().link().set(message).execute().await.unwrap();
    }

    /// Changes a device.
    pub(super) async fn edit(
        &self,
        name: &str,
        edit: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
    ) {
        let index = index_of(self, name).await;
        self.set(edit(LinkUnspec::new_with_index(index)).build()).await;
    }

    /// Adds an address such as `10.0.0.1/24`; IPv6 without duplicate address detection.
    pub(super) async fn add_address(&self, name: &str, address: &str) {
        use netlink_packet_route::address::{AddressAttribute, AddressFlags};
        let (ip, prefix) = address.split_once('/').unwrap();
        let index = index_of(self, name).await;
        let mut request = self.handle().address().add(index, ip.parse().unwrap(), prefix.parse().unwrap());
        if ip.contains(':') {
            request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        request.execute().await.unwrap();
    }

    /// Adds a route such as `10.9.0.0/16` by a gateway; replaces one that is there.
    pub(super) async fn add_route(&self, prefix: &str, gateway: &str) {
        let route = route(prefix).gateway(gateway.parse().unwrap()).unwrap().build();
        self.handle().route().add(route).replace().execute().await.unwrap();
    }

    /// Adds a route straight out of a device.
    pub(super) async fn add_device_route(&self, prefix: &str, device: &str) {
        let route = route(prefix).output_interface(index_of(self, device).await).scope(RouteScope::Link);
        self.handle().route().add(route.build()).execute().await.unwrap();
    }

    /// Adds a route that drops or refuses.
    pub(super) async fn add_dead_route(&self, prefix: &str, kind: RouteType) {
        self.handle().route().add(route(prefix).kind(kind).build()).execute().await.unwrap();
    }

    /// Deletes the route to a prefix.
    pub(super) async fn delete_route(&self, prefix: &str) {
        self.handle().route().del(route(prefix).build()).execute().await.unwrap();
    }
}

fn route(prefix: &str) -> RouteMessageBuilder<IpAddr> {
    let (ip, length) = prefix.split_once('/').unwrap();
    let builder = RouteMessageBuilder::<IpAddr>::new();
    builder.destination_prefix(ip.parse().unwrap(), length.parse().unwrap()).unwrap()
}

pub(super) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}
