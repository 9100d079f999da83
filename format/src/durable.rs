//! Makes files and folders durable, as far as the system can: some filesystems, most of them networked or in user space,
//! cannot sync. A file on them is sound all the same until the power fails.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::reader::open_regular;

/// Permissions of a file that others may read, as far as the process allows that.
const READABLE: u32 = 0o666;
/// Permissions of a file that only its owner may read.
const PRIVATE: u32 = 0o600;
/// How many names are tried for a new file beside another one.
const NAMES: usize = 100;

/// Whether a sync failed because the filesystem has none. That data could not be written is another matter (`EIO`,
/// `ENOSPC`).
fn is_unsupported(error: &io::Error) -> bool {
    // ENOSYS and EOPNOTSUPP, and EINVAL, which systems return for a descriptor that cannot be synced.
    matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::InvalidInput)
}

/// Syncs files where the system can, and remembers that it could not.
#[derive(Debug, Default)]
pub struct Syncer {
    refusal: OnceLock<io::Error>,
}

impl Syncer {
    /// Makes a file's content and its state durable.
    ///
    /// # Errors
    /// The operating system's. It is no error if the system cannot sync such a file.
    pub fn all(&self, file: &File) -> io::Result<()> {
        self.tolerate(file.sync_all())
    }

    /// Makes a file's content durable.
    ///
    /// # Errors
    /// As [`Syncer::all`].
    pub fn data(&self, file: &File) -> io::Result<()> {
        self.tolerate(file.sync_data())
    }

    /// Makes the names in a folder durable.
    ///
    /// # Errors
    /// As [`Syncer::all`].
    pub fn folder(&self, folder: &Path) -> io::Result<()> {
        self.all(&File::open(folder)?)
    }

    fn tolerate(&self, result: io::Result<()>) -> io::Result<()> {
        match result {
            Err(e) if is_unsupported(&e) => {
                // The first error is enough.
                let _ = self.refusal.set(e);
                Ok(())
            }
            other => other,
        }
    }

    /// What the system said when it could not sync, if that has happened.
    pub fn refusal(&self) -> Option<&io::Error> {
        self.refusal.get()
    }
}

/// Whether replacing `path` would lose nothing but a file of ours: there is no file, or it is empty, or it begins with `magic`
/// (it may be damaged after that). A link would be replaced, not its target.
///
/// # Errors
/// The operating system's, if the file exists but cannot be read.
pub fn may_replace(path: &Path, magic: &[u8]) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_file() => {}
        Ok(found) => return Ok(found.is_symlink()),
        Err(_) => return Ok(true),
    }
    let mut start = Vec::new();
    open_regular(path)?.take(magic.len() as u64).read_to_end(&mut start)?;
    Ok(start.is_empty() || start == magic)
}

/// Writes a file whole or not at all: first under a temporary name beside `path`, synced if the system can, and then under
/// its name. Other files and links there are left alone; a link at `path` is replaced, not followed.
///
/// # Errors
/// What the filesystem says. `path` is then what it was.
pub fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_file_with(path, |file| file.write_all(bytes))
}

/// As [`replace_file`], for content that is too large to be in memory at once: `write` writes it.
///
/// # Errors
/// What `write` says, or the filesystem. `path` is then what it was.
pub fn replace_file_with<E: From<io::Error>>(
    path: &Path,
    write: impl FnOnce(&mut File) -> Result<(), E>,
) -> Result<(), E> {
    replace_with(path, READABLE, write)
}

/// As [`replace_file_with`], for private content: from its creation, only its owner can read the file. When this returns,
/// the name is durable as well.
///
/// # Errors
/// What `write` says, or the filesystem. If writing has failed, `path` is what it was.
pub fn replace_private_file_with<E: From<io::Error>>(
    path: &Path,
    write: impl FnOnce(&mut File) -> Result<(), E>,
) -> Result<(), E> {
    replace_with(path, PRIVATE, write)?;
    Ok(Syncer::default().folder(folder_of(path))?)
}

fn replace_with<E: From<io::Error>>(
    path: &Path,
    mode: u32,
    write: impl FnOnce(&mut File) -> Result<(), E>,
) -> Result<(), E> {
    let (beside, mut file) = create_beside(path, mode)?;
    let outcome = write(&mut file).and_then(|()| {
        Syncer::default().all(&file)?;
        fs::rename(&beside, path)?;
        Ok(())
    });
    outcome.inspect_err(|_| {
        // The first error, which is being returned, says more than a second one would.
        let _ = fs::remove_file(&beside);
    })
}

/// Removes the leftovers of killed writers beside `path`: files with the names that [`replace_file_with`] uses, which begin
/// with `magic` or are empty, and which no process is writing. Failures are ignored, because nothing depends on it.
pub fn remove_leftovers(path: &Path, magic: &[u8]) {
    let (Some(name), Ok(files)) = (path.file_name(), fs::read_dir(folder_of(path))) else { return };
    for found in files.flatten() {
        let beside = found.path();
        if !found.file_name().as_encoded_bytes().strip_prefix(name.as_encoded_bytes()).is_some_and(is_besides) {
            continue;
        }
        let is_file = fs::symlink_metadata(&beside).is_ok_and(|found| found.is_file());
        // A process that writes the file has locked it. Without locks, this cannot be known.
        let idle = |file: File| file.try_lock().is_ok();
        if is_file && may_replace(&beside, magic).is_ok_and(|ours| ours) && open_regular(&beside).is_ok_and(idle) {
            let _ = fs::remove_file(&beside);
        }
    }
}

/// Whether this is the suffix that [`create_beside`] appends to a name: `.PID-N`.
fn is_besides(suffix: &[u8]) -> bool {
    let number = |bytes: &[u8]| !bytes.is_empty() && bytes.iter().all(u8::is_ascii_digit);
    let mut parts = suffix.strip_prefix(b".").unwrap_or_default().splitn(2, |&byte| byte == b'-');
    parts.next().is_some_and(number) && parts.next().is_some_and(number)
}

/// The folder that a path is in.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Creates a file in the folder of `path`, with at most these permissions, and locks it if that is possible; returns
/// it with its path.
fn create_beside(path: &Path, mode: u32) -> io::Result<(PathBuf, File)> {
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(format!(".{}", std::process::id()));
    for number in 0..NAMES {
        let mut name = name.clone();
        name.push(format!("-{number}"));
        let beside = path.with_file_name(name);
        // If the name is taken, that is somebody's file, or a trap: `create_new` does not follow links.
        match File::options().write(true).create_new(true).mode(mode).open(&beside) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            file => {
                let file = file?;
                // The lock keeps other processes from taking the file for a leftover. Where files cannot be locked,
                // they remove none.
                let _ = file.try_lock();
                return Ok((beside, file));
            }
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_synced_is_told_from_what_was_lost() {
        let syncer = Syncer::default();
        for errno in [22, 95, 38] {
            let unsupported = io::Error::from_raw_os_error(errno);
            // Error numbers differ between systems, so this compares kinds.
            if is_unsupported(&unsupported) {
                syncer.tolerate(Err(unsupported)).unwrap();
            }
        }
        assert_eq!(syncer.refusal().map(io::Error::kind), Some(io::ErrorKind::InvalidInput));
        for errno in [5, 28] {
            let lost = syncer.tolerate(Err(io::Error::from_raw_os_error(errno)));
            assert_eq!(lost.unwrap_err().raw_os_error(), Some(errno));
        }
    }

    #[test]
    fn a_file_is_replaced_and_its_neighbours_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let trap = folder.path().join(format!("f.{}-0", std::process::id()));
        fs::write(folder.path().join("precious"), "precious").unwrap();
        std::os::unix::fs::symlink("precious", &trap).unwrap();
        for content in ["one", "two"] {
            replace_file(&path, content.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
        assert_eq!(fs::read_to_string(folder.path().join("precious")).unwrap(), "precious");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3, "nothing is left beside it");
        let failed =
            replace_file_with(&path, |file| file.write_all(b"half").and(Err(io::ErrorKind::StorageFull.into())));
        assert_eq!(failed.map_err(|e: io::Error| e.kind()), Err(io::ErrorKind::StorageFull));
        assert_eq!(fs::read_to_string(&path).unwrap(), "two", "what was being written did not take its place");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3, "nothing is left beside it");
        assert!(replace_file(&folder.path().join("missing/f"), b"x").is_err());
        assert!(replace_file(Path::new("/"), b"x").is_err());
    }
}
