//! What was tried.

use super::facts::{Ability, Facts, Outcome};
use super::{error, note, ok, warning};
use crate::view::FindingView;

impl Ability {
    /// As findings call it.
    fn check(self) -> &'static str {
        match self {
            Self::Maps => "maps",
            Self::XdpPrograms => "xdp-programs",
            Self::TcPrograms => "tc-programs",
            Self::CookiePrograms => "cookie-programs",
            Self::SocketPrograms => "socket-programs",
            Self::ControlGroup => "control-group",
            Self::Native => "xdp-native",
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
            Self::Generic => "xdp-generic",
        }
    }
}

/// Ways to attach, the preferred ones first.
const WAYS: [Ability; 4] = [Ability::Native, Ability::Tcx, Ability::Clsact, Ability::Generic];

/// What needs no device.
const WITHOUT_DEVICE: [Ability; 6] = [
    Ability::Maps,
    Ability::XdpPrograms,
    Ability::TcPrograms,
    Ability::CookiePrograms,
    Ability::SocketPrograms,
    Ability::ControlGroup,
];

const OWN_PAIR_WORKS: &str = "it can be attached to a pair of virtual devices";

pub(super) fn judge(facts: &Facts, found: &mut Vec<FindingView>) {
    for ability in WITHOUT_DEVICE {
        match facts.outcome(ability, "") {
            Some(Outcome::Works) if ability == Ability::ControlGroup => {
                found.push(ok(ability.check(), "the root of the node's control groups is in sight"));
            }
            Some(Outcome::Works) => {
                found.push(ok(ability.check(), format!("{} takes them", facts.release)));
            }
            Some(Outcome::Fails(why)) => found.push(refused(facts, ability, why)),
            Some(Outcome::Untried(why)) => {
                found.push(note(ability.check(), format!("not tried: {why}")));
            }
            None => {}
        }
    }
    let mut devices: Vec<_> = facts.trials.iter().map(|trial| trial.device.as_str()).collect();
    devices.sort_unstable();
    devices.dedup();
    for device in devices {
        ways(facts, device, found);
    }
}

fn refused(facts: &Facts, ability: Ability, why: &str) -> FindingView {
    let message = format!("{} refuses them: {why}", facts.release);
    let rights = "if capabilities are lacking above, give them; otherwise boot a newer kernel on this node \
                  (README.md says which are known to work), or keep the agent off it";
    match ability {
        Ability::TcPrograms => warning(
            ability.check(),
            format!("{message}; devices without XDP (bridges, overlays) cannot be used"),
        )
        .remedy(rights),
        // Nothing that comes from outside needs these.
        Ability::CookiePrograms => {
            note(ability.check(), format!("{message}; --syn-cookies=always has no effect here"))
        }
        Ability::SocketPrograms => {
            note(ability.check(), format!("{message}; processes of this node do not reach VIPs"))
        }
        Ability::ControlGroup => note(
            ability.check(),
            format!("with --cgroup=auto, processes of this node do not reach VIPs: {why}"),
        ),
        _ => error(
            ability.check(),
            format!("{message}; only the userspace proxy works here, which takes several times the CPU"),
        )
        .remedy(rights),
    }
}

/// The ways to attach to one device, or to a pair of devices that was made for the trial.
fn ways(facts: &Facts, device: &str, found: &mut Vec<FindingView>) {
    let before = found.len();
    let (mut works, mut failed) = (Vec::new(), Vec::new());
    for way in WAYS {
        let finding = match facts.outcome(way, device) {
            None => continue,
            Some(Outcome::Works) => {
                works.push(way);
                ok(way.check(), if device.is_empty() { OWN_PAIR_WORKS } else { "it can be attached" })
            }
            Some(Outcome::Fails(why)) => {
                failed.push(way);
                let message = format!("it cannot be attached: {why}");
                match way {
                    // Of the two of TC one is enough.
                    Ability::Tcx => note(way.check(), format!("{message}; filters of clsact serve instead")),
                    Ability::Native if device.is_empty() => warning(way.check(), message),
                    Ability::Native => note(
                        way.check(),
                        format!("{message}; the next way is slower, and works all the same"),
                    ),
                    _ => warning(way.check(), message),
                }
            }
            Some(Outcome::Untried(why)) => note(way.check(), format!("not tried: {why}")),
        };
        found.push(if device.is_empty() { finding } else { finding.about(device) });
    }
    if works.is_empty() && !failed.is_empty() && found.len() > before {
        let place = if device.is_empty() { "a pair of virtual devices" } else { device };
        found.push(
            error("datapath", format!("no datapath works on {place}: neither XDP nor TC can be attached"))
                .about(device)
                .remedy(
                    "see the findings xdp-native, clsact and xdp-generic for what each lacks; until then the \
                     userspace proxy serves, which takes several times the CPU",
                ),
        );
    }
}
