//! The partial file: opened, locked, given its space, resumed or begun anew, and in the end given its name.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::statvfs::statvfs;
use sluice_checksum::Xxh3;
use sluice_format::{ExtentRecord, FileWriter, MAGIC, Metadata, ModelId, Volume, VolumeName, Written};

use crate::error::ConvertError;
use crate::journal::{Found, Identity, Journal, is_journal, may_be_journal};
use crate::plan::Plan;
use crate::states;

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
    pub(crate) writer: FileWriter,
    /// Hold the locks until the files have their names: a duplicate keeps the lock when the writer closes its own.
    locks: Vec<(PathBuf, File)>,
}

/// What a conversion has ended in.
pub(crate) struct Published {
    pub(crate) model_id: ModelId,
    /// Of all files together.
    pub(crate) file_bytes: u64,
    pub(crate) files: Vec<PathBuf>,
}

/// What opening found.
pub(crate) struct Opened {
    pub(crate) partial: Partial,
    pub(crate) identity: Identity,
    pub(crate) found: Found,
    /// What this filesystem cannot do, for the user.
    pub(crate) notes: Vec<String>,
}

/// `path` with something behind its name.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Where the partial file of a volume is.
pub(crate) fn partial_path(destination: &Path, volume: usize) -> PathBuf {
    match volume {
        0 => with_suffix(destination, ".partial"),
        volume => with_suffix(destination, &format!(".partial-{:05}", volume + 1)),
    }
}

/// The names of the finished files, of which there are `count`.
pub(crate) fn targets(destination: &Path, count: usize) -> Vec<PathBuf> {
    let whole = VolumeName::parse(destination).map_or_else(|| destination.to_owned(), |name| name.whole());
    let Ok(volumes) = u16::try_from(count) else { return Vec::new() };
    match volumes {
        1 => vec![destination.to_owned()],
        _ => (0..volumes).map(|volume| VolumeName::first_of(&whole, volumes).path_of(volume)).collect(),
    }
}

/// As [`refuse_existing`], of all files that a plan may end in.
pub(crate) fn refuse_all_existing(destination: &Path, plan: &Plan) -> Result<(), ConvertError> {
    let most = plan.layout.ends().len();
    // How many a compressed model has is known when it is there.
    let counts = if plan.options.compress { 1..=most } else { most..=most };
    for count in counts {
        let targets = targets(destination, count);
        let early = early(destination, &targets);
        let others = targets.iter().enumerate().filter(|(volume, _)| !early.contains(volume));
        for (_, target) in others {
            refuse_existing(target, plan.options.overwrite, source_of(plan))?;
        }
    }
    Ok(())
}

/// The folder of the checkpoint.
fn source_of(plan: &Plan) -> Option<&Path> {
    plan.checkpoint.source().folder()
}

/// Those of these volumes that a conversion had given their names when it was killed, before the first one had its.
fn early(destination: &Path, targets: &[PathBuf]) -> Vec<usize> {
    let is_journaled = || is_journal(&with_suffix(destination, ".partial.journal"));
    if targets.first().is_none_or(|first| first.exists()) || !partial_path(destination, 0).exists() || !is_journaled() {
        return Vec::new();
    }
    let is_it = |volume: usize, found: &Volume| {
        let sb = found.superblock();
        (usize::from(sb.volume), usize::from(sb.volume_count)) == (volume, targets.len())
    };
    let is_early = |&volume: &usize| {
        let has_left = !partial_path(destination, volume).exists();
        has_left && Volume::open(&targets[volume]).is_ok_and(|found| is_it(volume, &found))
    };
    (1..targets.len()).filter(is_early).collect()
}

/// Takes volumes back that a conversion had given their names when it was killed, before the first one had its: then it goes on
/// where it was.
fn take_back(destination: &Path, most: usize) {
    for count in 2..=most {
        let targets = targets(destination, count);
        for volume in early(destination, &targets) {
            // If it cannot be renamed, it stands in the way, which is then said.
            let _ = fs::rename(&targets[volume], partial_path(destination, volume));
        }
    }
}

/// Removes what a conversion has left that was killed when its model file had its name already: its journal, and files for volumes
/// that a compressed model did not need. They are in nobody's way, so an error is none.
pub(crate) fn clear_remains(destination: &Path, plan: &Plan) {
    let journal = with_suffix(destination, ".partial.journal");
    let most = plan.layout.ends().len();
    let is_complete =
        || (1..=most).any(|count| targets(destination, count).first().is_some_and(|first| first.exists()));
    if partial_path(destination, 0).exists() || !is_journal(&journal) || !is_complete() {
        return;
    }
    for volume in 1..most {
        let path = partial_path(destination, volume);
        if matches!(open_own(&path, false), Ok(Some(file)) if is_partial(&file).unwrap_or(false)) {
            let _ = fs::remove_file(path);
        }
    }
    let _ = fs::remove_file(journal);
}

/// What the journal of a conversion by this plan belongs to.
pub(crate) fn identity(plan: &Plan) -> Identity {
    Identity {
        plan_hash: plan.hash,
        tensors_per_extent: plan.tensors_per_extent(),
        extents: plan.extents.len(),
        parts: plan.checkpoint.parts.len(),
        files: plan.checkpoint.files().len(),
    }
}

/// Opens the partial files for `destination`, gives them their space, and reads their journal. `scratch`: bytes of temporary files that
/// the conversion will need besides.
pub(crate) fn open(destination: &Path, plan: &Plan, scratch: u64) -> Result<Opened, ConvertError> {
    let volumes = plan.layout.ends().len();
    take_back(destination, volumes);
    refuse_all_existing(destination, plan).inspect_err(|_| clear_remains(destination, plan))?;
    let journal_path = with_suffix(destination, ".partial.journal");
    // First, so that nothing is left behind where it is in the way.
    if open_own(&journal_path, false)?.is_some() && !may_be_journal(&journal_path) {
        let problem = "it is not what a conversion leaves when it is interrupted";
        return Err(ConvertError::InTheWay { path: journal_path, problem });
    }
    let mut notes = Vec::new();
    let mut locks = Vec::with_capacity(volumes);
    for volume in 0..volumes {
        let path = partial_path(destination, volume);
        let lock = claim(&path, &journal_path, &mut notes)?;
        locks.push((path, lock));
    }
    // Another conversion may have finished while this one waited to open the files.
    refuse_all_existing(destination, plan)?;
    let identity = identity(plan);
    let found = Journal::open(&journal_path, identity)?;
    let duplicate = |(path, lock): &(PathBuf, File)| {
        Ok((path.clone(), lock.try_clone().map_err(ConvertError::io(path, "open it"))?))
    };
    let files = locks.iter().map(duplicate).collect::<Result<Vec<_>, ConvertError>>()?;
    let mut writer = FileWriter::of_files(files, plan.layout.clone())?;
    if plan.options.compress {
        writer.compress(&plan.records);
    }
    let states_path = with_suffix(destination, states::SUFFIX);
    let partial = Partial { destination: destination.to_owned(), journal_path, states_path, writer, locks };
    if !matches!(found, Found::Same { .. }) {
        partial.clear()?;
    }
    partial.reserve(plan, scratch, &mut notes)?;
    Ok(Opened { partial, identity, found, notes })
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
    if !is_partial(&file).map_err(ConvertError::io(path, "read it"))? && !is_journal(journal_path) {
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

/// Makes room at `path` for a temporary model file.
///
/// # Errors
/// [`ConvertError::InTheWay`] if there is something that no conversion has left there.
pub(crate) fn make_room(path: &Path) -> Result<(), ConvertError> {
    let Some(file) = open_own(path, false)? else { return Ok(()) };
    if !is_partial(&file).map_err(ConvertError::io(path, "read it"))? {
        let problem = "it is not what a conversion leaves";
        return Err(ConvertError::InTheWay { path: path.to_owned(), problem });
    }
    fs::remove_file(path).map_err(ConvertError::io(path, "remove it"))
}

/// Whether a file begins as unfinished and finished model files do, as far as it goes.
fn is_partial(file: &File) -> io::Result<bool> {
    let mut start = [0; MAGIC.len()];
    let len = file.metadata()?.len().min(start.len() as u64) as usize;
    file.read_exact_at(&mut start[..len], 0)?;
    Ok(start == [0; MAGIC.len()] || start == MAGIC)
}

/// Opens a file for reading and writing that only this program writes; `None` if there is none and it is not to be created.
/// Never follows a link, nor opens anything but a regular file of a single name: what else is there stays as it is.
pub(crate) fn open_own(path: &Path, create: bool) -> Result<Option<File>, ConvertError> {
    let in_the_way = |problem| Err(ConvertError::InTheWay { path: path.to_owned(), problem });
    match path.symlink_metadata() {
        Ok(found) => {
            if let Some(problem) = obstacle(&found) {
                return in_the_way(problem);
            }
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(ConvertError::io(path, "read its state")(e)),
    }
    // Whatever takes its place in this moment: no link is followed, and no pipe waited for.
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file =
        File::options().read(true).write(true).create(create).truncate(false).custom_flags(flags.bits()).open(path);
    let file = match file {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound && !create => return Ok(None),
        Err(e) => return Err(ConvertError::io(path, if create { "create it" } else { "open it" })(e)),
    };
    let opened = file.metadata().map_err(ConvertError::io(path, "read its state"))?;
    obstacle(&opened).map_or(Ok(Some(file)), in_the_way)
}

/// Why something is no file that this program has made.
fn obstacle(found: &fs::Metadata) -> Option<&'static str> {
    let kind = found.file_type();
    if kind.is_symlink() {
        Some("it is a link, which is not followed")
    } else if kind.is_dir() {
        Some("it is a folder")
    } else if kind.is_fifo() || kind.is_socket() {
        Some("it is a pipe or a socket")
    } else if !kind.is_file() {
        Some("it is a device")
    } else if found.nlink() > 1 {
        Some("it has another name too (a hard link), whose content would change with it")
    } else {
        None
    }
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
    /// data that no longer exist.
    fn clear(&self) -> Result<(), ConvertError> {
        match fs::remove_file(&self.journal_path) {
            Ok(()) => self.sync_folder()?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(ConvertError::io(&self.journal_path, "remove the journal")(e)),
        }
        states::remove(&self.states_path)?;
        self.locks.iter().try_for_each(|(path, file)| file.set_len(0).map_err(ConvertError::io(path, "empty it")))
    }

    /// Checks that the drive has room, for `scratch` bytes besides too, and takes that of the files. How much a compressed model takes is
    /// known when it is there: of that, nothing is taken beforehand.
    fn reserve(&self, plan: &Plan, scratch: u64, notes: &mut Vec<String>) -> Result<(), ConvertError> {
        if plan.options.compress && scratch == 0 {
            return Ok(());
        }
        let mut occupied = 0;
        for (path, file) in &self.locks {
            occupied += file.metadata().map_err(ConvertError::io(path, "read its state"))?.blocks() * STAT_BLOCK;
        }
        let available = free_space(self.path(), notes)?.unwrap_or(u64::MAX);
        let file_bytes = if plan.options.compress { 0 } else { plan.file_bytes().saturating_sub(occupied) };
        // What an earlier run has kept is replaced.
        let kept = self.states_path.metadata().map_or(0, |found| found.blocks() * STAT_BLOCK);
        let scratch = scratch.saturating_sub(kept);
        let needed = file_bytes.saturating_add(scratch);
        let no_space = || ConvertError::NoSpace { path: self.destination.clone(), needed, scratch, available };
        let result = if needed > available {
            Err(no_space())
        } else if plan.options.compress {
            Ok(())
        } else {
            // Of one file, also its tables and metadata.
            let spare = if self.locks.len() == 1 { plan.file_bytes() - plan.layout.ends()[0] } else { 0 };
            let lens = plan.layout.ends().iter().map(|end| end + spare);
            let mut files = self.locks.iter().zip(lens);
            files.try_for_each(|((path, file), len)| match allocate(file, len) {
                Err(e) if e.raw_os_error() == Some(Errno::ENOSPC as i32) => Err(no_space()),
                other => other.map_err(ConvertError::io(path, "allocate its space")),
            })
        };
        if result.is_err() && occupied == 0 {
            // Nothing is lost, and empty files would only puzzle.
            self.locks.iter().for_each(|(path, _)| drop(fs::remove_file(path)));
        }
        result
    }

    /// Whether the bytes of an extent that an earlier run has written are still those of its checksum. What cannot be read is
    /// not.
    pub(crate) fn is_intact(&self, extent: &ExtentRecord) -> bool {
        let Some((_, file)) = self.locks.get(usize::from(extent.volume)) else { return false };
        let mut hash = Xxh3::new();
        let mut buffer = vec![0; PIECE.min(extent.stored_len as usize)];
        let mut done = 0;
        while done < extent.stored_len {
            let piece = &mut buffer[..PIECE.min((extent.stored_len - done) as usize)];
            if file.read_exact_at(piece, extent.offset + done).is_err() {
                return false;
            }
            hash.update(piece);
            done += piece.len() as u64;
        }
        hash.digest() == extent.checksum
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
        let Partial { destination, journal_path, states_path, writer, locks } = self;
        let syncer = writer.syncer().clone();
        let (model_id, lens) = writer.finish(written, &plan.records, metadata)?;
        let files = targets(&destination, lens.len());
        for target in &files {
            refuse_existing(target, plan.options.overwrite, source_of(plan))?;
        }
        if let ([first, _, ..], true) = (&files[..], plan.options.overwrite) {
            // The first of the old volumes would not fit the new ones.
            match fs::remove_file(first) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(ConvertError::io(first, "replace it")(e)),
                _ => {}
            }
        }
        for ((path, lock), target) in locks.iter().zip(&files).rev() {
            publish(lock, path, target)?;
        }
        // Compressed, the model may have fewer volumes than before.
        for (path, _) in &locks[files.len()..] {
            fs::remove_file(path).map_err(ConvertError::io(path, "remove it"))?;
        }
        let folder = folder_of(&destination);
        syncer.folder(folder).map_err(ConvertError::io(folder, "sync the folder"))?;
        states::remove(&states_path)?;
        match fs::remove_file(&journal_path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(ConvertError::io(&journal_path, "remove the journal")(e))
            }
            _ => Ok(Published { model_id, file_bytes: lens.iter().sum(), files }),
        }
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

pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
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
