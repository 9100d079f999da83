//! Experts that are still being read: waiting for them, and handing out the part that has arrived.
//!
//! Parts are bytes that have not been verified. Results computed from them count only once the whole expert has arrived and has
//! been settled. An expert that is read a second time is handed out only as a whole.

use std::time::Instant;

use super::{Content, Expert, Key, LayerPass, Pool, PoolError, Unsettled, settle};
use crate::io::PendingRead;

/// An expert of the pass that is being read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    /// Where it is read to.
    pub slot: u32,
    /// Whether a part of it has been handed out, and more of it is wanted.
    begun: bool,
    /// Bytes that must have arrived before a part is handed out (again); `None` until one has been.
    wanted: Option<usize>,
}

impl Pending {
    pub fn new(slot: u32) -> Self {
        Pending { slot, begun: false, wanted: None }
    }
}

/// What has happened to a pending read, by its place in the list.
pub(super) enum Progressed {
    /// The read has ended.
    Ended(usize),
    /// Enough of it has arrived.
    Part(usize),
}

/// What a pass has to hand out.
pub(super) enum Event {
    /// The expert in this slot, pinned.
    Whole(u32),
    /// A part of this pending one.
    Part(usize),
}

/// What [`LayerPass::arrival`] hands out.
pub enum Arrival<'a> {
    /// An expert that was verified before.
    Settled(Expert<'a>),
    /// An expert that the caller has to settle.
    Unsettled(Unsettled<'a>),
    /// The first bytes of an expert, not verified.
    Part(ExpertPart<'a>),
}

/// The first bytes of an expert that is being read.
pub struct ExpertPart<'a> {
    pool: &'a mut Pool,
    at: usize,
}

impl ExpertPart<'_> {
    fn content(&self) -> (Key, &PendingRead) {
        match &self.pool.slots[self.pool.pass.pending[self.at].slot as usize] {
            Content::Loading { expert, read, .. } => (*expert, read),
            _ => unreachable!("a pending slot is loading"),
        }
    }

    /// The expert within its layer.
    #[must_use]
    pub fn expert(&self) -> u32 {
        self.pool.directory.key(self.content().0).expert
    }

    /// The bytes that have arrived.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.content().1.prefix()
    }

    /// Bytes of the whole.
    #[must_use]
    pub fn len(&self) -> usize {
        self.content().1.len()
    }

    /// Never true: an expert has at least a page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the caller will have to settle the whole expert.
    #[must_use]
    pub fn is_verified(&self) -> bool {
        !self.pool.io.verifies()
    }

    /// Says that the next part of this expert is wanted when it has this many bytes. Until then, no part of another expert is
    /// handed out. With `None`, this expert comes again only as a whole.
    pub fn more_at(self, bytes: Option<usize>) {
        let pending = &mut self.pool.pass.pending[self.at];
        pending.begun = bytes.is_some();
        pending.wanted = Some(bytes.unwrap_or(usize::MAX));
    }
}

impl LayerPass<'_> {
    /// Like [`next`](LayerPass::next), but leaves it to the caller to verify experts. With `parts`, while no expert is ready, it
    /// also hands out a part of one that has at least this many bytes; of several, the one with the most. Every expert still
    /// comes as a whole, and only once unless it was damaged.
    ///
    /// # Errors
    /// As [`next`](LayerPass::next).
    pub fn arrival(&mut self, parts: Option<usize>) -> Result<Option<Arrival<'_>>, PoolError> {
        Ok(match self.event(parts)? {
            Some(Event::Whole(number)) => Some(settle::hand_out(self.pool, number)),
            Some(Event::Part(at)) => Some(Arrival::Part(ExpertPart { pool: self.pool, at })),
            None => None,
        })
    }
}

impl Pool {
    /// Waits until a pending read has ended, the one that ended first if several have, or there is a part to hand out.
    pub(super) fn wait_for_one(&mut self, parts: Option<usize>) -> Progressed {
        if let Some(progressed) = self.progressed(parts) {
            return progressed;
        }
        let start = Instant::now();
        let progressed = self.io.wait(|| self.progressed(parts));
        self.stats.wait_ns += u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        progressed
    }

    /// Waits until the pending read at this place in the list has ended.
    pub(super) fn wait_for(&mut self, at: usize) {
        let ended = |pool: &Pool| match &pool.slots[pool.pass.pending[at].slot as usize] {
            Content::Loading { read, .. } => read.is_done(),
            _ => true,
        };
        if ended(self) {
            return;
        }
        let start = Instant::now();
        self.io.wait(|| ended(self).then_some(()));
        self.stats.wait_ns += u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    }

    fn progressed(&self, parts: Option<usize>) -> Option<Progressed> {
        let pending = || {
            self.pass.pending.iter().enumerate().filter_map(|(at, pending)| match &self.slots[pending.slot as usize] {
                Content::Loading { read, .. } => Some((at, pending, read)),
                _ => None,
            })
        };
        let ended = pending().filter(|(.., read)| read.is_done()).min_by_key(|(.., read)| read.order());
        if let Some((at, ..)) = ended {
            return Some(Progressed::Ended(at));
        }
        let least = parts?;
        let begun = self.pass.pending.iter().any(|pending| pending.begun);
        let enough = |(_, pending, read): &(usize, &Pending, &PendingRead)| {
            pending.begun == begun && read.arrived_prefix() >= pending.wanted.unwrap_or(least)
        };
        let part = pending().filter(enough).max_by_key(|(.., read)| read.arrived_prefix());
        part.map(|(at, ..)| Progressed::Part(at))
    }
}
