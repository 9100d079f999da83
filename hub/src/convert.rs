//! A conversion straight from the hub.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use sluice_converter::Plan;
use sluice_converter::source::{CONFIG, FileUse, INDEX, Source, safetensors_files};

use crate::client::{Client, lock};
use crate::downloads::Observer;
use crate::error::HubError;
use crate::name::{PREFIX, Reference};
use crate::pieces::{remove, with_suffix};
use crate::pin::Pin;
use crate::pull::{CONNECTIONS, PIN, free_space, pinned_snapshot, unverified};
use crate::select::{Form, base_name, form, gguf_files};
use crate::snapshot::{RemoteFile, Snapshot};
use crate::source::{HubSource, Remote};

/// Files on the drive at once: one that is being converted, and one that is being downloaded. A third waits until all extents that
/// need the first are done; those are made first.
pub(crate) const WINDOW: usize = 2;
/// The line is measured with at most this many bytes, for at most this long.
const PROBE_BYTES: u64 = 48 << 20;
const PROBE_TIME: Duration = Duration::from_secs(2);

/// A conversion from the hub, about to begin.
#[derive(Debug)]
pub struct HubConversion {
    remote: Arc<Remote>,
    revision: String,
    folder: PathBuf,
    keep: bool,
    pin: Mutex<Option<Pin>>,
    notes: Vec<String>,
}

/// What a conversion will need.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Needs {
    /// Bytes to download.
    pub download: u64,
    /// Bytes of files that the hub's own programs have downloaded already.
    pub cached: u64,
    /// Most bytes of downloaded files that are on the drive at once.
    pub scratch: u64,
    /// Most bytes on the drive that measuring needs meanwhile.
    pub measuring: u64,
    /// Bytes of the model file.
    pub file: u64,
    /// Bytes that are free on its drive; `None` if the system does not say.
    pub free: Option<u64>,
}

impl HubConversion {
    /// Asks the hub for the repository, and reads the headers of the files that make the model. `dst` is the model file that will be
    /// written. Beside it, `DST.partial.source` holds the downloads and the commit of an interrupted conversion. With `keep`, the
    /// files stay there.
    ///
    /// # Errors
    /// [`HubError`].
    pub fn prepare(
        client: Arc<Client>,
        reference: &Reference,
        dst: &Path,
        keep: bool,
        observer: Arc<dyn Observer>,
    ) -> Result<Self, HubError> {
        let folder = with_suffix(dst, ".partial.source");
        let (revision, mut notes) = (reference.revision().to_owned(), Vec::new());
        let (pin, pinned) = Pin::of_interrupted(&folder.join(PIN), &reference.repo, &revision)?;
        let snapshot = pinned_snapshot(&client, reference, pinned.as_deref(), &mut notes)?;
        let files = model_files(&client, &snapshot, reference)?;
        notes.extend(unverified(files.iter()));
        let remote = Remote::open(client, Arc::new(snapshot), observer, files, (folder.clone(), keep))?;
        Ok(HubConversion { remote: Arc::new(remote), revision, folder, keep, pin: Mutex::new(pin), notes })
    }

    /// What to convert, for `plan_source`.
    pub fn source(&self) -> Box<dyn Source> {
        Box::new(HubSource(Arc::clone(&self.remote)))
    }

    /// The commit that is converted.
    pub fn commit(&self) -> &str {
        &self.remote.snapshot().commit
    }

    /// Remarks for the user.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// How much has to be downloaded and written. `kept` is the number of bytes that measuring keeps from layer to
    /// layer ([`sluice_converter::measure::Measure::kept_bytes`]).
    pub fn needs(&self, plan: &Plan, dst: &Path, kept: u64) -> Needs {
        let files = self.remote.files();
        let all: u64 = files.iter().map(|file| file.size).sum();
        let sizes: Vec<u64> = files.iter().map(|file| if self.is_cached(file) { 0 } else { file.size }).collect();
        let download = sizes.iter().sum();
        let scratch = if self.keep { all } else { scratch(&sizes, &plan.file_uses()) };
        let folder = dst.parent().unwrap_or(Path::new("."));
        let (cached, measuring) = (all - download, plan.measuring_bytes(kept));
        Needs { download, cached, scratch, measuring, file: plan.file_bytes(), free: free_space(folder) }
    }

    fn is_cached(&self, file: &RemoteFile) -> bool {
        self.remote.snapshot().cached_file(self.remote.client(), file).is_some()
    }

    /// Bytes on the drive that an interrupted conversion to `dst` occupies, and that this one uses again.
    pub fn taken(&self, dst: &Path) -> u64 {
        let occupied = |path: &Path| path.metadata().map_or(0, |m| m.blocks() * 512);
        let downloads = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let here = [".partial", ".partial.states"].map(|suffix| occupied(&with_suffix(dst, suffix)));
        here.iter().sum::<u64>() + downloads.map(|entry| occupied(&entry.path())).sum::<u64>()
    }

    /// Measures the line, in bytes per second, with a few megabytes; `None` if no file is large enough to make that
    /// worthwhile.
    ///
    /// # Errors
    /// [`HubError`].
    pub fn measure_line(&self) -> Result<Option<f64>, HubError> {
        let wanted = self.remote.files().iter().filter(|file| !self.is_cached(file));
        let Some(largest) = wanted.max_by_key(|file| file.size).filter(|file| file.size > 4 * PROBE_BYTES) else {
            return Ok(None);
        };
        let (snapshot, client) = (self.remote.snapshot(), self.remote.client());
        let started = Instant::now();
        let share = PROBE_BYTES / CONNECTIONS as u64;
        let probe = |n: u64| {
            let (mut total, step) = (0, 1 << 20);
            let mut buffer = vec![0; step as usize];
            while total < share && started.elapsed() < PROBE_TIME {
                snapshot.range(client, largest, n * share + total, &mut buffer)?;
                total += step;
            }
            Ok(total)
        };
        let probe = &probe;
        let total = thread::scope(|scope| {
            let threads: Vec<_> = (0..CONNECTIONS as u64).map(|n| scope.spawn(move || probe(n))).collect();
            let results = threads.into_iter().map(|t| t.join().unwrap_or(Err(HubError::Stopped)));
            results.sum::<Result<u64, HubError>>()
        })?;
        Ok(Some(total as f64 / started.elapsed().as_secs_f64().max(1e-3)))
    }

    /// Makes the folder for downloads. From here on, reads of the source wait for files.
    ///
    /// # Errors
    /// [`HubError`]; among others [`HubError::Locked`] if another process converts to the same place.
    pub fn begin(&self) -> Result<(), HubError> {
        fs::create_dir_all(&self.folder).map_err(HubError::io(&self.folder, "create it"))?;
        let mut pin = lock(&self.pin);
        let snapshot = self.remote.snapshot();
        if pin.is_none() {
            *pin = Some(Pin::open(&self.folder.join(PIN), &snapshot.repo, &self.revision)?.0);
        }
        if let Some(pin) = &mut *pin {
            pin.set(&snapshot.repo, &self.revision, &snapshot.commit)?;
        }
        self.remote.begin();
        Ok(())
    }

    /// Whether an earlier run, whose model file at `dst` is complete, was interrupted before it could do what [`Self::finish`] does.
    pub fn is_unfinished(&self, dst: &Path) -> bool {
        let is_here = |file: &RemoteFile| {
            let path = self.folder.join(base_name(&file.path));
            path.metadata().is_ok_and(|found| found.len() == file.size)
        };
        let is_settled = !self.keep || self.remote.files().iter().all(is_here);
        self.folder.is_dir() && !with_suffix(dst, ".partial").exists() && is_settled
    }

    /// Call this after the conversion. Removes the folder; or completes the checkpoint in it, gives it a name beside the
    /// model file and returns that name.
    ///
    /// # Errors
    /// [`HubError`].
    pub fn finish(&self, dst: &Path) -> Result<Option<PathBuf>, HubError> {
        // Held to the end, so that no other process begins meanwhile, and after a kill the next one sees what this
        // is.
        let _pin = lock(&self.pin).take();
        if !self.keep {
            fs::remove_dir_all(&self.folder).map_err(HubError::io(&self.folder, "remove it"))?;
            return Ok(None);
        }
        let snapshot = self.remote.snapshot();
        for file in snapshot.files.iter().filter(|file| is_text(&file.path)) {
            let path = self.folder.join(&file.path);
            let bytes = snapshot.small_file(self.remote.client(), file)?;
            fs::write(&path, bytes).map_err(HubError::io(&path, "write it"))?;
        }
        let kept = with_suffix(dst, ".source");
        fs::rename(&self.folder, &kept).map_err(HubError::io(&self.folder, "rename it"))?;
        remove(&kept.join(PIN))?;
        Ok(Some(kept))
    }
}

/// Small files that belong to a checkpoint.
fn is_text(path: &str) -> bool {
    let endings = [".json", ".txt", ".model", ".jinja", ".md", ".py"];
    !path.contains('/') && (endings.iter().any(|end| path.ends_with(end)) || path.starts_with("LICENSE"))
}

/// The files that make the chosen model.
fn model_files(client: &Client, snapshot: &Snapshot, reference: &Reference) -> Result<Vec<RemoteFile>, HubError> {
    if form(snapshot, reference)? == Form::Gguf {
        return Ok(gguf_files(snapshot, reference.part.as_deref())?.into_iter().cloned().collect());
    }
    if snapshot.find(CONFIG).is_none() {
        let problem =
            format!("there is no `{CONFIG}`: the weights alone do not say what to compute with them. Check its name");
        return Err(HubError::Selection { repo: snapshot.repo.clone(), problem });
    }
    let index = snapshot.find(INDEX).map(|file| snapshot.small_file(client, file)).transpose()?;
    let names: Vec<String> = snapshot.files.iter().map(|file| file.path.clone()).filter(|p| !p.contains('/')).collect();
    let path = PathBuf::from(format!("{PREFIX}{}", snapshot.repo));
    let files = safetensors_files(&path, &names, index.as_deref());
    let files = files.map_err(|e| HubError::NoCheckpoint { problem: e.to_string() })?;
    let found = files.iter().filter_map(|name| snapshot.find(name)).cloned();
    Ok(found.collect())
}

/// Most bytes of files that are on the drive at once, by the rule that admits them.
fn scratch(sizes: &[u64], uses: &[FileUse]) -> u64 {
    let mut order: Vec<&FileUse> = uses.iter().collect();
    order.sort_by_key(|u| (u.first, u.last, u.file));
    let (mut here, mut most): (Vec<&FileUse>, u64) = (Vec::new(), 0);
    for next in order {
        while here.iter().filter(|u| u.last < next.last).count() >= WINDOW {
            // The file that can be deleted first, if that is possible before the next one is needed.
            let leaving = here.iter().enumerate().filter(|(_, u)| u.last < next.first);
            let Some((at, _)) = leaving.min_by_key(|(_, u)| u.last) else { break };
            here.remove(at);
        }
        here.push(next);
        most = most.max(here.iter().map(|u| sizes[u.file]).sum());
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scratch_space_is_a_few_files() {
        let files = [5, 7, 9, 3, 1];
        let uses = |spans: &[(usize, usize)]| -> Vec<FileUse> {
            spans.iter().enumerate().map(|(file, &(first, last))| FileUse { file, first, last }).collect()
        };
        assert_eq!(scratch(&files, &uses(&[(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)])), 16);
        assert_eq!(scratch(&files, &uses(&[(0, 9), (1, 9), (2, 9), (3, 9), (4, 9)])), 25);
        assert_eq!(scratch(&files, &uses(&[(0, 1), (1, 2)])), 12);
    }
}
