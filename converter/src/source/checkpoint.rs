//! The table of tensors in a source, and access to their bytes.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::IgnoredAny;
use sluice_checksum::{Xxh3, xxh3_128};

use super::folder::read_header;
use super::locate::Located;
use super::{Dtype, INDEX, RowOrder, Source, SourceFile, Stamp, header};
use crate::contents::{Part, parts_of};
use crate::error::{ConvertError, OF_CONFIG, OF_KEYS, counted, first_few};

/// Location and form of a tensor.
#[derive(Clone, Debug)]
pub(crate) struct SourceTensor {
    pub(crate) name: String,
    /// Index of its file; for a derived tensor, of the file from which it is derived.
    pub(crate) file: usize,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) len: u64,
    /// Whether the index names it, if there is one.
    pub(crate) indexed: bool,
    /// First byte in its file; 0 for a derived tensor.
    pub(crate) start: u64,
    /// The order of its rows there.
    pub(crate) order: RowOrder,
    /// All bytes of a small tensor that is not in any file in the model's form, but computed from the files.
    pub(crate) derived: Option<Arc<[u8]>>,
}

/// A tensor that the index names but no file holds.
#[derive(Clone, Debug)]
pub(crate) struct AbsentTensor {
    pub(crate) tensor: String,
    /// Where the index places it.
    pub(crate) file: String,
    /// Whether that file does not exist.
    pub(crate) file_is_absent: bool,
}

/// An opened checkpoint.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    source: Box<dyn Source>,
    /// Where the source is, for messages.
    pub(crate) dir: PathBuf,
    /// xxh3-128 of all bytes before the tensors, for each file.
    pub(crate) header_digests: Vec<u128>,
    /// In order of their names.
    pub(crate) tensors: Vec<SourceTensor>,
    /// All bytes of all files after their headers, in order of files and offsets.
    pub(crate) parts: Vec<Part>,
    /// What the index names but no file holds.
    pub(crate) absent: Vec<AbsentTensor>,
    /// Whether bytes called zero points are used; otherwise they are leftovers, and must be zero.
    pub(crate) has_zero_points: bool,
    /// Remarks for the user.
    pub(crate) notes: Vec<String>,
    /// A possible explanation for a tensor that is not found.
    pub(crate) hint: Option<String>,
    /// Whether norms are the factors in every family, even those whose releases store one less.
    pub(crate) whole_norms: bool,
    /// What a GGUF file calls tensors, by their names on the hub, both without the number of the layer; empty for other checkpoints.
    pub(crate) called: HashMap<String, String>,
    by_name: HashMap<String, usize>,
}

/// The name of a tensor with a star for the number of its layer, and that number.
pub(crate) fn without_layer(name: &str) -> (String, Option<&str>) {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let layer = name.split('.').find(|part| is_number(part));
    let mut found = false;
    let parts = name.split('.').map(|part| match is_number(part) && !std::mem::replace(&mut found, true) {
        true => "*",
        false => part,
    });
    (parts.collect::<Vec<_>>().join("."), layer)
}

impl Checkpoint {
    /// A checkpoint without tensors, over a source.
    pub(crate) fn new(source: Box<dyn Source>) -> Self {
        Checkpoint {
            dir: source.path().to_owned(),
            source,
            header_digests: Vec::new(),
            tensors: Vec::new(),
            parts: Vec::new(),
            by_name: HashMap::new(),
            absent: Vec::new(),
            has_zero_points: false,
            notes: Vec::new(),
            hint: None,
            whole_norms: false,
            called: HashMap::new(),
        }
    }

    /// What the files call a tensor, for messages: layers that are alike call their tensors alike.
    pub(crate) fn shown(&self, tensor: &str) -> String {
        let (pattern, layer) = without_layer(tensor);
        let own = self.called.get(&pattern).map(|own| own.replacen('*', layer.unwrap_or_default(), 1));
        own.unwrap_or_else(|| match self.called.is_empty() {
            true => tensor.to_owned(),
            false => format!("{tensor}, as the hub calls it"),
        })
    }

    /// That these tensors are missing, `count` in all.
    pub(crate) fn lacks(&self, count: usize, names: String, hint: String) -> ConvertError {
        let source_of = if self.called.is_empty() { OF_CONFIG } else { OF_KEYS };
        ConvertError::MissingTensors { path: self.dir.clone(), source_of, count, names, hint }
    }

    /// Reads the headers of safetensors files and checks them.
    pub(crate) fn of_safetensors(source: Box<dyn Source>, located: Located) -> Result<Self, ConvertError> {
        let Located { places, absent, notes, hint, .. } = located;
        let mut checkpoint = Checkpoint { notes, hint, ..Checkpoint::new(source) };
        checkpoint.add_files(places.as_ref())?;
        checkpoint.sort();
        checkpoint.decide_doubles(places.as_ref())?;
        checkpoint.index();
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

    /// Adds the tensors of the source's next file. `header` is its bytes up to the first that can belong to a tensor. After all
    /// files, [`Checkpoint::sort`] and [`Checkpoint::index`] complete the table.
    pub(crate) fn add_file(&mut self, header: &[u8], tensors: Vec<SourceTensor>) {
        let number = self.header_digests.len();
        let len = self.source.files()[number].len;
        let ranges = tensors.iter().filter(|t| t.derived.is_none()).map(|t| (t.start, t.len));
        self.parts.extend(parts_of(number, ranges, header.len() as u64, len));
        self.header_digests.push(xxh3_128(header));
        self.tensors.extend(tensors);
    }

    /// Sorts the tensors by name.
    pub(crate) fn sort(&mut self) {
        self.tensors.sort_by(|a, b| a.name.cmp(&b.name));
    }

    /// Makes tensors findable by their names, which are unique by now.
    pub(crate) fn index(&mut self) {
        self.by_name = self.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
    }

    /// Reads the headers of all files. If one is damaged, the error says how many others are: the whole download may have to be
    /// repeated.
    fn add_files(&mut self, places: Option<&BTreeMap<String, String>>) -> Result<(), ConvertError> {
        let (mut first, mut others) = (None, Vec::new());
        for number in 0..self.files().len() {
            match self.add_safetensors(number, places) {
                Ok(()) => {}
                Err(ConvertError::Damaged { path, problem }) if first.is_none() => first = Some((path, problem)),
                Err(ConvertError::Damaged { .. }) => others.push(self.files()[number].name.clone()),
                Err(other) => return Err(other),
            }
        }
        let Some((path, mut problem)) = first else { return Ok(()) };
        if !others.is_empty() {
            let (count, total) = (others.len(), self.files().len());
            problem += &format!(". So are {count} more of the {total} files: {}", first_few(&others));
        }
        Err(ConvertError::Damaged { path, problem })
    }

    /// Reads the header of one file.
    fn add_safetensors(
        &mut self,
        number: usize,
        places: Option<&BTreeMap<String, String>>,
    ) -> Result<(), ConvertError> {
        let file = &self.source.files()[number];
        let header = read_header(&file.path, file.len, &|at, out| self.source.read_at(number, at, out))?;
        let damaged = |problem| ConvertError::Damaged { path: file.path.clone(), problem };
        let json = &header[header::LENGTH_FIELD as usize..];
        let entries = header::parse(json, file.len).map_err(damaged)?;
        let tensor = |e: header::HeaderEntry| SourceTensor {
            indexed: places.is_none_or(|places| places.contains_key(&e.name)),
            name: e.name,
            file: number,
            dtype: e.dtype,
            shape: e.shape,
            len: e.len,
            start: e.start,
            order: RowOrder::AsStored,
            derived: None,
        };
        let tensors = entries.into_iter().map(tensor).collect();
        self.add_file(&header, tensors);
        Ok(())
    }

    /// If several files hold a tensor of the same name, keeps the one that the index names.
    fn decide_doubles(&mut self, places: Option<&BTreeMap<String, String>>) -> Result<(), ConvertError> {
        let files = self.source.files();
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
            return Err(ConvertError::Damaged { path: self.source.text_path(INDEX), problem });
        }
        self.tensors = kept;
        let names = counted(&doubles);
        self.notes.push(format!("in several files, and taken from the one that `{INDEX}` names: {names}"));
        Ok(())
    }

    /// The source of the bytes.
    pub(crate) fn source(&self) -> &dyn Source {
        &*self.source
    }

    /// The files that hold tensors.
    pub(crate) fn files(&self) -> &[SourceFile] {
        self.source.files()
    }

    /// Index of the tensor with this name.
    pub(crate) fn find(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// The path of the file that holds a tensor, for messages.
    pub(crate) fn path_of(&self, tensor: usize) -> &Path {
        &self.files()[self.tensors[tensor].file].path
    }

    /// Reads `out.len()` bytes of a tensor's stored data from byte `at` on, and adds them to `digest`.
    pub(crate) fn read(&self, tensor: usize, at: u64, out: &mut [u8], digest: &mut Xxh3) -> Result<(), ConvertError> {
        let t = &self.tensors[tensor];
        // The plan requests only ranges inside the tensor, and the check of the header ensures that the tensor is inside the file.
        assert!(at + out.len() as u64 <= t.len, "`{}` has {} bytes", t.name, t.len);
        match &t.derived {
            Some(bytes) => out.copy_from_slice(&bytes[at as usize..][..out.len()]),
            None => self.source.read_at(t.file, t.start + at, out)?,
        }
        digest.update(out);
        Ok(())
    }

    /// Reads bytes of a part from its byte `at` on.
    pub(crate) fn read_part(&self, part: usize, at: u64, out: &mut [u8]) -> Result<(), ConvertError> {
        let part = &self.parts[part];
        assert!(at + out.len() as u64 <= part.len, "the part has {} bytes", part.len);
        self.source.read_at(part.file, part.start + at, out)
    }

    /// The part with a tensor's data; any part for a tensor without data, and `None` for a derived one.
    pub(crate) fn part_of(&self, tensor: usize) -> Option<usize> {
        let t = &self.tensors[tensor];
        let stored = t.derived.is_none();
        stored.then(|| self.parts.partition_point(|part| (part.file, part.start) < (t.file, t.start)))
    }

    /// The identity of every file before reading began.
    pub(crate) fn stamps(&self) -> Vec<Stamp> {
        self.files().iter().map(|f| f.stamp).collect()
    }

    /// Checks that no file has changed since it was opened, so what has been read is what the files hold.
    pub(crate) fn check_unchanged(&self) -> Result<(), ConvertError> {
        self.source.check_unchanged()
    }

    /// The error that a file was changed while it was read.
    pub(crate) fn changed(&self, file: usize) -> ConvertError {
        ConvertError::SourceChanged { path: self.files()[file].path.clone() }
    }

    /// Reads a small file of the source, or returns `None` if it does not exist. JSON must be an object, because a truncated file
    /// would otherwise be noticed only when the model runs.
    pub(crate) fn side_file(&self, name: &str) -> Result<Option<Vec<u8>>, ConvertError> {
        let Some(bytes) = self.source.text_file(name)? else { return Ok(None) };
        if name.ends_with(".json") {
            let object = sluice_format::json::from_slice::<BTreeMap<String, IgnoredAny>>(&bytes);
            object.map_err(|e| ConvertError::Damaged {
                path: self.source.text_path(name),
                problem: format!("it is not a JSON object: {e}"),
            })?;
        }
        Ok(Some(bytes))
    }
}
