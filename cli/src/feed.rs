//! Runs tokens whose logits are all wanted through a model.

use sluice_model::{Control, Engine, RuntimeError, Sequence, Span};

/// Appends tokens to a sequence; calls `sink` with the index and the logits `[vocab]` of each. They are read as a prompt, all at
/// once; but if experts in memory are preferred, one by one as in generation, because prompts are read without that preference.
pub(crate) fn feed(
    engine: &mut Engine,
    sequence: &mut Sequence,
    tokens: &[u32],
    sink: &mut dyn FnMut(usize, &[f32]),
) -> Result<(), RuntimeError> {
    if engine.thrift().preference.is_none() {
        return engine.forward_all(sequence, tokens, sink);
    }
    tokens.iter().enumerate().try_for_each(|(index, token)| {
        let mut sink = |_: usize, _: usize, row: &[f32]| sink(index, row);
        engine.step(&mut [Span::decode(sequence, token)], &mut Control::default(), &mut sink)
    })
}
