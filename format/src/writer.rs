//! Writing a model file: places first, then bytes in any order, the superblock last.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
use crate::stripes::{ExtentTable, Placed, Stripe};
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
    /// Of extents with several stripes that have been written, by number: the checksums of the stripes.
    stripe_sums: Mutex<HashMap<usize, Vec<u64>>>,
    /// The folders that the superblock names for the volumes behind the first.
    folders: Vec<PathBuf>,
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
        let writer = FileWriter {
            volumes,
            layout,
            compressed: HashMap::new(),
            stripe_sums: Mutex::default(),
            folders: Vec::new(),
            syncer: Arc::default(),
        };
        for volume in 0..writer.volumes.len() {
            writer.io(volume, "clear its superblock", writer.clear_superblock(volume))?;
        }
        Ok(writer)
    }

    /// Says in which folders the volumes behind the first will lie, one for each: absolute, relative to that of the first, or empty for
    /// that one. Without this, all are looked for beside the first.
    pub fn set_folders(&mut self, folders: Vec<PathBuf>) {
        self.folders = folders;
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
        let number = index;
        let record = self.layout.extents()[number];
        let ExtentRecord { kind, layer, index, .. } = record;
        let index = if kind == ExtentKind::Expert { ANY_INDEX } else { index };
        let tensors = self.compressed.get(&(kind, layer, index)).map(Vec::as_slice);
        let out = self.stripes_of(number, record.padded_len);
        ExtentWriter { out, number, record, written: 0, hash: Box::default(), tensors, held: Vec::new() }
    }

    /// Begins to write the stripes of an extent with this many stored bytes.
    fn stripes_of(&self, number: usize, stored_len: u64) -> StripeWriter<'_> {
        let stripes = self.layout.stripes(number, stored_len);
        StripeWriter { writer: self, sums: Vec::with_capacity(stripes.len()), stripes, done: 0, hash: Box::default() }
    }

    fn sums(&self) -> MutexGuard<'_, HashMap<usize, Vec<u64>>> {
        // A thread that panicked has left it whole: every change to it is one step.
        self.stripe_sums.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The final places of all extents, given the result of writing each. The checksums of stripes are 0, those of extents of what was
    /// written.
    ///
    /// # Errors
    /// [`FormatError::Layout`] if they cannot have places.
    pub fn places(layout: &FileLayout, written: &[Written]) -> Result<Vec<Placed>, FormatError> {
        let mut placer = layout.placer();
        let place = |(record, w): (&ExtentRecord, &Written)| {
            let Written { codec, stored_len, checksum, logical_checksum } = *w;
            let stripes = placer.next(record, stored_len)?;
            let Stripe { volume, offset, .. } = stripes[0];
            let record = ExtentRecord { codec, volume, offset, stored_len, checksum, logical_checksum, ..*record };
            Ok(Placed { record, stripes })
        };
        layout.extents().iter().zip(written).map(place).collect()
    }

    /// The same with the checksums of stripes, read again where an earlier run has written them.
    fn placed(&self, written: &[Written]) -> Result<Vec<Placed>, FormatError> {
        let mut all = Self::places(&self.layout, written)?;
        for (number, Placed { record, stripes }) in all.iter_mut().enumerate() {
            if let [whole] = &mut stripes[..] {
                whole.checksum = record.checksum;
                continue;
            }
            let known = self.sums().remove(&number);
            let sums = match known {
                Some(sums) => sums,
                None => self.read_sums(number, record, stripes)?,
            };
            stripes.iter_mut().zip(sums).for_each(|(stripe, sum)| stripe.checksum = sum);
            record.checksum = record.checksum_in_stripes();
        }
        Ok(all)
    }

    /// The checksums of the stripes of an extent that was written before: where it was first written, or where it was moved.
    fn read_sums(&self, number: usize, record: &ExtentRecord, moved: &[Stripe]) -> Result<Vec<u64>, FormatError> {
        let first = self.layout.stripes(number, record.stored_len);
        let mut buffer = Vec::new();
        for stripes in [&first[..], moved] {
            let (mut whole, mut sums) = (Xxh3::new(), Vec::with_capacity(stripes.len()));
            for stripe in stripes {
                if !self.read(stripe, &mut buffer)? {
                    break;
                }
                whole.update(&buffer);
                sums.push(checksum(&buffer));
            }
            if sums.len() == stripes.len() && whole.digest() == record.checksum {
                return Ok(sums);
            }
        }
        Err(checksum_error(&self.volumes[usize::from(record.volume)].0, record))
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
        let placed = self.placed(written)?;
        let table = ExtentTable::of_placed(placed.clone());
        self.layout.check_as(table.clone(), tensors, &spec)?;
        self.draw_together(&placed)?;
        let count = match self.layout.shares() {
            Some(shares) => shares.volumes(),
            None => table.extents.iter().map(|e| usize::from(e.volume) + 1).max().unwrap_or(1),
        };
        let extents = table.to_bytes(FORMAT_VERSION);
        let tensors: Vec<u8> = tensors.iter().flat_map(TensorRecord::to_bytes).collect();
        let (region, blobs) = metadata.encode(FORMAT_VERSION).map_err(|e| layout_error(Region::Metadata, &e))?;
        let model_id = ModelId::of(&extents, &tensors, &blobs);
        let others_id = ModelId::of(&extents, &tensors, &[]);

        let mut superblocks = Vec::with_capacity(count);
        for volume in 0..count {
            let of_volume = table.iter().flat_map(|(_, stripes)| stripes).filter(|s| usize::from(s.volume) == volume);
            let mut offset = of_volume.last().map_or(u64::from(self.layout.page_size()), |s| s.offset + s.len);
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
        check_tiling(&all, &table).map_err(|e| layout_error(Region::ExtentTable, &e))?;
        // The first volume comes last: without it, the others are no model.
        for (volume, sb) in superblocks.iter().enumerate().rev() {
            let folders: &[PathBuf] = if volume == 0 && count > 1 { &self.folders } else { &[] };
            let page = sb.page_with(folders).map_err(|e| layout_error(Region::Superblock, &e))?;
            self.io(volume, "write its superblock", self.file(volume).write_all_at(&page, 0))?;
            self.io(volume, "sync it", self.syncer.all(self.file(volume)))?;
        }
        Ok((model_id, superblocks.iter().map(|sb| sb.file_len).collect()))
    }

    /// Moves extents towards the beginning if those before them are compressed. It goes in their order, so none overwrites one that
    /// has yet to be moved. Extents that an interrupted run has moved stay where they are.
    fn draw_together(&self, placed: &[Placed]) -> Result<(), FormatError> {
        let mut buffer = Vec::new();
        for (number, Placed { record, stripes }) in placed.iter().enumerate() {
            for (written, to) in self.layout.stripes(number, record.stored_len).into_iter().zip(stripes) {
                if (written.volume, written.offset) == (to.volume, to.offset) {
                    continue;
                }
                let from = Stripe { checksum: to.checksum, ..written };
                if self.holds(&from, &mut buffer)? {
                    let volume = usize::from(to.volume);
                    self.io(volume, "write to it", self.file(volume).write_all_at(&buffer, to.offset))?;
                } else if !self.holds(to, &mut buffer)? {
                    let (volume, offset) = (from.volume, from.offset);
                    let from = ExtentRecord { volume, offset, ..*record };
                    return Err(checksum_error(&self.volumes[usize::from(volume)].0, &from));
                }
            }
        }
        Ok(())
    }

    /// Reads the bytes at a stripe's place; whether they are its own.
    fn holds(&self, stripe: &Stripe, buffer: &mut Vec<u8>) -> Result<bool, FormatError> {
        Ok(self.read(stripe, buffer)? && checksum(buffer) == stripe.checksum)
    }

    /// Reads the bytes at a stripe's place; whether the file is as long.
    fn read(&self, stripe: &Stripe, buffer: &mut Vec<u8>) -> Result<bool, FormatError> {
        let volume = usize::from(stripe.volume);
        buffer.resize(stripe.len as usize, 0);
        match self.file(volume).read_exact_at(buffer, stripe.offset) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            read => self.io(volume, "read what was written to it", read).map(|()| true),
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
    out: StripeWriter<'a>,
    number: usize,
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
            None => self.out.write(bytes)?,
        }
        self.hash.update(bytes);
        self.written = end;
        Ok(())
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
        let (writer, number) = (self.out.writer, self.number);
        let Some(tensors) = self.tensors else {
            self.out.finish(number);
            return Ok(raw);
        };
        let logical = &self.held[..self.record.logical_len as usize];
        let Some(coded) = encode(logical, tensors, writer.layout.page_size()) else {
            self.out.write(&self.held)?;
            self.out.finish(number);
            return Ok(raw);
        };
        writer.write_stored(number, &coded)?;
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
        self.out.writer.write_stored(self.number, stored)?;
        Ok(written)
    }
}

impl FileWriter {
    /// Writes the stored bytes of an extent.
    fn write_stored(&self, number: usize, stored: &[u8]) -> Result<(), FormatError> {
        let mut out = self.stripes_of(number, stored.len() as u64);
        out.write(stored)?;
        out.finish(number);
        Ok(())
    }
}

/// Writes the stored bytes of an extent to its stripes, front to back, and forms the checksum of each if there are several.
struct StripeWriter<'a> {
    writer: &'a FileWriter,
    stripes: Vec<Stripe>,
    /// Of the stripes that are complete.
    sums: Vec<u64>,
    /// Bytes written of the next one.
    done: u64,
    hash: Box<Xxh3>,
}

impl StripeWriter<'_> {
    /// Appends `bytes`, which fit into the stripes.
    fn write(&mut self, mut bytes: &[u8]) -> Result<(), FormatError> {
        while let (false, Some(&stripe)) = (bytes.is_empty(), self.stripes.get(self.sums.len())) {
            let len = (stripe.len - self.done).min(bytes.len() as u64);
            let (part, rest) = bytes.split_at(len as usize);
            let volume = usize::from(stripe.volume);
            let result = self.writer.file(volume).write_all_at(part, stripe.offset + self.done);
            self.writer.io(volume, "write to it", result)?;
            self.done += len;
            if self.stripes.len() > 1 {
                self.hash.update(part);
            }
            if self.done == stripe.len {
                self.sums.push(self.hash.digest());
                *self.hash = Xxh3::new();
                self.done = 0;
            }
            bytes = rest;
        }
        Ok(())
    }

    /// Keeps the checksums of the stripes of extent number `number`, all of which are complete.
    fn finish(self, number: usize) {
        if self.stripes.len() > 1 {
            self.writer.sums().insert(number, self.sums);
        }
    }
}
