//! The folder: its lock, its files, and the list of uses.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, Metadata, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sluice_format::{Syncer, open_no_link, replace_private_file_with};
use sluice_model::Sequence;
use sluice_model::session::{SESSION_MAGIC, SessionError, peek_file};

use crate::StoreError;
use crate::name::{FileName, LOCK, SegmentId, USES};
use crate::tree::{History, Segment};

/// The longest list of uses that is read, in bytes.
const USES_MAX: u64 = 64 << 20;

/// A folder that is locked by this process.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    /// Unlocked when it is dropped.
    _lock: File,
}

/// A file of a session that cannot be used.
#[derive(Clone, Debug)]
pub(crate) struct Unusable {
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    pub(crate) modified: SystemTime,
}

/// What a folder has.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    /// Segments in ascending order of their first token, and when they were written.
    pub(crate) segments: Vec<(Segment, SystemTime)>,
    pub(crate) unusable: Vec<Unusable>,
}

/// A line of the list of uses.
#[derive(Debug, Serialize, Deserialize)]
struct Use {
    /// Seconds since 1970.
    created: u64,
    used: u64,
    uses: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    title: Option<String>,
}

/// The list of uses, by ids.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Uses {
    sessions: BTreeMap<String, Use>,
}

impl Uses {
    pub(crate) fn add(&mut self, id: SegmentId, history: &History) {
        let History { created, used, uses, title } = history;
        let (created, used, title) = (seconds(*created), seconds(*used), title.clone());
        self.sessions.insert(id.to_string(), Use { created, used, uses: *uses, title });
    }

    /// The known uses of a segment that was written at that time.
    pub(crate) fn take(&mut self, id: SegmentId, written: SystemTime) -> History {
        match self.sessions.remove(&id.to_string()) {
            // A time in the future, from a clock that was wrong, must not keep a session for ever.
            Some(known) => History {
                created: time(known.created).min(SystemTime::now()),
                used: time(known.used).min(SystemTime::now()),
                uses: known.uses,
                title: known.title.as_deref().map(title_of),
            },
            None => History { created: written, used: written, uses: 0, title: None },
        }
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn time(seconds: u64) -> SystemTime {
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or(UNIX_EPOCH)
}

/// Shortens a title to one line of at most 200 characters.
pub(crate) fn title_of(title: &str) -> String {
    title.chars().take(200).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Bytes on the drive, as the filesystem counts them.
fn bytes_of(found: &Metadata) -> u64 {
    found.blocks().saturating_mul(512)
}

impl Folder {
    /// Opens the folder, or makes it, and locks it.
    ///
    /// # Errors
    /// [`StoreError::Folder`], [`StoreError::Busy`], [`StoreError::Lock`].
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let folder = || path.to_owned();
        let failed = |source| StoreError::Folder { folder: folder(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
        // A relative name may mean another folder later.
        let path = path.canonicalize().map_err(failed)?;
        let name = path.join(LOCK);
        let made = File::options().write(true).create_new(true).mode(0o600).open(&name);
        let lock = match made {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => open_no_link(&name),
            made => made,
        };
        let lock = lock.map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => Ok(Folder { path, _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(StoreError::Busy { folder: folder() }),
            Err(TryLockError::Error(source)) => Err(StoreError::Lock { folder: folder(), source }),
        }
    }

    /// The file of a segment.
    pub(crate) fn file(&self, id: SegmentId) -> PathBuf {
        self.path.join(id.file_name())
    }

    /// Looks at all files, and removes the leftovers of killed writers. One that is whole, because its writer was killed while it waited for the
    /// drive, gets its name instead.
    ///
    /// # Errors
    /// [`StoreError::Folder`] if the folder cannot be read. A faulty file is no error.
    pub(crate) fn scan(&self) -> Result<Scan, StoreError> {
        let failed = |source| StoreError::Folder { folder: self.path.clone(), source };
        let mut scan = Scan::default();
        // All at once: a file that gets another name meanwhile might come twice.
        let entries: Vec<fs::DirEntry> = fs::read_dir(&self.path).and_then(Iterator::collect).map_err(failed)?;
        for entry in entries {
            let (name, path) = (entry.file_name(), entry.path());
            // Links are foreign files as well.
            let Some(found) = fs::symlink_metadata(&path).ok().filter(Metadata::is_file) else { continue };
            match FileName::of(&name.to_string_lossy()) {
                FileName::Segment(id) => self.look_at(id, &path, &found, &mut scan),
                FileName::Unfinished(Some(id)) if self.finish(id, &path) => {
                    let path = self.file(id);
                    if let Ok(found) = fs::symlink_metadata(&path) {
                        self.look_at(id, &path, &found, &mut scan);
                    }
                }
                FileName::Unfinished(_) if begins_like_ours(&path) => drop(fs::remove_file(&path)),
                FileName::Unfinished(_) | FileName::Foreign => {}
            }
        }
        scan.segments.sort_by_key(|(segment, _)| (segment.info.start, segment.id));
        Ok(scan)
    }

    /// Finishes what a killed writer has written as a whole: syncs it, and gives it its name, which nothing has yet. The parts that are not
    /// looked at have checksums, which are compared when they are restored. False if it is to be removed.
    fn finish(&self, id: SegmentId, path: &Path) -> bool {
        let name = self.file(id);
        let Ok(mut file) = open_no_link(path) else { return false };
        let is_whole = peek_file(&mut file, path).is_ok_and(|info| Segment::new(info, 0).id == id);
        let syncer = Syncer::default();
        let finished = is_whole
            && fs::symlink_metadata(&name).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
            && syncer.all(&file).is_ok()
            && fs::rename(path, &name).is_ok();
        if finished {
            // The name is used now; if a crash takes it, the text is computed again.
            let _ = syncer.folder(&self.path);
        }
        finished
    }

    fn look_at(&self, id: SegmentId, path: &Path, found: &Metadata, scan: &mut Scan) {
        let modified = found.modified().unwrap_or(UNIX_EPOCH).min(SystemTime::now());
        let bytes = bytes_of(found);
        let open = |source| SessionError::Open { path: path.to_owned(), source };
        let info = open_no_link(path).map_err(open).and_then(|mut file| peek_file(&mut file, path));
        match info.map(|info| Segment::new(info, bytes)) {
            Ok(segment) if segment.id == id => scan.segments.push((segment, modified)),
            // A file of another program, which only has such a name.
            Err(SessionError::NotASession { .. }) if found.len() > 0 => {}
            _ => scan.unusable.push(Unusable { path: path.to_owned(), bytes, modified }),
        }
    }

    /// A segment that cannot be used.
    pub(crate) fn unusable(&self, segment: &Segment, modified: SystemTime) -> Unusable {
        Unusable { path: self.file(segment.id), bytes: segment.bytes, modified }
    }

    /// Writes a segment, and reads back what it needs to know of the file.
    ///
    /// # Errors
    /// [`StoreError::Session`] and [`StoreError::File`].
    pub(crate) fn write(&self, id: SegmentId, sequence: &Sequence, start: usize) -> Result<Segment, StoreError> {
        let path = self.file(id);
        sequence.save_file_from(&path, start)?;
        let failed = |source| StoreError::File { path: path.clone(), source };
        let mut file = open_no_link(&path).map_err(failed)?;
        let info = peek_file(&mut file, &path)?;
        Ok(Segment::new(info, bytes_of(&file.metadata().map_err(failed)?)))
    }

    /// Removes a file of the folder. It is no error if the file does not exist.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub(crate) fn remove(&self, path: &Path) -> Result<(), StoreError> {
        match fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::File { path: path.to_owned(), source })
            }
            _ => Ok(()),
        }
    }

    /// Removes the list of uses, the file that is locked, and the folder, if nothing else is in it.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub(crate) fn remove_all(&self) -> Result<(), StoreError> {
        [USES, LOCK].into_iter().try_for_each(|name| self.remove(&self.path.join(name)))?;
        // What else is in it belongs to somebody.
        let _ = fs::remove_dir(&self.path);
        Ok(())
    }

    /// Reads the list of uses, which is empty if the file is damaged or missing.
    pub(crate) fn read_uses(&self) -> Uses {
        let mut bytes = Vec::new();
        let read = open_no_link(&self.path.join(USES)).and_then(|file| file.take(USES_MAX).read_to_end(&mut bytes));
        read.ok().and_then(|_| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
    }

    /// Writes the list of uses.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub(crate) fn write_uses(&self, uses: &Uses) -> Result<(), StoreError> {
        let path = self.path.join(USES);
        let failed = |source| StoreError::File { path: path.clone(), source };
        let bytes = serde_json::to_vec(uses).map_err(|error| failed(error.into()))?;
        replace_private_file_with(&path, |file| file.write_all(&bytes)).map_err(failed)
    }
}

/// Whether a file that was being written is one of ours: empty, a session, or a list of uses.
fn begins_like_ours(path: &Path) -> bool {
    let mut start = Vec::new();
    let read = open_no_link(path).and_then(|file| file.take(SESSION_MAGIC.len() as u64).read_to_end(&mut start));
    let begins = |magic: &[u8]| magic.iter().zip(&start).all(|(wanted, found)| wanted == found);
    read.is_ok() && (begins(&SESSION_MAGIC) || begins(br#"{"sessio"#))
}
