//! Reading a checkpoint: which tensors there are, and their bytes.
//!
//! Files are read with positional reads into the caller's buffers and never mapped: the memory of a conversion does not
//! depend on the size of the checkpoint, and a file that is cut short while it is read is an error instead of a signal.

mod dtype;
mod gguf;
pub(crate) mod header;
mod locate;
pub(crate) mod recognise;
mod stamp;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use sluice_checksum::{Xxh3, xxh3_128};
use sluice_format::open_regular;

pub(crate) use dtype::{Dtype, FLOATS, WIDE_FLOATS};
pub(crate) use stamp::Stamp;

use crate::contents::{Part, parts_of};
use crate::error::{ConvertError, counted, first_few};
pub(crate) use locate::is_plain_name;
use locate::{Located, locate};
use recognise::Foreign;

pub(crate) const INDEX: &str = "model.safetensors.index.json";
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
    /// Its identity before anything of it was read.
    pub(crate) stamp: Stamp,
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
    /// Whether the index names it, if there is one.
    pub(crate) indexed: bool,
    /// First byte in its file.
    pub(crate) start: u64,
}

/// A tensor that the index names and that no file holds.
#[derive(Clone, Debug)]
pub(crate) struct AbsentTensor {
    pub(crate) tensor: String,
    /// Where the index places it.
    pub(crate) file: String,
    /// Whether that file is not there.
    pub(crate) file_is_absent: bool,
}

/// An opened checkpoint.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    pub(crate) dir: PathBuf,
    pub(crate) files: Vec<SourceFile>,
    /// In the order of their names.
    pub(crate) tensors: Vec<SourceTensor>,
    /// All bytes of all files behind their headers, in the order of files and places.
    pub(crate) parts: Vec<Part>,
    /// What the index names and no file holds.
    pub(crate) absent: Vec<AbsentTensor>,
    /// Remarks for the user.
    pub(crate) notes: Vec<String>,
    /// What may explain that a tensor is not found.
    pub(crate) hint: Option<String>,
    by_name: HashMap<String, usize>,
}

impl Checkpoint {
    /// Opens all files of the checkpoint in `dir` and checks their headers. Tensors count wherever they are: as
    /// transformers and vLLM do, everything that the files hold is taken, also what the index does not name.
    pub(crate) fn open(dir: &Path) -> Result<Self, ConvertError> {
        if !dir.is_dir() {
            return Err(recognise::no_folder(dir));
        }
        let Located { files, places, absent, notes, hint } = locate(dir)?;
        let mut checkpoint = Checkpoint {
            dir: dir.to_owned(),
            files: Vec::new(),
            tensors: Vec::new(),
            parts: Vec::new(),
            by_name: HashMap::new(),
            absent: Vec::new(),
            notes,
            hint,
        };
        checkpoint.add_files(&files, places.as_ref())?;
        checkpoint.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        checkpoint.decide_doubles(places.as_ref())?;
        checkpoint.by_name = checkpoint.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        if let Some(places) = places {
            let gone = places.into_iter().filter(|(tensor, _)| checkpoint.find(tensor).is_none());
            let gone = gone.map(|(tensor, file)| AbsentTensor { file_is_absent: absent.contains(&file), tensor, file });
            checkpoint.absent = gone.collect();
            let holds: HashSet<&str> = checkpoint.absent.iter().map(|a| a.file.as_str()).collect();
            let empty = absent.iter().filter(|file| !holds.contains(file.as_str()));
            checkpoint.notes.extend(
                empty.map(|file| format!("`{file}` is not there: what `{INDEX}` places in it is in other files")),
            );
        }
        Ok(checkpoint)
    }

    /// Opens all files. If one is damaged, says how many others are: a download may have to be repeated as a whole.
    fn add_files(&mut self, files: &[String], places: Option<&BTreeMap<String, String>>) -> Result<(), ConvertError> {
        let (mut first, mut others) = (None, Vec::new());
        for name in files {
            match self.add_file(name, places) {
                Ok(()) => {}
                Err(ConvertError::Damaged { path, problem }) if first.is_none() => first = Some((path, problem)),
                Err(ConvertError::Damaged { .. }) => others.push(name.clone()),
                Err(other) => return Err(other),
            }
        }
        let Some((path, mut problem)) = first else { return Ok(()) };
        if !others.is_empty() {
            let (count, total) = (others.len(), files.len());
            problem += &format!(". So are {count} more of the {total} files: {}", first_few(&others));
        }
        Err(ConvertError::Damaged { path, problem })
    }

    /// Opens one file.
    fn add_file(&mut self, name: &str, places: Option<&BTreeMap<String, String>>) -> Result<(), ConvertError> {
        let path = self.dir.join(name);
        let (file, stamp, len, header) = open_safetensors(&path)?;
        let damaged = |problem| ConvertError::Damaged { path: path.clone(), problem };
        let json = &header[header::LENGTH_FIELD as usize..];
        let entries = header::parse(json, len).map_err(damaged)?;
        let number = self.files.len();
        self.parts.extend(parts_of(number, entries.iter().map(|e| (e.start, e.len)), header.len() as u64, len));
        self.tensors.extend(entries.into_iter().map(|e| SourceTensor {
            indexed: places.is_none_or(|places| places.contains_key(&e.name)),
            name: e.name,
            file: number,
            dtype: e.dtype,
            shape: e.shape,
            len: e.len,
            start: e.start,
        }));
        self.files.push(SourceFile { name: name.to_owned(), path, len, header_digest: xxh3_128(&header), stamp, file });
        Ok(())
    }

    /// Of tensors that several files hold, keeps the one that the index means.
    fn decide_doubles(&mut self, places: Option<&BTreeMap<String, String>>) -> Result<(), ConvertError> {
        let files = &self.files;
        let mut doubles: Vec<String> = Vec::new();
        for pair in self.tensors.windows(2).filter(|pair| pair[0].name == pair[1].name) {
            let [first, second] = [&pair[0], &pair[1]].map(|t| files[t.file].name.clone());
            let tensor = pair[0].name.clone();
            if !places.and_then(|p| p.get(&tensor)).is_some_and(|place| files.iter().any(|f| f.name == *place)) {
                return Err(ConvertError::Double { path: self.dir.clone(), tensor, files: [first, second] });
            }
            doubles.push(tensor);
        }
        doubles.dedup();
        if doubles.is_empty() {
            return Ok(());
        }
        let is_double = |name: &String| doubles.binary_search(name).is_ok();
        let holds = |t: &SourceTensor| places.and_then(|p| p.get(&t.name)).is_some_and(|p| *p == files[t.file].name);
        let (mut kept, tensors) = (Vec::with_capacity(self.tensors.len()), std::mem::take(&mut self.tensors));
        kept.extend(tensors.into_iter().filter(|t| !is_double(&t.name) || holds(t)));
        if let Some(lost) = doubles.iter().find(|name| kept.binary_search_by(|t| t.name.cmp(name)).is_err()) {
            let problem = format!("it places `{lost}` in a file that does not hold it, while several others do");
            return Err(ConvertError::Damaged { path: self.dir.join(INDEX), problem });
        }
        self.tensors = kept;
        let names = counted(&doubles);
        self.notes.push(format!("in several files, and taken from the one that `{INDEX}` names: {names}"));
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
        self.read_file(t.file, t.start + at, out)?;
        digest.update(out);
        Ok(())
    }

    /// Reads bytes of a part from its byte `at` on.
    pub(crate) fn read_part(&self, part: usize, at: u64, out: &mut [u8]) -> Result<(), ConvertError> {
        let part = &self.parts[part];
        assert!(at + out.len() as u64 <= part.len, "the part has {} bytes", part.len);
        self.read_file(part.file, part.start + at, out)
    }

    fn read_file(&self, file: usize, at: u64, out: &mut [u8]) -> Result<(), ConvertError> {
        let source = &self.files[file];
        source.file.read_exact_at(out, at).map_err(ConvertError::io(&source.path, "read its weights"))?;
        drop_behind(&source.file, at, out.len());
        Ok(())
    }

    /// The part that is a tensor's data; any for a tensor without data.
    pub(crate) fn part_of(&self, tensor: usize) -> usize {
        let t = &self.tensors[tensor];
        self.parts.partition_point(|part| (part.file, part.start) < (t.file, t.start))
    }

    /// The identity of every file before anything was read.
    pub(crate) fn stamps(&self) -> Vec<Stamp> {
        self.files.iter().map(|f| f.stamp).collect()
    }

    /// Checks that no file has changed since it was opened: what has been read is what the files hold.
    pub(crate) fn check_unchanged(&self) -> Result<(), ConvertError> {
        for f in &self.files {
            let now = Stamp::of(&f.file).map_err(ConvertError::io(&f.path, "read its state"))?;
            if now != f.stamp {
                return Err(self.changed(f));
            }
        }
        Ok(())
    }

    /// The error that a file was changed while it was read.
    pub(crate) fn changed(&self, file: &SourceFile) -> ConvertError {
        ConvertError::SourceChanged { path: file.path.clone() }
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
pub(crate) fn drop_behind(file: &File, offset: u64, len: usize) {
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
    if len >= DROP_BEHIND {
        // Advice: where the system does not take it, nothing is lost but cache.
        let _ = posix_fadvise(file, offset as i64, len as i64, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn drop_behind(_file: &File, _offset: u64, _len: usize) {}

/// Opens a safetensors file; returns it with its identity, its length and its header, length field included.
pub(crate) fn open_safetensors(path: &Path) -> Result<(File, Stamp, u64, Vec<u8>), ConvertError> {
    let file = open_regular(path).map_err(ConvertError::io(path, "open it"))?;
    // First of all, so that whatever changes from here on shows.
    let stamp = Stamp::settled(&file).map_err(ConvertError::io(path, "read its state"))?;
    let len = file.metadata().map_err(ConvertError::io(path, "read its length"))?.len();
    let damaged = |problem: String| ConvertError::Damaged { path: path.to_owned(), problem };
    if len < header::LENGTH_FIELD {
        return Err(damaged(format!("it has only {len} bytes")));
    }
    let mut head = vec![0; len.min(64) as usize];
    file.read_exact_at(&mut head, 0).map_err(ConvertError::io(path, "read its header"))?;
    if let Some(foreign) = Foreign::of_bytes(&head) {
        return Err(foreign.error(path));
    }
    let mut field = [0; header::LENGTH_FIELD as usize];
    file.read_exact_at(&mut field, 0).map_err(ConvertError::io(path, "read its header"))?;
    let header_len = header::header_len(field, len).map_err(damaged)?;
    let mut header = vec![0; (header::LENGTH_FIELD + header_len) as usize];
    file.read_exact_at(&mut header, 0).map_err(ConvertError::io(path, "read its header"))?;
    Ok((file, stamp, len, header))
}

/// Reads a small file whole.
pub(crate) fn read_side_file(path: &Path) -> Result<Vec<u8>, ConvertError> {
    let file = open_regular(path).map_err(ConvertError::io(path, "open it"))?;
    let mut bytes = Vec::new();
    // Bounded by what is read, not by what the filesystem says: files of /proc have no length.
    file.take(MAX_SIDE_FILE + 1).read_to_end(&mut bytes).map_err(ConvertError::io(path, "read it"))?;
    if bytes.len() as u64 > MAX_SIDE_FILE {
        let problem = format!("it has more than {MAX_SIDE_FILE} bytes");
        return Err(ConvertError::Damaged { path: path.to_owned(), problem });
    }
    match Foreign::of_bytes(&bytes) {
        Some(foreign) => Err(foreign.error(path)),
        None => Ok(bytes),
    }
}
