//! The time between the word to end and the end. An address moves to another node only when this one gives
//! it up, so as long as the proxy has connections to wait for, refusing new ones would help nobody: the
//! agent goes on as before meanwhile.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

/// How often to look whether connections have ended.
const LOOK: Duration = Duration::from_millis(50);
/// How long those have that are there when nothing new is accepted any more: whoever has just asked gets
/// an answer.
pub const LAST: Duration = Duration::from_secs(1);

/// Whether the agent is about to end.
#[derive(Debug, Default)]
pub struct Ending {
    /// When connections are to have ended, once somebody has asked for it.
    until: Option<Instant>,
    look_at: Option<Instant>,
}

impl Ending {
    /// Somebody asks for the end while the proxy has so many connections, which may take so long. Says
    /// whether to end now: if there is nothing to wait for, or they have asked before.
    pub fn asked(&mut self, now: Instant, connections: usize, drain: Duration) -> bool {
        if self.until.is_some() {
            warn!(connections, "asked to end once more: not waiting for connections any longer");
            self.until = Some(now);
            return true;
        }
        self.until = Some(now + drain);
        if connections == 0 || drain <= LAST {
            return true;
        }
        info!(connections, "serving until the proxy's connections have ended, for {drain:?} at most");
        self.look_at = Some(now + LOOK);
        false
    }

    /// When to ask [`Self::is_over`].
    pub fn look_at(&self) -> Option<Instant> {
        self.look_at
    }

    /// Whether to end now that there are so many connections.
    pub fn is_over(&mut self, now: Instant, connections: usize) -> bool {
        self.look_at = Some(now + LOOK);
        connections == 0 || self.until.is_some_and(|until| now + LAST >= until)
    }

    /// How long connections may still go on; so long if nobody has asked for the end.
    pub fn left(&self, now: Instant, drain: Duration) -> Duration {
        self.until.map_or(drain, |until| until.saturating_duration_since(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAIN: Duration = Duration::from_secs(20);

    #[test]
    fn as_long_as_there_are_connections() {
        let (mut ending, now) = (Ending::default(), Instant::now());
        assert_eq!((ending.look_at(), ending.left(now, DRAIN)), (None, DRAIN));
        assert!(!ending.asked(now, 2, DRAIN));
        assert_eq!(ending.look_at(), Some(now + LOOK));
        assert!(!ending.is_over(now + LOOK, 1) && ending.is_over(now + LOOK, 0));
        assert_eq!(ending.left(now + LOOK, DRAIN), DRAIN - LOOK);
    }

    #[test]
    fn and_no_longer_than_told() {
        let (mut ending, now) = (Ending::default(), Instant::now());
        assert!(!ending.asked(now, 2, DRAIN));
        let last = now + DRAIN - LAST;
        assert!(!ending.is_over(last - LOOK, 2));
        assert_eq!(ending.look_at(), Some(last));
        assert!(ending.is_over(last, 2));
        assert_eq!(ending.left(last, DRAIN), LAST);
    }

    #[test]
    fn at_once_with_nothing_to_wait_for_or_when_asked_again() {
        let now = Instant::now();
        assert!(Ending::default().asked(now, 0, DRAIN) && Ending::default().asked(now, 2, Duration::ZERO));
        let mut ending = Ending::default();
        assert!(!ending.asked(now, 2, DRAIN) && ending.asked(now, 2, DRAIN));
        assert_eq!(ending.left(now, DRAIN), Duration::ZERO);
    }
}
