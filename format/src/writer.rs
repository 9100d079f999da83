//! Writing a model file: places first, then bytes in any order, the superblock last.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sluice_checksum::Xxh3;

use crate::bytes::round_up;
use crate::catalog::{Catalog, check_tiling};
use crate::checksum;
use crate::durable::Syncer;
use crate::error::{FormatError, Region};
use crate::extent::{Codec, ExtentKind, ExtentRecord};
use crate::limits::MAX_SPEC_BYTES;
use crate::metadata::Metadata;
use crate::reader::{check_table_place, read_spec};
use crate::spec::ModelSpec;
use crate::superblock::{ModelId, PAGE_SIZES, Superblock, TableRef};
use crate::tensor::{TensorRecord, is_tensor_name};

/// An extent before it has a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedExtent {
    /// What it holds.
    pub kind: ExtentKind,
    /// Layer or [`crate::NO_LAYER`].
    pub layer: u32,
    /// Expert or part.
    pub index: u32,
    /// Bytes that mean something.
    pub logical_len: u64,
}

/// The place of every extent: one after the other from the second page on, tables behind them.
#[derive(Clone, Debug)]
pub struct FileLayout {
    page_size: u32,
    extents: Vec<ExtentRecord>,
    extents_end: u64,
}

impl FileLayout {
    /// Places the extents in the given order, which becomes file order.
    ///
    /// # Errors
    /// [`FormatError::Layout`] for a page size that the format does not allow, or more than 2^64 bytes.
    pub fn new(page_size: u32, planned: &[PlannedExtent]) -> Result<Self, FormatError> {
        if !PAGE_SIZES.contains(&page_size) {
            return Err(FormatError::Layout(format!("the page size must be one of {PAGE_SIZES:?}, not {page_size}")));
        }
        let mut offset = u64::from(page_size);
        let too_long = || FormatError::Layout("the file would be longer than 2^64 bytes".into());
        let mut extents = Vec::with_capacity(planned.len());
        for p in planned {
            let stored_len = Codec::Raw.stored_len(p.logical_len, page_size).ok_or_else(too_long)?;
            extents.push(ExtentRecord {
                kind: p.kind,
                codec: Codec::Raw,
                layer: p.layer,
                index: p.index,
                volume: 0,
                offset,
                stored_len,
                logical_len: p.logical_len,
                checksum: 0,
            });
            offset = offset.checked_add(stored_len).ok_or_else(too_long)?;
        }
        Ok(FileLayout { page_size, extents, extents_end: offset })
    }

    /// Checks that extents, tensors and spec make a file that [`crate::ModelFile`] opens, before hours are spent on its bytes.
    ///
    /// # Errors
    /// [`FormatError::Layout`].
    pub fn check(&self, tensors: &[TensorRecord], spec: &ModelSpec) -> Result<(), FormatError> {
        if let Some(t) = tensors.iter().find(|t| !is_tensor_name(t.name.as_bytes())) {
            return Err(FormatError::Layout(format!("the tensor name `{}` does not fit", t.name)));
        }
        spec.validate().map_err(|e| layout_error(Region::Metadata, &e))?;
        if spec.to_json().len() > MAX_SPEC_BYTES {
            return Err(layout_error(Region::Metadata, "its spec is too long"));
        }
        Catalog::new(self.page_size, self.extents.clone(), tensors.to_vec(), spec.clone())
            .map(drop)
            .map_err(|(region, problem)| layout_error(region, &problem))
    }

    /// The extents with their places; their checksums are still 0.
    pub fn extents(&self) -> &[ExtentRecord] {
        &self.extents
    }

    /// Page size in bytes.
    pub fn page_size(&self) -> u32 {
        self.page_size
    }

    /// Bytes up to the end of the last extent; tables and metadata follow.
    pub fn extents_end(&self) -> u64 {
        self.extents_end
    }
}

fn layout_error(region: Region, problem: &str) -> FormatError {
    FormatError::Layout(format!("the {region} is invalid: {problem}"))
}

/// Writes the file that a [`FileLayout`] describes. Extents may be written from several threads, each once.
#[derive(Debug)]
pub struct FileWriter {
    path: PathBuf,
    file: File,
    layout: FileLayout,
    syncer: Arc<Syncer>,
}

impl FileWriter {
    /// Opens `path` for writing, creating it if need be. The bytes of extents stay: a resumed conversion relies on them. A
    /// superblock does not: from here on until [`FileWriter::finish`] the file is unfinished.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn open(path: &Path, layout: FileLayout) -> Result<Self, FormatError> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|source| FormatError::Io { path: path.to_owned(), action: "create it", source })?;
        Self::of_file(path, file, layout)
    }

    /// As [`FileWriter::open`], of a file that the caller has opened for reading and writing, and locked if need be: `path` is
    /// for messages.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn of_file(path: &Path, file: File, layout: FileLayout) -> Result<Self, FormatError> {
        let writer = FileWriter { path: path.to_owned(), file, layout, syncer: Arc::default() };
        writer.io("clear its superblock", writer.clear_superblock())?;
        Ok(writer)
    }

    /// Synced, so that no superblock can outlive the extents that it vouches for.
    fn clear_superblock(&self) -> io::Result<()> {
        let page = vec![0; self.layout.page_size as usize];
        self.file.write_all_at(&page, 0)?;
        self.syncer.data(&self.file)
    }

    /// The places.
    pub fn layout(&self) -> &FileLayout {
        &self.layout
    }

    /// The file, for preallocation and for what was written to it before.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What syncs the file, and knows whether the system could.
    pub fn syncer(&self) -> &Arc<Syncer> {
        &self.syncer
    }

    /// Starts writing extent number `index` of the layout from its beginning.
    pub fn extent(&self, index: usize) -> ExtentWriter<'_> {
        ExtentWriter { writer: self, record: self.layout.extents[index], written: 0, hash: Box::default() }
    }

    /// Writes tables and metadata behind the extents, syncs, writes the superblock, syncs again, as far as the system can.
    /// `checksums` has one entry per extent of the layout, from [`ExtentWriter::finish`].
    /// Returns the model's id, which is a hash of all content: equal content, equal file.
    ///
    /// # Errors
    /// [`FormatError::Io`]; [`FormatError::Layout`] for tables that a reader would refuse.
    pub fn finish(
        self,
        checksums: &[u64],
        tensors: &[TensorRecord],
        metadata: &Metadata,
    ) -> Result<ModelId, FormatError> {
        assert_eq!(checksums.len(), self.layout.extents.len(), "one checksum per extent");
        let spec = read_spec(metadata).map_err(|e| layout_error(Region::Metadata, &e))?;
        self.layout.check(tensors, &spec)?;
        let records = self.layout.extents.iter().zip(checksums);
        let records: Vec<_> = records.map(|(e, &checksum)| ExtentRecord { checksum, ..*e }).collect();
        let extents: Vec<u8> = records.iter().flat_map(ExtentRecord::to_bytes).collect();
        let tensors: Vec<u8> = tensors.iter().flat_map(TensorRecord::to_bytes).collect();
        let metadata = metadata.to_bytes();
        let model_id = ModelId::of(&extents, &tensors, &metadata);

        let mut offset = self.layout.extents_end;
        let mut put = |bytes| self.write_table(bytes, &mut offset);
        let (extents, tensors, metadata) = (put(extents)?, put(tensors)?, put(metadata)?);
        self.io("cut it to length", self.file.set_len(offset))?;
        self.io("sync it", self.syncer.all(&self.file))?;
        let superblock = Superblock {
            page_size: self.layout.page_size,
            model_id,
            volume: 0,
            volume_count: 1,
            file_len: offset,
            extents,
            tensors,
            metadata,
        };
        for (region, table) in
            [(Region::ExtentTable, extents), (Region::TensorTable, tensors), (Region::Metadata, metadata)]
        {
            check_table_place(&superblock, region, table).map_err(|e| layout_error(region, &e))?;
        }
        check_tiling(&superblock, &records).map_err(|e| layout_error(Region::ExtentTable, &e))?;
        self.io("write its superblock", self.file.write_all_at(&superblock.to_page(), 0))?;
        self.io("sync it", self.syncer.all(&self.file))?;
        Ok(model_id)
    }

    fn write_table(&self, mut bytes: Vec<u8>, offset: &mut u64) -> Result<TableRef, FormatError> {
        let logical_len = bytes.len() as u64;
        let page = u64::from(self.layout.page_size);
        let stored_len = round_up(logical_len.max(1), page)
            .ok_or_else(|| FormatError::Layout("a table is longer than 2^64 bytes".into()))?;
        bytes.resize(stored_len as usize, 0);
        self.io("write a table to it", self.file.write_all_at(&bytes, *offset))?;
        let table = TableRef { offset: *offset, stored_len, logical_len, checksum: checksum(&bytes) };
        *offset += stored_len;
        Ok(table)
    }

    fn io<T>(&self, action: &'static str, result: io::Result<T>) -> Result<T, FormatError> {
        result.map_err(|source| FormatError::Io { path: self.path.clone(), action, source })
    }
}

/// Writes one extent front to back and hashes it on the way.
pub struct ExtentWriter<'a> {
    writer: &'a FileWriter,
    record: ExtentRecord,
    written: u64,
    hash: Box<Xxh3>,
}

impl ExtentWriter<'_> {
    /// Appends `bytes`.
    ///
    /// # Errors
    /// [`FormatError::Io`]; [`FormatError::Layout`] when the extent would grow beyond its place.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        let end = self.written + bytes.len() as u64;
        if end > self.record.stored_len {
            return Err(FormatError::Layout(format!(
                "{} would have {end} bytes, {} are planned",
                self.record.name(),
                self.record.stored_len
            )));
        }
        let result = self.writer.file.write_all_at(bytes, self.record.offset + self.written);
        self.writer.io("write to it", result)?;
        self.hash.update(bytes);
        self.written = end;
        Ok(())
    }

    /// Bytes written so far.
    pub fn position(&self) -> u64 {
        self.written
    }

    /// Pads with zeros up to the page; returns the checksum of the stored bytes.
    ///
    /// # Errors
    /// As [`ExtentWriter::write`]; [`FormatError::Layout`] when fewer bytes than planned were written.
    pub fn finish(mut self) -> Result<u64, FormatError> {
        if self.written != self.record.logical_len {
            return Err(FormatError::Layout(format!(
                "{} has {} bytes, {} were planned",
                self.record.name(),
                self.written,
                self.record.logical_len
            )));
        }
        let padding = vec![0; (self.record.stored_len - self.written) as usize];
        self.write(&padding)?;
        Ok(self.hash.digest())
    }
}
