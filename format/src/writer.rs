//! Writing a model file: places first, then bytes in any order, the superblock last.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sluice_checksum::Xxh3;

use crate::bytes::round_up;
use crate::catalog::check_tiling;
use crate::checksum;
use crate::durable::Syncer;
use crate::error::{FormatError, Region};
use crate::extent::{Codec, ExtentKind, ExtentRecord};
use crate::metadata::Metadata;
use crate::placing::{FileLayout, layout_error};
use crate::planes::{encode, may_gain};
use crate::reader::{check_table_place, checksum_error, read_spec};
use crate::superblock::{FORMAT_VERSION, ModelId, Superblock, TableRef};
use crate::tensor::{ANY_INDEX, TensorRecord};

/// The result of writing an extent. Its place follows from this and from all extents before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Whether and how it is compressed.
    pub codec: Codec,
    /// Bytes in the file.
    pub stored_len: u64,
    /// xxh3-64 of those.
    pub checksum: u64,
    /// xxh3-64 of the padded bytes.
    pub logical_checksum: u64,
}

impl Written {
    /// The result for an extent that is not compressed.
    pub fn raw(record: &ExtentRecord, checksum: u64) -> Self {
        Written { codec: Codec::Raw, stored_len: record.padded_len, checksum, logical_checksum: checksum }
    }
}

/// Writes the files that a [`FileLayout`] describes. Extents may be written from several threads, each once.
#[derive(Debug)]
pub struct FileWriter {
    volumes: Vec<(PathBuf, File)>,
    layout: FileLayout,
    /// Tensors of the extents that may be compressed, by kind, layer and index of their records.
    compressed: HashMap<(ExtentKind, u32, u32), Vec<TensorRecord>>,
    syncer: Arc<Syncer>,
}

impl FileWriter {
    /// Opens `path` for writing a model of one file, creating it if need be. The bytes of extents stay, because a resumed conversion
    /// relies on them. A superblock is cleared: from here on until [`FileWriter::finish`] the file is unfinished.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn open(path: &Path, layout: FileLayout) -> Result<Self, FormatError> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|source| FormatError::Io { path: path.to_owned(), action: "create it", source })?;
        Self::of_files(vec![(path.to_owned(), file)], layout)
    }

    /// As [`FileWriter::open`], for files that the caller has opened for reading and writing, and locked if need be: one for each
    /// volume of the layout. Their paths are for messages.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    ///
    /// # Panics
    /// If there are more volumes than files.
    pub fn of_files(volumes: Vec<(PathBuf, File)>, layout: FileLayout) -> Result<Self, FormatError> {
        assert!(volumes.len() >= layout.ends().len(), "a file for each volume");
        let writer = FileWriter { volumes, layout, compressed: HashMap::new(), syncer: Arc::default() };
        for volume in 0..writer.volumes.len() {
            writer.io(volume, "clear its superblock", writer.clear_superblock(volume))?;
        }
        Ok(writer)
    }

    /// From now on, compresses extents if that saves enough. `tensors` are those of the model. Each extent is written where it
    /// would begin without compression, with a hole behind it; [`FileWriter::finish`] moves them together.
    pub fn compress(&mut self, tensors: &[TensorRecord]) {
        let key = |t: &TensorRecord| (t.kind, t.layer, t.index);
        let groups = tensors.chunk_by(|a, b| key(a) == key(b)).filter(|group| may_gain(group));
        self.compressed = groups.map(|group| (key(&group[0]), group.to_vec())).collect();
    }

    /// Synced, so that no superblock can outlive the extents to which it refers.
    fn clear_superblock(&self, volume: usize) -> io::Result<()> {
        let page = vec![0; self.layout.page_size() as usize];
        self.file(volume).write_all_at(&page, 0)?;
        self.syncer.data(self.file(volume))
    }

    /// The places before compression.
    pub fn layout(&self) -> &FileLayout {
        &self.layout
    }

    /// The files, for preallocation and for what was written to them before.
    pub fn files(&self) -> impl Iterator<Item = (&Path, &File)> {
        self.volumes.iter().map(|(path, file)| (path.as_path(), file))
    }

    fn file(&self, volume: usize) -> &File {
        &self.volumes[volume].1
    }

    /// Syncs the files, and knows whether the system could.
    pub fn syncer(&self) -> &Arc<Syncer> {
        &self.syncer
    }

    /// Starts writing extent number `index` of the layout from its beginning.
    pub fn extent(&self, index: usize) -> ExtentWriter<'_> {
        let record = self.layout.extents()[index];
        let ExtentRecord { kind, layer, index, .. } = record;
        let index = if kind == ExtentKind::Expert { ANY_INDEX } else { index };
        let tensors = self.compressed.get(&(kind, layer, index)).map(Vec::as_slice);
        ExtentWriter { writer: self, record, written: 0, hash: Box::default(), tensors, held: Vec::new() }
    }

    /// The records of all extents, given the result of writing each.
    ///
    /// # Errors
    /// [`FormatError::Layout`] if they cannot have places.
    pub fn records(layout: &FileLayout, written: &[Written]) -> Result<Vec<ExtentRecord>, FormatError> {
        let mut placer = layout.placer();
        let record = |(record, w): (&ExtentRecord, &Written)| {
            let Written { codec, stored_len, checksum, logical_checksum } = *w;
            let (volume, offset) = placer.next(&record.name(), stored_len)?;
            Ok(ExtentRecord { codec, volume, offset, stored_len, checksum, logical_checksum, ..*record })
        };
        layout.extents().iter().zip(written).map(record).collect()
    }

    /// Writes tables and metadata behind the extents, syncs, writes the superblocks, syncs again, as far as the system can. `written`
    /// has one entry per extent of the layout, from [`ExtentWriter::finish`]. Returns the model's id, which is a hash of all content,
    /// and the length of each volume; compression may leave fewer volumes than there are files.
    ///
    /// # Errors
    /// [`FormatError::Io`]; [`FormatError::Layout`] for tables that a reader would refuse.
    pub fn finish(
        self,
        written: &[Written],
        tensors: &[TensorRecord],
        metadata: &Metadata,
    ) -> Result<(ModelId, Vec<u64>), FormatError> {
        assert_eq!(written.len(), self.layout.extents().len(), "one for each extent");
        let spec = read_spec(metadata).map_err(|e| layout_error(Region::Metadata, &e))?;
        let records = Self::records(&self.layout, written)?;
        self.layout.check_as(&records, tensors, &spec)?;
        self.draw_together(&records)?;
        let count = records.iter().map(|e| usize::from(e.volume) + 1).max().unwrap_or(1);
        let extents: Vec<u8> = records.iter().flat_map(|e| e.to_bytes(FORMAT_VERSION)).collect();
        let tensors: Vec<u8> = tensors.iter().flat_map(TensorRecord::to_bytes).collect();
        let (region, blobs) = metadata.encode(FORMAT_VERSION).map_err(|e| layout_error(Region::Metadata, &e))?;
        let model_id = ModelId::of(&extents, &tensors, &blobs);
        let others_id = ModelId::of(&extents, &tensors, &[]);

        let mut superblocks = Vec::with_capacity(count);
        for volume in 0..count {
            let of_volume = records.iter().rev().find(|e| usize::from(e.volume) == volume);
            let mut offset = of_volume.map_or(u64::from(self.layout.page_size()), |e| e.offset + e.stored_len);
            let mut put = |bytes| self.write_table(volume, bytes, &mut offset);
            let metadata = if volume == 0 { region.clone() } else { Vec::new() };
            let (extents, tensors, metadata) = (put(extents.clone())?, put(tensors.clone())?, put(metadata)?);
            self.io(volume, "cut it to length", self.file(volume).set_len(offset))?;
            self.io(volume, "sync it", self.syncer.all(self.file(volume)))?;
            superblocks.push(Superblock {
                version: FORMAT_VERSION,
                page_size: self.layout.page_size(),
                model_id: if volume == 0 { model_id } else { others_id },
                volume: volume as u16,
                volume_count: count as u16,
                file_len: offset,
                extents,
                tensors,
                metadata,
            });
        }
        for sb in &superblocks {
            let tables =
                [(Region::ExtentTable, sb.extents), (Region::TensorTable, sb.tensors), (Region::Metadata, sb.metadata)];
            for (region, table) in tables {
                check_table_place(sb, region, table).map_err(|e| layout_error(region, &e))?;
            }
        }
        let all: Vec<_> = superblocks.iter().collect();
        check_tiling(&all, &records).map_err(|e| layout_error(Region::ExtentTable, &e))?;
        // The first volume comes last: without it, the others are no model.
        for (volume, sb) in superblocks.iter().enumerate().rev() {
            self.io(volume, "write its superblock", self.file(volume).write_all_at(&sb.to_page(), 0))?;
            self.io(volume, "sync it", self.syncer.all(self.file(volume)))?;
        }
        Ok((model_id, superblocks.iter().map(|sb| sb.file_len).collect()))
    }

    /// Moves extents towards the beginning if those before them are compressed. It goes in their order, so none overwrites one that
    /// has yet to be moved. Extents that an interrupted run has moved stay where they are.
    fn draw_together(&self, records: &[ExtentRecord]) -> Result<(), FormatError> {
        let mut buffer = Vec::new();
        for (written, to) in self.layout.extents().iter().zip(records) {
            if (written.volume, written.offset) == (to.volume, to.offset) {
                continue;
            }
            let from = ExtentRecord { volume: written.volume, offset: written.offset, ..*to };
            if self.holds(&from, &mut buffer)? {
                let volume = usize::from(to.volume);
                self.io(volume, "write to it", self.file(volume).write_all_at(&buffer, to.offset))?;
            } else if !self.holds(to, &mut buffer)? {
                return Err(checksum_error(&self.volumes[usize::from(from.volume)].0, &from));
            }
        }
        Ok(())
    }

    /// Reads the bytes at an extent's place; whether they are its own.
    fn holds(&self, extent: &ExtentRecord, buffer: &mut Vec<u8>) -> Result<bool, FormatError> {
        let volume = usize::from(extent.volume);
        buffer.resize(extent.stored_len as usize, 0);
        match self.file(volume).read_exact_at(buffer, extent.offset) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            read => self.io(volume, "read what was written to it", read).map(|()| checksum(buffer) == extent.checksum),
        }
    }

    fn write_table(&self, volume: usize, mut bytes: Vec<u8>, offset: &mut u64) -> Result<TableRef, FormatError> {
        let logical_len = bytes.len() as u64;
        let page = u64::from(self.layout.page_size());
        let stored_len = round_up(logical_len.max(1), page)
            .ok_or_else(|| FormatError::Layout("a table is longer than 2^64 bytes".into()))?;
        bytes.resize(stored_len as usize, 0);
        self.io(volume, "write a table to it", self.file(volume).write_all_at(&bytes, *offset))?;
        let table = TableRef { offset: *offset, stored_len, logical_len, checksum: checksum(&bytes) };
        *offset += stored_len;
        Ok(table)
    }

    fn io<T>(&self, volume: usize, action: &'static str, result: io::Result<T>) -> Result<T, FormatError> {
        result.map_err(|source| FormatError::Io { path: self.volumes[volume].0.clone(), action, source })
    }
}

/// Writes one extent front to back and hashes it on the way. An extent that may be compressed is held in memory until it is
/// whole.
pub struct ExtentWriter<'a> {
    writer: &'a FileWriter,
    record: ExtentRecord,
    written: u64,
    hash: Box<Xxh3>,
    /// Its tensors and all bytes so far, if it may be compressed.
    tensors: Option<&'a [TensorRecord]>,
    held: Vec<u8>,
}

impl ExtentWriter<'_> {
    /// Appends `bytes`.
    ///
    /// # Errors
    /// [`FormatError::Io`]; [`FormatError::Layout`] when the extent would grow beyond its place.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        let end = self.written + bytes.len() as u64;
        if end > self.record.padded_len {
            return Err(FormatError::Layout(format!(
                "{} would have {end} bytes, {} are planned",
                self.record.name(),
                self.record.padded_len
            )));
        }
        match self.tensors {
            Some(_) => self.held.extend_from_slice(bytes),
            None => self.put(self.written, bytes)?,
        }
        self.hash.update(bytes);
        self.written = end;
        Ok(())
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> Result<(), FormatError> {
        let volume = usize::from(self.record.volume);
        let result = self.writer.file(volume).write_all_at(bytes, self.record.offset + offset);
        self.writer.io(volume, "write to it", result)
    }

    /// Bytes written so far.
    pub fn position(&self) -> u64 {
        self.written
    }

    /// Pads with zeros up to the end of the page; returns the result of writing the extent.
    ///
    /// # Errors
    /// As [`ExtentWriter::write`]; [`FormatError::Layout`] when fewer bytes than planned were written.
    pub fn finish(mut self) -> Result<Written, FormatError> {
        if self.written != self.record.logical_len {
            return Err(FormatError::Layout(format!(
                "{} has {} bytes, {} were planned",
                self.record.name(),
                self.written,
                self.record.logical_len
            )));
        }
        let padding = vec![0; (self.record.padded_len - self.written) as usize];
        self.write(&padding)?;
        let raw = Written::raw(&self.record, self.hash.digest());
        let Some(tensors) = self.tensors else { return Ok(raw) };
        let logical = &self.held[..self.record.logical_len as usize];
        let Some(coded) = encode(logical, tensors, self.writer.layout.page_size()) else {
            self.put(0, &self.held)?;
            return Ok(raw);
        };
        self.put(0, &coded)?;
        Ok(Written { codec: Codec::Planes, stored_len: coded.len() as u64, checksum: checksum(&coded), ..raw })
    }

    /// Takes over this extent from another file: the result of writing it there, and its stored bytes.
    ///
    /// # Errors
    /// [`FormatError::Io`]; [`FormatError::Layout`] for more bytes than planned.
    pub fn copy(self, written: Written, stored: &[u8]) -> Result<Written, FormatError> {
        if stored.len() as u64 > self.record.padded_len {
            let (name, len) = (self.record.name(), stored.len());
            return Err(FormatError::Layout(format!("{name} has {len} bytes, {} are planned", self.record.padded_len)));
        }
        self.put(0, stored)?;
        Ok(written)
    }
}
