//! Dense extents: what every token needs.
//!
//! They are read once, at start, into memory of exactly their size, and stay. Callers get them
//! through a guard per use, so that a later implementation can stream those that do not fit.

use std::ops::Deref;

use super::{DenseLocation, PoolError};
use crate::io::{Arena, Class, ExtentRead, PendingRead, Scheduler, Slot};

/// Names a dense extent: its position in the list given to [`PinnedExtents::load_all`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DenseHandle(pub u32);

/// The dense extents, in memory.
#[derive(Debug)]
pub struct PinnedExtents {
    slots: Vec<Slot>,
}

impl PinnedExtents {
    /// Takes memory for the extents; it can be registered with an engine before they are read.
    ///
    /// # Errors
    /// [`PoolError::Io`] if the system does not give the memory.
    pub fn reserve(locations: &[DenseLocation]) -> Result<Arena, PoolError> {
        let sizes = locations.iter().map(|location| location.extent.len as usize);
        Ok(Arena::carve(sizes, "the dense parts")?)
    }

    /// Reads all extents into the memory that [`reserve`](Self::reserve) took for them; blocks
    /// until all are there and verified. Extent `i` gets the handle `DenseHandle(i)`.
    ///
    /// # Errors
    /// [`PoolError::Read`] for the first extent of the list that cannot be read.
    ///
    /// # Panics
    /// If the arena was reserved for another list.
    pub fn load_all(io: &Scheduler, arena: Arena, locations: &[DenseLocation]) -> Result<PinnedExtents, PoolError> {
        let slots = arena.into_slots();
        assert_eq!(slots.len(), locations.len(), "memory for another list");
        let submit = |(slot, location): (Slot, &DenseLocation)| {
            let DenseLocation { extent, name } = *location;
            let read = ExtentRead {
                file: extent.file,
                offset: extent.offset,
                len: extent.len as usize,
                checksum: extent.checksum,
                class: Class::Demand,
                name,
            };
            io.submit(slot, read).map_err(|failure| (*failure.error).into())
        };
        let pending: Result<Vec<PendingRead>, PoolError> = slots.into_iter().zip(locations).map(submit).collect();
        let finish = |read: PendingRead| read.finish().map_err(|failure| (*failure.error).into());
        let slots = pending?.into_iter().map(finish).collect::<Result<Vec<Slot>, PoolError>>()?;
        Ok(PinnedExtents { slots })
    }

    /// The bytes of an extent, for as long as the guard lives.
    ///
    /// # Errors
    /// None while all extents are pinned; an implementation that streams them can fail to read.
    ///
    /// # Panics
    /// If there is no such extent.
    pub fn dense(&self, handle: DenseHandle) -> Result<DenseGuard<'_>, PoolError> {
        Ok(DenseGuard { slot: &self.slots[handle.0 as usize] })
    }

    /// Extents held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// True if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.slots.iter().map(Slot::capacity).sum()
    }
}

/// Keeps a dense extent in memory while it is used.
#[derive(Debug)]
pub struct DenseGuard<'a> {
    slot: &'a Slot,
}

impl DenseGuard<'_> {
    /// The bytes of the extent.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.slot.bytes()
    }
}

impl Deref for DenseGuard<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes()
    }
}
