//! The journal of a conversion: which extents are safely in the partial file, and what they were made of.
//!
//! A header that names the plan and the identity of every source file before anything of it was read. Then records, each with
//! its own checksum: one per finished extent, with the digest of the source bytes that it was made of, and one per tensor of the
//! source whose digest is known. Records are written only after the extents' data are on the drive, and after the sources have
//! been seen unchanged: so what a journal says holds for the sources that its header names. Whatever follows the last whole
//! record, such as the half of one that a power cut left, is cut off.
//!
//! The journal of a striped model begins with a record of its other volumes ([`Elsewhere`]): their folders, and the number that is in the
//! names of its partial files there. It can be read without the plan, so that a conversion to other folders finds what it replaces. It is
//! written before any of these files is made.
//!
//! When all volumes are whole and get their names, one after the other, a last record says so ([`say_named`]): only then is a finished volume
//! in one of these places known to be of this conversion. A conversion that goes on cuts that record off with all that it does not know.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt, MetadataExt as _};
use std::path::{Path, PathBuf};

use sluice_checksum::{xxh3_64, xxh3_64_with_seed};
use sluice_format::{Codec, Syncer, Written};

use crate::error::ConvertError;
use crate::own::{Own, make_room, new_of, open_own};
use crate::pack::{ErrorSums, Outcome};
use crate::source::Stamp;

/// What all versions begin with.
pub(crate) const FAMILY: &[u8; 6] = b"SLJRNL";
/// The version is to change with the records, and with everything that makes extents from the same source and options others
/// than before.
const MAGIC: [u8; 8] = *b"SLJRNL\x04\n";
/// Magic, plan hash, tensors per extent, extents, parts, files; then a stamp per file, and a checksum.
const HEADER_FIXED: usize = 8 + 16 + 4 * 8;
const CHECKSUM: usize = 8;
/// What a record is, in its first byte.
const EXTENT: u8 = 1;
const PART: u8 = 2;
const ELSEWHERE: u8 = 4;
/// The record of an earlier program that had the place of [`ELSEWHERE`].
const FORMER_ELSEWHERE: u8 = 3;
const NAMED: u8 = 5;
/// Kind, extent, what has become of it (codec, stored bytes, their checksum, that of the padded bytes), digest, source bytes; the
/// errors and the record's own checksum follow.
const EXTENT_FIXED: usize = 1 + 8 + WRITTEN + 16 + 8;
const WRITTEN: usize = 2 + 8 + 8 + 8;
const ERROR_LEN: usize = 24;
/// Kind, part, digest, and the record's own checksum.
const PART_LEN: usize = 1 + 8 + 16 + CHECKSUM;
/// Kind, bytes of the folders, and the number; then of each folder its bytes and its path, and the record's own checksum.
const ELSEWHERE_FIXED: usize = 1 + 4 + 8;
/// Of each volume behind the first; the kind is before them all, and the record's own checksum behind.
const NAMED_EACH: usize = 8 + 8;
/// Most bytes of the folders: paths are shorter on every system, and there are no more than 15.
const FOLDERS_MOST: usize = 1 << 17;
/// Most bytes of a header that is read without its plan.
const HEADER_MOST: usize = 1 << 24;

/// What a journal belongs to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    pub(crate) plan_hash: u128,
    pub(crate) tensors_per_extent: usize,
    pub(crate) extents: usize,
    /// Parts of the source.
    pub(crate) parts: usize,
    /// Files of the source.
    pub(crate) files: usize,
}

/// Where the volumes behind the first are, of a striped model that is not finished.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Elsewhere {
    /// Stands in the names of its partial files in these folders, so that models of one name which share a folder are told apart.
    pub(crate) id: u64,
    pub(crate) folders: Vec<PathBuf>,
}

/// When a finished volume was last written, which its name does not change: that tells it from one of a copy of the same model, whose
/// content can be the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LastWritten {
    seconds: i64,
    nanoseconds: i64,
}

impl LastWritten {
    pub(crate) fn of(found: &Metadata) -> Self {
        LastWritten { seconds: found.mtime(), nanoseconds: found.mtime_nsec() }
    }
}

/// What a journal says.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Content {
    /// Identity of every source file before anything was read.
    pub(crate) stamps: Vec<Stamp>,
    /// Of a striped model.
    pub(crate) elsewhere: Option<Elsewhere>,
    /// Finished extents, each once.
    pub(crate) outcomes: Vec<Outcome>,
    /// Digests of parts of the source, by number.
    pub(crate) parts: Vec<(usize, u128)>,
}

impl Identity {
    fn header(&self, stamps: &[Stamp]) -> Vec<u8> {
        let mut b = MAGIC.to_vec();
        b.extend(self.plan_hash.to_le_bytes());
        for n in [self.tensors_per_extent, self.extents, self.parts, self.files] {
            b.extend((n as u64).to_le_bytes());
        }
        b.extend(stamps.iter().flat_map(|s| s.to_bytes()));
        b.extend(xxh3_64(&b).to_le_bytes());
        b
    }

    fn header_len(&self) -> usize {
        HEADER_FIXED + self.files * Stamp::LEN + CHECKSUM
    }

    fn extent_len(&self) -> usize {
        EXTENT_FIXED + self.tensors_per_extent * ERROR_LEN + CHECKSUM
    }

    /// No journal of ours is longer.
    fn longest(&self) -> usize {
        let elsewhere = ELSEWHERE_FIXED + FOLDERS_MOST + CHECKSUM;
        self.header_len() + elsewhere + self.extents * self.extent_len() + self.parts * PART_LEN
    }

    /// The checksum of a record is bound to the plan, so that no record is taken for one of another plan.
    fn sealed(&self, mut body: Vec<u8>) -> Vec<u8> {
        body.extend(xxh3_64_with_seed(&body, self.plan_hash as u64).to_le_bytes());
        body
    }

    /// Repairs the fixed part of the header and the checksums of records: for fuzzing, which would never get past them.
    pub(crate) fn seal(&self, journal: &mut [u8]) {
        let Some((header, mut records)) = journal.split_at_mut_checked(self.header_len()) else { return };
        header[..HEADER_FIXED].copy_from_slice(&self.header(&[])[..HEADER_FIXED]);
        let (body, checksum) = header.split_at_mut(self.header_len() - CHECKSUM);
        checksum.copy_from_slice(&xxh3_64(body).to_le_bytes());
        if let Some(len) = elsewhere_len(records) {
            let (record, rest) = std::mem::take(&mut records).split_at_mut(len);
            let sealed = self.sealed(record[..len - CHECKSUM].to_vec());
            record.copy_from_slice(&sealed);
            records = rest;
        }
        while let Some(&kind) = records.first() {
            // What is no record becomes one, or the rest of the file would never be looked at.
            let (kind, len) = if kind % 2 == 0 { (PART, PART_LEN) } else { (EXTENT, self.extent_len()) };
            let Some((record, rest)) = std::mem::take(&mut records).split_at_mut_checked(len) else { return };
            record[0] = kind;
            let sealed = self.sealed(record[..len - CHECKSUM].to_vec());
            record.copy_from_slice(&sealed);
            records = rest;
        }
    }

    /// Nothing for a model in one folder.
    fn elsewhere(&self, elsewhere: Option<&Elsewhere>) -> Vec<u8> {
        let Some(Elsewhere { id, folders }) = elsewhere else { return Vec::new() };
        let mut paths = Vec::new();
        for folder in folders {
            let path = folder.as_os_str().as_bytes();
            paths.extend((path.len() as u32).to_le_bytes());
            paths.extend(path);
        }
        if paths.len() > FOLDERS_MOST {
            return Vec::new();
        }
        let mut b = vec![ELSEWHERE];
        b.extend((paths.len() as u32).to_le_bytes());
        b.extend(id.to_le_bytes());
        b.extend(paths);
        self.sealed(b)
    }

    fn extent(&self, outcome: &Outcome) -> Vec<u8> {
        let mut b = Vec::with_capacity(self.extent_len());
        b.push(EXTENT);
        b.extend((outcome.extent as u64).to_le_bytes());
        let Written { codec, stored_len, checksum, logical_checksum } = outcome.written;
        b.extend((codec as u16).to_le_bytes());
        [stored_len, checksum, logical_checksum].into_iter().for_each(|n| b.extend(n.to_le_bytes()));
        b.extend(outcome.source_digest.to_le_bytes());
        b.extend(outcome.source_bytes.to_le_bytes());
        let unused = ErrorSums::default();
        for i in 0..self.tensors_per_extent {
            let sums = outcome.errors.get(i).unwrap_or(&unused);
            b.extend(sums.error.to_bits().to_le_bytes());
            b.extend(sums.magnitude.to_bits().to_le_bytes());
            b.extend(sums.vanished.to_le_bytes());
        }
        self.sealed(b)
    }

    fn part(&self, &(part, digest): &(usize, u128)) -> Vec<u8> {
        let mut b = Vec::with_capacity(PART_LEN);
        b.push(PART);
        b.extend((part as u64).to_le_bytes());
        b.extend(digest.to_le_bytes());
        self.sealed(b)
    }

    /// The body of the record that `bytes` begin with, and its whole length; `None` if it is not whole.
    fn record<'b>(&self, bytes: &'b [u8]) -> Option<(&'b [u8], usize)> {
        let len = match *bytes.first()? {
            EXTENT => self.extent_len(),
            PART => PART_LEN,
            _ => return None,
        };
        let (body, checksum) = bytes.get(..len)?.split_last_chunk::<CHECKSUM>()?;
        let whole = u64::from_le_bytes(*checksum) == xxh3_64_with_seed(body, self.plan_hash as u64);
        whole.then_some((body, len))
    }

    fn parse_extent(&self, body: &[u8]) -> Option<Outcome> {
        let errors = body.get(EXTENT_FIXED..)?.chunks_exact(ERROR_LEN).map(|b| {
            let number = |at: usize| u64_at(b, at).map(f64::from_bits);
            Some(ErrorSums { error: number(0)?, magnitude: number(8)?, vanished: u64_at(b, 16)? })
        });
        Some(Outcome {
            extent: usize::try_from(u64_at(body, 1)?).ok().filter(|&e| e < self.extents)?,
            written: Written {
                codec: Codec::from_code(u16::from_le_bytes(*body.get(9..)?.first_chunk()?))?,
                stored_len: u64_at(body, 11)?,
                checksum: u64_at(body, 19)?,
                logical_checksum: u64_at(body, 27)?,
            },
            source_digest: u128_at(body, 9 + WRITTEN)?,
            source_bytes: u64_at(body, 9 + WRITTEN + 16)?,
            errors: errors.collect::<Option<_>>()?,
        })
    }

    fn parse_part(&self, body: &[u8]) -> Option<(usize, u128)> {
        let part = usize::try_from(u64_at(body, 1)?).ok().filter(|&p| p < self.parts)?;
        Some((part, u128_at(body, 9)?))
    }

    /// The whole records that `bytes` begin with, and their length in all.
    fn records(&self, bytes: &[u8]) -> (Vec<Outcome>, Vec<(usize, u128)>, usize) {
        let (mut outcomes, mut parts) = (Vec::new(), Vec::new());
        let (mut extents_seen, mut parts_seen) = (vec![false; self.extents], vec![false; self.parts]);
        let mut end = 0;
        while let Some((body, len)) = self.record(&bytes[end..]) {
            let fresh = if body[0] == EXTENT {
                self.parse_extent(body).is_some_and(|o| push_once(&mut outcomes, &mut extents_seen, o.extent, o))
            } else {
                self.parse_part(body).is_some_and(|p| push_once(&mut parts, &mut parts_seen, p.0, p))
            };
            // Nobody writes a number twice: what follows is not to be trusted.
            if !fresh {
                break;
            }
            end += len;
        }
        (outcomes, parts, end)
    }
}

/// Adds what has a number to a list, and says whether that number was new.
fn push_once<T>(list: &mut Vec<T>, seen: &mut [bool], number: usize, item: T) -> bool {
    let fresh = !std::mem::replace(&mut seen[number], true);
    if fresh {
        list.push(item);
    }
    fresh
}

fn u64_at(b: &[u8], at: usize) -> Option<u64> {
    b.get(at..)?.first_chunk().map(|b| u64::from_le_bytes(*b))
}

fn u128_at(b: &[u8], at: usize) -> Option<u128> {
    b.get(at..)?.first_chunk().map(|b| u128::from_le_bytes(*b))
}

/// What an existing journal says.
pub(crate) enum Found {
    /// There is none, or nothing of it can be used.
    Nothing,
    /// It belongs to another plan, or another version of this program wrote it.
    OtherPlan,
    /// It belongs to this plan.
    Same { journal: Journal, content: Content },
}

/// An open journal, to which records are appended.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    identity: Identity,
    end: u64,
}

impl Journal {
    /// Reads the journal at `path` and cuts off what is not a whole record.
    pub(crate) fn open(path: &Path, identity: Identity) -> Result<Found, ConvertError> {
        let Some(mut file) = open_own(path, false)? else { return Ok(Found::Nothing) };
        let mut bytes = Vec::new();
        let read = file.by_ref().take(identity.longest() as u64).read_to_end(&mut bytes);
        read.map_err(ConvertError::io(path, "read the journal"))?;
        if bytes.starts_with(FAMILY) && !bytes.starts_with(&MAGIC) {
            return Ok(Found::OtherPlan);
        }
        let other = || if is_of_other_plan(&bytes, &identity) { Found::OtherPlan } else { Found::Nothing };
        let Some((header, records)) = bytes.split_at_checked(identity.header_len()) else { return Ok(other()) };
        let (stamps, _) = header[HEADER_FIXED..header.len() - CHECKSUM].as_chunks::<{ Stamp::LEN }>();
        let stamps: Vec<Stamp> = stamps.iter().map(Stamp::from_bytes).collect();
        if header != identity.header(&stamps) {
            return Ok(other());
        }
        let (elsewhere, before) = parse_elsewhere(records, identity.plan_hash as u64).unzip();
        let before = before.unwrap_or(0);
        let (outcomes, parts, len) = identity.records(&records[before..]);
        let end = (header.len() + before + len) as u64;
        file.set_len(end).map_err(ConvertError::io(path, "cut the journal"))?;
        let journal = Journal { path: path.to_owned(), file, identity, end };
        Ok(Found::Same { journal, content: Content { stamps, elsewhere, outcomes, parts } })
    }

    /// Starts a journal at `path` that says `content`, in the place of what is there: it has its name only once it is whole.
    pub(crate) fn create(
        path: &Path,
        identity: Identity,
        content: &Content,
        syncer: &Syncer,
    ) -> Result<Self, ConvertError> {
        let new = new_of(path);
        // The lock of the partial file keeps others away.
        make_room(&new, Own::Journal)?;
        let io = |action| ConvertError::io(&new, action);
        let file = File::options().read(true).write(true).create_new(true).open(&new);
        let file = file.map_err(io("create the journal"))?;
        let head = [identity.header(&content.stamps), identity.elsewhere(content.elsewhere.as_ref())].concat();
        let end = head.len() as u64;
        file.write_all_at(&head, 0).map_err(io("write the journal"))?;
        let mut journal = Journal { path: path.to_owned(), file, identity, end };
        journal.append(&content.outcomes, &content.parts)?;
        syncer.all(&journal.file).map_err(io("sync the journal"))?;
        fs::rename(&new, path).map_err(io("rename the journal"))?;
        Ok(journal)
    }

    /// Appends records in one write. The data of extents must be on the drive already.
    pub(crate) fn append(&mut self, outcomes: &[Outcome], parts: &[(usize, u128)]) -> Result<(), ConvertError> {
        let mut bytes: Vec<u8> = outcomes.iter().flat_map(|o| self.identity.extent(o)).collect();
        bytes.extend(parts.iter().flat_map(|p| self.identity.part(p)));
        self.file.write_all_at(&bytes, self.end).map_err(ConvertError::io(&self.path, "write the journal"))?;
        self.end += bytes.len() as u64;
        Ok(())
    }
}

/// The length of the record of other volumes that these begin with, if they do.
fn elsewhere_len(records: &[u8]) -> Option<usize> {
    let len = u32::from_le_bytes(*records.get(1..)?.first_chunk()?) as usize;
    let len = ELSEWHERE_FIXED + Some(len).filter(|len| *len <= FOLDERS_MOST)? + CHECKSUM;
    (records[0] == ELSEWHERE && len <= records.len()).then_some(len)
}

/// The record of other volumes that records begin with, and its length. `seed`: that of the records' checksums.
fn parse_elsewhere(records: &[u8], seed: u64) -> Option<(Elsewhere, usize)> {
    let len = elsewhere_len(records)?;
    let (body, checksum) = records[..len].split_last_chunk::<CHECKSUM>()?;
    if u64::from_le_bytes(*checksum) != xxh3_64_with_seed(body, seed) {
        return None;
    }
    let id = u64_at(body, ELSEWHERE_FIXED - 8)?;
    let (mut paths, mut folders) = (&body[ELSEWHERE_FIXED..], Vec::new());
    while let Some((len, rest)) = paths.split_first_chunk() {
        let (path, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
        folders.push(PathBuf::from(OsStr::from_bytes(path)));
        paths = rest;
    }
    Some((Elsewhere { id, folders }, len))
}

/// Where the volumes behind the first are, if the journal at `path`, of whatever plan, says so.
pub(crate) fn elsewhere_at(path: &Path) -> Option<Elsewhere> {
    let (seed, records) = first_records(path)?;
    parse_elsewhere(&records, seed).map(|(elsewhere, _)| elsewhere)
}

/// Whether there is a journal at `path`, of whatever plan, that is of a model in one folder.
pub(crate) fn is_of_one_folder(path: &Path) -> bool {
    first_records(path)
        .is_some_and(|(_, records)| records.first().is_none_or(|kind| ![ELSEWHERE, FORMER_ELSEWHERE].contains(kind)))
}

/// What the checksums of the records in the journal at `path` begin with, and its first records, as far as they can say where volumes are.
fn first_records(path: &Path) -> Option<(u64, Vec<u8>)> {
    let file = open_own(path, false).ok()??;
    let mut fixed = [0; HEADER_FIXED];
    file.read_exact_at(&mut fixed, 0).ok()?;
    let files = usize::try_from(u64_at(&fixed, HEADER_FIXED - 8)?).ok()?;
    let len = files.checked_mul(Stamp::LEN)?.checked_add(HEADER_FIXED).filter(|len| *len <= HEADER_MOST)?;
    let mut bytes = Vec::new();
    let most = len + CHECKSUM + ELSEWHERE_FIXED + FOLDERS_MOST + CHECKSUM;
    file.take(most as u64).read_to_end(&mut bytes).ok()?;
    let (header, seed) = (bytes.get(..len)?, u64_at(&bytes, MAGIC.len())?);
    let is_whole = bytes.starts_with(&MAGIC) && u64_at(&bytes, len)? == xxh3_64(header);
    is_whole.then(|| (seed, bytes.split_off(len + CHECKSUM)))
}

/// Has the journal at `path`, of whatever plan, say that volumes are whole and get their names now. `volumes`: those behind the first.
pub(crate) fn say_named(path: &Path, volumes: &[LastWritten], syncer: &Syncer) -> Result<(), ConvertError> {
    let Some(file) = open_own(path, false)? else { return Ok(()) };
    let mut seed = [0; 8];
    file.read_exact_at(&mut seed, MAGIC.len() as u64).map_err(ConvertError::io(path, "read the journal"))?;
    let mut record = vec![NAMED];
    record.extend(volumes.iter().flat_map(|v| [v.seconds, v.nanoseconds]).flat_map(i64::to_le_bytes));
    record.extend(xxh3_64_with_seed(&record, u64::from_le_bytes(seed)).to_le_bytes());
    let end = file.metadata().map_err(ConvertError::io(path, "read its length"))?.len();
    file.write_all_at(&record, end).map_err(ConvertError::io(path, "write the journal"))?;
    syncer.all(&file).map_err(ConvertError::io(path, "sync the journal"))
}

/// The volumes behind the first, of `count` in all, of which the journal at `path` says last that they are whole and get their names.
pub(crate) fn named_at(path: &Path, count: usize) -> Option<Vec<LastWritten>> {
    let file = open_own(path, false).ok()??;
    let mut seed = [0; 8];
    file.read_exact_at(&mut seed, MAGIC.len() as u64).ok()?;
    let mut record = vec![0; 1 + count.checked_sub(1)? * NAMED_EACH + CHECKSUM];
    let start = file.metadata().ok()?.len().checked_sub(record.len() as u64)?;
    file.read_exact_at(&mut record, start).ok()?;
    let (body, checksum) = record.split_last_chunk::<CHECKSUM>()?;
    if body[0] != NAMED || u64::from_le_bytes(*checksum) != xxh3_64_with_seed(body, u64::from_le_bytes(seed)) {
        return None;
    }
    let (numbers, _) = body[1..].as_chunks::<8>();
    let (volumes, _) = numbers.as_chunks::<2>();
    let volume = |[seconds, nanoseconds]: &[[u8; 8]; 2]| LastWritten {
        seconds: i64::from_le_bytes(*seconds),
        nanoseconds: i64::from_le_bytes(*nanoseconds),
    };
    Some(volumes.iter().map(volume).collect())
}

/// Whether `bytes` begin with the sound header of another plan: its length is in it.
fn is_of_other_plan(bytes: &[u8], identity: &Identity) -> bool {
    let files = u64_at(bytes, HEADER_FIXED - 8).and_then(|n| usize::try_from(n).ok());
    let len = files.and_then(|n| n.checked_mul(Stamp::LEN)).and_then(|n| n.checked_add(HEADER_FIXED));
    let header = len.and_then(|len| bytes.get(..len));
    // One that is longer than any journal of this plan was not read whole; its magic must do.
    let too_long = len.is_some_and(|len| len + CHECKSUM > identity.longest());
    let whole = header.is_some_and(|header| u64_at(bytes, header.len()) == Some(xxh3_64(header)));
    bytes.starts_with(&MAGIC) && (whole || too_long)
}

/// Whether a conversion of any version has written the file at `path`.
pub(crate) fn is_journal(path: &Path) -> bool {
    let mut start = [0; FAMILY.len()];
    let is_file = path.symlink_metadata().is_ok_and(|m| m.is_file());
    is_file && File::open(path).and_then(|mut f| f.read_exact(&mut start)).is_ok() && start == *FAMILY
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity { plan_hash: 7, tensors_per_extent: 3, extents: 9, parts: 4, files: 2 };

    fn outcome(extent: usize) -> Outcome {
        let sums = |x: f64| ErrorSums { error: x, magnitude: x * 2.0, vanished: 5 };
        let errors = vec![sums(0.5), sums(-0.0), sums(1e300)];
        let written =
            Written { codec: Codec::Planes, stored_len: 19 << 12, checksum: 11 << 40, logical_checksum: 23 << 40 };
        Outcome { extent, written, source_digest: 13 << 100, source_bytes: 17, errors }
    }

    fn stamps() -> Vec<Stamp> {
        [3u8, 4].map(|n| Stamp::from_bytes(&[n; Stamp::LEN])).to_vec()
    }

    fn empty() -> Content {
        Content { stamps: stamps(), ..Content::default() }
    }

    fn create(path: &Path, identity: Identity, content: &Content) -> Journal {
        Journal::create(path, identity, content, &Syncer::default()).unwrap()
    }

    fn open(path: &Path) -> Found {
        Journal::open(path, IDENTITY).unwrap()
    }

    #[test]
    fn every_torn_tail_leaves_the_whole_records() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let outcomes: Vec<_> = (0..4).map(outcome).collect();
        let parts = [(3, 5 << 90), (0, 6)];
        let mut journal = create(&path, IDENTITY, &empty());
        journal.append(&outcomes[..1], &parts[..1]).unwrap();
        journal.append(&outcomes[1..], &parts[1..]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        for len in 0..=bytes.len() {
            // Half of the cases: the file has its length but the tail was never written.
            let mut torn = bytes[..len].to_vec();
            torn.resize(if len % 2 == 0 { bytes.len() } else { len }, 0);
            std::fs::write(&path, torn).unwrap();
            let whole = len.saturating_sub(IDENTITY.header_len());
            match open(&path) {
                Found::Same { content, journal } => {
                    assert_eq!(content.stamps, stamps());
                    let (extents, sources) = (content.outcomes.len(), content.parts.len());
                    assert!(content.outcomes == outcomes[..extents] && content.parts == parts[..sources]);
                    // The last byte of a checksum may be zero anyway.
                    let kept = extents * IDENTITY.extent_len() + sources * PART_LEN;
                    assert!(kept + IDENTITY.extent_len() > whole, "{len}");
                    assert_eq!(journal.end, std::fs::metadata(&path).unwrap().len());
                }
                Found::Nothing => assert!(len < IDENTITY.header_len()),
                Found::OtherPlan => assert!(len < MAGIC.len(), "{len}"),
            }
        }
    }

    #[test]
    fn no_changed_byte_is_believed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let content = Content { outcomes: vec![outcome(2), outcome(1)], parts: vec![(1, 9)], ..empty() };
        create(&path, IDENTITY, &content);
        let bytes = std::fs::read(&path).unwrap();
        assert!(matches!(open(&path), Found::Same { content: found, .. } if found == content));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            std::fs::write(&path, damaged).unwrap();
            if let Found::Same { content: found, .. } = open(&path) {
                assert!(at >= IDENTITY.header_len() && found != content, "byte {at}");
                assert!(content.outcomes.starts_with(&found.outcomes) && content.parts.starts_with(&found.parts));
            }
        }
        // A number that comes twice ends the trust.
        let mut journal = create(&path, IDENTITY, &content);
        journal.append(&[outcome(2), outcome(3)], &[]).unwrap();
        assert!(matches!(open(&path), Found::Same { content: found, .. } if found == content));
    }

    #[test]
    fn other_volumes_are_known_without_the_plan() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let folders: Vec<PathBuf> = ["/mnt/b", "/mnt/a folder/c"].map(PathBuf::from).to_vec();
        let elsewhere = Some(Elsewhere { id: 0xfedc << 48, folders });
        let content =
            Content { elsewhere: elsewhere.clone(), outcomes: vec![outcome(2)], parts: vec![(1, 9)], ..empty() };
        create(&path, IDENTITY, &content);
        assert!(matches!(open(&path), Found::Same { content: found, .. } if found == content));
        assert_eq!(elsewhere_at(&path), elsewhere);
        let bytes = std::fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            std::fs::write(&path, damaged).unwrap();
            let found = elsewhere_at(&path);
            assert!(found.is_none() || found == elsewhere, "byte {at}: {found:?}");
        }
        for len in 0..bytes.len() {
            std::fs::write(&path, &bytes[..len]).unwrap();
            let found = elsewhere_at(&path);
            assert!(found.is_none() || found == elsewhere, "{len} bytes: {found:?}");
        }
        // Of a model in one folder nothing is recorded, nor of names that no system has.
        create(&path, IDENTITY, &empty());
        assert_eq!(elsewhere_at(&path), None);
        let long = Elsewhere { id: 1, folders: vec![PathBuf::from("x".repeat(FOLDERS_MOST))] };
        create(&path, IDENTITY, &Content { elsewhere: Some(long), ..empty() });
        assert!(matches!(open(&path), Found::Same { content: found, .. } if found == empty()));
    }

    #[test]
    fn that_volumes_get_their_names_is_known_until_the_conversion_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let at = |n: i64| LastWritten { seconds: n, nanoseconds: -n };
        let say = |volumes: &[LastWritten]| say_named(&path, volumes, &Syncer::default()).unwrap();
        say(&[at(1)]);
        assert!(named_at(&path, 2).is_none() && !path.exists() && !is_of_one_folder(&path));
        create(&path, IDENTITY, &Content { outcomes: vec![outcome(2)], ..empty() });
        assert!(named_at(&path, 2).is_none() && is_of_one_folder(&path));
        say(&[at(1)]);
        say(&[at(2), at(3)]);
        assert_eq!((named_at(&path, 3), named_at(&path, 2)), (Some(vec![at(2), at(3)]), None));
        let bytes = std::fs::read(&path).unwrap();
        for damaged in bytes.len() - 1 - 2 * NAMED_EACH - CHECKSUM..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[damaged] ^= 1;
            std::fs::write(&path, bytes).unwrap();
            assert!(named_at(&path, 3).is_none(), "byte {damaged}");
        }
        std::fs::write(&path, &bytes).unwrap();
        assert!(matches!(open(&path), Found::Same { content, .. } if content.outcomes == [outcome(2)]));
        assert!(named_at(&path, 3).is_none());
        let elsewhere = Elsewhere { id: 1, folders: vec!["/mnt/b".into()] };
        create(&path, IDENTITY, &Content { elsewhere: Some(elsewhere), ..empty() });
        assert!(!is_of_one_folder(&path));
    }

    #[test]
    fn another_plan_is_told_from_garbage() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        assert!(matches!(open(&path), Found::Nothing));
        create(&path, Identity { plan_hash: 8, ..IDENTITY }, &empty());
        assert!(matches!(open(&path), Found::OtherPlan));
        for files in [0, 1, 3, 100] {
            let stamps = vec![stamps()[0]; files];
            create(&path, Identity { files, ..IDENTITY }, &Content { stamps, ..Content::default() });
            assert!(matches!(open(&path), Found::OtherPlan), "{files} files");
        }
        std::fs::write(&path, [&b"SLJRNL\x02\n"[..], &[0; 40]].concat()).unwrap();
        assert!(matches!(open(&path), Found::OtherPlan), "an older version");
        std::fs::write(&path, [3; 200]).unwrap();
        assert!(matches!(open(&path), Found::Nothing));
    }

    #[test]
    fn links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, precious) = (dir.path().join("journal"), dir.path().join("precious"));
        std::fs::write(&precious, "precious").unwrap();
        for name in ["journal", "journal.new"] {
            std::os::unix::fs::symlink(&precious, dir.path().join(name)).unwrap();
        }
        let found = Journal::open(&path, IDENTITY);
        assert!(matches!(found, Err(ConvertError::InTheWay { .. })));
        let created = Journal::create(&path, IDENTITY, &empty(), &Syncer::default());
        assert!(matches!(created, Err(ConvertError::InTheWay { .. })));
        std::fs::remove_file(dir.path().join("journal.new")).unwrap();
        create(&path, IDENTITY, &empty());
        assert_eq!(std::fs::read(&precious).unwrap(), b"precious");
        assert!(matches!(open(&path), Found::Same { .. }));
    }
}
