//! Whether decoding leaves a core to reading, found out by trying both.
//!
//! Where the host of a virtual machine moves the bytes with the cores that compute, a thread on every core slows down reading and waits for
//! cores that are taken away. Where the drive needs no core, a core that is left to it idles. Nothing that can be asked tells the two
//! apart; the time of steps does. It depends most on how much a step misses, so that is taken out of the comparison.

use std::time::Instant;

use sluice_storage::io::IoStats;

/// Steps of each way before they are compared.
const TRIED: f64 = 8.0;
/// Every so many steps have the way that is not the better one, in case that has changed.
const TRY_AGAIN: u64 = 17;
/// The same where the better way is clearly better: what is tried again then costs most and tells least.
const TRY_AGAIN_IF_CLEAR: u64 = 67;
/// The better way takes at most this part of the time of the other one where it is clearly better.
const CLEAR: f64 = 0.92;
/// What is left of the weight of a step when the next one of its way is counted: the last hundred or so count.
const KEPT: f64 = 1.0 - 1.0 / 64.0;
/// A step tells the ways apart only if the drive was in use for this part of its time.
const LEAST_BUSY: f64 = 0.1;
/// Computing on all cores must take at most this part of the time with one left, or one is left: that is better for other programs.
const LEAST_GAIN: f64 = 0.98;

/// The choice between leaving a core and not, and what it is made from.
#[derive(Clone, Debug, Default)]
pub(super) struct Sparing {
    /// Steps without, and with a core left.
    ways: [Sums; 2],
    steps: u64,
}

/// A step that has begun.
#[derive(Clone, Copy, Debug)]
pub(super) struct Begun {
    /// Whether it leaves a core.
    pub(super) spared: bool,
    /// What had been read before.
    io: IoStats,
    at: Instant,
}

/// Weighted sums over the steps of one way.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    count: f64,
    /// Bytes that were read.
    bytes: f64,
    seconds: f64,
    bytes_squared: f64,
    bytes_seconds: f64,
}

impl Sums {
    fn add(&mut self, bytes: f64, seconds: f64) {
        let Sums { count, bytes: all, seconds: time, bytes_squared, bytes_seconds } = self;
        let added = [1.0, bytes, seconds, bytes * bytes, bytes * seconds];
        for (sum, value) in [count, all, time, bytes_squared, bytes_seconds].into_iter().zip(added) {
            *sum = KEPT * *sum + value;
        }
    }

    /// How bytes and seconds vary together, and bytes alone, within this way.
    fn variation(&self) -> (f64, f64) {
        let mean = self.bytes / self.count;
        (self.bytes_seconds - mean * self.seconds, self.bytes_squared - mean * self.bytes)
    }
}

impl Sparing {
    /// A step begins that decodes one token. `io`: what has been read so far.
    pub(super) fn begin(&mut self, io: IoStats) -> Begun {
        Begun { spared: self.choose(), io, at: Instant::now() }
    }

    /// The step has ended.
    pub(super) fn end(&mut self, step: Begun, io: IoStats) {
        let (io, seconds) = (io.since(&step.io), step.at.elapsed().as_secs_f64());
        if io.busy_ns as f64 >= LEAST_BUSY * 1e9 * seconds {
            self.note(step.spared, io.demand_bytes + io.prefetch_bytes, seconds);
        }
    }

    /// Whether the next step leaves a core.
    fn choose(&mut self) -> bool {
        self.steps += 1;
        let [without, with] = &self.ways;
        if without.count.min(with.count) < TRIED {
            // The first step leaves one, as all do that are alone.
            return !self.steps.is_multiple_of(2);
        }
        let [without, with] = self.times();
        let is_clear = without.min(with) <= CLEAR * without.max(with);
        let again = if is_clear { TRY_AGAIN_IF_CLEAR } else { TRY_AGAIN };
        // Leaving a core is better, or as good.
        (without > LEAST_GAIN * with) != self.steps.is_multiple_of(again)
    }

    /// Takes what a step read, in bytes, and how long it took.
    fn note(&mut self, spared: bool, bytes: u64, seconds: f64) {
        self.ways[usize::from(spared)].add(bytes as f64, seconds);
    }

    /// Seconds of a step without a core left and with one, if both read as much.
    fn times(&self) -> [f64; 2] {
        let [without, with] = &self.ways;
        let ((both, alone), (both_with, alone_with)) = (without.variation(), with.variation());
        let alone = alone + alone_with;
        let per_byte = if alone > 0.0 { ((both + both_with) / alone).max(0.0) } else { 0.0 };
        // What each way would take for the mean bytes of both.
        let bytes = (without.bytes + with.bytes) / (without.count + with.count);
        let time = |way: &Sums| way.seconds / way.count + per_byte * (bytes - way.bytes / way.count);
        [time(without), time(with)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays steps that take `without` or `with` seconds, and `per_byte` more for bytes that vary, and differ between even and odd steps;
    /// returns how many of the last 320 leave a core.
    fn play(without: f64, with: f64, per_byte: f64) -> usize {
        let (mut sparing, mut random, mut left) = (Sparing::default(), 1u64, 0);
        for step in 0..400 {
            let spared = sparing.choose();
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let bytes = 50_000_000 + 100_000 * (random >> 54) + 20_000_000 * (step % 2);
            let noise = 1.0 + 0.05 * ((random >> 40) % 64) as f64 / 64.0;
            let own = if spared { with } else { without };
            sparing.note(spared, bytes, noise * own + per_byte * bytes as f64);
            left += usize::from(spared && step >= 80);
        }
        left
    }

    #[test]
    fn the_faster_way_is_taken_whatever_steps_miss() {
        let tried = |every: u64| (81..=400u64).filter(|step| step.is_multiple_of(every)).count();
        // A step reads 111 MB in the mean.
        for (per_byte, again) in [(0.0, TRY_AGAIN_IF_CLEAR), (3e-10, TRY_AGAIN_IF_CLEAR), (1.5e-9, TRY_AGAIN)] {
            let tried_again = tried(again);
            assert_eq!(play(0.05, 0.06, per_byte), tried_again, "all cores, {per_byte}");
            assert_eq!(play(0.06, 0.05, per_byte), 320 - tried_again, "a core left, {per_byte}");
        }
        assert_eq!(play(0.05, 0.05, 3e-10), 320 - tried(TRY_AGAIN), "as good");
    }

    #[test]
    fn a_way_that_becomes_slow_is_left_soon_even_if_the_other_is_seldom_tried() {
        let (mut sparing, mut left) = (Sparing::default(), 0);
        for step in 0..400 {
            let spared = sparing.choose();
            let slow = if step < 200 { spared } else { !spared };
            sparing.note(spared, 50_000_000, if slow { 0.08 } else { 0.05 });
            left += usize::from(spared && step >= 330);
        }
        assert!(left >= 60, "{left} of the last 70");
    }

    #[test]
    fn steps_that_hardly_read_do_not_count() {
        let mut sparing = Sparing::default();
        let step = sparing.begin(IoStats::default());
        sparing.end(step, IoStats { demand_bytes: 1, ..IoStats::default() });
        assert_eq!(sparing.ways.map(|way| way.count), [0.0; 2]);
        let step = sparing.begin(IoStats::default());
        sparing.end(step, IoStats { demand_bytes: 1, busy_ns: u64::MAX, ..IoStats::default() });
        assert_eq!(sparing.ways.map(|way| way.count), [1.0, 0.0]);
    }
}
