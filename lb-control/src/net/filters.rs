//! Filters of TC, as the kernel lists them.

use anyhow::{Context, Result};
use futures_util::TryStreamExt;
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcMessage, TcOption};

use super::Kernel;

/// A filter on a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Those with lower numbers come first.
    pub priority: u16,
    /// Its number among those of its priority.
    pub handle: u32,
    /// The name that its program was given; the kind of filter if it is none of BPF.
    pub name: String,
    /// The kernel's number of the program.
    pub program_id: Option<u32>,
}

impl Kernel {
    /// The filters that packets meet when they come in by a device, or when they leave, in their
    /// order; none if the device has no place for them.
    ///
    /// # Errors
    /// When the kernel refuses for another reason.
    pub async fn filters(&self, ifindex: u32, leaving: bool) -> Result<Vec<Filter>> {
        let index = i32::try_from(ifindex).context("the index of a device")?;
        let request = self.handle().traffic_filter(index).get();
        let request = if leaving { request.egress() } else { request.ingress() };
        let messages: Vec<TcMessage> = match request.execute().try_collect().await {
            Ok(messages) => messages,
            // Without the queueing discipline (net/sched/cls_api.c, tc_dump_tfilter).
            Err(rtnetlink::Error::NetlinkError(error))
                if matches!(-error.raw_code(), libc::EINVAL | libc::ENOENT) =>
            {
                Vec::new()
            }
            Err(error) => return Err(error).with_context(|| format!("listing filters of device {ifindex}")),
        };
        let mut filters: Vec<_> = messages.iter().filter_map(read).collect();
        filters.sort_by_key(|filter| filter.priority);
        Ok(filters)
    }
}

/// A filter; `None` for what is listed of its priority as a whole.
fn read(message: &TcMessage) -> Option<Filter> {
    let handle = u32::from(message.header.handle);
    if handle == 0 {
        return None;
    }
    // TCA_KIND and the priority in the upper half of tcm_info (include/uapi/linux/pkt_sched.h).
    let priority = u16::try_from(message.header.info >> 16).ok()?;
    let mut filter = Filter { priority, handle, ..Filter::default() };
    for attribute in &message.attributes {
        match attribute {
            TcAttribute::Kind(kind) if filter.name.is_empty() => filter.name.clone_from(kind),
            TcAttribute::Options(options) => {
                for option in options {
                    match option {
                        TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => filter.name.clone_from(name),
                        TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => filter.program_id = Some(*id),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some(filter)
}
