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
use sluice_format::{ExtentRecord, FileWriter, MAGIC, Metadata, ModelId};

use crate::error::ConvertError;
use crate::journal::{Found, Identity, Journal, is_journal, may_be_journal};
use crate::plan::Plan;

/// Unit of `st_blocks`, whatever the filesystem's blocks are.
const STAT_BLOCK: u64 = 512;
/// Bytes read at once of an extent that an earlier run has written.
const PIECE: usize = 1 << 20;

/// A partial file, exclusively ours.
pub(crate) struct Partial {
    destination: PathBuf,
    pub(crate) path: PathBuf,
    pub(crate) journal_path: PathBuf,
    pub(crate) writer: FileWriter,
    /// Holds the lock until the file has its name: a duplicate keeps the lock when the writer closes its own.
    lock: File,
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

/// Opens the partial file for `destination`, gives it its space, and reads its journal.
pub(crate) fn open(destination: &Path, plan: &Plan) -> Result<Opened, ConvertError> {
    let source = plan.checkpoint.source().folder();
    refuse_existing(destination, plan.options.overwrite, source)?;
    let path = with_suffix(destination, ".partial");
    let journal_path = with_suffix(destination, ".partial.journal");
    // First, so that nothing is left behind where it is in the way.
    if open_own(&journal_path, false)?.is_some() && !may_be_journal(&journal_path) {
        let problem = "it is not what a conversion leaves when it is interrupted";
        return Err(ConvertError::InTheWay { path: journal_path, problem });
    }
    let mut notes = Vec::new();
    let lock = claim(&path, &journal_path, &mut notes)?;
    // Another conversion may have finished while this one waited to open the file.
    refuse_existing(destination, plan.options.overwrite, source)?;
    let identity = identity(plan);
    let found = Journal::open(&journal_path, identity)?;
    let file = lock.try_clone().map_err(ConvertError::io(&path, "open it"))?;
    let writer = FileWriter::of_file(&path, file, plan.layout.clone())?;
    let partial = Partial { destination: destination.to_owned(), path, journal_path, writer, lock };
    if !matches!(found, Found::Same { .. }) {
        partial.clear()?;
    }
    partial.reserve(plan, &mut notes)?;
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
    fn io(&self, action: &'static str) -> impl FnOnce(io::Error) -> ConvertError {
        ConvertError::io(&self.path, action)
    }

    fn stat(&self) -> Result<fs::Metadata, ConvertError> {
        self.lock.metadata().map_err(self.io("read its state"))
    }

    /// Empties the file. The journal goes first, and for good: were it to come back after a power cut, it would vouch for
    /// data that no longer exist.
    fn clear(&self) -> Result<(), ConvertError> {
        match fs::remove_file(&self.journal_path) {
            Ok(()) => self.sync_folder()?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(ConvertError::io(&self.journal_path, "remove the journal")(e)),
        }
        self.lock.set_len(0).map_err(self.io("empty it"))
    }

    /// Checks that the drive has room and takes it.
    fn reserve(&self, plan: &Plan, notes: &mut Vec<String>) -> Result<(), ConvertError> {
        let occupied = self.stat()?.blocks() * STAT_BLOCK;
        let available = free_space(&self.path, notes)?.unwrap_or(u64::MAX);
        let needed = plan.file_bytes().saturating_sub(occupied);
        let no_space = || ConvertError::NoSpace { path: self.destination.clone(), needed, available };
        let result = if needed > available {
            Err(no_space())
        } else {
            match allocate(&self.lock, plan.file_bytes()) {
                Err(e) if e.raw_os_error() == Some(Errno::ENOSPC as i32) => Err(no_space()),
                other => other.map_err(self.io("allocate its space")),
            }
        };
        if result.is_err() && occupied == 0 {
            // Nothing is lost, and an empty file would only puzzle.
            let _ = fs::remove_file(&self.path);
        }
        result
    }

    /// Whether the bytes of an extent that an earlier run has written are still those of its checksum. What cannot be read is
    /// not.
    pub(crate) fn is_intact(&self, extent: &ExtentRecord, checksum: u64) -> bool {
        let mut hash = Xxh3::new();
        let mut buffer = vec![0; PIECE.min(extent.stored_len as usize)];
        let mut done = 0;
        while done < extent.stored_len {
            let piece = &mut buffer[..PIECE.min((extent.stored_len - done) as usize)];
            if self.lock.read_exact_at(piece, extent.offset + done).is_err() {
                return false;
            }
            hash.update(piece);
            done += piece.len() as u64;
        }
        hash.digest() == checksum
    }

    fn sync_folder(&self) -> Result<(), ConvertError> {
        let folder = folder_of(&self.path);
        self.writer.syncer().folder(folder).map_err(ConvertError::io(folder, "sync the folder"))
    }

    /// Writes tables and superblock and gives the file its name; returns its id and its length.
    pub(crate) fn finish(
        self,
        plan: &Plan,
        checksums: &[u64],
        metadata: &Metadata,
    ) -> Result<(ModelId, u64), ConvertError> {
        let Partial { destination, path, journal_path, writer, lock } = self;
        let syncer = writer.syncer().clone();
        let id = writer.finish(checksums, &plan.records, metadata)?;
        let len = lock.metadata().map_err(ConvertError::io(&path, "read its length"))?.len();
        refuse_existing(&destination, plan.options.overwrite, plan.checkpoint.source().folder())?;
        publish(&lock, &path, &destination)?;
        let folder = folder_of(&destination);
        syncer.folder(folder).map_err(ConvertError::io(folder, "sync the folder"))?;
        match fs::remove_file(&journal_path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(ConvertError::io(&journal_path, "remove the journal")(e))
            }
            _ => Ok((id, len)),
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
            Err(ConvertError::NoSpace { path: path.to_owned(), needed, available })
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
