//! `sluice bench decode`: how fast tokens are generated, and how close that is to what drive and memory allow.

use std::num::NonZeroUsize;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde::Serialize;
use sluice_converter::synth::token_stream;
use sluice_format::ModelFile;
use sluice_model::memory::Bytes;
use sluice_model::{Engine, EngineOptions, Prefetch, ReadEngineKind, Sequence, Stats};
use sluice_storage::io::bench::{BenchEngine, BenchError, DiskBench, Pattern, Point, median};
use sluice_storage::io::sim::DriveSpeed;
use sluice_storage::io::{DirectMode, IoConfig};

use super::bench_reading::{self, OfReading};
use super::{bench_batch, bench_drive};
use crate::engine_args::EngineArgs;
use crate::error::CliError;
use crate::plot::{self, LineChart, Series};
use crate::profile::{lossy, prompt_attention};
use crate::progress::step_bar;
use crate::size::{parse_count, parse_drive, parse_size};
use crate::terminal::{print, print_json};

const EXAMPLES: &str = "\
Decodes a fixed stream of tokens whose topic changes slowly, as text does, and measures the drive before, between and \
after: random direct reads in the chunks and at the depth that the decoder uses. The roof of a token is the larger of \
the time it computes and the time the drive needs for what it reads.

With --drive, experts come from a drive that is only simulated and costs no processor time; then no real drive is measured, \
and the tokens mean nothing, because experts are noise. It shows how well reading and computing overlap, on any machine, and whether compressed experts would come faster.

Examples:
  sluice bench decode r1.sluice --budget 16GiB -n 32
  sluice bench decode r1.sluice --budgets 8GiB,16GiB,32GiB --plot decode.svg
  sluice bench decode r1.sluice --budget 8GiB --compare prefetch --pairs 8
  sluice bench decode r1.sluice --budget 32GiB --sequences 32 -n 16
  sluice bench decode r1.sluice --budget 16GiB --drive 7GB/s,80us
  sluice bench decode r1.sluice --budget 16GiB --drive 7GB/s --prompt 1024 -n 8 --warm-up 1
  sluice bench decode /mnt/a/r1-00001-of-00002.sluice --budget 16GiB --drive 7GB/s --drive 3GB/s
  sluice bench decode bf16.sluice --budget 16GiB --drive 1GB/s --compressed";

/// Measure tokens per second, bytes per token, and achieved against attainable bandwidth
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Model file, its name in the folder of models, or hf:NAME
    pub(crate) file: PathBuf,

    /// Number of tokens to decode and measure, for each budget
    #[arg(short, long, value_name = "N", default_value_t = 64)]
    pub(crate) n: usize,

    /// Number of tokens to decode first, to fill the cache
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) warm_up: usize,

    /// Sequences that decode together, each a stream with its own topics; every step takes one token of each
    #[arg(long, value_name = "N", value_parser = parse_count, conflicts_with_all = ["compare", "plot"])]
    sequences: Option<NonZeroUsize>,

    /// Take experts from a simulated drive of this speed and latency, such as 7GB/s,80us (the latency is 80us if not given); for a striped model,
    /// given once for all volumes, or once for each
    #[arg(long, value_name = "SPEED[,LATENCY]", value_parser = parse_drive, conflicts_with_all = ["compare", "plot", "engine"])]
    drive: Vec<DriveSpeed>,

    /// Instead of decoding, read prompts of so many tokens, -n of them, from the simulated drive; each begins anew, with the experts in memory
    /// that the one before has left
    #[arg(long, value_name = "TOKENS", value_parser = parse_count, requires = "drive")]
    pub(crate) prompt: Option<NonZeroUsize>,

    /// Compress the experts on the simulated drive, whether the file compresses them or not
    #[arg(long, requires = "drive")]
    pub(crate) compressed: bool,

    /// Bytes of one read, instead of what suits the drive: to see what that changes; 1MiB if only --depth is given
    #[arg(long, value_name = "SIZE", value_parser = parse_size, hide_short_help = true)]
    chunk: Option<u64>,

    /// Reads in flight, instead of as many as suit the drive; 4 if only --chunk is given
    #[arg(long, value_name = "N", value_parser = parse_count, hide_short_help = true)]
    depth: Option<NonZeroUsize>,

    /// Several budgets, measured one after the other
    #[arg(long, value_name = "LIST", value_parser = parse_size, value_delimiter = ',', conflicts_with = "budget")]
    budgets: Vec<u64>,

    /// Compare two ways in alternating pairs: the one that is asked for, and the other; only with one budget
    #[arg(long, value_name = "WHAT", conflicts_with_all = ["budgets", "plot"])]
    compare: Option<Compare>,

    /// Pairs to compare
    #[arg(long, value_name = "N", default_value_t = 8, requires = "compare")]
    pairs: usize,

    /// Write a chart of tokens per second over budgets
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

impl Args {
    /// The options of the engine, with the reads that are asked for.
    ///
    /// # Errors
    /// [`CliError::Usage`] for reads that are not possible.
    pub(crate) fn options(&self, tokens: usize) -> Result<EngineOptions, CliError> {
        let usual = IoConfig::default();
        let depth = self.depth.map_or(usual.depth, NonZeroUsize::get);
        let chunk_bytes = self.chunk.map_or(usual.chunk_bytes, |chunk| usize::try_from(chunk).unwrap_or(usize::MAX));
        let asked = IoConfig { chunk_bytes, depth, prefetch_depth: depth, ..usual };
        asked.validate().map_err(|error| CliError::Usage(format!("--chunk and --depth: {error}")))?;
        let io = (self.chunk.is_some() || self.depth.is_some()).then_some(asked);
        Ok(EngineOptions { io, ..self.engine.options(tokens) })
    }

    /// The budgets to measure, in order; `None` means as much as is useful.
    pub(crate) fn all_budgets(&self) -> Vec<Option<u64>> {
        match self.budgets.as_slice() {
            [] => vec![self.engine.budget],
            several => several.iter().map(|b| Some(*b)).collect(),
        }
    }
}

/// The comparisons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Compare {
    /// Reading ahead of the router, or not
    Prefetch,
    /// Verifying checksums, or not
    Checksums,
    /// io_uring, or a pool of threads
    Engine,
}

/// The result of one run. Rates are in bytes per second.
#[derive(Clone, Debug, Serialize)]
struct Outcome {
    budget: Option<u64>,
    memory_used: u64,
    slots: usize,
    experts: usize,
    tokens: u64,
    tokens_per_second: f64,
    bytes_per_token: f64,
    hit_rate: f64,
    prefetched: u64,
    prefetched_used: u64,
    /// How experts were chosen otherwise than by the model's routers, in words.
    lossy: Option<String>,
    /// In which form prompts were read; none: in the usual one.
    prompt_attention: Option<&'static str>,
    /// Experts that were not the routers' own, because those in memory were preferred.
    replaced: u64,
    /// Bytes read ÷ time.
    achieved: f64,
    /// The drive's rate for random direct reads, measured around the decoding: the median.
    attainable: f64,
    achieved_of_attainable: f64,
    /// Milliseconds per token.
    milliseconds: Split,
    /// Token time ÷ the larger of computing and reading, over all tokens.
    time_over_roof: f64,
    /// Tokens whose reading takes at least [`DRIVE_BOUND`] times as long as their computing.
    drive_bound: Regime,
    /// All others.
    balanced: Regime,
    /// Where all of the model stays in memory: what tokens that read nothing reach of plain reading.
    of_reading: Option<OfReading>,
}

/// Reading must take this many times as long as computing for a token to count as limited by the drive.
const DRIVE_BOUND: f64 = 1.5;

/// Tokens that are limited by the same thing. Misses come in bursts, so one run has both kinds.
#[derive(Clone, Copy, Debug, Serialize)]
struct Regime {
    tokens: usize,
    /// For all of their time together.
    achieved_of_attainable: Option<f64>,
    /// Their time ÷ the sum over tokens of the larger of computing and reading.
    time_over_roof: Option<f64>,
}

/// One decoded token.
#[derive(Clone, Copy, Debug)]
struct Token {
    seconds: f64,
    waited: f64,
    bytes: f64,
    /// Whether experts were read.
    missed: bool,
}

impl Regime {
    fn of<'a>(tokens: impl Iterator<Item = &'a Token>, attainable: f64) -> Self {
        let (mut count, mut seconds, mut reading, mut roof) = (0, 0.0, 0.0, 0.0);
        for token in tokens {
            count += 1;
            seconds += token.seconds;
            reading += token.reading(attainable);
            roof += token.roof(attainable);
        }
        let ratio = |a: f64, b: f64| (count > 0).then_some(a / b);
        Regime { tokens: count, achieved_of_attainable: ratio(reading, seconds), time_over_roof: ratio(seconds, roof) }
    }
}

impl Token {
    fn computing(&self) -> f64 {
        self.seconds - self.waited
    }

    fn reading(&self, attainable: f64) -> f64 {
        self.bytes / attainable
    }

    fn roof(&self, attainable: f64) -> f64 {
        self.computing().max(self.reading(attainable))
    }

    fn is_drive_bound(&self, attainable: f64) -> bool {
        self.reading(attainable) >= DRIVE_BOUND * self.computing()
    }
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Split {
    total: f64,
    io_wait: f64,
    attention: f64,
    experts: f64,
    head: f64,
    other: f64,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    plot::check_target(args.plot.as_deref(), &args.file)?;
    if args.n == 0 || args.pairs == 0 {
        return Err(CliError::Usage("-n and --pairs must be at least 1".into()));
    }
    refuse_one_sided(args)?;
    let total = total_tokens(args)?;
    args.engine.say_what_is_lossy();
    if let Some(what) = args.compare {
        return compare(args, what, total);
    }
    if !args.drive.is_empty() {
        return bench_drive::run(args, &args.drive, args.sequences.map_or(1, NonZeroUsize::get), total);
    }
    if let Some(sequences) = args.sequences {
        return bench_batch::run(args, sequences.get(), total);
    }
    let budgets = args.all_budgets();
    let mut outcomes = Vec::with_capacity(budgets.len());
    for budget in budgets {
        outcomes.push(measure(args, budget, total)?);
    }
    if let Some(path) = &args.plot {
        chart(&outcomes).write(path)?;
    }
    if args.json { print_json(&outcomes) } else { print(&table(&outcomes)) }
}

/// Refuses options that select one of the two ways, because both are measured.
fn refuse_one_sided(args: &Args) -> Result<(), CliError> {
    let option = match args.compare {
        Some(Compare::Prefetch) if args.engine.no_prefetch => "--no-prefetch",
        Some(Compare::Engine) if args.engine.engine.is_some() => "--engine",
        _ => return Ok(()),
    };
    Err(CliError::Usage(format!("--compare measures with and without what {option} chooses: leave {option} out")))
}

/// A model that decodes a stream of tokens.
struct Decoder {
    engine: Engine,
    sequence: Sequence,
    stream: Vec<u32>,
    logits: Vec<f32>,
}

impl Decoder {
    fn open(file: &Path, options: &EngineOptions, tokens: usize) -> Result<Self, CliError> {
        let engine = Engine::open(file, &EngineOptions { context: Some(tokens), ..options.clone() })?;
        // The drive is measured, and nothing else may use it then.
        engine.wait_for_dense()?;
        let stream = token_stream(0, tokens, engine.spec().vocab_size);
        Ok(Decoder { sequence: engine.new_sequence(), engine, stream, logits: Vec::new() })
    }

    /// Decodes the next `n` tokens of the stream, and returns the time.
    fn decode(&mut self, n: usize, each: &dyn Fn()) -> Result<Duration, CliError> {
        let started = Instant::now();
        for _ in 0..n {
            let token = self.stream[self.sequence.position() % self.stream.len()];
            self.engine.decode(&mut self.sequence, token, &mut self.logits)?;
            each();
        }
        Ok(started.elapsed())
    }

    /// Decodes the next `n` tokens of the stream, and records the time and bytes of each; `each` hears of it.
    fn observe(&mut self, n: usize, tokens: &mut Vec<Token>, each: &mut dyn FnMut(&Token)) -> Result<(), CliError> {
        let mut before = self.engine.stats();
        for _ in 0..n {
            let elapsed = self.decode(1, &|| ())?;
            let after = self.engine.stats();
            let token = Token {
                seconds: elapsed.as_secs_f64(),
                waited: after.io_wait_seconds - before.io_wait_seconds,
                bytes: bytes_read(&before, &after),
                missed: after.expert_bytes_read > before.expert_bytes_read,
            };
            each(&token);
            tokens.push(token);
            before = after;
        }
        Ok(())
    }
}

/// Tokens that go through one sequence, including warm-up, limited by what the model can take.
fn total_tokens(args: &Args) -> Result<usize, CliError> {
    let most = ModelFile::open(&args.file)?.spec().max_positions;
    if let Some(prompt) = args.prompt {
        let too_long = || CliError::Usage(format!("the model takes at most {most} tokens: lower --prompt"));
        return if prompt.get() <= most { Ok(prompt.get()) } else { Err(too_long()) };
    }
    let measured = match (args.compare, args.drive.first()) {
        (Some(_), _) => args.n.checked_mul(args.pairs),
        // As many again, without waiting for the drive.
        (None, Some(_)) => args.n.checked_mul(2),
        (None, None) => Some(args.n),
    };
    let total = measured.and_then(|n| n.checked_add(args.warm_up)).filter(|total| *total <= most);
    total.ok_or_else(|| {
        CliError::Usage(format!(
            "the model takes at most {most} tokens, warm-up included: lower -n, --warm-up or --pairs"
        ))
    })
}

fn measure(args: &Args, budget: Option<u64>, total: usize) -> Result<Outcome, CliError> {
    let options = EngineOptions { budget, ..args.options(total)? };
    let mut decoder = Decoder::open(&args.file, &options, total)?;
    let bar = step_bar("decoding", total as u64);
    let mut drive = Drive::open(&args.file, decoder.engine.io_config())?;
    decoder.decode(args.warm_up, &|| bar.inc(1))?;
    let memory = bench_reading::Memory::beside(&decoder.engine, (total + args.warm_up) as f64 / 2.0)?;
    let mut reading = memory.as_ref().map(bench_reading::Memory::turns);
    // The drive's speed changes within seconds on shared machines, so it is measured before, between and after.
    let parts = args.n.min(4);
    let before = decoder.engine.stats();
    let mut tokens = Vec::with_capacity(args.n);
    drive.visit()?;
    for part in 0..parts {
        let n = args.n * (part + 1) / parts - args.n * part / parts;
        decoder.observe(n, &mut tokens, &mut |token| {
            bar.inc(1);
            // A token that reads an expert for the first time is no measure of memory.
            if !token.missed {
                reading.iter_mut().for_each(|reading| reading.after(token.seconds));
            }
        })?;
        drive.visit()?;
    }
    bar.finish_and_clear();
    let of_reading = reading.and_then(|reading| reading.outcome());
    Ok(Outcome { of_reading, ..outcome(&decoder.engine, budget, &before, &tokens, drive.median()) })
}

/// Bytes of weights that were read from the drive.
pub(crate) fn bytes_read(before: &Stats, after: &Stats) -> f64 {
    let expert_bytes = after.expert_bytes_read - before.expert_bytes_read;
    (expert_bytes + after.dense_bytes_read - before.dense_bytes_read) as f64
}

fn outcome(engine: &Engine, budget: Option<u64>, before: &Stats, each: &[Token], attainable: f64) -> Outcome {
    let after = engine.stats();
    let seconds: f64 = each.iter().map(|token| token.seconds).sum();
    let tokens = after.tokens - before.tokens;
    let per_token = |a: f64, b: f64| 1e3 * (a - b) / tokens as f64;
    let (hits, misses) = (after.hits - before.hits, after.misses - before.misses);
    let bytes = bytes_read(before, &after);
    let io_wait = per_token(after.io_wait_seconds, before.io_wait_seconds);
    let total = 1e3 * seconds / tokens as f64;
    let reading = 1e3 * bytes / attainable / tokens as f64;
    let attention = per_token(after.attention_seconds, before.attention_seconds);
    let experts = per_token(after.expert_seconds, before.expert_seconds);
    let head = per_token(after.head_seconds, before.head_seconds);
    Outcome {
        budget,
        memory_used: engine.memory().used(),
        slots: engine.memory().slots,
        experts: engine.memory().experts,
        tokens,
        tokens_per_second: tokens as f64 / seconds,
        bytes_per_token: bytes / tokens as f64,
        hit_rate: hits as f64 / (hits + misses).max(1) as f64,
        prefetched: after.prefetched - before.prefetched,
        prefetched_used: after.prefetched_used - before.prefetched_used,
        lossy: lossy(engine),
        prompt_attention: prompt_attention(engine),
        replaced: after.replaced - before.replaced,
        achieved: bytes / seconds,
        attainable,
        achieved_of_attainable: bytes / seconds / attainable,
        milliseconds: Split {
            total,
            io_wait,
            attention,
            experts,
            head,
            other: total - io_wait - attention - experts - head,
        },
        time_over_roof: total / reading.max(total - io_wait),
        drive_bound: Regime::of(each.iter().filter(|token| token.is_drive_bound(attainable)), attainable),
        balanced: Regime::of(each.iter().filter(|token| !token.is_drive_bound(attainable)), attainable),
        of_reading: None,
    }
}

/// Random direct reads of the model file, as the decoder makes them. A striped model is read from several drives at the same time, which
/// are measured one after the other: together they are as fast as the one that needs longest for its part of an expert lets them be.
pub(crate) struct Drive {
    /// Of each drive: the reads, and its part of the experts.
    benches: Vec<(DiskBench, f64)>,
    point: Point,
    rates: Vec<f64>,
}

impl Drive {
    pub(crate) fn open(file: &Path, config: &IoConfig) -> Result<Self, CliError> {
        let engine = if cfg!(target_os = "linux") { BenchEngine::Uring } else { BenchEngine::Pread };
        let point = Point { engine, pattern: Pattern::Random, block_bytes: config.chunk_bytes, depth: config.depth };
        let model = ModelFile::open(file).ok().filter(ModelFile::is_striped);
        let volumes = match &model {
            Some(model) => model.volumes().iter().map(|volume| volume.path()).zip(model.expert_shares()).collect(),
            None => vec![(file, 1.0)],
        };
        let mut benches: Vec<(DiskBench, f64)> = Vec::with_capacity(volumes.len());
        for (path, share) in volumes {
            let bench = DiskBench::open(path, DirectMode::default()).map_err(unmeasured)?;
            match benches.iter_mut().find(|(other, _)| other.device().is_same(bench.device())) {
                Some((_, sum)) => *sum += share,
                None => benches.push((bench, share)),
            }
        }
        benches.retain(|(_, share)| *share > 0.0 || model.is_none());
        Ok(Drive { benches, point, rates: Vec::new() })
    }

    pub(crate) fn visit(&mut self) -> Result<(), CliError> {
        let rate = self.read(Duration::from_millis(700)).map_err(unmeasured)?;
        self.rates.push(rate);
        Ok(())
    }

    /// Bytes per second of reads for so long from each drive.
    pub(crate) fn read(&mut self, window: Duration) -> Result<f64, BenchError> {
        let mut slowest = f64::INFINITY;
        for (bench, share) in &mut self.benches {
            let visit = bench.visit(&self.point, window)?;
            slowest = slowest.min(visit.bytes as f64 / visit.elapsed.as_secs_f64() / *share);
        }
        Ok(slowest)
    }

    /// Reads for as long as `work` takes: what it gives, and the median of what the reads gave.
    pub(crate) fn beside<T>(
        &mut self,
        read: fn(&mut Drive) -> Result<f64, BenchError>,
        work: impl FnOnce() -> T,
    ) -> Result<(T, f64), BenchError> {
        struct Done<'d>(&'d AtomicBool);
        // Also if `work` panics: otherwise the reads would go on for ever.
        impl Drop for Done<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let done = AtomicBool::new(false);
        let (outcome, found) = thread::scope(|scope| {
            let reads = scope.spawn(|| -> Result<Vec<f64>, BenchError> {
                let mut found = vec![read(self)?];
                while !done.load(Ordering::Relaxed) {
                    found.push(read(self)?);
                }
                Ok(found)
            });
            let ended = Done(&done);
            let outcome = work();
            drop(ended);
            (outcome, reads.join().unwrap_or_else(|panic| resume_unwind(panic)))
        });
        Ok((outcome, median(&found?)))
    }

    /// Bytes per second of reads for a moment, so short that little is read after whatever is measured beside them.
    pub(crate) fn moment(&mut self) -> Result<f64, BenchError> {
        self.read(Duration::from_millis(50))
    }

    /// Seconds of a burst: as many reads as are in flight at a time, after a pause like those between the layers of a step.
    pub(crate) fn burst(&mut self) -> Result<f64, BenchError> {
        const PAUSE: Duration = Duration::from_millis(2);
        thread::sleep(PAUSE);
        let mut longest = 0.0f64;
        for (bench, _) in &mut self.benches {
            longest = longest.max(bench.visit(&self.point, Duration::ZERO)?.elapsed.as_secs_f64());
        }
        Ok(longest)
    }

    /// Bytes that all drives together read in the time in which the one with the smallest part reads a burst, without what it waits.
    pub(crate) fn burst_bytes(&self) -> f64 {
        let least = self.benches.iter().map(|(_, share)| *share).fold(1.0, f64::min);
        self.point.in_flight_bytes() as f64 / least
    }

    pub(crate) fn median(&self) -> f64 {
        median(&self.rates)
    }
}

/// How to measure a decoder if its drive cannot be measured.
fn unmeasured(error: BenchError) -> CliError {
    CliError::Failure(format!("{error}. With --drive 7GB/s, experts come from a simulated drive"))
}

/// The pairs of a comparison: tokens per second of both ways, and the ratio.
#[derive(Debug, Serialize)]
struct Comparison {
    compare: Compare,
    with: String,
    without: String,
    pairs: Vec<(f64, f64)>,
    median_with: f64,
    median_without: f64,
    median_ratio: f64,
}

fn compare(args: &Args, what: Compare, total: usize) -> Result<(), CliError> {
    let asked = args.options(total)?;
    let first = match what {
        Compare::Prefetch | Compare::Checksums => asked,
        Compare::Engine => EngineOptions { read_engine: Some(ReadEngineKind::Uring), ..asked },
    };
    let mut a = Decoder::open(&args.file, &first, total)?;
    let (with, without, other) = match what {
        Compare::Prefetch => ("prefetch", "no prefetch", EngineOptions { prefetch: Prefetch::Off, ..first }),
        Compare::Checksums => {
            // Like the other one, that is, as the calibration says: only the checksums must differ.
            let unverified = IoConfig { verify: false, ..a.engine.io_config().clone() };
            let read_engine = Some(a.engine.tuning().engine);
            ("checksums", "no checksums", EngineOptions { io: Some(unverified), read_engine, ..first })
        }
        Compare::Engine => ("uring", "pread", EngineOptions { read_engine: Some(ReadEngineKind::Pread), ..first }),
    };
    let mut b = Decoder::open(&args.file, &other, total)?;
    let bar = step_bar("decoding", 2 * total as u64);
    a.decode(args.warm_up, &|| bar.inc(1))?;
    b.decode(args.warm_up, &|| bar.inc(1))?;
    let rate = |elapsed: Duration| args.n as f64 / elapsed.as_secs_f64();
    let mut pairs = Vec::with_capacity(args.pairs);
    for pair in 0..args.pairs {
        // They alternate in going first, so that a drift of the machine affects both equally.
        let run = |d: &mut Decoder| d.decode(args.n, &|| bar.inc(1)).map(rate);
        pairs.push(if pair % 2 == 0 {
            let first = run(&mut a)?;
            (first, run(&mut b)?)
        } else {
            let first = run(&mut b)?;
            (run(&mut a)?, first)
        });
    }
    bar.finish_and_clear();
    let of = |f: &dyn Fn(&(f64, f64)) -> f64| median(&pairs.iter().map(f).collect::<Vec<_>>());
    let result = Comparison {
        compare: what,
        with: with.into(),
        without: without.into(),
        median_with: of(&|p| p.0),
        median_without: of(&|p| p.1),
        median_ratio: of(&|p| p.0 / p.1),
        pairs,
    };
    if args.json {
        return print_json(&result);
    }
    let mut out = format!("{:>4}  {with:>14}  {without:>14}  ratio\n", "pair");
    for (i, (x, y)) in result.pairs.iter().enumerate() {
        out += &format!("{:>4}  {x:>10.2} t/s  {y:>10.2} t/s  {:.3}\n", i + 1, x / y);
    }
    let (x, y) = (result.median_with, result.median_without);
    print(&format!("{out}\nmedian  {x:.2} against {y:.2} tokens/s; median ratio {:.3}\n", result.median_ratio))
}

fn table(outcomes: &[Outcome]) -> String {
    let mut out = String::new();
    for o in outcomes {
        let budget = o.budget.map_or("as much as is useful".into(), |b| Bytes(b).to_string());
        let rate = |r: f64| format!("{}/s", Bytes(r as u64));
        let (fit, found) = match o.experts {
            0 => (String::new(), String::new()),
            all => {
                let found = format!(", {:.1} % of experts in memory", 100.0 * o.hit_rate);
                (format!(", {} of {all} experts fit", o.slots), found)
            }
        };
        out += &format!(
            "budget {budget}: {} in use{fit}\n  {:.2} tokens/s, {} read per token{found}\n",
            Bytes(o.memory_used),
            o.tokens_per_second,
            Bytes(o.bytes_per_token as u64),
        );
        out += &format!(
            "  {} of {} that the drive gives: {:.1} %; token time is {:.2} of the roof\n",
            rate(o.achieved),
            rate(o.attainable),
            100.0 * o.achieved_of_attainable,
            o.time_over_roof,
        );
        let s = o.milliseconds;
        let experts = if o.experts == 0 { String::new() } else { format!("{:.1} experts, ", s.experts) };
        out += &format!(
            "  {:.1} ms per token: {:.1} waiting for the drive, {experts}{:.1} attention, {:.1} head, {:.1} other\n",
            s.total, s.io_wait, s.attention, s.head, s.other
        );
        if o.experts > 0 {
            out += &format!("  {} experts read ahead, {} of them used\n", o.prefetched, o.prefetched_used);
        }
        out += &regimes(o);
        if let Some(OfReading { part, reading_bytes_per_second, pairs, .. }) = o.of_reading {
            out += &format!(
                "  {:.1} % of the speed of plain reading ({}), in turns with {pairs} tokens that found everything in memory\n",
                100.0 * part,
                rate(reading_bytes_per_second)
            );
        }
        if let Some(lossy) = &o.lossy {
            out += &format!("  lossy: {lossy}; {} experts were not the routers' own\n", o.replaced);
        }
        if let Some(form) = o.prompt_attention {
            out += &format!("  prompts: {form} form of latent attention\n");
        }
    }
    out
}

/// Tokens that wait for the drive, and tokens that do not, each compared with their own roof.
fn regimes(o: &Outcome) -> String {
    let mut out = String::new();
    let Regime { tokens, achieved_of_attainable, time_over_roof } = o.drive_bound;
    if let (Some(achieved), Some(roof)) = (achieved_of_attainable, time_over_roof) {
        out += &format!(
            "  {tokens} tokens that read {DRIVE_BOUND} times as long as they compute: {:.1} % of the drive, {roof:.2} of \
             their roofs\n",
            100.0 * achieved
        );
    }
    if let Some(roof) = o.balanced.time_over_roof {
        let other = if tokens > 0 { "other " } else { "" };
        out += &format!("  {} {other}tokens: {roof:.2} of their roofs\n", o.balanced.tokens);
    }
    out
}

fn chart(outcomes: &[Outcome]) -> LineChart {
    let gib = |o: &Outcome| o.memory_used as f64 / (1u64 << 30) as f64;
    let line = |name: &str, group, value: &dyn Fn(&Outcome) -> f64| Series {
        name: name.into(),
        points: outcomes.iter().map(|o| (gib(o), value(o))).collect(),
        group,
        dashed: group > 0,
    };
    LineChart {
        title: "Decoding".into(),
        x_label: "memory in use (GiB)".into(),
        y_label: "tokens per second".into(),
        series: vec![
            line("measured", 0, &|o| o.tokens_per_second),
            line("roof of the drive", 1, &|o| o.attainable / o.bytes_per_token),
        ],
        ..LineChart::default()
    }
}
