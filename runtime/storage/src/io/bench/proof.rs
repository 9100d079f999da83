//! Evidence that the drive delivered the bytes, and not some memory on the way to it.

use std::fs;

use serde::Serialize;

use super::super::arena::PAGE_BYTES;
use super::super::{DataFile, DirectIo};
use super::BenchError;

/// How many pages are looked up in the page cache before and after.
const SAMPLES: u64 = 256;

/// If more than one page in this many is in the page cache, the cache may have delivered the bytes, whatever the filesystem
/// says. Some always are: opening a model file reads its tables through the page cache.
const SAMPLES_CACHED_MAX: u64 = 4;

/// Least part of the bytes read that block devices must have delivered.
const DELIVERED_LEAST: f64 = 0.9;

/// Evidence that the figures are the drive's.
#[derive(Clone, Debug, Serialize)]
pub struct Proof {
    /// Reads bypassed the page cache.
    pub direct: bool,
    /// How that is known, or why not.
    pub how: String,
    /// Bytes read in all.
    pub bytes_read: u64,
    /// Bytes that block devices have delivered to this process meanwhile, if the system counts them.
    pub bytes_delivered: Option<u64>,
    /// Pages of the file looked up in the page cache.
    pub pages_sampled: u64,
    /// Of these, how many were in the page cache before; `None` if the system does not tell.
    pub pages_cached_before: Option<u64>,
    /// How many were in it afterwards.
    pub pages_cached_after: Option<u64>,
}

impl Proof {
    /// One line for people.
    #[must_use]
    pub fn summary(&self) -> String {
        if !self.direct {
            return format!("BUFFERED: these figures are the page cache's as much as the drive's ({})", self.how);
        }
        let mut text = self.how.clone();
        if let Some(part) = self.delivered_part() {
            text += &format!("; the drive delivered {:.0} % of the bytes read", part * 100.0);
        }
        if let (Some(before), Some(after)) = (self.pages_cached_before, self.pages_cached_after) {
            text +=
                &format!("; {after} of {} sampled pages are in the page cache, {before} before", self.pages_sampled);
        }
        text
    }

    fn delivered_part(&self) -> Option<f64> {
        let delivered = self.bytes_delivered.filter(|_| self.bytes_read > 0)?;
        Some((delivered as f64 / self.bytes_read as f64).min(1.0))
    }

    /// Why the drive cannot have delivered the bytes.
    fn refutation(&self) -> Option<String> {
        if !self.direct {
            return None;
        }
        if let Some(part) = self.delivered_part().filter(|part| *part < DELIVERED_LEAST) {
            return Some(format!(
                "block devices delivered {:.0} % of the bytes read, something else the rest (allocated space that was \
                 never written, or compression). Name another file, or a folder for a scratch file",
                part * 100.0
            ));
        }
        cached_refutation(self.pages_cached_after.max(self.pages_cached_before)?, self.pages_sampled)
    }
}

/// Why the page cache may have delivered the bytes, if many of the sampled pages are in it.
fn cached_refutation(cached: u64, sampled: u64) -> Option<String> {
    (cached * SAMPLES_CACHED_MAX > sampled).then(|| {
        format!(
            "{cached} of {sampled} sampled pages of the file are in the page cache, which may answer in its place. Measure a \
             file that nobody has read or written lately, or a folder; or drop the pages of this one (`dd if=FILE \
             iflag=nocache count=0`) and stop what else reads it"
        )
    })
}

/// What is known before the first read.
pub(super) struct Watch {
    delivered: Option<u64>,
    cached: Option<u64>,
    bytes: u64,
}

impl Watch {
    pub(super) fn start(file: &DataFile) -> Watch {
        Watch { delivered: delivered_bytes(), cached: cached_pages(file), bytes: 0 }
    }

    /// The same check before any time is spent.
    pub(super) fn check(&self, file: &DataFile) -> Result<(), BenchError> {
        let sampled = SAMPLES.min(file.len() / PAGE_BYTES as u64);
        let cached = self.cached.filter(|_| file.direct().is_engaged());
        match cached.and_then(|cached| cached_refutation(cached, sampled)) {
            Some(reason) => Err(BenchError::NotTheDrive { path: file.path().to_owned(), reason }),
            None => Ok(()),
        }
    }

    pub(super) fn count(&mut self, bytes: u64) {
        self.bytes += bytes;
    }

    pub(super) fn finish(&self, file: &DataFile) -> Result<Proof, BenchError> {
        let now = delivered_bytes();
        // Filesystems over a network, and some in user space, have no block device that counts.
        let delivered = now.zip(self.delivered).map(|(now, then)| now.saturating_sub(then)).filter(|bytes| *bytes > 0);
        let proof = Proof {
            direct: file.direct().is_engaged(),
            how: match file.direct() {
                DirectIo::Engaged { how } => how.clone(),
                DirectIo::Refused { reason } => reason.clone(),
            },
            bytes_read: self.bytes,
            bytes_delivered: delivered,
            pages_sampled: SAMPLES.min(file.len() / PAGE_BYTES as u64),
            pages_cached_before: self.cached,
            pages_cached_after: cached_pages(file),
        };
        match proof.refutation() {
            Some(reason) => Err(BenchError::NotTheDrive { path: file.path().to_owned(), reason }),
            None => Ok(proof),
        }
    }
}

/// Bytes that block devices have delivered to this process: Linux counts them per process.
fn delivered_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/io").ok()?;
    text.lines().find_map(|line| line.strip_prefix("read_bytes:")?.trim().parse().ok())
}

/// Bytes of this process that are in huge pages.
pub(super) fn huge_page_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("AnonHugePages:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

/// How many of a sample of pages, spread over the file, are in the page cache.
fn cached_pages(file: &DataFile) -> Option<u64> {
    let pages = file.len() / PAGE_BYTES as u64;
    let samples = SAMPLES.min(pages);
    let mut cached = 0;
    for sample in 0..samples {
        let page = (u128::from(sample) * u128::from(pages) / u128::from(samples)) as u64;
        cached += u64::from(file.is_cached(page * PAGE_BYTES as u64)?);
    }
    Some(cached)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proof() -> Proof {
        Proof {
            direct: true,
            how: "O_DIRECT".to_owned(),
            bytes_read: 1000,
            bytes_delivered: Some(1003),
            pages_sampled: SAMPLES,
            pages_cached_before: Some(3),
            pages_cached_after: Some(4),
        }
    }

    #[test]
    fn evidence_counts() {
        assert_eq!(proof().refutation(), None);
        let text = proof().summary();
        assert!(text.contains("100 %") && text.contains("4 of 256"), "{text}");
        let unwritten = Proof { bytes_delivered: Some(10), ..proof() };
        assert!(unwritten.refutation().expect("refuted").contains("1 %"));
        let cached = Proof { pages_cached_after: Some(200), ..proof() };
        assert!(cached.refutation().expect("refuted").contains("200 of 256"));
        let before = Proof { pages_cached_before: Some(200), ..proof() };
        assert!(before.refutation().expect("refuted").contains("200 of 256"));
        let small = Proof { pages_sampled: 8, pages_cached_after: Some(3), ..proof() };
        assert!(small.refutation().expect("refuted").contains("3 of 8"));
        let unknown = Proof { bytes_delivered: None, pages_cached_before: None, pages_cached_after: None, ..proof() };
        assert_eq!((unknown.refutation(), unknown.summary().as_str()), (None, "O_DIRECT"));
        let buffered = Proof { direct: false, ..cached };
        assert_eq!(buffered.refutation(), None);
        assert!(buffered.summary().starts_with("BUFFERED"));
    }
}
