//! Where the weights of a model file came from: written by a conversion, and compared with a checkpoint.
//!
//! `docs/FORMAT.md` describes both blobs and the contents of the digests.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sluice_checksum::xxh3_128;
use sluice_format::{ModelFile, PROVENANCE_BLOB, SOURCE_DIGESTS_BLOB, TEXT_FILES};

use crate::contents::{LEAF, Part, PartDigest, digest_of, parts_of};
use crate::error::ConvertError;
use crate::options::TypeChoice;
use crate::pack::Outcome;
use crate::plan::{CONVERTER, LeftOut, Plan};
use crate::report::errors;
use crate::source::{self, header, is_plain_name, open_safetensors, recognise, side_file};

/// Bytes read at once for a comparison: whole leaves.
const PIECE: u64 = 64 * LEAF;
/// Prefix of this program's own blobs; all others are files of the checkpoint.
const OWN_BLOBS: &str = "sluice/";

/// One file of the source.
#[derive(Debug, Serialize, Deserialize)]
struct SourceFileRecord {
    name: String,
    bytes: u64,
    header_xxh3_128: String,
    /// Digests of the file in the blob of digests.
    #[serde(default)]
    digests: usize,
    /// Digest of header and all tensors. Older files lack it.
    xxh3_128: Option<String>,
}

#[derive(Serialize)]
struct Recipe<'a> {
    expert_type: TypeChoice,
    dense_type: TypeChoice,
    /// Lines of the recipe file, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    patterns: Option<Vec<&'a str>>,
    page_size: u32,
    /// xxh3-64 of the importance file, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    importance_xxh3_64: Option<String>,
    /// A digest of the text used for measuring and of the method, if the model was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    measured_xxh3_64: Option<String>,
}

/// The blob that says where the weights came from. Nothing in it depends on when, where or how fast the conversion ran.
#[derive(Serialize)]
struct Provenance<'a> {
    converter: &'static str,
    recipe: Recipe<'a>,
    source_files: Vec<SourceFileRecord>,
    /// Computed from the digests of the sources of all extents, in file order.
    source_xxh3_128: String,
    types: &'a BTreeMap<String, Vec<String>>,
    relative_rms_error: BTreeMap<String, f64>,
    widened: &'a [String],
    left_out: &'a [LeftOut],
}

fn hex(digest: u128) -> String {
    format!("{digest:032x}")
}

/// The digest of a file, from that of its header and those of its parts.
fn file_digest(header: u128, parts: &[u128]) -> u128 {
    digest_of(std::iter::once(&header).chain(parts))
}

/// The provenance blob; `parts` are the digests of the source's parts.
pub(crate) fn blob(plan: &Plan, outcomes: &[Outcome], parts: &[u128]) -> Vec<u8> {
    let of_file = plan.checkpoint.parts.chunk_by(|a, b| a.file == b.file);
    let checkpoint = &plan.checkpoint;
    let mut counts = vec![0; checkpoint.files().len()];
    of_file.for_each(|group| counts[group[0].file] = group.len());
    let mut rest = parts;
    let headers = &checkpoint.header_digests;
    let files = checkpoint.files().iter().zip(headers).zip(counts).map(|((f, &header), count)| {
        let (own, others) = rest.split_at(count);
        rest = others;
        SourceFileRecord {
            name: f.name.clone(),
            bytes: f.len,
            header_xxh3_128: hex(header),
            digests: count,
            xxh3_128: Some(hex(file_digest(header, own))),
        }
    });
    let provenance = Provenance {
        converter: CONVERTER,
        recipe: Recipe {
            expert_type: plan.options.expert_type,
            dense_type: plan.options.dense_type,
            patterns: plan.options.recipe.as_ref().map(|r| r.lines()),
            page_size: plan.options.page_size,
            measured_xxh3_64: plan.options.measured.filter(|_| plan.is_measured()).map(|m| format!("{m:016x}")),
            importance_xxh3_64: plan.importance.as_ref().map(|i| format!("{:016x}", i.digest())),
        },
        source_files: files.collect(),
        source_xxh3_128: hex(digest_of(outcomes.iter().map(|o| &o.source_digest))),
        types: &plan.types,
        relative_rms_error: errors(plan, outcomes),
        widened: &plan.widened,
        left_out: &plan.left_out,
    };
    serde_json::to_vec_pretty(&provenance).expect("plain data with string keys always serialises")
}

/// The fields of a provenance that a comparison needs.
#[derive(Deserialize)]
struct Sources {
    #[serde(default)]
    synthetic: bool,
    #[serde(default)]
    source_files: Vec<SourceFileRecord>,
}

/// The result of comparing a file of a checkpoint with the source of a model file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SourceFile {
    /// Its name inside the folder.
    pub name: String,
    /// How it differs; `None` if it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub difference: Option<String>,
    /// The tensors in it that differ, if its header is the same.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tensors: Vec<String>,
}

/// A model file and a checkpoint that are compared.
#[derive(Debug)]
pub struct Comparison {
    model: PathBuf,
    folder: PathBuf,
    records: Vec<SourceFileRecord>,
    /// For each record.
    digests: Vec<Vec<u128>>,
    /// Name and contents of the files that the model file holds verbatim.
    verbatim: Vec<(String, Vec<u8>)>,
}

impl Comparison {
    /// Reads the provenance of `model`, to compare it with the checkpoint in `folder`.
    ///
    /// # Errors
    /// [`ConvertError::NoProvenance`] if it is incomplete, [`ConvertError::NotACheckpoint`] if there is no such folder.
    pub fn new(model: &ModelFile, folder: &Path) -> Result<Self, ConvertError> {
        let lacks =
            |problem: &str| ConvertError::NoProvenance { path: model.path().to_owned(), problem: problem.into() };
        let blob = model.metadata().get(PROVENANCE_BLOB).ok_or_else(|| lacks("it does not say what it was made of"))?;
        let unreadable = |e| lacks(&format!("what it says of its source cannot be read: {e}"));
        let sources: Sources = serde_json::from_slice(blob).map_err(unreadable)?;
        if sources.synthetic {
            return Err(lacks("it has random weights of `sluice synth`, and no source"));
        }
        let records = sources.source_files;
        let bytes = model.metadata().get(SOURCE_DIGESTS_BLOB);
        let (Some(bytes), false) = (bytes, records.is_empty() || records.iter().any(|r| r.xxh3_128.is_none())) else {
            return Err(lacks(
                "an older version has converted it, which kept no digests of its source. Convert the checkpoint again to \
                 be able to compare them",
            ));
        };
        let mut rest = bytes.as_chunks::<16>().0.iter().map(|b| u128::from_le_bytes(*b));
        let digests: Vec<Vec<u128>> = records.iter().map(|r| rest.by_ref().take(r.digests).collect()).collect();
        let sound = |(r, own): (&SourceFileRecord, &Vec<u128>)| own.len() == r.digests && is_plain_name(&r.name);
        if rest.next().is_some() || !records.iter().zip(&digests).all(sound) {
            return Err(lacks("what it says of its source contradicts itself"));
        }
        // For a GGUF file, its folder, because further parts of the model are there.
        let beside =
            folder.parent().map_or(Path::new("."), |f| if f.as_os_str().is_empty() { Path::new(".") } else { f });
        let folder = if recognise::is_gguf(folder) { beside } else { folder };
        if !folder.is_dir() {
            let problem = "it is not a folder".to_owned();
            return Err(ConvertError::NotACheckpoint { path: folder.to_owned(), problem });
        }
        let blobs = model.metadata().iter().filter(|(name, _)| !name.starts_with(OWN_BLOBS) && is_plain_name(name));
        let verbatim = blobs.map(|(name, blob)| (name.to_owned(), blob.to_vec())).collect();
        Ok(Comparison { model: model.path().to_owned(), folder: folder.to_owned(), records, digests, verbatim })
    }

    /// Bytes that the source's weights had.
    pub fn bytes(&self) -> u64 {
        self.records.iter().fold(0, |sum, r| sum.saturating_add(r.bytes))
    }

    /// Compares every file and reads each once. `read` is told about bytes as they are read, by several threads.
    ///
    /// # Errors
    /// [`ConvertError::Io`] for files that cannot be read, and [`ConvertError::SourceChanged`] for one that changes during the
    /// comparison, because that would show nothing about its contents.
    pub fn run(&self, read: &(dyn Fn(u64) + Sync)) -> Result<Vec<SourceFile>, ConvertError> {
        if let Some(first) = self.records.first().filter(|first| recognise::is_gguf(&self.folder.join(&first.name))) {
            return self.gguf(&self.folder.join(&first.name), read);
        }
        let mut all = Vec::new();
        for (record, digests) in self.records.iter().zip(&self.digests) {
            all.push(self.shard(record, digests, read)?);
        }
        for (name, blob) in &self.verbatim {
            let difference = match side_file(&self.folder, name)? {
                None => Some("it is missing".to_owned()),
                Some(bytes) if bytes != *blob => Some("it is not the one that the model file holds".to_owned()),
                Some(_) => None,
            };
            all.push(SourceFile { name: name.clone(), difference, tensors: Vec::new() });
        }
        // Files that a conversion would carry now.
        for name in TEXT_FILES.into_iter().filter(|name| !self.verbatim.iter().any(|(held, _)| held == name)) {
            if side_file(&self.folder, name)?.is_some() {
                let difference = Some("the model file does not hold it".to_owned());
                all.push(SourceFile { name: name.to_owned(), difference, tensors: Vec::new() });
            }
        }
        Ok(all)
    }

    /// Compares the parts of a model in GGUF files, and the result of their keys.
    fn gguf(&self, path: &Path, read: &(dyn Fn(u64) + Sync)) -> Result<Vec<SourceFile>, ConvertError> {
        let of = |name: &str, difference, tensors| SourceFile { name: name.to_owned(), difference, tensors };
        let checkpoint = match source::open(path) {
            Ok(checkpoint) => checkpoint,
            Err(e @ (ConvertError::Io { .. } | ConvertError::SourceChanged { .. })) => return Err(e),
            Err(e) => return Ok(vec![of(&self.records[0].name, Some(e.to_string()), Vec::new())]),
        };
        let mut all = Vec::new();
        for (number, (record, digests)) in self.records.iter().zip(&self.digests).enumerate() {
            let name = record.name.as_str();
            let file = checkpoint.files().get(number).filter(|file| file.name == name && file.len == record.bytes);
            let head = checkpoint.header_digests.get(number).copied().unwrap_or_default();
            if file.is_none() || hex(head) != record.header_xxh3_128 {
                let problem = "it is missing, or has another length or another head";
                all.push(of(name, Some(problem.to_owned()), Vec::new()));
                continue;
            }
            let parts: Vec<Part> = checkpoint.parts.iter().filter(|part| part.file == number).copied().collect();
            let read_at = |at: u64, out: &mut [u8]| checkpoint.source().read_at(number, at, out);
            let found = parts.par_iter().map(|part| part_digest(&read_at, part, read));
            let found: Vec<u128> = found.collect::<Result<_, _>>()?;
            let name_of = |part: &Part| {
                let tensor = checkpoint.tensors.iter().find(|t| (t.file, t.start) == (number, part.start));
                tensor.map_or_else(|| format!("bytes at {}", part.start), |t| t.name.clone())
            };
            all.push(self.compared(record, digests, head, &parts, &found, &name_of)?);
        }
        checkpoint.check_unchanged()?;
        for (name, blob) in &self.verbatim {
            let difference = match checkpoint.side_file(name)? {
                Some(bytes) if bytes == *blob => None,
                _ => Some("it is not what this version makes of the keys of the GGUF file".to_owned()),
            };
            all.push(of(name, difference, Vec::new()));
        }
        Ok(all)
    }

    /// The result from the digests of a file's parts; `name_of` names the contents of a part.
    fn compared(
        &self,
        record: &SourceFileRecord,
        digests: &[u128],
        head: u128,
        parts: &[Part],
        found: &[u128],
        name_of: &dyn Fn(&Part) -> String,
    ) -> Result<SourceFile, ConvertError> {
        let of = |difference, tensors| SourceFile { name: record.name.clone(), difference, tensors };
        let contradiction = || ConvertError::NoProvenance {
            path: self.model.clone(),
            problem: format!("what it says of `{}` contradicts itself", record.name),
        };
        if found.len() != digests.len() {
            return Err(contradiction());
        }
        let other = parts.iter().zip(found.iter().zip(digests)).filter(|(_, (found, kept))| found != kept);
        let tensors: Vec<String> = other.map(|(part, _)| name_of(part)).collect();
        if tensors.is_empty() {
            let whole = Some(hex(file_digest(head, found))) == record.xxh3_128;
            return if whole { Ok(of(None, tensors)) } else { Err(contradiction()) };
        }
        let differ = if tensors.len() == 1 { "differs" } else { "differ" };
        let difference = format!("{} of {} tensors {differ}", tensors.len(), parts.len());
        Ok(of(Some(difference), tensors))
    }

    fn shard(
        &self,
        record: &SourceFileRecord,
        digests: &[u128],
        read: &(dyn Fn(u64) + Sync),
    ) -> Result<SourceFile, ConvertError> {
        let of = |difference| SourceFile { name: record.name.clone(), difference, tensors: Vec::new() };
        let differs = |problem: String| Ok(of(Some(problem)));
        let path = self.folder.join(&record.name);
        if !path.exists() {
            return differs("it is missing".into());
        }
        let (file, stamp, len, head) = match open_safetensors(&path) {
            Ok(opened) => opened,
            Err(ConvertError::Damaged { problem, .. }) => return differs(problem),
            Err(e) => return Err(e),
        };
        if len != record.bytes {
            return differs(format!("it has {len} bytes, the one that was converted had {}", record.bytes));
        }
        if hex(xxh3_128(&head)) != record.header_xxh3_128 {
            return differs("its header differs: it holds other tensors, or in another order".into());
        }
        let entries = match header::parse(&head[header::LENGTH_FIELD as usize..], len) {
            Ok(entries) => entries,
            Err(problem) => return differs(problem),
        };
        let parts = parts_of(0, entries.iter().map(|e| (e.start, e.len)), head.len() as u64, len);
        let read_at = |at: u64, out: &mut [u8]| file.read_at(&path, at, out);
        let found = parts.par_iter().map(|part| part_digest(&read_at, part, read));
        let found: Vec<u128> = found.collect::<Result<_, _>>()?;
        if file.stamp().map_err(ConvertError::io(&path, "read its state"))? != stamp {
            return Err(ConvertError::SourceChanged { path });
        }
        let name_of = |part: &Part| {
            let entry = entries.iter().find(|e| e.start == part.start && e.len > 0);
            entry.map_or_else(|| format!("bytes at {}", part.start), |e| e.name.clone())
        };
        self.compared(record, digests, xxh3_128(&head), &parts, &found, &name_of)
    }
}

/// Fills a buffer with a file's bytes from an offset on.
type ReadAt<'a> = dyn Fn(u64, &mut [u8]) -> Result<(), ConvertError> + Sync + 'a;

fn part_digest(read_at: &ReadAt<'_>, part: &Part, read: &(dyn Fn(u64) + Sync)) -> Result<u128, ConvertError> {
    let mut digest = PartDigest::default();
    let mut buffer = vec![0; PIECE.min(part.len) as usize];
    let mut done = 0;
    while done < part.len {
        let piece = &mut buffer[..PIECE.min(part.len - done) as usize];
        read_at(part.start + done, piece)?;
        digest.update(piece);
        done += piece.len() as u64;
        read(piece.len() as u64);
    }
    Ok(digest.finish())
}
