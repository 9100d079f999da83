//! The superblock: one page at offset 0, written last.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

use sluice_checksum::xxh3_128;

use crate::bytes::{array, get_u16, get_u32, get_u64, put};
use crate::checksum;
use crate::fields::{reserved_in_use, superblock as at, table_ref};
use crate::limits::MAX_VOLUMES;

/// First bytes of every file. The line ending and control-Z catch transfers that treat it as text.
pub const MAGIC: [u8; 8] = *b"SLUICE\r\x1a";
/// Version of the format that this crate writes.
pub const FORMAT_VERSION: u32 = 2;
/// Versions of the format that this crate reads.
pub const READ_VERSIONS: [u32; 2] = [1, FORMAT_VERSION];
/// Page sizes that a file may have: the usual one and Apple's.
pub const PAGE_SIZES: [u32; 2] = [4096, 16384];

/// Identity of a model: a hash of all its content, so that equal files have equal ids. It is not cryptographic: it tells
/// models apart, but does not prove where they come from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ModelId(pub [u8; 16]);

impl ModelId {
    /// The id of a model with these tables (their logical bytes) and this metadata (before compression): the xxh3-128 of their three
    /// xxh3-128, each little-endian.
    /// The extent table holds the checksum of every extent, so the id depends on every byte of the content.
    pub(crate) fn of(extents: &[u8], tensors: &[u8], metadata: &[u8]) -> Self {
        let digests = [extents, tensors, metadata].map(|table| xxh3_128(table).to_le_bytes());
        ModelId(xxh3_128(digests.as_flattened()).to_le_bytes())
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ModelId({self})")
    }
}

/// Where a table is, how long it is, and its checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableRef {
    /// Byte offset, a multiple of the page size.
    pub offset: u64,
    /// Stored bytes, a multiple of the page size; the checksum covers them all.
    pub stored_len: u64,
    /// Bytes that mean something.
    pub logical_len: u64,
    /// xxh3-64 of the stored bytes.
    pub checksum: u64,
}

impl TableRef {
    fn to_bytes(self) -> [u8; table_ref::LEN] {
        let mut b = [0; table_ref::LEN];
        put(&mut b, table_ref::OFFSET, &self.offset.to_le_bytes());
        put(&mut b, table_ref::STORED_LEN, &self.stored_len.to_le_bytes());
        put(&mut b, table_ref::LOGICAL_LEN, &self.logical_len.to_le_bytes());
        put(&mut b, table_ref::CHECKSUM, &self.checksum.to_le_bytes());
        b
    }

    fn parse(b: &[u8]) -> Self {
        TableRef {
            offset: get_u64(b, table_ref::OFFSET),
            stored_len: get_u64(b, table_ref::STORED_LEN),
            logical_len: get_u64(b, table_ref::LOGICAL_LEN),
            checksum: get_u64(b, table_ref::CHECKSUM),
        }
    }
}

/// The fields of the superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Version of the format.
    pub version: u32,
    /// Page size in bytes: alignment of every region.
    pub page_size: u32,
    /// Identity of the model; in a volume after the first, that of the tables that it repeats.
    pub model_id: ModelId,
    /// This volume, `0..volume_count`.
    pub volume: u16,
    /// Number of volumes.
    pub volume_count: u16,
    /// Length of this volume's file in bytes.
    pub file_len: u64,
    /// The extent table.
    pub extents: TableRef,
    /// The tensor table.
    pub tensors: TableRef,
    /// The metadata.
    pub metadata: TableRef,
}

/// What the first page of a file turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum SuperblockError {
    NotSluice,
    Unfinished,
    Version(u32),
    PageSize(u32),
    Checksum,
    Field(&'static str),
}

impl Superblock {
    /// Serialises to one page of `page_size` bytes, with the folders of the volumes behind the first ([`Superblock::parse_page`]), if there
    /// are any.
    ///
    /// # Errors
    /// In words: folders whose names do not fit into the page, or that cannot be written.
    pub(crate) fn page_with(&self, folders: &[PathBuf]) -> Result<Vec<u8>, String> {
        let mut text = Vec::new();
        for folder in folders {
            let name = folder.as_os_str().as_bytes();
            if name.contains(&0) {
                return Err(format!("the name of the folder {} cannot be written", folder.display()));
            }
            text.extend(name);
            text.push(0);
        }
        let room = self.page_size as usize - at::LEN;
        if text.len() > room {
            return Err(format!("the names of the folders of its volumes take {} bytes, {room} at most", text.len()));
        }
        let mut b = self.to_page();
        put(&mut b, at::LEN, &text);
        put(&mut b, at::CHECKSUM, &[0; 8]);
        let sum = Self::page_checksum(&b);
        put(&mut b, at::CHECKSUM, &sum.to_le_bytes());
        Ok(b)
    }

    /// Serialises to one page of `page_size` bytes.
    pub fn to_page(&self) -> Vec<u8> {
        let mut b = vec![0; self.page_size as usize];
        put(&mut b, at::MAGIC, &MAGIC);
        put(&mut b, at::VERSION, &self.version.to_le_bytes());
        put(&mut b, at::PAGE_SIZE, &self.page_size.to_le_bytes());
        put(&mut b, at::MODEL_ID, &self.model_id.0);
        put(&mut b, at::VOLUME, &self.volume.to_le_bytes());
        put(&mut b, at::VOLUME_COUNT, &self.volume_count.to_le_bytes());
        put(&mut b, at::FILE_LEN, &self.file_len.to_le_bytes());
        for (start, t) in [(at::EXTENTS, self.extents), (at::TENSORS, self.tensors), (at::METADATA, self.metadata)] {
            put(&mut b, start, &t.to_bytes());
        }
        let sum = Self::page_checksum(&b);
        put(&mut b, at::CHECKSUM, &sum.to_le_bytes());
        b
    }

    /// xxh3-64 of the whole page with the checksum field itself zero.
    fn page_checksum(page: &[u8]) -> u64 {
        let mut copy = page.to_vec();
        put(&mut copy, at::CHECKSUM, &[0; 8]);
        checksum(&copy)
    }

    /// The page size that the first [`at::LEN`] bytes announce.
    pub(crate) fn peek_page_size(head: &[u8]) -> Result<u32, SuperblockError> {
        let magic: [u8; 8] = array(head, at::MAGIC);
        if magic == [0; 8] {
            return Err(SuperblockError::Unfinished);
        }
        if magic != MAGIC {
            return Err(SuperblockError::NotSluice);
        }
        let version = get_u32(head, at::VERSION);
        if !READ_VERSIONS.contains(&version) {
            return Err(SuperblockError::Version(version));
        }
        let page = get_u32(head, at::PAGE_SIZE);
        if !PAGE_SIZES.contains(&page) {
            return Err(SuperblockError::PageSize(page));
        }
        Ok(page)
    }

    /// Parses the page at offset 0, whose length is the page size that it announces. Also returns the folders in which the volumes
    /// behind the first are looked for, which the first volume names: absolute, relative to its own folder, or empty for that folder. Of
    /// other volumes there are none.
    pub(crate) fn parse_page(page: &[u8]) -> Result<(Self, Vec<PathBuf>), SuperblockError> {
        let page_size = Self::peek_page_size(page)?;
        if Self::page_checksum(page) != get_u64(page, at::CHECKSUM) {
            return Err(SuperblockError::Checksum);
        }
        let table = |start| TableRef::parse(&page[start..start + table_ref::LEN]);
        let sb = Superblock {
            version: get_u32(page, at::VERSION),
            page_size,
            model_id: ModelId(array(page, at::MODEL_ID)),
            volume: get_u16(page, at::VOLUME),
            volume_count: get_u16(page, at::VOLUME_COUNT),
            file_len: get_u64(page, at::FILE_LEN),
            extents: table(at::EXTENTS),
            tensors: table(at::TENSORS),
            metadata: table(at::METADATA),
        };
        if reserved_in_use(&at::FIELDS, page) {
            return Err(SuperblockError::Field("its reserved bytes are in use"));
        }
        if sb.volume >= sb.volume_count {
            return Err(SuperblockError::Field("its volume number is not below its volume count"));
        }
        let most = if sb.version == 1 { 1 } else { MAX_VOLUMES };
        if usize::from(sb.volume_count) > most {
            return Err(SuperblockError::Field("it has more volumes than its version of the format allows"));
        }
        let named = if sb.volume == 0 { usize::from(sb.volume_count) - 1 } else { 0 };
        let folders = parse_folders(&page[at::LEN..], named).ok_or(SuperblockError::Field(
            "its reserved bytes are in use, or the folders of its volumes have no end",
        ))?;
        Ok((sb, folders))
    }
}

/// The names of `count` folders, each with a zero behind it; only zeros may follow.
fn parse_folders(mut text: &[u8], count: usize) -> Option<Vec<PathBuf>> {
    let mut folders = Vec::with_capacity(count);
    for _ in 0..count {
        let end = text.iter().position(|&b| b == 0)?;
        folders.push(PathBuf::from(OsString::from_vec(text[..end].to_vec())));
        text = &text[end + 1..];
    }
    text.iter().all(|&b| b == 0).then_some(folders)
}
