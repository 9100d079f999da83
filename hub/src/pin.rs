//! Records the commit of an interrupted download, and locks the download.

use std::fs::{File, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::HubError;
use crate::pieces::{refuse_strange, remove};
use crate::snapshot::is_commit;

/// Longest such file that is read.
const LONGEST: u64 = 64 << 10;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Content {
    repo: String,
    revision: String,
    commit: String,
}

/// The file that says to which commit the files of a folder belong. As long as this value lives, no other process
/// downloads to the same place.
#[derive(Debug)]
pub(crate) struct Pin {
    path: PathBuf,
    file: File,
}

impl Pin {
    /// Opens and locks the file at `path`; returns it with the commit of the download that was interrupted, if one was.
    pub(crate) fn open(path: &Path, repo: &str, revision: &str) -> Result<(Self, Option<String>), HubError> {
        let file = locked(path)?;
        let mut bytes = Vec::new();
        (&file).take(LONGEST).read_to_end(&mut bytes).map_err(HubError::io(path, "read it"))?;
        let pin = Pin { path: path.to_owned(), file };
        // The remains after a power cut say nothing.
        let found = serde_json::from_slice::<Content>(&bytes).ok().filter(|found| is_commit(&found.commit));
        let Some(found) = found else { return Ok((pin, None)) };
        if found.repo != repo {
            return Err(HubError::InTheWay {
                path: path.to_owned(),
                problem: format!(
                    "an interrupted download of {} is here. Finish or remove it, or download {repo} to another folder",
                    found.repo
                ),
            });
        }
        Ok((pin, Some(found.commit).filter(|_| found.revision == revision)))
    }

    /// Opens the file at `path` if an interrupted download has left one; returns it with the commit.
    pub(crate) fn of_interrupted(
        path: &Path,
        repo: &str,
        revision: &str,
    ) -> Result<(Option<Self>, Option<String>), HubError> {
        if !path.exists() {
            return Ok((None, None));
        }
        Self::open(path, repo, revision).map(|(pin, commit)| (Some(pin), commit))
    }

    /// Notes the commit.
    pub(crate) fn set(&mut self, repo: &str, revision: &str, commit: &str) -> Result<(), HubError> {
        let content = Content { repo: repo.to_owned(), revision: revision.to_owned(), commit: commit.to_owned() };
        let json = serde_json::to_vec_pretty(&content).expect("plain data always serialises");
        let write = |file: &mut File| {
            file.rewind()?;
            file.set_len(0)?;
            file.write_all(&json)?;
            file.sync_data()
        };
        write(&mut self.file).map_err(HubError::io(&self.path, "write it"))
    }

    /// The download is complete.
    pub(crate) fn remove(self) -> Result<(), HubError> {
        remove(&self.path)
    }
}

/// Opens and locks a file, which is created if it does not exist.
fn locked(path: &Path) -> Result<File, HubError> {
    loop {
        refuse_strange(path)?;
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.map_err(HubError::io(path, "create it"))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => return Err(HubError::Locked { path: path.to_owned() }),
            // On a filesystem without locks, the user has to take care.
            Err(TryLockError::Error(_)) | Ok(()) => {}
        }
        // Another process may have completed its download, and removed the file, since it was opened: the name is free again.
        let opened = file.metadata().map_err(HubError::io(path, "look at it"))?;
        if path.metadata().is_ok_and(|named| (named.dev(), named.ino()) == (opened.dev(), opened.ino())) {
            return Ok(file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_stays_with_its_revision_and_its_process() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pin");
        let (mut pin, found) = Pin::open(&path, "a/b", "main").unwrap();
        assert_eq!(found, None);
        let commit = "c0".repeat(20);
        pin.set("a/b", "main", "../../etc").unwrap();
        pin.set("a/b", "main", &commit).unwrap();
        assert!(matches!(Pin::open(&path, "a/b", "main"), Err(HubError::Locked { .. })));
        drop(pin);
        assert_eq!(Pin::open(&path, "a/b", "main").unwrap().1, Some(commit));
        assert_eq!(Pin::open(&path, "a/b", "v2").unwrap().1, None);
        assert!(matches!(Pin::open(&path, "a/c", "main"), Err(HubError::InTheWay { .. })));
        Pin::open(&path, "a/b", "main").unwrap().0.remove().unwrap();
        assert!(!path.exists());
    }
}
