//! Measuring a drive with the read engines of the runtime: block size × reads in flight.
//!
//! The figures are valid only if every byte came from the drive. So the file is read directly, files with holes are
//! refused, and afterwards the bench checks the system's own counters and the page cache: see [`Proof`].

pub mod knee;
mod proof;
pub mod scratch;
mod sweep;

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use serde::{Deserialize, Serialize};

use super::arena::{Arena, PAGE_BYTES, Slot};
use super::calibration::DeviceId;
use super::fill::{ChunkMem, Filling};
use super::{
    ChunkRead, Completion, DataFile, DirectIo, DirectMode, EngineKind, IoConfig, IoError, ReadEngine, Region, Wait,
    open_engine,
};

pub use knee::{Knee, find_knee};
pub use proof::Proof;
pub use scratch::Scratch;
pub use sweep::{Measured, Sweep, SweepOptions, median, sweep};

/// Least part of a file's bytes that the filesystem must have stored for the figures to count.
const STORED_LEAST: f64 = 0.95;

/// Reads go to this much memory in turns, although far less is in flight. The same few megabytes again and again would stay
/// in the processor's cache, to which a drive (above all a virtual one) writes faster than to memory. Weights go to memory.
const SLOT_BYTES: usize = 16 << 20;
const SLOTS_LEAST: usize = 8;
/// As many chunks as a slot can have in flight.
const SLOT_BLOCKS_MAX: usize = 128;

/// Which code reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BenchEngine {
    /// io_uring with registered files and memory: what the runtime uses.
    Uring,
    /// io_uring without registering anything, for comparison.
    UringPlain,
    /// One thread per read in flight.
    Pread,
}

impl BenchEngine {
    /// Short name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            BenchEngine::Uring => "uring",
            BenchEngine::UringPlain => "uring-plain",
            BenchEngine::Pread => "pread",
        }
    }
}

/// The order in which blocks are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pattern {
    /// Anywhere in the file, as experts are.
    Random,
    /// One after the other, as a model is loaded.
    Sequential,
}

impl Pattern {
    /// Short name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Pattern::Random => "random",
            Pattern::Sequential => "sequential",
        }
    }
}

/// One thing to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Point {
    /// Which code reads.
    pub engine: BenchEngine,
    /// In which order.
    pub pattern: Pattern,
    /// Bytes of one read.
    pub block_bytes: usize,
    /// Reads in flight.
    pub depth: usize,
}

impl Point {
    /// Bytes that are in flight at any time; an urgent read waits for as many.
    #[must_use]
    pub fn in_flight_bytes(&self) -> usize {
        self.block_bytes * self.depth
    }

    fn config(&self) -> IoConfig {
        IoConfig { chunk_bytes: self.block_bytes, depth: self.depth, prefetch_depth: 1, verify: false }
    }
}

/// The result of one visit to a point.
#[derive(Clone, Copy, Debug)]
pub struct Visit {
    /// Bytes read.
    pub bytes: u64,
    /// From the first read's start to the last one's end.
    pub elapsed: Duration,
    /// Processor time of the whole process in it.
    pub cpu: Duration,
}

/// Why a drive was not measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// The storage engine.
    #[error(transparent)]
    Io(#[from] IoError),
    /// Direct I/O is not available, so the figures would be those of the page cache.
    #[error(
        "{path} cannot be read directly: {reason}. Reads would be answered by the page cache, not by the drive: measure a \
         file on another filesystem"
    )]
    NotDirect {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Something other than the drive delivered the bytes.
    #[error("the figures for {path} are not the drive's: {reason}")]
    NotTheDrive {
        /// The file.
        path: PathBuf,
        /// What was observed, and what to do.
        reason: String,
    },
    /// The file is shorter than a block.
    #[error(
        "{path} cannot be measured: it has {len} bytes, and blocks of up to {block_bytes} are to be read. Name a file of at least as many \
         (better: of a gigabyte or more)"
    )]
    TooShort {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
        /// The longest block to be read.
        block_bytes: usize,
    },
    /// The drive has no bytes of the file to deliver.
    #[error("{path} cannot be measured: {reason}")]
    Unsuitable {
        /// The file.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// A read failed.
    #[error("reading {len} bytes at offset {offset} of {path} failed: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Byte offset.
        offset: u64,
        /// Bytes asked for.
        len: usize,
        /// What the system said.
        source: io::Error,
    },
    /// The caller asked for a scratch file that is too small.
    #[error(
        "a scratch file of {:.1} MiB is too small to be read at random places: give a --size of at least {}MiB",
        *.bytes as f64 / f64::from(1 << 20), scratch::LEAST_BYTES >> 20
    )]
    ScratchSize {
        /// Bytes that were asked for.
        bytes: u64,
    },
    /// The scratch file could not be made.
    #[error("cannot {action} the scratch file {path}: {source}")]
    Scratch {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// A file that is being measured.
pub struct DiskBench {
    file: DataFile,
    device: DeviceId,
    /// Memory into which reads go, in turns. All of it is here between two visits.
    slots: Vec<Slot>,
    region: Option<Region>,
    offsets: Offsets,
    reuse_memory: bool,
    proof: proof::Watch,
}

impl DiskBench {
    /// Opens a file to measure the drive below it.
    ///
    /// # Errors
    /// [`BenchError::NotDirect`] if reads would go through the page cache and `mode` is [`DirectMode::Prefer`],
    /// [`BenchError::Unsuitable`] for files with holes and for anything that is not a regular file,
    /// [`BenchError::Io`].
    pub fn open(path: &Path, mode: DirectMode) -> Result<DiskBench, BenchError> {
        Self::open_as(path, path, mode)
    }

    /// Opens a scratch file to measure the drive below it; [`Scratch`] may be dropped then.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_scratch(scratch: &Scratch, mode: DirectMode) -> Result<DiskBench, BenchError> {
        Self::open_as(&scratch.handle(), scratch.path(), mode)
    }

    /// Opens the file at `place`, which messages call `path`.
    fn open_as(place: &Path, path: &Path, mode: DirectMode) -> Result<DiskBench, BenchError> {
        // Checked before it is opened: opening a named pipe waits for somebody to write to it.
        let metadata = fs::metadata(place).map_err(|source| IoError::Open { path: path.to_owned(), source })?;
        let unsuitable = |reason: String| BenchError::Unsuitable { path: path.to_owned(), reason };
        if !metadata.is_file() {
            return Err(unsuitable("it is not a regular file. Name a file, or a folder for a scratch file".to_owned()));
        }
        let file = DataFile::open_as(place, path, mode)?;
        if file.len() < PAGE_BYTES as u64 {
            return Err(unsuitable(format!("it has {} bytes. Name a file of a gigabyte or more", file.len())));
        }
        if let (DirectIo::Refused { reason }, DirectMode::Prefer) = (file.direct(), mode) {
            return Err(BenchError::NotDirect { path: path.to_owned(), reason: reason.clone() });
        }
        let stored = std::os::unix::fs::MetadataExt::blocks(&metadata) as f64 * 512.0 / file.len() as f64;
        if stored < STORED_LEAST {
            return Err(unsuitable(format!(
                "only {:.0} % of its bytes are on the drive (the file has holes or is compressed), and the rest would be \
                 answered without it. Name another file, or a folder for a scratch file",
                stored * 100.0
            )));
        }
        let device = DeviceId::of(&file).map_err(|source| IoError::Open { path: path.to_owned(), source })?;
        let proof = proof::Watch::start(&file);
        Ok(DiskBench {
            file,
            device,
            slots: Vec::new(),
            region: None,
            offsets: Offsets::default(),
            reuse_memory: false,
            proof,
        })
    }

    /// Path as it was given.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Bytes of the file.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.file.len()
    }

    /// The drive below the file.
    #[must_use]
    pub fn device(&self) -> &DeviceId {
        &self.device
    }

    /// Whether reads bypass the page cache, and how that is known.
    #[must_use]
    pub fn direct(&self) -> &DirectIo {
        self.file.direct()
    }

    /// Whether a read goes to the memory of the last one that ended, as with fio, instead of that of the oldest one.
    /// That memory stays in the processor's cache, to which some drives write faster than weights can ever arrive.
    pub fn reuse_memory(&mut self, reuse: bool) {
        self.reuse_memory = reuse;
    }

    /// Makes room for what a point reads.
    ///
    /// # Errors
    /// [`BenchError::Io`] if the system does not give the memory.
    pub fn reserve(&mut self, point: &Point) -> Result<(), BenchError> {
        let slots = point.depth.div_ceil(blocks_of_slot(point.block_bytes)).max(SLOTS_LEAST);
        if self.slots.len() < slots {
            let mut arena = Arena::uniform(SLOT_BYTES, slots, "reads")?;
            arena.take("reads")?;
            self.region = Some(arena.region());
            self.slots = arena.into_slots();
        }
        Ok(())
    }

    /// Bytes of memory for reads, and how many of them are in huge pages, if the system tells. In small pages, a block
    /// consists of hundreds of pieces for the drive, and some drives (above all virtual ones) take several times as long.
    #[must_use]
    pub fn memory(&self) -> (usize, Option<u64>) {
        let bytes = self.slots.iter().map(Slot::capacity).sum();
        (bytes, proof::huge_page_bytes().map(|huge| huge.min(bytes as u64)))
    }

    /// What the engine says about itself: how it works here, and why not better.
    ///
    /// # Errors
    /// [`BenchError::Io`] if the engine cannot run here.
    pub fn engine_note(&mut self, engine: BenchEngine) -> Result<String, BenchError> {
        let point =
            Point { engine, pattern: Pattern::Random, block_bytes: PAGE_BYTES, depth: IoConfig::default().depth };
        self.reserve(&point)?;
        Ok(self.engine(&point)?.info().note.clone())
    }

    /// Keeps `depth` reads in flight for as long as `window`, then awaits what is in flight.
    ///
    /// # Errors
    /// [`BenchError::Io`] if engine or memory is not available, [`BenchError::TooShort`] if the file is smaller than
    /// a block, [`BenchError::Read`].
    pub fn visit(&mut self, point: &Point, window: Duration) -> Result<Visit, BenchError> {
        point.config().validate()?;
        let blocks = self.blocks(point.block_bytes)?;
        self.reserve(point)?;
        let mut engine = self.engine(point)?;
        let len = blocks_of_slot(point.block_bytes) * point.block_bytes;
        let begin = |slot| Filling::begin(slot, len, point.block_bytes, false);
        let (mut fillings, arriving): (Vec<_>, Vec<_>) = self.slots.drain(..).map(begin).unzip();
        // Slot by slot, so that a piece comes round again only after all others.
        let mut memory = VecDeque::new();
        for (slot, filling) in fillings.iter_mut().enumerate() {
            memory
                .extend(std::iter::from_fn(|| filling.next_chunk()).map(|(number, mem)| (Home { slot, number }, mem)));
        }
        let unused = memory.split_off(if self.reuse_memory { point.depth } else { memory.len() });
        let before = cpu_time();
        let mut run = Run { point, offsets: &mut self.offsets, blocks, window, bytes: 0 };
        let (memory, elapsed) = run.read(engine.as_mut(), memory).map_err(|(offset, source)| BenchError::Read {
            path: self.file.path().to_owned(),
            offset,
            len: point.block_bytes,
            source,
        })?;
        let (bytes, cpu) = (run.bytes, cpu_time().saturating_sub(before));
        drop(engine);
        for (Home { slot, number }, mut mem) in memory.into_iter().chain(unused) {
            mem.advance(mem.len());
            fillings[slot].give_back(number, mem);
        }
        fillings.into_iter().for_each(|filling| filling.end(Ok(()), 0));
        self.slots = arriving.into_iter().filter_map(|arriving| arriving.finish().ok()).collect();
        self.proof.count(bytes);
        Ok(Visit { bytes, elapsed, cpu })
    }

    /// Blocks that the file has, which is at least one.
    fn blocks(&self, block_bytes: usize) -> Result<u64, BenchError> {
        match self.file.len() / block_bytes as u64 {
            0 => {
                let (path, len) = (self.path().to_owned(), self.file.len());
                Err(BenchError::TooShort { path, len, block_bytes })
            }
            blocks => Ok(blocks),
        }
    }

    /// Whether [`proof`](Self::proof) could succeed; call it before the first visit.
    ///
    /// # Errors
    /// [`BenchError::NotTheDrive`] if much of the file is in the page cache, unless that was asked for.
    pub fn check(&self) -> Result<(), BenchError> {
        self.proof.check(&self.file)
    }

    /// Evidence that the drive delivered the bytes; call it after the last visit.
    ///
    /// # Errors
    /// [`BenchError::NotTheDrive`] if it has not, unless the page cache was asked for.
    pub fn proof(&self) -> Result<Proof, BenchError> {
        self.proof.finish(&self.file)
    }

    fn engine(&self, point: &Point) -> Result<Box<dyn ReadEngine>, BenchError> {
        let again = |source| IoError::Open { path: self.file.path().to_owned(), source };
        let files = vec![self.file.reopen().map_err(again)?];
        let regions = self.region.as_slice();
        let config = point.config();
        Ok(match point.engine {
            BenchEngine::Uring => open_engine(EngineKind::Uring, files, regions, &config)?,
            BenchEngine::UringPlain => super::open_plain_uring(&files, &config)?,
            BenchEngine::Pread => open_engine(EngineKind::Pread, files, regions, &config)?,
        })
    }
}

/// Where a piece of memory belongs: to which slot, as which of its chunks.
#[derive(Clone, Copy, Debug)]
struct Home {
    slot: usize,
    number: u32,
}

type Piece = (Home, ChunkMem);

/// Blocks that a slot is cut into.
fn blocks_of_slot(block_bytes: usize) -> usize {
    (SLOT_BYTES / block_bytes).min(SLOT_BLOCKS_MAX)
}

/// One visit.
struct Run<'a> {
    point: &'a Point,
    offsets: &'a mut Offsets,
    blocks: u64,
    window: Duration,
    bytes: u64,
}

impl Run<'_> {
    /// Reads into the pieces of memory in turns; returns them, and the time. An error comes with the offset of the read
    /// that failed.
    fn read(
        &mut self,
        engine: &mut dyn ReadEngine,
        mut memory: VecDeque<Piece>,
    ) -> Result<(VecDeque<Piece>, Duration), (u64, io::Error)> {
        let mut flights = vec![None; self.point.depth];
        let mut ended: Vec<Completion> = Vec::with_capacity(flights.len());
        let mut in_flight = flights.len();
        let start = Instant::now();
        for tag in 0..in_flight {
            self.submit(engine, tag as u32, &mut memory, &mut flights);
        }
        while in_flight > 0 {
            engine.complete(&mut ended, Wait::Forever).map_err(|error| (0, error))?;
            let go_on = start.elapsed() < self.window;
            for Completion { tag, mem, result } in ended.drain(..) {
                let Some((home, offset)) = flights[tag as usize].take() else {
                    unreachable!("a completion of a read that was not in flight")
                };
                let read = result.map_err(|error| (offset, error))?;
                if read != self.point.block_bytes {
                    let error = io::Error::new(io::ErrorKind::UnexpectedEof, format!("it gave {read} bytes"));
                    return Err((offset, error));
                }
                self.bytes += read as u64;
                memory.push_back((home, mem));
                if go_on {
                    self.submit(engine, tag, &mut memory, &mut flights);
                } else {
                    in_flight -= 1;
                }
            }
        }
        Ok((memory, start.elapsed()))
    }

    /// Reads into the piece of memory that was not read into for longest.
    fn submit(
        &mut self,
        engine: &mut dyn ReadEngine,
        tag: u32,
        memory: &mut VecDeque<Piece>,
        flights: &mut [Option<(Home, u64)>],
    ) {
        let Some((home, mem)) = memory.pop_front() else { unreachable!("more memory is reserved than is in flight") };
        let offset = self.offsets.next(self.point.pattern, self.blocks) * self.point.block_bytes as u64;
        flights[tag as usize] = Some((home, offset));
        engine.submit(ChunkRead { tag, file: 0, offset, mem });
    }
}

/// Where to read next. This continues from visit to visit, so no visit reads what the one before has read.
#[derive(Debug, Default)]
struct Offsets {
    random: u64,
    /// The block that was read last; a visit with another block size continues elsewhere.
    sequential: u64,
}

impl Offsets {
    fn next(&mut self, pattern: Pattern, blocks: u64) -> u64 {
        match pattern {
            Pattern::Random => splitmix(&mut self.random) % blocks,
            Pattern::Sequential => {
                self.sequential = (self.sequential + 1) % blocks;
                self.sequential
            }
        }
    }
}

/// The next of a sequence of well mixed numbers.
fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Processor time that this process has used.
fn cpu_time() -> Duration {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) else { return Duration::ZERO };
    let micros = |t: nix::sys::time::TimeVal| t.tv_sec() as u64 * 1_000_000 + t.tv_usec() as u64;
    Duration::from_micros(micros(usage.user_time()) + micros(usage.system_time()))
}

#[cfg(test)]
mod tests;
