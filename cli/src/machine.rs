//! The speeds of a machine, measured once by `sluice bench machine`. They are kept in the user's cache folder beside the
//! calibrations of drives, and used by `sluice plan`. The file can be used on another machine (`sluice plan --machine FILE`).

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sluice_format::{open_regular, replace_file};
use sluice_kernels::WeightType;
use sluice_lab::schedule::Cores;
use sluice_storage::io::CalibrationStore;

use crate::commands::bench_machine::DriveRate;
use crate::error::CliError;

/// Version of the file. Earlier ones are read too: they say less. Others are refused.
const VERSION: u32 = 4;
/// A larger file is not ours.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Speeds per second that no machine falls short of: that of memory, of products, and of a drive; and one that none exceeds.
const SLOWEST_MEMORY: f64 = 1e7;
const SLOWEST_PRODUCT: f64 = 1e5;
const SLOWEST_DRIVE: f64 = 1e4;
const FASTEST: f64 = 1e18;
/// More threads than any machine runs.
const MOST_THREADS: usize = 1 << 16;

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
    /// Seconds between the submission of a read and its first byte, where that drive has nothing else to do.
    #[serde(default)]
    pub(crate) drive_latency_seconds: Option<f64>,
    /// Bytes per second of a loop that only reads.
    pub(crate) memory_bytes_per_second: f64,
    /// For each type, bytes of weights per second in products with one token, as memory or instructions allow.
    pub(crate) product_bytes_per_second: BTreeMap<String, f64>,
    /// The same with the threads that compute while the drive is read: one of them is left to it. If there was a drive, it was read meanwhile.
    #[serde(default)]
    pub(crate) beside_reads_bytes_per_second: BTreeMap<String, f64>,
    /// The part of its rate that the drive had meanwhile.
    #[serde(default)]
    pub(crate) reads_beside_products: Option<f64>,
    /// Seconds that a burst of reads took beyond its bytes ÷ bandwidth, while those threads computed.
    #[serde(default)]
    pub(crate) burst_latency_seconds: Option<f64>,
    /// Multiplications and additions of f32 per second, of which attention consists.
    #[serde(default)]
    pub(crate) f32_operations_per_second: Option<f64>,
    /// Bytes of checksums per second of the threads that compute while the drive is read, out of a cache.
    #[serde(default)]
    pub(crate) verified_bytes_per_second: Option<f64>,
    /// Seconds that a product takes however small it is: threads begin, and wait for each other.
    #[serde(default)]
    pub(crate) section_seconds: f64,
    /// Instruction set and threads that it was measured with.
    pub(crate) isa: String,
    pub(crate) threads: usize,
}

/// What the threads were measured to do.
pub(crate) struct Measured<'a> {
    /// Bytes per second that plain reading gives.
    pub(crate) memory: f64,
    /// By type, bytes of weights per second of all threads, and of those that compute while the drive is read.
    pub(crate) products: &'a [(WeightType, f64, f64)],
    /// If there was a drive: the part of its rate that it had beside them, and the seconds that a burst took beyond its bytes ÷ bandwidth.
    pub(crate) reads: Option<(f64, f64)>,
    /// Operations of f32 per second.
    pub(crate) operations: f64,
    /// Bytes of checksums per second.
    pub(crate) verification: f64,
    /// Seconds of the smallest product.
    pub(crate) section: f64,
}

impl MachineFile {
    pub(crate) fn new(
        (ram, available, drive): (u64, u64, Option<DriveRate>),
        measured: &Measured<'_>,
        (isa, threads): (&str, usize),
    ) -> Self {
        let by_name = |rate: &dyn Fn(&(WeightType, f64, f64)) -> f64| {
            measured.products.iter().map(|product| (product.0.name().to_owned(), rate(product))).collect()
        };
        MachineFile {
            version: VERSION,
            ram,
            available: Some(available),
            drive_bytes_per_second: drive.map(|drive| drive.bytes_per_second),
            drive_latency_seconds: drive.and_then(|drive| drive.latency),
            memory_bytes_per_second: measured.memory,
            product_bytes_per_second: by_name(&|product| product.1),
            beside_reads_bytes_per_second: by_name(&|product| product.2),
            reads_beside_products: measured.reads.map(|(part, _)| part),
            burst_latency_seconds: measured.reads.map(|(_, latency)| latency),
            f32_operations_per_second: Some(measured.operations),
            verified_bytes_per_second: Some(measured.verification),
            section_seconds: measured.section,
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
        let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
        // Before anything else, because later versions may have fields that this one does not know.
        let version = value.get("version").ok_or_else(|| wrong("it has no `version`".into()))?;
        if !version.as_u64().is_some_and(|version| (1..=u64::from(VERSION)).contains(&version)) {
            return Err(wrong(format!("it has version {version}, this program {VERSION}")));
        }
        let machine: MachineFile =
            serde_path_to_error::deserialize(value).map_err(|e| wrong(format!("`{}`: {}", e.path(), e.inner())))?;
        machine.check().map_err(wrong)?;
        Ok(machine)
    }

    /// Refuses what no machine can do, of which a plan would be nonsense. The error names the field.
    fn check(&self) -> Result<(), String> {
        if self.ram == 0 {
            return Err("`ram` is 0".into());
        }
        if let Some(available) = self.available.filter(|available| *available > self.ram) {
            return Err(format!("`available` is {available}, more than `ram`, which is {}", self.ram));
        }
        if !(1..=MOST_THREADS).contains(&self.threads) {
            return Err(format!("`threads` is {}, which no machine has", self.threads));
        }
        let one = |name: &str, rate: Option<f64>, slowest: f64| {
            let wrong = rate.filter(|rate| !(slowest..=FASTEST).contains(rate));
            wrong.map_or(Ok(()), |rate| Err(format!("`{name}` is {rate:e}, which is no speed in bytes per second")))
        };
        one("memory_bytes_per_second", Some(self.memory_bytes_per_second), SLOWEST_MEMORY)?;
        one("verified_bytes_per_second", self.verified_bytes_per_second, SLOWEST_PRODUCT)?;
        one("drive_bytes_per_second", self.drive_bytes_per_second, SLOWEST_DRIVE)?;
        for (name, rates) in [
            ("product_bytes_per_second", &self.product_bytes_per_second),
            ("beside_reads_bytes_per_second", &self.beside_reads_bytes_per_second),
        ] {
            rates.iter().try_for_each(|(ty, rate)| one(&format!("{name}.{ty}"), Some(*rate), SLOWEST_PRODUCT))?;
        }
        if let Some(rate) = self.f32_operations_per_second.filter(|rate| !(SLOWEST_PRODUCT..=FASTEST).contains(rate)) {
            return Err(format!(
                "`f32_operations_per_second` is {rate:e}, which is no number of operations per second"
            ));
        }
        if !(0.0..1.0).contains(&self.section_seconds) {
            let seconds = self.section_seconds;
            return Err(format!("`section_seconds` is {seconds}, which is not what the smallest product takes"));
        }
        for (name, seconds) in [
            ("drive_latency_seconds", self.drive_latency_seconds),
            ("burst_latency_seconds", self.burst_latency_seconds),
        ] {
            if let Some(seconds) = seconds.filter(|seconds| !(0.0..1.0).contains(seconds)) {
                return Err(format!("`{name}` is {seconds}, which is not what a read waits for its first byte"));
            }
        }
        if let Some(part) = self.reads_beside_products.filter(|part| !(0.01..=1.0).contains(part)) {
            return Err(format!("`reads_beside_products` is {part}, which is not a part of the drive's speed"));
        }
        Ok(())
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

    /// What the cores do with experts of one type and the rest of another.
    pub(crate) fn cores(&self, experts: Option<&str>, rest: Option<&str>) -> Cores {
        let of = |rates: &BTreeMap<String, f64>, ty: Option<&str>| {
            ty.and_then(|ty| rates.get(ty)).copied().unwrap_or(self.memory_bytes_per_second)
        };
        // Version 1 did not say what is done beside reads.
        let (all, measured) = (&self.product_bytes_per_second, &self.beside_reads_bytes_per_second);
        let beside = if measured.is_empty() { all } else { measured };
        Cores {
            experts: of(all, experts),
            experts_beside_reads: of(beside, experts).min(of(all, experts)),
            dense: of(all, rest),
            dense_beside_reads: of(beside, rest).min(of(all, rest)),
            reads_beside: self.reads_beside_products.unwrap_or(1.0),
            burst_latency: self.burst_latency_seconds,
            keys: self.memory_bytes_per_second,
            operations: self.f32_operations_per_second,
            verification: self.verified_bytes_per_second,
            section_seconds: self.section_seconds,
        }
    }

    /// Whether products with weights of this type were measured.
    pub(crate) fn knows(&self, ty: &str) -> bool {
        self.product_bytes_per_second.contains_key(ty)
    }

    /// Bytes per second at which a token gets through its weights: these many bytes of experts of one type, and those many of the rest.
    /// Of a type that was not measured, what plain reading gives.
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
        let products = &[(WeightType::Q8, 20e9, 18e9), (WeightType::Q4, 10e9, 8e9)];
        let measured = Measured {
            memory: 25e9,
            products,
            reads: Some((0.75, 2e-4)),
            operations: 1e11,
            verification: 3e10,
            section: 5e-6,
        };
        let drive = DriveRate { bytes_per_second: 3e9, latency: Some(1e-4) };
        MachineFile::new((8 << 30, 6 << 30, Some(drive)), &measured, ("avx2", 4))
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
        fs::write(&path, text.replace("\"version\": 4", "\"version\": 3")).unwrap();
        assert!(MachineFile::load(&path).is_ok(), "earlier versions are read");
        for (from, to, word) in [
            ("\"version\": 4", "\"version\": 5, \"later\": 1", "it has version 5"),
            ("\"version\": 4,", "", "it has no `version`"),
            ("0.75", "1.5", "`reads_beside_products` is 1.5"),
            ("0.0001", "1.5", "`drive_latency_seconds` is 1.5"),
            ("0.0002", "-1.5", "`burst_latency_seconds` is -1.5"),
            ("25000000000.0", "-1.0", "`memory_bytes_per_second` is -1e0"),
            ("25000000000.0", "1.0", "`memory_bytes_per_second` is 1e0, "),
            ("3000000000.0", "0.5", "`drive_bytes_per_second` is 5e-1"),
            ("18000000000.0", "1e300", "`beside_reads_bytes_per_second.q8` is 1e300"),
            ("100000000000.0", "0.0", "`f32_operations_per_second` is 0e0"),
            (
                "\"available\": 6442450944",
                "\"available\": 18446744073709551615",
                "`available` is 18446744073709551615, more than",
            ),
            ("\"ram\": 8589934592", "\"ram\": 0", "`ram` is 0"),
            ("\"threads\": 4", "\"threads\": 0", "`threads` is 0"),
            ("\"threads\": 4", "\"threads\": 1000000", "`threads` is 1000000"),
            ("30000000000.0", "0.5", "`verified_bytes_per_second` is 5e-1"),
            ("5e-6", "2.5", "smallest product"),
            ("\"isa\"", "\"isas\"", "isas"),
            ("\"threads\": 4", "\"threads\": -1", "`threads`: invalid value"),
            ("30000000000.0", "null, \"later\": 1", "`later`: unknown field"),
            ("{", "", "machine.json"),
        ] {
            fs::write(&path, text.replacen(from, to, 1)).unwrap();
            let error = MachineFile::load(&path).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert!(MachineFile::load(folder.path()).is_err());
        // What version 1 did not say is done without.
        let older = r#"{"version": 1, "ram": 8000000000, "drive_bytes_per_second": null, "memory_bytes_per_second": 25e9,
            "product_bytes_per_second": {"q4": 10e9}, "isa": "avx2", "threads": 4}"#;
        fs::write(&path, older).unwrap();
        let cores = MachineFile::load(&path).unwrap().cores(Some("q4"), None);
        assert_eq!((cores.experts, cores.experts_beside_reads, cores.dense), (10e9, 10e9, 25e9));
        assert_eq!((cores.operations, cores.section_seconds, cores.reads_beside), (None, 0.0, 1.0));
        assert_eq!(cores.verification, None);
    }

    #[test]
    fn cores_do_what_was_measured_of_the_types() {
        let cores = machine().cores(Some("q4"), Some("fp8"));
        assert_eq!((cores.experts, cores.experts_beside_reads), (10e9, 8e9));
        assert_eq!((cores.dense, cores.dense_beside_reads, cores.keys), (25e9, 25e9, 25e9));
        assert_eq!((cores.operations, cores.section_seconds, cores.reads_beside), (Some(1e11), 5e-6, 0.75));
        assert_eq!(cores.verification, Some(3e10));
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
