//! The time that counts, and what was used in it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::process::{Meter, Usage};

/// Something is broken if nothing moves for so long.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long to measure.
#[derive(Clone, Copy, Debug)]
pub struct Length {
    /// What comes first does not count: windows grow, caches warm.
    pub warm_up: Duration,
    /// What counts.
    pub measured: Duration,
}

/// What was done in the time that counts.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// How many of whatever was counted.
    pub count: f64,
    /// For how long.
    pub seconds: f64,
    /// CPU time for it.
    pub usage: Usage,
}

impl Measured {
    /// How many in a second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.count / self.seconds
    }
}

/// Watches the time.
pub struct Window {
    meter: Meter,
    length: Length,
    start: Instant,
    begin: Option<(Instant, u64, Usage)>,
    /// When the count last changed.
    moved: (Instant, u64),
}

impl Window {
    /// Begins to warm up.
    #[must_use]
    pub fn start(meter: Meter, length: Length) -> Self {
        let start = Instant::now();
        Self { meter, length, start, begin: None, moved: (start, 0) }
    }

    /// Whether what is done now counts.
    #[must_use]
    pub fn is_measured(&self) -> bool {
        self.begin.is_some()
    }

    /// Looks at the clock; `count` is what has been done since the start. Gives the result when the time is
    /// over.
    ///
    /// # Errors
    /// When the count stands still, or a process has ended.
    pub fn tick(&mut self, now: Instant, count: u64) -> Result<Option<Measured>> {
        if count != self.moved.1 {
            self.moved = (now, count);
        }
        ensure!(now < self.moved.0 + PATIENCE, "nothing moved for {PATIENCE:?}, after {count} in all");
        match self.begin {
            None if now >= self.start + self.length.warm_up => {
                let usage = self.meter.read()?;
                // Reading takes a moment, too.
                self.begin = Some((Instant::now(), count, usage));
                Ok(None)
            }
            Some((begin, before, usage)) if now >= begin + self.length.measured => {
                let usage = self.meter.read()?.since(&usage);
                let count = (count - before) as f64;
                Ok(Some(Measured { count, seconds: (now - begin).as_secs_f64(), usage }))
            }
            _ => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_comes_after_the_warm_up_counts() {
        let length = Length { warm_up: Duration::from_secs(1), measured: Duration::from_secs(2) };
        let mut window = Window::start(Meter::default(), length);
        let start = window.start;
        assert!(window.tick(start, 5).unwrap().is_none() && !window.is_measured());
        let begin = start + Duration::from_secs(1);
        assert!(window.tick(begin, 100).unwrap().is_none() && window.is_measured());
        let measured = window.tick(begin + Duration::from_secs(4), 700).unwrap().unwrap();
        assert_eq!(measured.count, 600.0);
        assert!(measured.seconds > 2.0);
        let mut idle = Window::start(Meter::default(), length);
        let error = idle.tick(idle.start + PATIENCE, 0).unwrap_err().to_string();
        assert!(error.contains("nothing moved"), "{error}");
    }
}
