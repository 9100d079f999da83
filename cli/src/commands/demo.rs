//! `sluice demo`: a small real model, from checkpoint to text, in seconds.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use sluice_converter::{Options, TypeChoice, convert};
use sluice_format::{ModelFile, TOKENIZER_BLOB, WeightType};
use sluice_generate::sampler::SamplerConfig;
use sluice_generate::{SchedulerOptions, WhenFull};
use sluice_model::memory::{Bytes, Demand, MemoryPlan};
use sluice_model::{Engine, EngineOptions, KvType};
use sluice_text::{Special, StopCondition, Tokenizer};

use crate::commands::convert::Bar;
use crate::commands::verify;
use crate::error::CliError;
use crate::generate::{Generation, Request, generate};
use crate::progress::byte_bar;
use crate::stage::Stage;
use crate::terminal::{counted, is_coloured, print, print_as_is, print_text, printable, seconds};

const EXAMPLES: &str = "\
The model has 5.1 million weights, the architecture of DeepSeek-V3, and has read Shakespeare: its verse scans \
and says little. It is part of the program; nothing is downloaded.

Examples:
  sluice demo
  sluice demo --keep demo/
  sluice run demo/demo.sluice --prompt 'JULIET:'";

/// Files of the demo checkpoint, in the layout of Hugging Face.
const CHECKPOINT: [(&str, &[u8]); 5] = [
    ("config.json", include_bytes!("../../../tests/fixtures/demo-model/config.json")),
    ("generation_config.json", include_bytes!("../../../tests/fixtures/demo-model/generation_config.json")),
    ("model.safetensors", include_bytes!("../../../tests/fixtures/demo-model/model.safetensors")),
    ("tokenizer.json", include_bytes!("../../../tests/fixtures/demo-model/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../../tests/fixtures/demo-model/tokenizer_config.json")),
];

const PROMPT: &str = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n";
const TOKENS: usize = 96;
const SEED: u64 = 1;
/// The cache holds one expert in this many.
const CACHE_FRACTION: u64 = 3;

/// Convert, verify and run a small built-in model with an expert cache smaller than the model
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Keep checkpoint and model file in this folder instead of a temporary one; other files in it are not changed
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let temporary;
    let folder = match &args.keep {
        Some(folder) => folder.as_path(),
        None => {
            temporary = tempfile::Builder::new()
                .prefix("sluice-demo-")
                .tempdir()
                .map_err(CliError::file(&std::env::temp_dir(), "create a folder in it"))?;
            temporary.path()
        }
    };
    let show = Show { bold: is_coloured(&io::stdout()) };
    show.line("Sluice demo: a mixture of experts, streamed from the drive", "")?;
    let (checkpoint, model) = (folder.join("checkpoint"), folder.join("demo.sluice"));
    check_folder(&checkpoint, &model)?;
    unpack(&show, &checkpoint)?;
    convert_and_verify(&show, &checkpoint, &model)?;
    match Stage::new() {
        Some(mut stage) => perform(&show, &mut stage, &model)?,
        None => {
            let streamed = stream(&show, &model)?;
            compare(&show, &model, &streamed)?;
        }
    }
    if args.keep.is_some() {
        let model = model.display();
        show.line("Kept", &format!("{model}; continue with: sluice run {model} --prompt 'JULIET:'"))?;
    }
    Ok(())
}

/// Commands to try next.
const NEXT: [(&str, &str); 3] = [
    ("sluice plan deepseek-r1", "what a large one needs here"),
    ("sluice convert hf:Qwen/Qwen3-30B-A3B qwen.sluice", "a file of one"),
    ("sluice chat qwen.sluice", "and you talk with it"),
];

fn next((command, what): &(&str, &str)) -> String {
    format!("{command}  # {what}")
}

/// Both runs on one stage: first with a small cache, then with everything in memory.
fn perform(show: &Show, stage: &mut Stage, model: &Path) -> Result<(), CliError> {
    let context = PROMPT.len() + TOKENS;
    let budget = small_budget(model, context)?;
    let small = EngineOptions { budget: Some(budget), context: Some(context), ..EngineOptions::default() };
    let mut engine = Engine::open(model, &small)?;
    show.line("Run", &format!("budget {}, reads: {}", Bytes(budget), engine.read_engine()))?;
    let streamed = speak_on(stage, "a third of the experts fits", &mut engine)?;
    drop(engine);
    let mut engine = Engine::open(model, &EngineOptions { context: Some(context), ..EngineOptions::default() })?;
    let resident = speak_on(stage, "the same with all in memory", &mut engine)?;
    check_same(&resident.0, &streamed.0)?;
    let (tokens, fast, slow) = (resident.0.ids.len(), resident.1, streamed.1);
    show.line("Check", &format!("the same {tokens} tokens: {slow:.0} per second streamed, {fast:.0} in memory"))?;
    show.line("Next", &next(&NEXT[0]))?;
    NEXT[1..].iter().try_for_each(|command| show.more(&next(command)))
}

/// Generates on a stage. Returns the tokens, and tokens per second without the time for showing them.
fn speak_on(stage: &mut Stage, title: &'static str, engine: &mut Engine) -> Result<(Generation, f64), CliError> {
    stage.begin(title, PROMPT, engine);
    stage.draw(engine)?;
    let before = engine.stats();
    let done = speak(engine, &mut |engine, text| {
        stage.say(text);
        stage.draw(engine)
    })?;
    let after = engine.stats();
    let seconds = after.seconds - before.seconds;
    let tokens = (after.tokens - before.tokens) as f64;
    Ok((done, if seconds > 0.0 { tokens / seconds } else { 0.0 }))
}

/// What the demo prints.
struct Show {
    bold: bool,
}

impl Show {
    fn line(&self, title: &str, rest: &str) -> Result<(), CliError> {
        let title = if rest.is_empty() { title.to_owned() } else { format!("{title:<10}") };
        let (on, off) = if self.bold { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
        print_as_is(format!("{on}{title}{off} {}", printable(&rest)).trim_end())?;
        print_as_is("\n")
    }

    fn more(&self, rest: &str) -> Result<(), CliError> {
        print(&format!("{:<10} {rest}\n", ""))
    }
}

/// Refuses a folder in which something would be lost: files with the demo's names that are not the demo's.
fn check_folder(checkpoint: &Path, model: &Path) -> Result<(), CliError> {
    let foreign = |path: &Path| {
        let path = path.display();
        CliError::Usage(format!("{path} is there already and is not the demo's: choose another folder, or move it"))
    };
    for (name, bytes) in CHECKPOINT {
        let path = checkpoint.join(name);
        if path.symlink_metadata().is_ok() && !holds(&path, bytes) {
            return Err(foreign(&path));
        }
    }
    // An earlier demo's model file is used again, if it is complete and was made from this checkpoint.
    if model.symlink_metadata().is_ok() && !is_demo(model) {
        return Err(foreign(model));
    }
    Ok(())
}

/// Whether a regular file has exactly these bytes.
fn holds(path: &Path, bytes: &[u8]) -> bool {
    let same_length = path.symlink_metadata().is_ok_and(|m| m.is_file() && m.len() == bytes.len() as u64);
    same_length && fs::read(path).is_ok_and(|found| found == bytes)
}

/// Whether a regular file is a model file whose configuration and tokenizer are the demo's.
fn is_demo(path: &Path) -> bool {
    let is_file = path.symlink_metadata().is_ok_and(|m| m.is_file());
    let Some(file) = ModelFile::open(path).ok().filter(|_| is_file) else { return false };
    let own = |(name, bytes): (&str, &[u8])| file.metadata().get(name).is_none_or(|blob| blob == bytes);
    file.metadata().get(TOKENIZER_BLOB).is_some() && CHECKPOINT.into_iter().all(own)
}

fn unpack(show: &Show, checkpoint: &Path) -> Result<(), CliError> {
    fs::create_dir_all(checkpoint).map_err(CliError::file(checkpoint, "create it"))?;
    for (name, bytes) in CHECKPOINT {
        let path = checkpoint.join(name);
        if holds(&path, bytes) {
            continue;
        }
        // Created as a new file, so that neither a file that appeared meanwhile nor the target of a link is overwritten.
        let written = fs::File::create_new(&path).and_then(|mut file| file.write_all(bytes));
        written.map_err(CliError::file(&path, "write it"))?;
    }
    let total: usize = CHECKPOINT.iter().map(|(_, bytes)| bytes.len()).sum();
    show.line("Unpack", &format!("DeepSeek-V3 architecture, 5.1 million weights in bf16: {}", Bytes(total as u64)))
}

fn convert_and_verify(show: &Show, checkpoint: &Path, model: &Path) -> Result<(), CliError> {
    let q8 = TypeChoice::Type(WeightType::Q8);
    let options = Options { expert_type: q8, dense_type: q8, overwrite: true, ..Options::default() };
    let started = Instant::now();
    let bar = Bar(byte_bar("converting", 0));
    let outcome = convert(checkpoint, model, &options, &bar);
    bar.0.finish_and_clear();
    let summary = outcome?;
    let elapsed = seconds(started.elapsed().as_secs_f64());
    show.line(
        "Convert",
        &format!("to 8 bits, one file, one extent per expert: {} in {elapsed}", Bytes(summary.file_bytes)),
    )?;

    let started = Instant::now();
    let file = ModelFile::open(model)?;
    let damaged = verify::damage(&file);
    if let Some(damage) = damaged.first() {
        return Err(CliError::Failure(format!(
            "{}: {} is damaged right after it was written",
            model.display(),
            damage.extent
        )));
    }
    let extents = file.extents().len();
    let elapsed = seconds(started.elapsed().as_secs_f64());
    show.line("Verify", &format!("{extents} extents, every checksum matches ({elapsed})"))
}

/// Memory for everything except experts, and for a part of the experts.
fn small_budget(model: &Path, context: usize) -> Result<u64, CliError> {
    let file = ModelFile::open(model)?;
    let all =
        MemoryPlan::new(&file, None, Demand::one(context, KvType::F32)).map_err(sluice_model::RuntimeError::from)?;
    let cache = all.slot_len * all.experts as u64 / CACHE_FRACTION;
    Ok(all.dense + all.kv_cache + all.scratch + cache)
}

fn stream(show: &Show, model: &Path) -> Result<Generation, CliError> {
    // Includes room for the prompt, whatever its length in tokens: it has fewer tokens than bytes.
    let context = PROMPT.len() + TOKENS;
    let budget = small_budget(model, context)?;
    let options = EngineOptions { budget: Some(budget), context: Some(context), ..EngineOptions::default() };
    let mut engine = Engine::open(model, &options)?;
    let memory = engine.memory().clone();
    show.line(
        "Run",
        &format!(
            "budget {}: room for {} of {} experts of {}",
            Bytes(budget),
            memory.slots,
            memory.experts,
            Bytes(memory.slot_len)
        ),
    )?;
    show.more(&format!("reads: {}", engine.read_path()))?;
    show.more(&format!("kernels: {}, {}", engine.isa(), counted(engine.threads(), "thread")))?;
    print(&format!("\n    {}", indent(PROMPT)))?;
    let done = speak(&mut engine, &mut |_, text| print_text(&indent(text)))?;
    print("\n\n")?;
    let decode = &done.decode;
    show.line(
        "Speed",
        &format!("{:.0} tokens/s ({} tokens in {})", decode.tokens_per_second, decode.tokens, seconds(decode.seconds)),
    )?;
    show.line(
        "Experts",
        &format!(
            "{} used: {} found in memory ({:.0} %), {} streamed from the drive",
            decode.hits + decode.misses,
            decode.hits,
            100.0 * decode.hit_rate.unwrap_or(0.0),
            decode.misses
        ),
    )?;
    show.more(&format!(
        "{} streamed, {} per token; each extent checked by its checksum",
        Bytes(decode.expert_bytes_read),
        Bytes(decode.expert_bytes_read_per_token as u64)
    ))?;
    Ok(done)
}

/// Generates again with all experts in memory: memory determines the speed, never the text.
fn compare(show: &Show, model: &Path, streamed: &Generation) -> Result<(), CliError> {
    let context = PROMPT.len() + TOKENS;
    let mut engine = Engine::open(model, &EngineOptions { context: Some(context), ..EngineOptions::default() })?;
    let resident = speak(&mut engine, &mut |_, _| Ok(()))?;
    check_same(&resident, streamed)?;
    let speed = resident.decode.tokens_per_second;
    show.line(
        "Check",
        &format!("the same {} tokens with all experts in memory ({speed:.0} tokens/s)", resident.ids.len()),
    )
}

fn check_same(resident: &Generation, streamed: &Generation) -> Result<(), CliError> {
    if resident.ids == streamed.ids {
        return Ok(());
    }
    Err(CliError::Failure("the text depends on the size of the cache: this is a bug, please report it".into()))
}

fn speak(
    engine: &mut Engine,
    sink: &mut dyn FnMut(&Engine, &str) -> Result<(), CliError>,
) -> Result<Generation, CliError> {
    let missing = || CliError::Failure("the demo model has no tokenizer".into());
    let tokenizer = Tokenizer::of(engine.file().metadata())?.ok_or_else(missing)?;
    let prompt = tokenizer.encode(PROMPT, true)?;
    let stop = StopCondition::default();
    let request = Request {
        prompt: &prompt,
        max_tokens: TOKENS,
        sampling: SamplerConfig { temperature: 0.6, top_p: 0.9, seed: SEED, ..SamplerConfig::default() },
        stop: &stop,
        tokenizer: Some(&tokenizer),
        special: Special::Markup,
        when_full: WhenFull::Stop,
        scheduling: SchedulerOptions::default(),
    };
    generate(engine, &request, None, &mut |engine, _, text| sink(engine, text))
}

/// Sets the text off from the report.
fn indent(text: &str) -> String {
    text.replace('\n', "\n    ")
}
