//! The buffer pool: slots full of experts, and the table that says which expert is where.
//!
//! A layer asks for all the experts it needs at once ([`Pool::begin_layer`]). Experts in memory are pinned, reads are
//! submitted for all others as far as there are slots, and [`LayerPass::next`] yields experts as they become ready.
//! It hands out one expert at a time, so a pass makes progress with a single slot, whatever the number of experts. A
//! caller that can use the first bytes of an expert before the last have come calls [`LayerPass::arrival`] instead.
//!
//! The caller that computes with an expert first verifies it, while the bytes are in its cache anyway
//! ([`Unsettled::settle`]): to read them from memory only for that would cost as much as half of
//! multiplying them. An expert that is never used is never verified.
//!
//! A compressed expert is read into a staging slot, whole, verified by the I/O thread, and decompressed into its own slot when its
//! turn comes, by the threads that wait for it. So it has no parts that are handed out early. It is settled like the others: its
//! decompressed bytes must have their checksum as well.
//!
//! Slots can have several sizes, where experts do ([`SlotPlan`]). All experts of a layer go into slots of one size; slots of one
//! size are a size class.
//!
//! Everything is allocated when the pool is made; a pass allocates nothing.

mod classes;
mod dense;
mod directory;
mod error;
mod load;
mod order;
mod parts;
pub mod policy;
mod prefetch;
mod resize;
mod sectors;
mod settle;
mod storage;
mod unpack;
mod warm;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use sluice_checksum::xxh3_64;

pub use classes::{LEAST_SLOTS, LayerSize, SlotClass, SlotPlan};
pub use dense::{DenseGuard, DenseHandle, DenseParts, DenseStats, RING_SLOTS};
pub use directory::{DenseLocation, ExpertDirectory, ExpertKey, ExtentLocation, Packed};
pub use error::PoolError;
pub use parts::{Arrival, ExpertPart};
pub use policy::{Choice, Key, Policy, PolicyKind};
pub use prefetch::PREFETCH_SLOTS;
pub use sectors::{SectorCache, TableLocation};
pub use settle::{Damaged, Expert, Unsettled};
pub use storage::{Storage, StorageConfig};
pub use unpack::{Serial, Started, Workers};

use self::parts::{Event, Pending, Progressed};
use self::policy::Pass;
use self::prefetch::Prefetches;
use self::settle::Verdict;
use self::unpack::Unpacker;
use self::warm::Warming;
use crate::io::{Arena, Check, Class, ExtentName, PendingRead, ReadError, ReadFailure, Scheduler, Slot};

/// The table's entry for an expert that has no slot.
const ABSENT: u32 = u32::MAX;

/// Totals since the pool was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Requested experts that were in memory already.
    pub hits: u64,
    /// Requested experts that had to be read, or waited for.
    pub misses: u64,
    /// Bytes of experts read.
    pub bytes_read: u64,
    /// Experts that lost their slot to another.
    pub evictions: u64,
    /// Nanoseconds in which [`LayerPass::next`] or [`LayerPass::arrival`] was blocked.
    pub wait_ns: u64,
    /// Experts that were prefetched.
    pub prefetched: u64,
    /// Of these, requested before they lost their slot.
    pub prefetched_used: u64,
    /// Of these, lost their slot, or were given up, without having been requested.
    pub prefetched_wasted: u64,
    /// Experts read while there was nothing to do ([`Pool::warm`]).
    pub warmed: u64,
    /// Bytes of these; a part of `bytes_read`.
    pub warmed_bytes: u64,
    /// How often a slot without memory was filled, and took some.
    pub new_slots: u64,
}

/// The router's choice, in the form that policies need.
#[derive(Clone, Copy, Debug)]
pub struct Routing<'a> {
    /// Tokens that go through the layer together, at least 1.
    pub tokens: usize,
    /// Whether they include a part of a prompt.
    pub prefill: bool,
    /// Whether experts are handed out in ascending order, instead of those in memory first and the others as they arrive.
    pub in_order: bool,
    /// The same number of experts for each token, token by token.
    pub choices: &'a [Choice],
}

/// The content of a slot. Each variant owns the slot's memory, except when it is lost.
#[derive(Debug)]
enum Content {
    Empty(Slot),
    /// `target`: the slot of a compressed expert; the read is into a staging slot then.
    Loading {
        expert: Key,
        read: PendingRead,
        check: Check,
        target: Option<Slot>,
    },
    Resident {
        expert: Key,
        slot: Slot,
        pins: u32,
        verdict: Verdict,
    },
    Lost,
}

impl Content {
    fn take(&mut self) -> Content {
        std::mem::replace(self, Content::Lost)
    }
}

/// The slots of a size class. Their numbers follow each other.
struct Slots {
    /// Bytes of each.
    bytes: usize,
    /// Their numbers.
    numbers: Range<u32>,
    /// Empty ones that can be filled; those with memory at the end.
    free: Vec<u32>,
    /// Empty ones whose memory has been given back to the system; not free.
    away: Vec<u32>,
}

impl Slots {
    /// Those that may have memory.
    fn count(&self) -> usize {
        self.numbers.len() - self.away.len()
    }
}

/// The expert slots, and what is in them.
pub struct Pool {
    io: Arc<Scheduler>,
    directory: ExpertDirectory,
    policy: Box<dyn Policy>,
    slots: Vec<Content>,
    /// Slot of each expert, or [`ABSENT`].
    table: Vec<u32>,
    /// Of each size class the slots, ascending by size.
    classes: Vec<Slots>,
    /// The size class of each routed layer.
    class_of_layer: Vec<u8>,
    /// How many bytes free slots without memory may take.
    new_bytes: u64,
    /// Staging slots that no read is using.
    staging: Vec<Slot>,
    unpacker: Unpacker,
    pass: PassState,
    prefetches: Prefetches,
    warming: Warming,
    stats: PoolStats,
}

/// What is left of the current pass. Empty between passes.
#[derive(Default)]
struct PassState {
    /// Slots of experts that are pinned for this pass and not handed out yet.
    ready: VecDeque<u32>,
    /// Slots that are being read into.
    pending: Vec<Pending>,
    /// Experts that have no slot yet.
    todo: VecDeque<Key>,
    /// Of these, experts that came damaged.
    damaged: Vec<Key>,
    /// An error that occurred while no caller could get it.
    failed: Option<PoolError>,
    /// Whether experts are handed out in ascending order.
    in_order: bool,
    /// The layer whose experts are read once all reads of this pass have begun.
    next: Option<u32>,
}

impl Pool {
    /// Reserves addresses for slots. Each takes memory when it is filled first.
    ///
    /// # Errors
    /// [`PoolError::NoRoom`] without a slot for a model with experts, [`PoolError::Io`] if the system does not
    /// give the addresses.
    pub fn reserve(directory: &ExpertDirectory, slots: &SlotPlan) -> Result<Arena, PoolError> {
        if slots.slots() == 0 && !directory.is_empty() {
            return Err(PoolError::NoRoom);
        }
        let sizes = slots
            .classes()
            .iter()
            .flat_map(|class| std::iter::repeat_n(usize::try_from(class.len).unwrap_or(usize::MAX), class.slots));
        Ok(Arena::carve(sizes, "experts")?)
    }

    /// Reserves addresses for `slots` staging slots, at least two where experts are compressed: one is decompressed while one is
    /// read.
    ///
    /// # Errors
    /// [`PoolError::Io`] if the system does not give the addresses.
    pub fn reserve_staging(directory: &ExpertDirectory, slots: usize) -> Result<Arena, PoolError> {
        let slots = if directory.staging_bytes() == 0 { 0 } else { slots.clamp(2, 2.max(directory.len() as usize)) };
        Ok(Arena::uniform(directory.staging_bytes(), slots, "compressed experts")?)
    }

    /// A pool on what [`reserve`](Self::reserve) and [`reserve_staging`](Self::reserve_staging) reserved. All slots are empty. The policy is for
    /// [`ExpertDirectory::shape`].
    ///
    /// # Panics
    /// If the arenas' slots are smaller than an expert, or there are none for a model that has
    /// experts, or the sizes of slots do not ascend.
    #[must_use]
    pub fn new(
        io: Arc<Scheduler>,
        arena: Arena,
        staging: Arena,
        directory: ExpertDirectory,
        mut policy: Box<dyn Policy>,
    ) -> Pool {
        let slots = arena.into_slots();
        assert!(!slots.is_empty() || directory.is_empty(), "a pool without slots");
        let classes = size_classes(&slots);
        let class_of_layer = directory.layer_bytes().map(|bytes| {
            let class = classes.partition_point(|class| class.bytes < bytes);
            assert!(class < classes.len(), "slots are smaller than an expert");
            class as u8
        });
        let class_of_layer: Vec<u8> = class_of_layer.collect();
        policy.classify(&class_of_layer);
        let slots: Vec<Content> = slots.into_iter().map(Content::Empty).collect();
        let staging = staging.into_slots();
        let packed = directory.staging_bytes() > 0;
        let staged = staging.iter().all(|slot| slot.capacity() >= directory.staging_bytes());
        assert!(!packed || (staged && !staging.is_empty()), "staging slots are smaller than a compressed expert");
        let pass = PassState {
            ready: VecDeque::with_capacity(slots.len()),
            pending: Vec::with_capacity(slots.len()),
            todo: VecDeque::with_capacity(directory.shape().experts as usize),
            damaged: Vec::new(),
            failed: None,
            in_order: false,
            next: None,
        };
        Pool {
            io,
            policy,
            table: vec![ABSENT; directory.shape().keys()],
            classes,
            class_of_layer,
            new_bytes: u64::MAX,
            prefetches: Prefetches::new(slots.len(), directory.shape()),
            warming: Warming::default(),
            slots,
            staging,
            unpacker: Unpacker::new(Arc::new(Serial), packed),
            directory,
            pass,
            stats: PoolStats::default(),
        }
    }

    /// Says which threads decompress experts from now on. Before the first call, the calling thread does.
    pub fn set_workers(&mut self, workers: Arc<dyn Workers>) {
        self.unpacker.set_workers(workers);
    }

    /// Totals since the pool was made.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        self.stats
    }

    /// Experts in memory.
    #[must_use]
    pub fn resident_count(&self) -> usize {
        let is_resident = |content: &&Content| matches!(content, Content::Resident { .. });
        self.slots.iter().filter(is_resident).count()
    }

    /// The experts that are in memory, in no order.
    pub fn residents(&self) -> impl Iterator<Item = ExpertKey> {
        self.slots.iter().filter_map(|content| match content {
            Content::Resident { expert, .. } => Some(self.directory.key(*expert)),
            _ => None,
        })
    }

    /// True if the expert is in memory.
    #[must_use]
    pub fn is_resident(&self, key: ExpertKey) -> bool {
        let slot = self.table[self.directory.index(key).index()];
        self.slots.get(slot as usize).is_some_and(|content| matches!(content, Content::Resident { .. }))
    }

    /// True if an expert of any layer is in memory, or on its way.
    #[must_use]
    pub fn has(&self, layer: u32, expert: u32) -> bool {
        self.table[self.directory.index(ExpertKey { layer, expert }).index()] != ABSENT
    }

    /// True if all experts of a layer are in memory, or on their way.
    #[must_use]
    pub fn has_all(&self, layer: u32) -> bool {
        self.directory.indices_of(layer).all(|index| self.table[index.index()] != ABSENT)
    }

    /// The experts that the pool serves.
    #[must_use]
    pub fn directory(&self) -> &ExpertDirectory {
        &self.directory
    }

    /// The eviction policy, to save what it has learned.
    #[must_use]
    pub fn policy(&self) -> &dyn Policy {
        &*self.policy
    }

    /// The eviction policy, to give it what an earlier run has learned.
    pub fn policy_mut(&mut self) -> &mut dyn Policy {
        &mut *self.policy
    }

    /// Begins a pass over a layer: pins those of `experts` that are in memory and submits reads for all others, as
    /// far as there are slots; the other reads follow as experts are released. Does not block, so the caller can do
    /// other work before the first [`LayerPass::next`].
    ///
    /// # Errors
    /// None by itself at present: a read that cannot be submitted is reported by `next`.
    ///
    /// # Panics
    /// If `experts` are not strictly ascending, or the layer does not have one of them.
    pub fn begin_layer(
        &mut self,
        layer: u32,
        experts: &[u32],
        routing: &Routing<'_>,
    ) -> Result<LayerPass<'_>, PoolError> {
        assert!(experts.is_sorted_by(|a, b| a < b), "experts have to be strictly ascending");
        self.stop_warming();
        // Only a pass that was leaked instead of dropped leaves anything to do here.
        self.end_pass();
        self.settle_prefetches();
        let Routing { tokens, prefill, in_order, choices } = *routing;
        self.pass.in_order = in_order;
        let routed = self.directory.routed_layer(layer);
        self.policy.begin_pass(&Pass { layer: routed, tokens: tokens as u32, prefill, choices });
        for &expert in experts {
            let index = self.directory.index(ExpertKey { layer, expert });
            self.settle_given_up(index);
            let number = self.table[index.index()];
            match self.slots.get_mut(number as usize) {
                Some(Content::Resident { pins, .. }) => {
                    *pins += 1;
                    if *pins == 1 {
                        self.policy.pin(index);
                    }
                    self.policy.hit(index);
                    self.pass.ready.push_back(number);
                    self.stats.hits += 1;
                    self.count_used(index);
                }
                // It is already being read, and pinned until that ends.
                Some(Content::Loading { .. }) => {
                    self.adopt_prefetch(number, index);
                    self.stats.misses += 1;
                }
                _ => {
                    self.pass.todo.push_back(index);
                    self.stats.misses += 1;
                }
            }
        }
        self.submit_missing();
        self.give_up_prefetches(routed);
        if self.directory.staging_bytes() > 0 {
            // Prefetches that have ended leave their staging slots to this pass.
            self.settle_prefetches();
            self.submit_missing();
        }
        Ok(LayerPass { pool: self })
    }

    /// Submits reads for missing experts until they or the slots run out.
    fn submit_missing(&mut self) {
        while let Some(&expert) = self.pass.todo.front() {
            if !self.can_stage(expert) {
                return;
            }
            let Some(number) = self.vacate(self.class_of(expert)) else { return };
            self.pass.todo.pop_front();
            let damaged = self.pass.damaged.iter().position(|&damaged| damaged == expert);
            let check = match damaged {
                Some(at) => {
                    self.pass.damaged.swap_remove(at);
                    Check::Again
                }
                None => Check::ByReceiver,
            };
            match self.start_read(number, expert, Class::Demand, check) {
                Ok(()) => self.pass.pending.push(Pending::new(number)),
                Err(error) => {
                    self.pass.failed = Some(error);
                    self.pass.todo.clear();
                }
            }
        }
    }

    /// Submits reads that were waiting for a staging slot, so that the drive continues while the expert that has left the staging
    /// slot is computed.
    fn submit_staged(&mut self) {
        if self.directory.staging_bytes() > 0 {
            self.submit_missing();
        }
    }

    /// Whether there is a staging slot for an expert, if it needs one.
    fn can_stage(&self, expert: Key) -> bool {
        !self.staging.is_empty() || self.directory.location(expert).packed.is_none()
    }

    /// Starts reading an expert into an empty slot, by way of a staging slot if it is compressed; it is pinned until the read ends.
    fn start_read(&mut self, number: u32, expert: Key, class: Class, check: Check) -> Result<(), PoolError> {
        let Content::Empty(slot) = self.slots[number as usize].take() else { unreachable!("a vacated slot is empty") };
        let location = self.directory.location(expert);
        let ExpertKey { layer, expert: id } = self.directory.key(expert);
        let name = ExtentName::expert(layer, id);
        let (slot, target) = match location.packed {
            Some(_) => (self.staging.pop().expect("whoever starts a read has made sure of it"), Some(slot)),
            None => (slot, None),
        };
        // The stored bytes must be right before they are decompressed; the receiver verifies the decompressed ones.
        let verified = if target.is_some() && check == Check::ByReceiver { Check::Here } else { check };
        match location.submit(&self.io, slot, class, verified, name) {
            Ok(read) => {
                self.slots[number as usize] = Content::Loading { expert, read, check, target };
                self.table[expert.index()] = number;
                self.policy.insert(expert);
                self.policy.pin(expert);
                Ok(())
            }
            Err(ReadFailure { error, slot }) => {
                self.put_back_read(number, slot, target);
                Err((*error).into())
            }
        }
    }

    /// The size class of an expert's slot.
    fn class_of(&self, expert: Key) -> u8 {
        self.class_of_layer[self.directory.shape().expert(expert).0 as usize]
    }

    /// The slots of the size of this one.
    fn class_of_slot(&mut self, number: u32) -> &mut Slots {
        let at = self.classes.partition_point(|class| class.numbers.end <= number);
        &mut self.classes[at]
    }

    /// Whether there is an empty slot of a size class that may be filled.
    fn has_empty(&self, class: u8) -> bool {
        // Slots with memory are at the end of the list.
        let slots = &self.classes[usize::from(class)];
        slots.free.last().is_some_and(|&number| {
            !self.is_absent(number) || self.new_bytes >= slots.bytes as u64 || !self.is_in_use(class)
        })
    }

    /// An empty slot of a size class, by eviction if need be; `None` if every slot is in use.
    fn vacate(&mut self, class: u8) -> Option<u32> {
        if self.has_empty(class) {
            let Slots { bytes, free, .. } = &mut self.classes[usize::from(class)];
            let (bytes, number) = (*bytes as u64, free.pop()?);
            let is_new = self.is_absent(number);
            self.new_bytes = self.new_bytes.saturating_sub(if is_new { bytes } else { 0 });
            self.stats.new_slots += u64::from(is_new);
            return Some(number);
        }
        let victim = self.policy.victim_in(class)?;
        self.policy.evict(victim);
        self.stats.evictions += 1;
        self.count_wasted(victim);
        let number = std::mem::replace(&mut self.table[victim.index()], ABSENT);
        let content = &mut self.slots[number as usize];
        match content.take() {
            Content::Resident { slot, pins: 0, .. } => *content = Content::Empty(slot),
            other => panic!("the policy chose {victim:?}, which is in use or absent: {other:?}"),
        }
        Some(number)
    }

    /// Whether there is anything in any slot of a size class, or on its way.
    fn is_in_use(&self, class: u8) -> bool {
        let Range { start, end } = self.classes[usize::from(class)].numbers;
        self.slots[start as usize..end as usize]
            .iter()
            .any(|content| matches!(content, Content::Loading { .. } | Content::Resident { .. }))
    }

    /// Marks the slot of a read as free, and the staging slot `read` if there is another `target`.
    fn put_back_read(&mut self, number: u32, read: Option<Slot>, target: Option<Slot>) {
        match target {
            Some(target) => {
                self.staging.extend(read);
                self.put_back(number, Some(target));
            }
            None => self.put_back(number, read),
        }
    }

    /// Marks a slot as free; one whose memory is gone is never used again.
    fn put_back(&mut self, number: u32, slot: Option<Slot>) {
        if let Some(slot) = slot {
            self.slots[number as usize] = Content::Empty(slot);
            self.class_of_slot(number).free.push(number);
        }
    }

    /// Ends the read into a slot, waiting for it if need be. The expert gets `pins` pins.
    fn finish_read(&mut self, number: u32, pins: u32) -> Result<(), PoolError> {
        let Content::Loading { expert, read, check, target } = self.slots[number as usize].take() else {
            unreachable!("a pending slot is loading")
        };
        let verdict = Verdict::after(check, self.io.verifies());
        let finished = match (read.finish(), target) {
            (Ok(stored), Some(target)) => {
                self.stats.bytes_read += stored.bytes().len() as u64;
                self.unpack(expert, check, stored, target)
            }
            (Ok(slot), None) => {
                self.stats.bytes_read += slot.bytes().len() as u64;
                Ok(slot)
            }
            (Err(ReadFailure { error, slot }), Some(target)) => {
                self.staging.extend(slot);
                Err(ReadFailure { error, slot: Some(target) })
            }
            (Err(failure), None) => Err(failure),
        };
        if pins == 0 || finished.is_err() {
            self.policy.unpin(expert);
        }
        match finished {
            Ok(slot) => {
                self.slots[number as usize] = Content::Resident { expert, slot, pins, verdict };
                Ok(())
            }
            Err(ReadFailure { error, slot }) => {
                self.table[expert.index()] = ABSENT;
                self.policy.evict(expert);
                self.put_back(number, slot);
                Err((*error).into())
            }
        }
    }

    /// Decompresses an expert from its staging slot into its own.
    fn unpack(&mut self, expert: Key, check: Check, stored: Slot, mut target: Slot) -> Result<Slot, ReadFailure> {
        let location = self.directory.location(expert);
        let packed = location.packed.expect("only a compressed expert has a staging slot");
        let mut outcome = self.unpacker.unpack(stored.bytes(), &packed, &mut target);
        // An expert that was damaged once is verified before it is handed out, here as well.
        if outcome.is_ok() && check == Check::Again && self.io.verifies() && xxh3_64(target.bytes()) != packed.checksum
        {
            outcome = Err("what it becomes has another checksum".to_owned());
        }
        self.staging.push(stored);
        let Err(problem) = outcome else { return Ok(target) };
        let ExpertKey { layer, expert: id } = self.directory.key(expert);
        let error = ReadError::Code {
            extent: ExtentName::expert(layer, id),
            path: self.io.path(location.file).to_owned(),
            offset: location.offset,
            len: usize::try_from(location.len).unwrap_or(usize::MAX),
            problem,
        };
        Err(ReadFailure { error: Box::new(error), slot: Some(target) })
    }

    /// Ends the read into a slot whose expert is not needed, and discards the expert, since a compressed one would first have to
    /// be decompressed.
    fn forget_read(&mut self, number: u32) {
        let Content::Loading { expert, read, target, .. } = self.slots[number as usize].take() else {
            unreachable!("a slot that is read into is loading")
        };
        let slot = match read.finish() {
            Ok(slot) => Some(slot),
            Err(failure) => failure.slot,
        };
        self.table[expert.index()] = ABSENT;
        self.policy.unpin(expert);
        self.policy.evict(expert);
        self.put_back_read(number, slot, target);
    }

    /// The next thing to hand out in the pass, or `None` when all experts have been handed out. `parts` says whether that
    /// may be a part of an expert, and how many bytes it must have at first.
    fn next_event(&mut self, parts: Option<usize>) -> Result<Option<Event>, PoolError> {
        if self.pass.in_order {
            return Ok(self.next_in_order()?.map(Event::Whole));
        }
        if let Some(error) = self.pass.failed.take() {
            return Err(error);
        }
        if let Some(number) = self.pass.ready.pop_front() {
            return Ok(Some(Event::Whole(number)));
        }
        while self.pass.pending.is_empty() {
            // Nothing is handed out or pinned, and only prefetches are in flight, so there is a slot, unless all memory was
            // lost with the I/O thread.
            self.submit_missing();
            if let Some(error) = self.pass.failed.take() {
                return Err(error);
            }
            if !self.pass.pending.is_empty() {
                break;
            }
            if self.pass.todo.is_empty() {
                return Ok(None);
            }
            if !self.reclaim_for_pass() {
                return Err(PoolError::NoSlots);
            }
        }
        match self.wait_for_one(parts) {
            Progressed::Ended(at) => {
                let number = self.pass.pending.swap_remove(at).slot;
                self.finish_read(number, 1)?;
                self.submit_staged();
                Ok(Some(Event::Whole(number)))
            }
            Progressed::Part(at) => Ok(Some(Event::Part(at))),
        }
    }

    fn unpin(&mut self, number: u32) {
        if let Content::Resident { expert, pins, .. } = &mut self.slots[number as usize] {
            *pins -= 1;
            if *pins == 0 {
                self.policy.unpin(*expert);
            }
        }
    }

    /// Starts the reads of the layer that [`LayerPass::then_read`] has named, as far as possible.
    fn read_next(&mut self) {
        if let Some(layer) = self.pass.next.filter(|_| self.pass.todo.is_empty()) {
            self.read_ahead(layer);
        }
    }

    /// Whether a compressed expert is being read for this slot.
    fn is_packed(&self, number: u32) -> bool {
        matches!(&self.slots[number as usize], Content::Loading { target: Some(_), .. })
    }

    /// Ends the pass at any point. Reads that are no longer needed are cancelled, or awaited if it is too late for
    /// that. Afterwards no slot is pinned or in flight, except for prefetches.
    fn end_pass(&mut self) {
        self.pass.todo.clear();
        self.pass.next = None;
        self.pass.failed = None;
        while let Some(number) = self.pass.ready.pop_front() {
            self.unpin(number);
        }
        for pending in &self.pass.pending {
            if let Content::Loading { read, .. } = &self.slots[pending.slot as usize] {
                read.cancel();
            }
        }
        self.pass.damaged.clear();
        while let Some(Pending { slot: number, .. }) = self.pass.pending.pop() {
            if self.is_packed(number) {
                self.forget_read(number);
            } else {
                // No caller waits for this expert now; an error will be reported when one asks for it.
                let _ = self.finish_read(number, 0);
            }
        }
    }
}

/// The slots of an arena by size.
fn size_classes(slots: &[Slot]) -> Vec<Slots> {
    let mut first = 0;
    let classes = slots.chunk_by(|a, b| a.capacity() == b.capacity()).map(|slots| {
        let numbers = first..first + slots.len() as u32;
        first = numbers.end;
        Slots {
            bytes: slots[0].capacity(),
            free: numbers.clone().rev().collect(),
            away: Vec::with_capacity(slots.len()),
            numbers,
        }
    });
    let classes: Vec<Slots> = classes.collect();
    assert!(classes.is_sorted_by(|a, b| a.bytes < b.bytes), "the sizes of slots have to ascend");
    assert!(classes.len() <= usize::from(u8::MAX), "too many sizes of slots");
    classes
}

/// One pass over one layer. Dropping it ends the pass; what was read stays in the pool.
pub struct LayerPass<'p> {
    pool: &'p mut Pool,
}

impl LayerPass<'_> {
    /// The next expert that is ready, verified: resident ones first, then in the order of arrival.
    /// Blocks only while none is ready. Every expert of the pass is yielded once, then `None`.
    ///
    /// # Errors
    /// [`PoolError::Read`] names the expert that cannot be read. This ends the pass: the remaining reads are
    /// cancelled, and `next` yields nothing more.
    #[expect(clippy::should_implement_trait, reason = "a guard borrows the pass: no iterator can")]
    pub fn next(&mut self) -> Result<Option<Expert<'_>>, PoolError> {
        loop {
            let number = match self.event(None)? {
                Some(Event::Whole(number)) => number,
                Some(Event::Part(_)) => unreachable!("parts were not asked for"),
                None => return Ok(None),
            };
            if self.pool.verify(number) {
                return Ok(Some(settle::settled(self.pool, number)));
            }
        }
    }

    fn event(&mut self, parts: Option<usize>) -> Result<Option<Event>, PoolError> {
        self.pool.next_event(parts).inspect_err(|_| self.pool.end_pass())
    }

    /// Starts reading experts that a later layer is likely to need, most likely first, into slots that this pass does not
    /// need. The drive serves them only while there are no demand reads.
    pub fn prefetch(&mut self, layer: u32, experts: &[u32]) {
        self.pool.prefetch(layer, experts);
    }

    /// Says that the tokens of the pass will need nearly all experts of a later layer, as those of a long prompt do. Once all reads of this
    /// pass have begun, and as experts leave slots, those of that layer are read while the drive would otherwise idle; unless this layer,
    /// of which nothing has been yielded yet, shows that the prompt uses few.
    pub fn then_read(&mut self, layer: u32) {
        self.pool.judge_prompt(self.remaining());
        self.pool.pass.next = Some(layer);
        self.pool.read_next();
    }

    /// The experts that are in memory, verified, and have not been handed out: their numbers and bytes, in the order in which they
    /// will be. So a caller can compute with several of them at once, and take each when its turn comes. While experts wait for
    /// a slot there are none, because each that is handed out leaves one.
    pub fn in_memory(&self) -> impl Iterator<Item = (u32, &[u8])> + Clone {
        let PassState { ready, todo, .. } = &self.pool.pass;
        ready.iter().filter(|_| todo.is_empty()).filter_map(|&number| match &self.pool.slots[number as usize] {
            Content::Resident { expert, slot, verdict, .. } if verdict.is_settled() => {
                Some((self.pool.directory.key(*expert).expert, slot.bytes()))
            }
            _ => None,
        })
    }

    /// As [`Pool::has`].
    #[must_use]
    pub fn has(&self, layer: u32, expert: u32) -> bool {
        self.pool.has(layer, expert)
    }

    /// Experts of the pass that have not been yielded.
    #[must_use]
    pub fn remaining(&self) -> usize {
        let PassState { ready, pending, todo, .. } = &self.pool.pass;
        ready.len() + pending.len() + todo.len()
    }
}

impl Drop for LayerPass<'_> {
    fn drop(&mut self) {
        self.pool.end_pass();
    }
}

#[cfg(test)]
mod tests;
