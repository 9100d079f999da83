//! The journal of a conversion: which extents are safely in the partial file.
//!
//! A header that names the plan, then one record of fixed size per finished extent, each with its own checksum. A record is
//! written only after the extent's data are on the drive. Whatever follows the last whole record, such as the half of one
//! that a power cut left, is cut off.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::pack::{ErrorSums, Outcome};

const MAGIC: [u8; 8] = *b"SLJRNL\x02\n";
/// Magic, plan hash, tensors per extent, extents, checksum.
const HEADER_LEN: usize = 8 + 16 + 8 + 8 + 8;
/// Extent, checksum, digest, source bytes, and the record's own checksum; the errors come between.
const RECORD_FIXED: usize = 8 + 8 + 16 + 8 + 8;
const ERROR_LEN: usize = 24;

/// What a journal belongs to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    pub(crate) plan_hash: u128,
    pub(crate) tensors_per_extent: usize,
    pub(crate) extents: usize,
}

impl Identity {
    fn header(&self) -> Vec<u8> {
        let mut b = MAGIC.to_vec();
        b.extend(self.plan_hash.to_le_bytes());
        b.extend((self.tensors_per_extent as u64).to_le_bytes());
        b.extend((self.extents as u64).to_le_bytes());
        b.extend(xxh3_64(&b).to_le_bytes());
        b
    }

    fn record_len(&self) -> usize {
        RECORD_FIXED + self.tensors_per_extent * ERROR_LEN
    }

    /// The checksum of a record is bound to the plan, so that no record is taken for one of another plan.
    fn record_checksum(&self, body: &[u8]) -> u64 {
        xxh3_64_with_seed(body, self.plan_hash as u64)
    }

    /// Repairs the header and the checksums of whole records: for fuzzing, which would never get past them.
    pub(crate) fn seal(&self, journal: &mut [u8]) {
        let Some((header, records)) = journal.split_at_mut_checked(HEADER_LEN) else { return };
        header.copy_from_slice(&self.header());
        for record in records.chunks_exact_mut(self.record_len()) {
            let (body, checksum) = record.split_at_mut(self.record_len() - 8);
            checksum.copy_from_slice(&self.record_checksum(body).to_le_bytes());
        }
    }

    fn encode(&self, outcome: &Outcome) -> Vec<u8> {
        let mut b = Vec::with_capacity(self.record_len());
        b.extend((outcome.extent as u64).to_le_bytes());
        b.extend(outcome.checksum.to_le_bytes());
        b.extend(outcome.source_digest.to_le_bytes());
        b.extend(outcome.source_bytes.to_le_bytes());
        let unused = ErrorSums::default();
        for i in 0..self.tensors_per_extent {
            let sums = outcome.errors.get(i).unwrap_or(&unused);
            b.extend(sums.error.to_bits().to_le_bytes());
            b.extend(sums.magnitude.to_bits().to_le_bytes());
            b.extend(sums.vanished.to_le_bytes());
        }
        b.extend(self.record_checksum(&b).to_le_bytes());
        b
    }

    fn decode(&self, record: &[u8]) -> Option<Outcome> {
        let (body, checksum) = record.split_last_chunk::<8>()?;
        if u64::from_le_bytes(*checksum) != self.record_checksum(body) {
            return None;
        }
        let u64_at = |at: usize| body.get(at..)?.first_chunk().map(|b| u64::from_le_bytes(*b));
        let errors = body.get(40..)?.chunks_exact(ERROR_LEN).map(|b| {
            let bits = |at: usize| b[at..].first_chunk().map(|b| u64::from_le_bytes(*b));
            let number = |at: usize| bits(at).map(f64::from_bits);
            Some(ErrorSums { error: number(0)?, magnitude: number(8)?, vanished: bits(16)? })
        });
        let extent = usize::try_from(u64_at(0)?).ok().filter(|&e| e < self.extents)?;
        Some(Outcome {
            extent,
            checksum: u64_at(8)?,
            source_digest: u128::from_le_bytes(*body.get(16..)?.first_chunk()?),
            source_bytes: u64_at(32)?,
            errors: errors.collect::<Option<_>>()?,
        })
    }
}

/// What an existing journal says.
pub(crate) enum Found {
    /// There is none, or nothing of it can be used.
    Nothing,
    /// It belongs to another plan.
    OtherPlan,
    /// It belongs to this plan.
    Same { journal: Journal, outcomes: Vec<Outcome> },
}

/// An open journal, to which records are appended.
#[derive(Debug)]
pub(crate) struct Journal {
    file: File,
    identity: Identity,
    end: u64,
}

impl Journal {
    /// Reads the journal at `path` and cuts off what is not a whole record.
    pub(crate) fn open(path: &Path, identity: Identity) -> io::Result<Found> {
        let mut file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(e) => return Err(e),
        };
        let longest = HEADER_LEN + identity.extents * identity.record_len();
        let mut bytes = Vec::new();
        file.by_ref().take(longest as u64).read_to_end(&mut bytes)?;
        let Some((header, records)) = bytes.split_at_checked(HEADER_LEN) else { return Ok(Found::Nothing) };
        if header != identity.header() {
            let whole =
                header.starts_with(&MAGIC) && header.ends_with(&xxh3_64(&header[..HEADER_LEN - 8]).to_le_bytes());
            return Ok(if whole { Found::OtherPlan } else { Found::Nothing });
        }
        let records = records.chunks_exact(identity.record_len());
        let mut seen = vec![false; identity.extents];
        let fresh = |o: &Outcome| !std::mem::replace(&mut seen[o.extent], true);
        let outcomes: Vec<Outcome> = records.map_while(|r| identity.decode(r)).take_while(fresh).collect();
        let end = (HEADER_LEN + outcomes.len() * identity.record_len()) as u64;
        file.set_len(end)?;
        Ok(Found::Same { journal: Journal { file, identity, end }, outcomes })
    }

    /// Starts an empty journal at `path`.
    pub(crate) fn create(path: &Path, identity: Identity) -> io::Result<Self> {
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
        file.write_all_at(&identity.header(), 0)?;
        file.sync_all()?;
        Ok(Journal { file, identity, end: HEADER_LEN as u64 })
    }

    /// Appends records in one write. Their data must be on the drive already.
    pub(crate) fn append(&mut self, outcomes: &[Outcome]) -> io::Result<()> {
        let bytes: Vec<u8> = outcomes.iter().flat_map(|o| self.identity.encode(o)).collect();
        self.file.write_all_at(&bytes, self.end)?;
        self.end += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity { plan_hash: 7, tensors_per_extent: 3, extents: 9 };

    fn outcome(extent: usize) -> Outcome {
        let sums = |x: f64| ErrorSums { error: x, magnitude: x * 2.0, vanished: 5 };
        let errors = vec![sums(0.5), sums(-0.0), sums(1e300)];
        Outcome { extent, checksum: 11 << 40, source_digest: 13 << 100, source_bytes: 17, errors }
    }

    #[test]
    fn every_torn_tail_leaves_the_whole_records() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::create(&path, IDENTITY).unwrap();
        let outcomes: Vec<_> = (0..4).map(outcome).collect();
        journal.append(&outcomes[..1]).unwrap();
        journal.append(&outcomes[1..]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        for len in 0..=bytes.len() {
            // Half of the cases: the file has its length but the tail was never written.
            let mut torn = bytes[..len].to_vec();
            torn.resize(if len % 2 == 0 { bytes.len() } else { len }, 0);
            std::fs::write(&path, torn).unwrap();
            let whole = len.saturating_sub(HEADER_LEN) / IDENTITY.record_len();
            match Journal::open(&path, IDENTITY).unwrap() {
                // The last byte of a checksum may be zero anyway.
                Found::Same { outcomes: found, .. } => {
                    assert!(found == outcomes[..found.len()] && found.len() >= whole)
                }
                Found::Nothing => assert!(len < HEADER_LEN),
                Found::OtherPlan => panic!("{len}"),
            }
        }
    }

    #[test]
    fn another_plan_is_told_from_garbage() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        assert!(matches!(Journal::open(&path, IDENTITY).unwrap(), Found::Nothing));
        Journal::create(&path, Identity { plan_hash: 8, ..IDENTITY }).unwrap();
        assert!(matches!(Journal::open(&path, IDENTITY).unwrap(), Found::OtherPlan));
        std::fs::write(&path, [3; 200]).unwrap();
        assert!(matches!(Journal::open(&path, IDENTITY).unwrap(), Found::Nothing));
    }
}
