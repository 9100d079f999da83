//! Random histories of a conversion that is interrupted, damaged and resumed while its source is replaced, touched, renamed and
//! exchanged: the result is what a clean conversion writes, or an error; never anything else.
//!
//! `SLUICE_HISTORIES` is how many histories are played (default: 200), `SLUICE_HISTORIES_SEED` which ones (default: 1).

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use crate::common::{Noise, Synthetic, options, safetensors};
use nix::sys::stat::Mode;
use sluice_converter::{ConvertError, Options, Progress, Summary, convert};

const SHARDS: usize = 3;
/// The weights: a checkpoint, another one of the same shape, and the first with one sign of each shard changed.
const VARIANTS: usize = 3;
const SIDE_FILES: [&str; 2] = [r#"{"temperature": 0.5}"#, r#"{"temperature": 0.7}"#];
const TYPES: [&str; 2] = ["q8", "keep"];

/// What makes a model file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct State {
    shards: [usize; SHARDS],
    side: usize,
    types: usize,
}

fn shard_name(shard: usize) -> String {
    format!("model-{:05}-of-{SHARDS:06}.safetensors", shard + 1)
}

/// The files of all checkpoints, and the model files that clean conversions of them are.
struct Library {
    config: Vec<u8>,
    index: Vec<u8>,
    /// By shard and variant.
    shards: Vec<[Vec<u8>; VARIANTS]>,
    clean: Mutex<HashMap<State, Arc<Vec<u8>>>>,
}

impl Library {
    fn new(folder: &Path) -> Self {
        // More extents than the journal takes at once, so that an end without warning leaves some in it.
        let shape = Synthetic { layers: 3, experts: 70, hidden: 24, width: 16, vocab: 61, ..Synthetic::default() };
        fs::create_dir_all(folder).unwrap();
        shape.write(folder, SHARDS);
        let variants = |shard: usize| {
            let first = fs::read(folder.join(shard_name(shard))).unwrap();
            let data = 8 + u64::from_le_bytes(first[..8].try_into().unwrap()) as usize;
            // Signs of little-endian halves are in every other byte.
            let (mut second, mut third) = (first.clone(), first.clone());
            second[data..].iter_mut().skip(1).step_by(2).for_each(|b| *b ^= 0x80);
            third[data + 1 + (first.len() - data) / 4 * 2] ^= 0x80;
            [first, second, third]
        };
        Library {
            config: fs::read(folder.join("config.json")).unwrap(),
            index: fs::read(folder.join("model.safetensors.index.json")).unwrap(),
            shards: (0..SHARDS).map(variants).collect(),
            clean: Mutex::default(),
        }
    }

    fn write(&self, folder: &Path, state: State) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("config.json"), &self.config).unwrap();
        fs::write(folder.join("model.safetensors.index.json"), &self.index).unwrap();
        fs::write(folder.join("generation_config.json"), SIDE_FILES[state.side]).unwrap();
        for (shard, &variant) in state.shards.iter().enumerate() {
            fs::write(folder.join(shard_name(shard)), &self.shards[shard][variant]).unwrap();
        }
    }

    /// The file that a clean conversion writes.
    fn clean(&self, state: State, folder: &Path) -> Arc<Vec<u8>> {
        if let Some(known) = self.clean.lock().unwrap().get(&state) {
            return Arc::clone(known);
        }
        let (src, dst) = (folder.join("clean-source"), folder.join("clean.sluice"));
        self.write(&src, state);
        convert(&src, &dst, &types(state), &()).unwrap();
        let bytes = Arc::new(fs::read(&dst).unwrap());
        fs::remove_file(&dst).unwrap();
        fs::remove_dir_all(&src).unwrap();
        Arc::clone(self.clean.lock().unwrap().entry(state).or_insert(bytes))
    }
}

fn types(state: State) -> Options {
    options(TYPES[state.types], "keep")
}

/// Stands for the end of the process: nothing of it runs any more.
struct Killed;

/// What happens during a run, once so many bytes have been written.
struct Fault<'a> {
    left: AtomicU64,
    has_happened: AtomicBool,
    kill: bool,
    action: &'a (dyn Fn() + Sync),
}

impl Fault<'_> {
    fn happen(&self) {
        if !self.has_happened.swap(true, Ordering::Relaxed) {
            (self.action)();
        }
        if self.kill {
            // For all threads, from now on.
            resume_unwind(Box::new(Killed));
        }
    }
}

impl Progress for Fault<'_> {
    fn started(&self, _: u64, _: u64) {
        self.advanced(0);
    }
    fn note(&self, _: &str) {}
    fn advanced(&self, bytes: u64) {
        let before = self.left.fetch_sub(bytes, Ordering::Relaxed);
        if before <= bytes || before > u64::MAX / 2 {
            self.happen();
        }
    }
}

/// How a run ended.
#[derive(Debug)]
enum End {
    Done(Summary),
    Killed,
    Failed(ConvertError),
}

/// Figures of all histories.
#[derive(Default, Debug)]
struct Figures {
    runs: AtomicUsize,
    finished: AtomicUsize,
    killed: AtomicUsize,
    changed_while_read: AtomicUsize,
    in_the_way: AtomicUsize,
    /// Runs that kept something, and what they kept.
    resumed: AtomicUsize,
    kept_extents: AtomicUsize,
}

impl Figures {
    fn count(field: &AtomicUsize) {
        field.fetch_add(1, Ordering::Relaxed);
    }
}

/// A place where histories are played, one after the other.
struct World<'a> {
    library: &'a Library,
    figures: &'a Figures,
    folder: PathBuf,
    src: PathBuf,
    state: State,
    noise: Noise,
    folders: usize,
    /// Copies of partial file and journal from other times.
    snapshots: Vec<[Option<Vec<u8>>; 2]>,
    log: Vec<String>,
}

impl<'a> World<'a> {
    fn new(library: &'a Library, figures: &'a Figures, folder: PathBuf, seed: u64) -> Self {
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        // Neighbouring seeds must not give neighbouring numbers.
        let mut noise = Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        (0..8).for_each(|_| _ = noise.bits());
        let state = State { shards: [0; SHARDS], side: 0, types: 0 };
        let src = folder.join("source");
        library.write(&src, state);
        World { library, figures, folder, src, state, noise, folders: 0, snapshots: Vec::new(), log: Vec::new() }
    }

    fn below(&mut self, n: usize) -> usize {
        (self.noise.bits() >> 33) as usize % n
    }

    fn dst(&self) -> PathBuf {
        self.folder.join("model.sluice")
    }

    fn partial(&self) -> [PathBuf; 2] {
        ["model.sluice.partial", "model.sluice.partial.journal"].map(|name| self.folder.join(name))
    }

    /// Runs the conversion; what a run that succeeds leaves is compared, and taken away.
    fn run(&mut self, left: u64, kill: bool, action: &(dyn Fn() + Sync)) -> (End, bool) {
        let fault = Fault { left: AtomicU64::new(left), has_happened: AtomicBool::new(false), kill, action };
        let (src, dst, options) = (self.src.clone(), self.dst(), types(self.state));
        let run = catch_unwind(AssertUnwindSafe(|| convert(&src, &dst, &options, &fault)));
        let end = match run {
            Ok(Ok(summary)) => End::Done(summary),
            Ok(Err(error)) => End::Failed(error),
            Err(payload) if payload.is::<Killed>() => End::Killed,
            Err(payload) => resume_unwind(payload),
        };
        Figures::count(&self.figures.runs);
        if let End::Done(summary) = &end {
            let clean = self.library.clean(self.state, &self.folder);
            assert!(fs::read(&dst).unwrap() == *clean, "another file: {:#?}", self.log);
            assert!(self.partial().iter().all(|p| !p.exists()));
            Figures::count(&self.figures.finished);
            if summary.resumed_extents > 0 {
                Figures::count(&self.figures.resumed);
                self.figures.kept_extents.fetch_add(summary.resumed_extents, Ordering::Relaxed);
            }
        } else {
            assert!(!dst.exists() || fs::read(&dst).unwrap().is_empty(), "{:#?}", self.log);
        }
        self.log.push(format!(
            "run: {}",
            match &end {
                End::Done(s) => format!("done, {} extents kept", s.resumed_extents),
                End::Killed => "killed".into(),
                End::Failed(e) => format!("failed: {e}"),
            }
        ));
        (end, fault.has_happened.load(Ordering::Relaxed))
    }

    fn moment(&mut self) -> u64 {
        let size = self.library.clean(self.state, &self.folder).len();
        self.below(size) as u64
    }

    /// A run that ends without warning.
    fn killed_run(&mut self) {
        let moment = self.moment();
        match self.run(moment, true, &|| ()) {
            (End::Killed, _) => Figures::count(&self.figures.killed),
            (End::Done(_), false) => fs::remove_file(self.dst()).unwrap(),
            (End::Failed(ConvertError::InTheWay { .. }), _) => self.remove_partial(),
            other => panic!("{other:?}: {:#?}", self.log),
        }
    }

    /// A run that does everything but the last step: the journal then has all extents, until some are cut off.
    fn stopped_run(&mut self) {
        let dst = self.dst();
        match self.run(0, false, &|| fs::write(&dst, "").unwrap()) {
            (End::Failed(ConvertError::Exists { .. }), true) => fs::remove_file(self.dst()).unwrap(),
            (End::Failed(ConvertError::InTheWay { .. }), false) => self.remove_partial(),
            other => panic!("{other:?}: {:#?}", self.log),
        }
        let journal = &self.partial()[1];
        let Ok(metadata) = journal.metadata() else { return };
        let len = self.below(metadata.len() as usize + 1) as u64;
        File::options().write(true).open(journal).unwrap().set_len(len).unwrap();
        self.log.push(format!("journal cut to {len} bytes"));
    }

    /// A run that ends as it should, or says that what lies there is no partial file any more.
    fn whole_run(&mut self) {
        match self.run(u64::MAX / 2, false, &|| ()).0 {
            End::Done(_) => {}
            End::Failed(ConvertError::InTheWay { .. }) => {
                Figures::count(&self.figures.in_the_way);
                self.remove_partial();
                assert!(matches!(self.run(u64::MAX / 2, false, &|| ()).0, End::Done(_)), "{:#?}", self.log);
            }
            other => panic!("{other:?}: {:#?}", self.log),
        }
    }

    fn remove_partial(&self) {
        self.partial().iter().for_each(|path| _ = fs::remove_file(path));
    }

    /// Runs to the end; sometimes the end is then made undone, as a crash before the last step would have it.
    fn finished_run(&mut self) {
        let journal = fs::read(&self.partial()[1]).ok();
        self.whole_run();
        let [partial, journal_path] = self.partial();
        if self.below(2) == 0 {
            fs::rename(self.dst(), partial).unwrap();
            if let Some(journal) = journal {
                fs::write(journal_path, journal).unwrap();
            }
            self.log.push("the finished file is partial again, with an older journal".into());
        } else {
            fs::remove_file(self.dst()).unwrap();
        }
    }

    /// A shard becomes another one, in some way that real downloads and copies have.
    fn replace_shard(path: &Path, bytes: &[u8], how: usize) {
        let times = path.metadata().unwrap();
        let modified = times.modified().unwrap();
        match how % 3 {
            0 => fs::write(path, bytes).unwrap(),
            1 => File::options().write(true).open(path).unwrap().write_all_at(bytes, 0).unwrap(),
            _ => {
                let new = path.with_extension("download");
                fs::write(&new, bytes).unwrap();
                fs::rename(new, path).unwrap();
            }
        }
        if how / 3 % 2 == 1 {
            File::options().write(true).open(path).unwrap().set_modified(modified).unwrap();
        }
    }

    fn change_source(&mut self) {
        let (shard, variant, how) = (self.below(SHARDS), self.below(VARIANTS), self.below(6));
        let path = self.src.join(shard_name(shard));
        match self.below(6) {
            0 | 1 => {
                Self::replace_shard(&path, &self.library.shards[shard][variant], how);
                self.state.shards[shard] = variant;
                self.log.push(format!("shard {shard} becomes {variant}, way {how}"));
            }
            2 => {
                File::options().write(true).open(path).unwrap().set_modified(SystemTime::now()).unwrap();
                self.log.push(format!("shard {shard} is touched"));
            }
            3 => {
                self.folders += 1;
                let moved = self.folder.join(format!("moved-{}", self.folders));
                fs::rename(&self.src, &moved).unwrap();
                self.src = moved;
                self.log.push("the folder is renamed".into());
            }
            4 => {
                let state = State { shards: [variant; SHARDS], ..self.state };
                self.folders += 1;
                let other = self.folder.join(format!("other-{}", self.folders));
                self.library.write(&other, state);
                fs::remove_dir_all(&self.src).unwrap();
                (self.src, self.state) = (other, state);
                self.log.push(format!("another checkpoint: {variant}"));
            }
            _ => {
                self.state.side = self.below(SIDE_FILES.len());
                fs::write(self.src.join("generation_config.json"), SIDE_FILES[self.state.side]).unwrap();
                self.log.push(format!("side files become {}", self.state.side));
            }
        }
    }

    /// The source changes while it is read: an error, unless nothing was read any more.
    fn changed_run(&mut self) {
        let (shard, variant, how) = (self.below(SHARDS), self.below(VARIANTS), self.below(7));
        let path = self.src.join(shard_name(shard));
        let bytes = &self.library.shards[shard][variant];
        let moment = self.moment();
        let action = || {
            if how == 6 {
                File::options().write(true).open(&path).unwrap().set_modified(SystemTime::now()).unwrap();
            } else {
                Self::replace_shard(&path, bytes, how);
            }
        };
        let (end, has_happened) = self.run(moment, false, &action);
        if has_happened && how != 6 {
            self.state.shards[shard] = variant;
        }
        self.log.push(format!("shard {shard} became {variant} meanwhile, way {how}: {has_happened}"));
        match end {
            End::Failed(ConvertError::SourceChanged { path: named }) if has_happened => {
                assert_eq!(named, path);
                Figures::count(&self.figures.changed_while_read);
            }
            End::Done(_) if !has_happened => fs::remove_file(self.dst()).unwrap(),
            End::Failed(ConvertError::InTheWay { .. }) if !has_happened => self.remove_partial(),
            other => panic!("{other:?}: {:#?}", self.log),
        }
    }

    fn damage(&mut self) {
        let which = self.below(2);
        let path = self.partial()[which].clone();
        let Ok(len) = path.metadata().map(|m| m.len()) else { return };
        let at = self.below(len as usize + 1) as u64;
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let what = self.below(7);
        match what {
            0 => file.set_len(at).unwrap(),
            1 => file.set_len(len + at).unwrap(),
            2 => fs::remove_file(&path).unwrap(),
            3 => file.write_all_at(&vec![0; self.below(20_000)], at).unwrap(),
            4 => file.write_all_at(&(0..100).map(|_| self.noise.bits() as u8).collect::<Vec<_>>(), at).unwrap(),
            5 if len > 16_384 => {
                // A write that went to the wrong place.
                let mut page = [0; 4096];
                file.read_exact_at(&mut page, at % (len - 4096) / 4096 * 4096).unwrap();
                file.write_all_at(&page, self.below(len as usize) as u64 / 4096 * 4096).unwrap();
            }
            _ if at < len => {
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 1 << self.below(8)], at).unwrap();
            }
            _ => {}
        }
        self.log.push(format!("damage {what} to {} at {at} of {len}", ["partial", "journal"][which]));
    }

    fn snapshot(&mut self) {
        if self.snapshots.len() < 3 || self.below(2) == 0 {
            self.snapshots.truncate(2);
            let files = self.partial().map(|path| fs::read(path).ok());
            self.snapshots.push(files);
            self.log.push("snapshot".into());
            return;
        }
        // Partial file and journal of the same time, or of two.
        for (which, path) in self.partial().iter().enumerate() {
            let from = self.below(self.snapshots.len());
            match &self.snapshots[from][which] {
                Some(bytes) => fs::write(path, bytes).unwrap(),
                None => _ = fs::remove_file(path),
            }
            self.log.push(format!("{which} restored from {from}"));
        }
    }

    /// Something that is not ours lies where partial file or journal should be.
    fn obstacle(&mut self) {
        let which = self.below(2);
        let path = self.partial()[which].clone();
        let precious = self.folder.join("precious");
        fs::write(&precious, "precious").unwrap();
        let _ = fs::remove_file(&path);
        let what = self.below(5);
        match what {
            0 => symlink(&precious, &path).unwrap(),
            1 => symlink("nowhere", &path).unwrap(),
            2 => nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap(),
            3 => fs::hard_link(&precious, &path).unwrap(),
            _ => fs::create_dir(&path).unwrap(),
        }
        self.log.push(format!("obstacle {what} for {which}"));
        let (end, _) = self.run(u64::MAX / 2, false, &|| ());
        assert!(
            matches!(&end, End::Failed(ConvertError::InTheWay { path: named, .. }) if *named == path),
            "{end:?}: {:#?}",
            self.log
        );
        Figures::count(&self.figures.in_the_way);
        assert_eq!(fs::read(&precious).unwrap(), b"precious");
        assert!(!self.folder.join("nowhere").exists());
        if what == 4 { fs::remove_dir(&path).unwrap() } else { fs::remove_file(&path).unwrap() }
    }

    fn play(&mut self) {
        let steps = 2 + self.below(6);
        for _ in 0..steps {
            match self.below(16) {
                0..=2 => self.killed_run(),
                3..=5 => self.stopped_run(),
                6 => self.finished_run(),
                7 => self.changed_run(),
                8..=10 => self.change_source(),
                11 | 12 => self.damage(),
                13 => self.snapshot(),
                14 => self.state.types = self.below(TYPES.len()),
                _ => self.obstacle(),
            }
        }
        self.whole_run();
        fs::remove_file(self.dst()).unwrap();
    }
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{variable} is no number")))
}

#[test]
fn the_result_is_the_clean_file_or_an_error() {
    let (count, seed) = (number("SLUICE_HISTORIES", 200), number("SLUICE_HISTORIES_SEED", 1));
    // In memory where there is such a place: every run waits for the drive several times.
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let library = Library::new(&dir.path().join("library"));
    let (figures, next) = (Figures::default(), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let (library, figures, next, dir) = (&library, &figures, &next, dir.path());
            scope.spawn(move || {
                loop {
                    let history = next.fetch_add(1, Ordering::Relaxed);
                    if history >= count {
                        break;
                    }
                    let folder = dir.join(format!("world-{thread}"));
                    World::new(library, figures, folder, seed.wrapping_mul(1_000_003).wrapping_add(history)).play();
                }
            });
        }
    });
    println!("{count} histories: {figures:#?}");
    // Or nothing was tried.
    let at_least = |field: &AtomicUsize, share: usize| assert!(field.load(Ordering::Relaxed) * share >= count as usize);
    if count >= 100 {
        at_least(&figures.finished, 1);
        at_least(&figures.killed, 4);
        at_least(&figures.changed_while_read, 20);
        at_least(&figures.in_the_way, 10);
        at_least(&figures.resumed, 4);
    }
}

#[test]
fn the_variants_have_one_shape_and_different_weights() {
    let dir = tempfile::tempdir().unwrap();
    let library = Library::new(dir.path());
    for variants in &library.shards {
        let mut decoded = variants.iter().map(|bytes| {
            let path = dir.path().join("shard");
            fs::write(&path, bytes).unwrap();
            let mut tensors = safetensors::Tensors::new();
            safetensors::read_file(&path, &mut tensors);
            tensors
        });
        let first = decoded.next().unwrap();
        for other in decoded {
            assert!(first.keys().eq(other.keys()));
            assert!(first.iter().zip(&other).any(|(a, b)| a.1.bytes != b.1.bytes));
        }
    }
}
