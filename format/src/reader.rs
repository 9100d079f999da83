//! Opening a model file: a ladder of checks, cheapest first, before anything is believed.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt as _};
use std::path::{Path, PathBuf};

use crate::bytes::round_up;
use crate::catalog::{Catalog, check_tiling};
use crate::checksum;
use crate::error::{FormatError, Region};
use crate::extent::{Codec, ExtentKind, ExtentRecord, NO_LAYER};
use crate::fields;
use crate::limits::{MAX_EXTENT_TABLE_BYTES, MAX_METADATA_BYTES, MAX_TENSOR_TABLE_BYTES};
use crate::metadata::{Metadata, SPEC_BLOB};
use crate::planes::decode;
use crate::rewrite::is_interrupted;
use crate::spec::ModelSpec;
use crate::state_id::StateId;
use crate::stripes::{ExtentTable, Stripe};
use crate::superblock::{ModelId, Superblock, SuperblockError, TableRef};
use crate::tensor::TensorRecord;
use crate::volumes::{Volume, VolumeName, missing, model_path};

/// An opened model, whose superblocks, tables and metadata have passed every check.
#[derive(Debug)]
pub struct ModelFile {
    /// At least one.
    volumes: Vec<Volume>,
    catalog: Catalog,
    metadata: Metadata,
}

impl ModelFile {
    /// Opens and checks the model in the file `path`. `path` can also be one of several volumes, or their common name without the numbers.
    /// Reads superblocks, tables and metadata, not the extents.
    ///
    /// # Errors
    /// The first check that fails, as its own variant of [`FormatError`].
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let path = &model_path(path)?;
        Volume::open(path)
            .map_err(missing)
            .and_then(Volume::with_others)
            .and_then(|volumes| Self::check(volumes, None))
            .map_err(|refused| {
                // Only the first volume's file is ever changed.
                let first = VolumeName::parse(path).map_or_else(|| path.to_owned(), |name| name.path_of(0));
                let changed = [path.as_path(), first.as_path()]
                    .into_iter()
                    .find(|path| open_regular(path).is_ok_and(|file| is_interrupted(&file)));
                match changed {
                    Some(path) if !matches!(refused, FormatError::Io { .. }) => {
                        FormatError::Interrupted { path: path.to_owned() }
                    }
                    _ => refused,
                }
            })
    }

    /// Checks a model with these volumes, the content of their superblocks, and these stored bytes of the metadata, if any.
    pub(crate) fn check(volumes: Vec<Volume>, metadata: Option<Vec<u8>>) -> Result<Self, FormatError> {
        let sb = *volumes[0].superblock();
        let (path, file) = (volumes[0].path(), volumes[0].file());
        let read = |region, table| {
            read_table(path, file, &sb, region, table).and_then(|bytes| check_table(path, region, table, bytes))
        };
        let invalid = |region| move |problem| FormatError::Invalid { path: path.to_owned(), region, problem };

        let extent_table = read(Region::ExtentTable, sb.extents)?;
        let record = |bytes: &[u8]| ExtentRecord::parse(bytes, sb.version, sb.page_size);
        let extents = parse_records(&extent_table, fields::extent::LEN, record)
            .and_then(ExtentTable::of_records)
            .map_err(invalid(Region::ExtentTable))?;
        let tensor_table = read(Region::TensorTable, sb.tensors)?;
        let tensors = parse_records(&tensor_table, fields::tensor::LEN, TensorRecord::parse)
            .map_err(invalid(Region::TensorTable))?;
        let region = match metadata {
            Some(stored) => {
                check_table_place(&sb, Region::Metadata, sb.metadata).map_err(invalid(Region::Metadata))?;
                check_table(path, Region::Metadata, sb.metadata, stored)?
            }
            None => read(Region::Metadata, sb.metadata)?,
        };
        let blobs = Metadata::decode(region, sb.version).map_err(invalid(Region::Metadata))?;
        let metadata = Metadata::parse(&blobs).map_err(invalid(Region::Metadata))?;
        check_ids(&volumes, [&extent_table, &tensor_table, &blobs])?;
        drop((extent_table, tensor_table, blobs));

        let superblocks: Vec<_> = volumes.iter().map(Volume::superblock).collect();
        check_tiling(&superblocks, &extents).map_err(invalid(Region::ExtentTable))?;
        let spec = read_spec(&metadata).map_err(invalid(Region::Metadata))?;
        let catalog = Catalog::new(sb.page_size, extents, tensors, spec);
        let catalog = catalog.map_err(|(region, problem)| invalid(region)(problem))?;
        Ok(ModelFile { volumes, catalog, metadata })
    }

    /// Path of the file; of several volumes, that of the first.
    pub fn path(&self) -> &Path {
        self.volumes[0].path()
    }

    /// The files, in the order of their numbers.
    pub fn volumes(&self) -> &[Volume] {
        &self.volumes
    }

    /// The superblock; of several volumes, the first's.
    pub fn superblock(&self) -> &Superblock {
        self.volumes[0].superblock()
    }

    /// Identifies everything on which a saved state of this model depends.
    pub fn state_id(&self) -> StateId {
        StateId::of_model(self.extents(), self.superblock().page_size, self.tensors(), &self.metadata)
    }

    /// What the model computes.
    pub fn spec(&self) -> &ModelSpec {
        &self.catalog.spec
    }

    /// The named blobs.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All extents in table order, which is file order.
    pub fn extents(&self) -> &[ExtentRecord] {
        &self.catalog.table.extents
    }

    /// The stripes of an extent of this model, in the order of their bytes: several if reading it uses several volumes at once, else one.
    pub fn stripes(&self, extent: &ExtentRecord) -> &[Stripe] {
        self.catalog.stripes(extent)
    }

    /// Whether extents are striped over the volumes.
    pub fn is_striped(&self) -> bool {
        self.catalog.table.is_striped()
    }

    /// All tensor records.
    pub fn tensors(&self) -> &[TensorRecord] {
        &self.catalog.tensors
    }

    /// The extent of that kind, layer (or [`NO_LAYER`]) and index.
    pub fn extent(&self, kind: ExtentKind, layer: u32, index: u32) -> Option<&ExtentRecord> {
        self.catalog.extent(kind, layer, index)
    }

    /// The tensors inside that extent, in the order of their offsets.
    pub fn tensors_in(&self, kind: ExtentKind, layer: u32, index: u32) -> impl Iterator<Item = &TensorRecord> {
        self.catalog.tensors_in(kind, layer, index).iter()
    }

    /// The tensors inside this extent, in the order of their offsets.
    pub fn tensors_of(&self, extent: &ExtentRecord) -> &[TensorRecord] {
        self.catalog.tensors_in(extent.kind, extent.layer, extent.index)
    }

    /// One tensor inside that extent.
    pub fn tensor(&self, kind: ExtentKind, layer: u32, index: u32, name: &str) -> Option<&TensorRecord> {
        self.tensors_in(kind, layer, index).find(|t| t.name == name)
    }

    /// Parts of the embedding or head: `(extent, tensor)` in row order. All but the last have the same number of rows.
    pub fn parts(&self, kind: ExtentKind) -> impl Iterator<Item = (&ExtentRecord, &TensorRecord)> {
        self.parts_of(kind, NO_LAYER)
    }

    /// The same for the parts that a prediction layer has of its own; empty if it uses the model's.
    pub fn parts_of(&self, kind: ExtentKind, layer: u32) -> impl Iterator<Item = (&ExtentRecord, &TensorRecord)> {
        (0..).map_while(move |i| Some((self.extent(kind, layer, i)?, self.tensors_in(kind, layer, i).next()?)))
    }

    /// Parts of the table of n-grams of a layer: as [`ModelFile::parts`].
    pub fn table_parts(&self, layer: u32) -> impl Iterator<Item = (&ExtentRecord, &TensorRecord)> {
        let kind = ExtentKind::Table;
        (0..).map_while(move |i| Some((self.extent(kind, layer, i)?, self.tensors_in(kind, layer, i).next()?)))
    }

    /// Reads the padded bytes of an extent, compressed or not, into `buffer` through the page cache and verifies them.
    /// Allocates at most twice [`crate::limits::MAX_EXTENT_BYTES`].
    ///
    /// # Errors
    /// [`FormatError::ExtentRead`], [`FormatError::ExtentChecksum`] and [`FormatError::ExtentCode`].
    pub fn read_extent(&self, extent: &ExtentRecord, buffer: &mut Vec<u8>) -> Result<(), FormatError> {
        if extent.codec == Codec::Raw {
            return self.read_stored(extent, buffer);
        }
        let mut stored = Vec::new();
        self.read_stored(extent, &mut stored)?;
        resize(buffer, extent.padded_len).map_err(|source| self.extent_read(extent, source))?;
        decode(&stored, extent.logical_len, buffer)
            .and_then(|()| match checksum(buffer) == extent.logical_checksum {
                true => Ok(()),
                false => Err("what it becomes has another checksum".into()),
            })
            .map_err(|problem| FormatError::ExtentCode {
                path: self.path_of(extent).to_owned(),
                extent: extent.name(),
                offset: extent.offset,
                problem,
            })
    }

    /// Reads the stored bytes of an extent into `buffer` (resized to their length) through the page cache and verifies them.
    ///
    /// # Errors
    /// [`FormatError::ExtentRead`] and [`FormatError::ExtentChecksum`].
    pub fn read_stored(&self, extent: &ExtentRecord, buffer: &mut Vec<u8>) -> Result<(), FormatError> {
        resize(buffer, extent.stored_len).map_err(|source| self.extent_read(extent, source))?;
        let mut rest = &mut buffer[..];
        let stripes = self.stripes(extent);
        for stripe in stripes {
            let bytes =
                rest.split_off_mut(..stripe.len as usize).expect("the lengths of stripes add up to the extent's");
            let volume = self.volume_of(stripe);
            let read = volume.file().read_exact_at(bytes, stripe.offset);
            read.map_err(|source| self.stripe_read(extent, stripe, source))?;
            if checksum(bytes) != stripe.checksum {
                return Err(stripe_checksum_error(volume.path(), extent, stripe));
            }
        }
        // That stripes are right does not say that they are in their order.
        if stripes.len() > 1 && extent.codec == Codec::Raw && checksum(buffer) != extent.logical_checksum {
            return Err(checksum_error(self.path_of(extent), extent));
        }
        Ok(())
    }

    /// The volume of a stripe.
    pub(crate) fn volume_of(&self, stripe: &Stripe) -> &Volume {
        &self.volumes[usize::from(stripe.volume)]
    }

    /// The path of the file that an extent, or its first stripe, lies in.
    pub fn path_of(&self, extent: &ExtentRecord) -> &Path {
        self.volumes[usize::from(extent.volume)].path()
    }

    fn extent_read(&self, extent: &ExtentRecord, source: io::Error) -> FormatError {
        let path = self.path_of(extent).to_owned();
        FormatError::ExtentRead { path, extent: extent.name(), offset: extent.offset, source }
    }

    pub(crate) fn stripe_read(&self, extent: &ExtentRecord, stripe: &Stripe, source: io::Error) -> FormatError {
        let path = self.volume_of(stripe).path().to_owned();
        FormatError::ExtentRead { path, extent: extent.name(), offset: stripe.offset, source }
    }

    /// The content of the extent table.
    pub(crate) fn extent_table(&self) -> &ExtentTable {
        &self.catalog.table
    }
}

/// The model id of every volume matches its content: for the first volume, extent table, tensor table and metadata.
fn check_ids(volumes: &[Volume], [extents, tensors, blobs]: [&[u8]; 3]) -> Result<(), FormatError> {
    let ids = [ModelId::of(extents, tensors, blobs), ModelId::of(extents, tensors, &[])];
    for volume in volumes {
        let sb = volume.superblock();
        let wrong = match sb.volume {
            0 => sb.model_id != ids[0],
            _ => sb.model_id != ids[1] || sb.metadata.logical_len != 0,
        };
        if wrong {
            let (path, region) = (volume.path().to_owned(), Region::Superblock);
            return Err(FormatError::Invalid {
                path,
                region,
                problem: "its model id is not that of its content".into(),
            });
        }
    }
    Ok(())
}

/// Opens a file for reading; gives an error if it is not a regular file. Opening a named pipe would wait until somebody writes
/// to it, perhaps for ever.
///
/// # Errors
/// The operating system's, or that it is not a regular file.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let found = fs::metadata(path)?;
    if !found.is_file() {
        let problem = if found.is_dir() { "it is a folder" } else { "it is not a regular file" };
        return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
    }
    File::open(path)
}

/// As [`open_regular`], but a link is refused, not followed.
///
/// # Errors
/// The operating system's, or that it is not a regular file.
pub fn open_no_link(path: &Path) -> io::Result<File> {
    let named = fs::symlink_metadata(path)?;
    if !named.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let file = File::open(path)?;
    let opened = file.metadata()?;
    // The name may have become a link since.
    match (opened.dev(), opened.ino()) == (named.dev(), named.ino()) {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "another file has taken its name")),
    }
}

/// Resizes to a length from a file; gives an error instead of aborting if there is not enough memory.
fn resize(buffer: &mut Vec<u8>, len: u64) -> io::Result<()> {
    let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
    buffer.try_reserve_exact(len.saturating_sub(buffer.len())).map_err(|_| io::ErrorKind::OutOfMemory)?;
    buffer.resize(len, 0);
    Ok(())
}

/// The spec in the metadata, parsed and validated.
pub(crate) fn read_spec(metadata: &Metadata) -> Result<ModelSpec, String> {
    let json = metadata.get(SPEC_BLOB).ok_or_else(|| format!("it has no `{SPEC_BLOB}`"))?;
    ModelSpec::from_json(json).map_err(|e| format!("`{SPEC_BLOB}`: {e}"))
}

pub(crate) fn stripe_checksum_error(path: &Path, extent: &ExtentRecord, stripe: &Stripe) -> FormatError {
    FormatError::ExtentChecksum { path: path.to_owned(), extent: extent.name(), offset: stripe.offset }
}

pub(crate) fn checksum_error(path: &Path, extent: &ExtentRecord) -> FormatError {
    FormatError::ExtentChecksum { path: path.to_owned(), extent: extent.name(), offset: extent.offset }
}

/// The superblock of a whole file, and the folders that it names.
pub(crate) fn read_superblock(
    path: &Path,
    file: &File,
    actual: u64,
) -> Result<(Superblock, Vec<PathBuf>), FormatError> {
    let (superblock, folders) = parse_superblock_at(path, file, actual)?;
    if superblock.file_len != actual {
        return Err(FormatError::FileLength { path: path.to_owned(), actual, expected: superblock.file_len });
    }
    Ok((superblock, folders))
}

/// The superblock of a file of `actual` bytes, whatever length the superblock announces.
pub(crate) fn parse_superblock_at(
    path: &Path,
    file: &File,
    actual: u64,
) -> Result<(Superblock, Vec<PathBuf>), FormatError> {
    let path_buf = || path.to_owned();
    let refuse = |e| match e {
        SuperblockError::NotSluice => FormatError::NotSluice { path: path_buf() },
        SuperblockError::Unfinished => FormatError::Unfinished { path: path_buf() },
        SuperblockError::Version(found) => FormatError::Version { path: path_buf(), found },
        SuperblockError::PageSize(found) => FormatError::PageSize { path: path_buf(), found },
        SuperblockError::Checksum => FormatError::RegionChecksum { path: path_buf(), region: Region::Superblock },
        SuperblockError::Field(problem) => {
            FormatError::Invalid { path: path_buf(), region: Region::Superblock, problem: problem.into() }
        }
    };
    let mut head = [0; fields::superblock::LEN];
    if actual < head.len() as u64 {
        return Err(refuse(SuperblockError::NotSluice));
    }
    let io = |source| FormatError::Io { path: path_buf(), action: "read its superblock", source };
    file.read_exact_at(&mut head, 0).map_err(io)?;
    let page_size = Superblock::peek_page_size(&head).map_err(refuse)?;
    if actual < u64::from(page_size) {
        return Err(FormatError::FileLength { path: path_buf(), actual, expected: u64::from(page_size) });
    }
    let mut page = vec![0; page_size as usize];
    file.read_exact_at(&mut page, 0).map_err(io)?;
    Superblock::parse_page(&page).map_err(refuse)
}

/// Reads the stored bytes of one table.
pub(crate) fn read_table(
    path: &Path,
    file: &File,
    superblock: &Superblock,
    region: Region,
    table: TableRef,
) -> Result<Vec<u8>, FormatError> {
    let invalid = |problem| FormatError::Invalid { path: path.to_owned(), region, problem };
    check_table_place(superblock, region, table).map_err(invalid)?;
    let mut bytes = Vec::new();
    let read = resize(&mut bytes, table.stored_len).and_then(|()| file.read_exact_at(&mut bytes, table.offset));
    read.map_err(|source| FormatError::Io { path: path.to_owned(), action: "read a table of it", source })?;
    Ok(bytes)
}

/// Verifies the stored bytes of a table whose place has been checked; returns its logical bytes.
fn check_table(path: &Path, region: Region, table: TableRef, mut bytes: Vec<u8>) -> Result<Vec<u8>, FormatError> {
    if checksum(&bytes) != table.checksum {
        return Err(FormatError::RegionChecksum { path: path.to_owned(), region });
    }
    if bytes[table.logical_len as usize..].iter().any(|&b| b != 0) {
        let problem = "its padding is in use".into();
        return Err(FormatError::Invalid { path: path.to_owned(), region, problem });
    }
    bytes.truncate(table.logical_len as usize);
    Ok(bytes)
}

/// Bounds how much memory a table can make the reader allocate, before anything is read.
pub(crate) fn check_table_place(superblock: &Superblock, region: Region, table: TableRef) -> Result<(), String> {
    let page = u64::from(superblock.page_size);
    let max = match region {
        Region::ExtentTable => MAX_EXTENT_TABLE_BYTES,
        Region::TensorTable => MAX_TENSOR_TABLE_BYTES,
        _ => MAX_METADATA_BYTES,
    };
    if table.offset.checked_add(table.stored_len).is_none_or(|end| end > superblock.file_len) {
        return Err("it runs past the end of the file".into());
    }
    if !table.offset.is_multiple_of(page) {
        return Err("it does not begin on a page".into());
    }
    if round_up(table.logical_len.max(1), page) != Some(table.stored_len) || table.stored_len > max {
        return Err(format!(
            "it has an impossible stored length {} for logical length {}",
            table.stored_len, table.logical_len
        ));
    }
    Ok(())
}

fn parse_records<T>(
    bytes: &[u8],
    record_len: usize,
    parse: impl Fn(&[u8]) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    if !bytes.len().is_multiple_of(record_len) {
        return Err(format!("its length {} is not a multiple of {record_len}", bytes.len()));
    }
    let record = |(i, b)| parse(b).map_err(|e| format!("record {i}: {e}"));
    bytes.chunks_exact(record_len).enumerate().map(record).collect()
}
