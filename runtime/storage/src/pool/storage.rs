//! From paths to a pool: everything that holds or moves bytes, opened in the right order.

use std::path::PathBuf;
use std::sync::Arc;

#[cfg(feature = "sim")]
use super::Packed;
use super::dense::DenseMemory;
use super::{
    DenseLocation, DenseParts, ExpertDirectory, Policy, Pool, PoolError, SectorCache, SlotPlan, TableLocation, Workers,
};
#[cfg(feature = "sim")]
use crate::io::sim::SimulatedDrive;
use crate::io::{Arena, DataFile, DirectIo, DirectMode, Lane, Scheduler, Tuning, open_lanes};

/// How to open the storage of a model.
#[derive(Clone, Debug)]
pub struct StorageConfig {
    /// Expert slots.
    pub expert_slots: SlotPlan,
    /// Staging slots for compressed experts; at least two are made if there are such experts, and none otherwise.
    pub staging_slots: usize,
    /// For each dense extent, whether it stays in memory; the others are streamed.
    pub pinned: Vec<bool>,
    /// The tables whose rows are read one by one.
    pub tables: Vec<TableLocation>,
    /// Sectors of them that stay in memory.
    pub sectors: usize,
    /// How each file is read; files on one drive are read as the first of them.
    pub tuning: Vec<Tuning>,
    /// Whether to bypass the page cache.
    pub direct: DirectMode,
    /// A simulated drive, which replaces the files for experts and has the same contents for each of them; a model that is striped has one
    /// for each volume.
    #[cfg(feature = "sim")]
    pub simulated: Option<SimulatedDrive>,
    /// The decompressed contents of that drive, if they are compressed.
    #[cfg(feature = "sim")]
    pub simulated_packed: Option<Packed>,
}

/// The storage of an opened model: dense parts in memory, experts behind a pool.
pub struct Storage {
    /// The I/O threads.
    pub io: Arc<Scheduler>,
    /// The dense parts, in the order in which they were given.
    pub dense: DenseParts,
    /// The experts.
    pub pool: Pool,
    /// Rows of tables.
    pub tables: SectorCache,
    /// For each file, whether reads bypass the page cache.
    pub direct: Vec<DirectIo>,
}

impl Storage {
    /// Opens the files, reserves addresses for all slots, starts the engines and begins to read the dense parts.
    ///
    /// # Errors
    /// [`PoolError::NoRoom`] if there is no slot, [`PoolError::Io`] if files, addresses or engine are not available,
    /// [`PoolError::Read`] if the file ends before a dense part does; with a simulated drive, [`PoolError::Directory`] if its contents are not as long as an expert.
    ///
    /// # Panics
    /// Unless there is a file, and a tuning for each.
    pub fn open(
        paths: &[PathBuf],
        dense: &[DenseLocation],
        #[cfg_attr(not(feature = "sim"), expect(unused_mut, reason = "files say what the experts are"))]
        mut experts: ExpertDirectory,
        policy: Box<dyn Policy>,
        config: &StorageConfig,
    ) -> Result<Storage, PoolError> {
        let files = paths.iter().map(|path| DataFile::open(path, config.direct)).collect::<Result<Vec<_>, _>>()?;
        let direct = files.iter().map(|file| file.direct().clone()).collect();
        #[cfg(feature = "sim")]
        if let Some(drive) = &config.simulated {
            experts.hold(drive.contents(), config.simulated_packed)?;
        }
        let mut memory = Memory {
            experts: Pool::reserve(&experts, &config.expert_slots)?,
            staging: Pool::reserve_staging(&experts, config.staging_slots)?,
            dense: DenseParts::reserve(dense, &config.pinned)?,
            tables: SectorCache::reserve(&config.tables, config.sectors)?,
        };
        let lanes = read_lanes(files, config, &experts, &mut memory)?;
        let Memory { experts: pool_arena, staging, dense: memory, tables } = memory;
        let io = Arc::new(Scheduler::start_lanes(lanes)?);
        let dense = DenseParts::load(&io, memory, dense, &config.pinned)?;
        let pool = Pool::new(Arc::clone(&io), pool_arena, staging, experts, policy);
        let tables = SectorCache::new(&io, tables, config.tables.clone());
        Ok(Storage { io, dense, pool, tables, direct })
    }

    /// Says which threads decompress extents from now on.
    pub fn set_workers(&mut self, workers: &Arc<dyn Workers>) {
        self.dense.set_workers(Arc::clone(workers));
        self.pool.set_workers(Arc::clone(workers));
    }
}

/// The memory into which extents are read.
struct Memory {
    experts: Arena,
    staging: Arena,
    dense: DenseMemory,
    tables: Arena,
}

/// The lanes that read the files into this memory. If a simulated drive replaces them, the memory has its contents
/// from now on.
#[cfg_attr(not(feature = "sim"), expect(unused_variables, reason = "files say what the experts are"))]
fn read_lanes(
    files: Vec<DataFile>,
    config: &StorageConfig,
    experts: &ExpertDirectory,
    memory: &mut Memory,
) -> Result<Vec<Lane>, PoolError> {
    #[cfg(feature = "sim")]
    if let Some(drive) = &config.simulated {
        let read_into = if config.simulated_packed.is_some() { &mut memory.staging } else { &mut memory.experts };
        read_into.fill(drive.contents());
        let io = &config.tuning[0].config;
        if !experts.is_striped() {
            let numbers = (0..files.len() as u16).collect();
            let engine = Box::new(drive.engine(0, files, experts.places(), io.depth));
            return Ok(vec![Lane { engine, files: numbers, config: io.clone(), adapts: false }]);
        }
        let lane = |(number, file): (u16, DataFile)| {
            let own = experts.places().into_iter().filter(|(file, _)| *file == number);
            let places = own.map(|(_, range)| (0, range)).collect();
            let engine = Box::new(drive.engine(usize::from(number), vec![file], places, io.depth));
            Lane { engine, files: vec![number], config: io.clone(), adapts: false }
        };
        return Ok((0..).zip(files).map(lane).collect());
    }
    let Memory { experts: slots, staging, dense, tables } = memory;
    let arenas = [&*slots, staging, &dense.pinned, &dense.ring, &dense.staging, tables];
    let regions: Vec<_> = arenas.into_iter().map(Arena::region).collect();
    Ok(open_lanes(files, &config.tuning, &regions)?)
}
