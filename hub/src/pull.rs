//! Downloading a repository to a folder.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::statvfs::statvfs;

use crate::client::Client;
use crate::digest::Digest;
use crate::downloads::{Downloads, Observer, Target, Terms};
use crate::error::HubError;
use crate::name::Reference;
use crate::pieces::with_suffix;
use crate::pin::Pin;
use crate::select::{Filter, to_pull};
use crate::snapshot::{RemoteFile, Snapshot};

/// Requests at the same time.
pub(crate) const CONNECTIONS: usize = 8;
/// Name of the file in a folder that says which commit is being downloaded to it.
pub(crate) const PIN: &str = ".sluice-download";

/// A download that is about to begin: its files, its folder, and its size.
#[derive(Debug)]
pub struct Pull {
    client: Arc<Client>,
    snapshot: Arc<Snapshot>,
    revision: String,
    folder: PathBuf,
    pin: Pin,
    files: Vec<RemoteFile>,
    left_out: Vec<RemoteFile>,
    notes: Vec<String>,
}

impl Pull {
    /// Asks the hub what the repository holds, and prepares the folder. An interrupted download continues with the
    /// commit with which it began.
    ///
    /// # Errors
    /// [`HubError`].
    pub fn prepare(
        client: Arc<Client>,
        reference: &Reference,
        folder: &Path,
        filter: &Filter,
    ) -> Result<Self, HubError> {
        let (path, revision) = (folder.join(PIN), reference.revision().to_owned());
        // Nothing is written before the list of files is known.
        let (pin, pinned) = Pin::of_interrupted(&path, &reference.repo, &revision)?;
        let mut notes = Vec::new();
        let snapshot = pinned_snapshot(&client, reference, pinned.as_deref(), &mut notes)?;
        let (files, left_out) = to_pull(&snapshot, reference, filter)?;
        check_names(&snapshot, &files)?;
        notes.extend(unverified(files.iter().copied()));
        let owned = |files: Vec<&RemoteFile>| -> Vec<RemoteFile> { files.into_iter().cloned().collect() };
        let (files, left_out) = (owned(files), owned(left_out));
        check_space(folder, missing(folder, &files))?;
        fs::create_dir_all(folder).map_err(HubError::io(folder, "create it"))?;
        let mut pin = match pin {
            Some(pin) => pin,
            None => Pin::open(&path, &reference.repo, &revision)?.0,
        };
        pin.set(&reference.repo, &revision, &snapshot.commit)?;
        let snapshot = Arc::new(snapshot);
        Ok(Pull { client, snapshot, revision, folder: folder.to_owned(), pin, files, left_out, notes })
    }

    /// The commit.
    pub fn commit(&self) -> &str {
        &self.snapshot.commit
    }

    /// The branch, tag or commit that was asked for.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// Files that are downloaded.
    pub fn files(&self) -> &[RemoteFile] {
        &self.files
    }

    /// Files that are left out, because the user has not asked for them and a conversion does not need them.
    pub fn left_out(&self) -> &[RemoteFile] {
        &self.left_out
    }

    /// Remarks for the user.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }

    /// Downloads, and verifies files that already exist.
    ///
    /// # Errors
    /// [`HubError`]. The bytes so far stay, and the next attempt continues with them.
    pub fn run(self, observer: Arc<dyn Observer>) -> Result<(), HubError> {
        let target = |(i, file): (usize, &RemoteFile)| Target {
            remote: file.clone(),
            path: self.folder.join(&file.path),
            first: i,
            last: i,
        };
        let targets: Vec<Target> = self.files.iter().enumerate().map(target).collect();
        let count = targets.len();
        let terms = Terms { connections: CONNECTIONS, window: usize::MAX, keep: true, durable: true };
        let downloads = Downloads::start(self.client, self.snapshot, observer, targets, terms);
        for file in 0..count {
            downloads.wait(file)?;
            downloads.release(file);
        }
        drop(downloads);
        self.pin.remove()
    }
}

/// Bytes that the remaining downloads to a folder still take on the drive.
fn missing(folder: &Path, files: &[RemoteFile]) -> u64 {
    let occupied = |file: &RemoteFile| {
        let path = folder.join(&file.path);
        // Pieces arrive in any order, and the gaps between them take no space yet.
        let space = |path: &Path| path.metadata().map_or(0, |m| m.blocks() * 512);
        space(&path).max(space(&with_suffix(&path, ".partial"))).min(file.size)
    };
    files.iter().map(|file| file.size - occupied(file)).sum()
}

/// A remark on files for which the server states no digest.
pub(crate) fn unverified<'f>(files: impl Iterator<Item = &'f RemoteFile>) -> Option<String> {
    let mut without = files.filter(|file| file.digest == Digest::Unstated);
    let first = without.next()?;
    let others = match without.count() {
        0 => String::new(),
        count => format!(" and {count} others"),
    };
    Some(format!("the digest of `{}`{others} is not stated: only the length of what comes can be verified", first.path))
}

/// Refuses names that downloads use for their own files.
fn check_names(snapshot: &Snapshot, files: &[&RemoteFile]) -> Result<(), HubError> {
    let names: BTreeSet<&str> = files.iter().map(|file| file.path.as_str()).collect();
    let is_taken = |name: &&&str| {
        let of = [".partial", ".partial.pieces"].iter().find_map(|ending| name.strip_suffix(ending));
        **name == PIN || of.is_some_and(|of| names.contains(of))
    };
    match names.iter().find(is_taken) {
        Some(name) => Err(HubError::Selection {
            repo: snapshot.repo.clone(),
            problem: format!(
                "a download needs the name of its file `{name}` for itself. Leave it out: --exclude '{name}'"
            ),
        }),
        None => Ok(()),
    }
}

/// What the repository holds at the commit of an interrupted download, or if there is none, now.
pub(crate) fn pinned_snapshot(
    client: &Client,
    reference: &Reference,
    pinned: Option<&str>,
    notes: &mut Vec<String>,
) -> Result<Snapshot, HubError> {
    let Some(commit) = pinned else { return client.snapshot(&reference.repo, reference.revision()) };
    let snapshot = client.snapshot(&reference.repo, commit).map_err(|e| match e {
        HubError::Absent { .. } => HubError::Selection {
            repo: reference.repo.clone(),
            problem: format!(
                "the hub no longer has the commit {} with which this was begun. Remove what has come of it to begin anew",
                short(commit)
            ),
        },
        other => other,
    })?;
    // Only for a message: the download does not depend on it.
    if let Ok(now) = client.commit(&reference.repo, reference.revision())
        && now != commit
    {
        notes.push(format!(
            "`{}` of {} has moved on to {}; this goes on with {}, with which it was begun",
            reference.revision(),
            reference.repo,
            short(&now),
            short(commit),
        ));
    }
    Ok(snapshot)
}

/// The first digits of a commit, for messages.
pub(crate) fn short(commit: &str) -> &str {
    commit.get(..10).unwrap_or(commit)
}

/// Bytes that are free in a folder, or where it would be made; `None` if the system does not say.
pub fn free_space(folder: &Path) -> Option<u64> {
    let folder = folder.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("."));
    let stats = statvfs(folder).ok()?;
    #[allow(clippy::unnecessary_cast, reason = "the types of the fields differ between systems")]
    Some(stats.blocks_available() as u64 * stats.fragment_size() as u64)
}

/// Refuses to begin a download for which the drive has no room.
pub(crate) fn check_space(folder: &Path, needed: u64) -> Result<(), HubError> {
    match free_space(folder) {
        Some(available) if available < needed => Err(HubError::NoSpace { path: folder.to_owned(), needed, available }),
        _ => Ok(()),
    }
}
