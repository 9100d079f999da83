//! Measuring a drive with the read engines of the runtime: block size × reads in flight.
//!
//! The figures are worth something only if the drive was asked for every byte. So the file is read directly, holes are
//! refused, and afterwards the system's own counters and the page cache are looked at: see [`Proof`].

pub mod knee;
mod proof;
pub mod scratch;
mod sweep;

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

/// Of a file's bytes, those that the filesystem has stored at least for its figures to count.
const STORED_LEAST: f64 = 0.95;

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
    /// Bytes that are asked for at any time: a read that is urgent waits for as many.
    #[must_use]
    pub fn in_flight_bytes(&self) -> usize {
        self.block_bytes * self.depth
    }

    fn config(&self) -> IoConfig {
        IoConfig { chunk_bytes: self.block_bytes, depth: self.depth, prefetch_depth: 1, verify: false }
    }
}

/// What one visit to a point gave.
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
    /// Direct I/O is not to be had, so figures would be the page cache's.
    #[error(
        "{path} cannot be read directly: {reason}. Reads would be answered by the page cache, not by the drive: measure a \
         file on another filesystem, or use --buffered to see what reads through the page cache give"
    )]
    NotDirect {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Something other than the drive answered.
    #[error("the figures for {path} are not the drive's: {reason}")]
    NotTheDrive {
        /// The file.
        path: PathBuf,
        /// What was observed, and what to do.
        reason: String,
    },
    /// The file has nothing that a drive could be asked for.
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
    /// Where all reads go; there between two visits.
    slot: Option<Slot>,
    region: Option<Region>,
    offsets: Offsets,
    proof: proof::Watch,
}

impl DiskBench {
    /// Opens a file to measure the drive below it.
    ///
    /// # Errors
    /// [`BenchError::NotDirect`] if reads would go through the page cache and `mode` is [`DirectMode::Prefer`],
    /// [`BenchError::Unsuitable`] for files with holes and for what is no file, [`BenchError::Io`].
    pub fn open(path: &Path, mode: DirectMode) -> Result<DiskBench, BenchError> {
        let file = DataFile::open(path, mode)?;
        let metadata = file.metadata().map_err(|source| IoError::Open { path: path.to_owned(), source })?;
        let unsuitable = |reason: String| BenchError::Unsuitable { path: path.to_owned(), reason };
        if !metadata.is_file() {
            return Err(unsuitable("it is not a regular file. Name a file, or a folder for a scratch file".to_owned()));
        }
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
        Ok(DiskBench { file, device, slot: None, region: None, offsets: Offsets::default(), proof })
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

    /// Makes room for points with up to this many bytes in flight.
    ///
    /// # Errors
    /// [`BenchError::Io`] if the system does not give the memory.
    pub fn reserve(&mut self, in_flight_bytes: usize) -> Result<(), BenchError> {
        if self.slot.as_ref().is_none_or(|slot| slot.capacity() < in_flight_bytes) {
            let arena = Arena::uniform(in_flight_bytes, 1, "reads")?;
            self.region = Some(arena.region());
            self.slot = arena.into_slots().pop();
        }
        Ok(())
    }

    /// Bytes of memory for reads, and how many of them are in huge pages, where the system tells. In small pages, a block
    /// is hundreds of pieces for the drive, and some drives (virtual ones above all) take a multiple of the time.
    #[must_use]
    pub fn memory(&self) -> (usize, Option<u64>) {
        let bytes = self.slot.as_ref().map_or(0, Slot::capacity);
        (bytes, proof::huge_page_bytes().map(|huge| huge.min(bytes as u64)))
    }

    /// What the engine says about itself: how it works here, and why not better.
    ///
    /// # Errors
    /// [`BenchError::Io`] if the engine cannot run here.
    pub fn engine_note(&mut self, engine: BenchEngine) -> Result<String, BenchError> {
        let point =
            Point { engine, pattern: Pattern::Random, block_bytes: PAGE_BYTES, depth: IoConfig::default().depth };
        self.reserve(point.in_flight_bytes())?;
        Ok(self.engine(&point)?.info().note.clone())
    }

    /// Keeps `depth` reads in flight for as long as `window`, then awaits what is in flight.
    ///
    /// # Errors
    /// [`BenchError::Io`] if engine or memory cannot be had, [`BenchError::Unsuitable`] if the file is smaller than a
    /// block, [`BenchError::Read`].
    pub fn visit(&mut self, point: &Point, window: Duration) -> Result<Visit, BenchError> {
        point.config().validate()?;
        let blocks = self.file.len() / point.block_bytes as u64;
        if blocks == 0 {
            let reason = format!("it is smaller than a block of {} bytes", point.block_bytes);
            return Err(BenchError::Unsuitable { path: self.path().to_owned(), reason });
        }
        self.reserve(point.in_flight_bytes())?;
        let mut engine = self.engine(point)?;
        let Some(slot) = self.slot.take() else { unreachable!("reserved above") };
        let (mut filling, arriving) = Filling::begin(slot, point.in_flight_bytes(), point.block_bytes);
        let memory: Vec<_> = std::iter::from_fn(|| filling.next_chunk()).map(|(_, chunk)| chunk).collect();
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
        for (number, mut chunk) in (0u32..).zip(memory) {
            chunk.advance(chunk.len());
            filling.give_back(number, chunk);
        }
        filling.end(Ok(()), 0);
        self.slot = arriving.finish().ok();
        self.proof.count(bytes);
        Ok(Visit { bytes, elapsed, cpu })
    }

    /// What shows that the drive has answered; to be asked after the last visit.
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

/// One visit.
struct Run<'a> {
    point: &'a Point,
    offsets: &'a mut Offsets,
    blocks: u64,
    window: Duration,
    bytes: u64,
}

impl Run<'_> {
    /// Reads into each piece of memory again and again; returns them in order, and the time. An error comes with the
    /// offset of the read that failed.
    fn read(
        &mut self,
        engine: &mut dyn ReadEngine,
        memory: Vec<ChunkMem>,
    ) -> Result<(Vec<ChunkMem>, Duration), (u64, io::Error)> {
        let mut offsets = vec![0; memory.len()];
        let mut home: Vec<Option<ChunkMem>> = memory.iter().map(|_| None).collect();
        let mut ended: Vec<Completion> = Vec::with_capacity(memory.len());
        let mut in_flight = memory.len();
        let start = Instant::now();
        for (tag, mem) in (0u32..).zip(memory) {
            self.submit(engine, tag, mem, &mut offsets);
        }
        while in_flight > 0 {
            engine.complete(&mut ended, Wait::Forever).map_err(|error| (offsets[0], error))?;
            let go_on = start.elapsed() < self.window;
            for Completion { tag, mem, result } in ended.drain(..) {
                let failed = |error| (offsets[tag as usize], error);
                let read = result.map_err(failed)?;
                if read != self.point.block_bytes {
                    return Err(failed(io::Error::new(io::ErrorKind::UnexpectedEof, format!("it gave {read} bytes"))));
                }
                self.bytes += read as u64;
                if go_on {
                    self.submit(engine, tag, mem, &mut offsets);
                } else {
                    home[tag as usize] = Some(mem);
                    in_flight -= 1;
                }
            }
        }
        let elapsed = start.elapsed();
        Ok((home.into_iter().flatten().collect(), elapsed))
    }

    fn submit(&mut self, engine: &mut dyn ReadEngine, tag: u32, mem: ChunkMem, offsets: &mut [u64]) {
        let offset = self.offsets.next(self.point.pattern, self.blocks) * self.point.block_bytes as u64;
        offsets[tag as usize] = offset;
        engine.submit(ChunkRead { tag, file: 0, offset, mem });
    }
}

/// Where to read next. Goes on from visit to visit, so that no visit reads what the one before has read.
#[derive(Debug, Default)]
struct Offsets {
    random: u64,
    /// The block that was read last; a visit with another block size goes on elsewhere.
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
