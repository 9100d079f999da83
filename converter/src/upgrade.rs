//! Rewriting a model file as the newest version of the format: compressed or not, as one file, in volumes or striped over drives. The
//! weights stay what they are to the bit; nothing is converted again.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;
use sluice_format::{
    Codec, ExtentRecord, FORMAT_VERSION, FileLayout, FileWriter, ModelFile, PlannedExtent, Stripe, Syncer, Written,
    planes,
};

use crate::Progress;
use crate::error::ConvertError;
use crate::journal::{Content, Identity, Journal};
use crate::own::{self, ANY, Own, clear_all, clear_idle, journal_path, make_room};
use crate::partial::{
    check_space, claim_all, clear_remains, make_way, namesakes, notes_of_others, publish, refuse_existing,
    refuse_targets, say_finished, sync_note,
};
use crate::settle::{model_in, sync_folders};
use crate::striping::{Destination, Striping};

/// What the caller may choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UpgradeOptions {
    /// Whether extents are compressed where that saves enough, or none is; `None`: as they are.
    pub compress: Option<bool>,
    /// Most bytes of one file; `None`: one file.
    pub split_size: Option<u64>,
    /// Whether an existing destination is replaced, once the new files are complete.
    pub overwrite: bool,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UpgradeSummary {
    /// Whether anything was: nothing is where the file is what was asked for already.
    pub written: bool,
    /// The files.
    pub files: Vec<PathBuf>,
    /// Identity of the model.
    pub model_id: String,
    /// Of what saved states of it depend on, which is the same as before.
    pub state_id: String,
    /// Version of the format before.
    pub from_version: u32,
    /// Bytes of all files before.
    pub bytes_before: u64,
    /// Bytes of all files now.
    pub file_bytes: u64,
    /// Extents that are compressed now.
    pub compressed_extents: usize,
}

/// Rewrites the model in `src` as `dst`, or in its own place. What is written has other names until it is whole, so that whatever
/// happens `src` stays what it was until the new files take its place.
///
/// # Errors
/// [`ConvertError::Options`] for a model in several volumes without another destination; [`ConvertError::DamagedVolumes`] for volumes that are
/// there already in the place of a single file, and are not what they should be; [`ConvertError::Exists`],
/// [`ConvertError::NotReplaced`], [`ConvertError::Locked`], [`ConvertError::NoSpace`], [`ConvertError::Io`]; [`ConvertError::Format`],
/// also for an extent that is damaged.
pub fn upgrade(
    src: &Path,
    dst: Option<&Path>,
    options: &UpgradeOptions,
    progress: &dyn Progress,
) -> Result<UpgradeSummary, ConvertError> {
    let model = ModelFile::open(src)?;
    let in_place = dst.is_none_or(|dst| is_same(dst, src));
    let layout = layout(&model, options, None)?;
    if in_place && is_already(&model, &layout, options) {
        return Ok(unchanged(&model));
    }
    if in_place && model.volumes().len() > 1 {
        return Err(ConvertError::Options(format!(
            "{} is one of several volumes, which cannot all be replaced at once: name another file to write",
            src.display()
        )));
    }
    let destination = Destination::new(if in_place { src } else { dst.unwrap_or(src) }, None);
    if !in_place {
        destination.check_folder()?;
        // Compressed, it may have fewer volumes than before.
        destination.refuse_name(if options.compress == Some(true) { 1 } else { layout.ends().len() })?;
    }
    let summary = match made(&model, destination, &layout, options) {
        Some(made) => {
            if in_place {
                refuse_damaged(src, &made, progress)?;
            }
            settled(&model, &made, destination, layout.ends().len())?
        }
        None => {
            let overwrite = options.overwrite || (in_place && layout.ends().len() == 1);
            let options = UpgradeOptions { overwrite, ..*options };
            rewrite(&model, destination, layout, &options, progress)?
        }
    };
    if in_place && !summary.files.iter().any(|file| file == src) {
        fs::remove_file(src).map_err(ConvertError::io(src, "remove it, since its volumes are complete"))?;
    }
    Ok(summary)
}

/// Stripes the model in `src` over folders. Its name there is `name`, or that of `src`. As with [`upgrade`], `src` stays what it was, and
/// stays beside what is written.
///
/// # Errors
/// [`ConvertError::Options`] where the new volumes would take the places of the model's own; otherwise as [`upgrade`].
pub fn restripe(
    src: &Path,
    name: Option<&Path>,
    striping: &Striping,
    overwrite: bool,
    progress: &dyn Progress,
) -> Result<UpgradeSummary, ConvertError> {
    let model = ModelFile::open(src)?;
    let options = UpgradeOptions { overwrite, ..UpgradeOptions::default() };
    let layout = layout(&model, &options, Some(striping))?;
    let path = striping.destination(name.unwrap_or(model.path()));
    let destination = Destination::new(&path, Some(striping));
    let targets = destination.targets(layout.ends().len());
    if targets.iter().all(|target| is_volume_of(&model, target)) && has_stripes(&model, &layout) {
        return Ok(unchanged(&model));
    }
    if let Some(made) = made(&model, destination, &layout, &options) {
        return settled(&model, &made, destination, targets.len());
    }
    rewrite(&model, destination, layout, &options, progress)
}

/// The model at the destination, if it is what would be written there: the same command has written it before, and was perhaps killed
/// when it was done. `None` where it is to be overwritten.
fn made(
    model: &ModelFile,
    destination: Destination<'_>,
    layout: &FileLayout,
    options: &UpgradeOptions,
) -> Option<ModelFile> {
    if options.overwrite {
        return None;
    }
    let content = |e: &ExtentRecord| (e.kind, e.layer, e.index, e.logical_len, e.logical_checksum);
    let stored = |e: &ExtentRecord| options.compress.is_none().then_some((e.codec, e.stored_len));
    let is_same = |(a, b): (&ExtentRecord, &ExtentRecord)| content(a) == content(b) && stored(a) == stored(b);
    let is_as_asked = |found: &ModelFile| match destination.striping {
        Some(striping) => {
            let folders = striping.recorded();
            folders.is_ok_and(|folders| found.volumes()[0].folders() == folders) && has_stripes(found, layout)
        }
        None => is_already(found, layout, options),
    };
    let is_it = |found: &ModelFile| {
        found.superblock().version == FORMAT_VERSION
            && found.extents().len() == model.extents().len()
            && found.extents().iter().zip(model.extents()).all(is_same)
            && (found.tensors(), found.metadata()) == (model.tensors(), model.metadata())
            && is_as_asked(found)
    };
    let most = layout.ends().len();
    let least = if options.compress == Some(true) { 1 } else { most };
    (least..=most).filter_map(|count| model_in(destination, count)).find(is_it)
}

/// Refuses to let volumes that were found take the place of the file `src`, which is then removed, unless every byte of them is right and on
/// the drive: their tables only say what they should be.
fn refuse_damaged(src: &Path, made: &ModelFile, progress: &dyn Progress) -> Result<(), ConvertError> {
    progress.started(made.extent_bytes(), 0);
    let mut before = 0;
    let damaged = made.verify_all(&mut |done| {
        progress.advanced(done - before);
        before = done;
    });
    if let Some(source) = damaged.into_iter().next() {
        return Err(ConvertError::DamagedVolumes { path: src.to_owned(), source });
    }
    let syncer = Syncer::default();
    made.volumes().iter().map(|volume| volume.path()).try_for_each(|path| {
        let synced = File::open(path).and_then(|file| syncer.all(&file));
        synced.map_err(ConvertError::io(path, "sync it"))
    })
}

/// Removes what lies beside files that are complete, if they were written from `model` by a program that was killed then.
fn settled(
    model: &ModelFile,
    made: &ModelFile,
    destination: Destination<'_>,
    most: usize,
) -> Result<UpgradeSummary, ConvertError> {
    clear_remains(destination, most);
    sync_folders(destination)?;
    Ok(UpgradeSummary { from_version: model.superblock().version, bytes_before: model.file_bytes(), ..unchanged(made) })
}

/// Whether every extent has the stripes that a layout gives it.
fn has_stripes(model: &ModelFile, layout: &FileLayout) -> bool {
    let parts = |stripes: &[Stripe]| stripes.iter().map(|s| (s.volume, s.len)).collect::<Vec<_>>();
    let same =
        |(number, e): (usize, &ExtentRecord)| parts(model.stripes(e)) == parts(&layout.stripes(number, e.stored_len));
    model.extents().iter().enumerate().all(same)
}

/// Whether a file is one of the volumes of a model.
fn is_volume_of(model: &ModelFile, file: &Path) -> bool {
    model.volumes().iter().any(|volume| is_same(volume.path(), file))
}

/// Writes the model again to a destination.
fn rewrite(
    model: &ModelFile,
    destination: Destination<'_>,
    layout: FileLayout,
    options: &UpgradeOptions,
    progress: &dyn Progress,
) -> Result<UpgradeSummary, ConvertError> {
    let (dst, overwrite) = (destination.path, options.overwrite);
    let targets = destination.targets(layout.ends().len());
    if let Some(target) = targets.iter().find(|target| model.volumes().len() > 1 && is_volume_of(model, target)) {
        return Err(ConvertError::Options(format!(
            "{} is a volume of this model, which must stay whole until the new one is: name another file or folder, or join it to one \
             file first (`sluice restripe --into`)",
            target.display()
        )));
    }
    destination.refuse_namesake(targets.len(), Some(model.path()))?;
    refuse_targets(destination, targets.len(), overwrite, None)
        .inspect_err(|_| clear_remains(destination, targets.len()))?;
    let locks = claim(destination, targets.len(), progress)?;
    let partials: Vec<PathBuf> = locks.iter().map(|(path, _)| path.clone()).collect();
    let written = write(model, destination, layout, options, &locks, progress);
    // Nothing in them is worth keeping: they can be made again at any time.
    let written = written.inspect_err(|_| {
        partials.iter().for_each(|path| drop(fs::remove_file(path)));
        let _ = own::clear(&journal_path(dst), Own::Journal);
    })?;
    let files = destination.targets(written.lens.len());
    files.iter().try_for_each(|target| refuse_existing(target, overwrite, None))?;
    destination.refuse_foreign(&files, &[])?;
    if overwrite {
        make_way(&files)?.iter().for_each(|orphan| progress.note(orphan));
    }
    say_finished(&journal_path(dst), &locks[..files.len()], &written.syncer);
    for ((path, lock), target) in partials.iter().zip(&locks).zip(&files).rev() {
        publish(&lock.1, path, target)?;
    }
    for path in &partials[files.len()..] {
        fs::remove_file(path).map_err(ConvertError::io(path, "remove it"))?;
    }
    for folder in destination.folders() {
        written.syncer.folder(folder).map_err(ConvertError::io(folder, "sync the folder"))?;
    }
    clear_all(dst, destination.striping.is_some())?;
    namesakes(&files).iter().for_each(|remark| progress.note(remark));
    Ok(UpgradeSummary {
        written: true,
        files,
        model_id: written.model_id,
        state_id: model.state_id().to_string(),
        from_version: model.superblock().version,
        bytes_before: model.file_bytes(),
        file_bytes: written.lens.iter().sum(),
        compressed_extents: written.compressed,
    })
}

/// Whether two paths name one file.
pub(crate) fn is_same(a: &Path, b: &Path) -> bool {
    a == b || fs::canonicalize(a).is_ok_and(|a| fs::canonicalize(b).is_ok_and(|b| a == b))
}

/// The places of the model's extents before compression.
fn layout(
    model: &ModelFile,
    options: &UpgradeOptions,
    striping: Option<&Striping>,
) -> Result<FileLayout, ConvertError> {
    let planned: Vec<PlannedExtent> = model
        .extents()
        .iter()
        .map(|e| PlannedExtent { kind: e.kind, layer: e.layer, index: e.index, logical_len: e.logical_len })
        .collect();
    let sb = model.superblock();
    let layout = FileLayout::new(sb.page_size, &planned)?;
    if let Some(striping) = striping {
        return Ok(layout.stripe(striping.shares().clone())?);
    }
    let Some(most) = options.split_size else { return Ok(layout) };
    Ok(layout.split(most, metadata_bytes(model) + layout_tables(model))?)
}

/// As much as the metadata can take if nothing of it can be compressed.
fn metadata_bytes(model: &ModelFile) -> u64 {
    let bytes: u64 = model.metadata().iter().map(|(name, blob)| (name.len() + blob.len() + 16) as u64).sum();
    let page = u64::from(model.superblock().page_size);
    (bytes + bytes / 256).next_multiple_of(page) + page
}

fn layout_tables(model: &ModelFile) -> u64 {
    let sb = model.superblock();
    sb.extents.stored_len + sb.tensors.stored_len
}

/// Whether the model is what was asked for.
fn is_already(model: &ModelFile, layout: &FileLayout, options: &UpgradeOptions) -> bool {
    let compressed = model.compressed_extents() > 0;
    let files = model.volumes().len();
    let split = match options.split_size {
        None => files == 1,
        // A compressed model can have fewer volumes than the same one uncompressed.
        Some(most) => {
            let fits = model.volumes().iter().all(|volume| volume.superblock().file_len <= most);
            fits && (files == layout.ends().len() || compressed)
        }
    };
    let wanted = match options.compress {
        None => true,
        Some(false) => !compressed,
        Some(true) => compressed || !model.extents().iter().any(|e| planes::may_gain(model.tensors_of(e))),
    };
    model.superblock().version == FORMAT_VERSION && !model.is_striped() && split && wanted
}

fn unchanged(model: &ModelFile) -> UpgradeSummary {
    UpgradeSummary {
        written: false,
        files: model.volumes().iter().map(|volume| volume.path().to_owned()).collect(),
        model_id: model.superblock().model_id.to_string(),
        state_id: model.state_id().to_string(),
        from_version: model.superblock().version,
        bytes_before: model.file_bytes(),
        file_bytes: model.file_bytes(),
        compressed_extents: model.compressed_extents(),
    }
}

type Locks = Vec<(PathBuf, File)>;

/// What the journal of volumes belongs to that are being written again: it says only where they are, so that the next program finds them if
/// this one is killed.
const IDENTITY: Identity = Identity {
    plan_hash: u128::from_le_bytes(*b"sluice restripe\0"),
    tensors_per_extent: 0,
    extents: 0,
    parts: 0,
    files: 0,
};

/// Opens and locks the partial files, and empties them.
fn claim(destination: Destination<'_>, count: usize, progress: &dyn Progress) -> Result<Locks, ConvertError> {
    let dst = destination.path;
    let journal = journal_path(dst);
    // First, so that nothing is left behind where it is in the way.
    own::check(&journal, Own::Journal)?;
    let mut notes = Vec::new();
    let elsewhere = destination.elsewhere();
    let locks = claim_all(destination, count, &mut notes, |notes, used| {
        // While the journal is there that says where they are.
        notes.extend(notes_of_others(dst, used)?);
        if count == 1 {
            return Ok(());
        }
        // It also says, of volumes in one folder, that those are ours which have their names before the first.
        let content = Content { elsewhere: elsewhere.clone(), ..Content::default() };
        Journal::create(&journal, IDENTITY, &content, &Syncer::default()).map(drop)
    })?;
    if count == 1 {
        // It would vouch for what is now empty.
        make_room(&journal, Own::Journal)?;
    }
    locks.iter().try_for_each(|(path, lock)| lock.set_len(0).map_err(ConvertError::io(path, "empty it")))?;
    clear_idle(dst, if elsewhere.is_some() { ANY } else { count })?;
    notes.iter().for_each(|note| progress.note(note));
    Ok(locks)
}

/// Refuses to begin volumes that do not fit on their drives.
fn check_drives(
    model: &ModelFile,
    layout: &FileLayout,
    locks: &Locks,
    notes: &mut Vec<String>,
) -> Result<(), ConvertError> {
    // Of each drive: a file on it, and the bytes of all.
    let mut drives: Vec<(u64, &Path, u64)> = Vec::new();
    for (volume, (path, file)) in locks.iter().enumerate() {
        let tables = layout.table_bytes(model.tensors().len()) + if volume == 0 { metadata_bytes(model) } else { 0 };
        let of_extents =
            model.extents().iter().enumerate().flat_map(|(number, e)| layout.stripes(number, e.stored_len));
        let needed = tables + of_extents.filter(|s| usize::from(s.volume) == volume).map(|s| s.len).sum::<u64>();
        let drive = file.metadata().map_err(ConvertError::io(path, "read its state"))?.dev();
        match drives.iter_mut().find(|(other, ..)| *other == drive) {
            Some((.., sum)) => *sum += needed,
            None => drives.push((drive, path, needed)),
        }
    }
    drives.into_iter().try_for_each(|(_, path, needed)| check_space(path, needed, notes))
}

struct Rewritten {
    model_id: String,
    lens: Vec<u64>,
    compressed: usize,
    syncer: std::sync::Arc<sluice_format::Syncer>,
}

fn write(
    model: &ModelFile,
    destination: Destination<'_>,
    layout: FileLayout,
    options: &UpgradeOptions,
    locks: &Locks,
    progress: &dyn Progress,
) -> Result<Rewritten, ConvertError> {
    let path = &locks[0].0;
    if options.compress != Some(true) {
        let mut notes = Vec::new();
        match destination.striping {
            Some(_) => check_drives(model, &layout, locks, &mut notes)?,
            None if options.compress.is_none() => check_space(path, model.file_bytes(), &mut notes)?,
            None => check_space(path, layout.ends().iter().sum(), &mut notes)?,
        }
        notes.iter().for_each(|note| progress.note(note));
    }
    let duplicate = |(path, lock): &(PathBuf, File)| {
        Ok((path.clone(), lock.try_clone().map_err(ConvertError::io(path, "open it"))?))
    };
    let files = locks.iter().map(duplicate).collect::<Result<Vec<_>, ConvertError>>()?;
    let mut writer = FileWriter::of_files(files, layout)?;
    if let Some(striping) = destination.striping {
        writer.set_folders(striping.recorded()?);
    }
    let syncer = writer.syncer().clone();
    if let Some(note) = sync_note(path, &writer) {
        progress.note(&note);
    }
    if options.compress == Some(true) {
        writer.compress(model.tensors());
    }
    progress.started(model.extent_bytes(), 0);
    let written = copy_all(model, &writer, options, progress)?;
    let compressed = written.iter().filter(|w| w.codec != Codec::Raw).count();
    let (model_id, lens) = writer.finish(&written, model.tensors(), model.metadata())?;
    Ok(Rewritten { model_id: model_id.to_string(), lens, compressed, syncer })
}

/// Copies all extents over the threads of the current rayon pool.
fn copy_all(
    model: &ModelFile,
    writer: &FileWriter,
    options: &UpgradeOptions,
    progress: &dyn Progress,
) -> Result<Vec<Written>, ConvertError> {
    let all = Mutex::new(vec![None; model.extents().len()]);
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let results = rayon::broadcast(|_| {
        let mut buffer = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(extent) = model.extents().get(number) else { break };
            let written = copy(model, extent, writer, number, options, &mut buffer).inspect_err(|_| {
                failed.store(true, Ordering::Relaxed);
            })?;
            all.lock().unwrap_or_else(PoisonError::into_inner)[number] = Some(written);
            progress.advanced(extent.stored_len);
        }
        Ok(())
    });
    results.into_iter().collect::<Result<(), ConvertError>>()?;
    let all = all.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(all.into_iter().map(|written| written.expect("every extent was written or is an error")).collect())
}

fn copy(
    model: &ModelFile,
    extent: &ExtentRecord,
    writer: &FileWriter,
    number: usize,
    options: &UpgradeOptions,
    buffer: &mut Vec<u8>,
) -> Result<Written, ConvertError> {
    let mut out = writer.extent(number);
    if options.compress.is_none() {
        model.read_stored(extent, buffer)?;
        let ExtentRecord { codec, stored_len, logical_checksum, .. } = *extent;
        // An extent with several stripes has no checksum of its stored bytes as a whole.
        let striped = model.stripes(extent).len() > 1;
        let checksum = if striped { sluice_format::checksum(buffer) } else { extent.checksum };
        return Ok(out.copy(Written { codec, stored_len, checksum, logical_checksum }, buffer)?);
    }
    model.read_extent(extent, buffer)?;
    out.write(&buffer[..extent.logical_len as usize])?;
    Ok(out.finish()?)
}
