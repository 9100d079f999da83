//! Compressed extents: their stored bytes go into a staging slot, whole and verified. The threads that wait for an extent
//! decompress it from there into its own slot.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use sluice_format::planes::Frames;

use super::directory::Packed;
use crate::io::Slot;

/// Room for the records of a compressed extent, so that decompressing an expert of usual size allocates nothing.
const FRAMES: usize = 4096;

/// Threads that share the work on one extent.
pub trait Workers: Send + Sync {
    /// Splits `data` into parts, each of which begins where the one before it ends, and runs `f(i, part)` for each.
    fn for_each_part(&self, data: &mut [u8], ends: &[usize], f: &(dyn Fn(usize, &mut [u8]) + Sync));
}

/// Only the calling thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct Serial;

impl Workers for Serial {
    fn for_each_part(&self, data: &mut [u8], ends: &[usize], f: &(dyn Fn(usize, &mut [u8]) + Sync)) {
        let (mut rest, mut start) = (data, 0);
        for (i, &end) in ends.iter().enumerate() {
            let (part, behind) = rest.split_at_mut(end - start);
            f(i, part);
            (rest, start) = (behind, end);
        }
    }
}

/// Threads that are started for every extent. The program uses them at its start, when it has no others yet.
#[derive(Clone, Copy, Debug, Default)]
pub struct Started;

impl Workers for Started {
    fn for_each_part(&self, data: &mut [u8], ends: &[usize], f: &(dyn Fn(usize, &mut [u8]) + Sync)) {
        let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(ends.len());
        if threads < 2 {
            return Serial.for_each_part(data, ends, f);
        }
        let mut parts = Vec::with_capacity(ends.len());
        let (mut rest, mut start) = (data, 0);
        for &end in ends {
            let (part, behind) = rest.split_at_mut(end - start);
            parts.push(part);
            (rest, start) = (behind, end);
        }
        let parts = Mutex::new(parts.into_iter().enumerate());
        let work = || {
            loop {
                let next = parts.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((i, part)) = next else { break };
                f(i, part);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                // If the system does not start a thread, the others do its work.
                let _ = std::thread::Builder::new().spawn_scoped(scope, work);
            }
            work();
        });
    }
}

/// Decompresses extents.
pub(super) struct Unpacker {
    workers: Arc<dyn Workers>,
    frames: Frames,
    ends: Vec<usize>,
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unpacker").finish_non_exhaustive()
    }
}

impl Unpacker {
    /// `any` says whether there are compressed extents at all.
    pub(super) fn new(workers: Arc<dyn Workers>, any: bool) -> Self {
        let room = if any { FRAMES } else { 0 };
        Unpacker { workers, frames: Frames::with_capacity(room), ends: Vec::with_capacity(room) }
    }

    pub(super) fn set_workers(&mut self, workers: Arc<dyn Workers>) {
        self.workers = workers;
    }

    /// Fills a slot with the padded bytes of an extent.
    ///
    /// # Errors
    /// What is wrong with the stored bytes; the slot is empty then.
    pub(super) fn unpack(&mut self, stored: &[u8], packed: &Packed, slot: &mut Slot) -> Result<(), String> {
        let padded = usize::try_from(packed.padded_len).ok().filter(|&len| len <= slot.capacity());
        let padded = padded.ok_or("it is larger than its slot")?;
        let logical = usize::try_from(packed.logical_len).ok().filter(|&len| len <= padded);
        let logical = logical.ok_or("it is larger than its slot")?;
        let frames = self.frames.read(stored, packed.logical_len)?;
        self.ends.clear();
        self.ends.extend(frames.iter().map(|frame| frame.range().end));
        let bytes = slot.overwrite(padded);
        let (bytes, padding) = bytes.split_at_mut(logical);
        padding.fill(0);
        let damaged = AtomicUsize::new(usize::MAX);
        let decode = |i: usize, part: &mut [u8]| {
            if frames[i].decode(stored, part).is_err() {
                damaged.fetch_min(i, Ordering::Relaxed);
            }
        };
        self.workers.for_each_part(bytes, &self.ends, &decode);
        let damaged = damaged.into_inner();
        if damaged == usize::MAX {
            return Ok(());
        }
        slot.overwrite(0);
        Err(format!("frame {damaged} of {} does not decode", self.ends.len()))
    }
}
