//! Opening a model file: a ladder of checks, cheapest first, before anything is believed.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::checksum;
use crate::error::{FormatError, Region};
use crate::extent::{EXTENT_RECORD_LEN, ExtentKind, ExtentRecord, NO_LAYER};
use crate::metadata::{Metadata, SPEC_BLOB};
use crate::schema::TensorShape;
use crate::spec::ModelSpec;
use crate::superblock::{SUPERBLOCK_LEN, Superblock, SuperblockError, TableRef};
use crate::tensor::{ANY_INDEX, Layout, TENSOR_RECORD_LEN, TensorRecord};
use crate::weight::{PLANE_ALIGN, WeightType};

/// Longest table or metadata that is read into memory: bounds what a hostile file can make us allocate.
const MAX_TABLE_LEN: u64 = 1 << 30;

type ExtentKey = (ExtentKind, u32, u32);

/// An opened model file whose superblock, tables and metadata have passed every check.
#[derive(Debug)]
pub struct ModelFile {
    path: PathBuf,
    file: File,
    superblock: Superblock,
    extents: Vec<ExtentRecord>,
    by_key: HashMap<ExtentKey, usize>,
    tensors: Vec<TensorRecord>,
    tensors_by_extent: HashMap<ExtentKey, Vec<usize>>,
    metadata: Metadata,
    spec: ModelSpec,
}

impl ModelFile {
    /// Opens and checks `path`. Reads superblock, tables and metadata, not the extents.
    ///
    /// # Errors
    /// The first check that fails, as its own variant of [`FormatError`].
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let io = |action| move |source| FormatError::Io { path: path.to_owned(), action, source };
        let file = File::open(path).map_err(io("open it"))?;
        let actual = file.metadata().map_err(io("read its length"))?.len();
        let superblock = read_superblock(path, &file, actual)?;
        let read = |region, table| read_table(path, &file, &superblock, region, table);
        let extents = parse_records(
            path,
            Region::ExtentTable,
            &read(Region::ExtentTable, superblock.extents)?,
            EXTENT_RECORD_LEN,
            ExtentRecord::parse,
        )?;
        let tensors = parse_records(
            path,
            Region::TensorTable,
            &read(Region::TensorTable, superblock.tensors)?,
            TENSOR_RECORD_LEN,
            TensorRecord::parse,
        )?;
        let invalid = |region| move |problem| FormatError::Invalid { path: path.to_owned(), region, problem };
        let metadata =
            Metadata::parse(&read(Region::Metadata, superblock.metadata)?).map_err(invalid(Region::Metadata))?;
        let by_key = check_extents(&superblock, &extents).map_err(invalid(Region::ExtentTable))?;
        let spec = metadata
            .get(SPEC_BLOB)
            .ok_or_else(|| format!("it has no `{SPEC_BLOB}`"))
            .and_then(ModelSpec::from_json)
            .map_err(invalid(Region::Metadata))?;
        let tensors_by_extent = index_tensors(&tensors, &extents).map_err(invalid(Region::TensorTable))?;
        let model = ModelFile {
            path: path.to_owned(),
            file,
            superblock,
            extents,
            by_key,
            tensors,
            tensors_by_extent,
            metadata,
            spec,
        };
        model.check_against_spec().map_err(invalid(Region::TensorTable))?;
        Ok(model)
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The superblock.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// What the model computes.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The named blobs.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All extents in table order, which is file order.
    pub fn extents(&self) -> &[ExtentRecord] {
        &self.extents
    }

    /// All tensor records.
    pub fn tensors(&self) -> &[TensorRecord] {
        &self.tensors
    }

    /// The extent of that kind, layer (or [`NO_LAYER`]) and index.
    pub fn extent(&self, kind: ExtentKind, layer: u32, index: u32) -> Option<&ExtentRecord> {
        self.by_key.get(&(kind, layer, index)).map(|&i| &self.extents[i])
    }

    /// The tensors inside that extent, in the order of their offsets.
    pub fn tensors_in(&self, kind: ExtentKind, layer: u32, index: u32) -> impl Iterator<Item = &TensorRecord> {
        let exact = self.tensors_by_extent.get(&(kind, layer, index));
        let shared = self.tensors_by_extent.get(&(kind, layer, ANY_INDEX));
        exact.or(shared).into_iter().flatten().map(|&i| &self.tensors[i])
    }

    /// One tensor inside that extent.
    pub fn tensor(&self, kind: ExtentKind, layer: u32, index: u32, name: &str) -> Option<&TensorRecord> {
        self.tensors_in(kind, layer, index).find(|t| t.name == name)
    }

    /// Parts of the embedding or head: `(extent, tensor)` in row order.
    pub fn parts(&self, kind: ExtentKind) -> impl Iterator<Item = (&ExtentRecord, &TensorRecord)> {
        (0..).map_while(move |i| Some((self.extent(kind, NO_LAYER, i)?, self.tensors_in(kind, NO_LAYER, i).next()?)))
    }

    /// Reads an extent into `buffer` (resized to its stored length) through the page cache and verifies it.
    ///
    /// # Errors
    /// [`FormatError::Io`] and [`FormatError::ExtentChecksum`].
    pub fn read_extent(&self, extent: &ExtentRecord, buffer: &mut Vec<u8>) -> Result<(), FormatError> {
        buffer.resize(extent.stored_len as usize, 0);
        self.file.read_exact_at(buffer, extent.offset).map_err(|source| FormatError::Io {
            path: self.path.clone(),
            action: "read an extent of it",
            source,
        })?;
        verify_extent(&self.path, extent, buffer)
    }

    /// Every extent and tensor that the spec implies is there, with the right shape, and nothing else.
    fn check_against_spec(&self) -> Result<(), String> {
        let mut expected = 0;
        let hidden = self.spec.hidden_size;
        expected += self.check_parts(ExtentKind::Embedding, hidden)?;
        expected += self.check_parts(ExtentKind::Head, hidden)?;
        self.check_extent(ExtentKind::FinalNorm, NO_LAYER, 0, &self.spec.tensors(ExtentKind::FinalNorm, usize::MAX))?;
        expected += 1;
        for (layer, spec) in self.spec.layers.iter().enumerate() {
            for kind in [ExtentKind::Attention, ExtentKind::Router, ExtentKind::Dense, ExtentKind::Expert] {
                let shapes = self.spec.tensors(kind, layer);
                let count = match (kind, &spec.ffn.moe) {
                    _ if shapes.is_empty() => 0,
                    (ExtentKind::Expert, Some(moe)) => moe.experts,
                    _ => 1,
                };
                for index in 0..count {
                    self.check_extent(kind, layer as u32, index as u32, &shapes)?;
                }
                expected += count;
            }
        }
        if expected != self.extents.len() {
            return Err(format!("the file has {} extents, its spec implies {expected}", self.extents.len()));
        }
        Ok(())
    }

    fn check_extent(&self, kind: ExtentKind, layer: u32, index: u32, shapes: &[TensorShape]) -> Result<(), String> {
        let name = crate::extent_name(kind, layer, index);
        self.extent(kind, layer, index).ok_or_else(|| format!("{name} is missing"))?;
        if self.tensors_in(kind, layer, index).count() != shapes.len() {
            return Err(format!("{name} does not hold {} tensors", shapes.len()));
        }
        for shape in shapes {
            let t = self.tensor(kind, layer, index, shape.name);
            let t = t.ok_or_else(|| format!("{name} has no tensor `{}`", shape.name))?;
            let plain_f32 = t.layout != Layout::Plain || t.weight_type == WeightType::F32;
            if t.shape != shape.shape.map(|d| d as u64) || t.layout != shape.layout || !plain_f32 {
                return Err(format!(
                    "`{}` of {name} is {:?} {} {:?}, the spec implies {:?} {:?}",
                    t.name, t.layout, t.weight_type, t.shape, shape.layout, shape.shape
                ));
            }
        }
        Ok(())
    }

    /// The parts of embedding or head cover the vocabulary; returns their number.
    fn check_parts(&self, kind: ExtentKind, cols: usize) -> Result<usize, String> {
        let layout = if kind == ExtentKind::Embedding { Layout::Plain } else { Layout::Tiled };
        let mut rows = 0u64;
        let mut first_rows = None;
        let mut count = 0;
        for (_, t) in self.parts(kind) {
            let part_rows = t.shape[1];
            let uniform = *first_rows.get_or_insert(part_rows);
            // An earlier part shorter than the first would break "row / rows per part = part".
            if !rows.is_multiple_of(uniform.max(1)) || part_rows > uniform || part_rows == 0 {
                return Err(format!("{kind} part {count} has {part_rows} rows"));
            }
            if t.shape[0] != 1 || t.shape[2] != cols as u64 || t.layout != layout {
                return Err(format!("{kind} part {count} is {:?} {:?}", t.layout, t.shape));
            }
            rows += part_rows;
            count += 1;
        }
        if rows != self.spec.vocab_size as u64 {
            return Err(format!("the {kind} has {rows} rows, the vocabulary {}", self.spec.vocab_size));
        }
        Ok(count)
    }
}

/// Checks the bytes of one extent against its record.
///
/// # Errors
/// [`FormatError::ExtentChecksum`].
pub fn verify_extent(path: &Path, extent: &ExtentRecord, stored: &[u8]) -> Result<(), FormatError> {
    if stored.len() as u64 == extent.stored_len && checksum(stored) == extent.checksum {
        return Ok(());
    }
    Err(FormatError::ExtentChecksum { path: path.to_owned(), extent: extent.name(), offset: extent.offset })
}

fn read_superblock(path: &Path, file: &File, actual: u64) -> Result<Superblock, FormatError> {
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
    let mut head = [0; SUPERBLOCK_LEN];
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
    let superblock = Superblock::parse(&page).map_err(refuse)?;
    if superblock.file_len != actual {
        return Err(FormatError::FileLength { path: path_buf(), actual, expected: superblock.file_len });
    }
    if superblock.volume_count != 1 {
        return Err(FormatError::Volumes {
            path: path_buf(),
            volume: superblock.volume,
            count: superblock.volume_count,
        });
    }
    Ok(superblock)
}

/// Reads and verifies one table; returns its logical bytes.
fn read_table(
    path: &Path,
    file: &File,
    superblock: &Superblock,
    region: Region,
    table: TableRef,
) -> Result<Vec<u8>, FormatError> {
    let invalid = |problem: &str| FormatError::Invalid { path: path.to_owned(), region, problem: problem.into() };
    let page = u64::from(superblock.page_size);
    let end = table.offset.checked_add(table.stored_len);
    if end.is_none_or(|e| e > superblock.file_len) {
        return Err(invalid("it runs past the end of the file"));
    }
    if !table.offset.is_multiple_of(page) || !table.stored_len.is_multiple_of(page) {
        return Err(invalid("it is not aligned to the page"));
    }
    if table.logical_len > table.stored_len || table.stored_len > MAX_TABLE_LEN {
        return Err(invalid("its length is impossible"));
    }
    let mut bytes = vec![0; table.stored_len as usize];
    file.read_exact_at(&mut bytes, table.offset).map_err(|source| FormatError::Io {
        path: path.to_owned(),
        action: "read a table of it",
        source,
    })?;
    if checksum(&bytes) != table.checksum {
        return Err(FormatError::RegionChecksum { path: path.to_owned(), region });
    }
    bytes.truncate(table.logical_len as usize);
    Ok(bytes)
}

fn parse_records<T>(
    path: &Path,
    region: Region,
    bytes: &[u8],
    record_len: usize,
    parse: impl Fn(&[u8]) -> Result<T, String>,
) -> Result<Vec<T>, FormatError> {
    let invalid = |problem| FormatError::Invalid { path: path.to_owned(), region, problem };
    if !bytes.len().is_multiple_of(record_len) {
        return Err(invalid(format!("its length {} is not a multiple of {record_len}", bytes.len())));
    }
    let record = |(i, b)| parse(b).map_err(|e| invalid(format!("record {i}: {e}")));
    bytes.chunks_exact(record_len).enumerate().map(record).collect()
}

/// Superblock, tables and extents tile the file: no overlap, and no byte that no checksum covers.
fn check_extents(superblock: &Superblock, extents: &[ExtentRecord]) -> Result<HashMap<ExtentKey, usize>, String> {
    let page = u64::from(superblock.page_size);
    let mut regions = vec![(0, page)];
    for table in [superblock.extents, superblock.tensors, superblock.metadata] {
        regions.push((table.offset, table.stored_len));
    }
    let mut by_key = HashMap::with_capacity(extents.len());
    for (i, e) in extents.iter().enumerate() {
        if e.volume != 0 {
            return Err(format!("{} lies in volume {}", e.name(), e.volume));
        }
        if e.stored_len == 0 || !e.stored_len.is_multiple_of(page) || e.logical_len > e.stored_len {
            return Err(format!(
                "{} has stored length {} and logical length {}",
                e.name(),
                e.stored_len,
                e.logical_len
            ));
        }
        if by_key.insert((e.kind, e.layer, e.index), i).is_some() {
            return Err(format!("{} appears twice", e.name()));
        }
        regions.push((e.offset, e.stored_len));
    }
    regions.sort_unstable();
    let mut end = 0u64;
    for (offset, len) in regions {
        if offset != end {
            return Err(format!("the regions leave a gap or overlap at offset {offset}"));
        }
        end = end.checked_add(len).ok_or("a region runs past 2^64")?;
    }
    if end != superblock.file_len {
        return Err(format!("the regions end at {end}, the file at {}", superblock.file_len));
    }
    Ok(by_key)
}

/// Each tensor's length follows from its shape, is aligned, and lies inside every extent that holds it; none overlap.
fn index_tensors(tensors: &[TensorRecord], extents: &[ExtentRecord]) -> Result<HashMap<ExtentKey, Vec<usize>>, String> {
    let mut index: HashMap<ExtentKey, Vec<usize>> = HashMap::new();
    for (i, t) in tensors.iter().enumerate() {
        if t.expected_len() != Some(t.len) {
            return Err(format!("`{}` of layer {} has {} bytes, not what its shape implies", t.name, t.layer, t.len));
        }
        if !t.offset.is_multiple_of(PLANE_ALIGN as u64) {
            return Err(format!("`{}` of layer {} is not aligned", t.name, t.layer));
        }
        index.entry((t.kind, t.layer, t.index)).or_default().push(i);
    }
    let mut ends = HashMap::with_capacity(index.len());
    for (key, list) in &mut index {
        list.sort_by_key(|&i| tensors[i].offset);
        let mut end = 0u64;
        for &i in list.iter() {
            let t = &tensors[i];
            if t.offset < end {
                return Err(format!("`{}` of layer {} overlaps its neighbour", t.name, t.layer));
            }
            end = t.offset.checked_add(t.len).ok_or("a tensor runs past 2^64")?;
        }
        ends.insert(*key, end);
    }
    for e in extents {
        let exact = ends.get(&(e.kind, e.layer, e.index));
        let end = exact.or_else(|| ends.get(&(e.kind, e.layer, ANY_INDEX)));
        if end.is_none_or(|&end| end > e.logical_len) {
            return Err(format!("the tensors of {} do not lie inside it", e.name()));
        }
    }
    Ok(index)
}
