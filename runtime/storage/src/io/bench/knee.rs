//! The knee: the setting at which a drive gives nearly its full bandwidth with the fewest bytes in flight.

use serde::Serialize;

use super::{BenchEngine, Point};

/// Bandwidth that a setting may stay below the best one. Generous, because decoding gains more from little in flight: of 2.65 MB
/// experts, 2 MiB × 2 decoded 1.19 times as many tokens as 1 MiB × 8, which gave a few per cent more in a sweep.
pub const TOLERANCE: f64 = 0.1;

/// Smallest block that becomes a chunk size: with smaller ones, the processor works for the drive instead of the
/// model.
const BLOCK_LEAST: usize = 512 << 10;

/// Largest: experts have 2 MiB and more, and hashing starts with the first chunk of one.
const BLOCK_MOST: usize = 2 << 20;

/// Fewest reads in flight: with one, the drive is idle between the end of a read and the next request.
const DEPTH_LEAST: usize = 2;

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

/// Chooses the engine first: of those within `tolerance` of the best bandwidth, the one that costs the least processor
/// time, which decoding needs. Then it chooses among the engine's settings within `tolerance` of its own best: the one
/// with the fewest bytes in flight, because an urgent read waits for those; among equals the one with the smallest block,
/// because computing starts with the first block. It takes only settings that suit a model, if there are any.
#[must_use]
pub fn find_knee(measured: &[Knee], tolerance: f64) -> Option<Knee> {
    let eligible: Vec<_> = measured.iter().copied().filter(|k| is_eligible(&k.point)).collect();
    let mut candidates = if eligible.is_empty() { measured.to_vec() } else { eligible };
    candidates.retain(|k| k.bytes_per_second > 0.0);
    let best = |of: &[Knee]| of.iter().map(|k| k.bytes_per_second).fold(0.0, f64::max);
    let near = |of: &mut Vec<Knee>| {
        let least = best(of) * (1.0 - tolerance);
        of.retain(|k| k.bytes_per_second >= least);
    };
    let mut fast = candidates.clone();
    near(&mut fast);
    let engine = cheapest_engine(&fast)?;
    candidates.retain(|k| k.point.engine == engine);
    near(&mut candidates);
    candidates.into_iter().min_by_key(|k| (k.point.in_flight_bytes(), k.point.block_bytes))
}

/// The engine with the lowest mean of processor time.
fn cheapest_engine(fast: &[Knee]) -> Option<BenchEngine> {
    let mean = |engine| {
        let own = fast.iter().filter(|k| k.point.engine == engine);
        let (sum, count) = own.fold((0.0, 0.0), |(sum, count), k| (sum + k.cpu_seconds_per_gb, count + 1.0));
        sum / count
    };
    let engines = fast.iter().map(|k| k.point.engine);
    engines.min_by(|&a, &b| f64::total_cmp(&mean(a), &mean(b)))
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
            for depth in [1, 2, 4, 8, 16, 32, 64] {
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
        assert_eq!((slow.block_bytes, slow.depth), (512 << 10, 2));
        assert_eq!((fast.block_bytes, fast.depth), (512 << 10, 4));
        assert!(knee(1.0, 14_000.0).in_flight_bytes() >= 12 << 20);
    }

    #[test]
    fn fewer_bytes_in_flight_within_the_tolerance_win() {
        let table = [uring(1024, 32, 1000.0), uring(1024, 8, 965.0), uring(1024, 4, 950.0)];
        assert_eq!(find_knee(&table, 0.04), Some(table[1]));
        assert_eq!(find_knee(&table, 0.06), Some(table[2]));
        assert_eq!(find_knee(&table, 0.0), Some(table[0]));
    }

    #[test]
    fn among_equals_the_smaller_block_wins() {
        let table = [uring(2048, 4, 1000.0), uring(512, 16, 980.0), uring(1024, 8, 999.0)];
        assert_eq!(find_knee(&table, TOLERANCE), Some(table[1]));
    }

    #[test]
    fn engines_that_are_as_fast_are_told_apart_by_processor_time() {
        let mut table = [
            uring(1024, 4, 950.0),
            uring(1024, 8, 1000.0),
            at(BenchEngine::Pread, 1024, 4, 990.0),
            at(BenchEngine::Pread, 1024, 8, 1010.0),
        ];
        // Noise must not make an engine win that takes processor time from the model.
        table[2].cpu_seconds_per_gb = 0.3;
        table[3].cpu_seconds_per_gb = 0.3;
        assert_eq!(find_knee(&table, TOLERANCE), Some(table[0]));
        table[0].cpu_seconds_per_gb = 0.5;
        table[1].cpu_seconds_per_gb = 0.5;
        assert_eq!(find_knee(&table, TOLERANCE), Some(table[2]));
        // A better drive is worth processor time.
        table[3].bytes_per_second *= 1.3;
        table[3].cpu_seconds_per_gb = 0.9;
        assert_eq!(find_knee(&table, TOLERANCE), Some(table[3]));
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
