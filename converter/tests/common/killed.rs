//! A conversion in a separate process that is killed.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{fs, thread};

use sluice_converter::{Options, Progress, convert};

/// When a conversion is killed.
#[derive(Clone, Copy)]
pub struct KillAt {
    /// After this many bytes.
    pub bytes: u64,
    /// But not before its journal says that something is done. The conversion must have more extents than a batch.
    pub journaled: bool,
}

impl KillAt {
    pub const NEVER: KillAt = KillAt { bytes: u64::MAX, journaled: false };
}

/// Kills this process.
struct Killer {
    at: KillAt,
    /// Bytes that have not been made yet.
    left: AtomicU64,
    total: AtomicU64,
    journal: PathBuf,
    /// The journal's length before the first extent was finished.
    empty: OnceLock<u64>,
}

impl Killer {
    fn journal_len(&self) -> u64 {
        fs::metadata(&self.journal).map_or(0, |metadata| metadata.len())
    }
}

impl Progress for Killer {
    fn started(&self, total: u64, done: u64) {
        self.total.store(total, Ordering::Relaxed);
        self.left.store(total - done, Ordering::Relaxed);
    }

    fn note(&self, _: &str) {}

    fn advanced(&self, bytes: u64) {
        let empty = *self.empty.get_or_init(|| self.journal_len());
        let left = self.left.fetch_sub(bytes, Ordering::Relaxed) - bytes;
        if self.total.load(Ordering::Relaxed) - left < self.at.bytes && left > 0 {
            return;
        }
        // The other thread may still wait for the drive with a full batch. This one continues while there is more to do.
        let since = Instant::now();
        while self.at.journaled && self.journal_len() == empty {
            if left > 0 {
                return;
            }
            assert!(since.elapsed() < Duration::from_secs(300), "nothing was journaled");
            thread::sleep(Duration::from_millis(1));
        }
        if self.at.bytes < u64::MAX {
            nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL).unwrap();
        }
    }
}

/// Stops a program when all volumes but the first have their names, as if it had been killed then: the first partial file is moved away when
/// the first bytes are written, and so cannot get its name.
pub struct StopAtNames {
    partial: PathBuf,
}

impl StopAtNames {
    /// For the model `dst`.
    pub fn new(dst: &Path) -> Self {
        StopAtNames { partial: dst.with_extension("sluice.partial") }
    }

    /// To be called when the program has ended: moves the partial file back.
    pub fn put_back(&self) {
        fs::rename(self.aside(), &self.partial).unwrap();
    }

    fn aside(&self) -> PathBuf {
        self.partial.with_extension("aside")
    }
}

impl Progress for StopAtNames {
    fn started(&self, _: u64, _: u64) {}
    fn note(&self, _: &str) {}
    fn advanced(&self, _: u64) {
        // Only the first thread finds it there.
        let _ = fs::rename(&self.partial, self.aside());
    }
}

/// Starts the test `child` of this program (its whole name, with modules), which must call [`child`], as a process that is killed
/// at `at`. It gets `also`.
pub fn spawn(child: &str, src: &Path, dst: &Path, at: KillAt, also: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", child, "--test-threads", "1"])
        .env("SLUICE_TEST_SRC", src)
        .env("SLUICE_TEST_DST", dst)
        .env("SLUICE_TEST_KILL_AT", at.bytes.to_string())
        .env("SLUICE_TEST_JOURNALED", at.journaled.to_string())
        .env("SLUICE_TEST_ALSO", also)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// The process that [`spawn`] starts: a conversion with the options that `options` makes from the passed text. In any other
/// process, it does nothing.
pub fn child(options: impl FnOnce(&str) -> Options) {
    let Ok(src) = std::env::var("SLUICE_TEST_SRC") else { return };
    let variable = |name: &str| std::env::var(name).unwrap();
    let dst = PathBuf::from(variable("SLUICE_TEST_DST"));
    let at = KillAt {
        bytes: variable("SLUICE_TEST_KILL_AT").parse().unwrap(),
        journaled: variable("SLUICE_TEST_JOURNALED").parse().unwrap(),
    };
    let mut journal = dst.clone().into_os_string();
    journal.push(".partial.journal");
    let killer = Killer {
        at,
        left: AtomicU64::new(0),
        total: AtomicU64::new(0),
        journal: journal.into(),
        empty: OnceLock::new(),
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let options = options(&variable("SLUICE_TEST_ALSO"));
    pool.install(|| convert(Path::new(&src), &dst, &options, &killer)).unwrap();
}
