//! What becomes durable, as far as the system can do that: some filesystems, most of them networked or in user space, cannot
//! sync, and a file on them is none the worse for it until the power fails.

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
/// Names that are tried for a new file beside another one.
const NAMES: usize = 100;

/// Whether a sync failed because it does not exist here. Data that could not be written is another matter (`EIO`, `ENOSPC`).
fn is_unsupported(error: &io::Error) -> bool {
    // ENOSYS and EOPNOTSUPP; and EINVAL, which stands for a descriptor that cannot be synced.
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
    /// The operating system's, but that it cannot sync such a file: that is no error.
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
                // The first says it all.
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

/// Whether nothing but a file of ours would be lost by replacing `path`: there is none, or an empty one, or one that begins with
/// `magic`, perhaps damaged behind it. A link is replaced, not what it leads to.
///
/// # Errors
/// The operating system's, when the file is there and cannot be read.
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

/// Writes a file whole or not at all: under a name of its own beside `path`, synced where the system can, and then under its
/// name. What lies under other names there, links too, is left alone; what has the name is replaced, and not followed.
///
/// # Errors
/// What the filesystem says. `path` is then what it was.
pub fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_file_with(path, |file| file.write_all(bytes))
}

/// As [`replace_file`], for what is too large to be in memory at once: `write` writes it.
///
/// # Errors
/// What `write` says, or the filesystem. `path` is then what it was.
pub fn replace_file_with<E: From<io::Error>>(
    path: &Path,
    write: impl FnOnce(&mut File) -> Result<(), E>,
) -> Result<(), E> {
    replace_with(path, READABLE, write)
}

/// As [`replace_file_with`], for what is nobody else's business: from its creation, only its owner can read it. Its name is
/// durable as well when this returns.
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
        // The error that is being returned says more than a second one would.
        let _ = fs::remove_file(&beside);
    })
}

/// Removes what writers that were killed have left beside `path`: files under the names that [`replace_file_with`] takes, which
/// begin with `magic` or are empty, and which nobody is writing. As far as that can be done; nothing depends on it.
pub fn remove_leftovers(path: &Path, magic: &[u8]) {
    let (Some(name), Ok(files)) = (path.file_name(), fs::read_dir(folder_of(path))) else { return };
    for found in files.flatten() {
        let beside = found.path();
        if !found.file_name().as_encoded_bytes().strip_prefix(name.as_encoded_bytes()).is_some_and(is_besides) {
            continue;
        }
        let is_file = fs::symlink_metadata(&beside).is_ok_and(|found| found.is_file());
        // Who writes it has locked it. Where nobody can lock, nobody can tell.
        let idle = |file: File| file.try_lock().is_ok();
        if is_file && may_replace(&beside, magic).is_ok_and(|ours| ours) && open_regular(&beside).is_ok_and(idle) {
            let _ = fs::remove_file(&beside);
        }
    }
}

/// Whether this is what [`create_beside`] appends to a name: `.PID-N`.
fn is_besides(suffix: &[u8]) -> bool {
    let number = |bytes: &[u8]| !bytes.is_empty() && bytes.iter().all(u8::is_ascii_digit);
    let mut parts = suffix.strip_prefix(b".").unwrap_or_default().splitn(2, |&byte| byte == b'-');
    parts.next().is_some_and(number) && parts.next().is_some_and(number)
}

/// The folder that a path is in.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A new file in the folder of `path`, with these permissions at most, locked where it can be, and its path.
fn create_beside(path: &Path, mode: u32) -> io::Result<(PathBuf, File)> {
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(format!(".{}", std::process::id()));
    for number in 0..NAMES {
        let mut name = name.clone();
        name.push(format!("-{number}"));
        let beside = path.with_file_name(name);
        // A name that is taken is somebody's file, or a trap: `create_new` does not follow links.
        match File::options().write(true).create_new(true).mode(mode).open(&beside) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            file => {
                let file = file?;
                // So that nobody takes it for a leftover. Where files cannot be locked, nobody does.
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
            // Numbers differ between systems; the kinds are what counts.
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
