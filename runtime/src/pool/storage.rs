//! From paths to a pool: everything that holds or moves bytes, opened in the right order.

use std::path::PathBuf;
use std::sync::Arc;

use super::{DenseLocation, EvictionPolicy, ExpertDirectory, PinnedExtents, Pool, PoolError};
use crate::io::{DataFile, DirectIo, DirectMode, EngineKind, IoConfig, PAGE_BYTES, Scheduler, open_engine};

/// How to open the storage of a model.
#[derive(Clone, Debug)]
pub struct StorageConfig {
    /// Bytes of memory for dense parts and expert slots together.
    pub budget_bytes: usize,
    /// How extents are read.
    pub io: IoConfig,
    /// Which engine reads them.
    pub engine: EngineKind,
    /// Whether to bypass the page cache.
    pub direct: DirectMode,
}

impl StorageConfig {
    /// The defaults with this budget.
    #[must_use]
    pub fn with_budget(budget_bytes: usize) -> Self {
        Self { budget_bytes, io: IoConfig::default(), engine: EngineKind::default(), direct: DirectMode::default() }
    }
}

/// The storage of an opened model: dense parts in memory, experts behind a pool.
pub struct Storage {
    /// The I/O thread.
    pub io: Arc<Scheduler>,
    /// The dense parts, in the order in which they were given.
    pub dense: PinnedExtents,
    /// The experts.
    pub pool: Pool,
    /// For each file, whether reads bypass the page cache.
    pub direct: Vec<DirectIo>,
}

impl Storage {
    /// Opens the files, takes all memory, starts the engine and reads the dense parts.
    ///
    /// # Errors
    /// [`PoolError::BudgetTooSmall`] if dense parts and one expert do not fit the budget,
    /// [`PoolError::Io`] if files, memory or engine cannot be had, [`PoolError::Read`] if a
    /// dense part cannot be read.
    pub fn open(
        paths: &[PathBuf],
        dense: &[DenseLocation],
        experts: ExpertDirectory,
        policy: Box<dyn EvictionPolicy>,
        config: &StorageConfig,
    ) -> Result<Storage, PoolError> {
        let files = paths.iter().map(|path| DataFile::open(path, config.direct)).collect::<Result<Vec<_>, _>>()?;
        let direct = files.iter().map(|file| file.direct().clone()).collect();
        let too_small = |dense_bytes| PoolError::BudgetTooSmall {
            budget_bytes: config.budget_bytes,
            dense_bytes,
            slot_bytes: experts.slot_bytes(),
        };
        let dense_bytes = dense.iter().try_fold(0usize, |sum, location| {
            let len = usize::try_from(location.extent.len).ok()?;
            sum.checked_add(len.checked_next_multiple_of(PAGE_BYTES)?)
        });
        let dense_bytes = dense_bytes.ok_or_else(|| too_small(usize::MAX))?;
        let left = config.budget_bytes.checked_sub(dense_bytes);
        let left = left.ok_or_else(|| too_small(dense_bytes))?;
        let pool_arena = Pool::reserve(&experts, left).map_err(|error| match error {
            PoolError::BudgetTooSmall { .. } => too_small(dense_bytes),
            error => error,
        })?;
        let dense_arena = PinnedExtents::reserve(dense)?;
        let regions = [pool_arena.region(), dense_arena.region()];
        let engine = open_engine(config.engine, files, &regions, &config.io)?;
        let io = Arc::new(Scheduler::start(engine, config.io.clone())?);
        let dense = PinnedExtents::load_all(&io, dense_arena, dense)?;
        let pool = Pool::new(Arc::clone(&io), pool_arena, experts, policy);
        Ok(Storage { io, dense, pool, direct })
    }
}
