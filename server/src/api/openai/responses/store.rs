//! Stored responses, which can be continued by their id: in memory, or in a folder, where they survive a restart.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::ApiError;
use crate::options::SessionOptions;

/// A response and the items that it answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The response object.
    pub response: Value,
    /// The request's own items.
    pub input: Vec<Value>,
}

/// Limits of a store.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Most responses.
    pub count: usize,
    /// Most bytes of JSON.
    pub bytes: u64,
}

impl Bounds {
    /// In memory.
    const MEMORY: Bounds = Bounds { count: 2048, bytes: 64 << 20 };
    /// In a folder.
    const FOLDER: Bounds = Bounds { count: 16_384, bytes: 512 << 20 };
}

/// Prefix of an id.
const PREFIX: &str = "resp_";
/// Extension of a file's name.
const EXTENSION: &str = ".json";

/// The store. It removes the least recently used responses first.
pub struct ResponseStore {
    folder: Option<PathBuf>,
    bounds: Bounds,
    expire_after: Option<Duration>,
    shelf: Mutex<Shelf>,
}

#[derive(Default)]
struct Shelf {
    entries: HashMap<String, Entry>,
    bytes: u64,
    clock: u64,
}

struct Entry {
    /// `None` if it is in its file.
    record: Option<Arc<Record>>,
    bytes: u64,
    /// The clock's reading at the last use.
    used: u64,
    at: SystemTime,
}

impl ResponseStore {
    /// A store in memory, or in the folder of sessions. The folder is not read before [`ResponseStore::open`].
    pub fn new(sessions: Option<&SessionOptions>) -> Self {
        let bounds = match sessions {
            Some(sessions) => Bounds { bytes: Bounds::FOLDER.bytes.min(sessions.max_bytes), ..Bounds::FOLDER },
            None => Bounds::MEMORY,
        };
        Self::bounded(sessions, bounds)
    }

    /// The same with other limits.
    pub fn bounded(sessions: Option<&SessionOptions>, bounds: Bounds) -> Self {
        ResponseStore {
            folder: sessions.map(|sessions| sessions.folder.join("responses")),
            bounds,
            expire_after: sessions.and_then(|sessions| sessions.expire_after),
            shelf: Mutex::default(),
        }
    }

    /// Creates the folder if necessary, and finds its files.
    ///
    /// # Errors
    /// The system's error.
    pub fn open(&self) -> io::Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let mut found = Vec::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let metadata = entry.metadata()?;
            if name.ends_with(".partial") {
                // The server ended while it was writing this.
                fs::remove_file(entry.path())?;
            } else if let Some(id) = name.strip_suffix(EXTENSION).filter(|id| is_id(id) && metadata.is_file()) {
                found.push((metadata.modified()?, id.to_owned(), metadata.len()));
            }
        }
        found.sort();
        let mut shelf = self.lock();
        for (at, id, bytes) in found {
            shelf.insert(id, Entry { record: None, bytes, used: 0, at });
        }
        let gone = shelf.shrink(self.bounds, self.expire_after);
        drop(shelf);
        self.remove_files(&gone);
        Ok(())
    }

    /// Stores a response under its id.
    pub fn put(&self, record: Record) {
        let Some(id) = record.response["id"].as_str().filter(|id| is_id(id)).map(str::to_owned) else { return };
        let Ok(text) = serde_json::to_vec(&record) else { return };
        let bytes = text.len() as u64;
        if bytes > self.bounds.bytes {
            tracing::warn!(%id, bytes, "a response is too large to be kept");
            return;
        }
        let written = match self.write(&id, &text) {
            Ok(written) => written,
            Err(error) => {
                tracing::warn!(%id, %error, "a response cannot be written, so it is kept in memory only");
                false
            }
        };
        let record = (!written).then(|| Arc::new(record));
        let mut shelf = self.lock();
        shelf.insert(id, Entry { record, bytes, used: 0, at: SystemTime::now() });
        let gone = shelf.shrink(self.bounds, self.expire_after);
        drop(shelf);
        self.remove_files(&gone);
    }

    /// The response with an id. May read a file.
    pub fn get(&self, id: &str) -> Option<Arc<Record>> {
        let mut shelf = self.lock();
        let gone = shelf.shrink(self.bounds, self.expire_after);
        let found = shelf.touch(id);
        drop(shelf);
        self.remove_files(&gone);
        if let Some(record) = found? {
            return Some(record);
        }
        let path = self.path(id)?;
        let read = || -> io::Result<Record> {
            let record = serde_json::from_slice(&fs::read(&path)?)?;
            // The time of the last use survives a restart.
            File::open(&path)?.set_modified(SystemTime::now())?;
            Ok(record)
        };
        match read() {
            Ok(record) if record.response["id"] == id => Some(Arc::new(record)),
            Ok(_) => None,
            Err(error) => {
                tracing::warn!(%id, %error, "a response cannot be read");
                None
            }
        }
    }

    /// Forgets a response; `false` if there is none with this id.
    pub fn delete(&self, id: &str) -> bool {
        let removed = self.lock().remove(id);
        if removed {
            self.remove_files(&[id.to_owned()]);
        }
        removed
    }

    /// As [`ResponseStore::history`]; nothing if there is no response before.
    ///
    /// # Errors
    /// As [`ResponseStore::history`].
    pub fn history_of(&self, id: Option<&str>) -> Result<Vec<Value>, ApiError> {
        id.map_or(Ok(Vec::new()), |id| self.history(id))
    }

    /// All items of a response and of those before it, from the first on.
    ///
    /// # Errors
    /// If one of them is missing.
    pub fn history(&self, id: &str) -> Result<Vec<Value>, ApiError> {
        let mut records = Vec::new();
        let mut next = Some(id.to_owned());
        while let Some(id) = next {
            let record = self.get(&id).ok_or_else(|| {
                let message = format!(
                    "there is no response {id:?}: it was not stored, or it is gone; send the whole conversation as `input`"
                );
                ApiError::field("previous_response_id", message).code("previous_response_not_found")
            })?;
            next = record.response["previous_response_id"].as_str().map(str::to_owned);
            records.push(record);
            if records.len() > self.bounds.count {
                let message = "the responses before this one form a circle: send the whole conversation as `input`";
                return Err(ApiError::field("previous_response_id", message));
            }
        }
        let items = records.iter().rev().flat_map(|record| {
            let output = record.response["output"].as_array().into_iter().flatten();
            record.input.iter().chain(output).cloned()
        });
        Ok(items.collect())
    }

    /// Writes a file atomically, so that a reader sees all of it or nothing. `false`: there is no folder.
    fn write(&self, id: &str, text: &[u8]) -> io::Result<bool> {
        let Some(path) = self.path(id) else { return Ok(false) };
        let partial = path.with_extension("partial");
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial)?;
        let written = file.write_all(text).and_then(|()| fs::rename(&partial, &path));
        if written.is_err() {
            let _ = fs::remove_file(&partial);
        }
        written.map(|()| true)
    }

    /// The file of an id. Only ids that this store made have one, so no name can lead out of the folder.
    fn path(&self, id: &str) -> Option<PathBuf> {
        let folder = self.folder.as_ref()?;
        is_id(id).then(|| folder.join(format!("{id}{EXTENSION}")))
    }

    fn remove_files(&self, ids: &[String]) {
        for path in ids.iter().filter_map(|id| self.path(id)) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "a response cannot be deleted");
                }
                _ => {}
            }
        }
    }

    /// The state is consistent between any two statements, so a panic elsewhere does no harm.
    fn lock(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shelf {
    fn insert(&mut self, id: String, entry: Entry) {
        self.clock += 1;
        self.bytes += entry.bytes;
        if let Some(old) = self.entries.insert(id, Entry { used: self.clock, ..entry }) {
            self.bytes -= old.bytes;
        }
    }

    fn remove(&mut self, id: &str) -> bool {
        let removed = self.entries.remove(id);
        self.bytes -= removed.as_ref().map_or(0, |entry| entry.bytes);
        removed.is_some()
    }

    fn touch(&mut self, id: &str) -> Option<Option<Arc<Record>>> {
        let entry = self.entries.get_mut(id)?;
        self.clock += 1;
        entry.used = self.clock;
        entry.at = SystemTime::now();
        Some(entry.record.clone())
    }

    /// Removes responses that have expired, and the least recently used ones beyond the limits. Returns their ids.
    fn shrink(&mut self, bounds: Bounds, expire_after: Option<Duration>) -> Vec<String> {
        let now = SystemTime::now();
        let is_old = |entry: &Entry| {
            let age = now.duration_since(entry.at).unwrap_or_default();
            expire_after.is_some_and(|limit| age > limit)
        };
        let mut gone: Vec<String> = match expire_after {
            Some(_) => self.entries.iter().filter(|(_, entry)| is_old(entry)).map(|(id, _)| id.clone()).collect(),
            None => Vec::new(),
        };
        for id in &gone {
            self.remove(id);
        }
        while self.entries.len() > bounds.count || self.bytes > bounds.bytes {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.used).map(|(id, _)| id.clone());
            let Some(id) = oldest else { break };
            self.remove(&id);
            gone.push(id);
        }
        gone
    }
}

/// Whether it has the form of our ids: a prefix and 32 hexadecimal digits.
fn is_id(id: &str) -> bool {
    let digits = id.strip_prefix(PREFIX).unwrap_or_default();
    digits.len() == 32 && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::openai::new_id;
    use serde_json::json;
    use std::os::unix::fs::PermissionsExt;

    fn record(id: &str, previous: Option<&str>, text: &str) -> Record {
        let response = json!({"id": id, "previous_response_id": previous, "output": [{"text": format!("out {text}")}]});
        Record { response, input: vec![json!({"text": format!("in {text}")})] }
    }

    fn sessions(folder: &std::path::Path) -> SessionOptions {
        SessionOptions { folder: folder.to_owned(), max_bytes: 1 << 20, expire_after: None }
    }

    #[test]
    fn a_chain_is_told_from_its_beginning() {
        let store = ResponseStore::new(None);
        let ids: Vec<String> = (0..3).map(|_| new_id(PREFIX)).collect();
        for (i, id) in ids.iter().enumerate() {
            store.put(record(id, i.checked_sub(1).map(|before| ids[before].as_str()), &i.to_string()));
        }
        let texts: Vec<Value> = store.history(&ids[2]).unwrap().iter().map(|item| item["text"].clone()).collect();
        assert_eq!(texts, ["in 0", "out 0", "in 1", "out 1", "in 2", "out 2"]);
        assert!(store.delete(&ids[0]));
        assert!(!store.delete(&ids[0]));
        assert_eq!(store.history(&ids[2]).unwrap_err().code, Some("previous_response_not_found"));
    }

    #[test]
    fn a_circle_ends() {
        let store = ResponseStore::bounded(None, Bounds { count: 4, bytes: 1 << 20 });
        let id = new_id(PREFIX);
        store.put(record(&id, Some(&id), "x"));
        assert!(store.history(&id).is_err());
    }

    #[test]
    fn what_was_used_least_recently_goes_first() {
        let store = ResponseStore::bounded(None, Bounds { count: 2, bytes: 1 << 20 });
        let ids: Vec<String> = (0..3).map(|_| new_id(PREFIX)).collect();
        store.put(record(&ids[0], None, "0"));
        store.put(record(&ids[1], None, "1"));
        assert!(store.get(&ids[0]).is_some());
        store.put(record(&ids[2], None, "2"));
        assert_eq!(ids.iter().map(|id| store.get(id).is_some()).collect::<Vec<_>>(), [true, false, true]);
        let small = ResponseStore::bounded(None, Bounds { count: 9, bytes: 300 });
        for id in &ids {
            small.put(record(id, None, "text"));
        }
        assert!(small.get(&ids[0]).is_none() && small.get(&ids[2]).is_some());
        assert!(small.lock().bytes <= 300);
    }

    #[test]
    fn files_outlive_the_store() {
        let folder = tempfile::tempdir().unwrap();
        let options = sessions(folder.path());
        let (id, other) = (new_id(PREFIX), new_id(PREFIX));
        let first = ResponseStore::new(Some(&options));
        first.open().unwrap();
        first.put(record(&id, None, "kept"));
        first.put(record(&other, None, "other"));
        assert!(first.delete(&other));
        let path = folder.path().join("responses").join(format!("{id}.json"));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(folder.path().join("responses/x.partial"), "half").unwrap();
        let second = ResponseStore::new(Some(&options));
        second.open().unwrap();
        assert_eq!(*second.get(&id).unwrap(), record(&id, None, "kept"));
        assert!(second.get(&other).is_none());
        assert_eq!(fs::read_dir(folder.path().join("responses")).unwrap().count(), 1);
        fs::write(&path, "{").unwrap();
        assert!(second.get(&id).is_none(), "a broken file is no response");
    }

    #[test]
    fn what_nobody_used_expires() {
        let folder = tempfile::tempdir().unwrap();
        let options = SessionOptions { expire_after: Some(Duration::from_secs(60)), ..sessions(folder.path()) };
        let id = new_id(PREFIX);
        let store = ResponseStore::new(Some(&options));
        store.open().unwrap();
        store.put(record(&id, None, "old"));
        let path = folder.path().join("responses").join(format!("{id}.json"));
        File::open(&path).unwrap().set_modified(SystemTime::now() - Duration::from_secs(61)).unwrap();
        let again = ResponseStore::new(Some(&options));
        again.open().unwrap();
        assert!(again.get(&id).is_none());
        assert!(!path.exists());
    }

    #[test]
    fn only_our_ids_are_names_of_files() {
        let folder = tempfile::tempdir().unwrap();
        let store = ResponseStore::new(Some(&sessions(folder.path())));
        for id in ["resp_../../etc/passwd", "resp_", "", "resp_0123456789ABCDEF0123456789ABCDEF", "resp_é"] {
            assert!(store.path(id).is_none() && store.get(id).is_none(), "{id}");
        }
        assert!(store.path(&new_id(PREFIX)).is_some());
    }
}
