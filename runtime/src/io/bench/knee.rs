//! The knee: where a drive gives nearly all it has with the fewest bytes in flight.

use serde::Serialize;

use super::Point;

/// Bandwidth that a setting may stay below the best one.
pub const TOLERANCE: f64 = 0.04;

/// Smallest block that becomes a chunk size: below, the processor works for the drive instead of the model.
const BLOCK_LEAST: usize = 256 << 10;

/// Largest: experts have 2 MiB and more, and computing starts with the first chunk of one.
const BLOCK_MOST: usize = 2 << 20;

/// Fewest reads in flight: with fewer, one slow read leaves the drive idle.
const DEPTH_LEAST: usize = 4;

/// What was measured at a point.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Knee {
    /// The setting.
    #[serde(flatten)]
    pub point: Point,
    /// Its bandwidth.
    pub bytes_per_second: f64,
    /// Processor seconds for 10⁹ bytes.
    pub cpu_seconds_per_gb: f64,
}

/// True for settings that can become a calibration.
#[must_use]
pub fn is_eligible(point: &Point) -> bool {
    (BLOCK_LEAST..=BLOCK_MOST).contains(&point.block_bytes) && point.depth >= DEPTH_LEAST
}

/// Of the settings within `tolerance` of the best bandwidth, the one with the fewest bytes in flight: a read that is
/// urgent waits for those. Among equals, the one that costs the least processor time. Only settings that suit a model
/// are taken, if there are any; the best bandwidth is that of all.
#[must_use]
pub fn find_knee(measured: &[Knee], tolerance: f64) -> Option<Knee> {
    let best = |of: &[Knee]| of.iter().map(|k| k.bytes_per_second).fold(0.0, f64::max);
    let eligible: Vec<_> = measured.iter().copied().filter(|k| is_eligible(&k.point)).collect();
    let candidates = if eligible.is_empty() { measured } else { &eligible };
    // What is not eligible may be faster than all that is.
    let least = (best(measured) * (1.0 - tolerance)).min(best(candidates));
    let cost = |k: &Knee| (k.point.in_flight_bytes(), k.cpu_seconds_per_gb);
    let good = candidates.iter().filter(|k| k.bytes_per_second >= least && k.bytes_per_second > 0.0);
    good.min_by(|a, b| cost(a).partial_cmp(&cost(b)).unwrap_or(std::cmp::Ordering::Equal)).copied()
}

#[cfg(test)]
mod tests {
    use super::super::{BenchEngine, Pattern};
    use super::*;

    fn at(engine: BenchEngine, block_kib: usize, depth: usize, megabytes: f64) -> Knee {
        let point = Point { engine, pattern: Pattern::Random, block_bytes: block_kib << 10, depth };
        Knee { point, bytes_per_second: megabytes * 1e6, cpu_seconds_per_gb: 0.1 }
    }

    fn uring(block_kib: usize, depth: usize, megabytes: f64) -> Knee {
        at(BenchEngine::Uring, block_kib, depth, megabytes)
    }

    /// A drive with a latency and a bandwidth.
    fn drive(latency_ms: f64, megabytes: f64) -> Vec<Knee> {
        let mut table = Vec::new();
        for block_kib in [128, 256, 512, 1024, 2048, 4096] {
            for depth in [1, 4, 8, 16, 32, 64] {
                let in_flight = (block_kib * depth) as f64 / 1000.0;
                let alone = latency_ms + block_kib as f64 / megabytes;
                table.push(uring(block_kib, depth, megabytes.min(in_flight / alone * 1000.0)));
            }
        }
        table
    }

    #[test]
    fn a_fast_drive_needs_more_in_flight_than_a_slow_one() {
        let knee = |latency, megabytes| find_knee(&drive(latency, megabytes), TOLERANCE).expect("a knee").point;
        let slow = knee(0.1, 500.0);
        let fast = knee(0.1, 14_000.0);
        assert_eq!((slow.block_bytes, slow.depth), (256 << 10, 4));
        assert_eq!(fast.in_flight_bytes(), 2 << 20);
        assert!(knee(1.0, 14_000.0).in_flight_bytes() >= 14 << 20);
    }

    #[test]
    fn fewer_bytes_in_flight_within_the_tolerance_win() {
        let table = [uring(1024, 32, 1000.0), uring(1024, 8, 965.0), uring(1024, 4, 950.0)];
        assert_eq!(find_knee(&table, 0.04), Some(table[1]));
        assert_eq!(find_knee(&table, 0.06), Some(table[2]));
        assert_eq!(find_knee(&table, 0.0), Some(table[0]));
    }

    #[test]
    fn equals_are_told_apart_by_processor_time() {
        let mut table = [uring(512, 8, 1000.0), uring(1024, 4, 990.0), at(BenchEngine::Pread, 1024, 4, 995.0)];
        table[1].cpu_seconds_per_gb = 0.05;
        assert_eq!(find_knee(&table, TOLERANCE), Some(table[1]));
        table[2].cpu_seconds_per_gb = 0.01;
        assert_eq!(find_knee(&table, TOLERANCE), Some(table[2]));
    }

    #[test]
    fn settings_that_suit_no_model_are_taken_only_alone() {
        let table = [uring(4096, 1, 1000.0), uring(128, 64, 1000.0), uring(1024, 16, 900.0), uring(256, 4, 300.0)];
        assert_eq!(find_knee(&table, TOLERANCE), Some(table[2]));
        assert_eq!(find_knee(&table[..2], TOLERANCE), Some(table[0]));
        assert_eq!(find_knee(&[], TOLERANCE), None);
        assert_eq!(find_knee(&[uring(1024, 4, 0.0)], TOLERANCE), None);
    }
}
