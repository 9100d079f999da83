//! Sessions: sequences that are saved in files. `docs/SESSIONS.md` describes the file byte by byte.
//!
//! A file is a *segment*: what the layers remember of the tokens from a page boundary on, and everything that a sequence needs to
//! continue after them. A whole sequence is a segment that begins at the first token; other segments continue one. The file does
//! not depend on how a sequence lies in memory: records are in the order of positions, as many as later tokens can see. The model,
//! the header and the marks determine the contents of each section, so nothing is allocated or skipped because the file says so.

mod error;
mod header;
mod prefix;
mod read;
mod write;

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;

use sluice_format::fields::Field;
use sluice_format::{NO_LAYER, StateId};
use sluice_kernels::KvType;

pub use self::error::SessionError;
pub use self::header::{
    HEADER_FIELDS, SESSION_MAGIC, SESSION_VERSION, STRETCH, SegmentInfo, kv_code, peek, peek_file, thrift_codes,
};
pub use self::prefix::PrefixHash;
pub(crate) use self::read::{append, restore_segments};
use super::cache::{LayerCache, Place};
use super::prompt_attention::PromptAttention;
use super::sequence::Sequence;
use super::thrift::Thrift;

/// The fields at the beginning of a section.
pub const SECTION_FIELDS: [Field; 5] = [
    Field { name: "kind", offset: 0, len: 4 },
    Field { name: "layer", offset: 4, len: 4 },
    Field { name: "first", offset: 8, len: 8 },
    Field { name: "records", offset: 16, len: 8 },
    Field { name: "record_len", offset: 24, len: 8 },
];

const SECTION_LEN: usize = 32;
/// Bytes of a section besides its records: the fields at its beginning, and its checksum.
const SECTION_FRAME: u64 = SECTION_LEN as u64 + 8;
/// Bytes that are written or read at once, unless a record is longer.
const BLOCK: usize = 256 << 10;

/// What the numbers of a sequence depend on, besides its tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Binding {
    /// The weights, what is computed with them, and the tokenizer.
    pub state_id: StateId,
    /// How keys and values are kept.
    pub kv_type: KvType,
    /// f32 activations everywhere.
    pub exact: bool,
    /// How experts were chosen otherwise than by the routers.
    pub thrift: Thrift,
    /// In which form prompts were read.
    pub prompt_attention: PromptAttention,
}

/// The opened file of a segment.
#[derive(Debug)]
pub struct SegmentFile {
    /// The file, at its beginning.
    pub file: File,
    /// Its path in errors.
    pub path: PathBuf,
}

/// A part of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The header.
    Header,
    /// The token ids.
    Tokens,
    /// The marks.
    Marks,
    /// What a layer remembers.
    Layer(usize),
    /// Rows of a layer.
    Rows {
        /// The first of their positions.
        first: usize,
        /// The layer.
        layer: usize,
    },
    /// What a layer keeps for a mark.
    Mark {
        /// Tokens before the mark.
        position: usize,
        /// The layer.
        layer: usize,
    },
    /// The end, after which nothing may follow.
    End,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Header => f.write_str("the header"),
            Part::Tokens => f.write_str("the tokens"),
            Part::Marks => f.write_str("the marks"),
            Part::Layer(layer) => write!(f, "layer {layer}"),
            Part::Rows { first, layer } => write!(f, "the rows of layer {layer} from token {first} on"),
            Part::Mark { position, layer } => write!(f, "layer {layer} at the mark at token {position}"),
            Part::End => f.write_str("the end"),
        }
    }
}

/// The number of the kind of a store's section.
fn kind_of(place: Place) -> u32 {
    match place {
        Place::Latent(_) => 2,
        Place::KeyValue(_) => 3,
        Place::State(_) => 4,
        Place::Entries(_) => 6,
        Place::Raw(_) => 7,
        Place::BlockKeys(_) => 8,
    }
}

const TOKENS_KIND: u32 = 1;
const MARKS_KIND: u32 = 5;
/// Bytes of a mark: its position, and whether a caller made it.
const MARK_LEN: usize = 12;
/// Names of the kinds of sections; the first has number 1.
pub const SECTION_KINDS: [&str; 8] =
    ["tokens", "latents", "keys and values", "state", "marks", "entries", "to be compressed", "keys of blocks"];

/// A section: the fields at its beginning, and its records.
#[derive(Clone, Debug)]
struct Section {
    begin: [u8; SECTION_LEN],
    records: Range<usize>,
    record_len: usize,
}

impl Section {
    fn new(kind: u32, layer: u32, records: Range<usize>, record_len: usize) -> Self {
        let mut begin = [0; SECTION_LEN];
        begin[..4].copy_from_slice(&kind.to_le_bytes());
        begin[4..8].copy_from_slice(&layer.to_le_bytes());
        for (at, number) in [(8, records.start), (16, records.len()), (24, record_len)] {
            begin[at..at + 8].copy_from_slice(&(number as u64).to_le_bytes());
        }
        Section { begin, records, record_len }
    }

    fn tokens(positions: Range<usize>) -> Self {
        Section::new(TOKENS_KIND, NO_LAYER, positions, 4)
    }

    fn marks(count: usize) -> Self {
        Section::new(MARKS_KIND, NO_LAYER, 0..count, MARK_LEN)
    }

    /// Records of a store of a layer.
    fn rows(layer: usize, store: LayerCache<'_>, records: Range<usize>) -> Self {
        Section::new(kind_of(store.place()), layer as u32, records, store.record_len())
    }

    /// What a store with a window or a state must remember of `position` tokens.
    fn kept(layer: usize, store: LayerCache<'_>, position: usize) -> Self {
        Section::rows(layer, store, store.records(position))
    }

    /// Its bytes in the file.
    fn len(&self) -> u64 {
        SECTION_FRAME + self.records.len() as u64 * self.record_len as u64
    }

    /// Splits the records into blocks: calls `with` with the records of each block and a buffer for their bytes.
    fn blocks<E>(
        &self,
        buffer: &mut Vec<u8>,
        mut with: impl FnMut(Range<usize>, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let Section { records, record_len, .. } = self;
        let at_once = (BLOCK / record_len.max(&1)).max(1);
        buffer.resize(at_once.min(records.len()) * record_len, 0);
        let mut first = records.start;
        while first < records.end {
            let last = records.end.min(first + at_once);
            with(first..last, &mut buffer[..(last - first) * record_len])?;
            first = last;
        }
        Ok(())
    }
}

/// The positions of a segment, cut into pieces, each of which has the rows of all layers.
fn stretches(positions: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = positions.end;
    positions.step_by(STRETCH).map(move |first| first..end.min(first + STRETCH))
}

/// Bytes of the rows of the tokens at these positions.
fn rows_len(sequence: &Sequence, positions: Range<usize>) -> u64 {
    let frames = positions.len().div_ceil(STRETCH) as u64 * SECTION_FRAME;
    let stores = sequence.remembering_stores().map(|i| sequence.store(i));
    let records = stores.map(|store| store.records_of(positions.clone()).len() as u64 * store.record_len() as u64);
    records.map(|bytes| frames + bytes).sum()
}

/// Bytes of what layers with windows and states remember of `position` tokens.
fn kept_len(sequence: &Sequence, position: usize) -> u64 {
    sequence.forgetting_stores().map(|i| Section::kept(0, sequence.store(i), position).len()).sum()
}

/// Bytes of what a mark keeps.
fn mark_len(sequence: &Sequence, position: usize) -> u64 {
    if position == 0 { 0 } else { kept_len(sequence, position) }
}

/// Bytes of the file of a segment with these positions and marks at those positions.
fn file_len(sequence: &Sequence, positions: Range<usize>, marks: impl ExactSizeIterator<Item = usize>) -> u64 {
    let lists = Section::tokens(positions.clone()).len() + Section::marks(marks.len()).len();
    let layers = rows_len(sequence, positions.clone()) + kept_len(sequence, positions.end);
    let marks: u64 = marks.map(|position| mark_len(sequence, position)).sum();
    header::HEADER_LEN as u64 + lists + layers + marks
}
