//! The partial file: opened, locked, given its space, resumed or begun anew, and in the end given its name.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt as _, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statvfs::statvfs;
use sluice_checksum::Xxh3;
use sluice_format::{FileWriter, MAGIC, Metadata, ModelId, Stripe, Syncer, Volume, VolumeName, Written, first_volumes};

use crate::error::ConvertError;
use crate::journal::{
    Content, Elsewhere, Found, Identity, Journal, LastWritten, elsewhere_at, is_journal, is_of_one_folder, named_at,
    say_named,
};
use crate::own::{
    self, ANY, Own, clear_all, clear_idle, folder_of, is_twin, journal_path, layer_path, new_of, open_own, states_path,
    tables_of,
};
use crate::plan::Plan;
use crate::striping::Destination;
use crate::upgrade::is_same;

/// Unit of `st_blocks`, whatever the filesystem's blocks are.
const STAT_BLOCK: u64 = 512;
/// Bytes read at once of an extent that an earlier run has written.
const PIECE: usize = 1 << 20;

/// The partial files, exclusively ours: one for each volume.
pub(crate) struct Partial {
    destination: PathBuf,
    pub(crate) journal_path: PathBuf,
    /// Where measuring keeps what it goes on with.
    pub(crate) states_path: PathBuf,
    /// Where a layer is while it is measured.
    pub(crate) layer_path: PathBuf,
    pub(crate) writer: FileWriter,
    /// What the journal says of the other volumes of a striped model.
    pub(crate) elsewhere: Option<Elsewhere>,
    /// Hold the locks until the files have their names: a duplicate keeps the lock when the writer closes its own.
    locks: Vec<(PathBuf, File)>,
}

/// A drive on which partial files lie.
struct Drive<'a> {
    /// Its device number.
    number: u64,
    /// The first of the files on it, and its folder.
    file: &'a Path,
    folder: &'a Path,
    /// Bytes that are still needed on it.
    needed: u64,
    /// Bytes that the files on it take already.
    occupied: u64,
}

impl Drive<'_> {
    fn has(&self, file: &File) -> bool {
        file.metadata().is_ok_and(|found| found.dev() == self.number)
    }
}

/// What the file of each volume takes in the end, before compression: extents, tables and, of the first, metadata.
fn lens(plan: &Plan) -> impl Iterator<Item = u64> {
    let tables = plan.layout.table_bytes(plan.records.len());
    let first = plan.tail_bytes() - tables;
    plan.layout.ends().iter().enumerate().map(move |(volume, end)| end + tables + if volume == 0 { first } else { 0 })
}

/// What a conversion has ended in.
pub(crate) struct Published {
    pub(crate) model_id: ModelId,
    /// Of all files together.
    pub(crate) file_bytes: u64,
    pub(crate) files: Vec<PathBuf>,
    /// Remarks about volumes of what was overwritten.
    pub(crate) orphans: Vec<String>,
}

/// What opening found.
pub(crate) struct Opened {
    pub(crate) partial: Partial,
    pub(crate) identity: Identity,
    pub(crate) found: Found,
    /// What this filesystem cannot do, for the user.
    pub(crate) notes: Vec<String>,
}

/// As [`refuse_existing`], of all files that a plan may end in.
pub(crate) fn refuse_all_existing(destination: Destination<'_>, plan: &Plan) -> Result<(), ConvertError> {
    destination.check_folder()?;
    let most = plan.layout.ends().len();
    if !plan.options.compress || destination.striping.is_some() {
        destination.refuse_namesake(most, None)?;
    }
    // How many a compressed model has is known when it is there, unless it has one for each folder.
    let counts = if plan.options.compress && destination.striping.is_none() { 1..=most } else { most..=most };
    destination.refuse_name(*counts.start())?;
    for count in counts {
        refuse_targets(destination, count, plan.options.overwrite, source_of(plan))?;
    }
    Ok(())
}

/// As [`refuse_existing`], of the files of a model in `count` volumes. Those that an interrupted program had given their names are in nobody's
/// way.
pub(crate) fn refuse_targets(
    destination: Destination<'_>,
    count: usize,
    overwrite: bool,
    source: Option<&Path>,
) -> Result<(), ConvertError> {
    let targets = destination.targets(count);
    let early = early(destination, &targets);
    let mut others = targets.iter().enumerate().filter(|(volume, _)| !early.contains(volume));
    others.try_for_each(|(_, target)| refuse_existing(target, overwrite, source))?;
    destination.refuse_foreign(&targets, &early)
}

/// The folder of the checkpoint.
fn source_of(plan: &Plan) -> Option<&Path> {
    plan.checkpoint.source().folder()
}

/// Those of these volumes that a program had given their names when it was killed, before the first one had its. By then all were whole, the
/// journal said so, and the first one, which is still partial, repeats their tables: a volume with others is another model's, which may lie
/// there as well. So is one that was written at another time, or is in a folder that the journal does not name for it.
fn early(destination: Destination<'_>, targets: &[PathBuf]) -> Vec<usize> {
    let journal = journal_path(destination.path);
    if targets.first().is_none_or(|first| first.exists()) || !is_journal(&journal) {
        return Vec::new();
    }
    let Ok(first) = Volume::open(&destination.partial(0)) else { return Vec::new() };
    let Some(finished) = named_at(&journal, targets.len()) else { return Vec::new() };
    let elsewhere = destination.striping.and_then(|_| elsewhere_at(&journal));
    let is_named = |volume: usize| {
        let named = elsewhere.as_ref().and_then(|elsewhere| elsewhere.folders.get(volume - 1));
        destination.striping.is_none() || named.is_some_and(|named| is_same(named, folder_of(&targets[volume])))
    };
    let is_early = |&volume: &usize| {
        let has_left = !destination.partial(volume).exists();
        has_left && is_named(volume) && is_twin(&first, &targets[volume], volume, &finished)
    };
    (1..targets.len()).filter(is_early).collect()
}

/// Takes volumes back that a program had given their names when it was killed, before the first one had its: then it goes on
/// where it was, or another one takes its place, which has `most` volumes at most. The caller has locked the first partial file, so nobody
/// is giving them their names now.
pub(crate) fn take_back(destination: Destination<'_>, most: usize) {
    let others = other_counts(destination, most);
    for count in (2..=most).chain(others) {
        let targets = destination.targets(count);
        for volume in early(destination, &targets) {
            // If it cannot be renamed, it stands in the way, which is then said.
            let _ = fs::rename(&targets[volume], destination.partial(volume));
        }
    }
}

/// Into how many volumes, more than `most`, a conversion had divided the model that was killed while it gave them their names. Each of them
/// repeats the tables, which tells them from those of other models.
fn other_counts(destination: Destination<'_>, most: usize) -> Option<usize> {
    let first = Volume::open(&destination.partial(0)).ok()?;
    let sb = first.superblock();
    let count = usize::from(sb.volume_count);
    let is_of_it = |path: &PathBuf| Volume::open(path).map_or(true, |other| tables_of(&other) == tables_of(&first));
    let is_whole = sb.volume == 0 && count > most.max(1) && destination.targets(count)[1..].iter().all(is_of_it);
    is_whole.then_some(count)
}

/// Removes what a conversion has left that was killed when its model file had its name already: its journal, and what else is beside
/// it. It is in nobody's way, so an error is none.
pub(crate) fn clear_remains(destination: Destination<'_>, most: usize) {
    let path = destination.path;
    let is_complete = || (1..=most).any(|count| destination.targets(count).first().is_some_and(|first| first.exists()));
    if !destination.partial(0).exists() && is_journal(&journal_path(path)) && is_complete() {
        let _ = clear_all(path, destination.striping.is_some());
    }
}

/// What the journal of a conversion by this plan belongs to, whose hash is [`Plan::hash_with`].
pub(crate) fn identity(plan: &Plan, hash: u128) -> Identity {
    Identity {
        plan_hash: hash,
        tensors_per_extent: plan.tensors_per_extent(),
        extents: plan.extents.len(),
        parts: plan.checkpoint.parts.len(),
        files: plan.checkpoint.files().len(),
    }
}

/// Opens the partial files for `destination`, gives them their space, and reads their journal. `hash`: [`Plan::hash_with`]; `scratch`:
/// bytes of temporary files that the conversion will need besides.
pub(crate) fn open(destination: &Path, plan: &Plan, hash: u128, scratch: u64) -> Result<Opened, ConvertError> {
    let volumes = plan.layout.ends().len();
    let places = plan.destination(destination);
    refuse_all_existing(places, plan).inspect_err(|_| clear_remains(places, volumes))?;
    let (journal_path, states_path) = (journal_path(destination), states_path(destination));
    // First, so that nothing is left behind where something is in the way, nor found hours later.
    let mut beside = vec![(journal_path.clone(), Own::Journal), (new_of(&journal_path), Own::Journal)];
    if plan.is_measured() {
        beside.extend([&states_path, &new_of(&states_path)].map(|path| (path.clone(), Own::States)));
        beside.push((layer_path(destination), Own::Model));
    }
    beside.iter().try_for_each(|(path, own)| own::check(path, *own).map(drop))?;
    let mut notes = Vec::new();
    let identity = identity(plan, hash);
    let mut found = Found::Nothing;
    let record = |notes: &mut Vec<String>, used: &[PathBuf]| -> Result<(), ConvertError> {
        // While the journal is there that says where they are, before what it says of their names is cut off.
        notes.extend(notes_of_others(destination, used)?);
        found = Journal::open(&journal_path, identity)?;
        let Some(elsewhere) = places.elsewhere() else { return Ok(()) };
        let content = match &found {
            Found::Same { content, .. } if content.elsewhere.as_ref() == Some(&elsewhere) => return Ok(()),
            Found::Same { content, .. } => content.clone(),
            Found::Nothing | Found::OtherPlan => Content { stamps: plan.checkpoint.stamps(), ..Content::default() },
        };
        let content = Content { elsewhere: Some(elsewhere), ..content };
        Journal::create(&journal_path, identity, &content, &Syncer::default()).map(drop)
    };
    let locks = claim_all(places, volumes, &mut notes, record)?;
    // Another conversion may have finished while this one waited to open the files.
    refuse_all_existing(places, plan)?;
    let duplicate = |(path, lock): &(PathBuf, File)| {
        Ok((path.clone(), lock.try_clone().map_err(ConvertError::io(path, "open it"))?))
    };
    let files = locks.iter().map(duplicate).collect::<Result<Vec<_>, ConvertError>>()?;
    let mut writer = FileWriter::of_files(files, plan.layout.clone())?;
    if plan.options.compress {
        writer.compress(&plan.records);
    }
    if let Some(striping) = &plan.options.striping {
        writer.set_folders(striping.recorded()?);
    }
    let (destination, layer_path) = (destination.to_owned(), layer_path(destination));
    let elsewhere = places.elsewhere();
    let partial = Partial { destination, journal_path, states_path, layer_path, writer, elsewhere, locks };
    clear_idle(&partial.destination, if partial.elsewhere.is_some() { ANY } else { volumes })?;
    if !matches!(found, Found::Same { .. }) {
        partial.clear()?;
    }
    partial.reserve(plan, scratch, &mut notes)?;
    Ok(Opened { partial, identity, found, notes })
}

/// Removes what the interrupted conversion to the same place has left in folders that are not `used` any more, and says so; what it finds of
/// others there stays, and is named.
pub(crate) fn notes_of_others(destination: &Path, used: &[PathBuf]) -> Result<Vec<String>, ConvertError> {
    let is_striped = used.iter().any(|path| folder_of(path) != folder_of(destination));
    if is_striped && is_of_one_folder(&journal_path(destination)) {
        // Then the volumes beside the first are of that conversion.
        clear_idle(destination, 1)?;
    }
    let removed = own::clear_elsewhere(destination, used).into_iter().map(|path| {
        format!("{}: an interrupted conversion to other folders had left it; it has been removed", path.display())
    });
    let mut notes: Vec<String> = removed.collect();
    if is_striped {
        notes.extend(own::of_others(destination, used).into_iter().map(|path| {
            format!(
                "{}: it is of another conversion by this name, to other folders, or to these in another order: remove it if that one has \
                 been interrupted and you will not go on with it",
                path.display()
            )
        }));
    }
    Ok(notes)
}

/// Whether a finished file may take the place of what is at `destination`, if anything is: of a model file, or of what an
/// interrupted program has left of one, and of nothing else, whatever a slip of the hand names. `source` is the folder of the
/// checkpoint, of which only model files are replaced, even where others look like remains.
pub(crate) fn refuse_existing(destination: &Path, overwrite: bool, source: Option<&Path>) -> Result<(), ConvertError> {
    let Ok(found) = destination.symlink_metadata() else { return Ok(()) };
    let path = destination.to_owned();
    let kind = found.file_type();
    let refuse = |problem| Err(ConvertError::NotReplaced { path: path.clone(), problem });
    if kind.is_dir() {
        return refuse("it is a folder");
    }
    if !overwrite {
        return Err(ConvertError::Exists { path });
    }
    if kind.is_symlink() {
        return refuse("it is a link");
    }
    if !kind.is_file() {
        return refuse("it is a device, a pipe or a socket");
    }
    let mut head = Vec::new();
    let read = File::open(destination).and_then(|file| file.take(MAGIC.len() as u64).read_to_end(&mut head));
    read.map_err(ConvertError::io(destination, "read it"))?;
    if head == MAGIC {
        return Ok(());
    }
    let is_found = |entry: io::Result<fs::DirEntry>| {
        let read = entry.and_then(|entry| fs::metadata(entry.path()));
        read.is_ok_and(|read| (read.dev(), read.ino()) == (found.dev(), found.ino()))
    };
    if source.and_then(|folder| fs::read_dir(folder).ok()).is_some_and(|mut all| all.any(is_found)) {
        return refuse("it is a part of the checkpoint");
    }
    // Space that was reserved and never written reads as zeros.
    if MAGIC.starts_with(&head) || head.iter().all(|&byte| byte == 0) {
        return Ok(());
    }
    refuse("it is no model file")
}

/// Opens the partial files of a model in `count` volumes and locks them. `record` gets their paths once the first one is ours, and so the
/// journal, but none of the others has been made: what it has the journal say holds before there is anything of which it speaks.
pub(crate) fn claim_all(
    destination: Destination<'_>,
    count: usize,
    notes: &mut Vec<String>,
    record: impl FnOnce(&mut Vec<String>, &[PathBuf]) -> Result<(), ConvertError>,
) -> Result<Vec<(PathBuf, File)>, ConvertError> {
    let journal = journal_path(destination.path);
    let paths: Vec<PathBuf> = (0..count).map(|volume| destination.partial(volume)).collect();
    let mut locks = vec![claim(&paths[0], &journal, notes)?];
    take_back(destination, count);
    // First, so that the journal still says what it did where something is in the way.
    paths[1..].iter().try_for_each(|path| open_own(path, false).map(drop))?;
    record(notes, &paths)?;
    for path in &paths[1..] {
        locks.push(claim(path, &journal, notes)?);
    }
    Ok(paths.into_iter().zip(locks).collect())
}

/// Opens the partial file at `path` and locks it. The lock belongs to the open file and vanishes with the process, however it
/// ends. A file that no conversion has left there is not touched.
pub(crate) fn claim(path: &Path, journal_path: &Path, notes: &mut Vec<String>) -> Result<File, ConvertError> {
    let file = open_own(path, true)?.ok_or_else(|| ConvertError::Locked { path: path.to_owned() })?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(ConvertError::Locked { path: path.to_owned() }),
        Err(TryLockError::Error(e)) if has_no_locks(&e) => notes.push(format!(
            "{}: this filesystem cannot lock files ({e}): do not run a second conversion to the same place meanwhile",
            path.display()
        )),
        Err(TryLockError::Error(e)) => return Err(ConvertError::io(path, "lock it")(e)),
    }
    // Between opening and locking, its owner may have finished and renamed it: then this is somebody's finished file.
    if !has_name(&file, path)? {
        return Err(ConvertError::Locked { path: path.to_owned() });
    }
    if !Own::Model.is(&file).map_err(ConvertError::io(path, "read it"))? && !is_journal(journal_path) {
        let problem = "it is not what a conversion leaves when it is interrupted";
        return Err(ConvertError::InTheWay { path: path.to_owned(), problem });
    }
    Ok(file)
}

/// Whether `path` still names an open file, itself and not through a link.
fn has_name(file: &File, path: &Path) -> Result<bool, ConvertError> {
    let ours = file.metadata().map_err(ConvertError::io(path, "read its state"))?;
    Ok(path.symlink_metadata().is_ok_and(|named| (named.dev(), named.ino()) == (ours.dev(), ours.ino())))
}

/// Whether an error says that there are no locks here: not every filesystem has them, nor does every sandbox permit them.
fn has_no_locks(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    error.kind() == io::ErrorKind::Unsupported
        || matches!(errno, Some(Errno::ENOSYS | Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::EPERM | Errno::EINVAL))
}

impl Partial {
    /// The first partial file.
    pub(crate) fn path(&self) -> &Path {
        &self.locks[0].0
    }

    /// Empties the files. The journal goes first, and for good: were it to come back after a power cut, it would vouch for
    /// data that no longer exist. That of a striped model has been replaced already.
    fn clear(&self) -> Result<(), ConvertError> {
        let gone = if self.elsewhere.is_some() { Ok(()) } else { fs::remove_file(&self.journal_path) };
        match gone {
            Ok(()) => self.sync_folder()?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(ConvertError::io(&self.journal_path, "remove the journal")(e)),
        }
        own::clear(&self.states_path, Own::States)?;
        self.locks.iter().try_for_each(|(path, file)| file.set_len(0).map_err(ConvertError::io(path, "empty it")))
    }

    /// Checks that the drives have room, for `scratch` bytes besides too, and takes that of the files. How much a compressed model takes is
    /// known when it is there: of that, nothing is taken beforehand.
    fn reserve(&self, plan: &Plan, scratch: u64, notes: &mut Vec<String>) -> Result<(), ConvertError> {
        if plan.options.compress && scratch == 0 {
            return Ok(());
        }
        // What an earlier run has kept is replaced.
        let kept = self.states_path.metadata().map_or(0, |found| found.blocks() * STAT_BLOCK);
        let scratch = scratch.saturating_sub(kept);
        let drives = self.drives(plan, scratch)?;
        let no_space = |drive: &Drive<'_>, available| {
            let path = if drives.len() == 1 { self.destination.as_path() } else { drive.folder };
            Err(ConvertError::NoSpace { path: path.to_owned(), needed: drive.needed, scratch, available })
        };
        let reserve = |notes: &mut Vec<String>| {
            for drive in &drives {
                let available = free_space(drive.file, notes)?.unwrap_or(u64::MAX);
                if drive.needed > available {
                    return no_space(drive, available);
                }
            }
            let files: &[(PathBuf, File)] = if plan.options.compress { &[] } else { &self.locks };
            for ((path, file), len) in files.iter().zip(lens(plan)) {
                let Err(e) = allocate(file, len) else { continue };
                match drives.iter().find(|drive| drive.has(file)) {
                    Some(drive) if e.raw_os_error() == Some(Errno::ENOSPC as i32) => {
                        return no_space(drive, free_space(path, &mut Vec::new())?.unwrap_or(0));
                    }
                    _ => return Err(ConvertError::io(path, "allocate its space")(e)),
                }
            }
            Ok(())
        };
        let result = reserve(notes);
        if result.is_err() && drives.iter().all(|drive| drive.occupied == 0) {
            // Nothing is lost, and empty files would only puzzle.
            self.locks.iter().for_each(|(path, _)| drop(fs::remove_file(path)));
            let _ = own::clear(&self.journal_path, Own::Journal);
        }
        result
    }

    /// The drives on which the files lie. `scratch` bytes go to that of the first file.
    fn drives(&self, plan: &Plan, scratch: u64) -> Result<Vec<Drive<'_>>, ConvertError> {
        let mut drives: Vec<Drive<'_>> = Vec::new();
        for ((path, file), len) in self.locks.iter().zip(lens(plan)) {
            let found = file.metadata().map_err(ConvertError::io(path, "read its state"))?;
            let (number, occupied) = (found.dev(), found.blocks() * STAT_BLOCK);
            match drives.iter_mut().find(|drive| drive.number == number) {
                Some(drive) => {
                    drive.needed += len;
                    drive.occupied += occupied;
                }
                None => drives.push(Drive { number, file: path, folder: folder_of(path), needed: len, occupied }),
            }
        }
        for (i, drive) in drives.iter_mut().enumerate() {
            let of_files = if plan.options.compress { 0 } else { drive.needed.saturating_sub(drive.occupied) };
            drive.needed = of_files.saturating_add(if i == 0 { scratch } else { 0 });
        }
        Ok(drives)
    }

    /// Whether the bytes of an extent that an earlier run has written to these stripes are still those of its checksum. What cannot be
    /// read is not.
    pub(crate) fn is_intact(&self, stripes: &[Stripe], checksum: u64) -> bool {
        let mut hash = Xxh3::new();
        let longest = stripes.iter().map(|stripe| stripe.len as usize).max().unwrap_or(0);
        let mut buffer = vec![0; PIECE.min(longest)];
        for stripe in stripes {
            let Some((_, file)) = self.locks.get(usize::from(stripe.volume)) else { return false };
            let mut done = 0;
            while done < stripe.len {
                let piece = &mut buffer[..PIECE.min((stripe.len - done) as usize)];
                if file.read_exact_at(piece, stripe.offset + done).is_err() {
                    return false;
                }
                hash.update(piece);
                done += piece.len() as u64;
            }
        }
        hash.digest() == checksum
    }

    fn sync_folder(&self) -> Result<(), ConvertError> {
        let folder = folder_of(self.path());
        self.writer.syncer().folder(folder).map_err(ConvertError::io(folder, "sync the folder"))
    }

    /// Writes tables and superblocks and gives the files their names, the first last.
    pub(crate) fn finish(
        self,
        plan: &Plan,
        written: &[Written],
        metadata: &Metadata,
    ) -> Result<Published, ConvertError> {
        let Partial { destination, journal_path, writer, locks, elsewhere, .. } = self;
        let syncer = writer.syncer().clone();
        let (model_id, lens) = writer.finish(written, &plan.records, metadata)?;
        let places = plan.destination(&destination);
        let files = places.targets(lens.len());
        places.refuse_namesake(files.len(), None)?;
        for target in &files {
            refuse_existing(target, plan.options.overwrite, source_of(plan))?;
        }
        places.refuse_foreign(&files, &[])?;
        let orphans = if plan.options.overwrite { make_way(&files)? } else { Vec::new() };
        say_finished(&journal_path, &locks[..files.len()], &syncer);
        for ((path, lock), target) in locks.iter().zip(&files).rev() {
            publish(lock, path, target)?;
        }
        // Compressed, the model may have fewer volumes than before.
        for (path, _) in &locks[files.len()..] {
            fs::remove_file(path).map_err(ConvertError::io(path, "remove it"))?;
        }
        for folder in places.folders() {
            syncer.folder(folder).map_err(ConvertError::io(folder, "sync the folder"))?;
        }
        clear_all(&destination, elsewhere.is_some())?;
        let orphans = orphans.into_iter().chain(namesakes(&files)).collect();
        Ok(Published { model_id, file_bytes: lens.iter().sum(), files, orphans })
    }
}

/// Removes the volumes that new ones replace, which would not fit these; the first one last, as it says which the others are. Returns
/// remarks about volumes of the same model in other folders, which stay.
pub(crate) fn make_way(files: &[PathBuf]) -> Result<Vec<String>, ConvertError> {
    let [first, _, ..] = files else { return Ok(Vec::new()) };
    let old = Volume::open(first).map_or(Vec::new(), |old| old.own_others());
    let is_replaced = |path: &Path| files.iter().any(|file| is_same(file, path));
    let orphans = old.iter().filter(|path| !is_replaced(path)).map(|path| {
        format!(
            "{}: a volume of the model that was overwritten, which nothing needs any more: remove it",
            path.display()
        )
    });
    let orphans = orphans.collect();
    files.iter().rev().try_for_each(|path| match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(ConvertError::io(path, "replace it")(e)),
        _ => Ok(()),
    })?;
    Ok(orphans)
}

/// Remarks about other models that would have the name of this one if both were one file, such as the volumes of one that this replaces
/// with another number of volumes.
pub(crate) fn namesakes(files: &[PathBuf]) -> Vec<String> {
    let Some(first) = files.first() else { return Vec::new() };
    let whole = VolumeName::parse(first).map_or_else(|| first.clone(), |name| name.whole());
    let others = first_volumes(&whole).into_iter().filter(|found| !is_same(found, first));
    let remark = |found: PathBuf| {
        let (found, first) = (found.display(), first.display());
        let until = if files.len() > 1 { format!(". Until then, commands must name {first}") } else { String::new() };
        format!(
            "the volumes of another model of this name, or of an earlier one, are there too ({found}): remove them if nothing needs them{until}"
        )
    };
    others.map(remark).collect()
}

/// Has the journal say that these volumes are whole and get their names, so that they are known as what they are if the program is killed
/// before the first one has its own. If it cannot be said, as where the drive is full, they would then be in the way, which is no reason to
/// give up what is finished.
pub(crate) fn say_finished(journal: &Path, locks: &[(PathBuf, File)], syncer: &Syncer) {
    let written = |(_, file): &(PathBuf, File)| file.metadata().map(|found| LastWritten::of(&found));
    let others: io::Result<Vec<LastWritten>> = locks.iter().skip(1).map(written).collect();
    if let Some(others) = others.ok().filter(|others| !others.is_empty()) {
        let _ = say_named(journal, &others, syncer);
    }
}

/// Gives a finished file its name. `file` is the one that was written to as `path`.
pub(crate) fn publish(file: &File, path: &Path, destination: &Path) -> Result<(), ConvertError> {
    if !has_name(file, path)? {
        let problem = "it has taken the place of the file that was being written";
        return Err(ConvertError::InTheWay { path: path.to_owned(), problem });
    }
    fs::rename(path, destination).map_err(ConvertError::io(path, "rename it"))
}

/// Bytes that are free on the drive of `path`; `None`, and a remark, where the system cannot tell.
fn free_space(path: &Path, notes: &mut Vec<String>) -> Result<Option<u64>, ConvertError> {
    let folder = folder_of(path);
    match statvfs(folder) {
        #[allow(clippy::unnecessary_cast, reason = "the types of the fields differ between systems")]
        Ok(stats) => Ok(Some(stats.blocks_available() as u64 * stats.fragment_size() as u64)),
        Err(e @ (Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::EPERM | Errno::EACCES)) => {
            let folder = folder.display();
            notes.push(format!("{folder}: the system does not say how much space is free ({e}): it is not checked"));
            Ok(None)
        }
        Err(e) => Err(ConvertError::io(folder, "read the free space of")(e.into())),
    }
}

/// Refuses to begin a file of `needed` bytes at `path` where they are not free.
pub(crate) fn check_space(path: &Path, needed: u64, notes: &mut Vec<String>) -> Result<(), ConvertError> {
    match free_space(path, notes)? {
        Some(available) if needed > available => {
            Err(ConvertError::NoSpace { path: path.to_owned(), needed, scratch: 0, available })
        }
        _ => Ok(()),
    }
}

/// The remark that a file may be lost with the power, if its filesystem could not sync it.
pub(crate) fn sync_note(path: &Path, writer: &FileWriter) -> Option<String> {
    let refusal = writer.syncer().refusal()?;
    Some(format!(
        "{}: this filesystem cannot sync files ({refusal}): what is written may be lost if the power fails soon after",
        path.display()
    ))
}

/// Allocates blocks where the filesystem can, so that the drive cannot fill up halfway; else sets the length.
fn allocate(file: &File, len: u64) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use nix::fcntl::{FallocateFlags, fallocate};
        match fallocate(file, FallocateFlags::empty(), 0, len as i64) {
            Ok(()) => return Ok(()),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => {}
            Err(e) => return Err(e.into()),
        }
    }
    file.set_len(len)
}
