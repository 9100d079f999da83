//! What an engine is to hold in memory.

#[cfg(feature = "sim")]
use sluice_format::{Codec, ExtentKind};
use sluice_format::{ModelFile, ModelSpec};

use super::{EngineOptions, thread_count};
use crate::PromptAttention;
use crate::memory::{BudgetError, Demand, MemoryPlan, available_memory};

impl EngineOptions {
    /// Tokens that a sequence of this model can have.
    pub fn context_in(&self, spec: &ModelSpec) -> usize {
        self.context.unwrap_or(4096).clamp(1, spec.max_positions.max(1))
    }

    /// Plans the memory as it is planned when the model is opened, and opens nothing: to refuse early what would be refused then.
    ///
    /// # Errors
    /// If the budget, or the memory that is available now, does not suffice.
    pub fn check_memory(&self, file: &ModelFile) -> Result<MemoryPlan, BudgetError> {
        plan_memory(file, self, self.demand(file), available_memory())
    }

    /// What the memory has to hold of sequences of a model.
    pub(super) fn demand(&self, file: &ModelFile) -> Demand {
        let context = self.context_in(file.spec());
        let EngineOptions { kv_type, marks, prediction, .. } = *self;
        let prompt_attention = self.prompt_attention.in_model(file.spec());
        let expanding = if prompt_attention == PromptAttention::Expanded { thread_count(self.threads) } else { 0 };
        Demand { sequences: self.sequences.unwrap_or(1).max(1), context, kv_type, marks, prediction, expanding }
    }

    /// Whether the prediction layer of a model would cost nothing while it is not used: there is one, and with it all dense parts and all
    /// experts stay in memory. Otherwise experts would make room for it, and be read for every token instead.
    pub fn holds_prediction(&self, file: &ModelFile) -> bool {
        let demand = Demand { prediction: true, ..self.demand(file) };
        let plan = || plan_memory(file, self, demand, available_memory());
        file.spec().prediction.is_some() && plan().is_ok_and(|memory| memory.holds_all())
    }
}

/// Plans the memory of a model where `available` bytes are. On a simulated drive with compressed contents, experts are compressed, whatever
/// the file says.
pub(super) fn plan_memory(
    file: &ModelFile,
    options: &EngineOptions,
    demand: Demand,
    available: u64,
) -> Result<MemoryPlan, BudgetError> {
    #[cfg(feature = "sim")]
    if let Some(drive) = &options.simulated {
        let mut extents = file.extents().to_vec();
        for e in extents.iter_mut().filter(|e| e.kind == ExtentKind::Expert) {
            e.codec = if options.simulated_packed.is_some() { Codec::Planes } else { Codec::Raw };
            e.stored_len = drive.contents().len() as u64;
        }
        return MemoryPlan::of_extents(file.spec(), &extents, options.budget, demand, available);
    }
    MemoryPlan::of_extents(file.spec(), file.extents(), options.budget, demand, available)
}
