//! The order of visits: every point several times, engines in turns, within a bounded time.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::super::{IoConfig, IoError};
use super::knee::{TOLERANCE, is_eligible};
use super::{BenchEngine, BenchError, DiskBench, Knee, Pattern, Point, Proof, Visit, find_knee};

/// Blocks of the sweep, in bytes.
pub const BLOCKS: [usize; 6] = [128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20];
/// Depths of the sweep.
pub const DEPTHS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];

/// Points of the sweep have at most this many bytes in flight: more only makes urgent reads wait.
const IN_FLIGHT_BYTES_MAX: usize = 32 << 20;

/// Blocks and depths at which sequential reads are measured; they only show that they are not slower.
const SEQUENTIAL_BLOCKS: [usize; 2] = [256 << 10, 1 << 20];
const SEQUENTIAL_DEPTHS: [usize; 3] = [1, 8, 32];

/// Every point is visited this often, if time allows; one point alone is visited `ROUNDS_MOST` times.
const ROUNDS_LEAST: u32 = 3;
const ROUNDS_MOST: u32 = 15;
/// Preferred length of a visit.
const VISIT_GOOD: Duration = Duration::from_millis(60);
/// Shortest visit.
const VISIT_LEAST: Duration = Duration::from_millis(15);

/// Part of the time for visiting the best points again before one of them becomes the knee.
const FINAL_PART: f64 = 0.35;
/// Points that are this close to the best one are visited again, at most this many for each engine.
const FINAL_TOLERANCE: f64 = 1.5 * TOLERANCE;
const FINALISTS: usize = 4;

/// What to measure.
#[derive(Clone, Debug)]
pub struct SweepOptions {
    /// Which code reads; several are measured in turns.
    pub engines: Vec<BenchEngine>,
    /// In which order.
    pub patterns: Vec<Pattern>,
    /// Bytes per read; empty: 128 KiB to 4 MiB.
    pub blocks: Vec<usize>,
    /// Reads in flight; empty: 1 to 64.
    pub depths: Vec<usize>,
    /// Time for the whole sweep. It is exceeded at most by the reads in flight when it ends.
    pub time: Duration,
}

impl SweepOptions {
    /// True if blocks and depths are the default ones: only such a sweep finds a knee worth keeping.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.blocks.is_empty() && self.depths.is_empty() && self.patterns.contains(&Pattern::Random)
    }

    /// Checks blocks and depths.
    ///
    /// # Errors
    /// [`IoError::Config`] names the first that is not possible.
    pub fn validate(&self) -> Result<(), IoError> {
        // Not by the points: values that are too large may have none.
        let usual = IoConfig { prefetch_depth: 1, ..IoConfig::default() };
        let block = |&chunk_bytes: &usize| IoConfig { chunk_bytes, ..usual.clone() }.validate();
        let depth = |&depth: &usize| IoConfig { depth, ..usual.clone() }.validate();
        self.blocks.iter().try_for_each(block).and_then(|()| self.depths.iter().try_for_each(depth))
    }

    fn points(&self) -> Vec<Point> {
        let full = self.is_full();
        let or = |given: &[usize], default: &[usize]| if given.is_empty() { default.to_vec() } else { given.to_vec() };
        let mut points = Vec::new();
        for &pattern in &self.patterns {
            let short = full && pattern == Pattern::Sequential;
            let blocks = or(&self.blocks, if short { &SEQUENTIAL_BLOCKS } else { &BLOCKS });
            let depths = or(&self.depths, if short { &SEQUENTIAL_DEPTHS } else { &DEPTHS });
            for &block_bytes in &blocks {
                for &depth in &depths {
                    let of = |&engine: &BenchEngine| Point { engine, pattern, block_bytes, depth };
                    let fits = block_bytes.saturating_mul(depth) <= IN_FLIGHT_BYTES_MAX;
                    if fits || !self.blocks.is_empty() && !self.depths.is_empty() {
                        points.extend(self.engines.iter().map(of));
                    }
                }
            }
        }
        points
    }
}

/// The results of the visits to one point.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// The point.
    #[serde(flatten)]
    pub point: Point,
    /// Bandwidth of each visit, in bytes per second.
    pub rates: Vec<f64>,
    /// Median of those.
    pub bytes_per_second: f64,
    /// All bytes over all time.
    pub mean_bytes_per_second: f64,
    /// Processor seconds of this process for 10⁹ bytes.
    pub cpu_seconds_per_gb: f64,
    #[serde(skip)]
    totals: (u64, Duration, Duration),
}

impl Measured {
    fn new(point: Point) -> Self {
        Self {
            point,
            rates: Vec::new(),
            bytes_per_second: 0.0,
            mean_bytes_per_second: 0.0,
            cpu_seconds_per_gb: 0.0,
            totals: Default::default(),
        }
    }

    fn add(&mut self, visit: &Visit) {
        self.rates.push(visit.bytes as f64 / visit.elapsed.as_secs_f64().max(1e-9));
        self.bytes_per_second = median(&self.rates);
        let (bytes, elapsed, cpu) = &mut self.totals;
        *bytes += visit.bytes;
        *elapsed += visit.elapsed;
        *cpu += visit.cpu;
        self.mean_bytes_per_second = *bytes as f64 / elapsed.as_secs_f64().max(1e-9);
        self.cpu_seconds_per_gb = cpu.as_secs_f64() / (*bytes as f64 / 1e9).max(1e-9);
    }

    fn knee(&self) -> Knee {
        let Self { point, bytes_per_second, cpu_seconds_per_gb, .. } = *self;
        Knee { point, bytes_per_second, cpu_seconds_per_gb }
    }
}

/// The result of a sweep.
#[derive(Clone, Debug, Serialize)]
pub struct Sweep {
    /// Every point, in the order of patterns, blocks, depths and engines.
    pub points: Vec<Measured>,
    /// The best random points of a full sweep, visited again. The knee is one of these.
    pub finalists: Vec<Measured>,
    /// The knee of random reads.
    pub knee: Option<Knee>,
    /// Evidence that the drive delivered the bytes.
    pub proof: Proof,
}

impl Sweep {
    /// Seconds between the submission of a read and its first byte, where nothing else is in flight: what a single read of the knee's block
    /// takes beyond its share of the bandwidth. `None` if single reads were not measured.
    #[must_use]
    pub fn latency(&self) -> Option<f64> {
        let Knee { point, bytes_per_second, .. } = self.knee?;
        let single = self.points.iter().find(|m| m.point == Point { depth: 1, ..point } && !m.rates.is_empty())?;
        let block = point.block_bytes as f64;
        let latency = block / single.bytes_per_second - block / bytes_per_second;
        Some(latency.max(0.0)).filter(|latency| latency.is_finite() && *latency < 1.0)
    }
}

/// Measures. `progress` hears the part of the time that has passed, 0 to 1.
///
/// # Errors
/// As [`SweepOptions::validate`], [`DiskBench::check`], [`DiskBench::visit`] and [`DiskBench::proof`].
pub fn sweep(
    bench: &mut DiskBench,
    options: &SweepOptions,
    progress: &mut dyn FnMut(f64),
) -> Result<Sweep, BenchError> {
    options.validate()?;
    let start = Instant::now();
    let mut tick = || progress((start.elapsed().as_secs_f64() / options.time.as_secs_f64().max(1e-9)).min(1.0));
    let mut points: Vec<_> = options.points().into_iter().map(Measured::new).collect();
    // In a short time, the last points may not be visited; that must not decide whether there is an error.
    if let Some(largest) = points.iter().map(|m| m.point.block_bytes).max() {
        bench.blocks(largest)?;
    }
    points.iter().try_for_each(|m| bench.reserve(&m.point))?;
    bench.check()?;
    let first = if options.is_full() { options.time.mul_f64(1.0 - FINAL_PART) } else { options.time };
    visit_all(bench, &mut points, start + first, &mut tick)?;
    let mut finalists = if options.is_full() { finalists(&points) } else { Vec::new() };
    visit_all(bench, &mut finalists, start + options.time, &mut tick)?;
    let knee = find_knee(&random(&finalists), TOLERANCE).or_else(|| find_knee(&random(&points), TOLERANCE));
    Ok(Sweep { knee, proof: bench.proof()?, points, finalists })
}

/// Random points that have been visited.
fn random(measured: &[Measured]) -> Vec<Knee> {
    let visited = measured.iter().filter(|m| m.point.pattern == Pattern::Random && !m.rates.is_empty());
    visited.map(Measured::knee).collect()
}

/// Points to be visited again: the best of each engine, and those near it that have the fewest bytes in flight.
fn finalists(points: &[Measured]) -> Vec<Measured> {
    let mut good = random(points);
    good.retain(|k| is_eligible(&k.point));
    let best = good.iter().map(|k| k.bytes_per_second).fold(0.0, f64::max);
    good.retain(|k| k.bytes_per_second >= best * (1.0 - FINAL_TOLERANCE));
    good.sort_by_key(|k| k.point.in_flight_bytes());
    let mut chosen: Vec<Point> = Vec::new();
    let engines: Vec<_> = points.iter().map(|m| m.point.engine).collect();
    for engine in [BenchEngine::Uring, BenchEngine::UringPlain, BenchEngine::Pread] {
        let own = || good.iter().filter(|k| k.point.engine == engine);
        let fastest = own().max_by(|a, b| a.bytes_per_second.total_cmp(&b.bytes_per_second));
        for knee in fastest.into_iter().chain(own()).take(FINALISTS) {
            // The other engines are measured at the same setting, so that the winner has won against them.
            let rivals = engines.iter().map(|&engine| Point { engine, ..knee.point });
            for point in rivals {
                if !chosen.contains(&point) {
                    chosen.push(point);
                }
            }
        }
    }
    chosen.into_iter().map(Measured::new).collect()
}

/// Visits all points in rounds until `end`; every second round runs backwards, so that no point always comes first.
fn visit_all(
    bench: &mut DiskBench,
    points: &mut [Measured],
    end: Instant,
    tick: &mut dyn FnMut(),
) -> Result<(), BenchError> {
    let count = u32::try_from(points.len()).unwrap_or(u32::MAX).max(1);
    let time = end.saturating_duration_since(Instant::now());
    let rounds = (time.as_secs_f64() / VISIT_GOOD.as_secs_f64() / f64::from(count)) as u32;
    let rounds = rounds.clamp(ROUNDS_LEAST, ROUNDS_MOST);
    let mut left = rounds.saturating_mul(count);
    // The time that a visit takes beyond its window: to set up the engine, and to wait for the last reads.
    let mut overhead = Duration::ZERO;
    for round in 0..rounds {
        for at in 0..points.len() {
            let at = if round % 2 == 0 { at } else { points.len() - 1 - at };
            let begin = Instant::now();
            let remaining = end.saturating_duration_since(begin);
            if remaining.is_zero() && (round, at) != (0, 0) {
                return Ok(());
            }
            let window = (remaining / left.max(1)).saturating_sub(overhead).max(VISIT_LEAST);
            points[at].add(&bench.visit(&points[at].point, window)?);
            overhead = (overhead * 7 + begin.elapsed().saturating_sub(window)) / 8;
            left -= 1;
            tick();
        }
    }
    Ok(())
}

/// The middle value, or the mean of the two middle ones; 0 for none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(blocks: &[usize], depths: &[usize]) -> SweepOptions {
        SweepOptions {
            engines: vec![BenchEngine::Uring, BenchEngine::Pread],
            patterns: vec![Pattern::Random, Pattern::Sequential],
            blocks: blocks.to_vec(),
            depths: depths.to_vec(),
            time: Duration::from_secs(1),
        }
    }

    #[test]
    fn what_is_given_is_what_is_measured() {
        let full = options(&[], &[]);
        assert!(full.is_full());
        let points = full.points();
        assert!(points.iter().all(|p| p.in_flight_bytes() <= IN_FLIGHT_BYTES_MAX));
        assert!(points.iter().any(|p| p.pattern == Pattern::Sequential));
        let one = options(&[4 << 20], &[128]);
        assert!(!one.is_full());
        assert_eq!(one.points().len(), 4);
        assert!(options(&[4 << 20], &[]).points().iter().all(|p| p.depth <= 8));
    }

    #[test]
    fn what_cannot_be_measured_is_refused_even_where_nothing_would_be() {
        let largest = options(&[16 << 20], &[]);
        assert!(largest.validate().is_ok() && !largest.points().is_empty());
        for blocks in [&[64 << 20][..], &[1 << 20, 64 << 20], &[0], &[1000]] {
            assert!(matches!(options(blocks, &[]).validate(), Err(IoError::Config { .. })), "{blocks:?}");
        }
        assert!(options(&[], &[1000]).validate().is_err());
    }

    #[test]
    fn finalists_meet_at_the_same_settings() {
        let mut points: Vec<_> = options(&[], &[]).points().into_iter().map(Measured::new).collect();
        for m in &mut points {
            let rate = m.point.in_flight_bytes().min(8 << 20) as u64;
            m.add(&Visit { bytes: rate, elapsed: Duration::from_secs(1), cpu: Duration::ZERO });
        }
        let chosen = finalists(&points);
        assert!(!chosen.is_empty() && chosen.len() <= 2 * 2 * FINALISTS);
        for m in &chosen {
            assert!(m.point.in_flight_bytes() >= 8 << 20 && m.rates.is_empty(), "{:?}", m.point);
            for engine in [BenchEngine::Uring, BenchEngine::Pread] {
                assert!(chosen.iter().any(|other| other.point == Point { engine, ..m.point }));
            }
        }
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
