//! Passes that are longer than planned: while a long prompt is read, slots make room for their scratch.
//!
//! None of this changes a bit of any result: a prompt gives the same numbers in passes of any length.

use sluice_storage::io::trim_heap;
use sluice_storage::pool::SlotPlan;

use super::Engine;
use crate::control::Control;
use crate::memory::{LongPass, Reading, available_memory};
use crate::rows::Span;

/// What a step and those after it read of prompts.
pub(super) fn reading(spans: &[Span<'_>], control: &Control<'_>) -> Reading {
    let reads = spans.iter().filter(|span| span.phase.reads());
    let before = reads.clone().map(|span| span.sequence.position()).sum();
    match reads.count() {
        0 => Reading::default(),
        _ => Reading { rows: spans.iter().map(|span| span.tokens.len()).sum(), later: control.left_to_read, before },
    }
}

impl Engine {
    /// How many rows would go through a layer together if a step read so many tokens of prompts, with so many tokens before them in
    /// their sequences. A caller that divides prompts among steps gives each step as many, and says what is left for later ones
    /// ([`Control::left_to_read`]).
    pub fn rows_together(&self, tokens: usize, before: usize) -> usize {
        self.memory.rows_together(tokens, before)
    }

    /// Calls `f` with the number of rows that go through a layer together in a step that reads this much, and with room for them: slots
    /// give it, and have it again afterwards. In a step of the prediction layer, for which `reading` is `None`, passes are as planned.
    pub(super) fn with_rows_for<R>(&mut self, reading: Option<Reading>, f: impl FnOnce(&mut Engine, usize) -> R) -> R {
        match self.memory.passes(reading.unwrap_or_default()) {
            (_, Some(pass)) if self.has_memory_for(&pass) => {
                let long = Lengthened::new(self, &pass);
                f(&mut *long.engine, pass.rows)
            }
            (rows, _) => f(self, rows),
        }
    }

    /// Whether the memory of slots that go, and what the system has, suffice for the scratch of a longer pass: slots that were never filled
    /// have no memory, and other programs may have taken it since the plan was made. If they suffice, other slots take no more than what
    /// the scratch leaves.
    fn has_memory_for(&mut self, pass: &LongPass) -> bool {
        let pool = &mut self.storage.pool;
        let unfilled = pool.unfilled_bytes();
        if unfilled == 0 {
            return true;
        }
        let given = (self.memory.slot_bytes - pass.slots.bytes()).saturating_sub(unfilled);
        let others = self.storage.dense.missing_bytes() + self.memory.left_alone();
        let left = (available_memory() + given).saturating_sub(others).checked_sub(pass.scratch);
        left.into_iter().for_each(|left| pool.limit_new_memory(left));
        self.looked = None;
        left.is_some()
    }
}

/// An engine whose slots have made room for longer passes. When this is dropped, also by a panic of an observer, the scratch is freed
/// and the slots may take memory again.
struct Lengthened<'e> {
    engine: &'e mut Engine,
    /// The slots and the budget that there were.
    slots: SlotPlan,
    effective: u64,
}

impl<'e> Lengthened<'e> {
    fn new(engine: &'e mut Engine, pass: &LongPass) -> Self {
        let (before, effective) = (engine.memory.slot_plan.clone(), engine.memory.effective);
        engine.resize(&pass.slots);
        Lengthened { engine, slots: before, effective }
    }
}

impl Drop for Lengthened<'_> {
    fn drop(&mut self) {
        let Engine { model, compute, .. } = &mut *self.engine;
        model.give_back(compute);
        trim_heap();
        self.engine.resize(&self.slots);
        self.engine.memory.effective = self.effective;
        // There is more memory again than was last seen.
        self.engine.looked = None;
    }
}
