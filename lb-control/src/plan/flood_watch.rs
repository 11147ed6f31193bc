//! When SYNs are to be answered with cookies, if that is left to the agent.
//!
//! What a flood fills is the table of flows that begin: a handshake that is not finished within a
//! minute or two holds its place that long. So the sign of a flood is the part of the table that such
//! handshakes hold. It is about none of it when many honest clients connect, however fast, since theirs
//! are finished within a round trip. While SYNs are answered with cookies the table tells nothing more;
//! then those that do not come back are counted, and tell what would fill the table again.

use std::time::Duration;

use lb_common::abi::{FlowState, SynCookies};

/// What the datapath does about SYN cookies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CookiePhase {
    /// Nothing.
    #[default]
    Off,
    /// Connections begin the usual way; cookies that were given out before are accepted.
    Accept,
    /// SYNs are answered with cookies.
    Answer,
}

impl CookiePhase {
    /// The phase of a number of [`SynCookies`]; others count as none.
    #[must_use]
    pub fn from_raw(raw: u8) -> Self {
        match raw {
            SynCookies::ACCEPT => Self::Accept,
            SynCookies::ANSWER => Self::Answer,
            _ => Self::Off,
        }
    }

    /// The number for the datapath.
    #[must_use]
    pub const fn raw(self) -> u8 {
        match self {
            Self::Off => SynCookies::OFF,
            Self::Accept => SynCookies::ACCEPT,
            Self::Answer => SynCookies::ANSWER,
        }
    }
}

/// When SYNs are answered with cookies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CookiePolicy {
    /// Never.
    #[default]
    Off,
    /// While there is a flood.
    Auto,
    /// Always.
    Always,
}

/// Handshakes of one address family that are not finished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HalfOpen {
    /// How many there are, of those that are to be counted.
    pub flows: u64,
    /// How many flows the table has room for, on the CPUs on which flows begin.
    pub room: u64,
}

impl HalfOpen {
    /// How many are a flood: a quarter of what there is room for, and in a large table as many as no load of
    /// honest clients has in flight (at a round trip of 0.2 s, they would connect 300,000 times a second).
    #[must_use]
    pub fn flood(room: u64) -> u64 {
        (room / 4).clamp(1, 65_536)
    }

    fn is_flood(self) -> bool {
        self.room > 0 && self.flows >= Self::flood(self.room)
    }
}

/// What is seen of handshakes at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Handshakes {
    /// Those in the tables, by family; nothing while SYNs are answered with cookies.
    pub half_open: [HalfOpen; 2],
    /// SYNs that were ever answered with a cookie.
    pub answered: u64,
    /// TCP connections that ever began.
    pub begun: u64,
}

/// For so long there must be no flood before connections begin the usual way again.
const CALM: Duration = Duration::from_secs(10);
/// A cookie is good for so long (`MAX_SYNCOOKIE_AGE` and `TCP_SYNCOOKIE_PERIOD` in
/// include/net/tcp.h: two periods of a minute).
const VALIDITY: Duration = Duration::from_secs(120);

/// Decides about SYN cookies, one look after the other.
#[derive(Debug)]
pub struct FloodWatch {
    phase: CookiePhase,
    /// Since when.
    since: Duration,
    /// When SYNs were last answered with cookies: what began before is of a flood that is known.
    answered_until: Option<Duration>,
    /// When SYNs are answered: since when there is no flood any more.
    calm_since: Option<Duration>,
    /// Time and counters of the last look.
    last: Option<(Duration, u64, u64)>,
}

impl FloodWatch {
    /// Goes on with what the datapath does already.
    #[must_use]
    pub fn new(phase: CookiePhase, now: Duration) -> Self {
        let answered_until = (phase != CookiePhase::Off).then_some(now);
        Self { phase, since: now, answered_until, calm_since: None, last: None }
    }

    /// What the datapath is to do by now.
    #[must_use]
    pub fn phase(&self) -> CookiePhase {
        self.phase
    }

    /// Only handshakes that began after this time are to be counted; all if there is none.
    #[must_use]
    pub fn counts_after(&self) -> Option<Duration> {
        self.answered_until
    }

    /// Takes a look into account; gives the phase if it is another from now on.
    pub fn look(&mut self, now: Duration, seen: &Handshakes) -> Option<CookiePhase> {
        let next = match self.phase {
            CookiePhase::Answer => self.is_calm(now, seen).then_some(CookiePhase::Accept),
            _ if seen.half_open.iter().any(|family| family.is_flood()) => Some(CookiePhase::Answer),
            CookiePhase::Accept if now.saturating_sub(self.since) >= VALIDITY => Some(CookiePhase::Off),
            CookiePhase::Accept | CookiePhase::Off => None,
        };
        self.last = Some((now, seen.answered, seen.begun));
        if let Some(next) = next {
            if self.phase == CookiePhase::Answer {
                self.answered_until = Some(now);
            }
            (self.phase, self.since, self.calm_since) = (next, now, None);
        }
        next
    }

    /// Whether there has been no flood for long enough. It is one still if the cookies that do not come
    /// back stand for as many handshakes as would fill half of what begins it.
    fn is_calm(&mut self, now: Duration, seen: &Handshakes) -> bool {
        let Some((before, answered, begun)) = self.last else { return false };
        let elapsed = now.saturating_sub(before).as_secs_f64();
        let (answered, begun) = (seen.answered.saturating_sub(answered), seen.begun.saturating_sub(begun));
        let lost = answered.saturating_sub(begun) as f64;
        let held = f64::from(FlowState::SynReceived.default_timeout_seconds());
        let room = seen.half_open.iter().map(|family| family.room).filter(|room| *room > 0).min();
        let most = HalfOpen::flood(room.unwrap_or_default()) as f64 / 2.0;
        if elapsed <= 0.0 || lost / elapsed * held > most {
            self.calm_since = None;
            return false;
        }
        now.saturating_sub(*self.calm_since.get_or_insert(before)) >= CALM
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: u64 = 60_000;

    fn second(number: u64) -> Duration {
        Duration::from_secs(number)
    }

    fn half_open(v4: u64, v6: u64) -> Handshakes {
        let of = |flows, room| HalfOpen { flows, room };
        Handshakes { half_open: [of(v4, ROOM), of(v6, ROOM / 2)], ..Handshakes::default() }
    }

    /// Counters after so many seconds at these rates.
    fn rates(seconds: u64, answered: u64, begun: u64) -> Handshakes {
        Handshakes { answered: seconds * answered, begun: seconds * begun, ..half_open(0, 0) }
    }

    #[test]
    fn a_quarter_of_either_table_is_a_flood() {
        for (v4, v6, is_flood) in [
            (0, 0, false),
            (14_999, 7_499, false),
            (15_000, 0, true),
            (0, 7_500, true),
            (60_000, 30_000, true),
        ] {
            for phase in [CookiePhase::Off, CookiePhase::Accept] {
                let mut watch = FloodWatch::new(phase, second(0));
                let next = watch.look(second(1), &half_open(v4, v6));
                assert_eq!(next, is_flood.then_some(CookiePhase::Answer), "{v4} {v6} {phase:?}");
            }
        }
        assert_eq!([0, 3, 4_000, 262_144, 10_000_000].map(HalfOpen::flood), [1, 1, 1_000, 65_536, 65_536]);
    }

    #[test]
    fn a_table_that_could_not_be_asked_is_no_flood() {
        let mut watch = FloodWatch::new(CookiePhase::Off, second(0));
        assert_eq!(watch.look(second(1), &Handshakes::default()), None);
    }

    /// When a watch that answers from 100 s on stops to, with these rates of cookies and connections
    /// in each second.
    fn ends(rate: impl Fn(u64) -> (u64, u64)) -> Option<u64> {
        let mut watch = FloodWatch::new(CookiePhase::Off, second(0));
        assert_eq!(watch.look(second(100), &half_open(ROOM, 0)), Some(CookiePhase::Answer));
        let mut seen = half_open(0, 0);
        for now in 101..400 {
            let (answered, begun) = rate(now);
            seen.answered += answered;
            seen.begun += begun;
            if watch.look(second(now), &seen) == Some(CookiePhase::Accept) {
                return Some(now);
            }
        }
        None
    }

    #[test]
    fn it_ends_ten_seconds_after_the_flood() {
        // Half of a quarter of the smaller table, within a minute: 62.5 in a second.
        for (what, rate, end) in [
            ("nobody comes", (0, 0), Some(110)),
            ("honest clients only", (20_000, 20_000), Some(110)),
            ("connections of nodes' own pods are no cookies", (0, 500), Some(110)),
            ("some are lost on the way", (20_062, 20_000), Some(110)),
            ("a weak flood would fill the table, too", (20_063, 20_000), None),
            ("a strong one", (100_000, 10), None),
        ] {
            assert_eq!(ends(|_| rate), end, "{what}");
        }
        assert_eq!(ends(|now| if now < 200 { (50_000, 0) } else { (0, 0) }), Some(209));
        assert_eq!(ends(|now| if now % 8 == 0 { (50_000, 0) } else { (0, 0) }), None, "it comes in pulses");
    }

    #[test]
    fn cookies_are_accepted_for_as_long_as_they_are_good() {
        let mut watch = FloodWatch::new(CookiePhase::Off, second(0));
        assert_eq!(watch.counts_after(), None);
        watch.look(second(1), &half_open(ROOM, 0));
        watch.look(second(2), &rates(0, 0, 0));
        assert_eq!(watch.look(second(11), &rates(0, 0, 0)), Some(CookiePhase::Accept));
        assert_eq!(watch.counts_after(), Some(second(11)), "the rest of the flood is not another one");
        assert_eq!(watch.look(second(130), &half_open(14_999, 0)), None);
        assert_eq!(watch.look(second(131), &half_open(0, 0)), Some(CookiePhase::Off));
        assert_eq!((watch.phase(), watch.counts_after()), (CookiePhase::Off, Some(second(11))));
        assert_eq!(watch.look(second(132), &half_open(15_000, 0)), Some(CookiePhase::Answer));
    }

    #[test]
    fn a_flood_that_comes_back_is_answered_at_once() {
        let mut watch = FloodWatch::new(CookiePhase::Accept, second(0));
        assert_eq!(watch.counts_after(), Some(second(0)));
        assert_eq!(watch.look(second(1), &half_open(15_000, 0)), Some(CookiePhase::Answer));
    }

    /// Counters that go on where an earlier agent stopped, or begin anew, are no flood and no end of one.
    #[test]
    fn an_agent_that_starts_in_a_flood_goes_on() {
        let mut watch = FloodWatch::new(CookiePhase::Answer, second(0));
        assert_eq!(watch.look(second(1), &rates(1_000, 50_000, 0)), None);
        for now in 2..60 {
            assert_eq!(watch.look(second(now), &rates(1_000 + now, 50_000, 0)), None);
        }
        assert_eq!(watch.look(second(60), &rates(0, 0, 0)), None);
    }

    #[test]
    fn phases_are_those_of_the_datapath() {
        for phase in [CookiePhase::Off, CookiePhase::Accept, CookiePhase::Answer] {
            assert_eq!(CookiePhase::from_raw(phase.raw()), phase);
        }
        assert_eq!(CookiePhase::from_raw(9), CookiePhase::Off);
    }
}
