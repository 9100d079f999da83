//! `sluice bench decode --drive`: how well reading and computing overlap, on a drive that needs no processor time.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use serde::Serialize;
use sluice_converter::synth::expert_noise;
use sluice_format::{Codec, ExtentKind, ModelFile, planes};
use sluice_kernels::ThreadPool;
use sluice_lab::compression::CompressionWorth;
use sluice_lab::estimate::StepWork;
use sluice_model::memory::{Bytes, Demand, MemoryPlan};
use sluice_model::{EngineOptions, RuntimeError, Stats};
use sluice_storage::io::bench::median;
use sluice_storage::io::sim::{DriveSpeed, DriveUse, SimulatedDrive};
use sluice_storage::pool::Packed;

use super::bench_batch::{Batch, Bounds};
use super::bench_decode::Args;
use crate::error::CliError;
use crate::profile::lossy;
use crate::progress::step_bar;
use crate::terminal::{print, print_json};

/// Rounds over which medians are taken. Each has steps with the drive and as many without waiting.
const ROUNDS: usize = 8;

/// Most of the steps before the measurement that have the drive.
const WARM_UP_WITH_DRIVE: usize = 32;

/// The result for one budget. Counts are those of the steps with the drive; milliseconds are medians over the rounds.
#[derive(Debug, Serialize)]
struct Outcome {
    sequences: usize,
    /// Tokens of the prompt that a step reads of each sequence, instead of decoding a token.
    prompt: Option<usize>,
    budget: Option<u64>,
    memory_used: u64,
    slots: usize,
    experts: usize,
    expert_bytes: u64,
    drive: DriveReport,
    /// The value of compression, for compressed experts.
    compression: Option<CompressionWorth>,
    steps: usize,
    tokens: usize,
    /// For all sequences together, at the median time of a step.
    tokens_per_second: f64,
    milliseconds_per_token: f64,
    milliseconds_per_step: f64,
    /// For a step that never waits, but verifies and computes the same.
    computing_milliseconds: f64,
    /// The drive's time for the bytes that a step misses: bytes ÷ bandwidth, plus its latency once.
    drive_milliseconds: f64,
    /// Time of a step ÷ the longer of the two: 1 if they overlap perfectly.
    time_over_longer: f64,
    /// Time of all steps ÷ the sum over steps of the longer of the two. A step that misses much waits for the drive while the cores idle, and
    /// the next one, which misses little, cannot make up for that; this counts both as perfect.
    time_over_longer_of_each: f64,
    /// Bytes of experts read.
    bytes_missed: u64,
    bytes_missed_per_token: f64,
    hits: u64,
    misses: u64,
    hit_rate: f64,
    prefetched: u64,
    prefetched_used: u64,
    /// How experts were chosen otherwise than by the model's routers, in words.
    lossy: Option<String>,
    /// Distinct experts that a step uses, over all layers.
    union_of_experts: f64,
    bounds: Bounds,
    /// Time of a step ÷ the largest of the bounds.
    time_over_bound: f64,
    rounds: Vec<Round>,
}

/// The drive: as requested, and as measured.
#[derive(Debug, Serialize)]
struct DriveReport {
    /// How many work at the same time: one for each volume of a striped model.
    drives: usize,
    /// Of all together.
    bytes_per_second: f64,
    latency_microseconds: f64,
    /// From the first byte it could have given to the notice of the last, whenever it was read, summed over drives; none if none was.
    reached_bytes_per_second: Option<f64>,
    /// How late the end of a read was noticed, on average, because timers and the system's scheduler are not exact.
    late_microseconds: f64,
    chunk_bytes: usize,
    depth: usize,
}

/// Milliseconds of a step, means over one round.
#[derive(Clone, Copy, Debug, Serialize)]
struct Round {
    step: f64,
    computing: f64,
    drive: f64,
    /// The longer of the two, taken for each step.
    longer: f64,
}

impl Round {
    fn time_over_longer(&self) -> f64 {
        self.step / self.drive.max(self.computing)
    }

    fn time_over_longer_of_each(&self) -> f64 {
        self.step / self.longer
    }
}

/// Measures and prints; `total`: tokens of each sequence, warm-up included.
pub(crate) fn run(args: &Args, asked: &[DriveSpeed], count: usize, total: usize) -> Result<(), CliError> {
    let file = ModelFile::open(&args.file)?;
    let speeds = &Speeds::new(&file, asked)?;
    let held = Held::new(args, &file)?;
    let mut outcomes = Vec::new();
    for budget in args.all_budgets() {
        refuse_streaming(args, &file, budget, (count, total))?;
        outcomes.push(measure(args, budget, speeds, &held, (count, total))?);
    }
    if args.json { print_json(&outcomes) } else { print(&outcomes.iter().map(describe).collect::<String>()) }
}

/// The simulated drives: one, or for a striped model one for each volume.
#[derive(Clone, Debug)]
struct Speeds {
    of_drives: Vec<DriveSpeed>,
    /// Of all together, as fast as the one that needs longest for its part of an expert lets them be.
    bytes_per_second: f64,
    /// The longest.
    latency: Duration,
}

impl Speeds {
    fn new(file: &ModelFile, asked: &[DriveSpeed]) -> Result<Self, CliError> {
        let shares = if file.is_striped() { file.expert_shares() } else { vec![1.0] };
        let of_drives = match asked {
            &[one] => vec![one; shares.len()],
            several if several.len() == shares.len() => several.to_vec(),
            several => {
                let (path, volumes) = (file.path().display(), shares.len());
                return Err(CliError::Usage(format!(
                    "{path} is read from {volumes} at the same time, and --drive is given {} times: give it once, or once for each",
                    several.len()
                )));
            }
        };
        let own = of_drives.iter().zip(&shares).filter(|(_, share)| **share > 0.0);
        let rates = own.map(|(speed, share)| speed.bytes_per_second as f64 / share);
        let bytes_per_second = rates.fold(f64::INFINITY, f64::min);
        let latency = of_drives.iter().map(|speed| speed.latency).max().unwrap_or_default();
        Ok(Speeds { of_drives, bytes_per_second, latency })
    }
}

/// What the simulated drive has in place of every expert.
struct Held {
    stored: Vec<u8>,
    /// Its decompressed form, if it is compressed, and what compression is worth here.
    packed: Option<(Packed, CompressionWorth)>,
}

impl Held {
    fn new(args: &Args, file: &ModelFile) -> Result<Self, CliError> {
        let noise = expert_noise(file)?;
        let first = file.extents().iter().find(|e| e.kind == ExtentKind::Expert);
        let Some(expert) = first.filter(|e| args.compressed || e.codec != Codec::Raw) else {
            return Ok(Held { stored: noise, packed: None });
        };
        let logical = &noise[..expert.logical_len as usize];
        let stored = planes::encode(logical, file.tensors_of(expert), file.superblock().page_size).ok_or_else(|| {
            let path = args.file.display();
            CliError::Usage(format!(
                "--compressed would change nothing: the experts of {path} are of a type that compression does not shorten by {} %",
                planes::LEAST_GAIN
            ))
        })?;
        let cores = std::thread::available_parallelism();
        let threads = ThreadPool::new(args.engine.threads.or(cores.ok()).map_or(1, NonZeroUsize::get));
        let worth = CompressionWorth::measure(&stored, logical.len(), &threads)
            .ok_or_else(|| CliError::Failure("what was compressed cannot be decompressed".into()))?;
        let packed = Packed {
            logical_len: expert.logical_len,
            padded_len: expert.padded_len,
            checksum: sluice_format::checksum(&noise),
        };
        Ok(Held { stored, packed: Some((packed, worth)) })
    }
}

/// Refuses budgets in which some dense parts do not stay in memory, because they would be read from the real drive.
fn refuse_streaming(
    args: &Args,
    file: &ModelFile,
    budget: Option<u64>,
    (count, total): (usize, usize),
) -> Result<(), CliError> {
    let options = args.engine.options(total);
    let EngineOptions { kv_type, marks, prediction, .. } = options;
    let demand = Demand { sequences: count, context: total, kv_type, marks, prediction, expanding: 0 };
    let plan = MemoryPlan::new(file, budget, demand).map_err(RuntimeError::from)?;
    if plan.dense_streamed == 0 {
        return Ok(());
    }
    Err(CliError::Usage(format!(
        "a budget of {} does not hold all dense parts: {} of them would come off the real drive, which --drive is to be independent \
         of. Raise the budget by that much, or keep them in a smaller type",
        Bytes(plan.effective),
        Bytes(plan.dense_streamed)
    )))
}

/// A batch on a simulated drive.
struct Bench {
    batch: Batch,
    drive: SimulatedDrive,
    speeds: Speeds,
    /// Of the steps with the drive.
    counts: Counts,
    /// Of the drive of each volume.
    used: Vec<DriveUse>,
}

/// The parts of [`Stats`] that are counted over the steps with the drive.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    bytes: u64,
    hits: u64,
    misses: u64,
    prefetched: u64,
    prefetched_used: u64,
}

impl Counts {
    fn add(&mut self, before: &Stats, after: &Stats) {
        self.bytes += after.expert_bytes_read - before.expert_bytes_read;
        self.hits += after.hits - before.hits;
        self.misses += after.misses - before.misses;
        self.prefetched += after.prefetched - before.prefetched;
        self.prefetched_used += after.prefetched_used - before.prefetched_used;
    }
}

impl Bench {
    /// Seconds of so many steps at this speed.
    fn steps(&mut self, speeds: &[DriveSpeed], steps: usize, each: &dyn Fn()) -> Result<f64, CliError> {
        self.drive.set_speeds(speeds);
        let started = Instant::now();
        for _ in 0..steps {
            self.batch.step()?;
            each();
        }
        Ok(started.elapsed().as_secs_f64())
    }

    /// Seconds that the drive takes for so many bytes.
    fn reading(&self, bytes: u64) -> f64 {
        let latency = if bytes > 0 { self.speeds.latency.as_secs_f64() } else { 0.0 };
        bytes as f64 / self.speeds.bytes_per_second + latency
    }

    /// Runs steps with the drive and counts them; returns their seconds, and for each what the drive takes for its misses.
    fn with_drive(&mut self, steps: usize, each: &dyn Fn()) -> Result<(f64, Vec<f64>), CliError> {
        let (before, used) = (self.batch.engine.stats(), self.drive.used());
        let speeds = self.speeds.of_drives.clone();
        let (mut seconds, mut reading, mut bytes) = (0.0, Vec::with_capacity(steps), before.expert_bytes_read);
        for _ in 0..steps {
            seconds += self.steps(&speeds, 1, each)?;
            let read = self.batch.engine.stats().expert_bytes_read;
            reading.push(self.reading(read - std::mem::replace(&mut bytes, read)));
        }
        self.counts.add(&before, &self.batch.engine.stats());
        self.used.resize(used.len(), DriveUse::default());
        for ((sum, before), now) in self.used.iter_mut().zip(&used).zip(self.drive.used()) {
            let now = now.since(before);
            sum.reads += now.reads;
            sum.bytes += now.bytes;
            sum.busy += now.busy;
            sum.late += now.late;
        }
        Ok((seconds, reading))
    }

    /// Some steps with the drive and as many without, in an order that alternates from round to round, so that a drift of the
    /// machine affects both equally.
    fn round(&mut self, number: usize, steps: usize, each: &dyn Fn()) -> Result<Round, CliError> {
        let bytes = self.counts.bytes;
        let ((with, reading), without) = if number.is_multiple_of(2) {
            let with = self.with_drive(steps, each)?;
            (with, self.steps(&[DriveSpeed::UNLIMITED], steps, each)?)
        } else {
            let without = self.steps(&[DriveSpeed::UNLIMITED], steps, each)?;
            (self.with_drive(steps, each)?, without)
        };
        let missed = (self.counts.bytes - bytes) as f64 / steps as f64;
        let (per_step, computing) = (1e3 / steps as f64, without / steps as f64);
        let longer: f64 = reading.iter().map(|reading| reading.max(computing)).sum();
        Ok(Round {
            step: per_step * with,
            computing: 1e3 * computing,
            drive: 1e3 * self.reading(missed as u64),
            longer: per_step * longer,
        })
    }
}

/// `(sequences, tokens of each)`.
fn measure(
    args: &Args,
    budget: Option<u64>,
    speeds: &Speeds,
    held: &Held,
    (count, total): (usize, usize),
) -> Result<Outcome, CliError> {
    let drive = SimulatedDrive::new(DriveSpeed::UNLIMITED, held.stored.clone());
    let asked = args.options(total)?;
    let options = EngineOptions {
        budget,
        // The calibration belongs to another drive, and what adapts would adapt to steps without waiting as well.
        io: Some(asked.io.clone().unwrap_or_default()),
        simulated: Some(drive.clone()),
        simulated_packed: held.packed.map(|(packed, _)| packed),
        ..asked
    };
    let mut batch = Batch::open(&args.file, options, count, total)?;
    batch.prompts = args.prompt.is_some();
    let mut bench = Bench { batch, drive, speeds: speeds.clone(), counts: Counts::default(), used: Vec::new() };
    let bar = step_bar(if args.prompt.is_some() { "reading" } else { "decoding" }, (args.warm_up + 2 * args.n) as u64);
    // What adapts to the drive needs some steps with it.
    let with_drive = args.warm_up.min(WARM_UP_WITH_DRIVE);
    bench.steps(&[DriveSpeed::UNLIMITED], args.warm_up - with_drive, &|| bar.inc(1))?;
    bench.steps(&speeds.of_drives, with_drive, &|| bar.inc(1))?;
    let count_of_rounds = args.n.min(ROUNDS);
    let mut rounds = Vec::with_capacity(count_of_rounds);
    for number in 0..count_of_rounds {
        let steps = args.n * (number + 1) / count_of_rounds - args.n * number / count_of_rounds;
        rounds.push(bench.round(number, steps, &|| bar.inc(1))?);
    }
    bar.finish_and_clear();
    let outcome = outcome(args, budget, &mut bench, rounds, (count, total))?;
    Ok(Outcome { compression: held.packed.map(|(_, worth)| worth), ..outcome })
}

fn outcome(
    args: &Args,
    budget: Option<u64>,
    bench: &mut Bench,
    rounds: Vec<Round>,
    (count, total): (usize, usize),
) -> Result<Outcome, CliError> {
    let drive = drive_report(bench);
    let Bench { batch: Batch { engine, .. }, speeds, counts, .. } = bench;
    let of_rounds = |value: &dyn Fn(&Round) -> f64| median(&rounds.iter().map(value).collect::<Vec<_>>());
    let prompt = args.prompt.map(NonZeroUsize::get);
    let rows = count * prompt.unwrap_or(1);
    let (steps, tokens) = (args.n as f64, args.n * rows);
    let uses = (counts.hits + counts.misses) as f64;
    let position = prompt.map_or((total as f64 + args.warm_up as f64) / 2.0, |tokens| tokens as f64 / 2.0);
    let work = StepWork::of(engine.file(), rows, uses / steps, position, engine.memory().kv_type);
    let bounds = Bounds::of(engine, counts.bytes as f64 / steps, speeds.bytes_per_second, &work)?;
    let step = of_rounds(&|round| round.step);
    Ok(Outcome {
        sequences: count,
        prompt,
        budget,
        memory_used: engine.memory().used(),
        slots: engine.memory().slots,
        experts: engine.memory().experts,
        expert_bytes: engine.memory().slot_len,
        drive,
        compression: None,
        steps: args.n,
        tokens,
        tokens_per_second: 1e3 * rows as f64 / step,
        milliseconds_per_token: step / rows as f64,
        milliseconds_per_step: step,
        computing_milliseconds: of_rounds(&|round| round.computing),
        drive_milliseconds: of_rounds(&|round| round.drive),
        time_over_longer: of_rounds(&Round::time_over_longer),
        time_over_longer_of_each: of_rounds(&Round::time_over_longer_of_each),
        bytes_missed: counts.bytes,
        bytes_missed_per_token: counts.bytes as f64 / tokens as f64,
        hits: counts.hits,
        misses: counts.misses,
        hit_rate: counts.hits as f64 / uses.max(1.0),
        prefetched: counts.prefetched,
        prefetched_used: counts.prefetched_used,
        lossy: lossy(engine),
        union_of_experts: uses / steps,
        time_over_bound: step / bounds.largest(),
        bounds,
        rounds,
    })
}

fn drive_report(Bench { batch, speeds, used, .. }: &Bench) -> DriveReport {
    let config = batch.engine.io_config();
    let reached: f64 = used
        .iter()
        .filter(|used| used.bytes > 0 && !used.busy.is_zero())
        .map(|used| used.bytes as f64 / used.busy.as_secs_f64())
        .sum();
    let late: f64 = used.iter().map(|used| used.late.as_secs_f64()).sum();
    let reads: u64 = used.iter().map(|used| used.reads).sum();
    DriveReport {
        drives: speeds.of_drives.len(),
        bytes_per_second: speeds.bytes_per_second,
        latency_microseconds: 1e6 * speeds.latency.as_secs_f64(),
        reached_bytes_per_second: (reached > 0.0).then_some(reached),
        late_microseconds: 1e6 * late / reads.max(1) as f64,
        chunk_bytes: config.chunk_bytes,
        depth: config.depth,
    }
}

fn describe(o: &Outcome) -> String {
    let budget = o.budget.map_or("as much as is useful".into(), |b| Bytes(b).to_string());
    let rate = |r: f64| format!("{}/s", Bytes(r as u64));
    let lossy = o.lossy.as_ref().map(|lossy| format!("  lossy: {lossy}\n")).unwrap_or_default();
    let d = &o.drive;
    let drives = match d.drives {
        1 => "simulated drive".to_owned(),
        n => format!("{n} simulated drives together"),
    };
    let reached = match d.reached_bytes_per_second {
        Some(reached) => {
            format!("{} while it was read, ends noticed {:.0} µs late", rate(reached), d.late_microseconds)
        }
        None => "never read".to_owned(),
    };
    let compression = o.compression.map_or(String::new(), |c| {
        format!(
            "  experts are compressed to {:.1} %; all threads decompress {} of memory, so that it pays on drives below {} whatever \
             overlaps\n",
            100.0 * c.stored_part,
            rate(c.decompressed_per_second),
            rate(c.pays_below),
        )
    });
    let prompt = o.prompt.map(|tokens| format!(", a prompt of {tokens} tokens of each in a step")).unwrap_or_default();
    format!(
        "budget {budget}: {} in use, {} of {} experts fit; sequences: {}{prompt}\n  \
         {}: {} and {:.0} µs asked for; {reached}; {} × {} in flight\n{compression}  \
         {:.2} tokens/s in all; a step takes {:.1} ms and misses {}, {} per token\n  \
         a step uses {:.0} different experts, {:.1} % of them in memory; {} prefetched, {} of them used\n  \
         computing alone {:.1} ms, the drive alone {:.1} ms: a step takes {:.2} times the longer, {:.2} times if that is \
         taken for each step\n  \
         bounds of a step: {}; the step takes {:.2} times the largest\n{lossy}",
        Bytes(o.memory_used),
        o.slots,
        o.experts,
        o.sequences,
        drives,
        rate(d.bytes_per_second),
        d.latency_microseconds,
        Bytes(d.chunk_bytes as u64),
        d.depth,
        o.tokens_per_second,
        o.milliseconds_per_step,
        Bytes(o.bytes_missed / o.steps as u64),
        Bytes(o.bytes_missed_per_token as u64),
        o.union_of_experts,
        100.0 * o.hit_rate,
        o.prefetched,
        o.prefetched_used,
        o.computing_milliseconds,
        o.drive_milliseconds,
        o.time_over_longer,
        o.time_over_longer_of_each,
        o.bounds.describe(),
        o.time_over_bound,
    )
}
