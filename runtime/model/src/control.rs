//! What a caller of a step can do besides taking its logits: watch the step, and end it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::ModelError;
use super::compute::InputObserver;
use super::router::Choice;

/// A switch that ends a step, from any thread. Clones are the same switch, and it stays set.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// A switch that is not set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the step that has this switch, and every later one that has it. The results of the running pass are discarded.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it is set.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.0)
    }
}

/// Sees the routing of every layer, span by span: layer, position of the span's first row, top-k, choices `[rows, top_k]`.
pub type RoutingObserver<'a> = dyn FnMut(usize, usize, usize, &[Choice]) + 'a;

/// Sees the residual stream `[rows, hidden]` before layer 0, and then after every layer. Gets the number of layers that have run,
/// and the stream.
pub type HiddenObserver<'a> = dyn FnMut(usize, &[f32]) + 'a;

/// Sees the inputs of the output head, `[rows, hidden]`: the residual after the last layer and after the norm before the head. It
/// is called several times in a pass, until it has seen all rows of the step, span by span.
pub type HeadInputObserver<'a> = dyn FnMut(&[f32]) + 'a;

/// The progress of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Layers that the current pass has completed.
    pub layers: usize,
    /// Rows of the current pass.
    pub rows: usize,
    /// Rows of the step that earlier passes have taken through all layers.
    pub rows_before: usize,
    /// Rows of the whole step.
    pub rows_total: usize,
}

/// Is told the progress of a step after every layer.
pub type ProgressObserver<'a> = dyn FnMut(Progress) + 'a;

/// Observers of a step, and the switch that ends it. The default has none.
#[derive(Default)]
pub struct Control<'a> {
    /// Ends the step when it is set.
    pub cancel: Option<&'a Cancel>,
    /// Is told of every layer.
    pub progress: Option<&'a mut ProgressObserver<'a>>,
    /// Sees the routing.
    pub routing: Option<&'a mut RoutingObserver<'a>>,
    /// Sees the residual stream.
    pub hidden: Option<&'a mut HiddenObserver<'a>>,
    /// Sees the inputs of the head for all rows, whether their logits are wanted or not: the prediction layer begins with them
    /// (`Engine::predict`).
    pub head_inputs: Option<&'a mut HeadInputObserver<'a>>,
    /// The residual stream of the step's rows, `[rows, hidden]`, with which the step begins instead of their tokens' embeddings.
    pub states: Option<&'a [f32]>,
    /// Tokens of the step's prompts that later steps will read. How many rows go through a layer together is chosen for all of them.
    pub left_to_read: usize,
    /// Sees the inputs of every quantisable matrix.
    pub inputs: Option<Arc<dyn InputObserver>>,
}

impl fmt::Debug for Control<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").field("cancel", &self.cancel).finish_non_exhaustive()
    }
}

impl Control<'_> {
    /// An error if the step was cancelled.
    pub(crate) fn check(&self) -> Result<(), ModelError> {
        match self.cancel {
            Some(cancel) if cancel.is_cancelled() => Err(ModelError::Cancelled),
            _ => Ok(()),
        }
    }
}
