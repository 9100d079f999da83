//! The best way to read each drive. The bench finds it, a file in the user's cache folder keeps it, and opening a
//! model uses it.
//!
//! The file is a cache: if something is wrong with it, that costs speed and gives a remark, never an error. Nothing
//! that a model computes depends on it.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sluice_format::{open_regular, replace_file};

use super::bench::{BenchEngine, Knee};
use super::{DataFile, DirectMode, EngineKind, IoConfig, IoError};

/// Version of the file; others are ignored.
const VERSION: u32 = 1;

/// A larger file is not ours.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What identifies a drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceId {
    /// The filesystem's id, in hexadecimal; zeros if it has none.
    pub filesystem: String,
    /// The device number, such as `259:2`; changes when drives are plugged in another order.
    pub device: String,
    /// The drive's model, if the system tells.
    pub model: Option<String>,
}

impl DeviceId {
    /// The drive below an open file.
    ///
    /// # Errors
    /// The system's.
    pub fn of(file: &DataFile) -> io::Result<DeviceId> {
        let device = device_number(file.metadata()?.dev());
        let filesystem = format!("{:016x}", file.filesystem_id());
        let model = model(&device);
        Ok(DeviceId { filesystem, device, model })
    }

    /// True if both are the same drive, as far as can be told.
    #[must_use]
    pub fn is_same(&self, other: &DeviceId) -> bool {
        let has_id = |id: &DeviceId| id.filesystem.bytes().any(|digit| digit != b'0');
        let same_place = if has_id(self) || has_id(other) {
            self.filesystem == other.filesystem
        } else {
            self.device == other.device
        };
        same_place && self.model == other.model
    }
}

#[cfg(target_os = "linux")]
fn device_number(dev: u64) -> String {
    format!("{}:{}", nix::sys::stat::major(dev), nix::sys::stat::minor(dev))
}

#[cfg(not(target_os = "linux"))]
fn device_number(dev: u64) -> String {
    format!("{dev:x}")
}

/// The model of a drive or, for a partition, of the drive that it is on.
fn model(device: &str) -> Option<String> {
    let drive = Path::new("/sys/dev/block").join(device);
    let read = |place: &str| fs::read_to_string(drive.join(place)).ok();
    let text = read("device/model").or_else(|| read("../device/model"))?;
    let model = text.trim();
    (!model.is_empty()).then(|| model.to_owned())
}

/// The best way to read one drive.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// The drive.
    pub device: DeviceId,
    /// Which engine was best: [`BenchEngine::Uring`] or [`BenchEngine::Pread`].
    pub engine: BenchEngine,
    /// Bytes of one chunk.
    pub chunk_bytes: usize,
    /// Chunks in flight.
    pub depth: usize,
    /// Of these, at most this many for prefetch reads.
    pub prefetch_depth: usize,
    /// Bandwidth of random reads at this setting, in bytes per second.
    pub bytes_per_second: f64,
    /// Seconds between the submission of a read and its first byte, where nothing else is in flight; older programs did not say.
    #[serde(default)]
    pub latency: Option<f64>,
    /// When it was found, in seconds since 1970; older programs did not say.
    #[serde(default)]
    pub made: Option<u64>,
}

impl Calibration {
    /// The calibration that follows from a knee, and from the latency of reads that are alone ([`Sweep::latency`](super::bench::Sweep::latency)).
    #[must_use]
    pub fn from_knee(device: DeviceId, knee: &Knee, latency: Option<f64>) -> Calibration {
        let engine = match knee.point.engine {
            BenchEngine::Uring | BenchEngine::UringPlain => BenchEngine::Uring,
            BenchEngine::Pread => BenchEngine::Pread,
        };
        let (chunk_bytes, depth) = (knee.point.block_bytes, knee.point.depth);
        // The knee has the fewest bytes in flight that keep the drive busy. Prefetches need as many when no other
        // reads run.
        let prefetch_depth = depth;
        let made = SystemTime::now().duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs());
        Calibration {
            device,
            engine,
            chunk_bytes,
            depth,
            prefetch_depth,
            bytes_per_second: knee.bytes_per_second,
            latency,
            made,
        }
    }

    /// The configuration of the I/O thread.
    #[must_use]
    pub fn config(&self) -> IoConfig {
        let Self { chunk_bytes, depth, prefetch_depth, .. } = *self;
        IoConfig { chunk_bytes, depth, prefetch_depth, ..IoConfig::default() }
    }

    /// The engine to ask for. This does not insist on io_uring, which can be forbidden where the next run takes
    /// place.
    fn kind(&self) -> EngineKind {
        if self.engine == BenchEngine::Pread { EngineKind::Pread } else { EngineKind::Auto }
    }
}

/// Why calibrations could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CalibrationError {
    /// The file cannot be used by the system's account.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The file exists, but is not a calibration file of this program.
    #[error("{path} is not a calibration of this version: {reason}")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No folder for caches is known.
    #[error("there is no cache folder: neither XDG_CACHE_HOME nor HOME names one")]
    NoFolder,
}

/// The file, as it is on the drive.
#[derive(Debug, Serialize, Deserialize)]
struct Table {
    version: u32,
    drives: Vec<Calibration>,
}

/// The calibrations of a user's drives.
#[derive(Clone, Debug)]
pub struct CalibrationStore {
    path: PathBuf,
}

impl CalibrationStore {
    /// The store in a certain file.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// The user's: `sluice/io.json` in `XDG_CACHE_HOME`, in `~/.cache`, or on macOS in `~/Library/Caches`.
    ///
    /// # Errors
    /// [`CalibrationError::NoFolder`].
    pub fn of_user() -> Result<Self, CalibrationError> {
        // Relative paths are invalid by the XDG specification.
        let folder = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let caches = if cfg!(target_os = "macos") { "Library/Caches" } else { ".cache" };
        let cache = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(caches)));
        Ok(Self { path: cache.ok_or(CalibrationError::NoFolder)?.join("sluice/io.json") })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The calibration of a drive, if there is one.
    ///
    /// # Errors
    /// [`CalibrationError`]; a file that does not exist is no error.
    pub fn find(&self, device: &DeviceId) -> Result<Option<Calibration>, CalibrationError> {
        Ok(self.all()?.into_iter().find(|known| known.device.is_same(device)))
    }

    /// Stores a calibration, which replaces an older one of the same drive. The file is replaced as a whole, so
    /// readers see the old one or the new one. A file that is not of this version is overwritten.
    ///
    /// # Errors
    /// [`CalibrationError::File`].
    pub fn save(&self, calibration: &Calibration) -> Result<(), CalibrationError> {
        let mut drives = match self.all() {
            Err(CalibrationError::Foreign { .. }) => Vec::new(),
            loaded => loaded?,
        };
        drives.retain(|known| !known.device.is_same(&calibration.device));
        drives.push(calibration.clone());
        let failed = |source| CalibrationError::File { path: self.path.clone(), action: "write", source };
        let json = serde_json::to_vec_pretty(&Table { version: VERSION, drives }).map_err(|e| failed(e.into()))?;
        replace(&self.path, &json).map_err(failed)
    }

    /// The calibrations of all drives.
    ///
    /// # Errors
    /// [`CalibrationError`]; a file that does not exist is no error.
    pub fn all(&self) -> Result<Vec<Calibration>, CalibrationError> {
        let failed = |source| CalibrationError::File { path: self.path.clone(), action: "read", source };
        let foreign = |reason: String| CalibrationError::Foreign { path: self.path.clone(), reason };
        let bytes = match fs::metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
            Ok(metadata) if !metadata.is_file() => return Err(foreign("it is no file".to_owned())),
            Ok(metadata) if metadata.len() > FILE_BYTES_MAX => return Err(foreign("it is too large".to_owned())),
            Ok(_) => {
                let mut bytes = Vec::new();
                // Bounds the bytes read, because some files have more than their length says.
                let file = open_regular(&self.path).map_err(failed)?;
                file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
                bytes
            }
        };
        let table: Table = serde_json::from_slice(&bytes).map_err(|e| foreign(e.to_string()))?;
        if table.version != VERSION {
            return Err(foreign(format!("it has version {}, this program {VERSION}", table.version)));
        }
        for drive in &table.drives {
            drive.config().validate().map_err(|e| foreign(e.to_string()))?;
            if let Some(latency) = drive.latency.filter(|latency| !(0.0..1.0).contains(latency)) {
                return Err(foreign(format!("{latency} seconds are no latency")));
            }
        }
        Ok(table.drives)
    }
}

/// Writes the file, and its folder if there is none yet.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    replace_file(path, bytes)
}

/// Where the numbers in a [`Tuning`] come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TuningSource {
    /// Given by the caller.
    Given,
    /// Found by the bench on this drive.
    Calibrated,
    /// The defaults, which are good on most drives; with a remark if a calibration could not be used.
    Default(Option<String>),
}

/// How a file is to be read.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Chunks and depths.
    pub config: IoConfig,
    /// Which engine.
    pub engine: EngineKind,
    /// Where these come from.
    pub source: TuningSource,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning::default_with(None, None)
    }
}

impl Tuning {
    /// Decides how to read the file at `path`. If `config` or `engine` is given, it is used as it is; otherwise it
    /// comes from the calibration of the file's drive in `store`, or from the defaults if there is none.
    #[must_use]
    pub fn choose(
        path: &Path,
        config: Option<&IoConfig>,
        engine: Option<EngineKind>,
        store: Option<&CalibrationStore>,
    ) -> Tuning {
        if let Some(config) = config {
            let engine = engine.unwrap_or_default();
            return Tuning { config: config.clone(), engine, source: TuningSource::Given };
        }
        let found = store.map_or(Ok(None), |store| lookup(path, store));
        match found {
            Ok(Some(known)) => {
                let engine = engine.unwrap_or(known.kind());
                Tuning { config: known.config(), engine, source: TuningSource::Calibrated }
            }
            Ok(None) => Tuning::default_with(engine, None),
            Err(remark) => Tuning::default_with(engine, Some(remark)),
        }
    }

    fn default_with(engine: Option<EngineKind>, remark: Option<String>) -> Tuning {
        let source = TuningSource::Default(remark);
        Tuning { config: IoConfig::default(), engine: engine.unwrap_or_default(), source }
    }
}

fn lookup(path: &Path, store: &CalibrationStore) -> Result<Option<Calibration>, String> {
    let open = |e: IoError| e.to_string();
    let file = DataFile::open(path, DirectMode::Never).map_err(open)?;
    let device = DeviceId::of(&file).map_err(|e| e.to_string())?;
    store.find(&device).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(filesystem: &str, device: &str, model: Option<&str>) -> DeviceId {
        DeviceId { filesystem: filesystem.into(), device: device.into(), model: model.map(Into::into) }
    }

    fn calibration(device: DeviceId, depth: usize) -> Calibration {
        Calibration {
            device,
            engine: BenchEngine::Pread,
            chunk_bytes: 512 << 10,
            depth,
            prefetch_depth: depth.div_ceil(2),
            bytes_per_second: 1.5e9,
            latency: None,
            made: None,
        }
    }

    fn store() -> (tempfile::TempDir, CalibrationStore) {
        let folder = tempfile::tempdir().expect("a folder");
        let store = CalibrationStore::at(&folder.path().join("deep/er/io.json"));
        (folder, store)
    }

    #[test]
    fn drives_are_told_apart() {
        let a = id("0123", "259:1", Some("X"));
        assert!(a.is_same(&id("0123", "8:1", Some("X"))), "numbers change when drives are plugged in another order");
        assert!(!a.is_same(&id("0124", "259:1", Some("X"))));
        assert!(!a.is_same(&id("0123", "259:1", None)));
        assert!(!id("0000", "0:1", None).is_same(&id("0000", "0:2", None)));
        assert!(id("0000", "0:1", None).is_same(&id("0000", "0:1", None)));
    }

    #[test]
    fn what_is_saved_is_found() {
        let (_folder, store) = store();
        let (a, b) = (id("1", "8:1", None), id("2", "8:2", Some("Drive")));
        assert_eq!(store.find(&a).expect("no file is no error"), None);
        store.save(&calibration(a.clone(), 4)).expect("saved");
        store.save(&calibration(b.clone(), 8)).expect("saved");
        store.save(&calibration(a.clone(), 16)).expect("replaced");
        assert_eq!(store.find(&a).expect("read"), Some(calibration(a, 16)));
        assert_eq!(store.find(&b).expect("read"), Some(calibration(b, 8)));
        let folder = store.path().parent().expect("has one");
        assert_eq!(fs::read_dir(folder).expect("listed").count(), 1, "nothing but the file itself is left");
    }

    #[test]
    fn what_is_broken_is_a_remark_and_is_replaced() {
        let (folder, store) = store();
        let model = folder.path().join("model");
        fs::write(&model, [0; 8192]).expect("written");
        let device = DeviceId::of(&DataFile::open(&model, DirectMode::Never).expect("open")).expect("known");
        let deep = serde_json::to_string(&Table { version: 1, drives: vec![calibration(device.clone(), 999)] });
        let other = r#"{"version": 2, "drives": []}"#.to_owned();
        fs::create_dir_all(store.path().parent().expect("has one")).expect("made");
        for text in [String::new(), "{".to_owned(), "[1, 2]".to_owned(), other, deep.expect("JSON")] {
            fs::write(store.path(), &text).expect("written");
            let tuning = Tuning::choose(&model, None, None, Some(&store));
            let TuningSource::Default(Some(remark)) = tuning.source else { panic!("{text}: no remark") };
            assert!(remark.contains("io.json"), "{remark}");
            assert_eq!(tuning.config.depth, IoConfig::default().depth);
        }
        store.save(&calibration(device.clone(), 4)).expect("replaced");
        assert_eq!(store.find(&device).expect("read").map(|c| c.depth), Some(4));
    }

    #[test]
    fn writing_never_leaves_half_a_file() {
        let (_folder, store) = store();
        let device = id("1", "8:1", None);
        store.save(&calibration(device.clone(), 4)).expect("saved");
        // Every name that the new file could have is taken: a failed save leaves the old one.
        for number in 0..100 {
            let new = format!("{}.{}-{number}", store.path().display(), std::process::id());
            fs::create_dir(new).expect("in the way");
        }
        assert!(store.save(&calibration(device.clone(), 8)).is_err());
        assert_eq!(store.find(&device).expect("read").map(|c| c.depth), Some(4));
    }

    #[test]
    fn what_is_given_goes_first() {
        let (folder, store) = store();
        let model = folder.path().join("model");
        fs::write(&model, [0; 8192]).expect("written");
        let device = DeviceId::of(&DataFile::open(&model, DirectMode::Never).expect("open")).expect("known");
        store.save(&calibration(device, 7)).expect("saved");
        let given = IoConfig { depth: 3, prefetch_depth: 1, ..IoConfig::default() };
        let choose = |config, engine, store| Tuning::choose(&model, config, engine, store);
        let tuning = choose(Some(&given), None, Some(&store));
        assert_eq!((tuning.config.depth, tuning.source), (3, TuningSource::Given));
        let tuning = choose(None, None, Some(&store));
        assert_eq!((tuning.config.depth, tuning.engine), (7, EngineKind::Pread));
        assert_eq!(tuning.source, TuningSource::Calibrated);
        let tuning = choose(None, Some(EngineKind::Uring), Some(&store));
        assert_eq!((tuning.config.depth, tuning.engine), (7, EngineKind::Uring));
        let tuning = choose(None, None, None);
        assert_eq!((tuning.engine, tuning.source), (EngineKind::Auto, TuningSource::Default(None)));
    }
}
