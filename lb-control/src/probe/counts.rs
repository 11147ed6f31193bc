//! What becomes of questions.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// What became of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It works.
    Healthy,
    /// Nobody listens.
    Refused,
    /// There is no way to it, or somebody on the way forbids it.
    Unreachable(String),
    /// It did not take the connection in so long.
    NotConnected(Duration),
    /// It took the connection, and did not answer in so long.
    NoAnswer(Duration),
    /// It ended the connection without an answer.
    Closed,
    /// It answered with something else than HTTP/1.
    NotHttp,
    /// It answered with a status that means that it does not work.
    Status(u16),
    /// It could not be asked: this node has no descriptors, ports or memory for it.
    NotAsked,
}

impl Outcome {
    /// The values of the label of the metric, in the order of [`Counts::read`].
    pub const NAMES: [&'static str; 7] =
        ["healthy", "refused", "unreachable", "timeout", "closed", "bad-answer", "not-asked"];

    fn index(&self) -> usize {
        match self {
            Self::Healthy => 0,
            Self::Refused => 1,
            Self::Unreachable(_) => 2,
            Self::NotConnected(_) | Self::NoAnswer(_) => 3,
            Self::Closed => 4,
            Self::NotHttp | Self::Status(_) => 5,
            Self::NotAsked => 6,
        }
    }

    /// The value of the label.
    #[must_use]
    pub fn name(&self) -> &'static str {
        Self::NAMES[self.index()]
    }
}

impl fmt::Display for Outcome {
    /// For people, as the reason why a backend is unhealthy.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Healthy => f.write_str("works"),
            Self::Refused => f.write_str("connect: refused"),
            Self::Unreachable(why) => write!(f, "connect: {why}"),
            Self::NotConnected(after) => write!(f, "connect: no answer within {after:?}"),
            Self::NoAnswer(after) => write!(f, "no answer within {after:?}"),
            Self::Closed => f.write_str("closed without an answer"),
            Self::NotHttp => f.write_str("the answer is not HTTP/1"),
            Self::Status(status) => write!(f, "HTTP {status}"),
            Self::NotAsked => f.write_str("could not be asked"),
        }
    }
}

/// How many questions had which outcome. Any thread may read at any time.
#[derive(Debug, Default)]
pub struct Counts([AtomicU64; Outcome::NAMES.len()]);

impl Counts {
    pub(super) fn count(&self, outcome: &Outcome) {
        self.0[outcome.index()].fetch_add(1, Ordering::Relaxed);
    }

    /// By the name of the outcome.
    pub fn read(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let counts = self.0.iter().map(|count| count.load(Ordering::Relaxed));
        Outcome::NAMES.into_iter().zip(counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_counted_and_told() {
        let second = Duration::from_secs(1);
        let counts = Counts::default();
        for (outcome, name, text) in [
            (Outcome::Healthy, "healthy", "works"),
            (Outcome::Refused, "refused", "connect: refused"),
            (Outcome::Unreachable("no route to host".into()), "unreachable", "connect: no route to host"),
            (Outcome::NotConnected(second), "timeout", "connect: no answer within 1s"),
            (Outcome::NoAnswer(second / 2), "timeout", "no answer within 500ms"),
            (Outcome::Closed, "closed", "closed without an answer"),
            (Outcome::NotHttp, "bad-answer", "the answer is not HTTP/1"),
            (Outcome::Status(503), "bad-answer", "HTTP 503"),
            (Outcome::NotAsked, "not-asked", "could not be asked"),
        ] {
            assert_eq!((outcome.name(), outcome.to_string().as_str()), (name, text));
            counts.count(&outcome);
        }
        let read: Vec<_> = counts.read().map(|(_, count)| count).collect();
        assert_eq!(read, [1, 1, 1, 2, 1, 2, 1]);
    }
}
