//! The container: the contents of a GGUF file's head, and where its tensors are
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).

use std::collections::HashSet;
use std::path::Path;

use super::cursor::{Cursor, MAX_HEAD, ReadAt};
use super::metadata::{Kind, Metadata, Numbers, Strings, Value};
use crate::error::{ConvertError, first_few};
use crate::source::GgmlType;

/// First bytes of a file.
pub(crate) const MAGIC: &[u8; 4] = b"GGUF";
/// Alignment of tensors if the file has no key for it.
const ALIGNMENT: u64 = 32;
const ALIGNMENT_KEY: &str = "general.alignment";
/// The largest accepted alignment.
const MAX_ALIGNMENT: u64 = 1 << 20;

/// Most keys. Files have fewer than a hundred.
const MAX_KEYS: u64 = 1 << 16;
/// Most tensors of a file. The largest known model has 384 experts in each of 61 layers; in old files these are separate.
const MAX_TENSORS: u64 = 1 << 20;
/// Longest key, as in the specification.
const MAX_KEY: u64 = (1 << 16) - 1;
/// Longest name of a tensor. The limit of the specification is 64.
const MAX_NAME: u64 = 1 << 10;
/// Nesting depth of lists. Known files have none.
const MAX_DEPTH: usize = 4;
/// Most dimensions of a tensor.
const MAX_DIMENSIONS: u32 = 4;
/// Least bytes of a key and its value: length, type, value.
const LEAST_KEY: u64 = 8 + 4 + 1;
/// Least bytes of a tensor's description: length of its name, number of dimensions, one dimension, type, offset.
const LEAST_TENSOR: u64 = 8 + 4 + 8 + 4 + 8;

/// One tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) ty: GgmlType,
    /// The slowest dimension first, as in safetensors; files have the opposite order.
    pub(crate) shape: Vec<usize>,
    /// First byte in the file.
    pub(crate) start: u64,
    pub(crate) len: u64,
}

impl Tensor {
    /// Rows of all matrices together.
    pub(crate) fn rows(&self) -> usize {
        self.shape[..self.shape.len().saturating_sub(1)].iter().product()
    }
}

/// The head of a file.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) metadata: Metadata,
    /// In the order of the file.
    pub(crate) tensors: Vec<Tensor>,
    /// All its bytes, up to the first byte of data.
    pub(crate) bytes: Vec<u8>,
}

/// Reads the head of the file of `len` bytes at `path`, which begins with [`MAGIC`].
///
/// # Errors
/// [`ConvertError::Damaged`] with the place, [`ConvertError::Gguf`] for a valid file that is not supported, and errors of `read`.
pub(crate) fn read_head(path: &Path, len: u64, read: &ReadAt<'_>) -> Result<Head, ConvertError> {
    let mut cursor = Cursor::new(path, len, read);
    let unsupported = |problem: String| ConvertError::Gguf { path: path.to_owned(), problem };
    if cursor.take(MAGIC.len() as u64, "the first word")? != MAGIC.as_slice() {
        return Err(cursor.damaged("it does not begin with \"GGUF\""));
    }
    let version = cursor.u32("the version")?;
    check_version(version).map_err(unsupported)?;
    let tensor_count = cursor.count(LEAST_TENSOR, MAX_TENSORS, "the number of tensors")?;
    let key_count = cursor.count(LEAST_KEY, MAX_KEYS, "the number of keys")?;
    let mut metadata = Metadata::default();
    for _ in 0..key_count {
        let key = cursor.name(MAX_KEY, "a key")?;
        let ty = cursor.u32("the type of a value")?;
        let value = value(&mut cursor, ty, 0).map_err(|e| of_key(e, &key))?;
        if !metadata.insert(key.clone(), value) {
            return Err(cursor.damaged(format!("the key `{key}` is there twice")));
        }
    }
    let alignment = alignment(&metadata).map_err(|problem| cursor.damaged(problem))?;
    let mut tensors = Vec::with_capacity(tensor_count);
    for _ in 0..tensor_count {
        tensors.push(tensor(path, &mut cursor)?);
    }
    let data = cursor.at().next_multiple_of(alignment);
    if tensors.is_empty() && data > len {
        return Ok(Head { metadata, tensors, bytes: cursor.into_head() });
    }
    let padding = data - cursor.at();
    cursor.take(padding, "the padding before the data")?;
    place(&mut tensors, data, alignment, len).map_err(|problem| cursor.damaged(problem))?;
    Ok(Head { metadata, tensors, bytes: cursor.into_head() })
}

/// The difference between versions 2 and 3 does not matter here: 3 allows files of big-endian machines.
fn check_version(version: u32) -> Result<(), String> {
    match version {
        2 | 3 => Ok(()),
        1 => Err("it is of version 1 of GGUF, of August 2023. Convert the original checkpoint instead".to_owned()),
        // A small number in big-endian order.
        _ if version & 0xffff == 0 => Err(format!(
            "it is big-endian, for another kind of machine (version {}). Take the little-endian file, or convert the \
             original checkpoint",
            version.swap_bytes()
        )),
        _ => Err(format!("it is of version {version} of GGUF; supported are 2 and 3")),
    }
}

/// Adds the key to an error.
fn of_key(error: ConvertError, key: &str) -> ConvertError {
    match error {
        ConvertError::Damaged { path, problem } => {
            ConvertError::Damaged { path, problem: format!("{problem} (key `{key}`)") }
        }
        other => other,
    }
}

fn kind_of(ty: u32) -> Option<Kind> {
    Some(match ty {
        0 => Kind::U8,
        1 => Kind::I8,
        2 => Kind::U16,
        3 => Kind::I16,
        4 => Kind::U32,
        5 => Kind::I32,
        6 => Kind::F32,
        7 => Kind::Bool,
        10 => Kind::U64,
        11 => Kind::I64,
        12 => Kind::F64,
        _ => return None,
    })
}

const STRING: u32 = 8;
const LIST: u32 = 9;

/// A value of that type inside `depth` lists.
fn value(cursor: &mut Cursor<'_>, ty: u32, depth: usize) -> Result<Value, ConvertError> {
    if let Some(kind) = kind_of(ty) {
        return Ok(kind.value(cursor.take(kind.len() as u64, "a value")?));
    }
    match ty {
        STRING => Ok(Value::String(cursor.string(MAX_HEAD, "a text")?.to_vec())),
        LIST => list(cursor, depth + 1),
        _ => Err(cursor.damaged(format!("a value has the unknown type {ty}"))),
    }
}

fn list(cursor: &mut Cursor<'_>, depth: usize) -> Result<Value, ConvertError> {
    if depth > MAX_DEPTH {
        return Err(cursor.damaged(format!("lists are nested more than {MAX_DEPTH} deep")));
    }
    let ty = cursor.u32("the type of a list")?;
    let what = "the length of a list";
    if let Some(kind) = kind_of(ty) {
        let count = cursor.count(kind.len() as u64, MAX_HEAD, what)?;
        let bytes = cursor.take((count * kind.len()) as u64, "a list")?.to_vec();
        return Ok(Value::Numbers(Numbers::new(kind, bytes)));
    }
    match ty {
        STRING => {
            let mut strings = Strings::default();
            for _ in 0..cursor.count(8, MAX_HEAD, what)? {
                strings.push(cursor.string(MAX_HEAD, "a text of a list")?);
            }
            Ok(Value::Strings(strings))
        }
        LIST => {
            let count = cursor.count(4 + 8, MAX_HEAD, what)?;
            (0..count).try_for_each(|_| list(cursor, depth + 1).map(drop))?;
            Ok(Value::Lists(count))
        }
        _ => Err(cursor.damaged(format!("a list has the unknown type {ty}"))),
    }
}

fn alignment(metadata: &Metadata) -> Result<u64, String> {
    match metadata.uint(ALIGNMENT_KEY).map_err(|problem| problem.to_string())? {
        None => Ok(ALIGNMENT),
        Some(n) if n.is_power_of_two() && n <= MAX_ALIGNMENT => Ok(n),
        Some(n) => Err(format!("`{ALIGNMENT_KEY}` is {n}, expected a power of two up to {MAX_ALIGNMENT}")),
    }
}

/// The description of a tensor; its start is still an offset in the data.
fn tensor(path: &Path, cursor: &mut Cursor<'_>) -> Result<Tensor, ConvertError> {
    let name = cursor.name(MAX_NAME, "the name of a tensor")?;
    let dimensions = cursor.u32("the number of dimensions")?;
    if dimensions == 0 || dimensions > MAX_DIMENSIONS {
        let problem = format!("`{name}` has {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}");
        return Err(cursor.damaged(problem));
    }
    let mut shape = Vec::with_capacity(dimensions as usize);
    for _ in 0..dimensions {
        shape.push(cursor.u64("a dimension")?);
    }
    shape.reverse();
    let id = cursor.u32("the type of a tensor")?;
    let start = cursor.u64("the offset of a tensor")?;
    let ty = GgmlType::from_id(id).map_err(|what| ConvertError::Gguf {
        path: path.to_owned(),
        problem: format!("`{name}` is stored as {what}; docs/MODELS.md lists the types that are read"),
    })?;
    let sizes: Option<Vec<usize>> = shape.iter().map(|&n| usize::try_from(n).ok().filter(|n| *n > 0)).collect();
    let whole = || {
        let sizes = sizes.as_ref()?;
        let (cols, lead) = sizes.split_last()?;
        let rows = lead.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        ty.row_bytes(*cols)?.checked_mul(rows)
    };
    match (whole(), &sizes) {
        (Some(len), Some(sizes)) => Ok(Tensor { name, ty, shape: sizes.clone(), start, len: len as u64 }),
        _ => Err(cursor.damaged(format!(
            "`{name}` has the shape {shape:?}, which {} cannot have: rows are multiples of {}, and nothing is empty",
            ty.name(),
            ty.block_cols()
        ))),
    }
}

/// Turns offsets into places in the file and checks them: data begins at `data`, and the file has `len` bytes.
fn place(tensors: &mut [Tensor], data: u64, alignment: u64, len: u64) -> Result<(), String> {
    let mut names = HashSet::with_capacity(tensors.len());
    for tensor in &mut *tensors {
        let name = &tensor.name;
        if !names.insert(name.as_str()) {
            return Err(format!("the tensor `{name}` is there twice"));
        }
        let offset = tensor.start;
        if !offset.is_multiple_of(alignment) {
            return Err(format!("`{name}` begins at byte {offset} of the data, not at a multiple of {alignment}"));
        }
        let end = data.checked_add(offset).and_then(|start| start.checked_add(tensor.len));
        if end.is_none_or(|end| end > len) {
            return Err(format!(
                "`{name}` has {} bytes from byte {offset} of the data on, which begins at {data}, and the file ends at {len}: it \
                 was cut off",
                tensor.len
            ));
        }
        tensor.start = data + offset;
    }
    let mut order: Vec<&Tensor> = tensors.iter().collect();
    order.sort_by_key(|t| (t.start, t.len));
    match order.windows(2).find(|pair| pair[0].start + pair[0].len > pair[1].start) {
        None => Ok(()),
        Some(pair) => {
            let names = [&pair[0].name, &pair[1].name].map(Clone::clone);
            Err(format!("these tensors overlap: {}", first_few(&names)))
        }
    }
}
