//! Reads a checkpoint: the source of its bytes, the table of its tensors, and their encodings.
//!
//! | module | content |
//! |---|---|
//! | [`Source`] | the source of the bytes: files and texts, wherever they are |
//! | `folder` | a folder of safetensors files, in the hub's layout |
//! | `gguf` | GGUF files of llama.cpp |
//! | `checkpoint` | the table of tensors over a source |
//! | `local` | reads of local files, bypassing the page cache where that is faster |
//! | `header`, `locate` | safetensors: headers of files, and which files belong together |
//! | `stamp` | identity of a file, to notice that it changed since it was read |
//! | `recognise` | recognises what a path is if it is not a checkpoint |
//!
//! Files are read with positional reads into the caller's buffers and never mapped: the memory of a conversion does not depend on
//! the size of the checkpoint, and a file that is truncated while it is read causes an error instead of a signal.

mod checkpoint;
mod dtype;
mod folder;
mod ggml_type;
mod gguf;
pub(crate) mod header;
mod local;
mod locate;
pub(crate) mod recognise;
mod row_order;
mod stamp;

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

pub(crate) use checkpoint::{AbsentTensor, Checkpoint, SourceTensor, without_layer};
pub(crate) use dtype::{Dtype, FLOATS, WIDE_FLOATS};
pub(crate) use folder::{open_safetensors, read_side_file, side_file};
pub(crate) use ggml_type::GgmlType;
pub(crate) use locate::is_plain_name;
pub(crate) use row_order::RowOrder;
pub use stamp::Stamp;

use crate::error::ConvertError;

/// The index of a checkpoint in several safetensors files.
pub const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// The description of a checkpoint's model.
pub const CONFIG: &str = "config.json";
/// Longest JSON or tokenizer file that is read into memory. The largest known are about 35 MB.
const MAX_SIDE_FILE: u64 = 128 << 20;
/// Most files of one checkpoint, because each is kept open.
const MAX_FILES: usize = 8192;

/// A file of a source with tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// Its name, which is unique in the source.
    pub name: String,
    /// Where it is, for messages.
    pub path: PathBuf,
    /// Its length in bytes.
    pub len: u64,
    /// Its identity before anything of it was read.
    pub stamp: Stamp,
}

/// When a conversion reads a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileUse {
    /// Its index.
    pub file: usize,
    /// The step that needs it first.
    pub first: usize,
    /// The step that needs it last; after that step, the file is released.
    pub last: usize,
}

/// A source of a checkpoint's bytes. Threads share it.
///
/// What it says about its files holds as long as it exists: the conversion calls [`Source::check_unchanged`] before it relies on
/// what it has read.
pub trait Source: fmt::Debug + Send + Sync {
    /// Where it is, for messages: a folder, a file, or a name on the hub.
    fn path(&self) -> &Path;

    /// The files with tensors, always in the same order. The other calls use their indices.
    fn files(&self) -> &[SourceFile];

    /// Fills `out` with the bytes of a file from byte `at` on. The range is always within the file's length. For a source that must
    /// be fetched first, this waits.
    ///
    /// # Errors
    /// [`ConvertError::Io`]; [`ConvertError::SourceChanged`] for a file that has become shorter.
    fn read_at(&self, file: usize, at: u64, out: &mut [u8]) -> Result<(), ConvertError>;

    /// Checks that no file has changed since its stamp was taken.
    ///
    /// # Errors
    /// [`ConvertError::SourceChanged`].
    fn check_unchanged(&self) -> Result<(), ConvertError>;

    /// A whole small file such as `config.json` or `tokenizer.json`; `None` if there is none.
    ///
    /// # Errors
    /// [`ConvertError::Io`], and [`ConvertError::Damaged`] for a file that is too long.
    fn text_file(&self, name: &str) -> Result<Option<Vec<u8>>, ConvertError>;

    /// Where a small file is, or from what it is made, for messages.
    fn text_path(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Whether files are fetched one after the other. Extents are then made in the order in which their files arrive, and a file is
    /// released as soon as possible.
    fn is_fetched(&self) -> bool;

    /// Says which files will be read from now on, and when. Called once, before the first extent is made; nothing is read during
    /// the call.
    fn schedule(&self, uses: &[FileUse]);

    /// Says that a file will not be read again: all extents that need it are on the drive, its digest is known, and the journal
    /// says so. Called only for a source that is fetched.
    fn release(&self, file: usize);

    /// Whether stamps follow from the content alone, so that equal stamps need not be proved by reading.
    fn is_content_addressed(&self) -> bool {
        false
    }

    /// The folder on this machine with the files. A model file must not replace any of them.
    fn folder(&self) -> Option<&Path> {
        None
    }
}

/// Opens `path`: a folder of safetensors files, or a GGUF file.
pub(crate) fn open(path: &Path) -> Result<Checkpoint, ConvertError> {
    if recognise::is_gguf(path) {
        return gguf::open(path);
    }
    if !path.is_dir() {
        return Err(recognise::no_folder(path));
    }
    folder::open(path)
}

/// Opens a source whose kind is recognised by the first bytes of its first file.
pub(crate) fn open_source(source: Box<dyn Source>) -> Result<Checkpoint, ConvertError> {
    if source.files().first().is_some_and(|first| first.len >= gguf::MAGIC.len() as u64) {
        let mut head = [0; gguf::MAGIC.len()];
        source.read_at(0, 0, &mut head)?;
        if head == *gguf::MAGIC {
            return gguf::of_source(source);
        }
    }
    let files: BTreeSet<String> = source.files().iter().map(|f| f.name.clone()).collect();
    let located = locate::of_files(&source.text_path(INDEX), source.text_file(INDEX)?, &files)?;
    Checkpoint::of_safetensors(source, located)
}

/// The files of a repository that form its safetensors checkpoint, in the order of precedence of transformers: `model.safetensors`,
/// otherwise the files in the index, otherwise shards that are complete by their names. `names` are all files of the repository,
/// sorted; `index` is the content of [`INDEX`] if there is one; `path` is for messages.
///
/// # Errors
/// [`ConvertError::NotACheckpoint`], [`ConvertError::Incomplete`] and [`ConvertError::Damaged`].
pub fn safetensors_files(path: &Path, names: &[String], index: Option<&[u8]>) -> Result<Vec<String>, ConvertError> {
    let exists = |name: &str| names.iter().any(|n| n == name);
    let index = || Ok(index.unwrap_or_default().to_vec());
    let located = locate::of_listing(&locate::Listing { path, names, exists: &exists, index: &index })?;
    if !located.absent.is_empty() {
        let absent: Vec<String> = located.absent.iter().cloned().collect();
        return Err(ConvertError::Incomplete {
            path: path.to_owned(),
            missing: absent.len(),
            total: located.files.len() + absent.len(),
            names: crate::error::first_few(&absent),
            unfinished: String::new(),
        });
    }
    Ok(located.files)
}
