//! The folder with files and batches, and the list of both in memory.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use serde::de::DeserializeOwned;
use sluice_format::{open_regular, replace_private_file_with};

use super::object::{BatchObject, Counts, FileObject, Status};
use crate::api::openai::{new_id, now};
use crate::error::{ApiError, Kind};
use crate::options::BatchOptions;

/// Most files, and most batches that are kept.
const MOST: usize = 10_000;
/// What a file is while it comes.
const PARTIAL: &str = ".partial";
/// Most bytes of a description: metadata have 16 short pairs, and problems are a few sentences.
const DESCRIPTION_MOST: u64 = 1 << 20;
/// Most characters of an id.
const LONGEST_ID: usize = 64;

/// Files and batches of a server.
pub struct Batches {
    options: BatchOptions,
    state: Mutex<State>,
    /// Held while a description is written or removed, so that the state need not be: whoever only reads does not wait for the drive.
    writing: Mutex<()>,
    /// There is something to do, or the end has come.
    wake: Condvar,
    /// Unlocked when it is dropped.
    _lock: File,
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, FileObject>,
    batches: BTreeMap<String, BatchObject>,
    /// The batch that is being worked on, and the switch that ends that.
    current: Option<(String, Arc<AtomicBool>)>,
    closing: bool,
}

/// What a client asks a batch to be.
#[derive(Clone, Debug)]
pub struct NewBatch {
    /// The file with its requests.
    pub input_file_id: String,
    /// The path that they name.
    pub endpoint: String,
    /// What the client says of the time it has.
    pub completion_window: String,
    /// Keys and values of the client's own.
    pub metadata: Option<BTreeMap<String, String>>,
}

/// A file that is being written. It is gone if it is dropped before it is [kept](Upload::keep).
pub struct Upload<'a> {
    batches: &'a Batches,
    id: String,
    file: File,
    bytes: u64,
    kept: bool,
}

impl Batches {
    /// Makes the folder if it is not there, locks it, and finds what is in it.
    ///
    /// # Errors
    /// What the system says, or that another process has the folder.
    pub fn open(options: BatchOptions) -> io::Result<Self> {
        for folder in ["files", "batches"] {
            DirBuilder::new().recursive(true).mode(0o700).create(options.folder.join(folder))?;
        }
        let lock = options.folder.join("lock");
        let lock = File::options().write(true).create(true).truncate(false).mode(0o600).open(lock)?;
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) => {
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, "another server has this folder"));
            }
            Err(TryLockError::Error(error)) if error.kind() != io::ErrorKind::Unsupported => return Err(error),
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        let state = State {
            files: load(&options.folder.join("files"))?,
            batches: load(&options.folder.join("batches"))?,
            ..State::default()
        };
        let (state, writing) = (Mutex::new(state), Mutex::new(()));
        Ok(Batches { options, state, writing, wake: Condvar::new(), _lock: lock })
    }

    /// The content of a file.
    pub fn content(&self, id: &str) -> PathBuf {
        self.options.folder.join("files").join(format!("{id}.jsonl"))
    }

    /// Where the results of a batch are while it goes on.
    pub fn results(&self, id: &str) -> PathBuf {
        self.options.folder.join("batches").join(format!("{id}.results.jsonl"))
    }

    /// All files, the oldest first.
    pub fn files(&self) -> Vec<FileObject> {
        let mut files: Vec<FileObject> = self.lock().files.values().cloned().collect();
        files.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        files
    }

    /// All batches, the oldest first.
    pub fn batches(&self) -> Vec<BatchObject> {
        in_order(&self.lock())
    }

    /// A file.
    ///
    /// # Errors
    /// When there is none of this id.
    pub fn file(&self, id: &str) -> Result<FileObject, ApiError> {
        self.lock().files.get(id).cloned().ok_or_else(|| missing("file", id))
    }

    /// A batch.
    ///
    /// # Errors
    /// When there is none of this id.
    pub fn batch(&self, id: &str) -> Result<BatchObject, ApiError> {
        self.lock().batches.get(id).cloned().ok_or_else(|| missing("batch", id))
    }

    /// Begins a file.
    ///
    /// # Errors
    /// When there are too many, or what the system says.
    pub fn upload(&self) -> Result<Upload<'_>, ApiError> {
        if self.lock().files.len() >= MOST {
            return Err(ApiError::new(Kind::TooLarge, format!("there are {MOST} files already: delete some")));
        }
        let id = new_id("file-");
        let path = self.content(&id).with_extension(format!("jsonl{PARTIAL}"));
        let file = File::options().write(true).create_new(true).mode(0o600).open(path).map_err(unwritten)?;
        Ok(Upload { batches: self, id, file, bytes: 0, kept: false })
    }

    /// Deletes a file, unless a batch needs it.
    ///
    /// # Errors
    /// When there is none of this id, a batch needs it, or what the system says.
    pub fn delete(&self, id: &str) -> Result<(), ApiError> {
        let _writing = self.lock_writing();
        let state = self.lock();
        if !state.files.contains_key(id) {
            return Err(missing("file", id));
        }
        let user = state.batches.values().find(|batch| batch.input_file_id == id && !batch.status.is_final());
        if let Some(batch) = user {
            return Err(ApiError::invalid(format!(
                "the batch {} is not done with this file: cancel it first",
                batch.id
            )));
        }
        drop(state);
        // Without its description it is no file, whatever becomes of its content.
        fs::remove_file(self.description("files", id)).map_err(unwritten)?;
        self.lock().files.remove(id);
        fs::remove_file(self.content(id)).map_err(unwritten)
    }

    /// Makes a batch.
    ///
    /// # Errors
    /// When its file is not there, there are too many batches, or what the system says.
    pub fn create(&self, new: NewBatch) -> Result<BatchObject, ApiError> {
        let _writing = self.lock_writing();
        let file =
            self.file(&new.input_file_id).map_err(|error| ApiError { param: Some("input_file_id".into()), ..error })?;
        if file.purpose != "batch" {
            return Err(ApiError::field(
                "input_file_id",
                "`input_file_id`: this file was not uploaded with `purpose` batch",
            ));
        }
        if self.lock().batches.len() >= MOST {
            self.drop_oldest()?;
        }
        let NewBatch { input_file_id, endpoint, completion_window, metadata } = new;
        let batch = BatchObject {
            id: new_id("batch_"),
            endpoint,
            input_file_id,
            completion_window,
            status: Status::Validating,
            created_at: now(),
            times: BTreeMap::new(),
            problems: Vec::new(),
            counts: Counts::default(),
            output_file_id: None,
            error_file_id: None,
            metadata,
        };
        self.write("batches", &batch.id, &batch).map_err(unwritten)?;
        self.lock().batches.insert(batch.id.clone(), batch.clone());
        self.wake.notify_all();
        Ok(batch)
    }

    /// Ends a batch early.
    ///
    /// # Errors
    /// When there is none of this id, it has ended, or what the system says.
    pub fn cancel(&self, id: &str) -> Result<BatchObject, ApiError> {
        self.batch(id)?;
        let batch = self.change(id, |batch| batch.advance(Status::Cancelling)).map_err(unwritten)?;
        let status = batch.status;
        if status.is_final() {
            return Err(ApiError::invalid(format!("the batch has ended already: it is {}", serde_json::json!(status))));
        }
        if let Some((current, stop)) = &self.lock().current
            && current == id
        {
            stop.store(true, Ordering::Relaxed);
        }
        self.wake.notify_all();
        Ok(batch)
    }

    /// The server is to end.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closing = true;
        if let Some((_, stop)) = &state.current {
            stop.store(true, Ordering::Relaxed);
        }
        drop(state);
        self.wake.notify_all();
    }

    /// Whether the server is to end.
    pub(super) fn is_closing(&self) -> bool {
        self.lock().closing
    }

    /// Waits for a batch that has something left to do; it comes with a switch that ends the work on it. `None`: the server is to end.
    pub(super) fn next(&self) -> Option<(BatchObject, Arc<AtomicBool>)> {
        let mut state = self.lock();
        loop {
            state.current = None;
            if state.closing {
                return None;
            }
            let next = in_order(&state).into_iter().find(|batch| !batch.status.is_final());
            if let Some(batch) = next {
                let stop = Arc::new(AtomicBool::new(batch.status == Status::Cancelling));
                state.current = Some((batch.id.clone(), Arc::clone(&stop)));
                return Some((batch, stop));
            }
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for so long, or until something is asked for.
    pub(super) fn pause(&self, time: std::time::Duration) {
        let state = self.lock();
        if !state.closing {
            drop(self.wake.wait_timeout(state, time));
        }
    }

    /// Changes a batch, on the drive as well.
    pub(super) fn change(&self, id: &str, change: impl FnOnce(&mut BatchObject)) -> io::Result<BatchObject> {
        let _writing = self.lock_writing();
        let before = self.lock().batches.get(id).cloned().ok_or(io::ErrorKind::NotFound)?;
        let mut changed = before.clone();
        change(&mut changed);
        self.write("batches", id, &changed)?;
        let mut state = self.lock();
        if let Some(batch) = state.batches.get_mut(id) {
            // More may have been counted meanwhile.
            if changed.counts == before.counts {
                changed.counts = batch.counts;
            }
            batch.clone_from(&changed);
        }
        Ok(changed)
    }

    /// Counts requests of a batch, in memory only: a restart counts again.
    pub(super) fn count(&self, id: &str, counts: Counts) {
        if let Some(batch) = self.lock().batches.get_mut(id) {
            batch.counts = counts;
        }
    }

    fn drop_oldest(&self) -> Result<(), ApiError> {
        let batches = self.batches();
        let oldest = batches.iter().find(|batch| batch.status.is_final());
        let oldest = oldest.ok_or_else(|| ApiError::busy(batches.len()))?;
        fs::remove_file(self.description("batches", &oldest.id)).map_err(unwritten)?;
        self.lock().batches.remove(&oldest.id);
        Ok(())
    }

    fn description(&self, folder: &str, id: &str) -> PathBuf {
        self.options.folder.join(folder).join(format!("{id}.json"))
    }

    fn write(&self, folder: &str, id: &str, object: &impl Serialize) -> io::Result<()> {
        let text = serde_json::to_vec(object)?;
        replace_private_file_with(&self.description(folder, id), |file| file.write_all(&text))
    }

    /// The state is consistent between any two statements, so a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is always taken before the state.
    fn lock_writing(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Upload<'_> {
    /// Adds bytes that come from a client.
    ///
    /// # Errors
    /// When there are too many, or what the system says.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<(), ApiError> {
        let length = self.bytes + bytes.len() as u64;
        if length > self.batches.options.largest_file {
            let most = self.batches.options.largest_file;
            return Err(ApiError::new(
                Kind::TooLarge,
                format!("the file has more than {most} bytes, the most that is taken"),
            ));
        }
        let others: u64 = self.batches.lock().files.values().map(|file| file.bytes).sum();
        if others + length > self.batches.options.max_bytes {
            let most = self.batches.options.max_bytes;
            return Err(ApiError::new(
                Kind::TooLarge,
                format!("all files would have more than {most} bytes: delete some"),
            ));
        }
        self.write(bytes)
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ApiError> {
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes).map_err(unwritten)
    }

    /// Keeps the file, durably.
    ///
    /// # Errors
    /// What the system says.
    pub fn keep(mut self, filename: String, purpose: &str) -> Result<FileObject, ApiError> {
        self.file.sync_all().map_err(unwritten)?;
        fs::rename(self.partial(), self.batches.content(&self.id)).map_err(unwritten)?;
        self.kept = true;
        let (id, bytes) = (self.id.clone(), self.bytes);
        let file = FileObject { id, bytes, created_at: now(), filename, purpose: purpose.to_owned() };
        self.batches.write("files", &file.id, &file).map_err(unwritten)?;
        self.batches.lock().files.insert(file.id.clone(), file.clone());
        Ok(file)
    }

    fn partial(&self) -> PathBuf {
        self.batches.content(&self.id).with_extension(format!("jsonl{PARTIAL}"))
    }
}

impl Drop for Upload<'_> {
    fn drop(&mut self) {
        if !self.kept {
            // What is left is removed by the next start.
            let _ = fs::remove_file(self.partial());
        }
    }
}

fn in_order(state: &State) -> Vec<BatchObject> {
    let mut batches: Vec<BatchObject> = state.batches.values().cloned().collect();
    batches.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
    batches
}

/// What is described in a folder.
trait Described: DeserializeOwned {
    /// Its id.
    fn id(&self) -> &str;

    /// The ids of files that it names. They become parts of paths.
    fn files(&self) -> Vec<&str>;
}

impl Described for FileObject {
    fn id(&self) -> &str {
        &self.id
    }

    fn files(&self) -> Vec<&str> {
        Vec::new()
    }
}

impl Described for BatchObject {
    fn id(&self) -> &str {
        &self.id
    }

    fn files(&self) -> Vec<&str> {
        let optional = [&self.output_file_id, &self.error_file_id];
        std::iter::once(&self.input_file_id).chain(optional.into_iter().flatten()).map(String::as_str).collect()
    }
}

/// The descriptions in a folder, by id. What is left of uploads that were interrupted is removed; what is no description is left alone.
fn load<T: Described>(folder: &Path) -> io::Result<BTreeMap<String, T>> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", folder.display()));
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(named)? {
        let path = entry.map_err(named)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.ends_with(PARTIAL) {
            if let Err(error) = fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "what is left of an upload cannot be removed");
            }
        } else if let Some(id) = name.strip_suffix(".json") {
            match describe::<T>(&path, id) {
                Ok(object) => _ = found.insert(id.to_owned(), object),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "this description cannot be used, and is left alone")
                }
            }
        }
    }
    Ok(found)
}

/// Reads the description at `path`, which is named after the id.
fn describe<T: Described>(path: &Path, id: &str) -> io::Result<T> {
    let mut text = Vec::new();
    open_regular(path)?.take(DESCRIPTION_MOST).read_to_end(&mut text)?;
    let object: T = serde_json::from_slice(&text)?;
    let invalid = |message: String| Err(io::Error::new(io::ErrorKind::InvalidData, message));
    if object.id() != id {
        return invalid(format!("it describes {:?}, so it must have that name", object.id()));
    }
    let wrong = std::iter::once(id).chain(object.files()).find(|id| !is_id(id)).map(str::to_owned);
    match wrong {
        Some(wrong) => invalid(format!("{wrong:?} is no id: these have letters, digits, - and _ only")),
        None => Ok(object),
    }
}

/// Whether this can be an id, and so a part of the name of a file.
fn is_id(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    (1..=LONGEST_ID).contains(&text.len()) && text.bytes().all(is_plain)
}

fn missing(what: &str, id: &str) -> ApiError {
    ApiError::new(Kind::NotFound, format!("there is no {what} {id:?}"))
}

fn unwritten(error: io::Error) -> ApiError {
    ApiError::new(Kind::Internal, format!("the folder of batches cannot be used: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(folder: &Path) -> Batches {
        Batches::open(BatchOptions { largest_file: 10, max_bytes: 15, ..BatchOptions::new(folder.to_owned()) }).unwrap()
    }

    fn upload(batches: &Batches, bytes: &[u8]) -> Result<FileObject, ApiError> {
        let mut upload = batches.upload()?;
        bytes.chunks(3).try_for_each(|piece| upload.receive(piece))?;
        upload.keep("in.jsonl".into(), "batch")
    }

    fn batch_of(file: &FileObject) -> NewBatch {
        NewBatch {
            input_file_id: file.id.clone(),
            endpoint: "/v1/completions".into(),
            completion_window: "24h".into(),
            metadata: None,
        }
    }

    #[test]
    fn files_and_batches_survive_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let batches = open(folder.path());
        let file = upload(&batches, b"12345678").unwrap();
        let batch = batches.create(batch_of(&file)).unwrap();
        batches.cancel(&batch.id).unwrap();
        assert!(Batches::open(BatchOptions::new(folder.path().to_owned())).is_err(), "one server has the folder");
        drop(batches.upload().unwrap());
        drop(batches);
        fs::write(folder.path().join("files/file-x.jsonl.partial"), "left by a crash").unwrap();
        let batches = open(folder.path());
        assert_eq!(batches.files(), std::slice::from_ref(&file));
        assert_eq!(fs::read(batches.content(&file.id)).unwrap(), b"12345678");
        assert_eq!(batches.batch(&batch.id).unwrap().status, Status::Cancelling);
        assert_eq!(fs::read_dir(folder.path().join("files")).unwrap().count(), 2, "content and description");
    }

    #[test]
    fn what_is_no_description_is_left_alone_and_blocks_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let batches = open(folder.path());
        let file = upload(&batches, b"12345678").unwrap();
        let batch = batches.create(batch_of(&file)).unwrap();
        drop(batches);
        let described = fs::read_to_string(folder.path().join(format!("batches/{}.json", batch.id))).unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join("batches").join(name), text).unwrap();
        fs::create_dir(folder.path().join("batches/batch_0.json")).unwrap();
        fs::create_dir(folder.path().join("files/file-0.jsonl.partial")).unwrap();
        write("batch_1.json", "{");
        // The oldest in the queue, under the name of another.
        write("batch_2.json", &described);
        let elsewhere = described.replace(&batch.id, "batch_3").replace(&file.id, "../../../etc/passwd");
        write("batch_3.json", &elsewhere);
        let batches = open(folder.path());
        assert_eq!(batches.batches(), std::slice::from_ref(&batch));
        assert_eq!(batches.next().unwrap().0, batch);
        assert!(
            ["batch_0.json", "batch_1.json", "batch_2.json", "batch_3.json"].iter().all(|name| folder
                .path()
                .join("batches")
                .join(name)
                .exists())
        );
        assert!(is_id("file-0aB_") && !["", "..", "a/b", "a.b", &"x".repeat(65)].iter().any(|text| is_id(text)));
    }

    #[test]
    fn whoever_reads_does_not_wait_for_the_drive() {
        let folder = tempfile::tempdir().unwrap();
        let batches = open(folder.path());
        let file = upload(&batches, b"12345678").unwrap();
        let batch = batches.create(batch_of(&file)).unwrap();
        // Somebody writes, and does not come to an end.
        let writing = batches.lock_writing();
        std::thread::scope(|scope| {
            let change = scope.spawn(|| batches.change(&batch.id, |batch| batch.set(Status::InProgress)));
            assert_eq!(batches.batch(&batch.id).unwrap().status, Status::Validating);
            assert_eq!((batches.files().len(), batches.batches().len()), (1, 1));
            batches.count(&batch.id, Counts { total: 3, completed: 1, failed: 0 });
            drop(writing);
            assert_eq!(change.join().unwrap().unwrap().counts.total, 3);
        });
        assert_eq!(batches.batch(&batch.id).unwrap().status, Status::InProgress);
        assert_eq!(batches.batch(&batch.id).unwrap().counts.completed, 1, "what was counted meanwhile stays");
    }

    #[test]
    fn files_are_bounded_and_kept_while_they_are_needed() {
        let folder = tempfile::tempdir().unwrap();
        let batches = open(folder.path());
        assert_eq!(upload(&batches, &[b'x'; 11]).unwrap_err().kind, Kind::TooLarge);
        let file = upload(&batches, &[b'x'; 10]).unwrap();
        assert_eq!(upload(&batches, &[b'x'; 6]).unwrap_err().kind, Kind::TooLarge, "all together");
        let batch = batches.create(batch_of(&file)).unwrap();
        assert_eq!(batches.delete(&file.id).unwrap_err().kind, Kind::Invalid);
        let (next, _) = batches.next().unwrap();
        assert_eq!(next, batch);
        // The worker does not know yet that it was cancelled.
        assert_eq!(batches.cancel(&batch.id).unwrap().status, Status::Cancelling);
        let changed = batches.change(&batch.id, |batch| batch.advance(Status::InProgress)).unwrap();
        assert_eq!((next.status, changed.status), (Status::Validating, Status::Cancelling));
        batches.change(&batch.id, |batch| batch.set(Status::Failed)).unwrap();
        batches.delete(&file.id).unwrap();
        assert_eq!(batches.create(batch_of(&file)).unwrap_err().kind, Kind::NotFound);
        assert_eq!(batches.cancel(&batch.id).unwrap_err().kind, Kind::Invalid);
        batches.close();
        assert!(batches.next().is_none());
    }
}
