//! What shows that the drive has answered, and not some memory on the way to it.

use std::fs;

use serde::Serialize;

use super::super::arena::PAGE_BYTES;
use super::super::{DataFile, DirectIo};
use super::BenchError;

/// Pages that are looked up in the page cache before and after.
const SAMPLES: u64 = 256;

/// More of them than this have been brought in: reads go through the page cache, whatever the filesystem says.
const SAMPLES_BROUGHT_IN_MAX: u64 = SAMPLES / 4;

/// Of the bytes read, those that block devices must have delivered.
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
    /// Bytes that block devices have delivered to this process meanwhile, where the system counts them.
    pub bytes_delivered: Option<u64>,
    /// Pages of the file looked up in the page cache.
    pub pages_sampled: u64,
    /// Of them, in the page cache before; `None` where the system does not tell.
    pub pages_cached_before: Option<u64>,
    /// And after.
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

    /// Why the drive cannot have answered.
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
        let brought_in = self.pages_cached_after?.saturating_sub(self.pages_cached_before?);
        (brought_in > SAMPLES_BROUGHT_IN_MAX).then(|| {
            format!(
                "{brought_in} of {} sampled pages came into the page cache meanwhile. Stop what else reads the file, or \
                 measure another one",
                self.pages_sampled
            )
        })
    }
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

/// Of pages spread over the file, those in the page cache.
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
        assert!(cached.refutation().expect("refuted").contains("197 of 256"));
        let unknown = Proof { bytes_delivered: None, pages_cached_before: None, pages_cached_after: None, ..proof() };
        assert_eq!((unknown.refutation(), unknown.summary().as_str()), (None, "O_DIRECT"));
        let buffered = Proof { direct: false, ..cached };
        assert_eq!(buffered.refutation(), None);
        assert!(buffered.summary().starts_with("BUFFERED"));
    }
}
