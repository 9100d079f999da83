//! Digests of the whole source, computed from the bytes that a conversion reads anyway, whichever thread reads them and in any
//! order.
//!
//! The bytes of a shard are its header and, without gaps, its tensors. A tensor's bytes are divided into **leaves** of 16 KiB. The
//! digest of a tensor is the digest of the digests of its leaves; the digest of a shard is that of its header's digest and its
//! tensors' digests. So all bytes are covered, including tensors that the model does not use, and a thread that reads some rows of
//! a tensor can contribute the leaves in them. Leaves that are still unknown when all extents are done (in tensors that are left
//! out, or because no thread has read them from end to end) are read at the end.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rayon::prelude::*;
use sluice_checksum::{Xxh3, xxh3_128};

use crate::error::ConvertError;
use crate::source::Checkpoint;

/// Bytes of a leaf; the last one of a tensor may be shorter.
pub(crate) const LEAF: u64 = 16 << 10;
/// Bytes read at once at the end: whole leaves.
const PIECE: u64 = 64 * LEAF;
/// Tensors that a thread follows at once: those of an extent alternate, and each has scales.
const RUNS: usize = 8;

/// Where a tensor's bytes are in the files of a checkpoint, whether or not the model uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Index of its file.
    pub(crate) file: usize,
    /// First byte in the file.
    pub(crate) start: u64,
    pub(crate) len: u64,
}

/// The parts of a file. `ranges` are the places and lengths of its tensors, which do not overlap. Bytes between them that belong to
/// no tensor are parts too, so the parts cover `from..to` without gaps; tensors without bytes are not parts.
pub(crate) fn parts_of(file: usize, ranges: impl Iterator<Item = (u64, u64)>, from: u64, to: u64) -> Vec<Part> {
    let mut ranges: Vec<(u64, u64)> = ranges.filter(|&(_, len)| len > 0).collect();
    ranges.sort_unstable();
    let mut parts = Vec::with_capacity(ranges.len());
    let mut end = from;
    for (start, len) in ranges.into_iter().chain([(to, 0)]) {
        if start > end {
            parts.push(Part { file, start: end, len: start - end });
        }
        if len > 0 {
            parts.push(Part { file, start, len });
        }
        end = start + len;
    }
    parts
}

/// The digest of a part with this many bytes, all zero.
pub(crate) fn digest_of_zeros(len: u64) -> u128 {
    let zeros = [0; LEAF as usize];
    let (leaf, rest) = (xxh3_128(&zeros), (len % LEAF) as usize);
    let tail = (rest > 0).then(|| xxh3_128(&zeros[..rest]));
    digest_of((0..len / LEAF).map(|_| &leaf).chain(&tail))
}

/// What is known about a part.
enum Known {
    /// The digests of some leaves.
    Leaves { digests: Vec<Option<u128>>, count: usize },
    /// The whole digest.
    Whole(u128),
}

/// The known digests of all parts of a checkpoint. Threads share it.
pub(crate) struct Contents<'a> {
    checkpoint: &'a Checkpoint,
    parts: Vec<Mutex<Known>>,
    /// Parts that became known, for the journal.
    news: Mutex<Vec<(usize, u128)>>,
    /// A file whose bytes had changed when they were read again.
    torn: OnceLock<usize>,
}

impl<'a> Contents<'a> {
    /// Starts with the digests that an earlier run has found, by part.
    pub(crate) fn new(checkpoint: &'a Checkpoint, found: &[(usize, u128)]) -> Self {
        let nothing = || Known::Leaves { digests: Vec::new(), count: 0 };
        let mut parts: Vec<Known> = checkpoint.parts.iter().map(|_| nothing()).collect();
        for &(part, digest) in found {
            parts[part] = Known::Whole(digest);
        }
        let parts = parts.into_iter().map(Mutex::new).collect();
        Contents { checkpoint, parts, news: Mutex::default(), torn: OnceLock::new() }
    }

    /// Digests of parts that became known since the last call.
    pub(crate) fn take_news(&self) -> Vec<(usize, u128)> {
        std::mem::take(&mut lock(&self.news))
    }

    /// Index of a file whose bytes changed while they were read.
    pub(crate) fn torn(&self) -> Option<usize> {
        self.torn.get().copied()
    }

    fn is_whole(&self, part: usize) -> bool {
        matches!(*lock(&self.parts[part]), Known::Whole(_))
    }

    fn add_leaf(&self, part: usize, leaf: usize, digest: u128) {
        let mut known = lock(&self.parts[part]);
        let Known::Leaves { digests, count } = &mut *known else { return };
        if digests.is_empty() {
            digests.resize(leaves(self.checkpoint.parts[part].len), None);
        }
        match digests[leaf].replace(digest) {
            None => *count += 1,
            Some(before) if before == digest => {}
            Some(_) => _ = self.torn.set(self.checkpoint.parts[part].file),
        }
        if *count == digests.len() {
            let whole = digest_of(digests.iter().flatten());
            *known = Known::Whole(whole);
            lock(&self.news).push((part, whole));
        }
    }

    /// Reads everything that has not been read yet.
    pub(crate) fn complete(&self) -> Result<(), ConvertError> {
        (0..self.parts.len()).into_par_iter().try_for_each(|part| self.complete_part(part))
    }

    /// Reads everything of one file that has not been read yet.
    pub(crate) fn complete_file(&self, file: usize) -> Result<(), ConvertError> {
        self.parts_of_file(file).into_par_iter().try_for_each(|part| self.complete_part(part))
    }

    /// Whether the whole file is known.
    pub(crate) fn is_file_whole(&self, file: usize) -> bool {
        self.parts_of_file(file).all(|part| self.is_whole(part))
    }

    fn parts_of_file(&self, file: usize) -> Range<usize> {
        let first = |file| self.checkpoint.parts.partition_point(|part| part.file < file);
        first(file)..first(file + 1)
    }

    fn complete_part(&self, part: usize) -> Result<(), ConvertError> {
        let len = self.checkpoint.parts[part].len;
        let missing: Vec<usize> = match &*lock(&self.parts[part]) {
            Known::Whole(_) => return Ok(()),
            Known::Leaves { digests, .. } => {
                (0..leaves(len)).filter(|&i| digests.get(i).is_none_or(Option::is_none)).collect()
            }
        };
        let mut buffer = Vec::new();
        for run in missing.chunk_by(|a, b| a + 1 == *b) {
            let (first, end) = (run[0] as u64 * LEAF, ((run[run.len() - 1] as u64 + 1) * LEAF).min(len));
            let mut at = first;
            while at < end {
                buffer.resize(PIECE.min(end - at) as usize, 0);
                self.checkpoint.read_part(part, at, &mut buffer)?;
                for leaf in buffer.chunks(LEAF as usize) {
                    self.add_leaf(part, (at / LEAF) as usize, xxh3_128(leaf));
                    at += leaf.len() as u64;
                }
            }
        }
        Ok(())
    }

    /// Digests of all parts, in order. All must be known: [`Contents::complete`] ensures that.
    pub(crate) fn digests(&self) -> Vec<u128> {
        let whole = |part: &Mutex<Known>| match &*lock(part) {
            Known::Whole(digest) => *digest,
            Known::Leaves { .. } => unreachable!("what was missing has been read"),
        };
        self.parts.iter().map(whole).collect()
    }
}

fn leaves(len: u64) -> usize {
    len.div_ceil(LEAF) as usize
}

/// The digest of digests.
pub(crate) fn digest_of<'d>(digests: impl IntoIterator<Item = &'d u128>) -> u128 {
    let mut hash = Xxh3::new();
    digests.into_iter().for_each(|d| hash.update(&d.to_le_bytes()));
    hash.digest128()
}

/// The digest of the bytes of a tensor that are in memory, or come in pieces of whole leaves.
#[derive(Default)]
pub(crate) struct PartDigest(Xxh3);

impl PartDigest {
    /// Appends bytes; all calls but the last must bring whole leaves.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        bytes.chunks(LEAF as usize).for_each(|leaf| self.0.update(&xxh3_128(leaf).to_le_bytes()));
    }

    pub(crate) fn finish(&self) -> u128 {
        self.0.digest128()
    }
}

/// What one thread reads of the parts, front to back, in pieces of any length.
pub(crate) struct Follower<'a> {
    contents: &'a Contents<'a>,
    runs: Vec<Run>,
}

/// A part that is being read without gaps.
struct Run {
    part: usize,
    next: u64,
    /// The hash of the current leaf, if it was read from its beginning up to `next`.
    leaf: Option<Box<Xxh3>>,
}

impl<'a> Follower<'a> {
    pub(crate) fn new(contents: &'a Contents<'a>) -> Self {
        Follower { contents, runs: Vec::new() }
    }

    /// Forgets unfinished leaves: the next read is of something else.
    pub(crate) fn reset(&mut self) {
        self.runs.clear();
    }

    /// Records bytes of a part that were read from `at` on.
    pub(crate) fn read(&mut self, part: usize, at: u64, bytes: &[u8]) {
        if bytes.is_empty() || self.contents.is_whole(part) {
            return;
        }
        let len = self.contents.checkpoint.parts[part].len;
        let known = self.runs.iter().position(|run| (run.part, run.next) == (part, at));
        let mut run = known.map_or(Run { part, next: at, leaf: None }, |i| self.runs.swap_remove(i));
        let mut rest = bytes;
        while !rest.is_empty() {
            let end = ((run.next / LEAF + 1) * LEAF).min(len);
            let (now, later) = rest.split_at(((end - run.next) as usize).min(rest.len()));
            let begins = run.next.is_multiple_of(LEAF);
            let ends = run.next + now.len() as u64 == end;
            let leaf = (run.next / LEAF) as usize;
            if begins && ends {
                self.contents.add_leaf(part, leaf, xxh3_128(now));
            } else if begins {
                let mut hash = Box::new(Xxh3::new());
                hash.update(now);
                run.leaf = Some(hash);
            } else if let Some(hash) = &mut run.leaf {
                hash.update(now);
                if ends {
                    self.contents.add_leaf(part, leaf, hash.digest128());
                    run.leaf = None;
                }
            }
            run.next += now.len() as u64;
            rest = later;
        }
        if run.next < len {
            if self.runs.len() == RUNS {
                self.runs.remove(0);
            }
            self.runs.push(run);
        }
    }
}

/// A thread that panicked leaves a consistent list, because every change to it is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
