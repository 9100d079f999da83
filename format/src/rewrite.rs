//! Replacing the metadata of a finished file. The weights stay where they are: a file of hundreds of gigabytes gets another
//! tokenizer in the time that it takes to write one.
//!
//! The new metadata takes the place of the old, so a power cut must neither lose the old nor leave half of the new. A log at
//! the end of the file has everything that will be written, and a footer that says where it goes. Only when both are on the
//! drive does anything change that the file needs; from then on [`recover`] can finish the work, as often as necessary.
//! `docs/FORMAT.md` describes log and footer.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::bytes::{array, get_u32, get_u64, put, round_up};
use crate::catalog::check_tiling;
use crate::checksum;
use crate::error::{FormatError, Region};
use crate::fields::{reserved_in_use, rewrite_footer as at};
use crate::limits::MAX_METADATA_BYTES;
use crate::metadata::{Metadata, SPEC_BLOB};
use crate::reader::{ModelFile, check_table_place, parse_superblock_at};
use crate::superblock::{ModelId, PAGE_SIZES, Superblock, TableRef};
use crate::tensor::TensorRecord;
use crate::volumes::{Volume, VolumeName, model_path};

/// First bytes of the footer of a log.
pub const REWRITE_MAGIC: [u8; 8] = *b"SLUICERW";
/// Version of the log that this crate reads and writes.
pub const REWRITE_VERSION: u32 = 1;

/// What [`recover`] has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// The log was complete: the file has its new metadata now.
    Finished,
    /// The log was incomplete: the file still has its old metadata.
    Undone,
}

/// One operation on a file. Operations between two `Sync` may reach the drive in any order, and in part.
#[derive(Debug)]
enum Step {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Sync,
}

impl Step {
    fn apply(&self, file: &File) -> io::Result<()> {
        match self {
            Step::Write(offset, bytes) => file.write_all_at(bytes, *offset),
            Step::SetLen(len) => file.set_len(*len),
            Step::Sync => match file.sync_all() {
                // Some network and user-space filesystems cannot sync; nothing better can be done there.
                Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
                outcome => outcome,
            },
        }
    }
}

/// A replacement of metadata whose log is complete.
#[derive(Debug)]
struct Pending {
    superblock: Superblock,
    /// The folders that the superblock names.
    folders: Vec<PathBuf>,
    /// Its page.
    page: Vec<u8>,
    metadata: Vec<u8>,
}

impl Pending {
    /// Puts the log behind everything that the file has and everything that it will have. The bytes in between are written too,
    /// so that a full drive is noticed before anything changes.
    fn prepare(&self, old_len: u64) -> Vec<Step> {
        let log_offset = old_len.max(self.superblock.file_len);
        let between = vec![0; (log_offset - old_len) as usize];
        vec![Step::Write(old_len, between), Step::Write(log_offset, self.log(log_offset)), Step::Sync]
    }

    /// What remains to be done once the log is on the drive. Doing it twice does no harm.
    fn redo(&self) -> Vec<Step> {
        let sb = &self.superblock;
        vec![
            Step::Write(sb.metadata.offset, self.metadata.clone()),
            Step::Sync,
            Step::Write(0, self.page.clone()),
            Step::Sync,
            Step::SetLen(sb.file_len),
            Step::Sync,
        ]
    }

    /// Whether the file will be whole once the work is done. Only an attacker puts a log behind a file to which it does not
    /// belong, but replaying such a log would destroy the file.
    fn check(&self, path: &Path, file: File) -> Result<(), FormatError> {
        let volumes = Volume::new(path, file, (self.superblock, self.folders.clone())).with_others()?;
        ModelFile::check(volumes, Some(self.metadata.clone())).map(drop)
    }

    /// Superblock, metadata, and a page whose last bytes are the footer.
    fn log(&self, log_offset: u64) -> Vec<u8> {
        let sb = &self.superblock;
        let mut log = self.page.clone();
        log.extend(&self.metadata);
        let mut footer = [0; at::LEN];
        put(&mut footer, at::MAGIC, &REWRITE_MAGIC);
        put(&mut footer, at::VERSION, &REWRITE_VERSION.to_le_bytes());
        put(&mut footer, at::PAGE_SIZE, &sb.page_size.to_le_bytes());
        put(&mut footer, at::LOG_OFFSET, &log_offset.to_le_bytes());
        put(&mut footer, at::METADATA_LEN, &sb.metadata.stored_len.to_le_bytes());
        put(&mut footer, at::LOG_CHECKSUM, &checksum(&log).to_le_bytes());
        let sum = checksum(&footer);
        put(&mut footer, at::CHECKSUM, &sum.to_le_bytes());
        log.resize(log.len() + sb.page_size as usize - at::LEN, 0);
        log.extend(footer);
        log
    }

    /// The complete log at the end of a file of `len` bytes, if there is one.
    fn find(file: &File, len: u64) -> io::Result<Option<Pending>> {
        let mut footer = [0; at::LEN];
        let Some(footer_offset) = len.checked_sub(at::LEN as u64) else { return Ok(None) };
        file.read_exact_at(&mut footer, footer_offset)?;
        let sum = get_u64(&footer, at::CHECKSUM);
        let page_size = get_u32(&footer, at::PAGE_SIZE);
        let (log_offset, metadata_len) = (get_u64(&footer, at::LOG_OFFSET), get_u64(&footer, at::METADATA_LEN));
        let log_checksum = get_u64(&footer, at::LOG_CHECKSUM);
        let foreign = array::<8>(&footer, at::MAGIC) != REWRITE_MAGIC
            || get_u32(&footer, at::VERSION) != REWRITE_VERSION
            || reserved_in_use(&at::FIELDS, &footer);
        put(&mut footer, at::CHECKSUM, &[0; 8]);
        let page = u64::from(page_size);
        let end = metadata_len.checked_add(2 * page).and_then(|n| n.checked_add(log_offset));
        if foreign
            || checksum(&footer) != sum
            || !PAGE_SIZES.contains(&page_size)
            || metadata_len > MAX_METADATA_BYTES
            || end != Some(len)
        {
            return Ok(None);
        }
        let mut log = vec![0; (page + metadata_len) as usize];
        file.read_exact_at(&mut log, log_offset)?;
        if checksum(&log) != log_checksum {
            return Ok(None);
        }
        let metadata = log.split_off(page_size as usize);
        let Ok((superblock, folders)) = Superblock::parse_page(&log) else { return Ok(None) };
        let table = superblock.metadata;
        // The log must lie behind all that is written from it.
        let fits = superblock.page_size == page_size
            && table.stored_len == metadata_len
            && table.offset.checked_add(metadata_len) == Some(superblock.file_len)
            && superblock.file_len <= log_offset;
        Ok(fits.then_some(Pending { superblock, folders, page: log, metadata }))
    }
}

/// Whether the file ends with a complete log, which means that a replacement of its metadata was interrupted.
pub(crate) fn is_interrupted(file: &File) -> bool {
    let found = file.metadata().and_then(|m| Pending::find(file, m.len()));
    found.is_ok_and(|pending| pending.is_some())
}

/// Replaces the metadata of the file from which `model` was opened (of several volumes, the first), and returns the model opened anew. The
/// weights are neither moved nor read. If the program is killed at any moment, the file is either the old one or the new one, or it is
/// refused with [`FormatError::Interrupted`] until [`recover`] is called. The spec must stay the same, because the weights have no meaning
/// without it.
///
/// # Errors
/// [`FormatError::Layout`] for metadata that a reader would refuse, and when the file is not the one that was opened;
/// [`FormatError::Locked`]; [`FormatError::Io`].
pub fn rewrite_metadata(model: &ModelFile, metadata: &Metadata) -> Result<ModelFile, FormatError> {
    let path = model.path();
    if metadata.get(SPEC_BLOB) != model.metadata().get(SPEC_BLOB) {
        return Err(FormatError::Layout("the specification of a finished model cannot be replaced".into()));
    }
    let pending = plan(model, metadata)?;
    if pending.superblock == *model.superblock() {
        return ModelFile::open(path);
    }
    let file = open_locked(path)?;
    // The process that held the lock before may have replaced the file meanwhile.
    if ModelFile::open(path)?.superblock() != model.superblock() {
        return Err(FormatError::Layout(format!("{} has changed meanwhile: try again", path.display())));
    }
    let io = |action| move |source| FormatError::Io { path: path.to_owned(), action, source };
    let old_len = model.superblock().file_len;
    pending.prepare(old_len).iter().try_for_each(|step| step.apply(&file)).map_err(|source| {
        // Nothing that the file needs has changed yet. If even this fails, `recover` does the same.
        let _ = file.set_len(old_len);
        io("write the new metadata behind its end")(source)
    })?;
    pending.redo().iter().try_for_each(|step| step.apply(&file)).map_err(io("replace its metadata"))?;
    ModelFile::open(path)
}

/// Finishes or undoes a [`rewrite_metadata`] that was interrupted; `None` for a file that needs neither. `path` may be that of any
/// volume.
///
/// # Errors
/// The error of [`ModelFile::open`], if the file has another fault than an interrupted replacement, or would have one after
/// the recovery: the file then stays as it is. [`FormatError::Locked`]; [`FormatError::Io`].
pub fn recover(path: &Path) -> Result<Option<Recovery>, FormatError> {
    let path = &model_path(path)?;
    let Err(refused) = ModelFile::open(path) else { return Ok(None) };
    if matches!(refused, FormatError::Io { .. }) {
        return Err(refused);
    }
    let first = VolumeName::parse(path).map(|name| name.path_of(0)).filter(|first| first.exists());
    let path = first.as_deref().unwrap_or(path);
    let io = |action| move |source| FormatError::Io { path: path.to_owned(), action, source };
    let file = open_locked(path)?;
    let len = file.metadata().map_err(io("read its length"))?.len();
    let (steps, recovery) = match Pending::find(&file, len).map_err(io("read its end"))? {
        Some(pending) => {
            pending.check(path, file.try_clone().map_err(io("open it"))?)?;
            (pending.redo(), Recovery::Finished)
        }
        None => match undo(path, &file, len) {
            Some(steps) => (steps, Recovery::Undone),
            None => return Err(refused),
        },
    };
    steps.iter().try_for_each(|step| step.apply(&file)).map_err(io("replace its metadata"))?;
    ModelFile::open(path).map(|_| Some(recovery))
}

/// Cuts off an incomplete log: bytes behind the end of a file that is otherwise whole, if they are no longer than a log
/// can be.
fn undo(path: &Path, file: &File, len: u64) -> Option<Vec<Step>> {
    let (superblock, folders) = parse_superblock_at(path, file, len).ok()?;
    let excess = len.checked_sub(superblock.file_len)?;
    let most = 2 * MAX_METADATA_BYTES + 2 * u64::from(superblock.page_size);
    if excess == 0 || excess > most {
        return None;
    }
    let volume = Volume::new(path, file.try_clone().ok()?, (superblock, folders));
    ModelFile::check(volume.with_others().ok()?, None).ok()?;
    Some(vec![Step::SetLen(superblock.file_len), Step::Sync])
}

/// Opens a file for changing it, and locks it until it is closed.
fn open_locked(path: &Path) -> Result<File, FormatError> {
    let io = |action| move |source| FormatError::Io { path: path.to_owned(), action, source };
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(io("open it for writing"))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(FormatError::Locked { path: path.to_owned() }),
        // A filesystem without locks is no reason to stop: they only keep two processes of this program apart.
        _ => Ok(file),
    }
}

/// The new superblock and the new metadata's stored bytes, checked as the reader will.
fn plan(model: &ModelFile, metadata: &Metadata) -> Result<Pending, FormatError> {
    let layout = |problem: String| FormatError::Layout(format!("the metadata is invalid: {problem}"));
    let old = model.superblock();
    let (mut bytes, blobs) = metadata.encode(old.version).map_err(layout)?;
    Metadata::parse(&blobs).map_err(layout)?;
    let model_id = ModelId::of(&model.extent_table().to_bytes(old.version), &tensor_table(model), &blobs);
    let logical_len = bytes.len() as u64;
    let too_long = || layout("it is too long".into());
    let stored_len = round_up(logical_len, u64::from(old.page_size)).ok_or_else(too_long)?;
    bytes.resize(usize::try_from(stored_len).map_err(|_| too_long())?, 0);
    let offset = old.metadata.offset;
    let table = TableRef { offset, stored_len, logical_len, checksum: checksum(&bytes) };
    let superblock = Superblock { model_id, file_len: offset + stored_len, metadata: table, ..*old };
    check_table_place(&superblock, Region::Metadata, table).map_err(layout)?;
    let others = model.volumes().iter().skip(1).map(Volume::superblock);
    let superblocks: Vec<_> = std::iter::once(&superblock).chain(others).collect();
    check_tiling(&superblocks, model.extent_table()).map_err(layout)?;
    let folders = model.volumes()[0].folders().to_vec();
    let page = superblock.page_with(&folders).map_err(layout)?;
    Ok(Pending { superblock, folders, page, metadata: bytes })
}

/// The logical bytes of the tensor table.
fn tensor_table(model: &ModelFile) -> Vec<u8> {
    model.tensors().iter().flat_map(TensorRecord::to_bytes).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;
    use crate::metadata::TOKENIZER_BLOB;

    const SMALL: &[u8] = include_bytes!("../tests/data/v1-small.sluice");

    fn small() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.sluice");
        fs::write(&path, SMALL).unwrap();
        (dir, path)
    }

    /// The metadata of a model with a tokenizer of `len` bytes.
    fn with_tokenizer(model: &ModelFile, len: usize) -> Metadata {
        let mut metadata = model.metadata().clone();
        metadata.insert(TOKENIZER_BLOB, vec![b'x'; len]);
        metadata
    }

    #[test]
    fn metadata_of_any_length_replaces_the_old_one() {
        for len in [0, 1, 5_000, 100_000] {
            let (_dir, path) = small();
            let old = ModelFile::open(&path).unwrap();
            let metadata = with_tokenizer(&old, len);
            let new = rewrite_metadata(&old, &metadata).unwrap();
            assert_eq!(*new.metadata(), metadata);
            assert_eq!((new.extents(), new.tensors()), (old.extents(), old.tensors()));
            assert_ne!(new.superblock().model_id, old.superblock().model_id);
            assert!(new.verify_all(&mut |_| {}).is_empty());
            let bytes = fs::read(&path).unwrap();
            let end = old.superblock().metadata.offset as usize;
            assert!(bytes[4096..end] == SMALL[4096..end], "weights and tables stay");
            assert_eq!(recover(&path).unwrap(), None);

            // And back: this gives the same bytes as before, whatever was in between.
            rewrite_metadata(&new, old.metadata()).unwrap();
            assert!(fs::read(&path).unwrap() == SMALL);
        }
    }

    #[test]
    fn what_a_reader_would_refuse_is_not_written() {
        let (_dir, path) = small();
        let model = ModelFile::open(&path).unwrap();
        let mut other_spec = model.metadata().clone();
        other_spec.insert(SPEC_BLOB, b"{}".to_vec());
        assert!(matches!(rewrite_metadata(&model, &other_spec), Err(FormatError::Layout(_))));
        let too_long = with_tokenizer(&model, MAX_METADATA_BYTES as usize);
        assert!(matches!(rewrite_metadata(&model, &too_long), Err(FormatError::Layout(_))));
        assert!(fs::read(&path).unwrap() == SMALL);
    }

    #[test]
    fn two_at_once_are_refused() {
        let (_dir, path) = small();
        let model = ModelFile::open(&path).unwrap();
        let metadata = with_tokenizer(&model, 9);
        let held = open_locked(&path).unwrap();
        assert!(matches!(rewrite_metadata(&model, &metadata), Err(FormatError::Locked { .. })));
        drop(held);
        rewrite_metadata(&model, &metadata).unwrap();
        // `model` is no longer what the file is.
        let stale = rewrite_metadata(&model, &with_tokenizer(&model, 10));
        assert!(matches!(stale, Err(FormatError::Layout(_))), "{stale:?}");
    }

    #[test]
    fn bytes_behind_the_end_that_are_no_log_are_left_alone() {
        let (_dir, path) = small();
        let mut damaged = SMALL.to_vec();
        damaged[100] ^= 1;
        damaged.extend([7; 5000]);
        fs::write(&path, &damaged).unwrap();
        assert!(recover(&path).is_err());
        assert!(fs::read(&path).unwrap() == damaged);
    }

    #[test]
    fn a_log_that_belongs_to_another_file_changes_nothing() {
        let (_dir, path) = small();
        let model = ModelFile::open(&path).unwrap();
        let pending = plan(&model, &with_tokenizer(&model, 9_000)).unwrap();
        let mut steps = pending.prepare(SMALL.len() as u64);
        steps.truncate(2);
        let mut logged = SMALL.to_vec();
        steps.iter().for_each(|step| tear(&mut logged, step, &mut || true));
        let first_table = model.superblock().extents.offset as usize;
        for damage in [first_table + 40, model.superblock().tensors.offset as usize + 8] {
            let mut bytes = logged.clone();
            bytes[damage] ^= 1;
            fs::write(&path, &bytes).unwrap();
            assert!(matches!(ModelFile::open(&path), Err(FormatError::Interrupted { .. })));
            let refused = recover(&path).unwrap_err();
            assert!(matches!(refused, FormatError::RegionChecksum { .. }), "{refused}");
            assert!(fs::read(&path).unwrap() == bytes, "byte {damage}");
        }
        fs::write(&path, &logged).unwrap();
        assert_eq!(recover(&path).unwrap(), Some(Recovery::Finished));
    }

    /// Applies a step to the bytes of a file as if the power were cut: each sector is the old or the new one.
    fn tear(bytes: &mut Vec<u8>, step: &Step, reached: &mut dyn FnMut() -> bool) {
        const SECTOR: usize = 512;
        match step {
            Step::Sync => {}
            Step::SetLen(len) => {
                if reached() {
                    bytes.resize(*len as usize, 0);
                }
            }
            Step::Write(offset, new) => {
                for (i, sector) in new.chunks(SECTOR).enumerate() {
                    let start = *offset as usize + i * SECTOR;
                    if reached() {
                        bytes.resize(bytes.len().max(start + sector.len()), 0);
                        bytes[start..start + sector.len()].copy_from_slice(sector);
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn a_power_cut_at_any_moment_leaves_the_old_file_or_the_new_one(
            len in prop::sample::select(vec![0usize, 100, 4_000, 9_000, 60_000]),
            cut in 0usize..10,
            odds in 0u32..=4,
            seed in any::<u64>(),
            again in 0usize..7,
        ) {
            let (_dir, path) = small();
            let model = ModelFile::open(&path).unwrap();
            let pending = plan(&model, &with_tokenizer(&model, len)).unwrap();
            let mut steps = pending.prepare(SMALL.len() as u64);
            steps.extend(pending.redo());
            let mut whole = SMALL.to_vec();
            steps.iter().for_each(|step| tear(&mut whole, step, &mut || true));

            let mut random = seed | 1;
            let mut coin = move || {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                (random >> 32) as u32 % 4 < odds
            };
            let mut bytes = SMALL.to_vec();
            steps.iter().take(cut).for_each(|step| tear(&mut bytes, step, &mut || true));
            if let Some(step) = steps.get(cut) {
                tear(&mut bytes, step, &mut coin);
            }
            fs::write(&path, &bytes).unwrap();
            let is_one_of = |bytes: &[u8]| bytes == SMALL || bytes == whole;
            match ModelFile::open(&path) {
                Ok(_) => prop_assert!(is_one_of(&bytes)),
                Err(e) => prop_assert!(
                    matches!(e, FormatError::Interrupted { .. } | FormatError::FileLength { .. }), "{}", e
                ),
            }
            // A second cut, in the middle of the recovery.
            if let Some(pending) = Pending::find(&File::open(&path).unwrap(), bytes.len() as u64).unwrap() {
                let redo = pending.redo();
                redo.iter().take(again).for_each(|step| tear(&mut bytes, step, &mut || true));
                if let Some(step) = redo.get(again) {
                    tear(&mut bytes, step, &mut coin);
                }
                fs::write(&path, &bytes).unwrap();
            }
            recover(&path).unwrap();
            prop_assert!(is_one_of(&fs::read(&path).unwrap()));
        }
    }
}
