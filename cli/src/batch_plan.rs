//! How a batch is run on this machine: how much there is to do, how many answers at a time, and how long it takes.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use serde_json::{Value, json};
use sluice_batch::{Entry, Index, Line};
use sluice_format::ModelFile;
use sluice_kernels::ThreadPool;
use sluice_lab::batch::{Load, Rates, StepBound, Width};
use sluice_model::memory::Bytes;
use sluice_storage::io::calibration::{CalibrationStore, DeviceId};
use sluice_storage::io::{DataFile, DirectMode, IoConfig};
use sluice_text::Tokenizer;

use crate::commands::bench_batch::machine;
use crate::commands::bench_decode::Drive;
use crate::engine_args::EngineArgs;
use crate::error::CliError;
use crate::terminal::{counted, note, seconds};

/// Requests whose texts are turned into tokens, to know how many tokens a byte is: the longest, and some of all others.
const LONGEST: usize = 16;
const OTHERS: usize = 48;
/// Bytes of each of them that are looked at.
const LOOK: usize = 64 << 10;
/// Tokens of an answer whose request does not limit it: what is planned for, and what a context is given room for.
const USUAL_ANSWER: f64 = 1024.0;
const LONG_ANSWER: f64 = 4096.0;
/// Tokens that a template adds, with room to spare.
const TEMPLATE: f64 = 256.0;
/// Contexts are multiples of this many tokens, so that an input that changes a little needs the same.
const STEP: usize = 256;
/// Bytes per second that a drive is taken to give if it cannot be measured.
const ASSUMED: f64 = 1e9;
/// The same for memory, and multiplications and additions per second, where only a decision depends on them.
const ASSUMED_MEMORY: f64 = 20e9;
const ASSUMED_ARITHMETIC: f64 = 100e9;

/// How a batch is run.
pub(crate) struct Plan {
    pub(crate) load: Load,
    /// Answers at a time.
    pub(crate) sequences: usize,
    /// Sequences of the whole context that memory is planned for.
    pub(crate) planned: usize,
    /// What a step takes at least, and how long everything does, where that was measured.
    measured: Option<(Rates, Width, f64)>,
}

impl Plan {
    /// So many answers at a time as are asked for, or as pay on this machine.
    pub(crate) fn choose(
        args: &EngineArgs,
        file: &ModelFile,
        load: Load,
        sequences: Option<NonZeroUsize>,
    ) -> Result<Self, CliError> {
        if let Some(sequences) = sequences.map(NonZeroUsize::get) {
            return Ok(Plan { load, sequences, planned: load.planned(sequences), measured: None });
        }
        let rates = rates(args, file)?;
        // What cannot be planned for one is refused with all numbers when the model is opened.
        let best = Width::best(file, args.budget, args.kv_type, &load, &rates);
        let Some(width) = best else { return Ok(Plan { load, sequences: 1, planned: 1, measured: None }) };
        let seconds = width.seconds(file, &load, &rates, args.kv_type);
        let (sequences, planned) = (width.sequences, width.planned);
        Ok(Plan { load, sequences, planned, measured: Some((rates, width, seconds)) })
    }

    /// The same with the bounds of a step, also where the number of answers at a time was asked for.
    pub(crate) fn measured(self, args: &EngineArgs, file: &ModelFile) -> Result<Self, CliError> {
        if self.measured.is_some() {
            return Ok(self);
        }
        let rates = rates(args, file)?;
        let width = Width::of(file, args.budget, args.kv_type, &self.load, &rates, self.sequences);
        let width = width.ok_or_else(|| {
            let message = format!(
                "{} answers at a time, with {} tokens each at most, do not fit into the memory: lower --sequences or --context, or raise \
                 --budget",
                self.sequences, self.load.context
            );
            CliError::Failure(message)
        })?;
        let seconds = width.seconds(file, &self.load, &rates, args.kv_type);
        Ok(Plan { measured: Some((rates, width, seconds)), ..self })
    }

    /// From how many new tokens on it pays to save a sequence, by the rates of this machine where they were measured, and by those of an
    /// ordinary one otherwise.
    pub(crate) fn worth_saving(&self, args: &EngineArgs, file: &ModelFile) -> Option<usize> {
        match &self.measured {
            Some((rates, width, _)) => width.worth_saving(file, &self.load, rates, args.kv_type),
            None => worth_saving(args, file, &self.load, self.sequences),
        }
    }

    /// For programs.
    pub(crate) fn to_json(&self) -> Value {
        let mut value = json!({"load": self.load, "sequences": self.sequences});
        if let Some((rates, width, seconds)) = &self.measured {
            value["machine"] = json!(rates);
            value["step"] = json!(width);
            value["seconds"] = json!(seconds);
        }
        value
    }

    /// For people.
    pub(crate) fn describe(&self) -> String {
        let Load { answers, prompt_tokens, answer_tokens, unlimited, context } = self.load;
        let generated = match unlimited {
            0 => format!("at most {answer_tokens:.0} to generate"),
            1 => {
                format!("about {answer_tokens:.0} to generate (an answer has no limit: {USUAL_ANSWER:.0} are assumed)")
            }
            n => format!(
                "about {answer_tokens:.0} to generate ({n} answers have no limit: {USUAL_ANSWER:.0} each are assumed)"
            ),
        };
        let mut text = format!(
            "{} to give, {} at a time: about {prompt_tokens:.0} tokens to read, and {generated}; a request and its answer have at most \
             {context} tokens\n",
            counted(answers, "answer"),
            self.sequences
        );
        let Some((rates, width, whole)) = &self.measured else { return text };
        let rate = |rate: f64| format!("{}/s", Bytes(rate as u64));
        let bound = match width.bound {
            StepBound::Drive => "the drive",
            StepBound::Memory => "the memory",
            StepBound::Arithmetic => "the arithmetic",
        };
        text += &format!(
            "a step of {}: drive {} ({}), memory {} ({}), arithmetic {} ({:.0} GOP/s); it uses some {:.0} different experts, {:.0} % of \
             them in memory\n{bound} bounds it: {:.2} tokens/s at most, so everything takes at least {} if all answers \
             are so long\n",
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
            seconds(*whole),
        );
        text
    }
}

/// From how many new tokens on it pays to save each of so many sequences, by the rates of an ordinary machine.
pub(crate) fn worth_saving(args: &EngineArgs, file: &ModelFile, load: &Load, sequences: usize) -> Option<usize> {
    let drive = calibrated(file.path()).unwrap_or(ASSUMED);
    let rates = Rates { drive, memory: ASSUMED_MEMORY, arithmetic: ASSUMED_ARITHMETIC };
    let width = Width::of(file, args.budget, args.kv_type, load, &rates, sequences)?;
    width.worth_saving(file, load, &rates, args.kv_type)
}

/// How much there is to do; lines that are no requests are none of it. `context`: most tokens of a request and its answer, if somebody
/// says so.
pub(crate) fn load(file: &ModelFile, path: &Path, index: &Index, context: Option<usize>) -> Result<Load, CliError> {
    let tokenizer = crate::engine_args::tokenizer(file)?;
    let (mean, most) = tokens_per_byte(path, index, tokenizer.as_ref())?;
    let needed = |entry: &Entry| {
        let answer = entry.wanted.max_tokens.map_or(LONG_ANSWER, f64::from);
        f64::from(entry.wanted.text_bytes) * most + TEMPLATE + answer
    };
    let requests = || index.entries.iter().filter(|entry| entry.wanted.answers > 0);
    let needed = requests().map(needed).fold(1.0, f64::max) as usize;
    let context = context.unwrap_or_else(|| needed.next_multiple_of(STEP)).min(file.spec().max_positions.max(1));
    let mut load = Load { answers: 0, prompt_tokens: 0.0, answer_tokens: 0.0, unlimited: 0, context };
    for entry in requests() {
        let answers = entry.wanted.answers as usize;
        let prompt = (f64::from(entry.wanted.text_bytes) * mean).min(context as f64);
        let room = context as f64 - prompt;
        load.answers += answers;
        // Answers to one prompt share what was read of it.
        load.prompt_tokens += prompt;
        load.answer_tokens += answers as f64 * entry.wanted.max_tokens.map_or(USUAL_ANSWER, f64::from).min(room);
        load.unlimited += if entry.wanted.max_tokens.is_none() { answers } else { 0 };
    }
    // These are estimates: fractions of tokens would only look precise.
    (load.prompt_tokens, load.answer_tokens) = (load.prompt_tokens.round(), load.answer_tokens.round());
    Ok(load)
}

/// Tokens of a byte of the requests' texts: in the mean, and the most.
fn tokens_per_byte(path: &Path, index: &Index, tokenizer: Option<&Tokenizer>) -> Result<(f64, f64), CliError> {
    /// What token ids in JSON take.
    const IDS: f64 = 0.5;
    let Some(tokenizer) = tokenizer else { return Ok((IDS, IDS)) };
    let requests = File::open(path).map_err(CliError::file(path, "read the requests"))?;
    let mut longest: Vec<&Entry> = index.entries.iter().collect();
    longest.sort_by_key(|entry| std::cmp::Reverse(entry.wanted.text_bytes));
    longest.truncate(LONGEST);
    let others = index.entries.iter().step_by(index.entries.len().div_ceil(OTHERS).max(1));
    let (mut bytes, mut tokens, mut most) = (0, 0, 0.0_f64);
    for entry in longest.into_iter().chain(others) {
        let Some(length) = entry.bytes else { continue };
        let mut line = vec![0; length as usize];
        requests.read_exact_at(&mut line, entry.offset).map_err(CliError::file(path, "read the requests"))?;
        // What is wrong with a line is said in its result.
        let Ok(line) = Line::parse(&line, entry.line as usize) else { continue };
        let text = line.text();
        let end = (0..=text.len().min(LOOK)).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        let Ok(ids) = tokenizer.encode(&text[..end], false) else { continue };
        if end > 0 {
            (bytes, tokens) = (bytes + end, tokens + ids.len());
            most = most.max(ids.len() as f64 / end as f64);
        }
    }
    // A short text says little, and token ids in JSON are not what is read.
    Ok(if bytes == 0 { (IDS, IDS) } else { (tokens as f64 / bytes as f64, most.max(IDS / 2.0)) })
}

/// What this machine does in a second: the drive by its calibration if there is one, the rest measured.
fn rates(args: &EngineArgs, file: &ModelFile) -> Result<Rates, CliError> {
    let drive = match calibrated(file.path()).filter(|_| !args.no_calibration) {
        Some(rate) => rate,
        None => measured_drive(file.path()).unwrap_or_else(|_| {
            note(&format_args!(
                "note: {} is too small, or on no drive, to measure how fast it is read: the plan assumes {}/s",
                file.path().display(),
                Bytes(ASSUMED as u64)
            ));
            ASSUMED
        }),
    };
    let threads = args.options(1).threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into));
    let (memory, arithmetic) = machine(file, ThreadPool::new(threads).threads())?;
    Ok(Rates { drive, memory, arithmetic })
}

/// Bytes per second of the drive below a file, from some reads of it.
fn measured_drive(path: &Path) -> Result<f64, CliError> {
    let mut drive = Drive::open(path, &IoConfig::default())?;
    drive.visit()?;
    Ok(drive.median())
}

/// Bytes per second of the drive below a file, as `sluice bench disk` has found them.
fn calibrated(path: &Path) -> Option<f64> {
    let file = DataFile::open(path, DirectMode::Never).ok()?;
    let device = DeviceId::of(&file).ok()?;
    let found = CalibrationStore::of_user().ok()?.find(&device).ok()??;
    Some(found.bytes_per_second)
}
