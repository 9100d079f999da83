//! From paths to a pool: everything that holds or moves bytes, opened in the right order.

use std::path::PathBuf;
use std::sync::Arc;

use super::dense::DenseMemory;
use super::{DenseLocation, DenseParts, ExpertDirectory, Policy, Pool, PoolError};
#[cfg(feature = "sim")]
use crate::io::sim::SimulatedDrive;
use crate::io::{Arena, DataFile, DirectIo, DirectMode, Lane, Scheduler, Tuning, open_lanes};

/// How to open the storage of a model.
#[derive(Clone, Debug)]
pub struct StorageConfig {
    /// Expert slots; at most one per expert is made.
    pub expert_slots: usize,
    /// For each dense extent, whether it stays in memory; the others are streamed.
    pub pinned: Vec<bool>,
    /// How each file is read; files on one drive are read as the first of them.
    pub tuning: Vec<Tuning>,
    /// Whether to bypass the page cache.
    pub direct: DirectMode,
    /// A drive that has the experts in place of the files, and its contents in place of each of them.
    #[cfg(feature = "sim")]
    pub simulated: Option<SimulatedDrive>,
}

/// The storage of an opened model: dense parts in memory, experts behind a pool.
pub struct Storage {
    /// The I/O threads.
    pub io: Arc<Scheduler>,
    /// The dense parts, in the order in which they were given.
    pub dense: DenseParts,
    /// The experts.
    pub pool: Pool,
    /// For each file, whether reads bypass the page cache.
    pub direct: Vec<DirectIo>,
}

impl Storage {
    /// Opens the files, takes all memory, starts the engines and reads the dense parts.
    ///
    /// # Errors
    /// [`PoolError::NoRoom`] if there is no slot, [`PoolError::Io`] if files, memory or engine cannot be had, [`PoolError::Read`] if a
    /// dense part cannot be read; with a simulated drive, [`PoolError::Directory`] if its contents are not as long as an expert.
    ///
    /// # Panics
    /// Unless there is a file, and a tuning for each.
    pub fn open(
        paths: &[PathBuf],
        dense: &[DenseLocation],
        mut experts: ExpertDirectory,
        policy: Box<dyn Policy>,
        config: &StorageConfig,
    ) -> Result<Storage, PoolError> {
        let files = paths.iter().map(|path| DataFile::open(path, config.direct)).collect::<Result<Vec<_>, _>>()?;
        let direct = files.iter().map(|file| file.direct().clone()).collect();
        let mut pool_arena = Pool::reserve(&experts, config.expert_slots)?;
        let memory = DenseParts::reserve(dense, &config.pinned)?;
        let lanes = read_lanes(files, config, &mut experts, &mut pool_arena, &memory)?;
        let io = Arc::new(Scheduler::start_lanes(lanes)?);
        let dense = DenseParts::load(&io, memory, dense, &config.pinned)?;
        let pool = Pool::new(Arc::clone(&io), pool_arena, experts, policy);
        Ok(Storage { io, dense, pool, direct })
    }
}

/// What reads the files: into the memory of experts and of dense parts. If that is a simulated drive, the experts have its contents
/// from now on, in memory and in the directory.
#[cfg_attr(not(feature = "sim"), expect(unused_variables, reason = "files say what the experts are"))]
fn read_lanes(
    files: Vec<DataFile>,
    config: &StorageConfig,
    experts: &mut ExpertDirectory,
    pool: &mut Arena,
    memory: &DenseMemory,
) -> Result<Vec<Lane>, PoolError> {
    #[cfg(feature = "sim")]
    if let Some(drive) = &config.simulated {
        experts.hold(drive.contents())?;
        pool.fill(drive.contents());
        let (numbers, io) = ((0..files.len() as u16).collect(), &config.tuning[0].config);
        let engine = Box::new(drive.engine(files, experts.places(), io.depth));
        return Ok(vec![Lane { engine, files: numbers, config: io.clone() }]);
    }
    let regions = [pool.region(), memory.pinned.region(), memory.ring.region()];
    Ok(open_lanes(files, &config.tuning, &regions)?)
}
