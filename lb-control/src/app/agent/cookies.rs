//! SYN cookies.

use std::collections::BTreeSet;

use tracing::info;

use super::Agent;
use crate::app::trouble::Area;
use crate::model::Problem;
use crate::plan::{CookiePhase, CookiePolicy};

impl Agent {
    /// Whether somebody is to look for floods.
    pub fn watches_floods(&self) -> bool {
        self.settings.syn_cookies == CookiePolicy::Auto
    }

    /// What the datapath is to do about cookies.
    pub fn cookie_phase(&self) -> CookiePhase {
        self.cookies
    }

    /// Makes the datapath do something else about cookies from now on.
    pub fn use_cookies(&mut self, phase: CookiePhase) {
        self.cookies = phase;
        if !self.kernel.as_ref().is_some_and(|kernel| kernel.programs.has_cookies()) {
            // Not yet, or not on this kernel, which is told.
            return;
        }
        match phase {
            CookiePhase::Answer => info!("SYNs are answered with cookies"),
            CookiePhase::Accept => info!("the flood of SYNs is over; cookies are accepted for two minutes"),
            CookiePhase::Off => info!("SYN cookies are not in use any more"),
        }
        self.tell_flood();
        self.config.syn_cookies = phase.raw();
        if self.generation > 0 {
            self.write_maps(Some(&BTreeSet::new()));
        }
        self.publish();
    }

    /// Says that there is a flood, if there is one.
    pub(super) fn tell_flood(&mut self) {
        let is_told = self.watches_floods() && self.cookies == CookiePhase::Answer;
        let problem = Problem::warning(
            "many connections are begun and not finished, as in a flood of SYNs: SYNs are answered with \
             cookies until it is over; connections that begin meanwhile go without window scaling and \
             selective acknowledgments",
        );
        self.trouble.replace(Area::Floods, if is_told { vec![problem] } else { Vec::new() });
    }

    /// Loads the programs for cookies, if they may be needed: not in the middle of a flood. Gives what the
    /// datapath is to do; where the kernel has no cookies, connections begin without.
    pub(super) fn load_cookies(&mut self) -> CookiePhase {
        if self.settings.syn_cookies == CookiePolicy::Off {
            return CookiePhase::Off;
        }
        let Some(kernel) = &mut self.kernel else { return CookiePhase::Off };
        match kernel.programs.load_cookies() {
            Ok(()) => {
                self.tell_flood();
                self.cookies
            }
            Err(error) => {
                let problem = Problem::warning(format!("SYN cookies are not in use: {error:#}"));
                self.trouble.extend(Area::Devices, [problem]);
                CookiePhase::Off
            }
        }
    }
}
