//! How a Service's connections are spread over its backends.

use std::{fmt, str::FromStr};

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read() {
        for scheduler in Scheduler::ALL {
            assert_eq!(scheduler.name().parse(), Ok(scheduler));
        }
        let error = "rr".parse::<Scheduler>().unwrap_err().to_string();
        assert_eq!(error, "`rr` is no scheduler; there are round-robin, maglev, least-connections");
    }
}
