//! Sequences of the unfinished requests of a batch, saved beside its results: a run that goes on does not read their prompts again.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::ValueEnum;
use sluice_format::ModelFile;
use sluice_lab::batch::saved_bytes;
use sluice_model::{KvType, PAGE_TOKENS};
use sluice_server::batch::Saving;
use sluice_sessions::{Store, StoreOptions, Usage};

use crate::terminal::{counted, note};

/// Fewest new tokens after which a sequence is saved, unless it always is: fewer make more files than they save time.
const FEWEST: usize = 256;
/// Sequences of the whole context that the folder has room for, for each that is answered at a time: its own, and what others have left.
const ROOM: u64 = 2;
/// Room for what else is in the files.
const SLACK: u64 = 64 << 20;

/// Whether sequences are saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum SaveChoice {
    /// If that takes less time than to read the prompts again
    #[default]
    Auto,
    /// Whatever it takes
    Always,
    /// Not at all
    Never,
}

/// The folder of a run's sequences, and what was wrong with it when the run began.
pub(crate) struct Saved {
    store: Arc<Store>,
    every: usize,
    before: Usage,
    /// Whether this run has made the folder.
    made: bool,
}

/// The folder beside the results.
fn folder_of(output: &Path) -> PathBuf {
    let mut name = output.to_owned().into_os_string();
    name.push(".sessions");
    name.into()
}

impl Saved {
    /// Opens the folder beside the results, if sequences are to be saved, or an earlier run has saved some. `worth`: the number of new
    /// tokens from which saving pays. Whatever is wrong with the folder is a remark: without it, prompts are read again.
    pub(crate) fn open(
        output: &Path,
        choice: SaveChoice,
        worth: Option<usize>,
        (file, kv_type): (&ModelFile, KvType),
        (sequences, context): (usize, usize),
    ) -> Option<Self> {
        let folder = folder_of(output);
        let every = match (choice, worth) {
            (SaveChoice::Never, _) => return None,
            (SaveChoice::Always, _) => PAGE_TOKENS,
            (SaveChoice::Auto, Some(worth)) => worth.max(FEWEST),
            // What is there is of use; what would be new is not.
            (SaveChoice::Auto, None) if folder.is_dir() => usize::MAX,
            (SaveChoice::Auto, None) => return None,
        };
        let wanted = ROOM * sequences as u64 * saved_bytes(file, context, kv_type) + SLACK;
        let made = !folder.is_dir();
        let free = sluice_hub::free_space(&folder).map_or(u64::MAX, |free| free / 2);
        let store = Store::open(StoreOptions { folder, max_bytes: wanted.min(free), expire_after: None });
        let store = match store {
            Ok(store) => Arc::new(store),
            Err(error) => {
                note(&format_args!("note: {error}. Sequences are not saved: a run that goes on reads prompts again"));
                return None;
            }
        };
        let before = store.usage();
        if before.unusable > 0 {
            let files = counted(before.unusable, "saved sequence");
            let folder = store.options().folder.display();
            note(&format_args!("note: {files} in {folder} cannot be used: prompts are read again"));
        }
        Some(Saved { store, every, before, made })
    }

    /// For the run.
    pub(crate) fn saving(&self) -> Saving {
        Saving { store: Arc::clone(&self.store), every: self.every }
    }

    /// The run has ended: says what was wrong, and removes the folder if nothing is left to do, or if this run has made it for nothing.
    pub(crate) fn end(self, is_finished: bool) {
        self.store.flush();
        let usage = self.store.usage();
        let folder = self.store.options().folder.display().to_string();
        if usage.refused > self.before.refused {
            let count = counted(usage.refused, "saved sequence");
            note(&format_args!("note: {count} in {folder} could not be read back: the prompts were read again"));
        }
        if let Some(error) = self.store.last_error().filter(|_| !is_finished) {
            note(&format_args!(
                "note: not all sequences are saved ({error}): a run that goes on reads their prompts again"
            ));
        }
        if is_finished || (self.made && usage.files == 0) {
            discard(self.store, &folder);
        }
    }

    /// Removes what a run that has ended since has left behind.
    pub(crate) fn remove(output: &Path) {
        let folder = folder_of(output);
        if !folder.is_dir() {
            return;
        }
        let shown = folder.display().to_string();
        match Store::open(StoreOptions { folder, max_bytes: u64::MAX, expire_after: None }) {
            Ok(store) => discard(Arc::new(store), &shown),
            Err(error) => note(&format_args!("note: {error}. Nobody needs what is saved there any more")),
        }
    }
}

fn discard(store: Arc<Store>, folder: &str) {
    let outcome = Arc::into_inner(store).map(Store::discard);
    if let Some(Err(error)) = outcome {
        note(&format_args!("note: {error}. Nobody needs what is in {folder} any more: remove it"));
    }
}
