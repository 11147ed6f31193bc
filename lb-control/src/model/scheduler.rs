//! How a Service's connections are spread over its backends.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

/// How connections are spread, as an annotation says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scheduler {
    /// In turn, by weight.
    #[default]
    RoundRobin,
    /// By a hash of the client: the same backend on every node.
    Maglev,
    /// To the backend with the fewest open connections for its weight.
    LeastConnections,
}

impl Scheduler {
    /// All.
    pub const ALL: [Self; 3] = [Self::RoundRobin, Self::Maglev, Self::LeastConnections];

    /// As the annotation has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::RoundRobin => "round-robin",
            Self::Maglev => "maglev",
            Self::LeastConnections => "least-connections",
        }
    }
}

impl fmt::Display for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A scheduler that there is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownScheduler(String);

impl fmt::Display for UnknownScheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = Scheduler::ALL.map(Scheduler::name).join(", ");
        write!(f, "`{}` is no scheduler; there are {names}", self.0)
    }
}

impl std::error::Error for UnknownScheduler {}

impl FromStr for Scheduler {
    type Err = UnknownScheduler;

    fn from_str(text: &str) -> Result<Self, UnknownScheduler> {
        let found = Self::ALL.into_iter().find(|scheduler| scheduler.name() == text);
        found.ok_or_else(|| UnknownScheduler(text.to_owned()))
    }
}

/// How long a backend that comes to others takes to get its full share: `30s`, `5m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlowStart(Duration);

impl SlowStart {
    /// The shortest, in seconds: a share grows in steps, and each writes maps.
    pub const MINIMUM: u64 = 5;
    /// The longest, in seconds.
    pub const MAXIMUM: u64 = 3_600;

    /// The time.
    #[must_use]
    pub const fn duration(self) -> Duration {
        self.0
    }
}

/// A slow start that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSlowStart(String);

impl fmt::Display for BadSlowStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (minimum, maximum) = (SlowStart::MINIMUM, SlowStart::MAXIMUM);
        write!(f, "`{}` is no time from {minimum}s to {maximum}s (30s, 5m)", self.0)
    }
}

impl std::error::Error for BadSlowStart {}

impl FromStr for SlowStart {
    type Err = BadSlowStart;

    fn from_str(text: &str) -> Result<Self, BadSlowStart> {
        let of = |unit: char, seconds: u64| -> Option<u64> {
            text.strip_suffix(unit)?.parse::<u64>().ok()?.checked_mul(seconds)
        };
        let seconds = of('s', 1).or_else(|| of('m', 60));
        let fitting = seconds.filter(|seconds| (Self::MINIMUM..=Self::MAXIMUM).contains(seconds));
        fitting.map(|seconds| Self(Duration::from_secs(seconds))).ok_or_else(|| BadSlowStart(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_starts_are_read() {
        for (text, seconds) in [("5s", 5), ("90s", 90), ("5m", 300), ("60m", 3_600)] {
            assert_eq!(text.parse::<SlowStart>().unwrap().duration().as_secs(), seconds);
        }
        for text in ["", "30", "s", "4s", "0m", "61m", "-5s", "1h", "1.5m", "99999999999999999999m"] {
            let error = text.parse::<SlowStart>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("`{text}` is no time from 5s to 3600s")), "{error}");
        }
    }

    #[test]
    fn names_are_read() {
        for scheduler in Scheduler::ALL {
            assert_eq!(scheduler.name().parse(), Ok(scheduler));
        }
        let error = "rr".parse::<Scheduler>().unwrap_err().to_string();
        assert_eq!(error, "`rr` is no scheduler; there are round-robin, maglev, least-connections");
    }
}
