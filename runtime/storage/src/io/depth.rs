//! How many chunks are in flight: as configured, or, where nothing is known about the drive, as the program's own reads show to be enough.
//!
//! Only time in which more was wanted than could be in flight says what a drive gives. It is taken from the end of one chunk to the end of
//! the next, so gaps between reads do not count. Several depths take turns for some megabytes each, because a drive's speed changes while the
//! program computes. Then the smallest that reaches nine tenths of the best is kept, as `bench disk` does: an urgent read waits
//! for everything that is in flight before it.

/// The depths that are tried, in this order; the first is the default, which is good on most drives.
const TRIED: [usize; 4] = [4, 2, 8, 16];
/// How often each is tried.
const ROUNDS: usize = 3;
/// Bytes of each trial.
const TRIAL_BYTES: u64 = 32 << 20;
/// The part of the best rate that is enough.
const ENOUGH: f64 = 0.9;

/// The depth of a drive.
#[derive(Debug)]
pub(super) struct Depth {
    /// Chunks that may be in flight.
    limit: usize,
    trials: Option<Trials>,
}

/// What has been tried.
#[derive(Debug, Default)]
struct Trials {
    /// Bytes per nanosecond: of each depth, round by round.
    rates: Vec<f64>,
    /// Bytes of the current trial, and their nanoseconds.
    bytes: u64,
    nanoseconds: u64,
    /// When a chunk ended last, if as many as possible were in flight.
    last: Option<u64>,
}

impl Depth {
    /// The most chunks that may ever be in flight where the depth is found out.
    pub(super) const MOST: usize = 16;

    /// Always so many chunks.
    pub(super) fn fixed(limit: usize) -> Self {
        Depth { limit, trials: None }
    }

    /// The depth is found out.
    pub(super) fn found_out() -> Self {
        Depth { limit: TRIED[0], trials: Some(Trials::default()) }
    }

    /// Chunks that may be in flight now.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Chunks of so many `bytes` have ended at `now`, in nanoseconds. `full`: until then as many were in flight as may be.
    pub(super) fn ended(&mut self, bytes: u64, now: u64, full: bool) {
        let Some(trials) = &mut self.trials else { return };
        if let Some(last) = trials.last.filter(|_| full) {
            trials.bytes += bytes;
            trials.nanoseconds += now - last;
        }
        trials.last = full.then_some(now);
        if trials.bytes < TRIAL_BYTES {
            return;
        }
        trials.rates.push(trials.bytes as f64 / trials.nanoseconds.max(1) as f64);
        // The chunks in flight now belong to the depth before.
        (trials.bytes, trials.nanoseconds, trials.last) = (0, 0, None);
        if trials.rates.len() < ROUNDS * TRIED.len() {
            self.limit = TRIED[trials.rates.len() % TRIED.len()];
        } else {
            (self.limit, self.trials) = (trials.enough(), None);
        }
    }
}

impl Trials {
    /// The smallest depth that is nearly as good as the best.
    fn enough(&self) -> usize {
        let median = |at: usize| {
            let mut rates: Vec<f64> = self.rates.iter().skip(at).step_by(TRIED.len()).copied().collect();
            rates.sort_unstable_by(f64::total_cmp);
            rates[rates.len() / 2]
        };
        let rates: [f64; TRIED.len()] = std::array::from_fn(median);
        let best = rates.iter().copied().fold(0.0, f64::max);
        let good = TRIED.iter().zip(rates).filter(|(_, rate)| *rate >= ENOUGH * best);
        good.map(|(depth, _)| *depth).min().unwrap_or(TRIED[0])
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::time::Duration;

    use super::*;
    use crate::io::IoConfig;
    use crate::io::sim::{Bus, DriveSpeed};

    const CHUNK: u64 = 1 << 20;

    /// Reads experts of `bytes` bytes from a drive, in chunks of `chunk` bytes, until the depth is fixed and a hundred experts more; returns
    /// the nanoseconds of those and the depth.
    fn read_experts(speed: DriveSpeed, bytes: usize, chunk: usize, mut depth: Depth) -> (u64, usize) {
        let (mut bus, mut flying, mut now, mut fixed) = (Bus::default(), VecDeque::new(), 0, None);
        let mut chunks = (0..bytes).step_by(chunk).map(|at| chunk.min(bytes - at)).cycle();
        let (mut read, all) = (0, 100 * bytes);
        loop {
            while flying.len() < depth.limit() {
                let len = chunks.next().expect("without end");
                flying.push_back((bus.submit(speed, now, len), len));
            }
            let full = flying.len() >= depth.limit();
            let (end, len) = flying.pop_front().expect("at least one");
            now = end;
            depth.ended(len as u64, now, full);
            if depth.trials.is_none() {
                let since = *fixed.get_or_insert(now);
                read += len;
                if read > all {
                    return (now - since, depth.limit());
                }
            }
        }
    }

    /// Nobody has to find the size of a chunk, nor the depth: with the default chunk, and the depth that is found, any drive is read nearly as
    /// fast as with the best of both.
    #[test]
    fn with_the_default_chunk_every_drive_is_nearly_as_fast_as_with_any() {
        let default = IoConfig::default().chunk_bytes;
        for megabytes in [300, 1_000, 3_000, 7_000, 14_000] {
            for micros in [20, 80, 300, 1_000] {
                let latency = Duration::from_micros(micros);
                let speed = DriveSpeed { bytes_per_second: megabytes * 1_000_000, latency };
                // Of 30B-A3B in four bits, and of a large model.
                for bytes in [2_650_112, 24_772_608] {
                    let (found, depth) = read_experts(speed, bytes, default, Depth::found_out());
                    let each = [256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20].into_iter().flat_map(|chunk| {
                        let depths = TRIED.into_iter().filter(move |depth| chunk * depth <= 16 << 20);
                        depths.map(move |depth| read_experts(speed, bytes, chunk, Depth::fixed(depth)).0)
                    });
                    let best = each.min().expect("some");
                    let ratio = found as f64 / best as f64;
                    assert!(ratio <= 1.11, "{megabytes} MB/s, {micros} µs, {bytes}: {ratio:.3} with {depth} in flight");
                    let slowest = megabytes <= 1_000 && micros <= 300;
                    assert!(!slowest || depth == 2, "{megabytes} MB/s, {micros} µs: no more than needed, not {depth}");
                }
            }
        }
    }

    /// Reads until the depth is found; a chunk takes `nanoseconds(depth, number)` from the end of the one before it.
    fn found(nanoseconds: impl Fn(usize, u64) -> u64) -> (usize, u64) {
        let (mut depth, mut now) = (Depth::found_out(), 0);
        for number in 0.. {
            if depth.trials.is_none() {
                return (depth.limit(), number * CHUNK);
            }
            now += nanoseconds(depth.limit(), number);
            depth.ended(CHUNK, now, true);
        }
        unreachable!("it never ends")
    }

    #[test]
    fn the_smallest_depth_that_is_nearly_as_fast_as_any_is_found() {
        // A drive that serves one chunk at a time, at 3 GB/s.
        assert_eq!(found(|_, _| 350_000).0, 2);
        // Each chunk takes 2 ms, however many are in flight, up to 8 at once.
        let (depth, bytes) = found(|depth, _| 2_000_000 / depth.min(8) as u64);
        assert_eq!(depth, 8);
        assert!(bytes <= (TRIAL_BYTES + 2 * CHUNK) * (ROUNDS * TRIED.len()) as u64, "{bytes}");
        // A network: the more, the better.
        assert_eq!(found(|depth, _| 10_000_000 / depth as u64).0, 16);
    }

    #[test]
    fn one_slow_trial_of_a_depth_does_not_matter() {
        let slow = |depth: usize, number: u64| if depth == 2 && number < 100 { 3_000_000 } else { 350_000 };
        assert_eq!(found(slow).0, 2);
    }

    #[test]
    fn time_in_which_less_was_wanted_does_not_count() {
        let mut depth = Depth::found_out();
        for second in 0..1000 {
            depth.ended(CHUNK, 1_000_000_000 * second, false);
        }
        assert_eq!(depth.limit(), TRIED[0]);
        // Every second chunk follows one until whose end the drive was used fully.
        let mut now = 1_000_000_000_000;
        for number in 0..2 * (TRIAL_BYTES / CHUNK) {
            depth.ended(CHUNK, now, true);
            now += if number % 2 == 0 { 350_000 } else { 1_000_000_000 };
            if number % 2 == 1 {
                depth.ended(CHUNK, now, false);
            }
        }
        assert_eq!(depth.limit(), TRIED[1]);
        let rate = depth.trials.as_ref().expect("it goes on").rates[0];
        assert!((rate - CHUNK as f64 / 350_000.0).abs() < 1e-6, "{rate}");
    }

    #[test]
    fn a_fixed_depth_stays() {
        let mut depth = Depth::fixed(3);
        (0..1000).for_each(|i| depth.ended(CHUNK, i, true));
        assert_eq!(depth.limit(), 3);
    }
}
