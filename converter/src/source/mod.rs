//! Reading a checkpoint: which tensors there are, and their bytes.
//!
//! Files are read with positional reads into the caller's buffers and never mapped: the memory of a conversion does not
//! depend on the size of the checkpoint, and a file that is cut short while it is read is an error instead of a signal.

mod dtype;
mod header;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::IgnoredAny;
use sluice_format::open_regular;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

pub(crate) use dtype::{Dtype, FLOATS, WIDE_FLOATS};

use crate::error::ConvertError;

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
pub(crate) const CONFIG: &str = "config.json";
/// Longest JSON or tokenizer file that is read into memory. The largest known are about 35 MB.
const MAX_SIDE_FILE: u64 = 128 << 20;
/// Most files of one checkpoint: each is kept open.
const MAX_FILES: usize = 8192;
/// Reads shorter than this do not drop their pages from the cache: neighbours may share them.
#[cfg(target_os = "linux")]
const DROP_BEHIND: usize = 256 << 10;

/// One safetensors file.
#[derive(Debug)]
pub(crate) struct SourceFile {
    /// Its name inside the folder.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) len: u64,
    /// xxh3-128 of length field and header.
    pub(crate) header_digest: u128,
    file: File,
}

/// Where a tensor is and what it is.
#[derive(Clone, Debug)]
pub(crate) struct SourceTensor {
    pub(crate) name: String,
    /// Number of its file.
    pub(crate) file: usize,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) len: u64,
    start: u64,
}

/// An opened checkpoint.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    pub(crate) dir: PathBuf,
    pub(crate) files: Vec<SourceFile>,
    /// In the order of their names.
    pub(crate) tensors: Vec<SourceTensor>,
    by_name: HashMap<String, usize>,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens all files of the checkpoint in `dir` and checks their headers.
    pub(crate) fn open(dir: &Path) -> Result<Self, ConvertError> {
        let not_a_checkpoint =
            |problem: &str| ConvertError::NotACheckpoint { path: dir.to_owned(), problem: problem.into() };
        if !dir.is_dir() {
            return Err(not_a_checkpoint("it is not a folder. Name the folder that holds `config.json`"));
        }
        let (index, single) = (dir.join(INDEX), dir.join(SINGLE));
        let tensors_by_file = if index.exists() {
            Some(read_index(&index)?)
        } else if single.exists() {
            None
        } else {
            return Err(not_a_checkpoint("it has neither `model.safetensors` nor `model.safetensors.index.json`"));
        };
        let mut checkpoint =
            Checkpoint { dir: dir.to_owned(), files: Vec::new(), tensors: Vec::new(), by_name: HashMap::new() };
        match tensors_by_file {
            None => checkpoint.add_file(SINGLE, None)?,
            Some(map) => {
                map.iter().try_for_each(|(file, names)| checkpoint.add_file(file, Some(names)))?;
            }
        }
        checkpoint.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        checkpoint.by_name = checkpoint.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(checkpoint)
    }

    /// Opens one file. `wanted`: the tensors that the index places there; what else it holds is not part of the model.
    fn add_file(&mut self, name: &str, wanted: Option<&Vec<String>>) -> Result<(), ConvertError> {
        let path = self.dir.join(name);
        let (file, len, header) = open_safetensors(&path)?;
        let damaged = |problem| ConvertError::Damaged { path: path.clone(), problem };
        let json = &header[header::LENGTH_FIELD as usize..];
        let mut entries = header::parse(json, len).map_err(damaged)?;
        if let Some(wanted) = wanted {
            let have: HashMap<&str, ()> = entries.iter().map(|e| (e.name.as_str(), ())).collect();
            if let Some(gone) = wanted.iter().find(|n| !have.contains_key(n.as_str())) {
                return Err(damaged(format!("it does not hold `{gone}`, which `{INDEX}` places there")));
            }
            entries.retain(|e| wanted.binary_search(&e.name).is_ok());
        }
        let number = self.files.len();
        self.tensors.extend(entries.into_iter().map(|e| SourceTensor {
            name: e.name,
            file: number,
            dtype: e.dtype,
            shape: e.shape,
            len: e.len,
            start: e.start,
        }));
        self.files.push(SourceFile { name: name.to_owned(), path, len, header_digest: xxh3_128(&header), file });
        Ok(())
    }

    /// Number of the tensor of that name.
    pub(crate) fn find(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// The path of the file that holds a tensor, for messages.
    pub(crate) fn path_of(&self, tensor: usize) -> &Path {
        &self.files[self.tensors[tensor].file].path
    }

    /// Reads `out.len()` bytes of a tensor's data from byte `at` on, and adds them to `digest`.
    pub(crate) fn read(&self, tensor: usize, at: u64, out: &mut [u8], digest: &mut Xxh3) -> Result<(), ConvertError> {
        let t = &self.tensors[tensor];
        // The plan only asks for ranges inside the tensor; the header's check put the tensor inside the file.
        assert!(at + out.len() as u64 <= t.len, "`{}` has {} bytes", t.name, t.len);
        let source = &self.files[t.file];
        source.file.read_exact_at(out, t.start + at).map_err(ConvertError::io(&source.path, "read its weights"))?;
        digest.update(out);
        drop_behind(&source.file, t.start + at, out.len());
        Ok(())
    }

    /// Reads a small file of the folder, or `None` if it does not exist. JSON must be an object: a file that was cut short
    /// would only be noticed when the model is run.
    pub(crate) fn side_file(&self, name: &str) -> Result<Option<Vec<u8>>, ConvertError> {
        let Some(bytes) = side_file(&self.dir, name)? else { return Ok(None) };
        if name.ends_with(".json") {
            let object = sluice_format::json::from_slice::<BTreeMap<String, IgnoredAny>>(&bytes);
            object.map_err(|e| ConvertError::Damaged {
                path: self.dir.join(name),
                problem: format!("it is not a JSON object: {e}"),
            })?;
        }
        Ok(Some(bytes))
    }
}

/// Reads a small file of a checkpoint's folder, or `None` if it does not exist.
pub(crate) fn side_file(dir: &Path, name: &str) -> Result<Option<Vec<u8>>, ConvertError> {
    let path = dir.join(name);
    if path.exists() { read_side_file(&path).map(Some) } else { Ok(None) }
}

/// What has been converted is not read again: its pages would only push out those of other programs.
#[cfg(target_os = "linux")]
fn drop_behind(file: &File, offset: u64, len: usize) {
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
    if len >= DROP_BEHIND {
        // Advice: where the system does not take it, nothing is lost but cache.
        let _ = posix_fadvise(file, offset as i64, len as i64, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
}

#[cfg(not(target_os = "linux"))]
fn drop_behind(_file: &File, _offset: u64, _len: usize) {}

/// Opens a safetensors file; returns it with its length and its header, length field included.
fn open_safetensors(path: &Path) -> Result<(File, u64, Vec<u8>), ConvertError> {
    let file = open_regular(path).map_err(ConvertError::io(path, "open it"))?;
    let len = file.metadata().map_err(ConvertError::io(path, "read its length"))?.len();
    let damaged = |problem: String| ConvertError::Damaged { path: path.to_owned(), problem };
    if len < header::LENGTH_FIELD {
        return Err(damaged(format!("it has only {len} bytes")));
    }
    let mut field = [0; header::LENGTH_FIELD as usize];
    file.read_exact_at(&mut field, 0).map_err(ConvertError::io(path, "read its header"))?;
    let header_len = header::header_len(field, len).map_err(damaged)?;
    let mut header = vec![0; (header::LENGTH_FIELD + header_len) as usize];
    file.read_exact_at(&mut header, 0).map_err(ConvertError::io(path, "read its header"))?;
    Ok((file, len, header))
}

/// File name → sorted names of its tensors.
fn read_index(path: &Path) -> Result<BTreeMap<String, Vec<String>>, ConvertError> {
    let damaged = |problem: String| ConvertError::Damaged { path: path.to_owned(), problem };
    let bytes = read_side_file(path)?;
    let index: ShardIndex =
        sluice_format::json::from_slice(&bytes).map_err(|e| damaged(format!("it is not valid: {e}")))?;
    let mut by_file: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, file) in index.weight_map {
        if !is_plain_name(&file) {
            return Err(damaged(format!(
                "it places `{tensor}` in {file:?}, which is not a name of a file in this folder"
            )));
        }
        // A BTreeMap yields tensors sorted, so each file's list is sorted too.
        by_file.entry(file).or_default().push(tensor);
    }
    if by_file.is_empty() || by_file.len() > MAX_FILES {
        return Err(damaged(format!("it names {} files", by_file.len())));
    }
    Ok(by_file)
}

/// Whether `name` names a file directly inside a folder: an index must not lead anywhere else.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}

/// Reads a small file whole.
pub(crate) fn read_side_file(path: &Path) -> Result<Vec<u8>, ConvertError> {
    let file = open_regular(path).map_err(ConvertError::io(path, "open it"))?;
    let mut bytes = Vec::new();
    // Bounded by what is read, not by what the file system says: files of /proc have no length.
    file.take(MAX_SIDE_FILE + 1).read_to_end(&mut bytes).map_err(ConvertError::io(path, "read it"))?;
    if bytes.len() as u64 > MAX_SIDE_FILE {
        let problem = format!("it has more than {MAX_SIDE_FILE} bytes");
        return Err(ConvertError::Damaged { path: path.to_owned(), problem });
    }
    Ok(bytes)
}
