//! How a batch is run on this machine: how many answers at a time, and how long it takes.

use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::path::Path;

use serde_json::{Value, json};
use sluice_format::{ExtentKind, ModelFile};
use sluice_kernels::ThreadPool;
use sluice_lab::batch::{Load, Rates, StepBound, Width};
use sluice_lab::course::{Course, Place};
use sluice_lab::estimate::HIT_RATE_SPREAD;
use sluice_lab::schedule::{Cores, USUAL_LATENCY};
use sluice_model::memory::Bytes;
use sluice_model::{EngineOptions, RuntimeError};
use sluice_storage::io::IoConfig;

use crate::batch_load::{Length, Rest, USUAL_ANSWER};
use crate::commands::bench_batch::{cores, fresh_memory, largest_type, machine};
use crate::commands::bench_decode::Drive;
use crate::commands::bench_machine::{self, DriveRate};
use crate::engine_args::EngineArgs;
use crate::error::CliError;
use crate::machine::MachineFile;
use crate::terminal::{counted, note, seconds};

/// Bytes per second that a drive is taken to give if it cannot be measured.
const ASSUMED: f64 = 1e9;
/// The same for memory, and multiplications and additions per second, where only a decision depends on them.
const ASSUMED_MEMORY: f64 = 20e9;
const ASSUMED_ARITHMETIC: f64 = 100e9;

/// How a batch is run.
pub(crate) struct Plan {
    /// What is left, with answers as long as they may be, or as usual where there is no limit.
    load: Load,
    /// Most tokens of a request and its answer.
    pub(crate) context: usize,
    /// Answers at a time.
    pub(crate) sequences: usize,
    /// Sequences of the whole context that memory is planned for.
    pub(crate) planned: usize,
    measured: Option<Measured>,
}

/// What the machine makes of it.
struct Measured {
    rates: Rates,
    /// What a step takes at least, …
    width: Width,
    /// … and everything, in seconds.
    least: f64,
    courses: Option<Courses>,
}

/// Simulated courses of a batch.
struct Courses {
    /// What is expected.
    expected: Course,
    /// The same in seconds, if more or less is found in memory.
    range: [f64; 2],
    /// If all answers become as long as they may.
    longest: Course,
}

impl Plan {
    /// So many answers at a time as are asked for, or as pay on this machine; with the time that they are expected to take. Measuring the
    /// machine takes seconds: where the number was asked for, nothing depends on it, and only a dry run does it.
    pub(crate) fn choose(
        args: &EngineArgs,
        file: &ModelFile,
        rest: &Rest,
        (sequences, is_dry): (Option<NonZeroUsize>, bool),
    ) -> Result<Self, CliError> {
        let load = rest.load(Length::Allowed);
        let asked = sequences.map(NonZeroUsize::get);
        let unmeasured = |sequences| {
            let (context, planned) = (load.context, load.planned(sequences));
            Plan { load, context, sequences, planned, measured: None }
        };
        if let (Some(sequences), false) = (asked, is_dry) {
            return Ok(unmeasured(sequences));
        }
        let speeds = Speeds::measure(args, file)?;
        let width = match asked {
            Some(sequences) => Width::of(file, args.budget, args.kv_type, &load, &speeds.rates, sequences),
            None => Width::best(file, args.budget, args.kv_type, &load, &speeds.rates),
        };
        let Some(width) = width else {
            // What cannot be planned for one is refused with all numbers when the memory is checked.
            let sequences = asked.unwrap_or(1);
            let engine = EngineOptions { sequences: Some(load.planned(sequences)), ..args.options(load.context) };
            engine.check_memory(file).map_err(RuntimeError::from)?;
            let message = format!(
                "{sequences} answers at a time, with {} tokens each at most, do not fit into the memory: lower --sequences or --context, or \
                 raise --budget",
                load.context
            );
            return Err(CliError::Failure(message));
        };
        let measured = Measured::new(args, file, (rest, &load), (&speeds, width));
        Ok(Plan { planned: width.planned, measured: Some(measured), ..unmeasured(width.sequences) })
    }

    /// From how many new tokens on it pays to save a sequence, by the rates of this machine where they were measured, and by those of an
    /// ordinary one otherwise.
    pub(crate) fn worth_saving(&self, args: &EngineArgs, file: &ModelFile) -> Option<usize> {
        match &self.measured {
            Some(Measured { rates, width, .. }) => width.worth_saving(file, &self.load, rates, args.kv_type),
            None => worth_saving(args, file, &self.load, self.sequences),
        }
    }

    /// For programs.
    pub(crate) fn to_json(&self, rest: &Rest) -> Value {
        let mut value = json!({"load": self.load, "sequences": self.sequences, "rest": rest.to_json()});
        if let Some(Measured { rates, width, least, courses }) = &self.measured {
            value["machine"] = json!(rates);
            value["step"] = json!(width);
            value["least_seconds"] = json!(least);
            if let Some(Courses { expected, range, longest }) = courses {
                value["expected_seconds_range"] = json!(range);
                value["expected"] = json!(expected);
                value["expected_seconds"] = json!(expected.seconds);
                value["longest_seconds"] = json!(longest.seconds);
            }
        }
        value
    }

    /// For people.
    pub(crate) fn describe(&self, rest: &Rest) -> String {
        let mut text = describe_rest(rest);
        let Load { answers, prompt_tokens, answer_tokens, unlimited, context } = self.load;
        // A sum of nothing is -0.
        let answer_tokens = answer_tokens + 0.0;
        let generated = match unlimited {
            0 => format!("at most {answer_tokens:.0} to generate"),
            1 => {
                format!("about {answer_tokens:.0} to generate (an answer has no limit: {USUAL_ANSWER:.0} are assumed)")
            }
            n => format!(
                "about {answer_tokens:.0} to generate ({n} answers have no limit: {USUAL_ANSWER:.0} each are assumed)"
            ),
        };
        let about = if rest.is_exact() { "" } else { "about " };
        let _ = writeln!(
            text,
            "{} to give, {} at a time: {about}{} to read, and {generated}; a request and its answer have at most \
             {context} tokens",
            counted(answers, "answer"),
            self.sequences,
            counted(prompt_tokens as u64, "token"),
        );
        match &self.measured {
            Some(measured) => text += &measured.describe(rest.mean_answer()),
            None => text += "--dry-run measures the machine and says how long that takes\n",
        }
        text
    }
}

impl Measured {
    fn new(
        args: &EngineArgs,
        file: &ModelFile,
        (rest, load): (&Rest, &Load),
        (speeds, width): (&Speeds, Width),
    ) -> Self {
        let Speeds { rates, cores, fresh } = *speeds;
        let course = |length, more| {
            let place = Place { file, budget: args.budget, kv_type: args.kv_type, rates, cores, fresh, more };
            Course::of(&place, &rest.load(length), width.sequences, &rest.items(length))
        };
        let seconds = |more| course(Length::Likely, more).map(|course| course.seconds);
        let both = course(Length::Likely, 0.0).zip(course(Length::Longest, 0.0));
        let courses = both.and_then(|(expected, longest)| {
            Some(Courses { expected, range: [seconds(HIT_RATE_SPREAD)?, seconds(-HIT_RATE_SPREAD)?], longest })
        });
        Measured { rates, width, least: width.seconds(file, load, &rates, args.kv_type), courses }
    }

    /// `mean`: tokens of an answer so far.
    fn describe(&self, mean: Option<f64>) -> String {
        let Measured { rates, width, least, courses } = self;
        let rate = |rate: f64| format!("{}/s", Bytes(rate as u64));
        let bound = match width.bound {
            StepBound::Drive => "the drive",
            StepBound::Memory => "the memory",
            StepBound::Arithmetic => "the arithmetic",
        };
        let mut text = format!(
            "a step of {}: drive {} ({}), memory {} ({}), arithmetic {} ({:.0} GOP/s); it uses some {:.0} different experts, {:.0} % of \
             them in memory\n{bound} bounds it: {:.2} tokens/s at most\n",
            width.sequences,
            seconds(width.drive),
            rate(rates.drive),
            seconds(width.memory),
            rate(rates.memory),
            seconds(width.arithmetic),
            rates.arithmetic / 1e9,
            width.union_of_experts,
            100.0 * width.hit_rate,
            width.tokens_per_second,
        );
        if let Some(Courses { expected, range: [low, high], longest }) = courses {
            let lengths = match mean {
                Some(mean) => format!("with answers of {mean:.0} tokens, the mean so far"),
                None => "if all answers are so long".to_owned(),
            };
            let _ = writeln!(
                text,
                "expected  {}, {lengths}: opening the model {}, reading prompts {}, generating {}",
                seconds(expected.seconds),
                seconds(expected.opening),
                seconds(expected.reading),
                seconds(expected.generating),
            );
            if *high > 1.02 * low {
                let (points, [low, high]) = (100.0 * HIT_RATE_SPREAD, [low, high].map(|time| seconds(*time)));
                let _ = writeln!(
                    text,
                    "          hit rates differ between models and texts: {points:.0} points more or less make it {low} or {high}"
                );
            }
            if longest.tokens > 1.01 * expected.tokens {
                let _ =
                    writeln!(text, "longest   {}, if all answers become as long as they may", seconds(longest.seconds));
            }
        }
        let _ = writeln!(
            text,
            "bound     at least {}, if all answers are so long and everything overlaps",
            seconds(*least)
        );
        text
    }
}

/// What earlier runs have done, and which requests cannot be answered.
fn describe_rest(rest: &Rest) -> String {
    let mut text = String::new();
    if let Some(earlier) = &rest.earlier {
        let failed = if earlier.failed > 0 { format!(", of which {} failed", earlier.failed) } else { String::new() };
        let begun = match earlier.sampled.len() {
            0 => String::new(),
            begun => format!("; of {begun} more, a part is generated"),
        };
        let requests = counted(earlier.done.len(), "request");
        let _ = writeln!(text, "{} of {requests} have a result{failed}{begun}", earlier.finished);
    }
    let (named, count) = &rest.wrong;
    if *count > 0 {
        let _ = writeln!(text, "{} cannot be answered, and will fail:", counted(*count, "request"));
        named.iter().for_each(|failed| _ = writeln!(text, "  {failed}"));
        if *count > named.len() {
            let _ = writeln!(text, "  and {} more", count - named.len());
        }
    }
    text
}

/// Threads that compute.
pub(crate) fn threads(args: &EngineArgs) -> usize {
    let threads = args.options(1).threads;
    threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into))
}

/// From how many new tokens on it pays to save each of so many sequences, by the rates of an ordinary machine.
pub(crate) fn worth_saving(args: &EngineArgs, file: &ModelFile, load: &Load, sequences: usize) -> Option<usize> {
    let drive = calibrated(file.path()).map_or(ASSUMED, |drive| drive.bytes_per_second);
    let rates = Rates { drive, latency: USUAL_LATENCY, memory: ASSUMED_MEMORY, arithmetic: ASSUMED_ARITHMETIC };
    let width = Width::of(file, args.budget, args.kv_type, load, &rates, sequences)?;
    width.worth_saving(file, load, &rates, args.kv_type)
}

/// What this machine does in a second.
struct Speeds {
    rates: Rates,
    cores: Cores,
    /// Bytes of memory that it writes for the first time.
    fresh: f64,
}

impl Speeds {
    /// The drive by its calibration if there is one, the cores as `sluice bench machine` has found them if it has, and the rest measured. A run
    /// and a dry run say the same because both take it from here.
    fn measure(args: &EngineArgs, file: &ModelFile) -> Result<Self, CliError> {
        let known = calibrated(file.path()).filter(|_| !args.no_calibration);
        let latency = known.and_then(|known| known.latency).unwrap_or(USUAL_LATENCY);
        let drive = match known {
            Some(known) => known.bytes_per_second,
            None => measured_drive(file.path()).unwrap_or_else(|_| {
                note(&format_args!(
                    "note: {} is too small, or on no drive, to measure how fast it is read: the plan assumes {}/s",
                    file.path().display(),
                    Bytes(ASSUMED as u64)
                ));
                ASSUMED
            }),
        };
        let threads = ThreadPool::new(threads(args)).threads();
        let (memory, arithmetic) = machine(file, threads)?;
        let known = MachineFile::of_user().filter(|path| path.exists()).and_then(|path| MachineFile::load(&path).ok());
        let name = |kinds: &[ExtentKind]| largest_type(file, kinds).map(sluice_kernels::WeightType::name);
        let cores = match known {
            Some(known) => known.cores(name(&[ExtentKind::Expert]), name(&[ExtentKind::Attention, ExtentKind::Head])),
            None => cores(file, threads, memory)?,
        };
        Ok(Speeds { rates: Rates { drive, latency, memory, arithmetic }, cores, fresh: fresh_memory() })
    }
}

/// Bytes per second of the drive below a file, from some reads of it.
fn measured_drive(path: &Path) -> Result<f64, CliError> {
    let mut drive = Drive::open(path, &IoConfig::default())?;
    drive.visit()?;
    Ok(drive.median())
}

/// Bytes per second of the drive below a file, or of all of its drives, as `sluice bench disk` has found them.
fn calibrated(path: &Path) -> Option<DriveRate> {
    bench_machine::drive(path).ok().flatten()
}
