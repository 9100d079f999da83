//! Importance matrices: the mean square of the activations that meet each column of a matrix, measured on a text.
//!
//! `docs/FORMAT.md` describes the file. It is bound to a model's geometry, not to its weights or their types: a file
//! that was measured with one conversion of a checkpoint serves every other.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use sluice_checksum::Xxh3;

use crate::bytes::{array, get_u16, get_u32, get_u64};
use crate::durable::replace_file;
use crate::extent::{ExtentKind, NO_LAYER};
use crate::fields::{importance as at, importance_entry as entry, reserved_in_use};
use crate::reader::open_regular;
use crate::spec::ModelSpec;
use crate::tensor::{Layout, is_tensor_name};

/// First bytes of an importance file.
pub const IMPORTANCE_MAGIC: [u8; 8] = *b"SLUICEIM";
/// Version of importance files that this crate reads and writes.
pub const IMPORTANCE_VERSION: u32 = 1;

/// An expert's own measurement is averaged with this many tokens of its layer's mean. So the noise of a few tokens counts
/// little, and an expert without tokens has the mean.
const PRIOR_TOKENS: f64 = 8.0;

/// Why an importance file was refused. Every variant names the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportanceError {
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
    #[error("{path} is not an importance file. Make one with `sluice calibrate`")]
    NotImportance {
        /// The file.
        path: PathBuf,
    },
    /// Another version.
    #[error(
        "{path} has version {found} of the importance format, this program reads {IMPORTANCE_VERSION}: calibrate again"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The bytes break a rule of the format.
    #[error("{path} is damaged: {problem}. Copy it again, or calibrate again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Measured on a model of another shape.
    #[error("{path} was measured on a model of another shape: calibrate with a conversion of this one")]
    Geometry {
        /// The file.
        path: PathBuf,
    },
}

/// A matrix that activations meet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MatrixKey {
    /// Kind of its extent.
    pub kind: ExtentKind,
    /// Its layer, or [`NO_LAYER`].
    pub layer: u32,
    /// Canonical name of the tensor.
    pub name: String,
    /// The expert, or the number of the matrix in a batched tensor; 0 for all parts of the head.
    pub index: u32,
}

/// What was measured at one matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct ColumnMeans {
    /// Tokens that met the matrix.
    pub tokens: u64,
    /// Mean square of the activations, by column.
    pub mean_squares: Vec<f32>,
}

/// Importance of the columns of a model's matrices.
#[derive(Clone, Debug, PartialEq)]
pub struct Importance {
    geometry: u64,
    tokens: u64,
    matrices: BTreeMap<MatrixKey, ColumnMeans>,
    /// Mean over the experts of a layer, weighted with their tokens; keys have index 0.
    layer_means: BTreeMap<MatrixKey, Vec<f64>>,
}

/// A hash of which matrices a model has and how many columns they have. It binds an importance file to the model's
/// shape.
fn geometry(spec: &ModelSpec) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&(spec.hidden_size as u64).to_le_bytes());
    for (key, columns) in expected(spec) {
        hash.update(&(key.kind as u16).to_le_bytes());
        hash.update(&key.layer.to_le_bytes());
        hash.update(key.name.as_bytes());
        hash.update(&[0]);
        hash.update(&columns.0.to_le_bytes());
        hash.update(&columns.1.to_le_bytes());
    }
    hash.digest()
}

/// Every kind of matrix of the model, with index 0, and the number and the columns of its matrices.
fn expected(spec: &ModelSpec) -> BTreeMap<MatrixKey, (u32, u64)> {
    let head = MatrixKey { kind: ExtentKind::Head, layer: NO_LAYER, name: ExtentKind::Head.name().into(), index: 0 };
    let mut all = BTreeMap::from([(head, (1, spec.hidden_size as u64))]);
    for layer in 0..spec.layers.len() {
        for kind in ExtentKind::ALL {
            let extents = spec.extent_count(kind, layer);
            let matrices =
                spec.tensors(kind, layer).into_iter().filter(|t| t.layout != Layout::Plain && !t.joins_streams());
            for tensor in matrices {
                let key = MatrixKey { kind, layer: layer as u32, name: tensor.name.into(), index: 0 };
                let count = extents.saturating_mul(tensor.shape[0]);
                all.insert(key, (u32::try_from(count).unwrap_or(u32::MAX), tensor.shape[2] as u64));
            }
        }
    }
    all
}

impl Importance {
    /// The importance that was measured at `matrices` of a model while `tokens` tokens ran through it. Refuses matrices
    /// that the model does not have or that have another number of columns, and numbers that are negative or not finite.
    ///
    /// # Errors
    /// Which matrix is at fault.
    pub fn new(
        spec: &ModelSpec,
        tokens: u64,
        matrices: BTreeMap<MatrixKey, ColumnMeans>,
    ) -> Result<Importance, String> {
        let importance = Self::unchecked(geometry(spec), tokens, matrices);
        importance.check(spec)?;
        Ok(importance)
    }

    fn unchecked(geometry: u64, tokens: u64, matrices: BTreeMap<MatrixKey, ColumnMeans>) -> Importance {
        let mut sums: BTreeMap<MatrixKey, (f64, Vec<f64>)> = BTreeMap::new();
        for (key, means) in matrices.iter().filter(|(k, m)| k.kind == ExtentKind::Expert && m.tokens > 0) {
            let (tokens, sum) = sums.entry(MatrixKey { index: 0, ..key.clone() }).or_default();
            sum.resize(sum.len().max(means.mean_squares.len()), 0.0);
            *tokens += means.tokens as f64;
            for (sum, &mean) in sum.iter_mut().zip(&means.mean_squares) {
                *sum += f64::from(mean) * means.tokens as f64;
            }
        }
        let mean = |(tokens, sum): (f64, Vec<f64>)| sum.into_iter().map(|s| s / tokens).collect();
        let layer_means = sums.into_iter().map(|(key, sum)| (key, mean(sum))).collect();
        Importance { geometry, tokens, matrices, layer_means }
    }

    fn check(&self, spec: &ModelSpec) -> Result<(), String> {
        let expected = expected(spec);
        for (key, means) in &self.matrices {
            let name = || format!("`{}` of {}", key.name, crate::extent_name(key.kind, key.layer, key.index));
            let Some(&(count, columns)) = expected.get(&MatrixKey { index: 0, ..key.clone() }) else {
                return Err(format!("the model has no matrix {}", name()));
            };
            if key.index >= count || means.mean_squares.len() as u64 != columns {
                return Err(format!("the model has {count} times {columns} columns where {} is", name()));
            }
            if !means.mean_squares.iter().all(|m| m.is_finite() && *m >= 0.0) {
                return Err(format!("{} holds a negative or infinite number, or none", name()));
            }
        }
        Ok(())
    }

    /// Tokens that ran through the model.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// What was measured, matrix by matrix.
    pub fn matrices(&self) -> &BTreeMap<MatrixKey, ColumnMeans> {
        &self.matrices
    }

    /// The importance of the columns of a matrix, or `None` if nothing is known of it. An expert's own measurement is mixed
    /// with the mean of its layer's experts; the fewer tokens the expert has seen, the more the mean counts.
    pub fn columns(&self, kind: ExtentKind, layer: u32, name: &str, index: u32) -> Option<Vec<f32>> {
        let mut key = MatrixKey { kind, layer, name: name.to_owned(), index };
        let own = self.matrices.get(&key).filter(|m| m.tokens > 0);
        key.index = 0;
        match (own, self.layer_means.get(&key)) {
            (None, None) => None,
            (Some(own), None) => Some(own.mean_squares.clone()),
            (None, Some(mean)) => Some(mean.iter().map(|&m| m as f32).collect()),
            (Some(own), Some(mean)) => {
                let share = own.tokens as f64 / (own.tokens as f64 + PRIOR_TOKENS);
                let mix = |(&own, &mean): (&f32, &f64)| (share * f64::from(own) + (1.0 - share) * mean) as f32;
                Some(own.mean_squares.iter().zip(mean).map(mix).collect())
            }
        }
    }

    /// xxh3-64 of the file's bytes: tells one importance from another.
    pub fn digest(&self) -> u64 {
        crate::checksum(&self.to_bytes())
    }

    /// The bytes of the file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = vec![0; at::LEN];
        for (key, means) in &self.matrices {
            let begin = out.len();
            out.resize(begin + entry::LEN, 0);
            let mut put = |at: usize, bytes: &[u8]| out[begin + at..][..bytes.len()].copy_from_slice(bytes);
            put(entry::KIND, &(key.kind as u16).to_le_bytes());
            put(entry::LAYER, &key.layer.to_le_bytes());
            put(entry::INDEX, &key.index.to_le_bytes());
            put(entry::COLUMNS, &(means.mean_squares.len() as u32).to_le_bytes());
            put(entry::TOKENS, &means.tokens.to_le_bytes());
            put(entry::NAME, key.name.as_bytes());
            out.extend(means.mean_squares.iter().flat_map(|m| m.to_le_bytes()));
        }
        let body_len = (out.len() - at::LEN) as u64;
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(at::MAGIC, &IMPORTANCE_MAGIC);
        put(at::VERSION, &IMPORTANCE_VERSION.to_le_bytes());
        put(at::ENTRIES, &(self.matrices.len() as u32).to_le_bytes());
        put(at::GEOMETRY, &self.geometry.to_le_bytes());
        put(at::TOKENS, &self.tokens.to_le_bytes());
        put(at::BODY_LEN, &body_len.to_le_bytes());
        let checksum = checksum(&out);
        out[at::CHECKSUM..at::CHECKSUM + 8].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Writes the file whole or not at all: beside `path` first, then under its name.
    ///
    /// # Errors
    /// [`ImportanceError::Io`].
    pub fn save(&self, path: &Path) -> Result<(), ImportanceError> {
        let error = |action| move |source| ImportanceError::Io { path: path.to_owned(), action, source };
        // The target of a link is replaced. Something that is no file, such as a pipe, is written to and not
        // replaced.
        let place = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let path = place.as_path();
        if path.metadata().is_ok_and(|found| !found.is_file()) {
            return fs::write(path, self.to_bytes()).map_err(error("write the importance"));
        }
        replace_file(path, &self.to_bytes()).map_err(error("write the importance file"))
    }

    /// Reads and checks a file that belongs to a model of this spec.
    ///
    /// # Errors
    /// [`ImportanceError`].
    pub fn load(path: &Path, spec: &ModelSpec) -> Result<Importance, ImportanceError> {
        Self::parse(path, &read(path, spec)?)?.bound_to(path, spec)
    }

    /// Parses the output of [`Importance::to_bytes`] for this model; `None` if the bytes are anything else.
    pub fn from_bytes(bytes: &[u8], spec: &ModelSpec) -> Option<Importance> {
        let nowhere = Path::new("");
        Self::parse(nowhere, bytes).and_then(|importance| importance.bound_to(nowhere, spec)).ok()
    }

    /// Most bytes of an importance for this model.
    pub fn longest(spec: &ModelSpec) -> u64 {
        longest(spec)
    }

    fn bound_to(self, path: &Path, spec: &ModelSpec) -> Result<Importance, ImportanceError> {
        if self.geometry != geometry(spec) {
            return Err(ImportanceError::Geometry { path: path.to_owned() });
        }
        let damaged = |problem| ImportanceError::Damaged { path: path.to_owned(), problem };
        self.check(spec).map_err(damaged)?;
        Ok(self)
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<Importance, ImportanceError> {
        if !bytes.starts_with(&IMPORTANCE_MAGIC) {
            return Err(ImportanceError::NotImportance { path: path.to_owned() });
        }
        let damaged = |problem: &str| ImportanceError::Damaged { path: path.to_owned(), problem: problem.to_owned() };
        if bytes.len() < at::LEN {
            return Err(damaged("it ends inside its header"));
        }
        let found = get_u32(bytes, at::VERSION);
        if found != IMPORTANCE_VERSION {
            return Err(ImportanceError::Version { path: path.to_owned(), found });
        }
        if get_u64(bytes, at::BODY_LEN) != (bytes.len() - at::LEN) as u64 {
            return Err(damaged("it is shorter or longer than its header says"));
        }
        if get_u64(bytes, at::CHECKSUM) != checksum(bytes) {
            return Err(damaged("its checksum does not match"));
        }
        if reserved_in_use(&at::FIELDS, bytes) {
            return Err(damaged("its reserved bytes are in use"));
        }
        let matrices = parse_entries(&bytes[at::LEN..], get_u32(bytes, at::ENTRIES)).map_err(damaged)?;
        Ok(Self::unchecked(get_u64(bytes, at::GEOMETRY), get_u64(bytes, at::TOKENS), matrices))
    }
}

/// Reads a file that may be an importance of this model. It reads no more bytes than such a file can have, and only regular
/// files, because others may have no end.
fn read(path: &Path, spec: &ModelSpec) -> Result<Vec<u8>, ImportanceError> {
    let io = |source| ImportanceError::Io { path: path.to_owned(), action: "read the importance file", source };
    let file = open_regular(path).map_err(io)?;
    let mut bytes = Vec::new();
    (&file).take(at::LEN as u64).read_to_end(&mut bytes).map_err(io)?;
    let most = longest(spec);
    let len = file.metadata().map_err(io)?.len();
    if bytes.starts_with(&IMPORTANCE_MAGIC) && len > most {
        if bytes.len() == at::LEN && get_u64(&bytes, at::GEOMETRY) != geometry(spec) {
            return Err(ImportanceError::Geometry { path: path.to_owned() });
        }
        let problem = format!("it has {len} bytes, where {most} are the most for this model");
        return Err(ImportanceError::Damaged { path: path.to_owned(), problem });
    }
    if bytes.starts_with(&IMPORTANCE_MAGIC) {
        file.take(most).read_to_end(&mut bytes).map_err(io)?;
    }
    Ok(bytes)
}

/// Bytes of a file in which every matrix of the model has an entry.
fn longest(spec: &ModelSpec) -> u64 {
    let entries = expected(spec).into_values();
    let bytes = entries.map(|(count, columns)| u64::from(count).saturating_mul(entry::LEN as u64 + 4 * columns));
    bytes.fold(at::LEN as u64, u64::saturating_add)
}

/// xxh3-64 of everything but the checksum itself.
fn checksum(bytes: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&bytes[..at::CHECKSUM]);
    hash.update(&bytes[at::CHECKSUM + 8..]);
    hash.digest()
}

fn parse_entries(mut body: &[u8], count: u32) -> Result<BTreeMap<MatrixKey, ColumnMeans>, &'static str> {
    let mut matrices = BTreeMap::new();
    for _ in 0..count {
        let (head, rest) = body.split_at_checked(entry::LEN).ok_or("it ends inside an entry")?;
        if reserved_in_use(&entry::FIELDS, head) {
            return Err("reserved bytes of an entry are in use");
        }
        let name: [u8; entry::NAME_LEN] = array(head, entry::NAME);
        let end = name.iter().position(|&c| c == 0).unwrap_or(entry::NAME_LEN);
        if !is_tensor_name(&name[..end]) || name[end..].iter().any(|&c| c != 0) {
            return Err("the name of a matrix is not printable ASCII");
        }
        let key = MatrixKey {
            kind: ExtentKind::from_code(get_u16(head, entry::KIND)).ok_or("the kind of a matrix is unknown")?,
            layer: get_u32(head, entry::LAYER),
            name: name[..end].iter().map(|&c| c as char).collect(),
            index: get_u32(head, entry::INDEX),
        };
        let bytes = (get_u32(head, entry::COLUMNS) as usize).checked_mul(4);
        let (values, rest) = bytes.and_then(|n| rest.split_at_checked(n)).ok_or("it ends inside an entry")?;
        body = rest;
        let mean_squares: Vec<f32> = values.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        if matrices.last_key_value().is_some_and(|(last, _)| *last >= key) {
            return Err("its matrices are not in order");
        }
        matrices.insert(key, ColumnMeans { tokens: get_u64(head, entry::TOKENS), mean_squares });
    }
    if body.is_empty() { Ok(matrices) } else { Err("bytes follow its last entry") }
}
