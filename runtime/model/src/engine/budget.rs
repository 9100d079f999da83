//! The budget of an opened model: it can shrink and grow between steps, and a model at rest can give its memory back.
//!
//! None of this changes a bit of any result: an expert that is not in memory is read again.

use std::time::Instant;

use sluice_storage::io::trim_heap;

use super::{Engine, RuntimeError};
use crate::memory::{Bytes, MIN_SLOTS, MemoryPlan, Wish};

/// An opened model cannot shrink to this budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the budget cannot become {} while the model is open: dense parts, keys and values and scratch take {}, and {MIN_SLOTS} experts \
     must fit, so the least is {}. Open the model with less context to need less",
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

    /// Expert slots that fit in a budget of `bytes`; `None` if it is below the least.
    fn slots_of(&self, bytes: u64) -> Option<usize> {
        if bytes < self.least() {
            return None;
        }
        let slots = (bytes - self.fixed()).checked_div(self.slot_len).unwrap_or(0);
        Some(usize::try_from(slots).unwrap_or(usize::MAX).min(self.most_slots))
    }

    /// The least budget that the plan can shrink to: dense parts, keys and values, scratch, and two experts.
    pub fn least(&self) -> u64 {
        self.fixed() + MIN_SLOTS.min(self.most_slots) as u64 * self.slot_len
    }

    /// The largest budget to which it can grow: the one with which it was opened.
    pub fn most(&self) -> u64 {
        self.fixed() + self.most_slots as u64 * self.slot_len
    }
}

impl Engine {
    /// Changes the budget, between steps: expert slots are given back to the system, or taken from it again, so that everything
    /// large takes at most `bytes`. The experts that leave are those that the policy would evict first. A budget above the one that
    /// the model was opened with counts as that one. [`Engine::memory`] shows the result, which has fewer slots than asked for if the
    /// system did not give more memory.
    ///
    /// # Errors
    /// [`RuntimeError::Shrink`] for less than [`MemoryPlan::least`]; nothing has changed then. [`RuntimeError::Pool`] if the system
    /// does not give memory for two experts.
    pub fn set_budget(&mut self, bytes: u64) -> Result<(), RuntimeError> {
        let plan = &self.memory;
        let refused = ShrinkError { asked: bytes, fixed: plan.fixed(), least: plan.least() };
        let slots = plan.slots_of(bytes).ok_or(refused)?;
        self.allowed_slots = slots;
        if self.is_at_rest() {
            // Nothing is held now; the next step takes as many slots as the plan then has.
            self.count_slots(slots);
            return Ok(());
        }
        self.resize(slots)
    }

    fn resize(&mut self, slots: usize) -> Result<(), RuntimeError> {
        let outcome = self.storage.pool.resize(slots);
        let reached = self.storage.pool.slot_count();
        self.count_slots(reached);
        match outcome {
            Err(error) if reached < MIN_SLOTS.min(self.memory.most_slots) => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn count_slots(&mut self, slots: usize) {
        self.memory.slots = slots;
        self.memory.effective = self.memory.used();
    }

    /// Gives the memory of a model at rest back to the system: expert slots, dense parts, scratch, and pages that no sequence has.
    /// What remains is the program, the tables of the file, and what sequences remember. The next step takes the memory again and
    /// reads what was in it, which takes seconds for a large model.
    pub fn release_idle(&mut self) {
        self.storage.dense.give_back();
        self.storage.tables.give_back();
        // Giving memory back cannot fail: it needs none from the system.
        let _ = self.storage.pool.resize(0);
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
            let slots = self.memory.slots;
            self.resize(slots)?;
            self.storage.tables.take_again()?;
            self.storage.dense.take_again()?;
        }
        Ok(())
    }

    /// Looks, at most four times a second, whether the system is short of memory. While it is, the budget shrinks step by step, an
    /// eighth of the expert slots at a time; once it has not been for a while, the budget grows back. Does nothing unless the model was
    /// opened to do so ([`EngineOptions::yields`](super::EngineOptions)). The scheduler calls this before every turn. True if the
    /// budget has changed.
    pub fn heed_pressure(&mut self) -> bool {
        let Some(watch) = &mut self.pressure else { return false };
        let wish = watch.look(Instant::now(), self.memory.slots < self.allowed_slots);
        self.follow(wish)
    }

    /// Changes the number of expert slots by an eighth of the number that the model was opened with or [`Engine::set_budget`] has
    /// allowed: down to the least, or up to that number. True if it has changed.
    pub fn follow(&mut self, wish: Wish) -> bool {
        let (before, most) = (self.memory.slots, self.allowed_slots);
        // At least one slot, because small models have few.
        let step = (most / 8).max(1);
        let slots = match wish {
            Wish::Keep => return false,
            Wish::Less => before.saturating_sub(step).max(MIN_SLOTS.min(most)),
            Wish::More => (before + step).min(most),
        };
        let resized = slots != before && !self.is_at_rest() && self.resize(slots).is_ok();
        resized && self.memory.slots != before
    }
}
