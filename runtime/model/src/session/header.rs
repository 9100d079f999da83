//! The header of a session, and what a program can learn about a session without a model.

use std::fs::File;
use std::io;
use std::num::NonZeroU16;
use std::path::Path;

use sluice_checksum::xxh3_64;
use sluice_format::fields::Field;
use sluice_format::{StateId, open_regular};
use sluice_kernels::{KvType, NUMERICS_VERSION};

use super::read::{Reader, u32_at, u64_at};
use super::{Binding, Part, PrefixHash, SessionError};
use crate::cache::PAGE_TOKENS;
use crate::prompt_attention::PromptAttention;
use crate::sequence::Sequence;
use crate::thrift::{Preference, Thrift};

/// The first bytes of a saved sequence.
pub const SESSION_MAGIC: [u8; 8] = *b"SLUSEQ\x0d\x1a";
/// Version of the file that is written and read.
pub const SESSION_VERSION: u32 = 4;
/// Positions whose rows are stored together in the file, for all layers one after another. A reader that needs fewer tokens than a
/// segment has reads at most this many too many.
pub const STRETCH: usize = 4 * PAGE_TOKENS;

const fn field(name: &'static str, offset: usize, len: usize) -> Field {
    Field { name, offset, len }
}

/// The header.
pub const HEADER_FIELDS: [Field; 20] = [
    field("magic", 0, 8),
    field("version", 8, 4),
    field("numerics", 12, 4),
    field("state_id", 16, 16),
    field("kv_type", 32, 2),
    field("precision", 34, 2),
    field("layers", 36, 4),
    field("forgetting", 40, 4),
    field("stretch", 44, 4),
    field("start", 48, 8),
    field("position", 56, 8),
    field("marks", 64, 8),
    field("length", 72, 8),
    field("before", 80, 16),
    field("text", 96, 16),
    field("preference", 112, 2),
    field("top_k", 114, 2),
    field("prompt_attention", 116, 2),
    field("reserved", 118, 2),
    field("checksum", 120, 8),
];

const VERSION_AT: usize = 8;
const CHECKSUM_AT: usize = 120;
pub(super) const HEADER_LEN: usize = CHECKSUM_AT + 8;
/// More tokens than any model takes. A file that claims more is refused.
const TOKENS_MAX: u64 = 1 << 26;

/// The contents of a header, except for what depends on the program alone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub numerics: u32,
    pub state_id: StateId,
    pub kv_code: u16,
    pub exact: u16,
    /// Preference and most experts per token (0 for none), as numbers in the file.
    pub thrift: [u16; 2],
    /// The form in which prompts were read, as a number in the file.
    pub prompt_attention: u16,
    /// Stores of all layers.
    pub layers: u32,
    /// Stores with windows or recurrent states.
    pub forgetting: u32,
    /// Tokens before the segment.
    pub start: u64,
    /// Tokens up to its end, including those before it.
    pub position: u64,
    pub marks: u64,
    /// Bytes of the file.
    pub length: u64,
    /// Hash of the tokens before the segment.
    pub before: PrefixHash,
    /// Hash of all tokens.
    pub text: PrefixHash,
}

/// What the file of a segment says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentInfo {
    /// What its numbers depend on, besides the tokens.
    pub binding: Binding,
    /// Whether a sequence can continue only at its end and at its marks, because layers have windows or recurrent states. Otherwise
    /// it can continue after any token.
    pub forgets: bool,
    /// Tokens before the segment, a multiple of [`PAGE_TOKENS`].
    pub start: usize,
    /// Tokens up to its end, including those before it.
    pub position: usize,
    /// Hash of the tokens before the segment.
    pub before: PrefixHash,
    /// Hash of all tokens.
    pub text: PrefixHash,
    /// The tokens of the segment, with their phases where these are told apart ([`Sequence::phased`]).
    pub tokens: Vec<u32>,
    /// Positions of its marks, in ascending order.
    pub marks: Vec<usize>,
    /// Bytes of the file.
    pub bytes: u64,
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

fn kv_type_of(code: u16) -> Option<KvType> {
    KvType::ALL.into_iter().find(|&ty| kv_code(ty) == code)
}

/// The numbers for a way of choosing experts otherwise than by the routers: preference, and most experts per token or 0.
pub fn thrift_codes(thrift: Thrift) -> [u16; 2] {
    [thrift.preference.code(), thrift.top_k.map_or(0, NonZeroU16::get)]
}

fn thrift_of([preference, top_k]: [u16; 2]) -> Option<Thrift> {
    Some(Thrift { preference: Preference::from_code(preference)?, top_k: NonZeroU16::new(top_k) })
}

impl Header {
    /// The header for `sequence` from `start` on. `marks`: the number of its marks; `length`: bytes of the file.
    pub fn new(sequence: &Sequence, start: usize, marks: usize, length: u64) -> Self {
        let Binding { state_id, kv_type, exact, thrift, prompt_attention } = sequence.binding();
        let (first, rest) = sequence.phased().split_at(start);
        let before = PrefixHash::of(first);
        Header {
            numerics: NUMERICS_VERSION,
            state_id,
            kv_code: kv_code(kv_type),
            exact: u16::from(exact),
            thrift: thrift_codes(thrift),
            prompt_attention: prompt_attention.code(),
            layers: sequence.stores() as u32,
            forgetting: sequence.forgetting_stores().count() as u32,
            start: start as u64,
            position: sequence.position() as u64,
            marks: marks as u64,
            length,
            before,
            text: before.then(rest),
        }
    }

    /// Its bytes, with the checksum.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(&SESSION_MAGIC);
        bytes[8..12].copy_from_slice(&SESSION_VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.numerics.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.state_id.0);
        bytes[32..34].copy_from_slice(&self.kv_code.to_le_bytes());
        bytes[34..36].copy_from_slice(&self.exact.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.layers.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.forgetting.to_le_bytes());
        bytes[44..48].copy_from_slice(&(STRETCH as u32).to_le_bytes());
        for (at, number) in [(48, self.start), (56, self.position), (64, self.marks), (72, self.length)] {
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        bytes[80..96].copy_from_slice(&self.before.0.to_le_bytes());
        bytes[96..112].copy_from_slice(&self.text.0.to_le_bytes());
        let [preference, top_k] = self.thrift;
        for (at, code) in [(112, preference), (114, top_k), (116, self.prompt_attention)] {
            bytes[at..at + 2].copy_from_slice(&code.to_le_bytes());
        }
        let sum = xxh3_64(&bytes[..CHECKSUM_AT]);
        bytes[CHECKSUM_AT..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// The seed of the checksums of sections: the header's own checksum.
    pub fn seed(bytes: &[u8; HEADER_LEN]) -> u64 {
        u64_at(bytes, CHECKSUM_AT)
    }

    /// Reads a header, and uses its checksum as the seed for those of the sections.
    ///
    /// # Errors
    /// If the file is not a session, has another version, is damaged, or contradicts itself.
    pub fn read(reader: &mut Reader<'_>) -> Result<Header, SessionError> {
        let path = || reader.path.to_owned();
        let mut bytes = [0; HEADER_LEN];
        let (first, rest) = bytes.split_at_mut(VERSION_AT + 4);
        match reader.input.read_exact(first) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(SessionError::NotASession { path: path() });
            }
            Err(source) => return Err(SessionError::Read { path: path(), part: Part::Header, offset: 0, source }),
            Ok(()) => reader.offset = first.len() as u64,
        }
        if first[..VERSION_AT] != SESSION_MAGIC {
            return Err(SessionError::NotASession { path: path() });
        }
        let version = u32_at(first, VERSION_AT);
        if version != SESSION_VERSION {
            return Err(SessionError::Version { path: path(), found: version });
        }
        reader.exact(rest)?;
        let sum = xxh3_64(&bytes[..CHECKSUM_AT]);
        if bytes[CHECKSUM_AT..] != sum.to_le_bytes() {
            return Err(reader.damaged());
        }
        reader.seed = sum;
        let header = Header::parse(&bytes);
        let contradicts =
            u32_at(&bytes, 44) as usize != STRETCH || bytes[118..120] != [0; 2] || !header.is_consistent();
        if contradicts { Err(reader.misplaced()) } else { Ok(header) }
    }

    fn parse(bytes: &[u8; HEADER_LEN]) -> Header {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let id: [u8; 16] = bytes[16..32].try_into().expect("as long as an id");
        let hash =
            |at: usize| PrefixHash(u128::from_le_bytes(bytes[at..at + 16].try_into().expect("as long as a hash")));
        Header {
            numerics: u32_at(bytes, 12),
            state_id: StateId(id),
            kv_code: u16_at(32),
            exact: u16_at(34),
            thrift: [u16_at(112), u16_at(114)],
            prompt_attention: u16_at(116),
            layers: u32_at(bytes, 36),
            forgetting: u32_at(bytes, 40),
            start: u64_at(bytes, 48),
            position: u64_at(bytes, 56),
            marks: u64_at(bytes, 64),
            length: u64_at(bytes, 72),
            before: hash(80),
            text: hash(96),
        }
    }

    /// Whether its numbers are possible for a segment.
    fn is_consistent(&self) -> bool {
        let begins = match self.start {
            0 => self.before == PrefixHash::default(),
            start => start.is_multiple_of(PAGE_TOKENS as u64) && start < self.position,
        };
        // Marks are at different positions, which may include the end.
        let marks = begins.then(|| self.position - self.start);
        marks.is_some_and(|tokens| self.marks <= tokens.saturating_add(1)) && self.forgetting <= self.layers
    }

    /// Compares it with the sequences of an engine.
    ///
    /// # Errors
    /// The first difference, by name.
    pub fn check(&self, sequence: &Sequence, reader: &Reader<'_>) -> Result<(), SessionError> {
        let path = || reader.path.to_owned();
        let wanted = sequence.binding();
        if self.state_id != wanted.state_id {
            return Err(SessionError::Foreign { path: path(), found: self.state_id, wanted: wanted.state_id });
        }
        if self.numerics != NUMERICS_VERSION {
            return Err(SessionError::Numerics { path: path(), found: self.numerics });
        }
        if self.kv_code != kv_code(wanted.kv_type) {
            let found = kv_type_of(self.kv_code).map_or_else(|| format!("type {}", self.kv_code), |ty| ty.to_string());
            return Err(SessionError::KvType { path: path(), found, wanted: wanted.kv_type });
        }
        if self.exact != u16::from(wanted.exact) {
            return Err(SessionError::Precision { path: path(), exact: self.exact != 0 });
        }
        if self.thrift != thrift_codes(wanted.thrift) {
            let found = thrift_of(self.thrift).map_or_else(|| "in a way that is not known".into(), |t| t.to_string());
            return Err(SessionError::Thrift { path: path(), found, wanted: wanted.thrift });
        }
        if self.prompt_attention != wanted.prompt_attention.code() {
            let found = PromptAttention::from_code(self.prompt_attention);
            let found = found.map_or_else(|| format!("form {}", self.prompt_attention), |form| form.to_string());
            return Err(SessionError::PromptAttention { path: path(), found, wanted: wanted.prompt_attention });
        }
        let layers = (sequence.stores() as u32, sequence.forgetting_stores().count() as u32);
        match (self.layers, self.forgetting) == layers {
            true => Ok(()),
            false => Err(reader.misplaced()),
        }
    }

    /// Start and position.
    ///
    /// # Errors
    /// [`SessionError::TooLong`] if there are more tokens than `capacity`.
    pub fn range(&self, path: &Path, capacity: usize) -> Result<(usize, usize), SessionError> {
        let capacity = capacity.min(TOKENS_MAX as usize);
        match usize::try_from(self.position) {
            Ok(position) if position <= capacity => Ok((self.start as usize, position)),
            _ => Err(SessionError::TooLong { path: path.to_owned(), position: self.position, capacity }),
        }
    }
}

/// Reads what a session says about itself: header, tokens and marks, each with its checksum. It needs no model, so it cannot tell
/// whether the rest is sound; restoring the session shows that.
///
/// # Errors
/// [`SessionError`]: the file cannot be read, is not a session, has another version or other arithmetic, is damaged, or does not
/// have the length that its header says.
pub fn peek(path: &Path) -> Result<SegmentInfo, SessionError> {
    let open = |source| SessionError::Open { path: path.to_owned(), source };
    peek_file(&mut open_regular(path).map_err(open)?, path)
}

/// Like [`peek`], for a file that has been opened. `path`: its path in errors.
///
/// # Errors
/// Like [`peek`].
pub fn peek_file(file: &mut File, path: &Path) -> Result<SegmentInfo, SessionError> {
    let found = file.metadata().map_err(|source| SessionError::Open { path: path.to_owned(), source })?.len();
    let mut reader = Reader::new(file, path);
    let header = Header::read(&mut reader)?;
    if header.numerics != NUMERICS_VERSION {
        return Err(SessionError::Numerics { path: path.to_owned(), found: header.numerics });
    }
    let known = kv_type_of(header.kv_code).zip(thrift_of(header.thrift)).filter(|_| header.exact <= 1);
    let known = known.zip(PromptAttention::from_code(header.prompt_attention));
    let ((kv_type, thrift), prompt_attention) = known.ok_or_else(|| reader.misplaced())?;
    let (start, position) = header.range(path, usize::MAX)?;
    reader.is_whole(&header, found)?;
    let mut tokens = Vec::new();
    reader.tokens(&header, |token| tokens.push(token))?;
    if header.before.then(&tokens) != header.text {
        return Err(reader.misplaced());
    }
    let marks = reader.marks(&header)?.into_iter().map(|(at, _)| at).collect();
    Ok(SegmentInfo {
        binding: Binding { state_id: header.state_id, kv_type, exact: header.exact != 0, thrift, prompt_attention },
        forgets: header.forgetting > 0,
        start,
        position,
        before: header.before,
        text: header.text,
        tokens,
        marks,
        bytes: header.length,
    })
}
