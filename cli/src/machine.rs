//! The speeds of a machine, measured once by `sluice bench machine`. They are kept in the user's cache folder beside the
//! calibrations of drives, and used by `sluice plan`. The file can be used on another machine (`sluice plan --machine FILE`).

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sluice_format::{open_regular, replace_file};
use sluice_kernels::WeightType;
use sluice_storage::io::CalibrationStore;

use crate::error::CliError;

/// Version of the file; others are refused.
const VERSION: u32 = 1;
/// A larger file is not one of ours.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The speeds of a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MachineFile {
    version: u32,
    /// Bytes of memory that the machine has.
    pub(crate) ram: u64,
    /// Bytes of memory that were available. Files of earlier versions have these as `ram`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) available: Option<u64>,
    /// Bytes per second of the drive that was calibrated, if one was.
    pub(crate) drive_bytes_per_second: Option<f64>,
    /// Bytes per second of a loop that only reads.
    pub(crate) memory_bytes_per_second: f64,
    /// For each type, bytes of weights per second in products with one token, as memory or instructions allow.
    pub(crate) product_bytes_per_second: BTreeMap<String, f64>,
    /// Instruction set and threads of the measurement.
    pub(crate) isa: String,
    pub(crate) threads: usize,
}

impl MachineFile {
    pub(crate) fn new(
        (ram, available, drive): (u64, u64, Option<f64>),
        memory_bytes_per_second: f64,
        products: impl Iterator<Item = (WeightType, f64)>,
        (isa, threads): (&str, usize),
    ) -> Self {
        MachineFile {
            version: VERSION,
            ram,
            available: Some(available),
            drive_bytes_per_second: drive,
            memory_bytes_per_second,
            product_bytes_per_second: products.map(|(ty, rate)| (ty.name().to_owned(), rate)).collect(),
            isa: isa.to_owned(),
            threads,
        }
    }

    /// Bytes of memory that a model can have.
    pub(crate) fn memory(&self) -> u64 {
        self.available.unwrap_or(self.ram)
    }

    /// Where the user's own machine is kept; `None` without a folder for caches.
    pub(crate) fn of_user() -> Option<PathBuf> {
        Some(CalibrationStore::of_user().ok()?.path().with_file_name("machine.json"))
    }

    /// Reads a file.
    pub(crate) fn load(path: &Path) -> Result<Self, CliError> {
        let failed = |source| CliError::File { path: path.to_owned(), action: "read what the machine does", source };
        let mut bytes = Vec::new();
        let file = open_regular(path).map_err(failed)?;
        // The read is bounded, because some files have more bytes than their length says.
        file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
        let wrong = |problem: String| {
            let name = path.display();
            CliError::Failure(format!(
                "{name} does not describe a machine: {problem}. `sluice bench machine` writes such files"
            ))
        };
        let machine: MachineFile = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
        if machine.version != VERSION {
            return Err(wrong(format!("it has version {}, this program {VERSION}", machine.version)));
        }
        let products = machine.product_bytes_per_second.values();
        let rates = products.chain(&machine.drive_bytes_per_second).chain([&machine.memory_bytes_per_second]);
        let is_wrong = |rate: &f64| !rate.is_finite() || *rate < 1.0;
        if let Some(rate) = rates.copied().find(is_wrong) {
            return Err(wrong(format!("{rate} bytes per second is not a speed")));
        }
        Ok(machine)
    }

    /// Writes the file atomically.
    pub(crate) fn save(&self, path: &Path) -> Result<(), CliError> {
        let failed = |source| CliError::File { path: path.to_owned(), action: "write what the machine does", source };
        let json = serde_json::to_vec_pretty(self).map_err(|e| failed(io::Error::from(e)))?;
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            fs::create_dir_all(folder).map_err(failed)?;
        }
        replace_file(path, &json).map_err(failed)
    }

    /// Bytes per second at which a token reads its weights: `experts` bytes of experts of one type, and the rest. For a type that
    /// was not measured, the rate of plain reading.
    pub(crate) fn weights_per_second(&self, experts: (u64, Option<&str>), rest: (u64, Option<&str>)) -> f64 {
        let rate = |ty: Option<&str>| {
            let measured = ty.and_then(|ty| self.product_bytes_per_second.get(ty));
            measured.copied().unwrap_or(self.memory_bytes_per_second)
        };
        let parts = [experts, rest].map(|(bytes, ty)| (bytes as f64, bytes as f64 / rate(ty)));
        let (bytes, seconds) = (parts[0].0 + parts[1].0, parts[0].1 + parts[1].1);
        if bytes > 0.0 { bytes / seconds } else { self.memory_bytes_per_second }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> MachineFile {
        let products = [(WeightType::Q8, 20e9), (WeightType::Q4, 10e9)].into_iter();
        MachineFile::new((8 << 30, 6 << 30, Some(3e9)), 25e9, products, ("avx2", 4))
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/er/machine.json");
        machine().save(&path).unwrap();
        assert_eq!(MachineFile::load(&path).unwrap(), machine());
        let text = fs::read_to_string(&path).unwrap();
        // As earlier versions have written it.
        fs::write(&path, text.replace("\"available\": 6442450944,", "")).unwrap();
        assert_eq!((machine().memory(), MachineFile::load(&path).unwrap().memory()), (6 << 30, 8 << 30));
        for (from, to, word) in [
            ("\"version\": 1", "\"version\": 2", "version 2"),
            ("25000000000.0", "-1.0", "not a speed"),
            ("\"isa\"", "\"isas\"", "isas"),
            ("{", "", "machine.json"),
        ] {
            fs::write(&path, text.replacen(from, to, 1)).unwrap();
            let error = MachineFile::load(&path).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert!(MachineFile::load(folder.path()).is_err());
    }

    #[test]
    fn weights_take_the_time_of_their_types() {
        let machine = machine();
        for (experts, rest, want) in [
            ((1 << 30, Some("q4")), (0, Some("q8")), 10e9),
            // 10 GB at 10 GB/s and 10 GB at 20 GB/s take 1.5 s.
            ((10_000_000_000, Some("q4")), (10_000_000_000, Some("q8")), 20e9 / 1.5),
            ((5, Some("fp8")), (5, None), 25e9),
            ((0, None), (0, None), 25e9),
        ] {
            let rate = machine.weights_per_second(experts, rest);
            assert!((rate / want - 1.0).abs() < 1e-9, "{experts:?} and {rest:?}: {rate}");
        }
    }
}
