//! Public descriptions of a folder and its sessions.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use sluice_format::StateId;
use sluice_model::session::Binding;

/// Where sessions are kept, and how many.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// The folder. It is created if it does not exist.
    pub folder: PathBuf,
    /// The most bytes that its sessions may have. Beyond that, the least useful ones are deleted first.
    pub max_bytes: u64,
    /// Sessions that were not used for this long are deleted.
    pub expire_after: Option<Duration>,
}

/// A session in the folder: a segment, and all segments before it.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionEntry {
    /// Its name: 32 hexadecimal digits, made from the model and the tokens.
    pub id: String,
    /// The session that it continues.
    pub parent: Option<String>,
    /// Sessions that continue it.
    pub children: Vec<String>,
    /// The model and the settings that computed it.
    pub binding: Binding,
    /// Tokens of the session, those before its segment included.
    pub tokens: usize,
    /// Bytes of its own file.
    pub bytes: u64,
    /// When it was saved.
    pub created: SystemTime,
    /// When it was last saved, restored or touched.
    pub used: SystemTime,
    /// How often it was saved, restored or touched.
    pub uses: u32,
    /// The title that its owner gave it.
    pub title: Option<String>,
}

impl SessionEntry {
    /// The model.
    pub fn state_id(&self) -> StateId {
        self.binding.state_id
    }
}

/// What a folder holds, and what has happened since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of the files of sessions, as the filesystem counts them.
    pub bytes: u64,
    /// Files of sessions.
    pub files: usize,
    /// Of these, files that cannot be used: damaged, of another version, or without the segment that they continue.
    pub unusable: usize,
    /// Sequences that wait to be written, the one that is being written included.
    pub waiting: usize,
    /// Files that were written.
    pub written: u64,
    /// Files that were deleted to make room, or because they had expired or were damaged.
    pub deleted: u64,
    /// Sequences that were not written because newer ones came too fast.
    pub dropped: u64,
    /// Sessions that were to be read back and could not be.
    pub refused: u64,
    /// Errors; [`Store::last_error`](crate::Store::last_error) has the last one.
    pub errors: u64,
}
