//! What the programs do with a packet, one after the other.

use std::hash::Hash;

use lb_common::abi::{DropReason, V4, V6};
use lb_common::forward::parse::{Link, Parse};
use lb_common::forward::platform::Datapath as _;
use lb_common::forward::{self, Fast, Slow, Verdict};

use super::{Hook, Host, Side};
use crate::kit::random::Source;
use crate::kit::skb::Frame;

/// Bytes of headers that the first program of TC wants in reach.
const HEADERS: u32 = 14 + 40 + 20;

impl Host {
    /// TC, with packets as devices and the kernel's stack hand them over.
    #[must_use]
    pub fn with_offloads(choices: Source) -> Self {
        Self { hook: Hook::Tc, offloads: Some(choices), ..Self::default() }
    }

    /// Runs a packet through what the kernel programs do: fast, slow, unknown. Gives the verdict
    /// and the packet afterwards.
    pub fn run(&mut self, packet: &[u8]) -> (Verdict, Vec<u8>) {
        let (verdict, frame) = self.run_frame(&Frame::plain(packet));
        (verdict, frame.bytes)
    }

    /// The same with what lies beside the packet, which is in its bytes afterwards as far as it can be.
    pub fn run_frame(&mut self, frame: &Frame) -> (Verdict, Frame) {
        self.packet.fill(frame);
        let verdict = match self.enter() {
            Fast::Done(verdict) => verdict,
            Fast::SlowV4 => self.slow::<V4>(),
            Fast::SlowV6 => self.slow::<V6>(),
        };
        let verdict = match verdict {
            Verdict::Redirect(ifindex) if !self.can_send_by(ifindex) => {
                self.count_drop(DropReason::NoDevice, self.packet_length());
                Verdict::Drop
            }
            other => other,
        };
        (verdict, self.packet.content().sent())
    }

    /// The first of the programs.
    fn enter(&self) -> Fast {
        if self.hook == Hook::Xdp {
            return forward::fast(self);
        }
        self.pull(HEADERS);
        match self.link() {
            Some(Link { vlan: [0, 0, 0, 0], .. }) if !self.packet.has_tag_beside() => forward::fast(self),
            Some(Link { ether_type: [8, 0], .. }) => Fast::SlowV4,
            Some(Link { ether_type: [0x86, 0xdd], .. }) => Fast::SlowV6,
            _ => Fast::Done(Verdict::Pass),
        }
    }

    /// Runs a packet that leaves the node through what the kernel program does.
    pub fn run_egress(&mut self, packet: &[u8]) -> (Verdict, Vec<u8>) {
        self.packet.fill(&Frame::plain(packet));
        let verdict = match forward::parse::link(self.packet.view()).map(|link| link.ether_type) {
            Some([8, 0]) => forward::egress::<_, V4>(self),
            Some([0x86, 0xdd]) => forward::egress::<_, V6>(self),
            _ => Verdict::Pass,
        };
        (verdict, self.packet.content().bytes)
    }

    fn slow<F: Side + Parse>(&self) -> Verdict
    where
        F::Address: Hash + Ord,
    {
        let mut said = forward::slow::<_, F>(self);
        if said == Slow::FollowCookie {
            said = forward::follow_cookie::<_, F>(self);
        }
        match said {
            Slow::Done(verdict) => verdict,
            Slow::Unknown => forward::unknown::<_, F>(self),
            Slow::Cookie => forward::cookie::<_, F>(self),
            Slow::FollowCookie => unreachable!("it has been asked"),
        }
    }
}
