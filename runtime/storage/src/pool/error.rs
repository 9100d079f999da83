//! What can go wrong in the pool.

use crate::io::{IoError, ReadError};

/// Why the pool could not be made, or an extent could not be provided.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The storage engine could not be started.
    #[error(transparent)]
    Io(#[from] IoError),
    /// An extent could not be read. Names it.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A model has experts, but there is no slot for them.
    #[error("the memory plan has no slot for experts; raise the budget")]
    NoRoom,
    /// The directory of experts does not describe a model.
    #[error("the directory of experts is not possible: {rule}")]
    Directory {
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// The I/O thread died while drives could write to the slots, so none can be used.
    #[error("no slot is left: the I/O thread has died; start the program again")]
    NoSlots,
}
