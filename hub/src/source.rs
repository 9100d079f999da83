//! A repository as the source of a conversion: first the headers with range requests, then file by file, with only a few files
//! on the drive at once.
//!
//! Before the conversion begins, reads become range requests, and their bytes are remembered. From then on, reads wait for their
//! file. Once the file is downloaded and verified, the remembered bytes are compared with it.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::thread;

use ring::digest::{SHA256, digest};
use sluice_converter::ConvertError;
use sluice_converter::source::{FileUse, Source, SourceFile, Stamp};

use crate::client::{Client, lock};
use crate::digest::Digest;
use crate::downloads::{Downloads, Observer, Target, Terms};
use crate::error::HubError;
use crate::pieces::{remove, remove_remains};
use crate::pull::CONNECTIONS;
use crate::select::base_name;
use crate::snapshot::{RemoteFile, Snapshot};

/// Bytes at the beginning of every file that are requested first: enough for most headers.
const FIRST: u64 = 128 << 10;
/// If the beginning does not suffice, more is read in steps that double, up to this.
const LARGEST_STEP: u64 = 16 << 20;
/// A read that begins this close behind the known beginning extends it.
const GAP: u64 = 64 << 10;
/// Most bytes of a file that are remembered.
const REMEMBERED: u64 = 256 << 20;

/// What is known of a file before it is downloaded.
#[derive(Default)]
struct Known {
    /// Its first bytes.
    head: Vec<u8>,
    /// Other bytes, with their places.
    ranges: Vec<(u64, Vec<u8>)>,
}

/// The downloads of a conversion that has begun.
struct Running {
    downloads: Downloads,
    /// Number of the download of each file that is needed.
    targets: Vec<Option<usize>>,
    /// Files that have been downloaded. A released file is closed, because an open file would keep its space.
    open: Vec<RwLock<Option<Arc<File>>>>,
}

/// The files of a repository that a conversion reads.
pub(crate) struct Remote {
    client: Arc<Client>,
    snapshot: Arc<Snapshot>,
    observer: Arc<dyn Observer>,
    /// The name of the repository in messages.
    name: PathBuf,
    files: Vec<SourceFile>,
    remote: Vec<RemoteFile>,
    known: Vec<Mutex<Known>>,
    /// Where files go.
    folder: PathBuf,
    terms: Terms,
    running: OnceLock<Running>,
    begun: AtomicBool,
}

impl Remote {
    /// The files `remote` of a repository; reads the beginning of each.
    pub(crate) fn open(
        client: Arc<Client>,
        snapshot: Arc<Snapshot>,
        observer: Arc<dyn Observer>,
        remote: Vec<RemoteFile>,
        (folder, keep): (PathBuf, bool),
    ) -> Result<Self, HubError> {
        let name = PathBuf::from(format!("{}{}", crate::name::PREFIX, snapshot.repo));
        let files = remote.iter().map(|file| SourceFile {
            name: base_name(&file.path).to_owned(),
            path: name.join(&file.path),
            len: file.size,
            stamp: stamp(&snapshot, file),
        });
        let files = files.collect();
        let known = remote.iter().map(|_| Mutex::default()).collect();
        let window = if keep { usize::MAX } else { crate::convert::WINDOW };
        let terms = Terms { connections: CONNECTIONS, window, keep, durable: keep };
        let (running, begun) = (OnceLock::new(), AtomicBool::new(false));
        let source = Remote { client, snapshot, observer, name, files, remote, known, folder, terms, running, begun };
        source.read_heads()?;
        Ok(source)
    }

    pub(crate) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    pub(crate) fn files(&self) -> &[RemoteFile] {
        &self.remote
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// From here on, files are downloaded as the conversion needs them.
    pub(crate) fn begin(&self) {
        self.begun.store(true, Ordering::Release);
    }

    /// Reads the beginning of every file, several at a time.
    fn read_heads(&self) -> Result<(), HubError> {
        let next = AtomicUsize::new(0);
        let work = || {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(file) = self.remote.get(number) else { return Ok(()) };
                self.know(number, FIRST.min(file.size), &mut lock(&self.known[number]))?;
            }
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..CONNECTIONS.min(self.remote.len())).map(|_| scope.spawn(work)).collect();
            let results = threads.into_iter().map(|t| t.join().unwrap_or(Err(HubError::Stopped)));
            results.collect::<Result<(), HubError>>()
        })
    }

    /// Makes sure that the first `len` bytes of a file are known.
    fn know(&self, file: usize, len: u64, known: &mut Known) -> Result<(), HubError> {
        let have = known.head.len() as u64;
        if have >= len {
            return Ok(());
        }
        let step = have.clamp(FIRST, LARGEST_STEP);
        let end = len.max(have + step).min(self.remote[file].size);
        let mut more = vec![0; (end - have) as usize];
        self.snapshot.range(&self.client, &self.remote[file], have, &mut more)?;
        known.head.extend(more);
        Ok(())
    }

    /// Reads from a file that is not downloaded.
    fn peek(&self, file: usize, at: u64, out: &mut [u8]) -> Result<(), HubError> {
        let mut known = lock(&self.known[file]);
        let end = at + out.len() as u64;
        if at <= known.head.len() as u64 + GAP && end <= REMEMBERED {
            self.know(file, end, &mut known)?;
            out.copy_from_slice(&known.head[at as usize..end as usize]);
            return Ok(());
        }
        let holds = |(place, bytes): &&(u64, Vec<u8>)| *place <= at && end <= place + bytes.len() as u64;
        if let Some((place, bytes)) = known.ranges.iter().find(holds) {
            out.copy_from_slice(&bytes[(at - place) as usize..][..out.len()]);
            return Ok(());
        }
        self.snapshot.range(&self.client, &self.remote[file], at, out)?;
        // Tensors that decide a plan are small.
        if known.ranges.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() as u64 + out.len() as u64 <= REMEMBERED {
            known.ranges.push((at, out.to_vec()));
        }
        Ok(())
    }

    /// Reads from a file that is downloaded, or waits for it.
    fn read(&self, file: usize, at: u64, out: &mut [u8]) -> Result<(), HubError> {
        let unexpected = || {
            let problem = format!("`{}` is read although nothing was to be read of it", self.files[file].name);
            HubError::Selection { repo: self.snapshot.repo.clone(), problem }
        };
        let Some(running) = self.running.get() else {
            // Once downloads have begun, range requests would be a slow way to read the whole file.
            return if self.begun.load(Ordering::Acquire) { Err(unexpected()) } else { self.peek(file, at, out) };
        };
        let target = running.targets[file].ok_or_else(unexpected)?;
        let known = running.open[file].read().unwrap_or_else(PoisonError::into_inner).clone();
        let opened = match known {
            Some(opened) => opened,
            None => {
                let here = running.downloads.wait(target)?;
                let mut place = running.open[file].write().unwrap_or_else(PoisonError::into_inner);
                if place.is_none() {
                    self.compare(file, &here)?;
                    *place = Some(Arc::clone(&here));
                }
                here
            }
        };
        let path = self.folder.join(&self.files[file].name);
        opened.read_exact_at(out, at).map_err(HubError::io(&path, "read its weights"))
    }

    /// Whether the bytes from which the plan was made are those of the verified file.
    fn compare(&self, file: usize, here: &File) -> Result<(), HubError> {
        let known = lock(&self.known[file]);
        let path = self.folder.join(&self.files[file].name);
        let head = [(0, known.head.clone())];
        for (place, bytes) in head.iter().chain(&known.ranges) {
            let mut now = vec![0; bytes.len()];
            here.read_exact_at(&mut now, *place).map_err(HubError::io(&path, "read it"))?;
            if now != *bytes {
                let RemoteFile { path, digest, .. } = &self.remote[file];
                return Err(HubError::Damaged { file: path.clone(), digest: digest.kind(), attempts: 1 });
            }
        }
        Ok(())
    }

    /// A small file of the repository, verified; `None` if it has none of that name.
    pub(crate) fn small_file(&self, name: &str) -> Result<Option<Vec<u8>>, HubError> {
        let file = self.snapshot.find(name);
        file.map(|file| self.snapshot.small_file(&self.client, file)).transpose()
    }
}

/// What identifies the content of a file in journals: its SHA-256, or if that is unknown, its place at a commit,
/// where it never changes.
fn stamp(snapshot: &Snapshot, file: &RemoteFile) -> Stamp {
    if let Digest::Sha256(sha256) = &file.digest {
        return Stamp::of_content(file.size, sha256);
    }
    let place = format!("{}\0{}\0{}\0{}", snapshot.repo, snapshot.commit, file.path, file.digest);
    let mut sha256 = [0; 32];
    sha256.copy_from_slice(digest(&SHA256, place.as_bytes()).as_ref());
    Stamp::of_content(file.size, &sha256)
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remote").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A source whose files are downloaded as they are needed.
#[derive(Debug)]
pub(crate) struct HubSource(pub(crate) Arc<Remote>);

/// The converter's error for an error of the hub.
fn fetch(error: HubError) -> ConvertError {
    ConvertError::Fetch(Arc::new(error))
}

impl Source for HubSource {
    fn path(&self) -> &Path {
        &self.0.name
    }

    fn files(&self) -> &[SourceFile] {
        &self.0.files
    }

    fn read_at(&self, file: usize, at: u64, out: &mut [u8]) -> Result<(), ConvertError> {
        self.0.read(file, at, out).map_err(fetch)
    }

    /// A commit does not change.
    fn check_unchanged(&self) -> Result<(), ConvertError> {
        Ok(())
    }

    fn text_file(&self, name: &str) -> Result<Option<Vec<u8>>, ConvertError> {
        self.0.small_file(name).map_err(fetch)
    }

    fn is_fetched(&self) -> bool {
        true
    }

    fn is_content_addressed(&self) -> bool {
        true
    }

    fn schedule(&self, uses: &[FileUse]) {
        let remote = &self.0;
        if !remote.begun.load(Ordering::Acquire) {
            return;
        }
        let mut targets = vec![None; remote.remote.len()];
        let mut downloads = Vec::new();
        for needed in uses {
            targets[needed.file] = Some(downloads.len());
            downloads.push(Target {
                remote: remote.remote[needed.file].clone(),
                path: remote.folder.join(&remote.files[needed.file].name),
                first: needed.first,
                last: needed.last,
            });
        }
        if !remote.terms.keep {
            // Remains of files that an interrupted run had finished with.
            for file in (0..targets.len()).filter(|&file| targets[file].is_none()) {
                let path = remote.folder.join(&remote.files[file].name);
                if let Err(e) = remove(&path).and_then(|()| remove_remains(&path)) {
                    remote.observer.note(&e.to_string());
                }
            }
        }
        let downloads = Downloads::start(
            Arc::clone(&remote.client),
            Arc::clone(&remote.snapshot),
            Arc::clone(&remote.observer),
            downloads,
            remote.terms,
        );
        let open = targets.iter().map(|_| RwLock::default()).collect();
        let _ = remote.running.set(Running { downloads, targets, open });
    }

    fn release(&self, file: usize) {
        let Some(running) = self.0.running.get() else { return };
        if let Some(target) = running.targets[file] {
            *running.open[file].write().unwrap_or_else(PoisonError::into_inner) = None;
            running.downloads.release(target);
        }
    }

    fn folder(&self) -> Option<&Path> {
        Some(&self.0.folder)
    }
}
