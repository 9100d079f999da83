//! The context of an opened model: it can be decided once the drive reads already.
//!
//! How many tokens a sequence will have may only be known when the tokenizer has read the prompt, and a large tokenizer takes as long to
//! build as the drive takes to read a gigabyte. So a program can open a model for the shortest prompt and let it read meanwhile.

use super::demand::plan_memory;
use super::{Engine, EngineOptions};
use crate::memory::{BudgetError, MemoryPlan};
use sluice_storage::pool::SlotClass;

impl Engine {
    /// Plans the memory for sequences of `context` tokens, as it would have been planned if the model had been opened with that context.
    /// Sequences that were made before belong to this engine no more. What has been read, and what is being read, stays.
    ///
    /// False if that plan keeps other dense parts in memory, or needs more expert slots than there are addresses for, as a shorter context
    /// may: then nothing has changed, and the model has to be opened again ([`Engine::into_file`]).
    ///
    /// # Errors
    /// If the budget does not suffice; nothing has changed then.
    pub fn set_context(&mut self, context: usize) -> Result<bool, BudgetError> {
        let options = EngineOptions { context: Some(context), ..self.options.clone() };
        // What the dense parts have taken by now was available when the model was opened.
        let available = self.memory.available;
        let plan = plan_memory(&self.file, &options, options.demand(&self.file), available)?;
        if !self.memory.holds(&plan) {
            return Ok(false);
        }
        self.storage.pool.resize(&plan.slot_plan.counts());
        self.model.keep_at_most(plan.kept_outputs);
        self.pages = plan.page_pool(self.model.spec());
        self.prediction_pages = plan.prediction_pool(self.model.spec());
        self.allowed_slots = plan.slot_plan.clone();
        self.memory = plan;
        self.options = options;
        Ok(true)
    }
}

impl MemoryPlan {
    /// Whether a model that was opened with this plan can go on with `other`: memory for dense parts is divided when they begin to be read,
    /// and slots of each size have addresses for as many as there were then.
    fn holds(&self, other: &MemoryPlan) -> bool {
        let (most, wanted) = (self.most_slots.classes(), other.slot_plan.classes());
        let has = |(most, wanted): (&SlotClass, &SlotClass)| most.len == wanted.len && most.slots >= wanted.slots;
        (&self.pinned, self.staging_slots) == (&other.pinned, other.staging_slots)
            && most.len() == wanted.len()
            && most.iter().zip(wanted).all(has)
    }
}
