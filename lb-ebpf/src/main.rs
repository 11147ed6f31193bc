//! The kernel programs: thin shells around `lb_common::forward`.
//!
//! `pointsman_xdp` is attached to devices and handles packets of established flows. Through the map
//! `programs` it calls `slow_v4` or `slow_v6` for everything else, and those call `unknown_v4` or
//! `unknown_v6` for packets of no known flow. While SYN cookies are in use, `cookie_v4` and `cookie_v6`
//! take the place of the latter for TCP.
//!
//! `pointsman_tc_in` does the same in TC, with programs `tc_slow_v4` and so on: in place of XDP, and
//! beside it for what XDP cannot send, or does not see.
//!
//! `pointsman_tc` is attached where replies of backends on this node leave it.
//!
//! `connect_v4` and so on are attached to a control group, and give sockets of this node their backend.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
mod access;
#[cfg(target_arch = "bpf")]
mod datapath;
#[cfg(target_arch = "bpf")]
mod hooks;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod sockets;

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX};
    use aya_ebpf::helpers::generated::bpf_redirect;
    use aya_ebpf::macros::{cgroup_sock_addr, classifier, xdp};
    use aya_ebpf::programs::{SockAddrContext, TcContext, XdpContext};
    use lb_common::abi::maps::{PROGRAM_COOKIE_V4, PROGRAM_FOLLOW_V4, PROGRAM_SLOW_V4, PROGRAM_UNKNOWN_V4};
    use lb_common::abi::{DropReason, V4, V6};
    use lb_common::forward::parse::Link;
    use lb_common::forward::platform::{Datapath, Packet};
    use lb_common::forward::wire::{ETHER_TYPE_IPV4, ETHER_TYPE_IPV6};
    use lb_common::forward::{self, Fast, Slow, Verdict};

    use crate::hooks::{Tc, Xdp, has_tag_beside};
    use crate::maps;
    use crate::sockets::{self, Call};

    #[xdp]
    pub fn pointsman_xdp(context: XdpContext) -> u32 {
        let datapath = Xdp { context };
        match forward::fast(&datapath) {
            Fast::Done(verdict) => action(&datapath, verdict),
            Fast::SlowV4 => call(&datapath, PROGRAM_SLOW_V4),
            Fast::SlowV6 => call(&datapath, PROGRAM_SLOW_V4 + 1),
        }
    }

    #[xdp]
    pub fn slow_v4(context: XdpContext) -> u32 {
        let datapath = Xdp { context };
        go_on(&datapath, forward::slow::<_, V4>(&datapath), 0)
    }

    #[xdp]
    pub fn slow_v6(context: XdpContext) -> u32 {
        let datapath = Xdp { context };
        go_on(&datapath, forward::slow::<_, V6>(&datapath), 1)
    }

    #[xdp]
    pub fn unknown_v4(context: XdpContext) -> u32 {
        let datapath = Xdp { context };
        let verdict = forward::unknown::<_, V4>(&datapath);
        action(&datapath, verdict)
    }

    #[xdp]
    pub fn unknown_v6(context: XdpContext) -> u32 {
        let datapath = Xdp { context };
        let verdict = forward::unknown::<_, V6>(&datapath);
        action(&datapath, verdict)
    }

    #[xdp]
    pub fn follow_v4(context: XdpContext) -> u32 {
        let datapath = Xdp { context };
        go_on(&datapath, forward::follow_cookie::<_, V4>(&datapath), 0)
    }

    #[xdp]
    pub fn follow_v6(context: XdpContext) -> u32 {
        let datapath = Xdp { context };
        go_on(&datapath, forward::follow_cookie::<_, V6>(&datapath), 1)
    }

    #[xdp]
    pub fn cookie_v4(context: XdpContext) -> u32 {
        let datapath = Xdp { context };
        let verdict = forward::cookie::<_, V4>(&datapath);
        action(&datapath, verdict)
    }

    #[xdp]
    pub fn cookie_v6(context: XdpContext) -> u32 {
        let datapath = Xdp { context };
        let verdict = forward::cookie::<_, V6>(&datapath);
        action(&datapath, verdict)
    }

    /// Bytes of headers that have to be in reach: Ethernet, IPv6, TCP.
    const HEADERS: u32 = 14 + 40 + 20;

    /// Let the next program decide, or else the kernel.
    const TC_NEXT: i32 = -1;
    const TC_DROP: i32 = 2;

    #[classifier]
    pub fn pointsman_tc_in(context: TcContext) -> i32 {
        let datapath = Tc { context };
        datapath.pull(HEADERS);
        // A tag beside the packet: `fast` would not see it.
        let decided = match datapath.link() {
            Some(Link { vlan: [0, 0, 0, 0], .. }) if !has_tag_beside(&datapath.context) => {
                forward::fast(&datapath)
            }
            Some(Link { ether_type: ETHER_TYPE_IPV4, .. }) => Fast::SlowV4,
            Some(Link { ether_type: ETHER_TYPE_IPV6, .. }) => Fast::SlowV6,
            _ => return TC_NEXT,
        };
        match decided {
            Fast::Done(verdict) => tc_action(&datapath, verdict),
            Fast::SlowV4 => tc_call(&datapath, PROGRAM_SLOW_V4),
            Fast::SlowV6 => tc_call(&datapath, PROGRAM_SLOW_V4 + 1),
        }
    }

    #[classifier]
    pub fn tc_slow_v4(context: TcContext) -> i32 {
        let datapath = Tc { context };
        tc_go_on(&datapath, forward::slow::<_, V4>(&datapath), 0)
    }

    #[classifier]
    pub fn tc_slow_v6(context: TcContext) -> i32 {
        let datapath = Tc { context };
        tc_go_on(&datapath, forward::slow::<_, V6>(&datapath), 1)
    }

    #[classifier]
    pub fn tc_unknown_v4(context: TcContext) -> i32 {
        let datapath = Tc { context };
        let verdict = forward::unknown::<_, V4>(&datapath);
        tc_action(&datapath, verdict)
    }

    #[classifier]
    pub fn tc_unknown_v6(context: TcContext) -> i32 {
        let datapath = Tc { context };
        let verdict = forward::unknown::<_, V6>(&datapath);
        tc_action(&datapath, verdict)
    }

    #[classifier]
    pub fn tc_follow_v4(context: TcContext) -> i32 {
        let datapath = Tc { context };
        tc_go_on(&datapath, forward::follow_cookie::<_, V4>(&datapath), 0)
    }

    #[classifier]
    pub fn tc_follow_v6(context: TcContext) -> i32 {
        let datapath = Tc { context };
        tc_go_on(&datapath, forward::follow_cookie::<_, V6>(&datapath), 1)
    }

    #[classifier]
    pub fn tc_cookie_v4(context: TcContext) -> i32 {
        let datapath = Tc { context };
        let verdict = forward::cookie::<_, V4>(&datapath);
        tc_action(&datapath, verdict)
    }

    #[classifier]
    pub fn tc_cookie_v6(context: TcContext) -> i32 {
        let datapath = Tc { context };
        let verdict = forward::cookie::<_, V6>(&datapath);
        tc_action(&datapath, verdict)
    }

    #[classifier]
    pub fn pointsman_tc(context: TcContext) -> i32 {
        let datapath = Tc { context };
        datapath.pull(HEADERS);
        let verdict = match datapath.link() {
            Some(Link { ether_type: ETHER_TYPE_IPV4, .. }) => forward::egress::<_, V4>(&datapath),
            Some(Link { ether_type: ETHER_TYPE_IPV6, .. }) => forward::egress::<_, V6>(&datapath),
            _ => return TC_NEXT,
        };
        if let Verdict::Drop = verdict { TC_DROP } else { TC_NEXT }
    }

    macro_rules! socket_programs {
        ($($name:ident, $section:ident, $family:ident, $has_reason:literal, $call:ident;)+) => {$(
            #[cgroup_sock_addr($section)]
            pub fn $name(context: SockAddrContext) -> i32 {
                sockets::$family::<$has_reason>(context, Call::$call)
            }
        )+};
    }

    socket_programs! {
        connect_v4, connect4, v4, true, Connect;
        connect_v6, connect6, v6, true, Connect;
        sendmsg_v4, sendmsg4, v4, true, Send;
        sendmsg_v6, sendmsg6, v6, true, Send;
        connect_v4_old, connect4, v4, false, Connect;
        connect_v6_old, connect6, v6, false, Connect;
        sendmsg_v4_old, sendmsg4, v4, false, Send;
        sendmsg_v6_old, sendmsg6, v6, false, Send;
        recvmsg_v4, recvmsg4, v4, false, Look;
        recvmsg_v6, recvmsg6, v6, false, Look;
        peername_v4, getpeername4, v4, false, Look;
        peername_v6, getpeername6, v6, false, Look;
    }

    /// What the slow path says of a packet of the family that is `family` further than IPv4.
    #[inline(always)]
    fn go_on(datapath: &Xdp, slow: Slow, family: u32) -> u32 {
        match slow {
            Slow::Done(verdict) => action(datapath, verdict),
            Slow::Unknown => call(datapath, PROGRAM_UNKNOWN_V4 + family),
            Slow::Cookie => call(datapath, PROGRAM_COOKIE_V4 + family),
            Slow::FollowCookie => call(datapath, PROGRAM_FOLLOW_V4 + family),
        }
    }

    /// Like [`go_on`], in TC.
    #[inline(always)]
    fn tc_go_on(datapath: &Tc, slow: Slow, family: u32) -> i32 {
        match slow {
            Slow::Done(verdict) => tc_action(datapath, verdict),
            Slow::Unknown => tc_call(datapath, PROGRAM_UNKNOWN_V4 + family),
            Slow::Cookie => tc_call(datapath, PROGRAM_COOKIE_V4 + family),
            Slow::FollowCookie => tc_call(datapath, PROGRAM_FOLLOW_V4 + family),
        }
    }

    /// Like [`call`], in TC.
    #[inline(always)]
    fn tc_call(datapath: &Tc, program: u32) -> i32 {
        // SAFETY: the map holds classifiers only. It returns only if the element is empty.
        unsafe { maps::TC_PROGRAMS.tail_call(&datapath.context, program) };
        datapath.count_drop(DropReason::NoSlowPath, datapath.packet().length() as u64);
        TC_NEXT
    }

    /// The one place where a verdict becomes a TC action.
    #[inline(always)]
    fn tc_action(datapath: &Tc, verdict: Verdict) -> i32 {
        let ifindex = match verdict {
            Verdict::Pass | Verdict::Deliver => return TC_NEXT,
            Verdict::Drop => return TC_DROP,
            Verdict::Transmit => datapath.ingress_device(),
            Verdict::Redirect(ifindex) => ifindex,
        };
        // SAFETY: a helper without pointers.
        unsafe { bpf_redirect(ifindex, 0) as i32 }
    }

    /// Goes on with another program, which has a stack and a budget of the verifier's of its own.
    #[inline(always)]
    fn call(datapath: &Xdp, program: u32) -> u32 {
        // SAFETY: the map holds XDP programs only. It returns only if the element is empty.
        unsafe { maps::PROGRAMS.tail_call(&datapath.context, program) };
        datapath.count_drop(DropReason::NoSlowPath, datapath.packet().length() as u64);
        XDP_PASS
    }

    /// The one place where a verdict becomes an XDP action.
    #[inline(always)]
    fn action(datapath: &Xdp, verdict: Verdict) -> u32 {
        match verdict {
            Verdict::Pass | Verdict::Deliver => XDP_PASS,
            Verdict::Transmit => XDP_TX,
            Verdict::Drop => XDP_DROP,
            Verdict::Redirect(ifindex) => match maps::DEVICES.redirect(ifindex, XDP_DROP.into()) {
                Ok(action) => action,
                Err(action) => {
                    datapath.count_drop(DropReason::NoDevice, datapath.packet().length() as u64);
                    action
                }
            },
        }
    }

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        // Unreachable: the verifier would reject a program that could get here.
        loop {}
    }

    /// Some helpers are for GPL-compatible programs only.
    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
