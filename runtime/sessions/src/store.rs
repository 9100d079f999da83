//! The store: a tree of segments, and a thread that writes them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sluice_format::StateId;
use sluice_model::session::Binding;
use sluice_model::{Engine, Sequence};

use crate::StoreError;

/// Where sessions are kept, and how many.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// The folder. It is made if it is not there.
    pub folder: PathBuf,
    /// The most bytes that its sessions may have. The least useful ones go first.
    pub max_bytes: u64,
    /// Sessions that were not used for so long are deleted.
    pub expire_after: Option<Duration>,
}

/// Stored tokens that a text begins with. As long as it lives, what it names is not deleted to make room.
#[derive(Clone, Debug)]
pub struct Found {
    position: usize,
    matched: usize,
}

impl Found {
    /// Tokens of the sequence that [`Store::restore`] gives. Fewer than [`matched`](Self::matched) in models with windows or recurrent
    /// states, which go on only where a sequence was saved or marked.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Tokens that are stored and agree with the text.
    pub fn matched(&self) -> usize {
        self.matched
    }
}

/// A session in the folder: a segment, and all that stands before it.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionEntry {
    /// Its name: 32 hexadecimal digits, made from the model and the tokens.
    pub id: String,
    /// The session that it continues.
    pub parent: Option<String>,
    /// Sessions that continue it.
    pub children: Vec<String>,
    /// What it was computed with.
    pub binding: Binding,
    /// Tokens of the session, those before its segment included.
    pub tokens: usize,
    /// Bytes of its own file.
    pub bytes: u64,
    /// When it was saved.
    pub created: SystemTime,
    /// When it was last saved, restored or touched.
    pub used: SystemTime,
    /// How often that was.
    pub uses: u32,
    /// What its owner calls it.
    pub title: Option<String>,
}

impl SessionEntry {
    /// The model.
    pub fn state_id(&self) -> StateId {
        self.binding.state_id
    }
}

/// What a folder holds, and what has become of it since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of the files of sessions, as the filesystem counts them.
    pub bytes: u64,
    /// Files of sessions.
    pub files: usize,
    /// Of these, files that cannot be used: damaged, of another version, or without what they continue.
    pub unusable: usize,
    /// Sequences that wait to be written, the one that is being written included.
    pub waiting: usize,
    /// Files that were written.
    pub written: u64,
    /// Files that were deleted to make room, or because they had expired or were damaged.
    pub deleted: u64,
    /// Sequences that were not written because newer ones came too fast.
    pub dropped: u64,
    /// Errors; [`Store::last_error`] has the last one.
    pub errors: u64,
}

/// Sessions in a folder. Several threads can use it; one of its own writes.
#[derive(Debug)]
pub struct Store {
    options: StoreOptions,
}

impl Store {
    /// Opens the folder, or makes it, readable by its owner alone; looks at what it holds, and removes what writers that were killed
    /// have left.
    ///
    /// # Errors
    /// [`StoreError::Folder`], [`StoreError::Busy`] if another process has it, [`StoreError::Lock`], [`StoreError::Thread`].
    pub fn open(options: StoreOptions) -> Result<Store, StoreError> {
        Ok(Store { options })
    }

    /// The longest stored beginning of `tokens` from which a sequence can go on. Reads nothing from the drive. A sequence that has all
    /// tokens of a prompt has no logits for the next one: leave out the last token.
    pub fn longest(&self, _binding: Binding, _tokens: &[u32]) -> Option<Found> {
        None
    }

    /// Reads what was found into a new sequence of the engine, which then has [`Found::position`] tokens. Segments that turn out to be
    /// damaged are deleted, with those that continue them.
    ///
    /// # Errors
    /// [`StoreError::Session`]. The caller computes the tokens anew.
    pub fn restore(&self, engine: &Engine, _found: &Found) -> Result<Sequence, StoreError> {
        Ok(engine.new_sequence())
    }

    /// Saves a sequence, if it has tokens that are not stored; give it a fork of one that goes on. Returns at once: it is written by
    /// another thread. Of too many that wait, the oldest that a later one extends is not written.
    pub fn keep(&self, _sequence: Sequence, _title: Option<&str>) {}

    /// Notes that a stored text was of use, though it did not have to be read.
    pub fn touch(&self, _binding: Binding, _tokens: &[u32]) {}

    /// All sessions, those that were used last first.
    pub fn list(&self) -> Vec<SessionEntry> {
        Vec::new()
    }

    /// Deletes a session and those that continue it; `false` if there is none of that id.
    ///
    /// # Errors
    /// [`StoreError::File`] if a file cannot be deleted.
    pub fn delete(&self, _id: &str) -> Result<bool, StoreError> {
        Ok(false)
    }

    /// Waits until everything that was given to [`keep`](Self::keep) is written, or has failed.
    pub fn flush(&self) {}

    /// Gives up sequences that wait to be written, and so their pages. Returns how many.
    pub fn drop_waiting(&self) -> usize {
        0
    }

    /// What the folder holds.
    pub fn usage(&self) -> Usage {
        Usage::default()
    }

    /// What went wrong last, while it wrote or made room.
    pub fn last_error(&self) -> Option<Arc<StoreError>> {
        None
    }

    /// Where the sessions are, and how many.
    pub fn options(&self) -> &StoreOptions {
        &self.options
    }
}
