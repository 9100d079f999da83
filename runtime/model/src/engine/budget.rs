//! The budget of an opened model: it can shrink and grow between steps, and a model at rest can give its memory back.
//!
//! None of this changes a bit of any result: an expert that is not in memory is read again.

use std::time::{Duration, Instant};

use sluice_storage::io::trim_heap;
use sluice_storage::pool::{LEAST_SLOTS, SlotPlan};

use super::{Engine, RuntimeError};
use crate::memory::{Bytes, MIN_SLOTS, MemoryPlan, Wish, available_memory};

/// How often at most it is looked how much memory slots can still take: each look reads a few files of the kernel.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// After a pause of this length, what was known of the system's memory is out of date.
const PAUSE: Duration = Duration::from_secs(1);

/// A look at the system's memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    at: Instant,
    /// Slots that had taken memory by then.
    taken: u64,
}

/// An opened model cannot shrink to this budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the budget cannot become {} while the model is open: dense parts, keys and values and scratch take {}, and {MIN_SLOTS} experts \
     of each size must fit, so the least is {}. Open the model with less context to need less",
    Bytes(*.asked), Bytes(*.fixed), Bytes::at_least(*.least)
)]
pub struct ShrinkError {
    /// The budget that was asked for, in bytes.
    pub asked: u64,
    /// The part of the least budget that is not used for expert slots.
    pub fixed: u64,
    /// The least budget of this model as it was opened.
    pub least: u64,
}

impl MemoryPlan {
    /// Bytes that stay allocated while the model is open, whatever the budget.
    fn fixed(&self) -> u64 {
        self.dense + self.dense_ring + self.kv_cache + self.scratch + self.staging
    }

    /// Expert slots that a budget of `bytes` holds; `None` if it is below the least.
    fn slots_of(&self, bytes: u64) -> Option<SlotPlan> {
        self.most_slots.within(bytes.checked_sub(self.fixed())?, LEAST_SLOTS)
    }

    /// Changes the slots, as far as the plan says what there is.
    fn set_slots(&mut self, slots: SlotPlan) {
        self.slots = slots.slots();
        self.slot_bytes = slots.bytes();
        self.slot_plan = slots;
        self.effective = self.used();
    }

    /// The least budget that the plan can shrink to: dense parts, keys and values, scratch, and two experts of each size of slots.
    pub fn least(&self) -> u64 {
        self.fixed() + self.most_slots.least_bytes()
    }

    /// The largest budget to which it can grow: the one with which it was opened.
    pub fn most(&self) -> u64 {
        self.fixed() + self.most_slots.bytes()
    }
}

impl Engine {
    /// Changes the budget, between steps: expert slots are given back to the system, or may take memory again, so that everything
    /// large takes at most `bytes`. The experts that leave are those that the policy would evict first. A budget above the one that
    /// the model was opened with counts as that one. [`Engine::memory`] shows the result.
    ///
    /// # Errors
    /// [`RuntimeError::Shrink`] for less than [`MemoryPlan::least`]; nothing has changed then.
    pub fn set_budget(&mut self, bytes: u64) -> Result<(), RuntimeError> {
        let plan = &self.memory;
        let refused = ShrinkError { asked: bytes, fixed: plan.fixed(), least: plan.least() };
        let slots = plan.slots_of(bytes).ok_or(refused)?;
        if self.is_at_rest() {
            // Nothing is held now; the next step has as many slots as the plan then has.
            self.memory.set_slots(slots.clone());
        } else {
            self.resize(&slots);
        }
        self.allowed_slots = slots;
        Ok(())
    }

    pub(super) fn resize(&mut self, slots: &SlotPlan) {
        self.storage.pool.resize(&slots.counts());
        let slots = slots.with_counts(self.storage.pool.slot_counts());
        self.memory.set_slots(slots);
    }

    /// Gives the memory of a model at rest back to the system: expert slots, dense parts, scratch, and pages that no sequence has.
    /// What remains is the program, the tables of the file, and what sequences remember. The next step begins to read the dense parts
    /// again, as after [`Engine::open`].
    pub fn release_idle(&mut self) {
        self.storage.dense.give_back();
        self.storage.tables.give_back();
        self.storage.pool.resize(&[]);
        self.model.give_back(&self.compute);
        self.pages.give_back();
        self.prediction_pages.iter().for_each(|pages| pages.give_back());
        trim_heap();
    }

    /// Whether no step has been taken since [`Engine::release_idle`].
    pub fn is_at_rest(&self) -> bool {
        self.storage.dense.is_away()
    }

    /// Ends the rest, if there is one.
    pub(super) fn wake_up(&mut self) -> Result<(), RuntimeError> {
        if self.is_at_rest() {
            self.storage.dense.take_again()?;
            self.storage.tables.take_again();
            let slots = self.memory.slot_plan.clone();
            self.resize(&slots);
        }
        Ok(())
    }

    /// Looks how much memory the system has for slots without any, and lets no more of them take some. The plan was made for what was
    /// available when the model was opened, but slots take their memory when they are first filled, and other programs may have taken
    /// it by then. While no slot takes memory, and steps follow each other, it does not look.
    pub(super) fn limit_new_memory(&mut self) {
        let (now, taken) = (Instant::now(), self.storage.pool.stats().new_slots);
        let paused = self.stepped.is_none_or(|stepped| now.duration_since(stepped) > PAUSE);
        let is_known = |look: &Look| (look.taken == taken && !paused) || now.duration_since(look.at) < LOOK_EVERY;
        if self.looked.as_ref().is_some_and(is_known) || self.memory.slot_len == 0 {
            return;
        }
        self.looked = Some(Look { at: now, taken });
        if self.storage.pool.unfilled() > 0 {
            let others = self.storage.dense.missing_bytes() + self.memory.left_alone();
            self.storage.pool.limit_new_memory(available_memory().saturating_sub(others));
        }
    }

    /// Reads experts while there is nothing else to do: those that the policy expects soonest by what it has learned in this run and
    /// before ([`Engine::save_counts`]). They go into empty slots, or replace experts that the policy expects later. Does not block:
    /// each call takes in what has arrived, and starts a few more reads. The next step ends them, and waits for a chunk or two at
    /// most. What is in memory changes no result.
    ///
    /// Call it again after a few milliseconds while it returns true; false means that there is nothing worth reading, or that the
    /// model is at rest, or was opened with [`no_warm`](super::EngineOptions::no_warm).
    pub fn warm(&mut self) -> bool {
        if !self.warms || self.is_at_rest() {
            return false;
        }
        self.limit_new_memory();
        self.storage.pool.warm()
    }

    /// Looks, at most four times a second, whether the system is short of memory. While it is, the budget shrinks step by step, an
    /// eighth of the expert slots at a time; once it has not been for a while, the budget grows back. Does nothing unless the model was
    /// opened to do so ([`EngineOptions::yields`](super::EngineOptions)). The scheduler calls this before every turn. True if the
    /// budget has changed.
    pub fn heed_pressure(&mut self) -> bool {
        let Some(watch) = &mut self.pressure else { return false };
        let wish = watch.look(Instant::now(), self.memory.slot_bytes < self.allowed_slots.bytes());
        self.follow(wish)
    }

    /// Changes the bytes of expert slots by an eighth of what the model was opened with or [`Engine::set_budget`] has allowed: down to
    /// the least, or up to that. True if they have changed.
    pub fn follow(&mut self, wish: Wish) -> bool {
        let (before, most) = (self.memory.slot_bytes, self.allowed_slots.bytes());
        // Whole slots, and at least one: small models have few.
        let len = self.memory.slot_len.max(1);
        let step = (most / 8 / len).max(1) * len;
        let bytes = match wish {
            Wish::Keep => return false,
            Wish::Less => before.saturating_sub(step).max(self.allowed_slots.least_bytes()),
            Wish::More => before + step,
        };
        let slots = self.allowed_slots.within(bytes, LEAST_SLOTS).filter(|slots| *slots != self.memory.slot_plan);
        if let Some(slots) = slots.filter(|_| !self.is_at_rest()) {
            self.resize(&slots);
        }
        self.memory.slot_bytes != before
    }
}
