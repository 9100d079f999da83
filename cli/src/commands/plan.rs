//! `sluice plan`: what a model needs, and how fast it can be on a machine.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::value_parser;
use serde::Serialize;
use sluice_calibrate::{Effort, Measurement, TEXT, digest};
use sluice_converter::measure::Measure as _;
use sluice_converter::synth::{Geometry, KindTypes, Layout, Release, WeightTypes};
use sluice_converter::{self as converter, Options, TypeChoice, no_model};
use sluice_format::{
    Codec, ExtentKind, ExtentRecord, Layout as Arrangement, ModelFile, ModelSpec, PAGE_SIZES, WeightType,
};
use sluice_kernels::ThreadPool;
use sluice_lab::compression::CompressionWorth;
use sluice_lab::estimate::{Bound, HIT_RATE_SPREAD, Machine, Needs, Speed};
use sluice_lab::schedule::{Cores, Forecast, USUAL_LATENCY};
use sluice_lab::trace::Replay;
use sluice_model::KvType;
use sluice_model::memory::available_memory;

use super::bench_machine;
use super::synth::type_parser;
use super::trace;
use crate::engine_args::kv_type_parser;
use crate::error::CliError;
use crate::fetch::model_file_or;
use crate::machine::MachineFile;
use crate::size::{parse_size, parse_speed};
use crate::terminal::{counted, each, note, print, print_json, seconds};
use crate::types as asked;

const EXAMPLES: &str = "\
TARGET is a model file, a checkpoint's folder, a GGUF file, or the name of a published model (deepseek-r1, kimi-k2, glm-5, qwen3-30b, \
gpt-oss-120b, minimax-m3, llama-4-scout and so on; the error for an unknown name lists them all), or a config.json or a folder with \
nothing else. Weights are not read. What has not been converted yet is planned as `sluice convert` would write it: as published, bit for bit, unless --type and \
--dense-type say otherwise.

The speed is that of a simulated schedule of reading and computing, layer by layer, with the misses of traces of other models, or of a trace \
of this one (--trace). The bound beside it is the slower of drive and memory. Measure the machine first: \
`sluice bench disk FILE`, `sluice bench machine`.

Examples:
  sluice plan deepseek-r1
  sluice plan kimi-k2 --ram 128GiB --ssd 7GB/s --mem-bandwidth 80GB/s
  sluice plan deepseek-r1 --machine server.json
  sluice plan qwen3-30b --type q4 --dense-type q8 --ram 8GiB
  sluice plan DeepSeek-R1/
  sluice plan r1.sluice --context 16384
  sluice run r1.sluice --prompt-file letter.txt --trace r1.jsonl && sluice plan r1.sluice --trace r1.jsonl --ram 32GiB
  sluice plan deepseek-r1 --json | jq .speed.tokens_per_second";

/// Metadata besides configuration and spec, for the size of a file that does not exist.
const PROVENANCE_ROOM: usize = 1 << 10;

/// Report what a model needs, and how fast it can be on a machine
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A model file, a checkpoint, a known model, or a config.json
    target: String,

    /// Memory that is available [default: what is available here]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    ram: Option<u64>,

    /// Speed of the drive [default: as measured by `sluice bench disk`, or 3GB/s]
    #[arg(long, value_name = "SPEED", value_parser = parse_speed)]
    ssd: Option<u64>,

    /// Speed at which memory is read, or products read it [default: as measured by `sluice bench machine`, or 50GB/s]
    #[arg(long, value_name = "SPEED", value_parser = parse_speed)]
    mem_bandwidth: Option<u64>,

    /// Plan for the machine that this file describes; `sluice bench machine --out` writes such files
    #[arg(long, value_name = "FILE")]
    machine: Option<PathBuf>,

    /// Take hit rates and bursts of misses from this trace of the model (`sluice run FILE --trace TRACE`)
    #[arg(long, value_name = "TRACE")]
    trace: Option<PathBuf>,

    /// Type of the routed experts, for a model that is not a file yet [default: as published]
    #[arg(long = "type", value_name = "TYPE", value_parser = type_parser())]
    expert_type: Option<WeightType>,

    /// Type of everything else [default: as published]
    #[arg(long, value_name = "TYPE", value_parser = type_parser())]
    dense_type: Option<WeightType>,

    /// Context, in tokens [default: 4096, or the model's limit]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
    context: Option<u32>,

    /// Type of keys and values
    #[arg(long, value_name = "TYPE", default_value_t, value_parser = kv_type_parser())]
    kv_type: KvType,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The report. All sizes in bytes.
#[derive(Debug, Serialize)]
struct Report {
    target: String,
    family: String,
    layers: usize,
    moe_layers: usize,
    /// Types of the routed experts and of the rest, except for parts that are always plain.
    expert_types: Vec<&'static str>,
    dense_types: Vec<&'static str>,
    /// Why it has these types.
    types_from: String,
    context: usize,
    kv_type: &'static str,
    disk_bytes: u64,
    /// Additional bytes on the drive during the conversion.
    measuring_bytes: u64,
    #[serde(flatten)]
    needs: Needs,
    machine: Machine,
    /// The source of its speeds.
    speeds_from: String,
    /// Compression of experts, if it shortens their type.
    compression: Option<Compression>,
    /// The bounds; none when the memory does not suffice.
    speed: Option<Speed>,
    /// What to expect within them: the simulated schedule.
    forecast: Option<Forecast>,
    /// The file that describes the machine, if it is another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    machine_file: Option<PathBuf>,
    /// The trace that its misses come from, if one of this model was given.
    trace: Option<PathBuf>,
    warnings: Vec<String>,
}

/// Whether experts are compressed, and what compression is worth on this machine.
#[derive(Debug, Serialize)]
struct Compression {
    done: bool,
    #[serde(flatten)]
    worth: CompressionWorth,
}

impl Args {
    /// Replaces a name on the hub by the model file that was made from it.
    pub(crate) fn find_model(&mut self) -> Result<(), CliError> {
        // A published model goes before a file in the folder of models.
        if Geometry::presets().any(|name| name == self.target) {
            return Ok(());
        }
        let file = model_file_or(Path::new(&self.target))?;
        if let Some(found) = file.to_str().filter(|found| *found != self.target) {
            found.clone_into(&mut self.target);
        }
        Ok(())
    }
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let target = Path::new(&args.target);
    let report = if target.is_dir() && has_weights(target) || is_gguf(target) {
        of_checkpoint(args)?
    } else if is_geometry(&args.target) {
        of_geometry(args)?
    } else {
        of_file(args)?
    };
    if args.json { print_json(&report) } else { print(&describe(&report)) }
}

/// Anything that is not a known name, a folder or a `.json` file is taken for a model file.
fn is_geometry(target: &str) -> bool {
    let path = Path::new(target);
    Geometry::presets().any(|name| name == target)
        || path.is_dir()
        || path.extension().is_some_and(|e| e == "json")
        || !path.exists()
}

/// Whether a folder has files of weights; the converter examines them.
fn has_weights(folder: &Path) -> bool {
    let is_weights = |name: &str| name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
    let mut entries = folder.read_dir().into_iter().flatten().flatten();
    entries.any(|entry| entry.file_name().to_str().is_some_and(is_weights))
}

/// Whether its name is that of a GGUF file; the converter examines its contents.
fn is_gguf(target: &Path) -> bool {
    target.is_file() && target.extension().is_some_and(|e| e == "gguf")
}

/// Plans exactly what `convert` would write. If `convert` would refuse the checkpoint, it is planned from its `config.json`, with a
/// warning.
fn of_checkpoint(args: &Args) -> Result<Report, CliError> {
    // Types such as int4 can be carried, but not requested; those are planned from the configuration.
    let choice = |ty: Option<WeightType>| ty.map_or(Some(TypeChoice::Keep), |ty| ty.name().parse().ok());
    let (Some(expert_type), Some(dense_type)) = (choice(args.expert_type), choice(args.dense_type)) else {
        return of_geometry(args);
    };
    let measured = Some(digest(TEXT, Effort::default()));
    let options = Options { expert_type, dense_type, measured, ..Options::default() };
    let target = Path::new(&args.target);
    match converter::plan(target, &options) {
        Ok(plan) => {
            let remark = asked(args).check(target, &plan)?;
            let names = |kinds: &[ExtentKind]| plan.weight_types(kinds).into_iter().map(WeightType::name).collect();
            let types = Types {
                experts: names(&[ExtentKind::Expert]),
                dense: names(DENSE),
                from: "what `sluice convert` would write of this checkpoint".into(),
            };
            let mut report = report(args, plan.spec(), plan.extents(), plan.file_bytes(), types)?;
            report.measuring_bytes = measuring_bytes(&plan);
            report.warnings.extend(remark);
            Ok(report)
        }
        // It has no `config.json`.
        Err(refused) if is_gguf(target) => Err(refused.into()),
        Err(refused) => {
            let mut report = of_geometry(args)?;
            report
                .warnings
                .insert(0, format!("planned from config.json alone, since the checkpoint is refused: {refused}"));
            Ok(report)
        }
    }
}

/// The requested types, as `convert` knows them.
fn asked(args: &Args) -> asked::Types {
    let choice = |ty: Option<WeightType>| ty.map(TypeChoice::Type);
    asked::Types { experts: choice(args.expert_type), dense: choice(args.dense_type) }
}

/// Additional bytes on the drive during a conversion that measures the model. A model whose tokenizer is not understood is not
/// measured; `convert` reports what is wrong with it.
fn measuring_bytes(plan: &converter::Plan) -> u64 {
    let measurement = plan.is_measured().then(|| Measurement::new(plan, TEXT, Effort::default()).ok().flatten());
    measurement.flatten().map_or(0, |measurement| plan.measuring_bytes(measurement.kept_bytes()))
}

fn of_geometry(args: &Args) -> Result<Report, CliError> {
    let geometry = Geometry::load(&args.target, None)?;
    let spec = geometry.spec();
    let release = geometry.release();
    // A model that was never released is as `synth` makes it.
    let usual = WeightTypes { experts: geometry.usual_expert_type(), dense: WeightType::Q8 };
    let kept = release.map_or_else(|| usual.by_kind(), |r| r.types);
    let types = KindTypes {
        experts: args.expert_type.unwrap_or(kept.experts),
        dense: args.dense_type.unwrap_or(kept.dense),
        head: args.dense_type.unwrap_or(kept.head),
        plain: args.dense_type.filter(|ty| *ty == WeightType::F32).unwrap_or(kept.plain),
    };
    let layout = Layout::by_kind(spec, types, PAGE_SIZES[0])?;
    let disk_bytes = layout.file_bytes(spec.to_json().len() + geometry.config().len() + PROVENANCE_ROOM);
    let mut dense = vec![types.dense.name()];
    dense.extend(Some(types.head.name()).filter(|head| *head != types.dense.name()));
    let has_experts = layout.extents().iter().any(|e| e.kind == ExtentKind::Expert);
    let remark = asked(args).check_experts(Path::new(&args.target), has_experts)?;
    let types = Types { experts: vec![types.experts.name()], dense, from: types_from(args, release) };
    let mut report = report(args, spec, layout.extents(), disk_bytes, types)?;
    report.warnings.extend(remark);
    Ok(report)
}

/// Why a model that is not a file yet is planned with these types.
fn types_from(args: &Args, release: Option<Release>) -> String {
    let kept = match release {
        None => "as `sluice synth` makes it".to_owned(),
        Some(Release { form, said: true, .. }) => format!("as published, {form}, which `sluice convert` keeps"),
        Some(Release { form, said: false, .. }) => {
            format!("as published, which `sluice convert` keeps; {form} is assumed, since config.json does not say")
        }
    };
    match (args.expert_type, args.dense_type) {
        (None, None) => kept,
        (Some(_), Some(_)) => "as requested".to_owned(),
        (Some(_), None) => format!("experts as requested, the rest {kept}"),
        (None, Some(_)) => format!("experts {kept}; the rest as requested"),
    }
}

fn of_file(args: &Args) -> Result<Report, CliError> {
    if args.expert_type.is_some() || args.dense_type.is_some() {
        let target = &args.target;
        return Err(CliError::Usage(format!("{target} is a model file, so its types are fixed: leave out --type")));
    }
    let path = Path::new(&args.target);
    if let Some(error) = no_model(path) {
        return Err(error.into());
    }
    let file = ModelFile::open(path)?;
    let types = |kinds: &[ExtentKind]| {
        let matrices = file.tensors().iter().filter(|t| kinds.contains(&t.kind) && t.layout != Arrangement::Plain);
        let types: BTreeSet<WeightType> = matrices.map(|t| t.weight_type).collect();
        types.into_iter().map(WeightType::name).collect::<Vec<_>>()
    };
    let types = Types { experts: types(&[ExtentKind::Expert]), dense: types(DENSE), from: "those of the file".into() };
    report(args, file.spec(), file.extents(), file.file_bytes(), types)
}

/// Kinds of extents that are neither experts nor always plain.
const DENSE: &[ExtentKind] = &[ExtentKind::Attention, ExtentKind::Dense, ExtentKind::Head];

/// Names of types, and why they are these.
struct Types {
    experts: Vec<&'static str>,
    dense: Vec<&'static str>,
    from: String,
}

fn report(
    args: &Args,
    spec: &ModelSpec,
    extents: &[ExtentRecord],
    disk_bytes: u64,
    types: Types,
) -> Result<Report, CliError> {
    let context = (args.context.unwrap_or(4096) as usize).clamp(1, spec.max_positions.max(1));
    if args.context.is_some_and(|asked| asked as usize > context) {
        note(&format_args!("note: this is for {context} tokens of context, the most that the model takes"));
    }
    let needs = Needs::of(spec, extents, context, args.kv_type);
    let (machine, cores, speeds_from) = machine(args, &needs, &types)?;
    let speed = Speed::of(spec, extents, machine, context, args.kv_type);
    let forecast = match &speed {
        Ok(speed) => Some(forecast(args, (spec, extents), (&machine, &cores), speed, context)?),
        Err(_) => None,
    };
    let speed = match (speed, &forecast) {
        (Ok(speed), Some(forecast)) if args.trace.is_some() && speed.curve.is_some() => {
            Ok(speed.with_hit_rate(&needs, machine, forecast.hit_rate))
        }
        (speed, _) => speed,
    };
    let warnings = warnings(&needs, &speed);
    let compression = compression(spec, extents, &types.experts);
    Ok(Report {
        target: args.target.clone(),
        family: spec.family.clone(),
        layers: spec.layers.len(),
        moe_layers: spec.layers.iter().filter(|l| l.ffn.moe.is_some()).count(),
        expert_types: types.experts,
        dense_types: types.dense,
        types_from: types.from,
        context,
        kv_type: args.kv_type.name(),
        disk_bytes,
        measuring_bytes: 0,
        needs,
        machine,
        speeds_from,
        compression,
        speed: speed.ok(),
        forecast,
        machine_file: args.machine.clone(),
        trace: args.trace.clone(),
        warnings,
    })
}

/// The simulated schedule, with the misses of the trace that was given, or else of other models.
fn forecast(
    args: &Args,
    model: (&ModelSpec, &[ExtentRecord]),
    machine: (&Machine, &Cores),
    speed: &Speed,
    context: usize,
) -> Result<Forecast, CliError> {
    let of = |replay: Option<&Replay>| Forecast::of(model, machine, speed, (context, args.kv_type), replay);
    let Some(path) = &args.trace else { return Ok(of(None).expect("without a trace there is always a forecast")) };
    let experts = model.0.layers.iter().filter_map(|layer| layer.ffn.moe.as_ref()).map(|moe| moe.experts as u32).max();
    let replay = Replay::new(&trace::open(path)?, experts).map_err(CliError::replay(path))?;
    of(Some(&replay)).ok_or_else(|| {
        let (name, model) = (path.display(), &args.target);
        CliError::Usage(format!(
            "{name} is no trace of {model}, or has no generated tokens: `sluice run {model} --trace {name}` records one"
        ))
    })
}

/// Usual speeds of a drive and of memory, where nothing was measured, in bytes per second.
const USUAL_DRIVE: u64 = 3_000_000_000;
const USUAL_MEMORY: u64 = 50_000_000_000;

/// The machine to plan for, and where its speeds come from. What is asked for goes first, then what was measured.
fn machine(args: &Args, needs: &Needs, types: &Types) -> Result<(Machine, Cores, String), CliError> {
    let measured = match (&args.machine, MachineFile::of_user().filter(|path| path.exists())) {
        (Some(path), _) => Some((MachineFile::load(path)?, path.display().to_string())),
        (None, None) => None,
        (None, Some(path)) => match MachineFile::load(&path) {
            Ok(machine) => Some((machine, "`sluice bench machine`".to_owned())),
            Err(error) => {
                note(&format_args!("note: {error}"));
                None
            }
        },
    };
    let target = Path::new(&args.target);
    // The drive of the model, if this is its machine.
    let own = if args.machine.is_none() && target.is_file() { bench_machine::drive(target)? } else { None };
    let of_file = measured.as_ref().map(|(machine, _)| machine);
    let kept = of_file.and_then(|file| Some((file.drive_bytes_per_second?, file.drive_latency_seconds)));
    let known = own.map(|own| (own.bytes_per_second, own.latency)).or(kept);
    let drive = known.map(|(rate, _)| rate as u64);
    // Of a drive that is not there, only its speed was said.
    let latency = known.filter(|_| args.ssd.is_none()).and_then(|(_, latency)| latency);
    let first = |types: &[&'static str]| types.first().copied();
    let experts = (needs.token_cycle_bytes, first(&types.experts));
    let memory = of_file.map(|machine| machine.weights_per_second(experts, (needs.dense_bytes, first(&types.dense))));
    let ram = args.ram.or_else(|| args.machine.as_ref().and(of_file).map(MachineFile::memory));
    let source = measured.as_ref().map(|(_, source)| source.as_str());
    let drive_source = own.map(|_| "`sluice bench disk`").or(source.filter(|_| drive.is_some()));
    let speeds_from = speeds_from(
        SpeedFrom::of(args.ssd.is_some(), drive_source),
        SpeedFrom::of(args.mem_bandwidth.is_some(), source),
        of_file.is_some_and(|file| types.experts.iter().chain(&types.dense).all(|ty| file.knows(ty))),
    );
    let machine = Machine {
        ram: ram.unwrap_or_else(available_memory),
        ssd: args.ssd.or(drive).unwrap_or(USUAL_DRIVE),
        ssd_latency: latency.unwrap_or(USUAL_LATENCY),
        memory_bandwidth: args.mem_bandwidth.or(memory.map(|rate| rate.round() as u64)).unwrap_or(USUAL_MEMORY),
    };
    // A speed that is asked for is that of everything, and of nothing more is known where nothing was measured.
    let cores = match of_file.filter(|_| args.mem_bandwidth.is_none()) {
        Some(file) => {
            let cores = file.cores(first(&types.experts), first(&types.dense));
            // How bursts fare was found on another drive than one whose speed was said.
            Cores { burst_latency: cores.burst_latency.filter(|_| args.ssd.is_none()), ..cores }
        }
        None => Cores::of_rate(machine.memory_bandwidth as f64),
    };
    Ok((machine, cores, speeds_from))
}

/// Where a speed comes from.
#[derive(Clone, Copy, Debug)]
enum SpeedFrom<'a> {
    Asked,
    Measured(&'a str),
    Assumed,
}

impl<'a> SpeedFrom<'a> {
    fn of(asked: bool, measured: Option<&'a str>) -> Self {
        if asked { SpeedFrom::Asked } else { measured.map_or(SpeedFrom::Assumed, SpeedFrom::Measured) }
    }
}

/// Where the speeds of drive and memory come from, in words; and whether products with weights of the model's types were measured.
fn speeds_from(drive: SpeedFrom<'_>, memory: SpeedFrom<'_>, products: bool) -> String {
    if let (SpeedFrom::Assumed, SpeedFrom::Assumed) = (drive, memory) {
        return "assumed: `sluice bench disk` and `sluice bench machine` measure them".into();
    }
    let drive = match drive {
        SpeedFrom::Asked => "as requested".into(),
        SpeedFrom::Measured(source) => format!("measured ({source})"),
        SpeedFrom::Assumed => "assumed (`sluice bench disk` measures it)".to_owned(),
    };
    let memory = match memory {
        SpeedFrom::Asked => "as requested".into(),
        SpeedFrom::Measured(source) if products => {
            format!("and cores, with weights of these types, measured ({source})")
        }
        SpeedFrom::Measured(source) => format!("measured ({source}), but not with weights of all these types"),
        SpeedFrom::Assumed => "assumed (`sluice bench machine` measures it)".to_owned(),
    };
    format!("drive {drive}, memory {memory}")
}

/// What compression of the experts is, or would be, worth here; `None` for types that it does not shorten.
fn compression(spec: &ModelSpec, extents: &[ExtentRecord], types: &[&str]) -> Option<Compression> {
    spec.layers.iter().find(|l| l.ffn.moe.is_some())?;
    // If the experts do not share one type, there is no simple answer.
    let &[ty] = types else { return None };
    let threads = ThreadPool::new(std::thread::available_parallelism().map_or(1, Into::into));
    let worth = CompressionWorth::of_type(ty.parse().ok()?, &threads)?;
    let done = extents.iter().any(|e| e.kind == ExtentKind::Expert && e.codec != Codec::Raw);
    Some(Compression { done, worth })
}

fn warnings(needs: &Needs, speed: &Result<Speed, sluice_model::memory::BudgetError>) -> Vec<String> {
    let mut warnings = Vec::new();
    match speed {
        Err(refused) => warnings.push(format!(
            "this memory does not suffice: beside what is left to the system, the model needs at least {}",
            gigabytes_up(refused.least)
        )),
        Ok(speed) => {
            if speed.curve.is_some() && speed.cached_cycles < 1.0 {
                warnings.push(format!(
                    "less than one token cycle of experts fits ({:.2}): most experts are gone before the next token \
                     needs them, and every token waits for the drive",
                    speed.cached_cycles
                ));
            }
            if speed.streamed_bytes > 0 {
                warnings.push(format!(
                    "{} of the dense parts do not fit and are read again for every token: a smaller type for them or more \
                     memory helps most",
                    gigabytes(speed.streamed_bytes)
                ));
            }
        }
    }
    if needs.experts == 0 {
        warnings.push("the model has no routed experts: what does not fit is read again for every token".into());
    }
    warnings
}

/// Speeds use powers of ten, so sizes do too, because one is divided by the other.
fn gigabytes(bytes: u64) -> String {
    match bytes as f64 {
        b if b < 1e3 => counted(bytes, "byte"),
        b if b < 1e6 => format!("{:.1} KB", b / 1e3),
        b if b < 1e9 => format!("{:.1} MB", b / 1e6),
        b => format!("{:.2} GB", b / 1e9),
    }
}

/// The same, rounded up, so that the stated amount suffices.
fn gigabytes_up(bytes: u64) -> String {
    let step = match bytes {
        0..1_000 => 1,
        1_000..1_000_000 => 100,
        1_000_000..1_000_000_000 => 100_000,
        _ => 10_000_000,
    };
    gigabytes(bytes.div_ceil(step).saturating_mul(step))
}

/// For people.
fn describe(r: &Report) -> String {
    let mut out = String::new();
    let n = &r.needs;
    let mut line = |name: &str, value: String| {
        let _ = writeln!(out, "{name:<16} {value}");
    };
    let (experts, dense) = (r.expert_types.join(", "), r.dense_types.join(", "));
    line(
        "model",
        match r.moe_layers {
            0 => format!("{}, {}, none with experts; all {dense}", r.family, counted(r.layers, "layer")),
            n => format!(
                "{}, {}, of which {n} with experts; experts {experts}, the rest {dense}",
                r.family,
                counted(r.layers, "layer")
            ),
        },
    );
    line("types", r.types_from.clone());
    line("on the drive", gigabytes(r.disk_bytes));
    if r.measuring_bytes > 0 {
        line("to convert it", format!("{} more, meanwhile", gigabytes(r.measuring_bytes)));
    }
    line(
        "memory",
        format!("at least {}; with {} nothing is read twice", gigabytes_up(n.least_memory), gigabytes(n.best_memory)),
    );
    line(
        "machine",
        format!(
            "{} of memory, drive {}/s, memory {}/s",
            gigabytes(r.machine.ram),
            gigabytes(r.machine.ssd),
            gigabytes(r.machine.memory_bandwidth)
        ),
    );
    line("its speeds", r.speeds_from.clone());
    out.push_str("\na token reads\n");
    let mut part = |name: &str, bytes: u64, what: String| {
        let _ = writeln!(out, "  {name:<16} {:>10}  {what}", gigabytes(bytes));
    };
    let dense = if n.experts > 0 { "routers, shared experts" } else { "feed-forward" };
    part("dense parts", n.dense_bytes, format!("attention, {dense}, output head"));
    if n.experts > 0 {
        let each = each(gigabytes(n.smallest_expert_bytes), gigabytes(n.expert_bytes));
        part("experts", n.token_cycle_bytes, format!("the token cycle: {} of {each}", n.experts_per_token));
    }
    part(
        "keys and values",
        n.kv_cache_bytes,
        format!("in {}, when all {} tokens of context are there", r.kv_type, r.context),
    );
    if let (Some(speed), Some(forecast)) = (&r.speed, &r.forecast) {
        out.push_str(&describe_speed(r, speed, forecast));
    }
    if let Some(compression) = &r.compression {
        let _ = writeln!(out, "\n{}", describe_compression(compression, r.machine.ssd, r.machine_file.as_deref()));
    }
    for warning in &r.warnings {
        let _ = writeln!(out, "\nwarning: {warning}");
    }
    out
}

/// `machine`: the file that describes the machine of the plan, if it is not the one that measures decompression now.
fn describe_compression(c: &Compression, ssd: u64, machine: Option<&Path>) -> String {
    let CompressionWorth { stored_part, decompressed_per_second, pays_below } = c.worth;
    let rate = gigabytes(decompressed_per_second as u64);
    // Decompression is measured now, and another machine's file does not say it.
    let (whose, drive, condition) = match machine {
        None => ("this machine".to_owned(), "this drive", ""),
        Some(file) => (
            format!("the machine that makes this plan, not of that in {},", file.display()),
            "its drive",
            ", if its threads do the same",
        ),
    };
    let rates = format!("the threads of {whose} decompress {rate}/s");
    let part = 100.0 * stored_part;
    let drives = match (ssd as f64) < pays_below {
        true => format!("which pays on {drive}{condition}"),
        false if (ssd as f64) < decompressed_per_second => {
            format!("which pays on {drive} as far as reads overlap{condition}")
        }
        false => format!("for which {drive} is too fast{condition}"),
    };
    match c.done {
        true => format!("experts are compressed; {rates}, {drives}"),
        false => format!("`--compress` would shorten experts to about {part:.0} %, without loss; {rates}, {drives}"),
    }
}

fn describe_speed(r: &Report, s: &Speed, forecast: &Forecast) -> String {
    let n = &r.needs;
    let mut out = String::from("\nin memory\n");
    let mut line = |name: &str, value: String| {
        let _ = writeln!(out, "  {name:<16} {value}");
    };
    let all_dense = s.memory.dense + s.memory.dense_streamed;
    line("dense parts", format!("{} of {}", gigabytes(s.memory.dense), gigabytes(all_dense)));
    if n.experts > 0 {
        let (slots, cycles) = (s.memory.slots, s.cached_cycles);
        line("experts", format!("{slots} of {} ({:.1} %), {cycles:.1} token cycles", n.experts, 100.0 * s.cached));
        let source = match (s.curve, &r.trace) {
            (None, _) => "everything fits".into(),
            (_, Some(trace)) => format!("what {} gives, from an empty cache", trace.display()),
            (Some(trace), None) => format!("what a trace of {trace} gives for that part of the experts"),
        };
        line("hit rate", format!("{:.0} %: {source}", 100.0 * s.hit_rate));
    }
    line("left over", gigabytes(s.memory.available.saturating_sub(s.memory.effective)));
    let _ = writeln!(out, "\nso a token takes");
    let ssd = gigabytes(r.machine.ssd);
    let (missed, cycle) = (gigabytes(s.missed_bytes), gigabytes(n.token_cycle_bytes));
    let experts = format!("{:.0} % of {cycle} = {missed}", 100.0 * (1.0 - s.hit_rate));
    let dense = format!("{} of dense parts", gigabytes(s.streamed_bytes));
    let read = match (n.experts, s.streamed_bytes) {
        (0, _) => dense,
        (_, 0) => format!("({experts})"),
        _ => format!("({experts} + {dense})"),
    };
    let _ = writeln!(out, "  {:<16} {:>10}  {read} / {ssd}/s", "off the drive", seconds(s.drive_seconds));
    let _ = writeln!(
        out,
        "  {:<16} {:>10}  {} / {}/s",
        "through memory",
        seconds(s.memory_seconds),
        gigabytes(s.touched_bytes),
        gigabytes(r.machine.memory_bandwidth)
    );
    let bound = match s.bound {
        Bound::Drive => "the drive",
        // What was measured is the rate of products, which memory or instructions limit.
        Bound::Memory if r.speeds_from.contains("and cores") => "memory or cores, whichever the products wait for,",
        Bound::Memory => "the memory",
    };
    // The numbers that stand for chance may miss a little less than the mean.
    let expected = forecast.tokens_per_second.min(s.tokens_per_second);
    let ms = seconds(1.0 / expected);
    let _ =
        writeln!(out, "\nexpect {expected:.2} tokens/s: reading and computing overlap in part, and a token takes {ms}");
    let _ = writeln!(
        out,
        "at most {:.2} tokens/s, if they overlapped completely: {bound} is the limit",
        s.tokens_per_second
    );
    if s.curve.is_some() && r.trace.is_none() {
        let [low, high] = forecast.tokens_per_second_range;
        let points = 100.0 * HIT_RATE_SPREAD;
        let _ = writeln!(
            out,
            "hit rates differ between models and texts: {points:.0} points less or more make it {low:.2} or {high:.2}"
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decompression_is_said_of_the_machine_that_was_measured() {
        let worth = CompressionWorth { stored_part: 0.67, decompressed_per_second: 5e9, pays_below: 3e9 };
        let compression = Compression { done: false, worth };
        let here = describe_compression(&compression, 1_000_000_000, None);
        assert!(here.contains("threads of this machine decompress") && here.ends_with("pays on this drive"), "{here}");
        for (ssd, said) in [(1, "pays on its drive"), (4, "as far as reads overlap"), (9, "its drive is too fast")] {
            let there = describe_compression(&compression, ssd * 1_000_000_000, Some(Path::new("far.json")));
            assert!(!there.contains("this machine") && there.contains("far.json"), "{there}");
            assert!(there.contains(said) && there.ends_with("if its threads do the same"), "{there}");
        }
    }

    #[test]
    fn sizes_that_suffice_are_rounded_up() {
        assert_eq!(gigabytes_up(5_431_000_001), "5.44 GB");
        assert_eq!(gigabytes_up(5_430_000_000), "5.43 GB");
        assert_eq!(gigabytes_up(12_340_001), "12.4 MB");
        assert_eq!([1, 999, 40_000].map(gigabytes), ["1 byte", "999 bytes", "40.0 KB"]);
    }
}
