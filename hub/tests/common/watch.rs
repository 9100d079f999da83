//! How much of what is downloaded is on the drive at once.

#![allow(dead_code, reason = "not every test does everything")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use sluice_hub::Observer;

/// Most bytes of downloaded weights that a folder had when somebody looked. As an observer of downloads it looks after every write:
/// nothing else makes it more, so no peak is missed.
#[derive(Debug)]
pub struct Peak {
    folder: PathBuf,
    most: AtomicU64,
}

impl Peak {
    pub fn of(folder: PathBuf) -> Arc<Peak> {
        Arc::new(Peak { folder, most: AtomicU64::new(0) })
    }

    pub fn look(&self) {
        // By what identifies a file, so that one that is renamed or deleted meanwhile counts once.
        let mut files = BTreeMap::new();
        let paths = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path());
        let named = paths(&self.folder).filter(|path| path.to_string_lossy().contains(".safetensors"));
        // Those that are deleted and still open keep their space.
        let open = paths(Path::new("/proc/self/fd")).filter(|path| {
            let target = fs::read_link(path).unwrap_or_default();
            let name = target.to_string_lossy();
            target.starts_with(&self.folder) && name.ends_with(" (deleted)") && name.contains(".safetensors")
        });
        for path in named.chain(open) {
            if let Ok(found) = path.metadata() {
                files.insert(found.ino(), found.len());
            }
        }
        self.most.fetch_max(files.values().sum(), Ordering::Relaxed);
    }

    pub fn most(&self) -> u64 {
        self.most.load(Ordering::Relaxed)
    }
}

impl Observer for Peak {
    fn expects(&self, _bytes: u64) {}
    fn arrived(&self, _bytes: u64) {
        self.look();
    }
    fn lost(&self, _bytes: u64) {}
    fn note(&self, _text: &str) {}
}

/// Looks at a folder that another process writes to, as often as it can.
pub struct Watch {
    over: Arc<AtomicBool>,
    peak: Arc<Peak>,
    thread: thread::JoinHandle<()>,
}

impl Watch {
    pub fn new(folder: PathBuf) -> Watch {
        let (over, peak) = (Arc::new(AtomicBool::new(false)), Peak::of(folder));
        let (stop, looker) = (Arc::clone(&over), Arc::clone(&peak));
        let thread = thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                looker.look();
                thread::sleep(Duration::from_micros(500));
            }
        });
        Watch { over, peak, thread }
    }

    pub fn most(self) -> u64 {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.peak.most()
    }
}
