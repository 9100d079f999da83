//! `sluice bench machine`: measures this machine for `sluice plan`.

use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::thread::available_parallelism;
use std::time::Duration;

use sluice_format::ModelFile;
use sluice_kernels::{Kernels, ThreadPool, WeightType};
use sluice_model::RuntimeError;
use sluice_model::memory::{Bytes, SystemMemory, available_memory};
use sluice_storage::io::bench::{BenchError, median};
use sluice_storage::io::calibration::DeviceId;
use sluice_storage::io::{Calibration, CalibrationStore, DataFile, DirectMode, Tuning};

use super::bench_decode::Drive;
use super::bench_kernels::{Bench, TAME};
use crate::error::CliError;
use crate::machine::{MachineFile, Measured};
use crate::progress::{Meter, step_bar};
use crate::size::{parse_count, parse_size};
use crate::terminal::{counted, note, print, print_json};

const EXAMPLES: &str = "\
What is measured is kept in ~/.cache/sluice/machine.json, and `sluice plan` uses it from then on. FILE can be any file on the drive \
that models lie on: if `sluice bench disk` has measured that drive, its speed is kept as well.

It measures in several rounds, and the median of each figure counts. Where the rounds differ much, the machine was busy, and nothing \
is kept.

Examples:
  sluice bench machine
  sluice bench machine r1.sluice --out here.json
  sluice plan deepseek-r1 --machine here.json";

/// Measure memory and arithmetic once, for `sluice plan`
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A file on the drive that holds the models
    file: Option<PathBuf>,

    /// Worker threads; at most 1024 are started [default: one per core]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    threads: Option<NonZeroUsize>,

    /// Bytes of memory to read, at least 1MiB; should exceed the caches
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "256MiB")]
    bytes: u64,

    /// Also write the measurements to this file, for `sluice plan --machine` on another machine
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,

    /// Keep and write the measurements even if the rounds differ by more than 20 %, which other programs cause
    #[arg(long)]
    save_anyway: bool,

    /// Do not keep the measurements for this machine
    #[arg(long)]
    no_save: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Common types of models.
const TYPES: [WeightType; 9] = [
    WeightType::F32,
    WeightType::Bf16,
    WeightType::Fp8,
    WeightType::Q8,
    WeightType::Q4,
    WeightType::Int4,
    WeightType::Mxfp4,
    WeightType::Q3,
    WeightType::Q2,
];

/// Rows of the products that measure the arithmetic of attention: as many as there are keys in a block.
const ATTENTION_ROWS: usize = 64;

/// For how long a drive is read alone.
const READING: Duration = Duration::from_millis(300);
/// How often everything is measured: an odd number, so that a median was measured.
const ROUNDS: usize = 3;
/// Part by which the worst round may be slower than the best one.
const SPREAD_MAX: f64 = 0.2;

/// What one round has measured, or the median of several.
#[derive(Clone, Debug, PartialEq)]
struct Round {
    /// Bytes per second of plain reading.
    memory: f64,
    /// By type, bytes of weights per second of all threads, and of those that compute while the drive is read.
    products: Vec<(WeightType, f64, f64)>,
    /// The drive beside those threads, if there is one to be read.
    reads: Option<Reads>,
    /// Operations of f32 per second.
    operations: f64,
    /// Bytes of checksums per second.
    verification: f64,
    /// Seconds of the smallest product.
    section: f64,
}

impl Round {
    fn of(bench: &Bench<'_>, fewer: Option<&Bench<'_>>, drive: &mut Option<Drive>, bar: &Meter) -> Round {
        let memory = bench.read_rate();
        bar.inc(1);
        let rates = TYPES.map(|ty| (bench.product_rate(ty), bar.inc(1)).0);
        let (beside, reads) = match drive.as_mut().map(|drive| beside(bench, fewer, &TYPES, drive)) {
            Some(Ok((beside, reads))) => (beside, Some(reads)),
            // A file that cannot be read says nothing about the cores. Where as many threads compute, the rate is the same one, and not another
            // measurement of it.
            _ => (fewer.map_or(rates.to_vec(), |fewer| TYPES.map(|ty| fewer.product_rate(ty)).to_vec()), None),
        };
        bar.inc(TYPES.len() as u64);
        let products =
            TYPES.into_iter().zip(rates).zip(beside).map(|((ty, rate), beside)| (ty, rate, beside)).collect();
        let operations = 1e9 * bench.gemm(WeightType::F32, ATTENTION_ROWS);
        bar.inc(1);
        let (verification, section) = (fewer.unwrap_or(bench).verify_rate(), bench.section());
        bar.inc(1);
        Round { memory, products, reads, operations, verification, section }
    }

    /// The rates, with what they are of.
    fn rates(&self) -> Vec<(String, f64)> {
        let mut rates = vec![("memory".to_owned(), self.memory), ("attention".to_owned(), self.operations)];
        for (ty, all, beside) in &self.products {
            rates.push((ty.name().to_owned(), *all));
            rates.push((format!("{} while the drive is read", ty.name()), *beside));
        }
        rates
    }

    /// The median of each figure.
    fn median(rounds: &[Round]) -> Round {
        let of = |figure: &dyn Fn(&Round) -> f64| median(&rounds.iter().map(figure).collect::<Vec<_>>());
        let reads: Option<Vec<Reads>> = rounds.iter().map(|round| round.reads).collect();
        let reads = reads.map(|reads| {
            let of = |figure: &dyn Fn(&Reads) -> f64| median(&reads.iter().map(figure).collect::<Vec<_>>());
            Reads { alone: of(&|r| r.alone), beside: of(&|r| r.beside), latency: of(&|r| r.latency) }
        });
        let products = rounds[0].products.iter().enumerate();
        let products = products.map(|(at, (ty, ..))| (*ty, of(&|r| r.products[at].1), of(&|r| r.products[at].2)));
        Round {
            memory: of(&|r| r.memory),
            products: products.collect(),
            reads,
            operations: of(&|r| r.operations),
            verification: of(&|r| r.verification),
            section: of(&|r| r.section),
        }
    }
}

/// The part by which the worst round is slower than the best, of the rate where that is most, and which that is. What the smallest product
/// takes is not counted: it is a few microseconds.
fn spread(rounds: &[Round]) -> (f64, String) {
    let all: Vec<_> = rounds.iter().map(Round::rates).collect();
    let Some(first) = all.first() else { return (0.0, String::new()) };
    let spread = |(number, (name, _)): (usize, &(String, f64))| {
        let rates = all.iter().map(|rates| rates[number].1);
        let (least, most) = rates.fold((f64::INFINITY, 0.0f64), |(a, b), rate| (a.min(rate), b.max(rate)));
        (1.0 - least / most, name.clone())
    };
    first.iter().enumerate().map(spread).max_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or_default()
}

/// What a drive gives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Reads {
    /// Bytes per second, alone …
    alone: f64,
    /// … and while threads compute.
    beside: f64,
    /// Seconds of a burst beyond its bytes ÷ bandwidth, while threads compute.
    pub(super) latency: f64,
}

impl Reads {
    /// The part of its rate that the drive has while threads compute.
    pub(super) fn part(&self) -> f64 {
        (self.beside / self.alone).clamp(0.01, 1.0)
    }
}

/// Bytes of weights of these types per second in products with one token while the drive is read, by `fewer` threads if there are such, and what
/// the drive gives meanwhile.
pub(super) fn beside(
    bench: &Bench<'_>,
    fewer: Option<&Bench<'_>>,
    types: &[WeightType],
    drive: &mut Drive,
) -> Result<(Vec<f64>, Reads), BenchError> {
    let alone = drive.read(READING)?;
    let rate = |ty: &WeightType| fewer.unwrap_or(bench).product_rate(*ty);
    let (rates, beside) = drive.beside(Drive::moment, || types.iter().map(rate).collect())?;
    let (_, burst) = drive.beside(Drive::burst, || types.iter().take(1).map(rate).sum::<f64>())?;
    let latency = (burst - drive.burst_bytes() / beside).clamp(0.0, 0.5);
    Ok((rates, Reads { alone, beside, latency }))
}

/// The drive below a file, to be read as the engine reads it; none if it cannot be measured.
pub(crate) fn drive_to_read(file: &Path) -> Option<Drive> {
    let store = CalibrationStore::of_user().ok();
    Drive::open(file, &Tuning::choose(file, None, None, store.as_ref()).config).ok()
}

/// Of so many threads, those that compute while the drive is read: as the engine does it, one fewer if they take all cores.
pub(super) fn threads_beside_reads(threads: usize) -> usize {
    let cores = available_parallelism().map_or(1, NonZeroUsize::get);
    if threads < cores { threads } else { threads.saturating_sub(1).max(1) }
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    if let Some(out) = &args.out {
        CliError::refuse_output(out, &args.file.iter().map(PathBuf::as_path).collect::<Vec<_>>())?;
    }
    let (machine, (differ, what)) = measure(args)?;
    let is_busy = differ > SPREAD_MAX;
    let said = format!("{ROUNDS} rounds differ by {:.0} % ({what}), so other programs were busy", 100.0 * differ);
    if is_busy {
        let kept = if args.save_anyway {
            "kept all the same"
        } else {
            "not kept: try again when nothing else runs, or --save-anyway"
        };
        let kept = if args.no_save { String::new() } else { format!(": {kept}") };
        note(&format_args!("note: {said}{kept}"));
    }
    let is_good = !is_busy || args.save_anyway;
    if let Some(path) = MachineFile::of_user().filter(|_| is_good && !args.no_save) {
        machine.save(&path)?;
    }
    if let Some(out) = args.out.as_ref().filter(|_| is_good) {
        machine.save(out)?;
    }
    if args.json {
        print_json(&machine)?
    } else {
        print(&describe(&machine))?
    }
    match &args.out {
        Some(out) if !is_good => Err(CliError::Failure(format!(
            "{} is not written: {said}. Try again when nothing else runs, or say --save-anyway",
            out.display()
        ))),
        _ => Ok(()),
    }
}

/// Measures in rounds: the median of each figure, and by how much the rounds differ, and in what.
fn measure(args: &Args) -> Result<(MachineFile, (f64, String)), CliError> {
    let (available, speed) = (available_memory(), args.file.as_deref().map(drive).transpose()?.flatten());
    let ram = SystemMemory::read(Path::new("/")).total.unwrap_or(available);
    let kernels = Kernels::detect().map_err(RuntimeError::from)?;
    let threads = args.threads.or_else(|| available_parallelism().ok()).map_or(1, NonZeroUsize::get);
    let bytes = usize::try_from(args.bytes).ok().filter(|bytes| *bytes >= 1 << 20);
    let bytes = bytes.ok_or_else(|| CliError::Usage("--bytes must be at least 1MiB, and fit into memory".into()))?;
    let mut data = Vec::new();
    data.try_reserve_exact(bytes)
        .map_err(|_| CliError::Failure(format!("the system has no {} of memory: lower --bytes", Bytes(args.bytes))))?;
    data.resize(bytes, TAME);
    let bench = Bench { kernels, pool: ThreadPool::new(threads), data: &data };
    let bar = step_bar("measuring", (ROUNDS * (3 + 2 * TYPES.len())) as u64);
    let threads = bench.pool.threads();
    let fewer = threads_beside_reads(threads);
    let fewer = (fewer < threads).then(|| Bench { kernels, pool: ThreadPool::new(fewer), data: &data });
    let mut reads = args.file.as_deref().and_then(drive_to_read);
    let rounds: Vec<Round> = (0..ROUNDS).map(|_| Round::of(&bench, fewer.as_ref(), &mut reads, &bar)).collect();
    bar.finish_and_clear();
    let Round { memory, products, reads, operations, verification, section } = &Round::median(&rounds);
    let reads = reads.map(|reads| (reads.part(), reads.latency));
    let measured = Measured {
        memory: *memory,
        products,
        reads,
        operations: *operations,
        verification: *verification,
        section: *section,
    };
    let machine = MachineFile::new((ram, available, speed), &measured, (kernels.isa_name(), threads));
    Ok((machine, spread(&rounds)))
}

/// Bytes per second of the drive below a file, if it has been calibrated. Of a model that is striped over several drives: of all of them
/// together, as fast as the one that needs longest for its part of an expert lets them be.
pub(crate) fn drive(file: &Path) -> Result<Option<DriveRate>, CliError> {
    // Calibrations that cannot be read are as good as none.
    let Ok(store) = CalibrationStore::of_user() else { return Ok(None) };
    let known =
        |path: &Path| -> Result<Option<Calibration>, CliError> { Ok(store.find(&device(path)?).ok().flatten()) };
    let Some(model) = ModelFile::open(file).ok().filter(ModelFile::is_striped) else {
        return Ok(
            known(file)?.map(|known| DriveRate { bytes_per_second: known.bytes_per_second, latency: known.latency })
        );
    };
    let mut drives: Vec<(DeviceId, &Path, f64)> = Vec::new();
    for (volume, share) in model.volumes().iter().zip(model.expert_shares()) {
        let device = device(volume.path())?;
        match drives.iter_mut().find(|(other, ..)| other.is_same(&device)) {
            Some((.., sum)) => *sum += share,
            None => drives.push((device, volume.path(), share)),
        }
    }
    let (mut slowest, mut latency) = (f64::INFINITY, Some(0.0f64));
    for (_, path, share) in drives.into_iter().filter(|(.., share)| *share > 0.0) {
        let Some(found) = known(path)? else { return Ok(None) };
        slowest = slowest.min(found.bytes_per_second / share);
        latency = latency.zip(found.latency).map(|(a, b)| a.max(b));
    }
    Ok(slowest.is_finite().then_some(DriveRate { bytes_per_second: slowest, latency }))
}

/// What was measured of the drive, or the drives, below a file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct DriveRate {
    pub(crate) bytes_per_second: f64,
    /// Seconds until the first byte of a read that is alone, if that is known.
    pub(crate) latency: Option<f64>,
}

/// Bytes per second of the drive below a file or folder, if it has been calibrated.
pub(crate) fn calibrated(store: &CalibrationStore, path: &Path) -> Result<Option<f64>, CliError> {
    Ok(store.find(&device(path)?).ok().flatten().map(|known| known.bytes_per_second))
}

/// The drive below a file or folder.
pub(crate) fn device(path: &Path) -> Result<DeviceId, CliError> {
    let failed = |source| CliError::File { path: path.to_owned(), action: "find its drive", source };
    let opened = DataFile::open(path, DirectMode::Never).map_err(|e| CliError::Failure(e.to_string()))?;
    DeviceId::of(&opened).map_err(failed)
}

fn describe(machine: &MachineFile) -> String {
    let rate = |rate: f64| format!("{:.1} GB/s", rate / 1e9);
    let mut out = format!("{:<12} {} with {}\n", "computes", machine.isa, counted(machine.threads, "thread"));
    let latency = machine
        .drive_latency_seconds
        .map_or(String::new(), |latency| format!(", first byte after {:.0} µs", 1e6 * latency));
    let drive = machine
        .drive_bytes_per_second
        .map_or("not known: name a file on a drive that `sluice bench disk` has measured".into(), |r| {
            rate(r) + &latency
        });
    let _ = writeln!(out, "{:<12} {drive}", "drive");
    let _ = writeln!(out, "{:<12} {}", "memory", rate(machine.memory_bytes_per_second));
    for (ty, product) in &machine.product_bytes_per_second {
        let share = 100.0 * product / machine.memory_bytes_per_second;
        let beside = machine.beside_reads_bytes_per_second.get(ty).map_or(String::new(), |beside| rate(*beside));
        let _ = writeln!(out, "{ty:<12} {} of weights, {share:.0} %; {beside} while the drive is read", rate(*product));
    }
    if let Some(part) = machine.reads_beside_products {
        let wait =
            machine.burst_latency_seconds.map_or(String::new(), |wait| format!(", bursts wait {:.0} µs", 1e6 * wait));
        let _ = writeln!(out, "{:<12} {:.0} % of its rate while these compute{wait}", "drive", 100.0 * part);
    }
    if let Some(verified) = machine.verified_bytes_per_second {
        let _ = writeln!(out, "{:<12} {} while the drive is read", "checksums", rate(verified));
    }
    let section = 1e6 * machine.section_seconds;
    if let Some(operations) = machine.f32_operations_per_second {
        let _ = writeln!(out, "{:<12} {:.0} GOP/s of f32", "attention", operations / 1e9);
    }
    let _ = writeln!(out, "{:<12} {section:.1} µs for the smallest product", "threads");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(memory: f64, q4: (f64, f64), operations: f64, section: f64) -> Round {
        let products = vec![(WeightType::Q8, 20e9, 18e9), (WeightType::Q4, q4.0, q4.1)];
        let reads = Reads { alone: memory / 10.0, beside: q4.1 / 5.0, latency: 2.0 * section };
        Round { memory, products, reads: Some(reads), operations, verification: 2.0 * memory, section }
    }

    #[test]
    fn the_median_of_each_figure_counts() {
        let rounds = [
            round(20e9, (8e9, 9e9), 1e11, 6e-6),
            round(25e9, (10e9, 7e9), 9e10, 5e-6),
            round(24e9, (11e9, 8e9), 2e11, 9e-6),
        ];
        assert_eq!(Round::median(&rounds), round(24e9, (10e9, 8e9), 1e11, 6e-6));
    }

    #[test]
    fn rounds_that_differ_are_known_by_what_differs_most() {
        let calm = round(25e9, (10e9, 9e9), 1e11, 5e-6);
        assert_eq!(spread(&[calm.clone(), calm.clone()]).0, 0.0);
        // What the smallest product takes does not count.
        assert_eq!(spread(&[calm.clone(), round(25e9, (10e9, 9e9), 1e11, 9e-6)]).0, 0.0);
        let (differ, what) = spread(&[round(24e9, (10e9, 6e9), 1e11, 5e-6), calm]);
        assert!((differ - 1.0 / 3.0).abs() < 1e-9 && what == "q4 while the drive is read", "{differ} {what}");
    }
}
