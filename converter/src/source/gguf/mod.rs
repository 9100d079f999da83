//! GGUF files of llama.cpp, presented as the Hugging Face checkpoint from which they were made.
//!
//! | module | content |
//! |---|---|
//! | `cursor`, `container` | the head of a file; nothing in it is trusted |
//! | [`metadata`] | values by key |
//! | `split` | models in several files |
//! | `arch`, `keys`, `config`, `rope` | keys of an architecture → `config.json` |
//! | `names`, `table` | names and arrangement of tensors → those of the hub |
//! | `tokenizer` | vocabulary → `tokenizer.json` and related files |
//! | `source` | the files, with small files made from metadata |
//!
//! The plan sees no difference: families, checks, journal and provenance are those of every checkpoint.

mod arch;
mod config;
mod container;
mod cursor;
mod keys;
pub(crate) mod metadata;
mod names;
mod rope;
mod source;
mod split;
mod table;
mod tokenizer;

use std::collections::HashMap;
use std::path::Path;

use self::arch::Arch;
use self::config::{Described, Factors};
pub(crate) use self::container::MAGIC;
use self::container::{Head, Tensor};
use self::keys::Keys;
use self::metadata::Problem;
use self::source::WithTexts;
use self::table::Table;
use super::{CONFIG, Checkpoint, Source, without_layer};
use crate::error::ConvertError;

/// Opens the model to which the file at `path` belongs, as its only file or as any part.
pub(crate) fn open(path: &Path) -> Result<Checkpoint, ConvertError> {
    let source = super::folder::Folder::of_files(path, &split::files(path)?)?;
    of_source(Box::new(source))
}

/// Reads the files of a source, which are all parts of one model, in order.
pub(crate) fn of_source(source: Box<dyn Source>) -> Result<Checkpoint, ConvertError> {
    let files = source.files();
    let mut heads = Vec::with_capacity(files.len());
    for (number, file) in files.iter().enumerate() {
        heads.push(container::read_head(&file.path, file.len, &|at, out| source.read_at(number, at, out))?);
    }
    let of_file = |(file, problem): (usize, Problem)| ConvertError::Config {
        path: files[file].path.clone(),
        key: problem.key,
        problem: problem.problem,
    };
    let of_files: Vec<String> = files.iter().map(|file| file.name.clone()).collect();
    split::check(&of_files, &heads).map_err(of_file)?;
    let of_first = |problem: Problem| of_file((0, problem));
    let (arch, name) = Arch::find(&heads[0].metadata).map_err(of_first)?;
    let described = describe(&*source, arch, name, &heads)?;
    let mut tables = Vec::with_capacity(heads.len());
    let patterns = |(hub, own): (String, String)| (without_layer(&hub).0, without_layer(&own).0);
    let mut called: HashMap<_, _> = names::usual(arch, &described.linear).into_iter().map(patterns).collect();
    for (number, head) in heads.iter().enumerate() {
        let read = |tensor: &Tensor| read_tensor(&*source, number, tensor);
        let table = Table { arch, described: &described, file: number, read: &read };
        let mut entries = Vec::new();
        for tensor in &head.tensors {
            let of_tensor = table.entries(tensor)?;
            let own = without_layer(&tensor.name).0;
            called.extend(of_tensor.iter().map(|entry| (without_layer(&entry.name).0, own.clone())));
            entries.extend(of_tensor);
        }
        tables.push(entries);
    }
    let mut texts = vec![(CONFIG.to_owned(), described.config.to_string().into_bytes())];
    let of_tokenizer = tokenizer::text_files(&heads[0].metadata).map_err(of_first)?;
    texts.extend(of_tokenizer.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)));
    let mut checkpoint = Checkpoint::new(Box::new(WithTexts::new(source, texts)));
    for (head, tensors) in heads.iter().zip(tables) {
        checkpoint.add_file(&head.bytes, tensors);
    }
    checkpoint.sort();
    if let Err(Problem { key, problem }) = table::check_doubles(&checkpoint.tensors) {
        return Err(ConvertError::Gguf { path: checkpoint.dir.clone(), problem: format!("`{key}` {problem}") });
    }
    checkpoint.index();
    checkpoint.notes = described.notes;
    checkpoint.whole_norms = true;
    checkpoint.called = called;
    Ok(checkpoint)
}

/// Describes the model from the keys and tensors of all parts.
fn describe(source: &dyn Source, arch: Arch, name: &str, heads: &[Head]) -> Result<Described, ConvertError> {
    let path = &source.files()[0].path;
    let tensors = heads.iter().flat_map(|head| &head.tensors).map(|t| (t.name.as_str(), t)).collect();
    let keys = Keys { arch: name, metadata: &heads[0].metadata, tensors };
    let read = |names: &[&str]| {
        let found = names.iter().find_map(|name| {
            let in_file = |(file, head): (usize, &Head)| {
                let tensor = head.tensors.iter().find(|t| t.name == *name)?;
                Some(table::vector(tensor, &|t: &Tensor| read_tensor(source, file, t)))
            };
            heads.iter().enumerate().find_map(in_file)
        });
        found.transpose().map(Option::flatten)
    };
    let factors = Factors {
        all: read(&["rope_freqs.weight", "blk.0.rope_freqs.weight"])?,
        short: read(&[table::SHORT_FACTORS])?,
        long: read(&[table::LONG_FACTORS])?,
    };
    let problem = |Problem { key, problem }| ConvertError::Config { path: path.clone(), key, problem };
    config::describe(arch, &keys, &factors).map_err(problem)
}

/// All bytes of a tensor that the caller knows to be small.
fn read_tensor(source: &dyn Source, file: usize, tensor: &Tensor) -> Result<Vec<u8>, ConvertError> {
    let mut bytes = vec![0; tensor.len as usize];
    source.read_at(file, tensor.start, &mut bytes)?;
    Ok(bytes)
}
