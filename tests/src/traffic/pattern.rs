//! Bytes that can be checked wherever a stream is read.

/// Length of the period: a prime, so that a lost, doubled or moved piece of any usual size shows.
const PERIOD: usize = 1_048_573;

/// An endless stream of bytes that depends on its seed; equal pieces at different offsets are
/// `PERIOD` bytes apart.
#[derive(Clone)]
pub struct Pattern {
    period: Box<[u8]>,
    at: usize,
}

impl Pattern {
    /// The stream from its start.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut state = seed;
        let period = (0..PERIOD).map(|_| splitmix(&mut state)).collect();
        Self { period, at: 0 }
    }

    /// The next bytes, at most `most` and at least one; to be followed by [`Self::advance`].
    #[must_use]
    pub fn next(&self, most: usize) -> &[u8] {
        let end = self.period.len().min(self.at + most);
        &self.period[self.at..end]
    }

    /// Goes on by as many bytes as were used.
    pub fn advance(&mut self, count: usize) {
        self.at = (self.at + count) % self.period.len();
    }

    /// Goes on by `data.len()` when that is what comes next; else gives the offset in `data` of the
    /// first wrong byte.
    ///
    /// # Errors
    /// The offset of the first wrong byte.
    pub fn check(&mut self, data: &[u8]) -> Result<(), usize> {
        let mut done = 0;
        while done < data.len() {
            let expected = self.next(data.len() - done);
            let length = expected.len();
            let found = &data[done..done + length];
            if found != expected {
                let wrong = found.iter().zip(expected).position(|(found, expected)| found != expected);
                return Err(done + wrong.unwrap_or_default());
            }
            done += length;
            self.advance(length);
        }
        Ok(())
    }
}

/// Splitmix64 (Steele, Lea, Flood 2014): every output is as random as the next.
fn splitmix(state: &mut u64) -> u8 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)).to_le_bytes()[0]
}

#[cfg(test)]
mod tests {
    use super::Pattern;

    #[test]
    fn finds_changed_and_missing_bytes() {
        let mut data = Vec::new();
        let mut source = Pattern::new(1);
        while data.len() < 3_000_000 {
            let piece = source.next(70_001).to_vec();
            source.advance(piece.len());
            data.extend(piece);
        }
        assert_eq!(Pattern::new(1).check(&data), Ok(()));
        assert!(Pattern::new(2).check(&data[..1000]).is_err());
        data[2_000_000] ^= 1;
        assert_eq!(Pattern::new(1).check(&data), Err(2_000_000));
        data[2_000_000] ^= 1;
        data.drain(500..1948);
        assert!(Pattern::new(1).check(&data).is_err_and(|at| (500..510).contains(&at)));
    }
}
