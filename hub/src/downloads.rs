//! Downloads several files at once: in pieces over several connections, and in the order in which the files are needed. It
//! verifies each file, and keeps no more files on the drive than are allowed.

use std::fs::{self, File};
use std::io::{self, Seek as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use crate::client::{Client, lock};
use crate::digest::Hasher;
use crate::error::HubError;
use crate::pieces::{PartialFile, piece, piece_count, refuse_strange, remove, remove_remains};
use crate::snapshot::{RemoteFile, Snapshot, is_settled};

/// How often a file is downloaded before its digest is believed to be wrong.
const ATTEMPTS: u32 = 3;

/// Learns how downloads proceed. Called from several threads.
pub trait Observer: Send + Sync {
    /// This many bytes will be on the drive in the end.
    fn expects(&self, bytes: u64);
    /// This many more bytes of files have arrived, or were found on the drive.
    fn arrived(&self, bytes: u64);
    /// This many bytes that had arrived are useless.
    fn lost(&self, bytes: u64);
    /// Something that the user should know.
    fn note(&self, text: &str);
}

impl Observer for () {
    fn expects(&self, _bytes: u64) {}
    fn arrived(&self, _bytes: u64) {}
    fn lost(&self, _bytes: u64) {}
    fn note(&self, _text: &str) {}
}

/// A file to download, and when it is needed.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) remote: RemoteFile,
    /// Where it goes.
    pub(crate) path: PathBuf,
    /// The first and the last step of work that need it. Files are downloaded in the order of their first steps.
    pub(crate) first: usize,
    pub(crate) last: usize,
}

/// How files are downloaded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// Requests at the same time.
    pub(crate) connections: usize,
    /// Most files that are on the drive or being downloaded and have not been released. Files that are needed to the end do not
    /// count, and more are admitted if the work could not continue otherwise.
    pub(crate) window: usize,
    /// Whether released files stay.
    pub(crate) keep: bool,
    /// Whether files are durable once they have their names.
    pub(crate) durable: bool,
}

/// Files that separate threads download until this value is dropped.
#[derive(Debug)]
pub(crate) struct Downloads {
    shared: Arc<Shared>,
}

struct Shared {
    client: Arc<Client>,
    snapshot: Arc<Snapshot>,
    observer: Arc<dyn Observer>,
    targets: Vec<Target>,
    /// Numbers of targets, in the order in which they are needed.
    order: Vec<usize>,
    terms: Terms,
    table: Mutex<Table>,
    changed: Condvar,
    stopped: AtomicBool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("targets", &self.targets).finish_non_exhaustive()
    }
}

struct Table {
    entries: Vec<Entry>,
    /// How many files, in that order, have been begun.
    admitted: usize,
    failure: Option<HubError>,
}

enum Entry {
    Waiting,
    Opening,
    Active(Box<Active>),
    Complete(Arc<File>),
    Released,
}

struct Active {
    /// `None` if the file has its name already, or is in the cache, and is only verified.
    partial: Option<PartialFile>,
    /// Its place in the cache of the hub's own programs, if it is used from there.
    cached: Option<PathBuf>,
    file: Arc<File>,
    taken: Vec<bool>,
    there: Vec<bool>,
    /// Pieces at the beginning that are in the digest.
    hashed: usize,
    /// `None` while a thread works with it.
    hasher: Option<Hasher>,
    /// How many downloads had a wrong digest.
    failed: u32,
    /// The digest of the last one.
    computed: Option<Vec<u8>>,
}

enum Task {
    Open(usize),
    Piece(usize, usize),
}

impl Downloads {
    /// Begins to download.
    pub(crate) fn start(
        client: Arc<Client>,
        snapshot: Arc<Snapshot>,
        observer: Arc<dyn Observer>,
        targets: Vec<Target>,
        terms: Terms,
    ) -> Self {
        observer.expects(targets.iter().map(|target| target.remote.size).sum());
        let mut order: Vec<usize> = (0..targets.len()).collect();
        order.sort_by_key(|&i| (targets[i].first, targets[i].last, i));
        let entries = targets.iter().map(|_| Entry::Waiting).collect();
        let table = Mutex::new(Table { entries, admitted: 0, failure: None });
        let (changed, stopped) = (Condvar::new(), AtomicBool::new(false));
        let shared = Shared { client, snapshot, observer, targets, order, terms, table, changed, stopped };
        let shared = Arc::new(shared);
        for _ in 0..terms.connections.max(1) {
            let worker = Arc::clone(&shared);
            thread::spawn(move || worker.work());
        }
        Downloads { shared }
    }

    /// Waits until a file is whole and verified.
    pub(crate) fn wait(&self, target: usize) -> Result<Arc<File>, HubError> {
        let mut table = lock(&self.shared.table);
        loop {
            match &table.entries[target] {
                Entry::Complete(file) => return Ok(Arc::clone(file)),
                Entry::Released => unreachable!("whoever releases a file has no more use for it"),
                _ => {}
            }
            if let Some(failure) = &table.failure {
                return Err(failure.clone());
            }
            table = self.shared.changed.wait(table).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Says that a file is no longer needed. It is removed, unless released files stay, and makes room for the next.
    pub(crate) fn release(&self, target: usize) {
        let shared = &self.shared;
        if !shared.terms.keep {
            // A file that cannot be removed disturbs only the user, who is told.
            if let Err(e) = remove(&shared.targets[target].path) {
                shared.observer.note(&e.to_string());
            }
        }
        // This comes last and closes the file; from here on, its space is free.
        lock(&shared.table).entries[target] = Entry::Released;
        shared.changed.notify_all();
    }
}

impl Drop for Downloads {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        // A thread that has checked and is about to wait holds the lock of the table.
        drop(lock(&self.shared.table));
        self.shared.changed.notify_all();
    }
}

/// Tells the threads that wait for a file if a thread that should download it has panicked.
struct Guard<'s>(&'s Shared);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            lock(&self.0.table).failure.get_or_insert(HubError::Stopped);
            self.0.changed.notify_all();
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut buffer = Vec::new();
        let _guard = Guard(self);
        while let Some(task) = self.next() {
            let outcome = match task {
                Task::Open(target) => self.open(target).and_then(|()| self.digest(target, &mut buffer)),
                Task::Piece(target, number) => {
                    self.piece(target, number).and_then(|()| self.digest(target, &mut buffer))
                }
            };
            if let Err(error) = outcome {
                lock(&self.table).failure.get_or_insert(error);
            }
            self.changed.notify_all();
        }
    }

    /// The next piece of work; waits for one, and returns `None` when there will be no more.
    fn next(&self) -> Option<Task> {
        let mut table = lock(&self.table);
        loop {
            let over = |e: &Entry| matches!(e, Entry::Complete(_) | Entry::Released);
            if self.stopped.load(Ordering::Relaxed) || table.failure.is_some() || table.entries.iter().all(over) {
                return None;
            }
            for &target in &self.order[..table.admitted] {
                let Entry::Active(active) = &mut table.entries[target] else { continue };
                if let Some(number) = active.taken.iter().position(|&taken| !taken) {
                    active.taken[number] = true;
                    return Some(Task::Piece(target, number));
                }
            }
            if let Some(&target) = self.order.get(table.admitted).filter(|&&target| self.may_begin(&table, target)) {
                table.admitted += 1;
                table.entries[target] = Entry::Opening;
                return Some(Task::Open(target));
            }
            table = self.changed.wait(table).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether one more file may come: either few of the current files will be released before this one is, or none of
    /// them can be released until it has come.
    fn may_begin(&self, table: &Table, target: usize) -> bool {
        let here = || self.order[..table.admitted].iter().filter(|&&i| !matches!(table.entries[i], Entry::Released));
        let next = &self.targets[target];
        let count = here().filter(|&&i| self.targets[i].last < next.last).count();
        count < self.terms.window || !here().any(|&i| self.targets[i].last < next.first)
    }

    /// Finds out which parts of a file exist.
    fn open(&self, target: usize) -> Result<(), HubError> {
        let Target { remote, path, .. } = &self.targets[target];
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(HubError::io(folder, "create it"))?;
        }
        refuse_strange(path)?;
        let count = piece_count(remote.size);
        let active = match (File::open(path), self.snapshot.cached_file(&self.client, remote)) {
            (Ok(file), _) if file.metadata().is_ok_and(|m| m.len() == remote.size) => {
                self.active(remote, None, Arc::new(file), vec![true; count])
            }
            (_, Some((place, file))) if self.terms.keep => self.copied(target, &place, file)?,
            (_, Some((place, file))) => {
                let active = self.active(remote, None, Arc::new(file), vec![true; count]);
                Active { cached: Some(place), ..active }
            }
            _ => self.partial(target)?,
        };
        let here = (0..count).filter(|&n| active.there[n]).map(|n| piece(remote.size, n).1).sum();
        lock(&self.table).entries[target] = Entry::Active(Box::new(active));
        self.observer.arrived(here);
        self.changed.notify_all();
        Ok(())
    }

    /// The parts of a file that has no final name yet.
    fn partial(&self, target: usize) -> Result<Active, HubError> {
        let Target { remote, path, .. } = &self.targets[target];
        let (partial, there) = PartialFile::open(path, remote)?;
        let file = partial.file.try_clone().map_err(HubError::io(&partial.path, "open it"))?;
        Ok(self.active(remote, Some(partial), Arc::new(file), there))
    }

    /// A copy of a file of the cache, to be verified as if it had been downloaded.
    fn copied(&self, target: usize, place: &Path, mut cached: File) -> Result<Active, HubError> {
        let mut active = self.partial(target)?;
        if let Some(partial) = &active.partial {
            let copied = (&partial.file).rewind().and_then(|()| io::copy(&mut cached, &mut &partial.file));
            // If its length has changed, the file comes from the hub.
            if copied.map_err(HubError::io(place, "copy it"))? == self.targets[target].remote.size {
                let missing = (0..active.there.len()).filter(|&number| !active.there[number]);
                missing.into_iter().try_for_each(|number| partial.add(number))?;
                active.there.fill(true);
                active.taken.fill(true);
            }
        }
        Ok(active)
    }

    fn active(&self, remote: &RemoteFile, partial: Option<PartialFile>, file: Arc<File>, there: Vec<bool>) -> Active {
        let hasher = Some(Hasher::new(&remote.digest, remote.size));
        let (taken, cached) = (there.clone(), None);
        Active { partial, cached, file, taken, there, hashed: 0, hasher, failed: 0, computed: None }
    }

    /// Downloads a piece.
    fn piece(&self, target: usize, number: usize) -> Result<(), HubError> {
        let Target { remote, path, .. } = &self.targets[target];
        let file = match &lock(&self.table).entries[target] {
            Entry::Active(active) => Arc::clone(&active.file),
            _ => return Ok(()),
        };
        let (first, len) = piece(remote.size, number);
        let url = self.client.file_url(&self.snapshot.repo, &self.snapshot.commit, &remote.path);
        self.client.read(self.snapshot.wanted(&url, remote), first, len, &mut |at, bytes| {
            if self.stopped.load(Ordering::Relaxed) {
                return Err(HubError::Stopped);
            }
            file.write_all_at(bytes, at).map_err(HubError::io(path, "write it"))?;
            self.observer.arrived(bytes.len() as u64);
            Ok(())
        })?;
        let mut table = lock(&self.table);
        if let Entry::Active(active) = &mut table.entries[target] {
            active.partial.iter().try_for_each(|partial| partial.add(number))?;
            active.there[number] = true;
        }
        Ok(())
    }

    /// Continues the digest of a file over the pieces that have arrived, unless another thread does. After the last piece, the
    /// file is complete or is downloaded again.
    fn digest(&self, target: usize, buffer: &mut Vec<u8>) -> Result<(), HubError> {
        let Target { remote, path, .. } = &self.targets[target];
        let count = piece_count(remote.size);
        loop {
            let (mut hasher, number, file) = {
                let mut table = lock(&self.table);
                let Entry::Active(active) = &mut table.entries[target] else { return Ok(()) };
                let number = active.hashed;
                if number < count && !active.there[number] {
                    return Ok(());
                }
                let Some(hasher) = active.hasher.take() else { return Ok(()) };
                (hasher, number, Arc::clone(&active.file))
            };
            if number == count {
                return self.finish(target, hasher);
            }
            let (first, len) = piece(remote.size, number);
            buffer.resize(len as usize, 0);
            file.read_exact_at(buffer, first).map_err(HubError::io(path, "read it again"))?;
            hasher.update(buffer);
            if let Entry::Active(active) = &mut lock(&self.table).entries[target] {
                active.hashed += 1;
                active.hasher = Some(hasher);
            }
            if self.stopped.load(Ordering::Relaxed) {
                return Ok(());
            }
        }
    }

    /// All pieces have arrived.
    fn finish(&self, target: usize, hasher: Hasher) -> Result<(), HubError> {
        let Target { remote, path, .. } = &self.targets[target];
        let computed = hasher.finish();
        let is_stated = remote.digest.is(&computed);
        let (written, is_sound) = match &lock(&self.table).entries[target] {
            Entry::Active(active) => {
                let written = active.partial.as_ref().map(|_| Arc::clone(&active.file));
                (written, is_stated || is_settled(&remote.digest, &computed, active.computed.as_ref()))
            }
            _ => return Ok(()),
        };
        if is_sound && !is_stated {
            self.observer.note(&format!(
                "{}: it has not the {} that is stated, in two downloads that are alike: it is taken as \
                 it is",
                remote.path,
                remote.digest.kind()
            ));
        }
        // This takes long, and other threads need the table.
        if let Some(file) = written.filter(|_| is_sound && self.terms.durable) {
            file.sync_data().map_err(HubError::io(path, "sync it"))?;
        }
        let mut table = lock(&self.table);
        let Entry::Active(active) = &mut table.entries[target] else { return Ok(()) };
        if is_sound {
            match &active.partial {
                Some(partial) => partial.finish(path)?,
                // The file got its name before its remains could be removed.
                None => remove_remains(path)?,
            }
            // Read only, from here on.
            let file = match active.cached {
                Some(_) => Arc::clone(&active.file),
                None => Arc::new(File::open(path).map_err(HubError::io(path, "open it"))?),
            };
            table.entries[target] = Entry::Complete(file);
            return Ok(());
        }
        self.observer.lost(remote.size);
        let was_here = active.partial.is_none();
        let failed = active.failed + u32::from(!was_here);
        if failed >= ATTEMPTS {
            // The remains would only be verified again.
            let partial = &mut active.partial;
            partial.as_mut().map_or(Ok(()), PartialFile::clear)?;
            let (file, digest) = (remote.path.clone(), remote.digest.kind());
            return Err(HubError::Damaged { file, digest, attempts: failed });
        }
        let (again, kind) = ("it is downloaded again", remote.digest.kind());
        self.observer.note(&if was_here {
            let place = active.cached.as_ref().unwrap_or(path);
            format!("{}: it is another file than the hub's; {again}", place.display())
        } else {
            format!("{}: what has come has not the {kind} that the hub states; {again}", remote.path)
        });
        if let Some(partial) = &mut active.partial {
            partial.clear()?;
            **active = Active {
                partial: active.partial.take(),
                failed,
                computed: Some(computed),
                ..self.active(remote, None, Arc::clone(&active.file), vec![false; active.there.len()])
            };
        } else {
            **active = self.partial(target)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Patience;
    use crate::digest::Digest;
    use crate::settings::Settings;

    /// The state of downloads that no server would answer.
    fn shared(needs: &[(usize, usize)], window: usize) -> Shared {
        let settings = Settings {
            endpoint: "http://127.0.0.1:1".into(),
            token: None,
            offline: true,
            certificates: None,
            cache: None,
        };
        let client = Client::with_patience(settings, Patience::default(), None).unwrap();
        let remote = RemoteFile { path: String::new(), size: 1, digest: Digest::Git([0; 20]) };
        let target =
            |&(first, last): &(usize, usize)| Target { remote: remote.clone(), path: PathBuf::new(), first, last };
        let targets: Vec<Target> = needs.iter().map(target).collect();
        let entries = targets.iter().map(|_| Entry::Waiting).collect();
        Shared {
            client: Arc::new(client),
            snapshot: Arc::new(Snapshot {
                repo: String::new(),
                commit: String::new(),
                files: Vec::new(),
                cached: None,
            }),
            observer: Arc::new(()),
            order: (0..targets.len()).collect(),
            targets,
            terms: Terms { connections: 1, window, keep: false, durable: false },
            table: Mutex::new(Table { entries, admitted: 0, failure: None }),
            changed: Condvar::new(),
            stopped: AtomicBool::new(false),
        }
    }

    /// The files that are begun as long as none is released.
    fn begun(needs: &[(usize, usize)], window: usize) -> usize {
        let shared = shared(needs, window);
        let mut table = lock(&shared.table);
        while table.admitted < needs.len() && shared.may_begin(&table, table.admitted) {
            let target = table.admitted;
            table.entries[target] = Entry::Opening;
            table.admitted += 1;
        }
        table.admitted
    }

    #[test]
    fn no_more_files_come_than_may_be_here_unless_the_work_would_stand_still() {
        assert_eq!(begun(&[(0, 0), (1, 1), (2, 2), (3, 3)], 2), 2);
        assert_eq!(begun(&[(0, 1), (1, 2), (2, 3), (3, 4)], 2), 2);
        // One step needs all files.
        assert_eq!(begun(&[(0, 9), (1, 9), (2, 9), (3, 9)], 2), 4);
        // The first leaves before the third is needed.
        assert_eq!(begun(&[(0, 1), (1, 8), (2, 9), (3, 9)], 2), 2);
        // The first stays to the end, and does not count.
        assert_eq!(begun(&[(0, 9), (1, 1), (2, 2), (3, 3)], 2), 3);
    }
}
