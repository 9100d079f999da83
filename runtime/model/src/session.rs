//! Sessions: sequences that are saved in files. `docs/SESSIONS.md` describes the file byte by byte.
//!
//! The file does not depend on how a sequence lies in memory: records are in the order of positions, as many as later tokens can
//! see. What each section must be follows from the model, the header and the marks, so nothing is allocated or skipped because the
//! file says so.

use std::fmt;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use sluice_checksum::{Xxh3, xxh3_64};
use sluice_format::fields::Field;
use sluice_format::{NO_LAYER, StateId, may_replace, remove_leftovers, replace_file_with};
use sluice_kernels::{KvType, NUMERICS_VERSION};

use super::cache::{LayerCache, LayerCacheMut, PagesFull, Place};
use super::sequence::Sequence;

/// The first bytes of a saved sequence.
pub const SESSION_MAGIC: [u8; 8] = *b"SLUSEQ\x0d\x1a";
/// Version of the file that is written and read.
pub const SESSION_VERSION: u32 = 2;

const fn field(name: &'static str, offset: usize, len: usize) -> Field {
    Field { name, offset, len }
}

/// The header.
pub const HEADER_FIELDS: [Field; 10] = [
    field("magic", 0, 8),
    field("version", 8, 4),
    field("numerics", 12, 4),
    field("state_id", 16, 16),
    field("kv_type", 32, 2),
    field("precision", 34, 2),
    field("layers", 36, 4),
    field("position", 40, 8),
    field("marks", 48, 8),
    field("checksum", 56, 8),
];
/// What a section begins with.
pub const SECTION_FIELDS: [Field; 4] =
    [field("kind", 0, 4), field("layer", 4, 4), field("records", 8, 8), field("record_len", 16, 8)];

const VERSION_AT: usize = 8;
const MARKS_AT: usize = 48;
const CHECKSUM_AT: usize = 56;
const HEADER_LEN: usize = CHECKSUM_AT + 8;
const SECTION_LEN: usize = 24;
/// Bytes that are written or read at once, if a record is not longer.
const BLOCK: usize = 256 << 10;

/// What the numbers of a sequence depend on besides its tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Binding {
    /// Weights, what is computed with them, and the tokenizer.
    pub state_id: StateId,
    /// How keys and values are kept.
    pub kv_type: KvType,
    /// f32 activations everywhere.
    pub exact: bool,
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
    /// What a layer keeps for a mark.
    Mark {
        /// Tokens before the mark.
        position: usize,
        /// The layer.
        layer: usize,
    },
    /// What follows the last part: nothing.
    End,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Header => f.write_str("the header"),
            Part::Tokens => f.write_str("the tokens"),
            Part::Marks => f.write_str("the marks"),
            Part::Layer(layer) => write!(f, "layer {layer}"),
            Part::Mark { position, layer } => write!(f, "layer {layer} at the mark at token {position}"),
            Part::End => f.write_str("the end"),
        }
    }
}

/// Why a sequence could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Writing.
    #[error("{path}: the session cannot be saved: {source}. What was saved before is still there")]
    Save {
        /// The file.
        path: PathBuf,
        /// What the filesystem said.
        source: io::Error,
    },
    /// Something else has the name.
    #[error("{path} is there already and is not a session: choose another name")]
    Occupied {
        /// The file.
        path: PathBuf,
    },
    /// Opening.
    #[error("{path}: the session cannot be opened: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the filesystem said.
        source: io::Error,
    },
    /// Reading.
    #[error("{path}: {part} cannot be read at byte {offset}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Where.
        part: Part,
        /// Its offset in the file.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The file is shorter than it says.
    #[error(
        "{path}: the session is cut off: it ends within {part}, which begins at byte {offset}. Use a copy, or begin anew"
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The part that is not whole.
        part: Part,
        /// Its offset in the file.
        offset: u64,
    },
    /// Another kind of file.
    #[error("{path} is not a session")]
    NotASession {
        /// The file.
        path: PathBuf,
    },
    /// Another version of the file.
    #[error(
        "{path}: the session has version {found}, this program reads version {SESSION_VERSION}: read the text anew"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// A checksum is wrong.
    #[error("{path}: {part} of the session, at byte {offset}, is damaged: use a copy, or begin anew")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The damaged part.
        part: Part,
        /// Its offset in the file.
        offset: u64,
    },
    /// A section is not the one that must be here.
    #[error("{path}: at byte {offset} of the session there is something else than {part}: use a copy, or begin anew")]
    Misplaced {
        /// The file.
        path: PathBuf,
        /// The part that must be here.
        part: Part,
        /// Its offset in the file.
        offset: u64,
    },
    /// Another model's.
    #[error(
        "{path}: the session is of another model, {found} instead of {wanted}: other weights, another specification or another \
         tokenizer"
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// The state id of its model.
        found: StateId,
        /// That of the opened model.
        wanted: StateId,
    },
    /// Numbers that this program would compute otherwise.
    #[error(
        "{path}: the session has numbers of version {found}, this program computes those of version {NUMERICS_VERSION}: read the \
         text anew"
    )]
    Numerics {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// Another type of keys and values.
    #[error(
        "{path}: the session keeps keys and values in {found}: open the model with --kv-type {found} instead of {wanted}"
    )]
    KvType {
        /// The file.
        path: PathBuf,
        /// Its type, or the number of one that is not known.
        found: String,
        /// That of the engine.
        wanted: KvType,
    },
    /// Another precision.
    #[error("{path}: the session was computed {} --exact: open the model in the same way", if *.exact { "with" } else { "without" })]
    Precision {
        /// The file.
        path: PathBuf,
        /// Whether it was computed with f32 activations.
        exact: bool,
    },
    /// More tokens than there is room for.
    #[error("{path}: the session has {position} tokens, there is room for {capacity}: raise --context")]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its tokens.
        position: u64,
        /// Tokens that fit.
        capacity: usize,
    },
    /// Fewer pages are free than it needs.
    #[error("{path}: the session does not fit now: {full}")]
    PagesFull {
        /// The file.
        path: PathBuf,
        /// Which pages, and how many.
        full: PagesFull,
    },
    /// A token that the model does not have.
    #[error(
        "{path}: the session has token {token} at byte {offset}, outside the model's vocabulary of {vocab}: begin anew"
    )]
    Token {
        /// The file.
        path: PathBuf,
        /// Where it is.
        offset: u64,
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
}

/// The number of a key-value type in the file.
pub fn kv_code(ty: KvType) -> u16 {
    match ty {
        KvType::F32 => 0,
        KvType::F16 => 1,
        KvType::Bf16 => 2,
        KvType::Q8 => 3,
    }
}

/// The number of a layer's kind of section.
fn kind_of(place: Place) -> u32 {
    match place {
        Place::Latent(_) => 2,
        Place::KeyValue(_) => 3,
        Place::State(_) => 4,
    }
}

const TOKENS_KIND: u32 = 1;
const MARKS_KIND: u32 = 5;
/// Bytes of a mark: its position, and whether it was asked for.
const MARK_LEN: usize = 12;
/// Names of the kinds of sections, the first of them 1.
pub const SECTION_KINDS: [&str; 5] = ["tokens", "latents", "keys and values", "state", "marks"];

/// What a section begins with.
fn section(kind: u32, layer: u32, records: usize, record_len: usize) -> [u8; SECTION_LEN] {
    let mut bytes = [0; SECTION_LEN];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[4..8].copy_from_slice(&layer.to_le_bytes());
    bytes[8..16].copy_from_slice(&(records as u64).to_le_bytes());
    bytes[16..].copy_from_slice(&(record_len as u64).to_le_bytes());
    bytes
}

/// What the section of a layer behind `position` tokens begins with; its records, and the bytes of each.
fn layer_section(
    index: usize,
    layer: LayerCache<'_>,
    position: usize,
) -> ([u8; SECTION_LEN], std::ops::Range<usize>, usize) {
    let (records, len) = (layer.records(position), layer.record_len());
    (section(kind_of(layer.place()), index as u32, records.len(), len), records, len)
}

fn header(sequence: &Sequence) -> [u8; HEADER_LEN] {
    let Binding { state_id, kv_type, exact } = sequence.binding();
    let mut bytes = [0; HEADER_LEN];
    bytes[..8].copy_from_slice(&SESSION_MAGIC);
    bytes[8..12].copy_from_slice(&SESSION_VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&NUMERICS_VERSION.to_le_bytes());
    bytes[16..32].copy_from_slice(&state_id.0);
    bytes[32..34].copy_from_slice(&kv_code(kv_type).to_le_bytes());
    bytes[34..36].copy_from_slice(&u16::from(exact).to_le_bytes());
    bytes[36..40].copy_from_slice(&(sequence.layers() as u32).to_le_bytes());
    bytes[40..48].copy_from_slice(&(sequence.position() as u64).to_le_bytes());
    bytes[MARKS_AT..CHECKSUM_AT].copy_from_slice(&(sequence.snapshots().len() as u64).to_le_bytes());
    let sum = xxh3_64(&bytes[..CHECKSUM_AT]);
    bytes[CHECKSUM_AT..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// Splits records into blocks: calls `with` with the records of each and a buffer of their bytes.
fn blocks<E>(
    records: std::ops::Range<usize>,
    record_len: usize,
    buffer: &mut Vec<u8>,
    mut with: impl FnMut(std::ops::Range<usize>, &mut [u8]) -> Result<(), E>,
) -> Result<(), E> {
    let at_once = (BLOCK / record_len.max(1)).max(1);
    buffer.resize(at_once.min(records.len()) * record_len, 0);
    let mut first = records.start;
    while first < records.end {
        let last = records.end.min(first + at_once);
        with(first..last, &mut buffer[..(last - first) * record_len])?;
        first = last;
    }
    Ok(())
}

impl Sequence {
    /// Writes the sequence with its marks, as `docs/SESSIONS.md` says, in pieces of a few hundred kilobytes.
    ///
    /// # Errors
    /// What `out` says.
    pub fn save(&self, out: &mut dyn Write) -> io::Result<()> {
        let header = header(self);
        out.write_all(&header)?;
        // Every section is bound to all that stands before it, so that none can be another sequence's.
        let mut before = xxh3_64(&header[..CHECKSUM_AT]);
        let mut buffer = Vec::new();
        let tokens = self.tokens();
        let begin = section(TOKENS_KIND, NO_LAYER, tokens.len(), 4);
        before = save_section(out, begin, before, 0..tokens.len(), 4, &mut buffer, |record, bytes| {
            bytes.copy_from_slice(&tokens[record].to_le_bytes());
        })?;
        let marks = self.snapshots();
        let begin = section(MARKS_KIND, NO_LAYER, marks.len(), MARK_LEN);
        before = save_section(out, begin, before, 0..marks.len(), MARK_LEN, &mut buffer, |record, bytes| {
            let (position, asked) = bytes.split_at_mut(8);
            position.copy_from_slice(&(marks[record].position() as u64).to_le_bytes());
            asked.copy_from_slice(&u32::from(!marks[record].is_automatic()).to_le_bytes());
        })?;
        for i in 0..self.layers() {
            before = save_layer(out, i, self.layer(i), self.position(), before, &mut buffer)?;
        }
        for mark in marks {
            for (i, layer) in (0..self.layers()).filter_map(|i| Some((i, self.layer_at(mark, i)?))) {
                before = save_layer(out, i, layer, mark.position(), before, &mut buffer)?;
            }
        }
        out.flush()
    }

    /// Saves the sequence under a name, atomically: whatever happens, the file is the old one or the new one. Only a session
    /// is replaced. What earlier savings that were killed have left beside it is removed.
    ///
    /// # Errors
    /// [`SessionError::Occupied`] and [`SessionError::Save`].
    pub fn save_file(&self, path: &Path) -> Result<(), SessionError> {
        let failed = |source| SessionError::Save { path: path.to_owned(), source };
        if !may_replace(path, &SESSION_MAGIC).map_err(failed)? {
            return Err(SessionError::Occupied { path: path.to_owned() });
        }
        remove_leftovers(path, &SESSION_MAGIC);
        replace_file_with(path, |file| self.save(file)).map_err(failed)
    }
}

/// Writes what a layer remembers behind `position` tokens; returns the section's checksum.
fn save_layer(
    out: &mut dyn Write,
    index: usize,
    layer: LayerCache<'_>,
    position: usize,
    before: u64,
    buffer: &mut Vec<u8>,
) -> io::Result<u64> {
    let (begin, records, len) = layer_section(index, layer, position);
    save_section(out, begin, before, records, len, buffer, |record, bytes| layer.record_to_bytes(record, bytes))
}

/// Writes a section; returns its checksum.
fn save_section(
    out: &mut dyn Write,
    begin: [u8; SECTION_LEN],
    before: u64,
    records: std::ops::Range<usize>,
    record_len: usize,
    buffer: &mut Vec<u8>,
    record: impl Fn(usize, &mut [u8]),
) -> io::Result<u64> {
    let mut hash = Xxh3::with_seed(before);
    hash.update(&begin);
    out.write_all(&begin)?;
    blocks(records, record_len, buffer, |records, bytes| {
        records.zip(bytes.chunks_exact_mut(record_len)).for_each(|(i, bytes)| record(i, bytes));
        hash.update(bytes);
        out.write_all(bytes)
    })?;
    out.write_all(&hash.digest().to_le_bytes())?;
    Ok(hash.digest())
}

/// A file that is being read, part by part.
struct Reader<'a> {
    input: &'a mut dyn Read,
    path: &'a Path,
    part: Part,
    /// Where the part begins.
    begin: u64,
    offset: u64,
    hash: Xxh3,
    buffer: Vec<u8>,
}

impl Reader<'_> {
    fn exact(&mut self, out: &mut [u8]) -> Result<(), SessionError> {
        let (path, part) = (self.path, self.part);
        self.input.read_exact(out).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => SessionError::Truncated { path: path.to_owned(), part, offset: self.begin },
            _ => SessionError::Read { path: path.to_owned(), part, offset: self.offset, source },
        })?;
        self.offset += out.len() as u64;
        Ok(())
    }

    fn damaged(&self) -> SessionError {
        SessionError::Damaged { path: self.path.to_owned(), part: self.part, offset: self.begin }
    }

    /// Reads the checksum of what was hashed; returns it.
    fn checksum(&mut self) -> Result<u64, SessionError> {
        let mut sum = [0; 8];
        self.exact(&mut sum)?;
        if self.hash.digest().to_le_bytes() != sum {
            return Err(self.damaged());
        }
        Ok(u64::from_le_bytes(sum))
    }

    /// Reads a section that must begin in this way; `record` gets each record, before its checksum is known. Returns the
    /// checksum.
    fn section(
        &mut self,
        part: Part,
        begin: [u8; SECTION_LEN],
        before: u64,
        records: std::ops::Range<usize>,
        record_len: usize,
        mut record: impl FnMut(usize, &[u8]),
    ) -> Result<u64, SessionError> {
        (self.part, self.begin) = (part, self.offset);
        self.hash = Xxh3::with_seed(before);
        let mut found = [0; SECTION_LEN];
        self.exact(&mut found)?;
        if found != begin {
            return Err(SessionError::Misplaced { path: self.path.to_owned(), part, offset: self.begin });
        }
        self.hash.update(&found);
        let mut buffer = std::mem::take(&mut self.buffer);
        blocks(records, record_len, &mut buffer, |records, bytes| {
            self.exact(bytes)?;
            self.hash.update(bytes);
            records.zip(bytes.chunks_exact(record_len)).for_each(|(i, bytes)| record(i, bytes));
            Ok(())
        })?;
        self.buffer = buffer;
        self.checksum()
    }

    /// Reads what a layer remembers behind `position` tokens; returns the section's checksum.
    fn layer(
        &mut self,
        part: Part,
        index: usize,
        mut layer: LayerCacheMut<'_>,
        position: usize,
        before: u64,
    ) -> Result<u64, SessionError> {
        let (begin, records, len) = layer_section(index, layer.as_ref(), position);
        self.section(part, begin, before, records, len, |record, bytes| layer.record_from_bytes(record, bytes))
    }

    /// Reads the header and compares it with what `sequence` needs; returns position, number of marks and checksum.
    fn header(&mut self, sequence: &Sequence) -> Result<(usize, usize, u64), SessionError> {
        let path = || self.path.to_owned();
        let mut found = [0; HEADER_LEN];
        let (first, rest) = found.split_at_mut(VERSION_AT + 4);
        match self.input.read_exact(first) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(SessionError::NotASession { path: path() });
            }
            Err(source) => return Err(SessionError::Read { path: path(), part: Part::Header, offset: 0, source }),
            Ok(()) => self.offset = first.len() as u64,
        }
        if first[..VERSION_AT] != SESSION_MAGIC {
            return Err(SessionError::NotASession { path: path() });
        }
        let version = u32_at(first, VERSION_AT);
        if version != SESSION_VERSION {
            return Err(SessionError::Version { path: path(), found: version });
        }
        self.exact(rest)?;
        let path = || self.path.to_owned();
        let sum = xxh3_64(&found[..CHECKSUM_AT]);
        if found[CHECKSUM_AT..] != sum.to_le_bytes() {
            return Err(self.damaged());
        }
        let wanted = header(sequence);
        let differs = |from: usize, to: usize| found[from..to] != wanted[from..to];
        let Binding { state_id, kv_type, .. } = sequence.binding();
        if differs(16, 32) {
            let found = StateId(found[16..32].try_into().expect("as long as an id"));
            return Err(SessionError::Foreign { path: path(), found, wanted: state_id });
        }
        if differs(12, 16) {
            return Err(SessionError::Numerics { path: path(), found: u32_at(&found, 12) });
        }
        if differs(32, 34) {
            let code = u16::from_le_bytes([found[32], found[33]]);
            let known = KvType::ALL.into_iter().find(|&ty| kv_code(ty) == code);
            let found = known.map_or_else(|| format!("type {code}"), |ty| ty.name().to_owned());
            return Err(SessionError::KvType { path: path(), found, wanted: kv_type });
        }
        if differs(34, 36) {
            return Err(SessionError::Precision { path: path(), exact: found[34] != 0 });
        }
        if differs(36, 40) {
            return Err(SessionError::Misplaced { path: path(), part: Part::Header, offset: 0 });
        }
        let (position, marks) = (u64_at(&found, 40), u64_at(&found, MARKS_AT));
        let fits = usize::try_from(position).ok().filter(|&fits| fits <= sequence.capacity());
        let Some(fits) = fits else {
            return Err(SessionError::TooLong { path: path(), position, capacity: sequence.capacity() });
        };
        // Marks are at different positions.
        match usize::try_from(marks) {
            Ok(marks) if marks <= fits + 1 => Ok((fits, marks, sum)),
            _ => Err(SessionError::Misplaced { path: path(), part: Part::Header, offset: 0 }),
        }
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// Fills an empty sequence with what `input` holds, and returns it if all of that is sound.
///
/// # Errors
/// [`SessionError`].
pub(crate) fn restore(
    mut sequence: Sequence,
    vocab: usize,
    input: &mut dyn Read,
    path: &Path,
) -> Result<Sequence, SessionError> {
    let hash = Xxh3::new();
    let mut reader = Reader { input, path, part: Part::Header, begin: 0, offset: 0, hash, buffer: Vec::new() };
    let (position, marks, mut before) = reader.header(&sequence)?;
    let begin = section(TOKENS_KIND, NO_LAYER, position, 4);
    let mut tokens = Vec::with_capacity(position);
    before = reader.section(Part::Tokens, begin, before, 0..position, 4, |_, bytes| tokens.push(u32_at(bytes, 0)))?;
    if let Some(at) = tokens.iter().position(|&token| token as usize >= vocab) {
        let offset = reader.begin + (SECTION_LEN + 4 * at) as u64;
        return Err(SessionError::Token { path: path.to_owned(), offset, token: tokens[at], vocab });
    }
    let begin = section(MARKS_KIND, NO_LAYER, marks, MARK_LEN);
    let mut at = Vec::with_capacity(marks);
    before = reader.section(Part::Marks, begin, before, 0..marks, MARK_LEN, |_, bytes| {
        at.push((u64_at(bytes, 0), u32_at(bytes, 8) == 0));
    })?;
    if !at.is_sorted_by(|a, b| a.0 < b.0) || at.last().is_some_and(|last| last.0 > position as u64) {
        return Err(SessionError::Misplaced { path: path.to_owned(), part: Part::Marks, offset: reader.begin });
    }
    let full = |full| SessionError::PagesFull { path: path.to_owned(), full };
    sequence.make_room(position).map_err(full)?;
    for i in 0..sequence.layers() {
        before = reader.layer(Part::Layer(i), i, sequence.layer_mut(i), position, before)?;
    }
    sequence.restored(&tokens);
    for (i, &(position, automatic)) in at.iter().enumerate() {
        let position = position as usize;
        // The newest stay, as many as there is room for.
        let mut mark = sequence.room_for_mark(at.len() - i, position, automatic);
        for layer in (0..sequence.layers()).filter(|&layer| position > 0 && sequence.forgets(layer)) {
            let part = Part::Mark { position, layer };
            let cache = mark.as_mut().and_then(|mark| sequence.layer_at_mut(mark, layer));
            before = match cache {
                Some(cache) => reader.layer(part, layer, cache, position, before)?,
                None => {
                    let (begin, records, len) = layer_section(layer, sequence.layer(layer), position);
                    reader.section(part, begin, before, records, len, |_, _| ())?
                }
            };
        }
        mark.into_iter().for_each(|mark| sequence.restore_mark(mark));
    }
    (reader.part, reader.begin) = (Part::End, reader.offset);
    match reader.exact(&mut [0]) {
        Err(SessionError::Truncated { .. }) => {}
        Err(error) => return Err(error),
        Ok(()) => return Err(SessionError::Misplaced { path: path.to_owned(), part: Part::End, offset: reader.begin }),
    }
    Ok(sequence)
}
