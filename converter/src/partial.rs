//! The partial file: opened, locked, given its space, resumed or begun anew, and in the end given its name.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statvfs::statvfs;
use sluice_format::{FileWriter, MAGIC, ModelId};

use crate::error::ConvertError;
use crate::journal::{Found, Identity, Journal};
use crate::pack::Outcome;
use crate::plan::Plan;

/// Unit of `st_blocks`, whatever the file system's blocks are.
const STAT_BLOCK: u64 = 512;

/// A partial file, exclusively ours.
pub(crate) struct Partial {
    destination: PathBuf,
    pub(crate) path: PathBuf,
    journal_path: PathBuf,
    pub(crate) writer: FileWriter,
    /// Holds the lock until the file has its name: a duplicate keeps the lock when the writer closes its own.
    lock: File,
}

/// What opening found.
pub(crate) struct Opened {
    pub(crate) partial: Partial,
    pub(crate) journal: Journal,
    /// Extents that an earlier run finished.
    pub(crate) done: Vec<Outcome>,
    /// Whether an earlier run's work was thrown away because it followed another plan.
    pub(crate) restarted: bool,
}

/// `path` with something behind its name.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// What the journal of a conversion by this plan belongs to.
pub(crate) fn identity(plan: &Plan) -> Identity {
    Identity { plan_hash: plan.hash, tensors_per_extent: plan.tensors_per_extent(), extents: plan.extents.len() }
}

/// Opens the partial file for `destination`. When this returns, its space is allocated and its journal exists.
pub(crate) fn open(destination: &Path, plan: &Plan) -> Result<Opened, ConvertError> {
    refuse_existing(destination, plan.options.overwrite, Some(&plan.checkpoint.dir))?;
    let path = with_suffix(destination, ".partial");
    let journal_path = with_suffix(destination, ".partial.journal");
    let (writer, lock) = lock(&path, plan)?;
    // Another conversion may have finished while this one waited to open the file.
    refuse_existing(destination, plan.options.overwrite, Some(&plan.checkpoint.dir))?;
    let partial = Partial { destination: destination.to_owned(), path, journal_path, writer, lock };
    let identity = identity(plan);
    let journal_io = |action| ConvertError::io(&partial.journal_path, action);
    let found = Journal::open(&partial.journal_path, identity).map_err(journal_io("read the journal"))?;
    // A journal speaks only of a file that has all its space, because it is created after it.
    let complete = partial.stat()?.len() >= plan.layout.extents_end();
    let (resumed, restarted) = match found {
        Found::Same { journal, outcomes } if complete => (Some((journal, outcomes)), false),
        Found::OtherPlan => (None, true),
        _ => (None, false),
    };
    if resumed.is_none() {
        partial.clear()?;
    }
    partial.reserve(plan)?;
    let (journal, done) = match resumed {
        Some(resumed) => resumed,
        None => {
            let journal = Journal::create(&partial.journal_path, identity);
            (journal.map_err(journal_io("create the journal"))?, Vec::new())
        }
    };
    Ok(Opened { partial, journal, done, restarted })
}

/// Whether a finished file may take the place of what is at `destination`, if anything is: not of a folder or a device, and
/// not of a file in `source`, the folder of the checkpoint, unless that is a model file of ours.
pub(crate) fn refuse_existing(destination: &Path, overwrite: bool, source: Option<&Path>) -> Result<(), ConvertError> {
    let Ok(found) = destination.symlink_metadata() else { return Ok(()) };
    let path = destination.to_owned();
    if !overwrite {
        return Err(ConvertError::Exists { path });
    }
    let is_found = |entry: io::Result<fs::DirEntry>| {
        let read = entry.and_then(|entry| fs::metadata(entry.path()));
        read.is_ok_and(|read| (read.dev(), read.ino()) == (found.dev(), found.ino()))
    };
    let is_read = || source.and_then(|folder| fs::read_dir(folder).ok()).is_some_and(|mut all| all.any(is_found));
    let is_ours = || {
        let mut magic = [0; MAGIC.len()];
        File::open(destination).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == MAGIC
    };
    if !found.is_file() || (is_read() && !is_ours()) { Err(ConvertError::NotReplaced { path }) } else { Ok(()) }
}

/// Opens and locks the partial file. The lock belongs to the open file and vanishes with the process, however it ends.
fn lock(path: &Path, plan: &Plan) -> Result<(FileWriter, File), ConvertError> {
    let writer = FileWriter::open(path, plan.layout.clone())?;
    let lock = lock_file(path, &writer)?;
    Ok((writer, lock))
}

/// Locks the partial file at `path` that `writer` has opened; the lock is held as long as what this returns.
pub(crate) fn lock_file(path: &Path, writer: &FileWriter) -> Result<File, ConvertError> {
    let file = writer.file().try_clone().map_err(ConvertError::io(path, "open it"))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(ConvertError::Locked { path: path.to_owned() }),
        Err(TryLockError::Error(e)) => return Err(ConvertError::io(path, "lock it")(e)),
    }
    // Between opening and locking, its owner may have finished and renamed it: then this is somebody's finished file.
    let ours = file.metadata().map_err(ConvertError::io(path, "read its state"))?;
    match fs::metadata(path) {
        Ok(named) if (named.dev(), named.ino()) == (ours.dev(), ours.ino()) => Ok(file),
        _ => Err(ConvertError::Locked { path: path.to_owned() }),
    }
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
            Ok(()) => sync_folder(&self.path)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(ConvertError::io(&self.journal_path, "remove the journal")(e)),
        }
        self.lock.set_len(0).map_err(self.io("empty it"))
    }

    /// Checks that the drive has room and takes it.
    fn reserve(&self, plan: &Plan) -> Result<(), ConvertError> {
        let occupied = self.stat()?.blocks() * STAT_BLOCK;
        let available = free_space(&self.path)?;
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

    /// Writes tables and superblock and gives the file its name.
    pub(crate) fn finish(
        self,
        plan: &Plan,
        checksums: &[u64],
        provenance: Vec<u8>,
    ) -> Result<(ModelId, u64), ConvertError> {
        let id = self.writer.finish(checksums, &plan.records, &plan.metadata(provenance))?;
        let len = self.lock.metadata().map_err(ConvertError::io(&self.path, "read its length"))?.len();
        fs::rename(&self.path, &self.destination).map_err(ConvertError::io(&self.path, "rename it"))?;
        sync_folder(&self.destination)?;
        fs::remove_file(&self.journal_path).map_err(ConvertError::io(&self.journal_path, "remove the journal"))?;
        drop(self.lock);
        Ok((id, len))
    }
}

/// Bytes that are free on the drive of `path`.
fn free_space(path: &Path) -> Result<u64, ConvertError> {
    let folder = folder_of(path);
    let stats = statvfs(folder).map_err(|e| ConvertError::io(folder, "read the free space of")(e.into()))?;
    // The field types differ between systems.
    #[allow(clippy::unnecessary_cast)]
    Ok(stats.blocks_available() as u64 * stats.fragment_size() as u64)
}

/// Refuses to begin a file of `needed` bytes at `path` where they are not free.
pub(crate) fn check_space(path: &Path, needed: u64) -> Result<(), ConvertError> {
    let available = free_space(path)?;
    if needed > available {
        return Err(ConvertError::NoSpace { path: path.to_owned(), needed, available });
    }
    Ok(())
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes the names in the folder of `path` durable.
pub(crate) fn sync_folder(path: &Path) -> Result<(), ConvertError> {
    let folder = folder_of(path);
    let result = File::open(folder).and_then(|f| f.sync_all());
    result.map_err(ConvertError::io(folder, "sync the folder"))
}

/// Allocates blocks where the file system can, so that the drive cannot fill up halfway; else sets the length.
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
