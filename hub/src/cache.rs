//! The cache of the hub's own programs. Files that they have already downloaded are read there instead of being downloaded again.
//! This module never writes to the cache or removes anything from it.
//!
//! `huggingface_hub` lays it out like this: `models--OWNER--NAME/refs/REVISION` holds a commit, and
//! `models--OWNER--NAME/snapshots/COMMIT/` the files of a commit, as links to `models--OWNER--NAME/blobs/DIGEST`. It has only files
//! that somebody has asked for.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use sluice_format::open_regular;

use crate::digest::Digest;
use crate::error::HubError;
use crate::name::stays_inside;
use crate::snapshot::{MOST_FILES, RemoteFile, is_commit};

/// How many levels of folders are searched.
const DEEPEST: usize = 16;

/// The folder that the cache in `cache` has for a repository.
#[derive(Debug)]
pub(crate) struct Cached {
    folder: PathBuf,
}

impl Cached {
    pub(crate) fn new(cache: &Path, repo: &str) -> Self {
        Cached { folder: cache.join(format!("models--{}", repo.replace('/', "--"))) }
    }

    /// The commit that a revision had when it was last asked for.
    pub(crate) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let path = Some(self.folder.join("refs").join(revision)).filter(|_| stays_inside(revision))?;
        let mut text = String::new();
        open_regular(&path).ok()?.take(256).read_to_string(&mut text).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// The folder with files of a commit; `None` if there is none.
    pub(crate) fn snapshot(&self, commit: &str) -> Option<PathBuf> {
        let folder = Some(self.folder.join("snapshots").join(commit)).filter(|_| is_commit(commit))?;
        folder.is_dir().then_some(folder)
    }
}

/// The files in the folder of a commit. The names of the blobs to which they link say what they should hold.
///
/// # Errors
/// [`HubError::Io`].
pub(crate) fn listing(folder: &Path) -> Result<Vec<RemoteFile>, HubError> {
    let mut files = Vec::new();
    let mut folders = vec![(String::new(), 0)];
    while let Some((below, depth)) = folders.pop() {
        let path = folder.join(&below);
        for entry in fs::read_dir(&path).map_err(HubError::io(&path, "list it"))? {
            let entry = entry.map_err(HubError::io(&path, "list it"))?;
            // All names on the hub are UTF-8.
            let Ok(name) = entry.file_name().into_string() else { continue };
            let name = if below.is_empty() { name } else { format!("{below}/{name}") };
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) && depth < DEEPEST {
                folders.push((name, depth + 1));
            } else if let Ok(found) = entry.path().metadata()
                && found.is_file()
            {
                let link = fs::read_link(entry.path()).unwrap_or_default();
                let digest = link.file_name().and_then(|blob| Digest::parse(blob.to_str()?));
                files.push(RemoteFile { path: name, size: found.len(), digest: digest.unwrap_or(Digest::Unstated) });
            }
        }
        if files.len() + folders.len() > MOST_FILES {
            return Ok(files);
        }
    }
    Ok(files)
}

/// Opens a file in the folder of a commit, if it exists and has the right length.
pub(crate) fn open(folder: &Path, file: &RemoteFile) -> Option<(PathBuf, File)> {
    let path = Some(folder.join(&file.path)).filter(|_| stays_inside(&file.path))?;
    let found = open_regular(&path).ok()?;
    (found.metadata().ok()?.len() == file.size).then_some((path, found))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_the_hub_s_programs_have_left_is_found() {
        let cache = tempfile::tempdir().unwrap();
        let (commit, sha256, git) = ("c".repeat(40), "a".repeat(64), "b".repeat(40));
        let repo = cache.path().join("models--a--b");
        let snapshot = repo.join("snapshots").join(&commit);
        fs::create_dir_all(snapshot.join("sub")).unwrap();
        fs::create_dir_all(repo.join("blobs")).unwrap();
        fs::create_dir_all(repo.join("refs/refs/pr")).unwrap();
        for (revision, commit) in [("main", commit.as_str()), ("refs/pr/1", &commit), ("broken", "../../etc")] {
            fs::write(repo.join("refs").join(revision), format!("{commit}\n")).unwrap();
        }
        for (blob, content) in [(&sha256, "weights"), (&git, "{}")] {
            fs::write(repo.join("blobs").join(blob), content).unwrap();
        }
        symlink(format!("../../../blobs/{sha256}"), snapshot.join("sub/w.gguf")).unwrap();
        symlink(format!("../../blobs/{git}"), snapshot.join("config.json")).unwrap();
        symlink("../../blobs/gone", snapshot.join("gone.json")).unwrap();
        symlink(cache.path(), snapshot.join("round")).unwrap();
        fs::write(snapshot.join("plain.txt"), "x").unwrap();

        let cached = Cached::new(cache.path(), "a/b");
        assert_eq!(cached.commit("main"), Some(commit.clone()));
        assert_eq!(cached.commit("refs/pr/1"), Some(commit.clone()));
        assert_eq!(cached.commit(&commit), Some(commit.clone()));
        for revision in ["broken", "v1", "../refs/main", "refs"] {
            assert_eq!(cached.commit(revision), None, "{revision}");
        }
        assert_eq!(cached.snapshot(&"d".repeat(40)), None);
        assert_eq!(cached.snapshot("../../.."), None);
        let folder = cached.snapshot(&commit).unwrap();
        let mut files = listing(&folder).unwrap();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let of = |path: &str, size, digest: Option<&str>| RemoteFile {
            path: path.into(),
            size,
            digest: digest.map_or(Digest::Unstated, |text| Digest::parse(text).unwrap()),
        };
        let want = [of("config.json", 2, Some(&git)), of("plain.txt", 1, None), of("sub/w.gguf", 7, Some(&sha256))];
        assert_eq!(files, want);
        assert!(want.iter().all(|file| open(&folder, file).is_some()));
        for other in [of("config.json", 3, None), of("sub", 1, None), of("../../refs/main", 41, None)] {
            assert!(open(&folder, &other).is_none(), "{}", other.path);
        }
    }
}
