//! The kernel programs: thin shells around `lb_common::forward`.
//!
//! `pointsman_xdp` is attached to devices and handles packets of established flows. Through the map
//! `programs` it calls `slow_v4` or `slow_v6` for everything else, and those call `unknown_v4` or
//! `unknown_v6` for packets of no known flow.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
mod access;
#[cfg(target_arch = "bpf")]
mod datapath;
#[cfg(target_arch = "bpf")]
mod maps;

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX};
    use aya_ebpf::macros::xdp;
    use aya_ebpf::programs::XdpContext;
    use lb_common::abi::maps::{PROGRAM_SLOW_V4, PROGRAM_UNKNOWN_V4};
    use lb_common::abi::{DropReason, V4, V6};
    use lb_common::forward::platform::{Datapath, Packet};
    use lb_common::forward::{self, Fast, Slow, Verdict};

    use crate::datapath::Xdp;
    use crate::maps;

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
        match forward::slow::<_, V4>(&datapath) {
            Slow::Done(verdict) => action(&datapath, verdict),
            Slow::Unknown => call(&datapath, PROGRAM_UNKNOWN_V4),
        }
    }

    #[xdp]
    pub fn slow_v6(context: XdpContext) -> u32 {
        let datapath = Xdp { context };
        match forward::slow::<_, V6>(&datapath) {
            Slow::Done(verdict) => action(&datapath, verdict),
            Slow::Unknown => call(&datapath, PROGRAM_UNKNOWN_V4 + 1),
        }
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
            Verdict::Pass => XDP_PASS,
            Verdict::Transmit => XDP_TX,
            Verdict::Drop(_) => XDP_DROP,
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
