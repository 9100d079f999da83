//! Why a conversion was refused or failed.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use sluice_format::{FormatError, ImportanceError, WeightType};

/// Advice about a repository of the hub that is itself damaged.
pub(crate) const OF_REPOSITORY: &str =
    "The repository is so on the hub: tell its authors, or name another revision of it, as hf:OWNER/NAME@REVISION";

/// Whether a source is on the hub, judging by its path.
pub(crate) fn is_of_hub(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().starts_with(b"hf:")
}

/// Why a conversion was refused or failed. Every message names the file, key or tensor, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The operating system returned an error.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
    /// The source is not a checkpoint.
    #[error("{path} is not a Hugging Face checkpoint: {problem}")]
    NotACheckpoint {
        /// The folder.
        path: PathBuf,
        /// What is missing.
        problem: String,
    },
    /// A file of another kind than requested.
    #[error("{path} is {what}. {advice}")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// Files of the checkpoint are Git LFS pointers.
    #[error(
        "{path}: {count} of {total} safetensors files are Git LFS pointers, placeholders of files that have not been \
         downloaded: {}. Run `git lfs pull` in the folder, or download the model with `hf download`",
        first_few(names)
    )]
    Pointers {
        /// The folder.
        path: PathBuf,
        /// How many files are pointers.
        count: usize,
        /// How many files there are.
        total: usize,
        /// The names of the pointers.
        names: Vec<String>,
    },
    /// Files of the checkpoint are missing.
    #[error(
        "{path}: {missing} of {total} safetensors files {} missing: {names}{unfinished}. {}",
        if *.missing == 1 { "is" } else { "are" },
        if is_of_hub(path) { OF_REPOSITORY } else {
            "The download is not complete: repeat `hf download` with this folder as `--local-dir`, which fetches what is missing"
        }
    )]
    Incomplete {
        /// The folder.
        path: PathBuf,
        /// How many are missing.
        missing: usize,
        /// How many files there should be.
        total: usize,
        /// The first few.
        names: String,
        /// What unfinished downloads have left, or an empty text.
        unfinished: String,
    },
    /// Parts of a model in several GGUF files are missing.
    #[error(
        "{path}: {missing} of {total} parts of the model {} missing: {names}. {}",
        if *.missing == 1 { "is" } else { "are" },
        if is_of_hub(path) { OF_REPOSITORY } else { "Download them into the same folder" }
    )]
    MissingParts {
        /// The folder.
        path: PathBuf,
        /// How many are missing.
        missing: usize,
        /// How many parts there should be.
        total: usize,
        /// The first few.
        names: String,
    },
    /// A valid GGUF file that cannot be converted.
    #[error("{path} cannot be converted: {problem}")]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What it is or holds, and what to do.
        problem: String,
    },
    /// Two files hold a tensor of the same name.
    #[error(
        "{path}: `{tensor}` is in {} and in {}, and no index says which of them counts. Move away what does not belong \
         to the model", files[0], files[1]
    )]
    Double {
        /// The folder.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The first two files.
        files: [String; 2],
    },
    /// There is no output head, and the configuration does not say that the token embedding replaces it.
    #[error(
        "{path}: there is no `{head}`, and `tie_word_embeddings` is {said}, so the token embedding is not the output \
         head{hint}. Check that the download is complete. If the head is the token embedding all the same, write \
         `\"tie_word_embeddings\": true` into `config.json`"
    )]
    NoHead {
        /// The folder.
        path: PathBuf,
        /// The tensor.
        head: String,
        /// What the configuration says, or what its silence means.
        said: &'static str,
        /// A possible explanation, or an empty text.
        hint: String,
    },
    /// A file of the checkpoint is damaged or contradicts itself.
    #[error("{path} is damaged: {problem}. {}", if is_of_hub(path) { OF_REPOSITORY } else { "Download it again" })]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A file of the checkpoint changed between the beginning and the end of the conversion.
    #[error(
        "{path} was changed, moved or replaced while it was read. Nothing that was made of it since is trusted. Run the \
         same command again once nothing writes to the checkpoint"
    )]
    SourceChanged {
        /// The file.
        path: PathBuf,
    },
    /// A model file does not say from which source it was made.
    #[error("{path}: {problem}")]
    NoProvenance {
        /// The model file.
        path: PathBuf,
        /// What is missing, and what to do.
        problem: String,
    },
    /// A key of `config.json`, or of a GGUF file, is missing or has a value that this program does not support.
    #[error("{path}: `{key}` {problem}")]
    Config {
        /// `config.json`.
        path: PathBuf,
        /// The key, with dots between levels.
        key: String,
        /// What is wrong with it, and what is supported.
        problem: String,
    },
    /// Values of `config.json` that are each possible but do not fit together.
    #[error("{path} describes an impossible model: {problem}")]
    Impossible {
        /// `config.json`.
        path: PathBuf,
        /// What does not fit, in terms of the specification.
        problem: String,
    },
    /// Tensors that the model needs are not in the checkpoint.
    #[error(
        "{path}: {} missing that {source_of} implies: {names}{hint}. {}",
        if *count == 1 { "a tensor is".to_owned() } else { format!("{count} tensors are") },
        if *source_of == OF_CONFIG { OF_ANOTHER } else { "Check that all its parts are there and whole" }
    )]
    MissingTensors {
        /// The folder, or the GGUF file.
        path: PathBuf,
        /// What implies them.
        source_of: &'static str,
        /// How many.
        count: usize,
        /// The first few.
        names: String,
        /// A possible explanation as a sentence, or an empty text.
        hint: String,
    },
    /// Tensors that nothing would use; leaving them out silently could change what the model computes.
    #[error(
        "{path}: {count} tensors are not part of a `{family}` model as this program knows it: {names}. \
         Check that `config.json` belongs to these weights"
    )]
    UnknownTensors {
        /// The folder.
        path: PathBuf,
        /// How many.
        count: usize,
        /// The first few.
        names: String,
        /// The model type.
        family: String,
    },
    /// Some tensors are arranged as in the family's releases, others as in MLX, so their meaning is unclear.
    #[error(
        "{path}: {problem}. Norms of this family are stored as what is added to one; MLX stores the sum. Which it is \
         cannot be told here, and the wrong one would change what the model says. Convert the original release"
    )]
    Mixture {
        /// The folder.
        path: PathBuf,
        /// What contradicts what.
        problem: String,
    },
    /// A tensor that could be left out only if it were zero.
    #[error(
        "{path}: `{tensor}` holds numbers that are not zero, and the model as `config.json` describes it adds nothing \
         there. Check that `config.json` belongs to these weights"
    )]
    NotZero {
        /// The safetensors file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// Decoder layers that the configuration does not count: without them, the model would compute something else.
    #[error(
        "{path}: {count} tensors belong to layers after the {layers} that `num_hidden_layers` counts: {names}. \
         Nor do they belong to layers that predict further tokens, which have an `eh_proj`. \
         Check that `config.json` belongs to these weights"
    )]
    SurplusLayers {
        /// The folder.
        path: PathBuf,
        /// How many tensors.
        count: usize,
        /// The first few.
        names: String,
        /// Layers of the model as configured.
        layers: usize,
    },
    /// A tensor's shape is not what the configuration implies.
    #[error("{path}: `{tensor}` has shape {found:?}, `config.json` implies {expected:?}")]
    Shape {
        /// The safetensors file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// What it should be.
        expected: Vec<usize>,
    },
    /// A tensor's number format is not supported.
    #[error("{path}: `{tensor}` has type {dtype}; supported are {supported}")]
    Dtype {
        /// The safetensors file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its format.
        dtype: String,
        /// What is supported there.
        supported: &'static str,
    },
    /// A weight is infinite or NaN.
    #[error(
        "{path}: `{tensor}` holds a value that is infinite or not a number. The checkpoint is damaged: download it again"
    )]
    NotFinite {
        /// The safetensors file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A weight is too large for the requested type.
    #[error("`{tensor}` holds a value that is too large for {weight_type}. Use `keep` or f32 for it")]
    TooLarge {
        /// The tensor.
        tensor: String,
        /// The type.
        weight_type: WeightType,
    },
    /// A line of a recipe cannot be understood.
    #[error("{path}, line {line}: {problem}. A line is a pattern and a type, such as `layers.{{0-2}}.expert.* q8`")]
    Recipe {
        /// The recipe.
        path: PathBuf,
        /// Number of the line, from 1 on.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// An option has a value that is not supported.
    #[error("{0}")]
    Options(String),
    /// The destination exists.
    #[error("{path} exists already. Remove it, choose another name, or ask to overwrite it")]
    Exists {
        /// The destination.
        path: PathBuf,
    },
    /// The destination cannot be written because its folder does not exist.
    #[error("the folder {path} does not exist: make it, or choose another place for the model file")]
    NoFolder {
        /// The folder.
        path: PathBuf,
    },
    /// The destination cannot be written because what should be its folder is something else.
    #[error("{path} is not a folder: choose another place for the model file")]
    NotAFolder {
        /// What is there.
        path: PathBuf,
    },
    /// A model in one file has the name of the volumes to be written.
    #[error("{path} exists, and would be opened in the place of {} by that name. Remove it, or choose another name", volume.display())]
    Namesake {
        /// The file.
        path: PathBuf,
        /// The first of the volumes.
        volume: PathBuf,
    },
    /// A volume of another model has the name of a volume to be written.
    #[error(
        "{path} is a volume of another model than the one that {} is of, which alone would be overwritten. Move it, remove it, or choose \
         another name or folder", first.display()
    )]
    OtherModel {
        /// The volume.
        path: PathBuf,
        /// The first of the volumes to be written.
        first: PathBuf,
    },
    /// The volumes that a file is to be divided into are there already, but damaged.
    #[error(
        "{path} stays as it is: the volumes that it is to be divided into are there already, but damaged ({source}). Remove them, or ask to \
         overwrite them"
    )]
    DamagedVolumes {
        /// The file.
        path: PathBuf,
        /// The first damage.
        source: FormatError,
    },
    /// One file would have the name of a volume, or take the place of one, which a model in several files would lose.
    #[error("{path}: {problem}. Choose another name for the model file")]
    IsVolume {
        /// The destination.
        path: PathBuf,
        /// Whether it is the name, or the file that is there, and of which volume.
        problem: String,
    },
    /// The destination exists and must not be replaced, whatever the options.
    #[error("{path}: {problem}, and only model files are overwritten. Choose another name for the model file")]
    NotReplaced {
        /// The destination.
        path: PathBuf,
        /// What it is.
        problem: &'static str,
    },
    /// In the place of a file that must be written is something that no conversion has left there.
    #[error("{path} is in the way: {problem}. Remove it, or choose another name for the model file")]
    InTheWay {
        /// The partial file or its journal.
        path: PathBuf,
        /// What it is.
        problem: &'static str,
    },
    /// Another conversion is writing to the same place.
    #[error("{path} is being written by another conversion. Wait for it, or stop it")]
    Locked {
        /// The partial file.
        path: PathBuf,
    },
    /// There is too little free space.
    #[error(
        "{path}: the converted file needs {} more on this drive{}, {} are free. Free some space or choose another drive",
        human_bytes(*needed), of_scratch(*scratch), human_bytes(*available)
    )]
    NoSpace {
        /// The destination.
        path: PathBuf,
        /// Bytes still needed.
        needed: u64,
        /// How many of them are for temporary files of measuring.
        scratch: u64,
        /// Bytes available.
        available: u64,
    },
    /// The drive became full during the conversion.
    #[error(
        "{path}: the drive is full ({source}). What has been converted is kept: free some space, and the same command continues where \
         it stopped"
    )]
    Full {
        /// The destination.
        path: PathBuf,
        /// What could not be written.
        source: Box<dyn Error + Send + Sync>,
    },
    /// A layer could not be computed to measure the inputs of its matrices.
    #[error("layer {layer} cannot be measured: {source}. Convert with --no-importance, which measures nothing")]
    Measure {
        /// The layer.
        layer: usize,
        /// Why.
        source: Box<dyn Error + Send + Sync>,
    },
    /// A source could not be fetched.
    #[error("{0}")]
    Fetch(Arc<dyn Error + Send + Sync>),
    /// The importance file is unreadable, damaged, or belongs to another model.
    #[error(transparent)]
    Importance(#[from] ImportanceError),
    /// The model file could not be laid out or written.
    #[error(transparent)]
    Format(#[from] FormatError),
}

/// What implies the tensors of a checkpoint, and of a GGUF file.
pub(crate) const OF_CONFIG: &str = "`config.json`";
pub(crate) const OF_KEYS: &str = "its metadata";
/// What to do where the configuration asks for more than there is.
const OF_ANOTHER: &str = "Check that `config.json` belongs to this checkpoint, and that the download is complete";

impl ConvertError {
    /// An adapter for `map_err`.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> ConvertError {
        move |source| ConvertError::Io { path: path.to_owned(), action, source }
    }

    /// Turns this into [`ConvertError::Full`] for the conversion to `path`, if a full drive is the cause.
    pub(crate) fn or_full(self, path: &Path) -> Self {
        let full = [Errno::ENOSPC, Errno::EDQUOT].map(|errno| Some(errno as i32));
        let is_full = |error: &(dyn Error + 'static)| {
            error.downcast_ref::<io::Error>().is_some_and(|error| full.contains(&error.raw_os_error()))
        };
        if std::iter::successors(Some(&self as &(dyn Error + 'static)), |&error| error.source()).any(is_full) {
            let source = match self {
                ConvertError::Measure { source, .. } => source,
                other => other.into(),
            };
            return ConvertError::Full { path: path.to_owned(), source };
        }
        self
    }
}

/// Says how much of the space only measuring needs.
fn of_scratch(scratch: u64) -> String {
    if scratch == 0 {
        return String::new();
    }
    format!(" ({} of it only meanwhile, to measure; --no-importance does without)", human_bytes(scratch))
}

/// A number of bytes in a readable form, followed by the exact number.
fn human_bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut value = n as f64;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} bytes") } else { format!("{value:.1} {} ({n} bytes)", UNITS[unit]) }
}

/// The first few of `names`, for a message.
pub(crate) fn first_few(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let shown: Vec<_> = names.iter().take(SHOWN).map(|n| format!("`{n}`")).collect();
    let more = if names.len() > SHOWN { ", …" } else { "" };
    shown.join(", ") + more
}

/// The first few names of tensors, and their number if there are several.
pub(crate) fn counted(names: &[String]) -> String {
    match names.len() {
        1 => first_few(names),
        n => format!("{n} tensors, {}", first_few(names)),
    }
}
