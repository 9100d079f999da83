//! Metadata: named blobs, kept verbatim.

use crate::bytes::{get_u32, get_u64};
use crate::limits::{MAX_BLOB_NAME, MAX_BLOBS, MAX_METADATA_BYTES};
use crate::zstandard::{compress_text, decompress};

/// Blob that holds the [`crate::ModelSpec`] as JSON.
pub const SPEC_BLOB: &str = "sluice/spec.json";
/// Blob that says where the weights came from: source files, digests, recipe, errors.
pub const PROVENANCE_BLOB: &str = "sluice/provenance.json";
/// Blob of one xxh3-128 (16 bytes, little-endian) per tensor of the source, in the order of files and places.
pub const SOURCE_DIGESTS_BLOB: &str = "sluice/source_digests";
/// The source's `config.json`.
pub const SOURCE_CONFIG_BLOB: &str = "config.json";
/// The source's `tokenizer.json`.
pub const TOKENIZER_BLOB: &str = "tokenizer.json";

/// Files of a checkpoint that say how text becomes tokens, how a conversation becomes text, and how to generate. They are
/// carried verbatim under their own names, and the runtime reads them from there.
pub const TEXT_FILES: [&str; 9] = [
    TOKENIZER_BLOB,
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "tiktoken.model",
    "added_tokens.json",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.json",
];
/// The source's `tokenizer_config.json`.
pub const TOKENIZER_CONFIG_BLOB: &str = "tokenizer_config.json";
/// The files from which a tokenizer is made. A checkpoint has some of them.
pub const TOKENIZER_BLOBS: [&str; 5] =
    [TOKENIZER_BLOB, "tiktoken.model", TOKENIZER_CONFIG_BLOB, "added_tokens.json", "special_tokens_map.json"];

/// Reports print the names of blobs: a control character in one could rewrite the terminal.
fn is_blob_name(name: &str) -> bool {
    (1..=MAX_BLOB_NAME).contains(&name.len()) && !name.contains(char::is_control)
}

/// Named blobs in file order. Names are unique.
///
/// Serialised as: u32 count; then for each blob u32 name length, u64 blob length, name (UTF-8), blob.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    blobs: Vec<(String, Vec<u8>)>,
}

impl Metadata {
    /// Adds a blob, or replaces the one of that name.
    ///
    /// # Panics
    /// When the name is empty, longer than [`MAX_BLOB_NAME`] or has control characters, or for more than [`MAX_BLOBS`]
    /// blobs: names are chosen by this program, not by its input.
    pub fn insert(&mut self, name: &str, blob: Vec<u8>) {
        assert!(is_blob_name(name), "blob name {name:?}");
        assert!(self.blobs.len() < MAX_BLOBS || self.get(name).is_some(), "too many blobs for `{name}`");
        match self.blobs.iter_mut().find(|(n, _)| n == name) {
            Some((_, old)) => *old = blob,
            None => self.blobs.push((name.to_owned(), blob)),
        }
    }

    /// Removes the blob of that name, if there is one.
    pub fn remove(&mut self, name: &str) {
        self.blobs.retain(|(n, _)| n != name);
    }

    /// The blob of that name.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.blobs.iter().find(|(n, _)| n == name).map(|(_, b)| b.as_slice())
    }

    /// All blobs in file order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.blobs.iter().map(|(n, b)| (n.as_str(), b.as_slice()))
    }

    /// Serialises all blobs.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = (self.blobs.len() as u32).to_le_bytes().to_vec();
        for (name, blob) in &self.blobs {
            out.extend((name.len() as u32).to_le_bytes());
            out.extend((blob.len() as u64).to_le_bytes());
            out.extend(name.as_bytes());
            out.extend(blob);
        }
        out
    }

    /// The logical bytes of the region in a file of this version, and the bytes before compression, from which the model's id is
    /// made.
    pub(crate) fn encode(&self, version: u32) -> Result<(Vec<u8>, Vec<u8>), String> {
        let bytes = self.to_bytes();
        if bytes.len() as u64 > MAX_METADATA_BYTES {
            return Err(format!("it has {} bytes, more than {MAX_METADATA_BYTES}", bytes.len()));
        }
        if version == 1 {
            return Ok((bytes.clone(), bytes));
        }
        let mut region = (bytes.len() as u64).to_le_bytes().to_vec();
        region.extend(compress_text(&bytes).map_err(|e| format!("it cannot be compressed: {e}"))?);
        Ok((region, bytes))
    }

    /// The bytes before compression of a region with these logical bytes in a file of this version.
    pub(crate) fn decode(region: Vec<u8>, version: u32) -> Result<Vec<u8>, String> {
        if version == 1 {
            return Ok(region);
        }
        let (len, frame) = region.split_at_checked(8).ok_or("it has no length")?;
        let len = get_u64(len, 0);
        if len > MAX_METADATA_BYTES {
            return Err(format!("it becomes {len} bytes, more than {MAX_METADATA_BYTES}"));
        }
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(len as usize).map_err(|_| format!("there is no memory for its {len} bytes"))?;
        bytes.resize(len as usize, 0);
        decompress(frame, &mut bytes)?;
        Ok(bytes)
    }

    /// Parses exactly `bytes`; `Err` says what is wrong.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut at = 0usize;
        let mut take = |n: usize| -> Result<&[u8], String> {
            let end = at.checked_add(n).filter(|&e| e <= bytes.len()).ok_or("a blob runs past the end")?;
            let part = &bytes[at..end];
            at = end;
            Ok(part)
        };
        let count = get_u32(take(4)?, 0) as usize;
        if count > MAX_BLOBS {
            return Err(format!("it announces {count} blobs, more than {MAX_BLOBS}"));
        }
        let mut out = Metadata::default();
        for _ in 0..count {
            let head = take(12)?;
            let (name_len, blob_len) = (get_u32(head, 0) as usize, get_u64(head, 4));
            if name_len == 0 || name_len > MAX_BLOB_NAME {
                return Err(format!("a blob name has {name_len} bytes"));
            }
            let name = std::str::from_utf8(take(name_len)?).map_err(|_| "a blob name is not UTF-8")?.to_owned();
            if !is_blob_name(&name) {
                return Err(format!("the blob name {name:?} is not printable"));
            }
            let blob_len = usize::try_from(blob_len).map_err(|_| "a blob runs past the end")?;
            let blob = take(blob_len)?.to_vec();
            if out.get(&name).is_some() {
                return Err(format!("the blob `{name}` appears twice"));
            }
            out.blobs.push((name, blob));
        }
        if at != bytes.len() {
            return Err(format!("{} bytes follow the last blob", bytes.len() - at));
        }
        Ok(out)
    }
}
