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
use crate::pieces::with_suffix;
use crate::pin::Pin;
use crate::pull::{CONNECTIONS, free_space, pinned_snapshot};
use crate::select::{Form, form, gguf_files};
use crate::snapshot::{RemoteFile, Snapshot};
use crate::source::{HubSource, Remote};

/// Files that are here at once: one that is being converted, and one that comes. A third waits until what both need of the first is
/// done, which comes first.
pub(crate) const WINDOW: usize = 2;
/// The file of the folder beside the model file that says which commit it is of.
const PIN: &str = ".sluice-download";
/// The line is measured with at most so many bytes, over so long.
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

/// What a conversion needs, before it begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Needs {
    /// Bytes to download.
    pub download: u64,
    /// Most bytes of downloaded files that are on the drive at once.
    pub scratch: u64,
    /// Most bytes of what measuring needs on the drive meanwhile.
    pub measuring: u64,
    /// Bytes of the model file.
    pub file: u64,
    /// Bytes that are free where it goes; `None` where the system does not say.
    pub free: Option<u64>,
}

impl HubConversion {
    /// Asks the hub for the repository, and reads the headers of the files that make the model. `dst` is the model file that will be
    /// written; beside it, `DST.partial.source` holds what is downloaded, and says which commit an interrupted conversion is of.
    /// With `keep`, the files stay there.
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
        let (pin, pinned) = match folder.join(PIN).exists() {
            true => {
                let (pin, pinned) = Pin::open(&folder.join(PIN), &reference.repo, &revision)?;
                (Some(pin), pinned)
            }
            false => (None, None),
        };
        let snapshot = pinned_snapshot(&client, reference, pinned.as_deref(), &mut notes)?;
        let files = model_files(&client, &snapshot, reference)?;
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

    /// How much has to be downloaded and written. `kept`: bytes that measuring keeps from layer to layer
    /// ([`sluice_converter::measure::Measure::kept_bytes`]).
    pub fn needs(&self, plan: &Plan, dst: &Path, kept: u64) -> Needs {
        let files = self.remote.files();
        let download = files.iter().map(|file| file.size).sum();
        let scratch = if self.keep { download } else { scratch(files, &plan.file_uses()) };
        let folder = dst.parent().unwrap_or(Path::new("."));
        let measuring = plan.measuring_bytes(kept);
        Needs { download, scratch, measuring, file: plan.file_bytes(), free: free_space(folder) }
    }

    /// Bytes on the drive that an interrupted conversion to `dst` has taken, and that this one uses again.
    pub fn taken(&self, dst: &Path) -> u64 {
        let occupied = |path: &Path| path.metadata().map_or(0, |m| m.blocks() * 512);
        let downloads = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let here = [".partial", ".partial.states"].map(|suffix| occupied(&with_suffix(dst, suffix)));
        here.iter().sum::<u64>() + downloads.map(|entry| occupied(&entry.path())).sum::<u64>()
    }

    /// Measures the line, in bytes per second, with a few megabytes; `None` for models that are here before it is measured.
    ///
    /// # Errors
    /// [`HubError`].
    pub fn measure_line(&self) -> Result<Option<f64>, HubError> {
        let files = self.remote.files();
        let Some(largest) = files.iter().max_by_key(|file| file.size).filter(|file| file.size > 4 * PROBE_BYTES) else {
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

    /// Makes the folder for what is downloaded: from here on, reads of the source wait for files.
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

    /// After the conversion: removes the folder, or completes the checkpoint in it, gives it a name beside the model file and
    /// returns that.
    ///
    /// # Errors
    /// [`HubError`].
    pub fn finish(&self, dst: &Path) -> Result<Option<PathBuf>, HubError> {
        if let Some(pin) = lock(&self.pin).take() {
            pin.remove()?;
        }
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
        Ok(Some(kept))
    }
}

/// Small files that belong to a checkpoint.
fn is_text(path: &str) -> bool {
    let endings = [".json", ".txt", ".model", ".jinja", ".md", ".py"];
    !path.contains('/') && (endings.iter().any(|end| path.ends_with(end)) || path.starts_with("LICENSE"))
}

/// The files that make the model that is meant.
fn model_files(client: &Client, snapshot: &Snapshot, reference: &Reference) -> Result<Vec<RemoteFile>, HubError> {
    if form(snapshot, reference)? == Form::Gguf {
        return Ok(gguf_files(snapshot, reference.part.as_deref())?.into_iter().cloned().collect());
    }
    if snapshot.find(CONFIG).is_none() {
        let problem = format!("there is no `{CONFIG}`: the weights alone do not say what to compute with them");
        return Err(HubError::Selection { repo: snapshot.repo.clone(), problem });
    }
    let index = snapshot.find(INDEX).map(|file| snapshot.small_file(client, file)).transpose()?;
    let names: Vec<String> = snapshot.files.iter().map(|file| file.path.clone()).filter(|p| !p.contains('/')).collect();
    let path = PathBuf::from(format!("{PREFIX}{}", snapshot.repo));
    let files = safetensors_files(&path, &names, index.as_deref());
    let files = files.map_err(|e| HubError::Selection { repo: snapshot.repo.clone(), problem: e.to_string() })?;
    let found = files.iter().filter_map(|name| snapshot.find(name)).cloned();
    Ok(found.collect())
}

/// Most bytes of files that are here at once, by the rule that lets them come.
fn scratch(files: &[RemoteFile], uses: &[FileUse]) -> u64 {
    let mut order: Vec<&FileUse> = uses.iter().collect();
    order.sort_by_key(|u| (u.first, u.last, u.file));
    let (mut here, mut most): (Vec<&FileUse>, u64) = (Vec::new(), 0);
    for next in order {
        while here.iter().filter(|u| u.last < next.last).count() >= WINDOW {
            // The one that leaves first, if it leaves before the next one is needed.
            let leaving = here.iter().enumerate().filter(|(_, u)| u.last < next.first);
            let Some((at, _)) = leaving.min_by_key(|(_, u)| u.last) else { break };
            here.remove(at);
        }
        here.push(next);
        most = most.max(here.iter().map(|u| files[u.file].size).sum());
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    #[test]
    fn the_scratch_space_is_a_few_files() {
        let file = |size| RemoteFile { path: String::new(), size, digest: Digest::Git([0; 20]) };
        let files: Vec<RemoteFile> = [5, 7, 9, 3, 1].map(file).to_vec();
        let uses = |spans: &[(usize, usize)]| -> Vec<FileUse> {
            spans.iter().enumerate().map(|(file, &(first, last))| FileUse { file, first, last }).collect()
        };
        assert_eq!(scratch(&files, &uses(&[(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)])), 16);
        assert_eq!(scratch(&files, &uses(&[(0, 9), (1, 9), (2, 9), (3, 9), (4, 9)])), 25);
        assert_eq!(scratch(&files, &uses(&[(0, 1), (1, 2)])), 12);
    }
}
