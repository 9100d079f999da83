//! `sluice bench kernels`: how fast this machine multiplies.

use std::fmt::Write as _;
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::thread::available_parallelism;
use std::time::Instant;

use serde::Serialize;
use sluice_checksum::xxh3_64;
use sluice_kernels::{
    Activations, Kernels, Matrix, Precision, READING_STREAMS, ROW_GROUP, ThreadPool, WeightType, row_group_len,
};
use sluice_model::RuntimeError;
use sluice_model::memory::Bytes;
use sluice_storage::io::bench::median;

use crate::error::CliError;
use crate::progress::step_bar;
use crate::size::{parse_count, parse_size};
use crate::terminal::{counted, print, print_json};

const EXAMPLES: &str = "\
Each measurement takes turns with plain reading of the same memory, by the best of several loops, so that a busy machine slows both alike. \
All figures are medians; the share of plain reading is the median of the shares of the single turns. \
SLUICE_ISA (scalar, avx2, avxvnni, avx512, neon, i8mm) measures other instructions. Products that take long are cut to a part of their rows, so that the default takes a few minutes at most.

Examples:
  sluice bench kernels
  sluice bench kernels --types q4,q4_k,q6_k
  sluice bench kernels --threads 8 --json";

/// Products of weights with one token and with many, by weight type
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Number of threads to measure, besides one; at most 1024 are started [default: one per core]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    threads: Option<NonZeroUsize>,

    /// Bytes of weights that one product with one token reads, at least 256KiB; should exceed the caches
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "256MiB")]
    bytes: u64,

    /// Weight types, separated by commas [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    types: Vec<WeightType>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Columns of every matrix.
const COLS: usize = 4096;
/// Rows of the matrix for many tokens: few enough that memory does not matter.
const GEMM_ROWS: usize = 1024;
const GEMM_TOKENS: [usize; 2] = [64, 512];
/// Measurements over which the median is taken.
const ROUNDS: usize = 9;
const GEMM_ROUNDS: usize = 5;
/// Seconds for one product: there are hundreds of them, and scalar code would take ten minutes for all.
const PRODUCT_SECONDS: f64 = 0.08;

#[derive(Serialize)]
struct Report {
    isa: &'static str,
    runs: Vec<Run>,
}

#[derive(Serialize)]
struct Run {
    threads: usize,
    read_gb_per_s: f64,
    types: Vec<TypeSpeed>,
}

#[derive(Serialize)]
struct TypeSpeed {
    #[serde(rename = "type")]
    name: &'static str,
    gemv_gb_per_s: f64,
    /// The rate of plain reading between these measurements.
    read_gb_per_s: f64,
    /// The median of the products' rates, each divided by that of the plain reading before it: the speed of memory changes while a
    /// machine is measured, so this says more than the quotient of two medians.
    share_of_reading: f64,
    gemm_64_gop_per_s: f64,
    gemm_512_gop_per_s: f64,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let kernels = Kernels::detect().map_err(RuntimeError::from)?;
    let all = args.threads.or_else(|| available_parallelism().ok()).map_or(1, NonZeroUsize::get);
    let bytes = usize::try_from(args.bytes).map_err(|_| CliError::Usage("--bytes is too large".into()))?;
    // The size of a row group of the widest type.
    if bytes < 256 << 10 {
        return Err(CliError::Usage("--bytes must be at least 256KiB".into()));
    }
    let mut data = Vec::new();
    data.try_reserve_exact(bytes)
        .map_err(|_| CliError::Failure(format!("the system has no {} of memory: lower --bytes", Bytes(args.bytes))))?;
    data.resize(bytes, TAME);
    let counts = if all == 1 { vec![1] } else { vec![1, all] };
    let asked = if args.types.is_empty() { WeightType::all().collect() } else { args.types.clone() };
    let bar = step_bar("measuring", (counts.len() * asked.len()) as u64);
    let measure = |&threads: &usize| {
        let bench = Bench { kernels, pool: ThreadPool::new(threads), data: &data };
        let types: Vec<_> = asked.iter().map(|&ty| (bench.speed(ty), bar.inc(1)).0).collect();
        let read_gb_per_s = median(&types.iter().map(|t| t.read_gb_per_s).collect::<Vec<_>>());
        // The pool has its own limit, and the system may refuse threads.
        Run { threads: bench.pool.threads(), read_gb_per_s, types }
    };
    let report = Report { isa: kernels.isa_name(), runs: counts.iter().map(measure).collect() };
    bar.finish_and_clear();
    if args.json { print_json(&report) } else { print(&describe(&report)) }
}

fn describe(report: &Report) -> String {
    let mut out = String::new();
    for run in &report.runs {
        let Run { threads, read_gb_per_s, types } = run;
        let threads = counted(*threads, "thread");
        let _ = writeln!(out, "{threads}, {}: plain reading {read_gb_per_s:.1} GB/s", report.isa);
        let width = types.iter().map(|t| t.name.len()).max().unwrap_or(0).max(6);
        let _ = writeln!(out, "{:<width$} {:>17} {:>18} {:>12}", "type", "1 token", "64 tokens", "512 tokens");
        for t in types {
            let share = 100.0 * t.share_of_reading;
            let [gemv, few, many] = [(t.gemv_gb_per_s, 1), (t.gemm_64_gop_per_s, 0), (t.gemm_512_gop_per_s, 0)]
                .map(|(speed, places)| format!("{speed:.*}", if speed < 1.0 { 2 } else { places }));
            let _ = writeln!(out, "{:<width$} {gemv:>6} GB/s {share:>3.0} % {few:>12} GOP/s {many:>6} GOP/s", t.name);
        }
        out.push('\n');
    }
    out.truncate(out.trim_end().len());
    out + "\n"
}

/// Of which the smallest product is.
const SECTION_TYPE: WeightType = WeightType::Q8;
const SECTIONS: usize = 2000;
/// Bytes that are verified together, while a cache still has them: about a pair of row groups. And how often, for a measurement.
const VERIFIED_BYTES: usize = 16 << 10;
const VERIFIED_TIMES: usize = 10_000;

/// Measures products of weights out of `data`.
pub(crate) struct Bench<'a> {
    pub(crate) kernels: Kernels,
    pub(crate) pool: ThreadPool,
    /// More bytes than the caches hold, without NaNs or subnormal numbers.
    pub(crate) data: &'a [u8],
}

/// A byte that is a moderate number or scale in every weight type.
pub(crate) const TAME: u8 = 0x2b;

impl Bench<'_> {
    fn speed(&self, ty: WeightType) -> TypeSpeed {
        let mut product = self.product(ty, self.data, 1);
        let groups = fitting(self.data.len() / product.group, &mut |groups| product.seconds(groups));
        // Always all bytes: a part of them may be in a cache, which does not help products that are so slow.
        let pairs = (0..ROUNDS).map(|_| (self.read(self.data), product.seconds(groups)));
        let (read, gemv): (Vec<_>, Vec<_>) = pairs.unzip();
        // Products read whole row groups.
        let part = (groups * product.group) as f64 / self.data.len() as f64;
        let shares: Vec<_> = read.iter().zip(&gemv).map(|(read, gemv)| part * read / gemv).collect();
        let rate = |bytes: usize, seconds: &[f64]| bytes as f64 / median(seconds) / 1e9;
        let [gemm_64_gop_per_s, gemm_512_gop_per_s] = GEMM_TOKENS.map(|n| self.gemm(ty, n));
        TypeSpeed {
            name: ty.name(),
            gemv_gb_per_s: rate(groups * product.group, &gemv),
            read_gb_per_s: rate(self.data.len(), &read),
            share_of_reading: median(&shares),
            gemm_64_gop_per_s,
            gemm_512_gop_per_s,
        }
    }

    /// Bytes of weights per second in products with one token: the median of some rounds.
    pub(crate) fn product_rate(&self, ty: WeightType) -> f64 {
        let mut product = self.product(ty, self.data, 1);
        let groups = fitting(self.data.len() / product.group, &mut |groups| product.seconds(groups));
        let seconds: Vec<_> = (0..ROUNDS).map(|_| product.seconds(groups)).collect();
        (groups * product.group) as f64 / median(&seconds)
    }

    /// Products of weights in `data` with `n` tokens.
    fn product<'b>(&'b self, ty: WeightType, data: &'b [u8], n: usize) -> Product<'b> {
        let group = row_group_len(ty, COLS).expect("small");
        let mut x = Activations::new(Precision::Int8);
        x.set(&vec![0.5; n * COLS], n, COLS);
        let y = vec![0.0; data.len() / group * ROW_GROUP * n];
        Product { bench: self, ty, group, data, n, x, y }
    }

    /// Bytes per second that can be read: the median of some rounds.
    pub(crate) fn read_rate(&self) -> f64 {
        let seconds: Vec<_> = (0..ROUNDS).map(|_| self.read(self.data)).collect();
        self.data.len() as f64 / median(&seconds)
    }

    /// Seconds for reading all bytes, with the best of several loops.
    fn read(&self, data: &[u8]) -> f64 {
        READING_STREAMS.map(|streams| self.read_by(data, streams)).into_iter().fold(f64::INFINITY, f64::min)
    }

    /// Seconds for reading all bytes, with the loop that alternates between so many places.
    pub(crate) fn read_by(&self, data: &[u8], streams: usize) -> f64 {
        let part = data.len().div_ceil(self.pool.threads()).next_multiple_of(128);
        seconds(|| {
            self.pool.run(data.len().div_ceil(part), &|i| {
                let part = &data[i * part..((i + 1) * part).min(data.len())];
                black_box(self.kernels.look_at(part, streams));
            });
        })
    }

    /// Bytes per second of which all threads together form checksums, piece by piece out of a cache, as products do.
    pub(crate) fn verify_rate(&self) -> f64 {
        let (threads, piece) = (self.pool.threads(), VERIFIED_BYTES.min(self.data.len()));
        let times: Vec<_> = (0..ROUNDS)
            .map(|_| {
                seconds(|| {
                    self.pool.run(threads, &|i| {
                        let from = i * piece % (self.data.len() - piece + 1);
                        for _ in 0..VERIFIED_TIMES {
                            black_box(xxh3_64(black_box(&self.data[from..][..piece])));
                        }
                    });
                })
            })
            .collect();
        (threads * piece * VERIFIED_TIMES) as f64 / median(&times)
    }

    /// Seconds that a product of one token takes however small it is, its input's rounding included: the median of some thousand.
    pub(crate) fn section(&self) -> f64 {
        let group = row_group_len(SECTION_TYPE, COLS).expect("small");
        let groups = (2 * self.pool.threads()).min(self.data.len() / group).max(1);
        let mut product = self.product(SECTION_TYPE, &self.data[..groups * group], 1);
        let input = vec![0.5; COLS];
        let times: Vec<_> = (0..SECTIONS)
            .map(|_| {
                seconds(|| {
                    product.x.set(&input, 1, COLS);
                    product.multiply(groups);
                })
            })
            .collect();
        median(&times)
    }

    /// Billions of multiplications and additions per second with `n` tokens.
    pub(crate) fn gemm(&self, ty: WeightType, n: usize) -> f64 {
        let group = row_group_len(ty, COLS).expect("small");
        let all = (GEMM_ROWS / ROW_GROUP).min(self.data.len() / group);
        let mut product = self.product(ty, &self.data[..all * group], n);
        let groups = fitting(all, &mut |groups| product.seconds(groups));
        let times: Vec<_> = (0..GEMM_ROUNDS).map(|_| product.seconds(groups)).collect();
        2.0 * (n * groups * ROW_GROUP * COLS) as f64 / median(&times) / 1e9
    }
}

/// A product; any part of its rows can be computed.
struct Product<'a> {
    bench: &'a Bench<'a>,
    ty: WeightType,
    /// Bytes of a row group.
    group: usize,
    data: &'a [u8],
    n: usize,
    x: Activations,
    y: Vec<f32>,
}

impl Product<'_> {
    /// Seconds for the first row groups, this many.
    fn seconds(&mut self, groups: usize) -> f64 {
        seconds(|| self.multiply(groups))
    }

    /// The product of the first so many row groups.
    fn multiply(&mut self, groups: usize) {
        let rows = groups * ROW_GROUP;
        let w = Matrix::new(self.ty, rows, COLS, &self.data[..groups * self.group]).expect("cut to fit");
        let y = &mut self.y[..rows * self.n];
        self.bench.kernels.matmul(&self.bench.pool, w, &self.x, y);
    }
}

/// How many row groups to measure, out of `all`: so many that one product takes about [`PRODUCT_SECONDS`]. `seconds` measures that
/// many; this also fills the translation caches and wakes the threads.
fn fitting(all: usize, seconds: &mut dyn FnMut(usize) -> f64) -> usize {
    let mut groups = 1;
    // Twice, because something else may have disturbed the first time.
    let mut is_enough = |groups| (0..2).all(|_| seconds(groups) > PRODUCT_SECONDS / 2.0);
    while groups < all && !is_enough(groups) {
        groups = (2 * groups).min(all);
    }
    groups
}

fn seconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_products_are_measured_in_part() {
        let mut spent = 0.0;
        for (all, group_seconds) in [(64, 0.4), (64, 0.01), (50_000, 1e-4), (50_000, 1e-6), (3, 1e-9), (1, 9.0)] {
            let mut asked = 0;
            let groups = fitting(all, &mut |groups| {
                // The first time is disturbed.
                asked += 1;
                spent += groups as f64 * group_seconds;
                groups as f64 * group_seconds + if asked == 1 { 1.0 } else { 0.0 }
            });
            let seconds = groups as f64 * group_seconds;
            assert!((1..=all).contains(&groups));
            assert!(groups == 1 || seconds <= PRODUCT_SECONDS, "{groups} groups take {seconds} s");
            assert!(groups == all || seconds > PRODUCT_SECONDS / 2.0, "{groups} of {all} groups take {seconds} s");
        }
        assert!(spent < 2.0, "{spent} s");
    }
}
