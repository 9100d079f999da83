//! `sluice convert`: a Hugging Face checkpoint, in a folder or on the hub, or a GGUF file becomes one model file.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::builder::PossibleValuesParser;
use clap::builder::TypedValueParser as _;
use serde_json::{Value, json};
use sluice_calibrate::{CalibrateError, Effort, Measurement, TEXT, digest};
use sluice_converter::measure::Measure;
use sluice_converter::{
    ConvertError, KindSize, LeftOut, Options, Plan, Progress, Recipe, Summary, TypeChoice, check_destination,
    clear_remains, convert_measured, plan, settle,
};
use sluice_format::WeightType;
use sluice_hub::Reference;
use sluice_hub::models::Models;
use sluice_model::memory::Bytes;
use sluice_text::TextError;

use crate::error::CliError;
use crate::fetch::{Fetched, confirm, reference};
use crate::input::read_text;
use crate::progress::{Meter, byte_bar};
use crate::size::parse_bytes;
use crate::striping::{StripingArgs, destination, note_rounded};
use crate::terminal::{counted, note, print, print_json, seconds};
use crate::text_files::{examine, other_tokenizers};
use crate::types::{Types, is_stored};

const EXAMPLES: &str = "\
Types: keep, the default, carries the weights bit for bit. The others may change them, and the summary says by how \
much: q8 is int8 with one f16 scale per 32 weights, half of bf16 and close to lossless; q4, q3 and q2 take 4.3, 3.5 and 2.5 \
bits per weight, a quarter of bf16 and less, for experts; fp8 is DeepSeek's (e4m3, one scale per 128x128); bf16 and f32 are for reference. \
Norms, biases and routers are never quantised.

Before weights become q4, q3 or q2, a text runs through the model layer by layer, and what it shows of the inputs of each matrix \
decides how its weights are rounded. This takes room beside the model file for one layer. --effort says how much of the text is \
taken: 1024 tokens (fast), 2048 (default), or all of it (best). For models with experts, the first two are multiplied by the number of \
experts per chosen expert.

Interrupted? Run the same command again: it goes on where it stopped, and the file is the same to the bit.

hf:NAME converts straight from the Hugging Face hub. It says beforehand what that takes, and only a few files of the model are on the \
drive at once.

Examples:
  sluice convert DeepSeek-R1/ r1.sluice
  sluice convert DeepSeek-R1/ r1.sluice --dry-run
  sluice convert hf:deepseek-ai/DeepSeek-R1 r1.sluice
  sluice convert hf:Qwen/Qwen3-30B-A3B --type q4 --dense-type q8
  sluice convert hf:unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M qwen3.sluice
  sluice convert my-moe-bf16/ my-moe.sluice --type q4 --dense-type q8
  sluice convert my-moe-bf16/ my-moe.sluice --compress --split-size 50GB
  sluice convert my-moe-bf16/ my-moe.sluice --volumes /mnt/a,/mnt/b
  sluice convert my-moe-bf16/ my-moe-q3.sluice --type q3 --importance-text mine.txt --effort best
  sluice convert my-moe-bf16/ my-moe.sluice --type q4 --dense-type q8 --recipe my-moe.recipe
  sluice convert tiny/ tiny.sluice --type f32 --dense-type f32 --overwrite";

/// Convert a Hugging Face checkpoint (a folder with config.json and safetensors) or a GGUF file into a model file
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Folder of the checkpoint; GGUF file, or any part of one; or hf:OWNER/NAME for a model on the hub, with @REVISION and, for
    /// GGUF, :QUANT or :FILE
    src: PathBuf,

    /// Model file to write [default, from the hub: one in the folder of models, which `run` finds by the name]
    dst: Option<PathBuf>,

    /// Type of the routed experts [default: keep]
    #[arg(long = "type", value_name = "TYPE", value_parser = type_parser())]
    expert_type: Option<TypeChoice>,

    /// Type of everything else [default: keep]
    #[arg(long, value_name = "TYPE", value_parser = type_parser())]
    dense_type: Option<TypeChoice>,

    /// Types by pattern, which take precedence over both: a file with lines such as `layers.{0-2}.expert.* q8`; the first match
    /// counts
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,

    /// Round q4, q3 and q2 with the measurements of `sluice calibrate` or --save-importance, instead of measuring now
    #[arg(long, visible_alias = "imatrix", value_name = "FILE")]
    importance: Option<PathBuf>,

    /// Round q4, q3 and q2 without measuring the inputs of their matrices: faster, and further from the original
    #[arg(long, conflicts_with_all = ["importance", "importance_text", "save_importance"])]
    no_importance: bool,

    /// How much time measuring for q4, q3 and q2 may take: fast, default or best
    #[arg(long, value_name = "EFFORT", value_parser = effort_parser(), conflicts_with_all = ["importance", "no_importance"])]
    effort: Option<Effort>,

    /// Measure on this text, UTF-8, instead of the built-in one
    #[arg(long, value_name = "FILE", conflicts_with = "importance")]
    importance_text: Option<PathBuf>,

    /// Save the measured mean squares, for --importance
    #[arg(long, value_name = "FILE", conflicts_with = "importance")]
    save_importance: Option<PathBuf>,

    /// Leave out the layer for multi-token prediction, which is included if the checkpoint has one
    #[arg(long)]
    no_mtp: bool,

    /// Alignment of everything in the file, in bytes; 16384 for Apple silicon
    #[arg(long, value_name = "BYTES", default_value = "4096", value_parser = page_size_parser())]
    page_size: u32,

    /// Compress the weights where that saves at least 8 %, without loss: bf16 by a third, f16 and fp8 by a sixth
    #[arg(long)]
    compress: bool,

    /// Most bytes of one file, such as 50GB: a larger model becomes NAME-00001-of-00014.sluice and so on
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, conflicts_with = "volumes")]
    split_size: Option<u64>,

    #[command(flatten)]
    striping: StripingArgs,

    /// Replace the model file if it exists, once the new one is complete; what is no model file is never replaced
    #[arg(long)]
    overwrite: bool,

    /// For a model on the hub: keep the downloaded files, as a checkpoint in DST.source
    #[arg(long)]
    keep: bool,

    /// Only report what would be written
    #[arg(long)]
    dry_run: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn type_parser() -> impl clap::builder::TypedValueParser<Value = TypeChoice> {
    PossibleValuesParser::new(["keep", "q2", "q3", "q4", "q8", "fp8", "bf16", "f32"])
        .try_map(|name| name.parse::<TypeChoice>())
}

fn effort_parser() -> impl clap::builder::TypedValueParser<Value = Effort> {
    PossibleValuesParser::new(Effort::ALL.map(Effort::name)).try_map(|name| name.parse::<Effort>())
}

fn page_size_parser() -> impl clap::builder::TypedValueParser<Value = u32> {
    PossibleValuesParser::new(["4096", "16384"]).try_map(|size| size.parse::<u32>())
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let options = Options {
        expert_type: args.expert_type.unwrap_or_default(),
        dense_type: args.dense_type.unwrap_or_default(),
        recipe: args.recipe.as_deref().map(Recipe::load).transpose()?,
        page_size: args.page_size,
        importance: args.importance.clone(),
        measured: None,
        compress: args.compress,
        split_size: args.split_size,
        striping: args.striping.striping()?,
        mtp: !args.no_mtp,
        overwrite: args.overwrite,
    };
    if let Some(reference) = reference(&args.src)? {
        return from_hub(args, &reference, &options);
    }
    if args.keep {
        return Err(CliError::Usage("--keep is for models on the hub (hf:NAME): files in a folder stay there".into()));
    }
    let Some(dst) = &args.dst else {
        let message = "name the model file to write, behind the folder of the checkpoint; only models of the hub (hf:NAME) have a \
                       place of their own";
        return Err(CliError::Usage(message.into()));
    };
    let dst = &destination(dst, options.striping.as_ref())?;
    let started = Instant::now();
    let (text, remarks) = (measured_text(args)?, Remarks::default());
    let ((), plan, mut measurement) =
        planned(&options, text.as_ref(), &args.src, &remarks, |options| Ok(((), plan(&args.src, options)?)))?;
    if let Some(summary) = settled(args, dst, &plan, measurement.as_ref())? {
        return report(args, dst, summary, remarks.0.into_inner(), started);
    }
    check(args, dst, &plan, &remarks)?;
    if args.dry_run {
        return if args.json {
            print_json(&plan_json(&plan, &options, measurement.as_ref(), remarks))
        } else {
            print(&describe_plan(&plan, args.compress, measurement.as_ref()))
        };
    }
    let bar = Bar(byte_bar("converting", 0));
    let measure = measurement.as_mut().map(|measurement| measurement as &mut dyn Measure);
    let outcome = convert_measured(&plan, dst, measure, &bar);
    bar.0.finish_and_clear();
    let summary = outcome.map_err(explain)?;
    save_importance(args, measurement.as_ref())?;
    report(args, dst, summary, remarks.0.into_inner(), started)
}

/// What an earlier run of the same command has ended in, if it was killed when the model file was complete.
fn settled(
    args: &Args,
    dst: &Path,
    plan: &Plan,
    measurement: Option<&Measurement>,
) -> Result<Option<Summary>, CliError> {
    if args.dry_run {
        return Ok(None);
    }
    let Some(summary) = settle(plan, dst, measurement.map(Measure::tokens)).map_err(explain)? else { return Ok(None) };
    summary.notes.iter().for_each(|text| note(text));
    if let Some(path) = args.save_importance.as_ref().filter(|_| measurement.is_some()) {
        note(&format_args!(
            "note: {}: what the earlier run has measured went with it. `sluice calibrate` measures the finished model; --overwrite \
             converts again",
            path.display()
        ));
    }
    Ok(Some(summary))
}

/// Prints the summary. `before`: remarks from before the conversion, which its JSON repeats.
fn report(
    args: &Args,
    dst: &Path,
    mut summary: Summary,
    mut before: Vec<String>,
    started: Instant,
) -> Result<(), CliError> {
    note_rounded(&summary.files);
    if args.json {
        before.append(&mut summary.notes);
        summary.notes = before;
        return print_json(&summary);
    }
    print(&describe(dst, &summary, started.elapsed().as_secs_f64()))
}

/// Remarks on a conversation before it begins, which its JSON repeats.
#[derive(Default)]
struct Remarks(RefCell<Vec<String>>);

impl Remarks {
    fn say(&self, text: &str) {
        note(&format_args!("note: {text}"));
        self.0.borrow_mut().push(text.to_owned());
    }

    /// All remarks, including these.
    fn and(self, more: impl IntoIterator<Item = String>) -> Vec<String> {
        let mut all = self.0.into_inner();
        all.extend(more);
        all
    }
}

/// Checks everything that can be wrong before anything is written.
fn check(args: &Args, dst: &Path, plan: &Plan, remarks: &Remarks) -> Result<(), CliError> {
    check_types(args, plan, remarks)?;
    match check_destination(plan, dst).map_err(explain) {
        Err(problem) if args.dry_run => remarks.say(&format!("the conversion itself would be refused: {problem}")),
        checked => checked.inspect_err(|_| clear_remains(plan, dst))?,
    }
    check_text(&args.src, dst, plan, remarks)
}

/// Converts directly from the hub.
fn from_hub(args: &Args, reference: &Reference, options: &Options) -> Result<(), CliError> {
    let started = Instant::now();
    let dst = match &args.dst {
        Some(dst) => destination(dst, options.striping.as_ref())?,
        None => {
            let models = Models::of_user()?;
            models.create()?;
            let path = models.path(reference, types_asked_for(args).as_deref());
            options.striping.as_ref().map_or(path.clone(), |striping| striping.destination(&path))
        }
    };
    let (text, name) = (measured_text(args)?, PathBuf::from(reference.to_string()));
    let remarks = Remarks::default();
    let plan = |options: &Options| Fetched::plan(reference, &dst, options, args.keep);
    let (fetched, plan, mut measurement) = planned(options, text.as_ref(), &name, &remarks, plan)?;
    if let Some(summary) = settled(args, &dst, &plan, measurement.as_ref())? {
        say_kept(fetched.finish(&dst)?.as_deref());
        return report(args, &dst, summary, remarks.and(fetched.bars.heard()), started);
    }
    if !args.dry_run {
        fetched.settle(&plan, &dst)?;
    }
    check(args, &dst, &plan, &remarks)?;
    if args.dry_run && args.json {
        fetched.bars.heard().into_iter().for_each(|text| remarks.0.borrow_mut().push(text));
        return print_json(&plan_json(&plan, options, measurement.as_ref(), remarks));
    }
    let facts = format!("{reference}: {}", fetched.facts(&plan, &dst, kept_bytes(measurement.as_ref()))?);
    if args.dry_run {
        return print(&format!("{facts}{}", describe_plan(&plan, args.compress, measurement.as_ref())));
    }
    note(&facts.trim_end());
    let (summary, kept) = carry_out(&fetched, &plan, &dst, measurement.as_mut())?;
    save_importance(args, measurement.as_ref())?;
    say_kept(kept.as_deref());
    report(args, &dst, summary, remarks.and(fetched.bars.heard()), started)
}

fn say_kept(kept: Option<&Path>) {
    if let Some(kept) = kept {
        note(&format_args!("what was downloaded is in {}", kept.display()));
    }
}

/// The types in the name of a file, if they are not the usual ones.
fn types_asked_for(args: &Args) -> Option<String> {
    let name = |ty: Option<TypeChoice>| match ty {
        Some(TypeChoice::Type(ty)) => Some(ty.name()),
        _ => None,
    };
    match (name(args.expert_type), name(args.dense_type)) {
        (None, None) => None,
        (experts, None) => experts.map(str::to_owned),
        (experts, Some(dense)) => Some(format!("{}-{dense}", experts.unwrap_or("keep"))),
    }
}

/// A conversion from the hub that another command needs.
pub(crate) struct Job {
    pub(crate) options: Options,
    /// Whether to ask for confirmation, once size and time are known.
    pub(crate) confirm: bool,
}

/// Converts a model on the hub to `dst`, if the user agrees, after reporting size and time.
pub(crate) fn convert_file(reference: &Reference, dst: &Path, job: &Job) -> Result<(), CliError> {
    let (name, remarks) = (PathBuf::from(reference.to_string()), Remarks::default());
    let plan = |options: &Options| Fetched::plan(reference, dst, options, false);
    let (fetched, plan, mut measurement) = planned(&job.options, Some(&Asked::default()), &name, &remarks, plan)?;
    if settle(&plan, dst, measurement.as_ref().map(Measure::tokens)).map_err(explain)?.is_some() {
        say_kept(fetched.finish(dst)?.as_deref());
        return Ok(());
    }
    check_destination(&plan, dst).map_err(explain)?;
    check_text(&name, dst, &plan, &remarks)?;
    note(&fetched.facts(&plan, dst, kept_bytes(measurement.as_ref()))?.trim_end());
    if job.confirm && !confirm("Download and convert it?")? {
        return Err(CliError::Failure("nothing was downloaded".into()));
    }
    let (summary, _) = carry_out(&fetched, &plan, dst, measurement.as_mut())?;
    note(&format_args!("{}: {}, {}", dst.display(), summary.family, Bytes(summary.file_bytes)));
    Ok(())
}

/// Downloads and converts; returns the place of files that were kept.
fn carry_out(
    fetched: &Fetched,
    plan: &Plan,
    dst: &Path,
    measurement: Option<&mut Measurement>,
) -> Result<(Summary, Option<PathBuf>), CliError> {
    fetched.begin(plan, dst, measurement.as_ref().map_or(0, |measurement| measurement.kept_bytes()))?;
    let measure = measurement.map(|measurement| measurement as &mut dyn Measure);
    let outcome = convert_measured(plan, dst, measure, &*fetched.bars);
    fetched.bars.finish();
    let summary = outcome.map_err(explain)?;
    Ok((summary, fetched.finish(dst)?))
}

/// The measurement that was requested.
struct Asked {
    text: String,
    effort: Effort,
    /// Whether the means were requested.
    means: bool,
}

impl Default for Asked {
    fn default() -> Self {
        Asked { text: TEXT.to_owned(), effort: Effort::default(), means: false }
    }
}

/// The requested measurement; `None` if nothing is measured.
fn measured_text(args: &Args) -> Result<Option<Asked>, CliError> {
    if args.no_importance || args.importance.is_some() {
        return Ok(None);
    }
    let mut asked = Asked { effort: args.effort.unwrap_or_default(), ..Asked::default() };
    asked.means = args.save_importance.is_some();
    if let Some(path) = &args.importance_text {
        asked.text = read_text(path, "read the text")?;
    }
    Ok(Some(asked))
}

/// A plan, with a measurement of the model if it has types that are rounded by importance. If the model cannot read a text, it is
/// planned again without one.
fn planned<T>(
    options: &Options,
    asked: Option<&Asked>,
    src: &Path,
    remarks: &Remarks,
    plan: impl Fn(&Options) -> Result<(T, Plan), CliError>,
) -> Result<(T, Plan, Option<Measurement>), CliError> {
    let measured = asked.map(|asked| digest(&asked.text, asked.effort));
    let (more, first) = plan(&Options { measured, ..options.clone() })?;
    let Some(asked) = asked.filter(|_| first.is_measured()) else { return Ok((more, first, None)) };
    if let Some(measurement) = Measurement::new(&first, &asked.text, asked.effort).map_err(unmeasured)? {
        let measurement = if asked.means { measurement.keeping_means() } else { measurement };
        return Ok((more, first, Some(measurement)));
    }
    remarks.say(&format!(
        "{} has no tokenizer, so nothing can be measured: weights are rounded as with --no-importance",
        src.display()
    ));
    drop(more);
    let (more, second) = plan(options)?;
    Ok((more, second, None))
}

/// Bytes that the measurement keeps from layer to layer.
fn kept_bytes(measurement: Option<&Measurement>) -> u64 {
    measurement.map_or(0, Measure::kept_bytes)
}

/// Saves the measurement, if requested.
fn save_importance(args: &Args, measurement: Option<&Measurement>) -> Result<(), CliError> {
    if let (Some(path), Some(measurement)) = (&args.save_importance, measurement) {
        measurement.importance().map_err(unmeasured)?.save(path)?;
    }
    Ok(())
}

fn unmeasured(problem: CalibrateError) -> CliError {
    CliError::Failure(format!("{problem}. --no-importance converts without measuring"))
}

/// Reads tokenizer, chat template and sampling defaults as `run` will: a conversion can take hours, and must not end in a file
/// without text. Faults that can be mended afterwards are only reported, because the conversion need not wait for that.
fn check_text(src: &Path, dst: &Path, plan: &Plan, remarks: &Remarks) -> Result<(), CliError> {
    let set = format!("sluice set {}", dst.display());
    let findings = examine(|name| plan.side_file(name), plan.spec(), &set).map_err(|e| {
        let src = src.display();
        CliError::Failure(match e {
            // This error says that the field must be corrected.
            TextError::BadConfigField { .. } => format!("{src}: {e}"),
            _ => format!("{src}: {e}. Mend the file, or remove it to convert without"),
        })
    })?;
    let has_tokenizer = ["tokenizer.json", "tiktoken.model"].iter().any(|name| plan.side_file(name).is_some());
    let other = other_tokenizers(src).filter(|_| !has_tokenizer);
    findings.notes.iter().chain(&other).for_each(|text| remarks.say(text));
    Ok(())
}

/// Refuses types and measurements that would have no effect, which the user would otherwise find out hours later.
fn check_types(args: &Args, plan: &Plan, remarks: &Remarks) -> Result<(), CliError> {
    if args.recipe.is_none() {
        let types = Types { experts: args.expert_type, dense: args.dense_type };
        types.check(&args.src, plan)?.iter().for_each(|remark| remarks.say(remark));
    }
    let weighted = [WeightType::Q4, WeightType::Q3, WeightType::Q2];
    let is_weighted = || weighted.iter().any(|&ty| is_stored(plan, true, ty) || is_stored(plan, false, ty));
    if args.importance.is_some() && !is_weighted() {
        return Err(CliError::Usage(
            "--importance (--imatrix) would change nothing: it spends the bits of q4, q3 and q2, and nothing is stored so. Ask for one with \
             --type, or leave --importance out"
                .into(),
        ));
    }
    let asked = [
        ("--importance-text", args.importance_text.is_some()),
        ("--save-importance", args.save_importance.is_some()),
        ("--effort", args.effort.is_some()),
    ];
    if let Some((option, _)) = asked.iter().find(|(_, given)| *given && !plan.is_measured()) {
        return Err(CliError::Usage(format!(
            "{option} would change nothing: nothing is measured unless weights become q4, q3 or q2 and the checkpoint has a tokenizer. See to both, or leave {option} out"
        )));
    }
    Ok(())
}

/// The same error, in terms of the command line.
pub(crate) fn explain(error: ConvertError) -> CliError {
    match error {
        ConvertError::Exists { path } => {
            let path = path.display();
            CliError::Usage(format!("{path} exists already. Choose another name, or replace it with --overwrite"))
        }
        other => other.into(),
    }
}

/// The converter's progress on the terminal.
#[derive(Debug)]
pub(crate) struct Bar(pub(crate) Meter);

impl Progress for Bar {
    fn started(&self, total_bytes: u64, already_done: u64) {
        self.0.set_length(total_bytes);
        self.0.set_position(already_done);
        // A rate that counted bytes of an earlier run would be too high.
        self.0.reset_eta();
        if already_done > 0 {
            self.note(&format!("resuming: {} of {} are there already", Bytes(already_done), Bytes(total_bytes)));
        }
    }

    fn advanced(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    fn note(&self, text: &str) {
        self.0.suspend(|| note(&text));
    }
}

/// The facts that a plan and a finished conversion share.
struct Facts<'a> {
    sizes: &'a [KindSize],
    types: &'a BTreeMap<String, Vec<String>>,
    errors: Option<&'a BTreeMap<String, f64>>,
    widened: &'a [String],
    left_out: &'a [LeftOut],
    notes: &'a [String],
}

impl Facts<'_> {
    /// For people.
    fn describe(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(out, "\n{:<12} {:>8} {:>12}", "part", "extents", "size");
        for size in self.sizes {
            let _ = writeln!(out, "{:<12} {:>8} {:>12}", size.kind, size.extents, Bytes(size.bytes).to_string());
        }
        let error = if self.errors.is_some() { "relative error" } else { "" };
        let _ = writeln!(out, "\n{}", format!("{:<28} {:<10} {error}", "tensors", "type").trim_end());
        for (group, types) in self.types {
            let error = match self.errors.map(|e| e.get(group)) {
                None => "",
                Some(None) => "none",
                Some(Some(error)) => &format!("{error:.2e}"),
            };
            let _ = writeln!(out, "{}", format!("{group:<28} {:<10} {error}", types.join(", ")).trim_end());
        }
        out.push('\n');
        for left_out in self.left_out {
            let LeftOut { reason, tensors, bytes } = left_out;
            let _ = writeln!(out, "left out: {}, {}: {reason}", counted(*tensors, "tensor"), Bytes(*bytes));
        }
        if !self.widened.is_empty() {
            let names = self.widened.join(", ");
            let _ = writeln!(out, "stored as f32, because no carried type fits them: {names}");
        }
        for note in self.notes {
            let _ = writeln!(out, "note: {note}");
        }
        out.truncate(out.trim_end().len());
        out + "\n"
    }
}

fn describe(dst: &Path, s: &Summary, elapsed: f64) -> String {
    let resumed = match s.resumed_extents {
        0 => String::new(),
        n => format!(", {} kept from an earlier run", counted(n, "extent")),
    };
    let name = match &s.files[..] {
        [first, .., last] => format!("{} to {}", first.display(), last.display()),
        _ => dst.display().to_string(),
    };
    let compressed = match 100.0 * s.stored_bytes as f64 / s.extent_bytes.max(1) as f64 {
        part if s.stored_bytes < s.extent_bytes => format!(", compressed to {part:.1} %"),
        _ => String::new(),
    };
    let head = format!(
        "{name}: {}, {}; read {}, wrote {} in {}{compressed}{resumed}\n",
        s.family,
        Bytes(s.file_bytes),
        Bytes(s.bytes_read),
        Bytes(s.bytes_written),
        seconds(elapsed),
    );
    let facts = Facts {
        sizes: &s.sizes,
        types: &s.types,
        errors: Some(&s.errors),
        widened: &s.widened,
        left_out: &s.left_out,
        // These were reported during the conversion.
        notes: &[],
    };
    head + &facts.describe()
}

fn describe_plan(plan: &Plan, compress: bool, measurement: Option<&Measurement>) -> String {
    let scratch = match plan.measuring_bytes(kept_bytes(measurement)) {
        0 => String::new(),
        scratch => format!("measuring takes up to {} beside the model file meanwhile\n", Bytes(scratch)),
    };
    let head = format!(
        "would read {} and write {}{} of {}; nothing was written\n{scratch}",
        Bytes(plan.source_bytes()),
        Bytes(plan.file_bytes()),
        if compress { ", less what compression saves," } else { "" },
        plan.spec().family,
    );
    let facts = Facts {
        sizes: &plan.sizes(),
        types: plan.types(),
        errors: None,
        widened: plan.widened(),
        left_out: plan.left_out(),
        notes: plan.notes(),
    };
    head + &facts.describe()
}

fn plan_json(plan: &Plan, options: &Options, measurement: Option<&Measurement>, remarks: Remarks) -> Value {
    json!({
        "dry_run": true,
        "family": plan.spec().family,
        "expert_type": options.expert_type,
        "dense_type": options.dense_type,
        "source_bytes": plan.source_bytes(),
        "file_bytes": plan.file_bytes(),
        "measuring_bytes": plan.measuring_bytes(kept_bytes(measurement)),
        "sizes": plan.sizes(),
        "types": plan.types(),
        "widened": plan.widened(),
        "left_out": plan.left_out(),
        "notes": remarks.and(plan.notes().iter().cloned()),
    })
}
