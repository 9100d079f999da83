//! `sluice bench kernels`: how fast this machine multiplies.

use std::fmt::Write as _;
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::thread::available_parallelism;
use std::time::Instant;

use serde::Serialize;
use sluice_kernels::{Activations, Kernels, Matrix, Precision, ROW_GROUP, ThreadPool, WeightType, row_group_len};
use sluice_runtime::RuntimeError;
use sluice_runtime::io::bench::median;
use sluice_runtime::memory::Bytes;

use crate::error::CliError;
use crate::size::parse_size;
use crate::terminal::{print, print_json, step_bar};

const EXAMPLES: &str = "\
Every measurement takes turns with reading the same memory without computing anything, and the median counts: on a \
busy machine both suffer alike. SLUICE_ISA (scalar, avx2, avx512, neon) measures other instructions.

Examples:
  sluice bench kernels
  sluice bench kernels --threads 8 --json";

/// Products of weights with one token and with many, by weight type
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Threads, beside one alone [default: one per core]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,

    /// Weights that one product with one token reads; more than the caches hold
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "256MiB")]
    bytes: u64,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Columns of every matrix.
const COLS: usize = 4096;
/// Rows of the matrix that meets many tokens: small enough that memory does not matter.
const GEMM_ROWS: usize = 1024;
const GEMM_TOKENS: [usize; 2] = [64, 512];
/// Measurements of which the median is taken.
const ROUNDS: usize = 9;
const GEMM_ROUNDS: usize = 5;

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
    name: String,
    gemv_gb_per_s: f64,
    /// What plain reading reached between these measurements.
    read_gb_per_s: f64,
    gemm_64_gop_per_s: f64,
    gemm_512_gop_per_s: f64,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let kernels = Kernels::detect().map_err(RuntimeError::from)?;
    let all = args.threads.or_else(|| available_parallelism().ok()).map_or(1, NonZeroUsize::get);
    let bytes = usize::try_from(args.bytes).map_err(|_| CliError::Usage("--bytes is too large".into()))?;
    // A row group of the widest type.
    if bytes < 256 << 10 {
        return Err(CliError::Usage("--bytes must be at least 256KiB".into()));
    }
    // No scale or number among these bytes is NaN or subnormal.
    let mut data = Vec::new();
    data.try_reserve_exact(bytes)
        .map_err(|_| CliError::Failure(format!("the system has no {} of memory: lower --bytes", Bytes(args.bytes))))?;
    data.resize(bytes, 0x2b_u8);
    let counts = if all == 1 { vec![1] } else { vec![1, all] };
    let bar = step_bar("measuring", (counts.len() * WeightType::ALL.len()) as u64);
    let measure = |&threads: &usize| {
        let bench = Bench { kernels, pool: ThreadPool::new(threads), data: &data };
        let types: Vec<_> = WeightType::ALL.map(|ty| (bench.speed(ty), bar.inc(1)).0).into();
        let read_gb_per_s = median(&types.iter().map(|t| t.read_gb_per_s).collect::<Vec<_>>());
        Run { threads, read_gb_per_s, types }
    };
    let report = Report { isa: kernels.isa_name(), runs: counts.iter().map(measure).collect() };
    bar.finish_and_clear();
    if args.json { print_json(&report) } else { print(&describe(&report)) }
}

fn describe(report: &Report) -> String {
    let mut out = String::new();
    for run in &report.runs {
        let Run { threads, read_gb_per_s, types } = run;
        let plural = if *threads == 1 { "" } else { "s" };
        let _ = writeln!(out, "{threads} thread{plural}, {}: plain reading {read_gb_per_s:.1} GB/s", report.isa);
        let _ = writeln!(out, "{:<6} {:>17} {:>18} {:>12}", "type", "1 token", "64 tokens", "512 tokens");
        for t in types {
            let share = 100.0 * t.gemv_gb_per_s / t.read_gb_per_s;
            let _ = writeln!(
                out,
                "{:<6} {:>6.1} GB/s {share:>3.0} % {:>12.0} GOP/s {:>6.0} GOP/s",
                t.name, t.gemv_gb_per_s, t.gemm_64_gop_per_s, t.gemm_512_gop_per_s
            );
        }
        out.push('\n');
    }
    out.truncate(out.trim_end().len());
    out + "\n"
}

struct Bench<'a> {
    kernels: Kernels,
    pool: ThreadPool,
    data: &'a [u8],
}

impl Bench<'_> {
    fn speed(&self, ty: WeightType) -> TypeSpeed {
        let group = row_group_len(ty, COLS).expect("small");
        let groups = self.data.len() / group;
        let weights = &self.data[..groups * group];
        let rows = groups * ROW_GROUP;
        let w = Matrix::new(ty, rows, COLS, weights).expect("cut to fit");
        let mut x = Activations::new(Precision::Int8);
        x.set(&[0.5; COLS], 1, COLS);
        let mut y = vec![0.0; rows];
        let (mut gemv, mut read) = (Vec::new(), Vec::new());
        for round in 0..=ROUNDS {
            let pair = (self.read(weights), seconds(|| self.kernels.matmul(&self.pool, w, &x, &mut y)));
            // The first round fills the caches of addresses and wakes the threads.
            if round > 0 {
                read.push(pair.0);
                gemv.push(pair.1);
            }
        }
        let rate = |seconds: Vec<f64>| weights.len() as f64 / median(&seconds) / 1e9;
        let [gemm_64_gop_per_s, gemm_512_gop_per_s] = GEMM_TOKENS.map(|n| self.gemm(ty, n));
        let (name, gemv_gb_per_s) = (format!("{ty:?}").to_lowercase(), rate(gemv));
        TypeSpeed { name, gemv_gb_per_s, read_gb_per_s: rate(read), gemm_64_gop_per_s, gemm_512_gop_per_s }
    }

    /// Seconds that it takes to look at all bytes.
    fn read(&self, data: &[u8]) -> f64 {
        let part = data.len().div_ceil(self.pool.threads()).next_multiple_of(128);
        seconds(|| {
            self.pool.run(data.len().div_ceil(part), &|i| {
                let mut sums = [0u64; 16];
                for chunk in data[i * part..((i + 1) * part).min(data.len())].as_chunks::<128>().0 {
                    for (sum, word) in sums.iter_mut().zip(chunk.as_chunks::<8>().0) {
                        *sum ^= u64::from_le_bytes(*word);
                    }
                }
                black_box(sums);
            });
        })
    }

    /// Billions of multiplications and additions per second with `n` tokens.
    fn gemm(&self, ty: WeightType, n: usize) -> f64 {
        let group = row_group_len(ty, COLS).expect("small");
        let rows = GEMM_ROWS.min(self.data.len() / group * ROW_GROUP);
        let weights = vec![0x2b; rows / ROW_GROUP * group];
        let w = Matrix::new(ty, rows, COLS, &weights).expect("made to fit");
        let mut x = Activations::new(Precision::Int8);
        x.set(&vec![0.5; n * COLS], n, COLS);
        let mut y = vec![0.0; n * rows];
        let times = (0..GEMM_ROUNDS).map(|_| seconds(|| self.kernels.matmul(&self.pool, w, &x, &mut y)));
        2.0 * (n * rows * COLS) as f64 / median(&times.collect::<Vec<_>>()) / 1e9
    }
}

fn seconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}
