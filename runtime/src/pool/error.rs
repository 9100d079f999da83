//! What can go wrong in the pool.

use crate::io::{IoError, ReadError};

/// Why the pool could not be made, or an extent not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The storage engine could not be started.
    #[error(transparent)]
    Io(#[from] IoError),
    /// An extent could not be read. Names it.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The dense parts and one expert do not fit.
    #[error(
        "a budget of {budget_bytes} bytes is too small: the dense parts take {dense_bytes} \
         bytes and one expert {slot_bytes}; give at least their sum"
    )]
    BudgetTooSmall {
        /// Bytes given.
        budget_bytes: usize,
        /// Bytes of the dense parts.
        dense_bytes: usize,
        /// Bytes of one slot.
        slot_bytes: usize,
    },
    /// The directory of experts does not describe a model.
    #[error("the directory of experts is not possible: {rule}")]
    Directory {
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// The I/O thread died while drives could write to the slots, so that none can be used.
    #[error("no slot is left: the I/O thread has died; start the program again")]
    NoSlots,
}
