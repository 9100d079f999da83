//! Ends answers that come too slowly.

use std::io::{self, Read};
use std::time::{Duration, Instant};

/// Reads an answer, and fails if fewer than a number of bytes come within a time. Otherwise a line that hangs would not be noticed as
/// long as a byte comes now and then. Time in which nobody reads does not count.
#[derive(Debug)]
pub(crate) struct Paced<R> {
    inner: R,
    least: u64,
    window: Duration,
    waited: Duration,
    came: u64,
}

impl<R: Read> Paced<R> {
    pub(crate) fn new(inner: R, least: u64, window: Duration) -> Self {
        Paced { inner, least, window, waited: Duration::ZERO, came: 0 }
    }
}

impl<R: Read> Read for Paced<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let began = Instant::now();
        let count = self.inner.read(out)?;
        self.waited += began.elapsed();
        self.came += count as u64;
        if count > 0 && self.waited >= self.window {
            if self.came < self.least {
                let problem = format!("only {} bytes have come in {} s", self.came, self.waited.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, problem));
            }
            (self.waited, self.came) = (Duration::ZERO, 0);
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives a byte at a time.
    struct Drops(usize);

    impl Read for Drops {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            let count = self.0.min(1).min(out.len());
            self.0 -= count;
            Ok(count)
        }
    }

    #[test]
    fn what_comes_too_slowly_fails_and_an_end_does_not() {
        let read = |least| Paced::new(Drops(5), least, Duration::ZERO).read_to_end(&mut Vec::new());
        assert_eq!(read(1).unwrap(), 5);
        assert_eq!(read(2).unwrap_err().kind(), io::ErrorKind::TimedOut);
        let mut patient = Paced::new(Drops(5), 100, Duration::from_secs(3600));
        assert_eq!(patient.read_to_end(&mut Vec::new()).unwrap(), 5);
    }
}
