//! What can be wrong with a file, one variant per check.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::superblock::{PAGE_SIZES, READ_VERSIONS};

/// A checksummed region that is not an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// Page 0.
    Superblock,
    /// The extent table.
    ExtentTable,
    /// The tensor table.
    TensorTable,
    /// The metadata.
    Metadata,
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Region::Superblock => "superblock",
            Region::ExtentTable => "extent table",
            Region::TensorTable => "tensor table",
            Region::Metadata => "metadata",
        })
    }
}

/// Why a file was refused. Every variant names the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The operating system refused.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
    /// No magic.
    #[error(
        "{path} is not a Sluice model file. Convert a Hugging Face checkpoint or a GGUF file with `sluice convert` first"
    )]
    NotSluice {
        /// The file.
        path: PathBuf,
    },
    /// The superblock was never written.
    #[error(
        "{path} begins with zeros where a model file has its superblock: it is an unfinished conversion, or no model was ever written to it. \
         If a conversion was interrupted, run the same `sluice convert` again; it resumes. Otherwise convert or copy the model again"
    )]
    Unfinished {
        /// The file.
        path: PathBuf,
    },
    /// Its metadata was being replaced ([`crate::rewrite_metadata`]).
    #[error(
        "{path}: `sluice set` was interrupted while it changed this file, or is still at work. Once it is not, `sluice set \
         {path}` finishes it"
    )]
    Interrupted {
        /// The file.
        path: PathBuf,
    },
    /// Its metadata is being replaced.
    #[error("{path} is being changed by another `sluice set`: wait until that has ended")]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// Another version of the format.
    #[error(
        "{path} has format version {found}; this program reads versions {} to {}. Use the program that wrote it, or convert again",
        READ_VERSIONS[0], READ_VERSIONS[READ_VERSIONS.len() - 1]
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// A page size that is not allowed.
    #[error("{path} has page size {found}; allowed are {PAGE_SIZES:?}. The file is damaged: copy or convert it again")]
    PageSize {
        /// The file.
        path: PathBuf,
        /// Its page size.
        found: u32,
    },
    /// The name of a volume does not say which volume it is, so the others cannot be found.
    #[error(
        "{path} is volume {} of {count} of a model: the others cannot be found, because it is not called \
         NAME-{:05}-of-{count:05}.sluice. Give all volumes such names, in one folder", volume + 1, volume + 1
    )]
    VolumeName {
        /// The file.
        path: PathBuf,
        /// This volume, counted from 0.
        volume: u16,
        /// Volumes in all.
        count: u16,
    },
    /// No file has the name, and several models have volumes of it.
    #[error(
        "{path} is not there, and volumes of several models are called so. Name one of them: {} or {}", found[0].display(),
        found[1].display()
    )]
    Ambiguous {
        /// The name.
        path: PathBuf,
        /// The first volumes of two of the models.
        found: [PathBuf; 2],
    },
    /// Volumes would be too small for the model.
    #[error("volumes of {most} bytes are too small for this model: the least is {least} bytes")]
    VolumeSize {
        /// The requested limit for one volume, in bytes.
        most: u64,
        /// The smallest limit that is enough, in bytes.
        least: u64,
    },
    /// A volume is missing.
    #[error(
        "{path} is missing: {} is one of the {count} volumes of a model, and all are needed. Put it there or beside the first \
         one, or a link to it; if its drive is mounted elsewhere now, name its folder in the variable SLUICE_VOLUMES{searched}: {source}",
        if path == named { "it".to_owned() } else { named.display().to_string() }
    )]
    MissingVolume {
        /// The missing file.
        path: PathBuf,
        /// The volume that was named.
        named: PathBuf,
        /// Volumes in all.
        count: u16,
        /// Which folders the variable names, as a part of the sentence, or an empty text.
        searched: String,
        /// The operating system's error.
        source: io::Error,
    },
    /// A file has the name of a volume, but not the content of one.
    #[error(
        "{path} is damaged: by its name it is volume {} of {count} of a model, but {problem}. Copy or convert it again", volume + 1
    )]
    DamagedVolume {
        /// The file.
        path: PathBuf,
        /// The volume, counted from 0.
        volume: u16,
        /// Volumes in all.
        count: u16,
        /// What is wrong.
        problem: &'static str,
    },
    /// A volume belongs to another model.
    #[error("{path} is not of the same model as {named}: {problem}. Get all volumes from the same place")]
    ForeignVolume {
        /// The file.
        path: PathBuf,
        /// The volume that was named.
        named: PathBuf,
        /// What differs.
        problem: &'static str,
    },
    /// The file is shorter or longer than its superblock says.
    #[error(
        "{path} has {actual} bytes, its superblock says {expected}. {}: copy or convert it again",
        if actual < expected {
            "The copy is incomplete"
        } else {
            "It has bytes behind its end. If `sluice set` was interrupted, run it again, which mends that; if not"
        }
    )]
    FileLength {
        /// The file.
        path: PathBuf,
        /// Bytes found.
        actual: u64,
        /// Bytes expected.
        expected: u64,
    },
    /// A region's checksum does not match.
    #[error("{path}: the {region} is damaged (its checksum does not match). Copy or convert the file again")]
    RegionChecksum {
        /// The file.
        path: PathBuf,
        /// The region.
        region: Region,
    },
    /// An extent's checksum does not match.
    #[error(
        "{path}: {extent} at offset {offset} is damaged (its checksum does not match). Copy or convert the file again"
    )]
    ExtentChecksum {
        /// The file.
        path: PathBuf,
        /// The extent's name.
        extent: String,
        /// Its offset.
        offset: u64,
    },
    /// A compressed extent cannot be decompressed, although its checksum matches.
    #[error("{path}: {extent} at offset {offset} cannot be decompressed: {problem}. Get or convert the file again")]
    ExtentCode {
        /// The file.
        path: PathBuf,
        /// The extent's name.
        extent: String,
        /// Its offset.
        offset: u64,
        /// What is wrong.
        problem: String,
    },
    /// The operating system could not read an extent.
    #[error("{path}: cannot read {extent} at offset {offset}: {source}")]
    ExtentRead {
        /// The file.
        path: PathBuf,
        /// The extent's name.
        extent: String,
        /// Its offset.
        offset: u64,
        /// The operating system's error.
        source: io::Error,
    },
    /// A region breaks a rule of the format.
    #[error("{path}: the {region} is invalid: {problem}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The region.
        region: Region,
        /// What is wrong.
        problem: String,
    },
    /// A plan for a new file breaks a rule of the format.
    #[error("cannot lay out the file: {0}")]
    Layout(String),
}
