//! `sluice bench disk`: the speed of a drive with our read engines, and the best way to read it.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;
use sluice_format::ModelFile;
use sluice_model::memory::Bytes;
use sluice_storage::io::bench::{
    BenchEngine, BenchError, DiskBench, Knee, Measured, Pattern, Point, Scratch, Sweep, SweepOptions, scratch, sweep,
};
use sluice_storage::io::{Calibration, CalibrationStore, DEPTH_MAX, DirectMode, IoConfig, IoError};

use crate::error::CliError;
use crate::plot::{self, LineChart, Series};
use crate::progress::{byte_bar, step_bar};
use crate::size::{parse_bytes, parse_size};
use crate::terminal::{note, print, print_json};

/// Smaller files may fit into a drive's own memory, so their results are not kept.
const KEPT_LEAST: u64 = 256 << 20;

/// Blocks are powers of two, so rates are too.
const MIB: f64 = (1 << 20) as f64;
const GIB: f64 = (1 << 30) as f64;

const EXAMPLES: &str = "\
PATH is a file, which is only read, or a folder (or a new name), where a scratch file is made. It loses its name at \
once, so that nothing is left behind, however the program ends. A large model file is best: a small file may fit into \
the drive's own memory. Reads bypass the page cache, and the output says how that is known; where they cannot, nothing \
is measured.

The knee is the setting with the fewest bytes in flight within 10 % of the best random bandwidth. It is kept per drive \
in ~/.cache/sluice/io.json, and `sluice run` reads that way from then on.

Examples:
  sluice bench disk r1.sluice
  sluice bench disk /mnt/fast --plot drive.svg
  sluice bench disk r1.sluice --block 1MiB --depth 16 --engine uring --pattern random --seconds 5
  sluice bench disk r1.sluice --json | jq .knee";

/// Measure a drive: random and sequential reads, block size by reads in flight
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A file to read, or a folder for a scratch file
    path: PathBuf,

    /// Seconds for all measurements together; writing a scratch file takes additional time
    #[arg(long, value_name = "N", default_value_t = 20.0, value_parser = parse_seconds)]
    seconds: f64,

    /// Read engines; several are compared in turns
    #[arg(long, value_name = "ENGINE", value_delimiter = ',', default_value = "both")]
    engine: Vec<EngineName>,

    /// Order in which blocks are read
    #[arg(long, value_name = "PATTERN", default_value = "both")]
    pattern: PatternName,

    /// Bytes per read, such as 256KiB,1MiB, at most 16MiB [default: 128 KiB to 4 MiB]
    #[arg(long, value_name = "SIZE", value_delimiter = ',', value_parser = parse_block)]
    block: Vec<usize>,

    /// Reads in flight, such as 1,16 [default: 1 to 64]
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=DEPTH_MAX as i64))]
    depth: Vec<u32>,

    /// Size of the scratch file, at least 64MiB [default: 2GiB, or half of the free space]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: Option<u64>,

    /// Read through the page cache; the figures are then not the drive's
    #[arg(long)]
    buffered: bool,

    /// Read repeatedly into only as much memory as is in flight, as fio does: it stays in the processor's cache, and the figures
    /// may be higher than weights can get
    #[arg(long)]
    reuse_memory: bool,

    /// Do not keep the result for `sluice run`
    #[arg(long)]
    no_save: bool,

    /// Draw bandwidth over reads in flight into this SVG file
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    plot: Option<PathBuf>,

    /// Print JSON
    #[arg(long, help_heading = "Output")]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum EngineName {
    /// io_uring, as the runtime uses it
    Uring,
    /// io_uring without registered files and memory
    UringPlain,
    /// A pool of threads
    Pread,
    /// uring and pread
    Both,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PatternName {
    /// Anywhere in the file
    Random,
    /// One after the other
    Sequential,
    /// Both
    Both,
}

/// What was measured, and on which machine.
#[derive(Debug, Serialize)]
struct Report<'a> {
    path: String,
    file_bytes: u64,
    scratch: bool,
    buffered: bool,
    reuse_memory: bool,
    device: &'a sluice_storage::io::calibration::DeviceId,
    engines: &'a [EngineNote],
    #[serde(flatten)]
    sweep: &'a Sweep,
    calibration: Option<&'a Calibration>,
    /// Memory into which data are read.
    memory_bytes: usize,
    /// The part of it in huge pages.
    huge_page_bytes: Option<u64>,
    /// The file that the calibration was written to.
    saved: Option<String>,
}

#[derive(Debug, Serialize)]
struct EngineNote {
    #[serde(skip)]
    engine: BenchEngine,
    name: &'static str,
    note: String,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    measure(args).map_err(|error| {
        let advice = match &error {
            CliError::Bench(BenchError::NotDirect { .. } | BenchError::NotTheDrive { .. }) => {
                "--buffered measures what reads through the page cache give"
            }
            CliError::Bench(BenchError::TooShort { .. }) => "Or read smaller blocks, with --block",
            _ => return error,
        };
        CliError::Failure(format!("{error}. {advice}"))
    })
}

fn measure(args: &Args) -> Result<(), CliError> {
    plot::check_target(args.plot.as_deref(), &args.path)?;
    say_other_volumes(&args.path);
    let scratch = scratch_file(args)?;
    let mode = if args.buffered { DirectMode::Never } else { DirectMode::Prefer };
    let mut bench = match &scratch {
        Some(scratch) => DiskBench::open_scratch(scratch, mode)?,
        None => DiskBench::open(&args.path, mode)?,
    };
    bench.reuse_memory(args.reuse_memory);
    let engines = engines(args, &mut bench)?;
    let options = options(args, &engines);
    let bar = step_bar("measuring", 1000);
    let outcome = sweep(&mut bench, &options, &mut |done| bar.set_position((done * 1000.0) as u64));
    bar.finish_and_clear();
    let sweep = outcome?;
    let calibration = calibration(args, &options, &bench, &sweep);
    let saved = calibration.as_ref().filter(|_| !args.no_save).and_then(save);
    let (memory_bytes, huge_page_bytes) = bench.memory();
    let report = Report {
        path: args.path.display().to_string(),
        file_bytes: bench.file_bytes(),
        scratch: scratch.is_some(),
        buffered: args.buffered,
        reuse_memory: args.reuse_memory,
        device: bench.device(),
        engines: &engines,
        sweep: &sweep,
        calibration: calibration.as_ref(),
        memory_bytes,
        huge_page_bytes,
        saved,
    };
    if let Some(file) = &args.plot {
        chart(&report).write(file)?;
    }
    if args.json { print_json(&report) } else { print(&describe(&report)) }
}

/// Makes the scratch file, unless the path names an existing file.
fn scratch_file(args: &Args) -> Result<Option<Scratch>, CliError> {
    let path = match args.path.metadata() {
        Ok(metadata) if metadata.is_dir() => args.path.join(format!(".sluice-bench-{}.tmp", std::process::id())),
        Ok(_) if args.size.is_some() => {
            let message = "--size is for scratch files, and PATH is a file that exists: name a folder";
            return Err(CliError::Usage(message.into()));
        }
        Ok(_) => return Ok(None),
        Err(_) => args.path.clone(),
    };
    let bar = byte_bar("writing a scratch file", args.size.unwrap_or(scratch::DEFAULT_BYTES));
    let made = Scratch::create(&path, args.size, &mut |written, of| {
        bar.set_length(of);
        bar.set_position(written);
    });
    bar.finish_and_clear();
    Ok(Some(made?))
}

/// A striped model lies on several drives, of which one is measured.
fn say_other_volumes(path: &Path) {
    let Some(model) = ModelFile::open(path).ok().filter(ModelFile::is_striped) else { return };
    let is_same = |other: &Path| fs::canonicalize(path).is_ok_and(|a| fs::canonicalize(other).is_ok_and(|b| a == b));
    let others = model.volumes().iter().map(|volume| volume.path()).filter(|other| !is_same(other));
    let others: Vec<String> = others.map(|path| path.display().to_string()).collect();
    note(&format_args!(
        "note: the model is striped over several drives, and this measures the one of {}; measure {} too",
        path.display(),
        others.join(" and ")
    ));
}

/// The engines that are asked for and run here.
fn engines(args: &Args, bench: &mut DiskBench) -> Result<Vec<EngineNote>, CliError> {
    let mut notes: Vec<EngineNote> = Vec::new();
    for name in &args.engine {
        let wanted: &[BenchEngine] = match name {
            EngineName::Uring => &[BenchEngine::Uring],
            EngineName::UringPlain => &[BenchEngine::UringPlain],
            EngineName::Pread => &[BenchEngine::Pread],
            EngineName::Both => &[BenchEngine::Uring, BenchEngine::Pread],
        };
        for &engine in wanted {
            match bench.engine_note(engine) {
                Ok(_) if notes.iter().any(|n| n.engine == engine) => {}
                Ok(note) => notes.push(EngineNote { engine, name: engine.name(), note }),
                // The user did not name this one.
                Err(BenchError::Io(error)) if *name == EngineName::Both && engine == BenchEngine::Uring => {
                    note(&format_args!("note: {error}"));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(notes)
}

fn options(args: &Args, engines: &[EngineNote]) -> SweepOptions {
    let blocks = args.block.clone();
    let depths = args.depth.iter().map(|&d| d as usize).collect();
    let patterns = match args.pattern {
        PatternName::Random => vec![Pattern::Random],
        PatternName::Sequential => vec![Pattern::Sequential],
        PatternName::Both => vec![Pattern::Random, Pattern::Sequential],
    };
    let engines = engines.iter().map(|e| e.engine).collect();
    SweepOptions { engines, patterns, blocks, depths, time: Duration::from_secs_f64(args.seconds) }
}

/// The calibration that follows from the sweep, if any.
fn calibration(args: &Args, options: &SweepOptions, bench: &DiskBench, sweep: &Sweep) -> Option<Calibration> {
    if !options.is_full() || args.buffered || args.reuse_memory {
        return None;
    }
    if bench.file_bytes() < KEPT_LEAST {
        note(&format_args!(
            "note: the file is smaller than {}, so its knee may be that of the drive's own memory and is not kept",
            Bytes(KEPT_LEAST)
        ));
        return None;
    }
    if sweep.finalists.iter().any(|m| m.rates.is_empty()) || sweep.finalists.is_empty() {
        note(&"note: the time was too short to be sure of the knee, so it is not kept: give more --seconds");
        return None;
    }
    Some(Calibration::from_knee(bench.device().clone(), &sweep.knee?, sweep.latency()))
}

/// Saves the calibration; returns the file, or reports why not.
fn save(calibration: &Calibration) -> Option<String> {
    let saved = CalibrationStore::of_user().and_then(|store| {
        store.save(calibration)?;
        Ok(store.path().display().to_string())
    });
    saved.inspect_err(|e| note(&format_args!("note: the knee is not kept: {e}"))).ok()
}

/// For people.
fn describe(report: &Report<'_>) -> String {
    let scratch = if report.scratch { "scratch file" } else { "file" };
    let model = report.device.model.as_deref().unwrap_or("model unknown");
    let mut out = format!(
        "File       {}: {scratch} of {} on device {} ({model})\n",
        report.path,
        Bytes(report.file_bytes),
        report.device.device
    );
    let _ = writeln!(out, "Proof      {}", report.sweep.proof.summary());
    if let Some(huge) = report.huge_page_bytes {
        let _ = writeln!(
            out,
            "Memory     {} for reads, {} of it in huge pages{}",
            Bytes(report.memory_bytes as u64),
            Bytes(huge),
            if report.reuse_memory { "; only as much as is in flight is used" } else { "" }
        );
    }
    for EngineNote { name, note, .. } in report.engines {
        let _ = writeln!(out, "Engine     {name}: {note}");
    }
    for pattern in [Pattern::Random, Pattern::Sequential] {
        for engine in report.engines {
            out += &table(report.sweep, pattern, engine.engine, report.buffered);
        }
    }
    out + &verdict(report)
}

/// Block size by depth, for one engine and pattern.
fn table(sweep: &Sweep, pattern: Pattern, engine: BenchEngine, buffered: bool) -> String {
    let own = || sweep.points.iter().filter(|m| m.point.pattern == pattern && m.point.engine == engine);
    let blocks: BTreeSet<_> = own().map(|m| m.point.block_bytes).collect();
    let depths: BTreeSet<_> = own().map(|m| m.point.depth).collect();
    if blocks.is_empty() {
        return String::new();
    }
    let label = if buffered { ", through the page cache" } else { "" };
    let mut out = format!("\n{}, {}{label}: MiB/s by block and reads in flight\n", pattern.name(), engine.name());
    let _ = write!(out, "{:>10}", "");
    for depth in &depths {
        let _ = write!(out, "{depth:>8}");
    }
    for &block in &blocks {
        let _ = write!(out, "\n{:>10}", size(block));
        for &depth in &depths {
            let cell = own().find(|m| m.point.block_bytes == block && m.point.depth == depth);
            let _ = match cell.filter(|m| !m.rates.is_empty()) {
                Some(m) => write!(out, "{:>8.0}", m.bytes_per_second / MIB),
                None => write!(out, "{:>8}", "-"),
            };
        }
    }
    out + "\n"
}

/// The knee, the settings that came close, and what happens with the result.
fn verdict(report: &Report<'_>) -> String {
    let Some(knee) = &report.sweep.knee else { return String::new() };
    let mut out = String::from("\n");
    for Measured { point, bytes_per_second, cpu_seconds_per_gb, rates, .. } in &report.sweep.finalists {
        if !rates.is_empty() {
            let row =
                Knee { point: *point, bytes_per_second: *bytes_per_second, cpu_seconds_per_gb: *cpu_seconds_per_gb };
            let _ = writeln!(out, "Finalist   {}", words(&row));
        }
    }
    let _ = writeln!(out, "Knee       {}", words(knee));
    let _ = match (&report.saved, report.calibration) {
        (Some(file), _) => {
            writeln!(out, "Kept       for this drive, in {file}: `sluice run` reads this way from now on")
        }
        (None, Some(_)) => writeln!(out, "Kept       no"),
        (None, None) => Ok(()),
    };
    out
}

fn words(Knee { point, bytes_per_second, cpu_seconds_per_gb }: &Knee) -> String {
    format!(
        "{:>7} × {:<2} with {:<11} {:>6.0} MiB/s, {:>8} in flight, {:.0} ms of processor time per GiB",
        size(point.block_bytes),
        point.depth,
        point.engine.name(),
        bytes_per_second / MIB,
        size(point.in_flight_bytes()),
        cpu_seconds_per_gb * 1e3 * GIB / 1e9
    )
}

/// A whole number of KiB or MiB, as the command line takes it.
fn size(bytes: usize) -> String {
    match bytes {
        b if b >= 1 << 20 && b.is_multiple_of(1 << 20) => format!("{}MiB", b >> 20),
        b => format!("{}KiB", b >> 10),
    }
}

/// Bandwidth of random reads over reads in flight, or of sequential ones if there are no random reads.
fn chart(report: &Report<'_>) -> LineChart {
    let points = &report.sweep.points;
    let has = |pattern| points.iter().any(|m: &Measured| m.point.pattern == pattern);
    let pattern = if has(Pattern::Random) { Pattern::Random } else { Pattern::Sequential };
    let blocks: BTreeSet<_> = points.iter().map(|m| m.point.block_bytes).collect();
    let mut series = Vec::new();
    for (at, engine) in report.engines.iter().enumerate() {
        for (group, &block) in blocks.iter().enumerate() {
            let own = points.iter().filter(|m| {
                let Point { engine: e, pattern: p, block_bytes, .. } = m.point;
                e == engine.engine && p == pattern && block_bytes == block && !m.rates.is_empty()
            });
            let points: Vec<_> = own.map(|m| (m.point.depth as f64, m.bytes_per_second / GIB)).collect();
            if !points.is_empty() {
                let name = format!("{} {}", size(block), engine.name);
                series.push(Series { name, points, group, dashed: at > 0 });
            }
        }
    }
    let knee = report.sweep.knee.filter(|_| pattern == Pattern::Random);
    let buffered = if report.buffered { ", through the page cache" } else { "" };
    LineChart {
        title: format!("{} reads{buffered}: {}", pattern.name(), report.path),
        x_label: "reads in flight".into(),
        y_label: "GiB/s".into(),
        log2: true,
        series,
        mark: knee.map(|k| (k.point.depth as f64, k.bytes_per_second / GIB, "knee".into())),
    }
}

/// A block that an engine can read; others are refused before a scratch file is written.
fn parse_block(text: &str) -> Result<usize, String> {
    let chunk_bytes = usize::try_from(parse_bytes(text)?).unwrap_or(usize::MAX);
    match (IoConfig { chunk_bytes, prefetch_depth: 1, ..IoConfig::default() }).validate() {
        Ok(()) => Ok(chunk_bytes),
        Err(IoError::Config { rule, .. }) => Err(format!("a block is {rule}")),
        Err(other) => Err(other.to_string()),
    }
}

/// A time that is long enough to measure.
fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("`{text}` is not a number of seconds"))?;
    if (0.1..=86_400.0).contains(&seconds) { Ok(seconds) } else { Err("0.1 to 86400 seconds are possible".into()) }
}
