//! Calibrations of drives: looked for when a model is opened, and kept by `sluice bench disk`.

use std::fs;
use std::path::Path;

use sluice_storage::io::calibration::{Calibration, DeviceId};
use sluice_storage::io::{CalibrationStore, DataFile, DirectMode, Tuning, TuningSource};

use super::Seeds;

fn drive_of(file: &Path) -> DeviceId {
    fs::write(file, [0; 4096]).expect("the folder can be written");
    let file = DataFile::open(file, DirectMode::Never).expect("it was written");
    DeviceId::of(&file).expect("the system knows its drives")
}

pub(crate) fn run(input: &[u8], folder: &Path) {
    let (store, model) = (folder.join("io.json"), folder.join("model.sluice"));
    fs::write(&store, input).expect("the folder can be written");
    if !model.exists() {
        drive_of(&model);
    }
    let store = CalibrationStore::at(&store);
    let tuning = Tuning::choose(&model, None, None, Some(&store));
    assert!(tuning.config.validate().is_ok(), "{tuning:?}");
    if tuning.source == TuningSource::Calibrated {
        let found = store.find(&drive_of(&model)).expect("it was just read").expect("it was just found");
        store.save(&found).expect("the folder can be written");
        let again = store.find(&found.device).expect("it was just written").expect("it was just written");
        // JSON's numbers are read to the last digit but one; these are only shown and used for estimates.
        let same = |a: f64, b: f64| (a - b).abs() <= 4.0 * f64::EPSILON * a.abs() || a == b;
        assert!(same(again.bytes_per_second, found.bytes_per_second), "{again:?} {found:?}");
        let latencies = again.latency.zip(found.latency);
        assert!(latencies.is_none_or(|(a, b)| same(a, b)), "{again:?} {found:?}");
        let latency = found.latency.and(again.latency);
        assert_eq!(again, Calibration { bytes_per_second: again.bytes_per_second, latency, ..found });
    }
}

pub(crate) fn seeds(folder: &Path) -> Seeds {
    let here = drive_of(&folder.join("model.sluice"));
    let drive = |device: &DeviceId, engine: &str, depth: u32| {
        serde_json::json!({"device": device, "engine": engine, "chunk_bytes": 1 << 20, "depth": depth,
            "prefetch_depth": depth, "bytes_per_second": 3.5e9})
    };
    let other = DeviceId { filesystem: "0123456789abcdef".into(), device: "259:2".into(), model: Some("Drive".into()) };
    let nowhere = DeviceId { filesystem: "0000000000000000".into(), ..other.clone() };
    let drives = [drive(&other, "uring", 8), drive(&here, "pread", 4), drive(&nowhere, "uring", 128)];
    let file = serde_json::json!({"version": 1, "drives": drives});
    // A number that comes back as another one.
    let mut tiny = drive(&here, "pread", 4);
    tiny["bytes_per_second"] = 1e-45.into();
    let tiny = serde_json::json!({"version": 1, "drives": [tiny]});
    vec![("three".to_owned(), file.to_string().into_bytes()), ("tiny".to_owned(), tiny.to_string().into_bytes())]
}
