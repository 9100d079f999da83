//! `sluice bench decode --sequences N`: how fast tokens are generated when many sequences decode together.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;
use sluice_converter::synth::token_stream;
use sluice_format::{ExtentKind, ModelFile};
use sluice_kernels::{Kernels, ThreadPool, WeightType};
use sluice_lab::estimate::StepWork;
use sluice_lab::schedule::Cores;
use sluice_model::memory::Bytes;
use sluice_model::{Control, Engine, EngineOptions, RuntimeError, Sequence, Span, Want};
use sluice_storage::io::bench::median;

use super::bench_decode::{Args, Drive, bytes_read};
use super::bench_kernels::{Bench, TAME};
use super::bench_machine::{beside, drive_to_read, threads_beside_reads};
use crate::error::CliError;
use crate::profile::lossy;
use crate::progress::step_bar;
use crate::terminal::{counted, print, print_json};

/// Bytes that are read to measure the memory: more than the caches hold.
const MEMORY_BYTES: usize = 256 << 20;
/// Rows of the products that measure the arithmetic.
const GEMM_ROWS: usize = 64;

/// The result of one run. Rates are per second, for all sequences together.
#[derive(Debug, Serialize)]
struct Outcome {
    sequences: usize,
    budget: Option<u64>,
    memory_used: u64,
    slots: usize,
    experts: usize,
    steps: usize,
    tokens_per_second: f64,
    milliseconds_per_step: f64,
    bytes_per_step: f64,
    bytes_per_token: f64,
    /// How experts were chosen otherwise than by the model's routers, in words.
    lossy: Option<String>,
    /// Distinct experts that a step uses, over all layers.
    union_of_experts: f64,
    hit_rate: f64,
    bounds: Bounds,
    /// Time of a step ÷ the largest of the bounds.
    time_over_bound: f64,
}

/// Lower bounds for the time of a step, in milliseconds. The rates of memory and arithmetic are measured on this machine at about
/// the same time.
#[derive(Debug, Serialize)]
pub(super) struct Bounds {
    drive_bytes_per_second: f64,
    memory_bytes_per_second: f64,
    operations_per_second: f64,
    drive: f64,
    memory: f64,
    arithmetic: f64,
}

impl Bounds {
    /// The bounds of a step that reads `bytes` from a drive of `bytes_per_second` and does `work`. The engine gives its memory back
    /// first: the measurement of the machine needs memory too, and together they would exceed the budget.
    pub(super) fn of(
        engine: &mut Engine,
        bytes: f64,
        bytes_per_second: f64,
        work: &StepWork,
    ) -> Result<Self, CliError> {
        engine.release_idle();
        let (memory, arithmetic) = machine(engine.file(), engine.threads())?;
        Ok(Bounds {
            drive_bytes_per_second: bytes_per_second,
            memory_bytes_per_second: memory,
            operations_per_second: arithmetic,
            drive: 1e3 * bytes / bytes_per_second,
            memory: 1e3 * work.touched_bytes / memory,
            arithmetic: 1e3 * work.operations / arithmetic,
        })
    }

    /// For people, beginning with the drive.
    pub(super) fn describe(&self) -> String {
        let rate = |r: f64| format!("{}/s", Bytes(r as u64));
        format!(
            "drive {:.1} ms ({}), memory {:.1} ms ({}), arithmetic {:.1} ms ({:.0} GOP/s)",
            self.drive,
            rate(self.drive_bytes_per_second),
            self.memory,
            rate(self.memory_bytes_per_second),
            self.arithmetic,
            self.operations_per_second / 1e9,
        )
    }

    pub(super) fn largest(&self) -> f64 {
        self.drive.max(self.memory).max(self.arithmetic)
    }
}

/// Sequences that decode together, each a stream with its own topics.
pub(super) struct Batch {
    pub(super) engine: Engine,
    sequences: Vec<Sequence>,
    streams: Vec<Vec<u32>>,
    /// A step reads the streams from the beginning, instead of their next tokens.
    pub(super) prompts: bool,
}

impl Batch {
    /// `tokens`: those of each of `count` sequences.
    pub(super) fn open(file: &Path, options: EngineOptions, count: usize, tokens: usize) -> Result<Self, CliError> {
        let engine = Engine::open(file, &EngineOptions { sequences: Some(count), ..options })?;
        engine.wait_for_dense()?;
        let vocab = engine.spec().vocab_size;
        let streams = (0..count as u64).map(|seed| token_stream(seed, tokens, vocab)).collect();
        Ok(Batch { sequences: (0..count).map(|_| engine.new_sequence()).collect(), engine, streams, prompts: false })
    }

    /// Decodes one token of every sequence, or reads all of them anew.
    pub(super) fn step(&mut self) -> Result<(), RuntimeError> {
        let mut spans = Vec::with_capacity(self.sequences.len());
        for (sequence, stream) in self.sequences.iter_mut().zip(&self.streams) {
            spans.push(if self.prompts {
                sequence.clear();
                Span::prompt(sequence, stream, Want::Last)
            } else {
                let token = &stream[sequence.position()];
                Span::decode(sequence, token)
            });
        }
        self.engine.step(&mut spans, &mut Control::default(), &mut |_, _, _| ())
    }
}

/// Measures and prints; `total`: tokens of each sequence, including warm-up.
pub(crate) fn run(args: &Args, count: usize, total: usize) -> Result<(), CliError> {
    let budgets = args.all_budgets();
    let outcomes = budgets.into_iter().map(|budget| measure(args, budget, count, total));
    let outcomes = outcomes.collect::<Result<Vec<_>, _>>()?;
    if args.json { print_json(&outcomes) } else { print(&outcomes.iter().map(describe).collect::<String>()) }
}

fn measure(args: &Args, budget: Option<u64>, count: usize, total: usize) -> Result<Outcome, CliError> {
    let options = EngineOptions { budget, ..args.options(total)? };
    let mut batch = Batch::open(&args.file, options, count, total)?;
    let bar = step_bar("decoding", total as u64);
    let mut drive = Drive::open(&args.file, batch.engine.io_config())?;
    for _ in 0..args.warm_up {
        batch.step()?;
        bar.inc(1);
    }
    let before = batch.engine.stats();
    let mut seconds = 0.0;
    drive.visit()?;
    for step in 0..args.n {
        let started = Instant::now();
        batch.step()?;
        seconds += started.elapsed().as_secs_f64();
        bar.inc(1);
        if (step + 1) % args.n.div_ceil(4) == 0 {
            drive.visit()?;
        }
    }
    bar.finish_and_clear();
    let after = batch.engine.stats();
    let steps = args.n as f64;
    let uses = (after.hits + after.misses - before.hits - before.misses) as f64;
    let bytes = bytes_read(&before, &after) / steps;
    let work = StepWork::of(
        batch.engine.file(),
        count,
        uses / steps,
        (total as f64 + args.warm_up as f64) / 2.0,
        batch.engine.memory().kv_type,
    );
    let bounds = Bounds::of(&mut batch.engine, bytes, drive.median(), &work)?;
    let step = 1e3 * seconds / steps;
    Ok(Outcome {
        sequences: count,
        budget,
        memory_used: batch.engine.memory().used(),
        slots: batch.engine.memory().slots,
        experts: batch.engine.memory().experts,
        steps: args.n,
        tokens_per_second: steps * count as f64 / seconds,
        milliseconds_per_step: step,
        bytes_per_step: bytes,
        bytes_per_token: bytes / count as f64,
        lossy: lossy(&batch.engine),
        union_of_experts: uses / steps,
        hit_rate: (after.hits - before.hits) as f64 / uses.max(1.0),
        time_over_bound: step / bounds.largest(),
        bounds,
    })
}

/// Bytes per second of the memory, and operations per second with weights of the experts' type (or, without experts, the head's).
pub(crate) fn machine(file: &ModelFile, threads: usize) -> Result<(f64, f64), CliError> {
    let kernels = Kernels::detect().map_err(RuntimeError::from)?;
    let data = vec![TAME; MEMORY_BYTES];
    let bench = Bench { kernels, pool: ThreadPool::new(threads), data: &data };
    let ty = largest_type(file, &[ExtentKind::Expert]).or_else(|| largest_type(file, &[ExtentKind::Head]));
    let ty = ty.unwrap_or(WeightType::Bf16);
    let rates: Vec<_> = (0..3).map(|_| bench.gemm(ty, GEMM_ROWS)).collect();
    Ok((bench.read_rate(), 1e9 * median(&rates)))
}

/// The type of the largest tensor of these kinds.
pub(crate) fn largest_type(file: &ModelFile, kinds: &[ExtentKind]) -> Option<WeightType> {
    let largest = file.tensors().iter().filter(|t| kinds.contains(&t.kind)).max_by_key(|t| t.len);
    largest.map(|tensor| tensor.weight_type)
}

/// Bytes of memory that can be written for the first time in a second.
pub(crate) fn fresh_memory() -> f64 {
    let started = Instant::now();
    let data = vec![TAME; MEMORY_BYTES];
    std::hint::black_box(&data);
    MEMORY_BYTES as f64 / started.elapsed().as_secs_f64().max(1e-9)
}

/// What so many threads do with the weights of a model, where memory gives so many bytes per second: what `sluice bench machine` measures of
/// all types, of those of this model. It is read meanwhile, if it can be.
pub(crate) fn cores(file: &ModelFile, threads: usize, memory: f64) -> Result<Cores, CliError> {
    let kernels = Kernels::detect().map_err(RuntimeError::from)?;
    let data = vec![TAME; MEMORY_BYTES];
    let bench = Bench { kernels, pool: ThreadPool::new(threads), data: &data };
    let (threads, fewer) = (bench.pool.threads(), threads_beside_reads(bench.pool.threads()));
    let fewer = (fewer < threads).then(|| Bench { kernels, pool: ThreadPool::new(fewer), data: &data });
    let dense = largest_type(file, &[ExtentKind::Attention, ExtentKind::Head]).unwrap_or(WeightType::Bf16);
    let experts = largest_type(file, &[ExtentKind::Expert]).unwrap_or(dense);
    let types = if dense == experts { vec![experts] } else { vec![experts, dense] };
    let rates: Vec<f64> = types.iter().map(|&ty| bench.product_rate(ty)).collect();
    let measured =
        drive_to_read(file.path()).and_then(|mut drive| beside(&bench, fewer.as_ref(), &types, &mut drive).ok());
    let (beside, reads) = match measured {
        Some((rates, reads)) => (rates, Some(reads)),
        None => (types.iter().map(|&ty| fewer.as_ref().unwrap_or(&bench).product_rate(ty)).collect(), None),
    };
    // That of the dense parts, which can be that of the experts too.
    let last = types.len() - 1;
    Ok(Cores {
        experts: rates[0],
        experts_beside_reads: beside[0].min(rates[0]),
        dense: rates[last],
        dense_beside_reads: beside[last].min(rates[last]),
        reads_beside: reads.map_or(1.0, |reads| reads.part()),
        burst_latency: reads.map(|reads| reads.latency),
        keys: memory,
        operations: Some(1e9 * bench.gemm(WeightType::F32, GEMM_ROWS)),
        verification: Some(fewer.as_ref().unwrap_or(&bench).verify_rate()),
        section_seconds: bench.section(),
    })
}

fn describe(o: &Outcome) -> String {
    let budget = o.budget.map_or("as much as is useful".into(), |b| Bytes(b).to_string());
    let lossy = o.lossy.as_ref().map(|lossy| format!("  lossy: {lossy}\n")).unwrap_or_default();
    let (fit, used) = match o.experts {
        0 => (String::new(), String::new()),
        all => {
            let (union, found) = (o.union_of_experts, 100.0 * o.hit_rate);
            let used = format!("a step uses {union:.0} different experts, {found:.1} % of them in memory\n  ");
            (format!(", {} of {all} experts fit", o.slots), used)
        }
    };
    format!(
        "budget {budget}: {} in use{fit}; {}\n  \
         {:.2} tokens/s in all; a step takes {:.1} ms and reads {}, {} per token\n  \
         {used}bounds of a step: {}; the step takes {:.2} times the largest\n{lossy}",
        Bytes(o.memory_used),
        counted(o.sequences, "sequence"),
        o.tokens_per_second,
        o.milliseconds_per_step,
        Bytes(o.bytes_per_step as u64),
        Bytes(o.bytes_per_token as u64),
        o.bounds.describe(),
        o.time_over_bound,
    )
}
