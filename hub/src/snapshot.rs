//! What a repository holds at one commit.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::cache::{self, Cached};
use crate::client::{Client, Linked, Question, Wanted};
use crate::digest::Digest;
use crate::error::HubError;
use crate::name::{escaped, escaped_path, stays_inside};

/// Most pages of a listing that are followed.
const MOST_PAGES: usize = 2000;
/// Most files of a repository.
pub(crate) const MOST_FILES: usize = 1 << 20;
/// Longest file that is read whole into memory.
const LONGEST_SMALL: u64 = 256 << 20;

/// A file of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteFile {
    /// Its path in the repository, with `/`.
    pub path: String,
    /// Its length in bytes.
    pub size: u64,
    /// The digest of its content.
    pub digest: Digest,
}

/// The files of a repository at one commit, which never change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// `OWNER/NAME`.
    pub repo: String,
    /// The commit, in hexadecimal digits.
    pub commit: String,
    /// Sorted by path.
    pub files: Vec<RemoteFile>,
    /// Folder in which the hub's own programs have some of these files, or all.
    pub cached: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Info {
    sha: Option<String>,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    oid: String,
    #[serde(default)]
    size: u64,
    lfs: Option<Lfs>,
}

#[derive(Deserialize, Serialize)]
struct Lfs {
    #[serde(alias = "sha256")]
    oid: String,
    size: u64,
}

impl Client {
    /// The commit to which a branch or tag of a repository now points, and its files. If requests are forbidden, what the cache of
    /// the hub's own programs has of it.
    ///
    /// # Errors
    /// [`HubError`], among others for repositories that do not exist or may not be read.
    pub fn snapshot(&self, repo: &str, revision: &str) -> Result<Snapshot, HubError> {
        let what = format!("revision {revision} of {repo}");
        let question = Question { repo, what: &what };
        let in_cache = self.settings().cache.as_deref().map(|cache| Cached::new(cache, repo));
        if self.settings().offline {
            let found = in_cache.and_then(|cached| {
                let commit = cached.commit(revision)?;
                Some((cached.snapshot(&commit)?, commit))
            });
            let (folder, commit) = found.ok_or(HubError::Offline { what })?;
            self.say(&format!("HF_HUB_OFFLINE: what {repo} holds is taken to be what {} has of it", folder.display()));
            let mut files = cache::listing(&folder)?;
            files.sort_by(|a, b| a.path.cmp(&b.path));
            return Ok(Snapshot { repo: repo.to_owned(), commit, files, cached: Some(folder) });
        }
        let (commit, siblings) = self.revision(repo, revision, question)?;
        let mut files = match self.tree(repo, &commit, question) {
            Err(HubError::Absent { .. }) => self.siblings(repo, &commit, &siblings)?,
            listed => listed?,
        };
        if let Some(strange) = files.iter().find(|file| !stays_inside(&file.path)) {
            return Err(HubError::StrangeName { repo: repo.to_owned(), file: strange.path.clone() });
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        files.dedup_by(|a, b| a.path == b.path);
        let cached = in_cache.and_then(|cached| cached.snapshot(&commit));
        Ok(Snapshot { repo: repo.to_owned(), commit, files, cached })
    }

    /// The commit to which a branch or tag of a repository now points.
    pub(crate) fn commit(&self, repo: &str, revision: &str) -> Result<String, HubError> {
        let what = format!("revision {revision} of {repo}");
        self.revision(repo, revision, Question { repo, what: &what }).map(|(commit, _)| commit)
    }

    fn revision(&self, repo: &str, revision: &str, question: Question<'_>) -> Result<(String, Vec<Sibling>), HubError> {
        let url = format!("{}/api/models/{repo}/revision/{}", self.settings().endpoint, escaped(revision));
        let (info, _) = self.json(&url, question)?;
        let wrong = |problem: String| HubError::Protocol { url: url.clone(), problem };
        let info: Info =
            serde_json::from_value(info).map_err(|e| wrong(format!("its answer is not understood ({e})")))?;
        let commit = info.sha.filter(|sha| is_commit(sha));
        Ok((commit.ok_or_else(|| wrong("its answer names no commit".into()))?, info.siblings))
    }

    /// The listing of a commit, page by page.
    fn tree(&self, repo: &str, commit: &str, question: Question<'_>) -> Result<Vec<RemoteFile>, HubError> {
        let endpoint = &self.settings().endpoint;
        let mut url = format!("{endpoint}/api/models/{repo}/tree/{commit}?recursive=true");
        let mut files = Vec::new();
        for _ in 0..MOST_PAGES {
            let (page, next) = self.json(&url, question)?;
            let wrong = |problem: String| HubError::Protocol { url: url.clone(), problem };
            let entries: Vec<Entry> =
                serde_json::from_value(page).map_err(|e| wrong(format!("its listing is not understood ({e})")))?;
            for entry in entries.into_iter().filter(|entry| entry.kind == "file") {
                let is_large = entry.lfs.is_some();
                let (oid, size) = entry.lfs.map_or((entry.oid, entry.size), |lfs| (lfs.oid, lfs.size));
                let oid = oid.strip_prefix("sha256:").unwrap_or(&oid);
                let digest = match Digest::parse(oid) {
                    None if is_large => return Err(wrong(format!("it states no digest of `{}`", entry.path))),
                    found => found.unwrap_or(Digest::Unstated),
                };
                files.push(RemoteFile { path: entry.path, size, digest });
            }
            if files.len() > MOST_FILES {
                return Err(wrong(format!("it lists more than {MOST_FILES} files")));
            }
            let Some(next) = next else { return Ok(files) };
            // A mirror may name the hub itself; the next page is requested from the mirror.
            url = match (next.starts_with(endpoint.as_str()), next.find("/api/")) {
                (true, _) => next,
                (false, Some(at)) => format!("{endpoint}{}", &next[at..]),
                (false, None) => return Err(wrong("its listing goes on at a strange address".into())),
            };
        }
        Err(HubError::Protocol { url, problem: format!("its listing has more than {MOST_PAGES} pages") })
    }

    /// The files of a server without listings, requested one by one.
    fn siblings(&self, repo: &str, commit: &str, names: &[Sibling]) -> Result<Vec<RemoteFile>, HubError> {
        let mut files = Vec::new();
        for Sibling { rfilename } in names {
            let url = self.file_url(repo, commit, rfilename);
            let what = format!("the file `{rfilename}` of {repo}");
            let Linked { digest, size, .. } = self.head(&url, Question { repo, what: &what })?;
            let problem = "it does not state the length of the file".to_owned();
            let size = size.ok_or(HubError::Protocol { url, problem })?;
            files.push(RemoteFile { path: rfilename.clone(), size, digest: digest.unwrap_or(Digest::Unstated) });
        }
        Ok(files)
    }

    pub(crate) fn file_url(&self, repo: &str, commit: &str, path: &str) -> String {
        format!("{}/{repo}/resolve/{commit}/{}", self.settings().endpoint, escaped_path(path))
    }
}

impl Snapshot {
    /// The file of that path.
    pub fn find(&self, path: &str) -> Option<&RemoteFile> {
        self.files.binary_search_by(|file| file.path.as_str().cmp(path)).ok().map(|at| &self.files[at])
    }

    /// A file that the hub's own programs have downloaded, unverified; `None` if there is no digest to verify it, unless requests
    /// are forbidden.
    pub(crate) fn cached_file(&self, client: &Client, file: &RemoteFile) -> Option<(PathBuf, File)> {
        let folder = self.cached.as_deref()?;
        (file.digest != Digest::Unstated || client.settings().offline).then(|| cache::open(folder, file))?
    }

    /// Bytes of a file from `at` on, as they come, unverified. They come from the cache only if requests are forbidden: the beginning of
    /// a damaged copy could make planning fail before the copy is verified.
    pub(crate) fn range(&self, client: &Client, file: &RemoteFile, at: u64, out: &mut [u8]) -> Result<(), HubError> {
        if client.settings().offline
            && let Some((path, cached)) = self.cached_file(client, file)
        {
            return cached.read_exact_at(out, at).map_err(HubError::io(&path, "read it"));
        }
        let url = client.file_url(&self.repo, &self.commit, &file.path);
        let len = out.len() as u64;
        client.read(self.wanted(&url, file), at, len, &mut |place, bytes| {
            let first = (place - at) as usize;
            out[first..first + bytes.len()].copy_from_slice(bytes);
            Ok(())
        })
    }

    /// A small file whole, verified.
    ///
    /// # Errors
    /// [`HubError`]; [`HubError::Selection`] for a file that is not small.
    pub fn small_file(&self, client: &Client, file: &RemoteFile) -> Result<Vec<u8>, HubError> {
        const ATTEMPTS: u32 = 3;
        if file.size > LONGEST_SMALL {
            let problem = format!("`{}` has {} bytes, too many for a file of its kind", file.path, file.size);
            return Err(HubError::Selection { repo: self.repo.clone(), problem });
        }
        let mut before = None;
        if let Some((path, cached)) = self.cached_file(client, file) {
            let mut bytes = Vec::new();
            cached.take(file.size).read_to_end(&mut bytes).map_err(HubError::io(&path, "read it"))?;
            if bytes.len() as u64 == file.size && file.digest.is_of(&bytes) {
                return Ok(bytes);
            }
            if client.settings().offline {
                let problem =
                    "it has not the content that its name in the cache states. Remove it, and unset HF_HUB_OFFLINE";
                return Err(HubError::InTheWay { path, problem: problem.into() });
            }
        }
        for _ in 0..ATTEMPTS {
            let mut bytes = vec![0; file.size as usize];
            self.range(client, file, 0, &mut bytes)?;
            let computed = file.digest.computed(&bytes);
            if file.digest.is(&computed) || is_settled(&file.digest, &computed, before.as_ref()) {
                return Ok(bytes);
            }
            before = Some(computed);
        }
        Err(HubError::Damaged { file: file.path.clone(), digest: file.digest.kind(), attempts: ATTEMPTS })
    }

    pub(crate) fn wanted<'a>(&'a self, url: &'a str, file: &'a RemoteFile) -> Wanted<'a> {
        Wanted { url, repo: &self.repo, file: &file.path, size: file.size, digest: file.digest }
    }
}

/// Whether content without the stated digest is right all the same. Servers that replace the hub state git's digests of
/// small files wrongly, and no fault on the way changes two downloads alike.
pub(crate) fn is_settled(stated: &Digest, computed: &[u8], before: Option<&Vec<u8>>) -> bool {
    matches!(stated, Digest::Git(_)) && before.is_some_and(|before| before == computed)
}

/// Whether a text is the name of a commit in git.
pub(crate) fn is_commit(text: &str) -> bool {
    (40..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit())
}
