//! What is measured in a model during its conversion.
//!
//! The inputs of a matrix determine how its weights are best rounded, and to know the inputs, the model has to compute. So a text
//! runs through the model layer by layer. As soon as the weights of a layer can be read, a model file with only this layer is
//! written (`layer_file`), in types that hold the weights unchanged. An object that can execute the layer takes the states of the
//! text through it, and returns statistics of the inputs of its matrices. Then the layer is converted. So one pass over the
//! checkpoint does both, and only the states and the measurements of one layer are kept. The states before a layer are also stored
//! beside the journal (`states`), so that an interrupted conversion continues in the layer where it stopped.

use std::error::Error;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use sluice_format::MatrixKey;
use sluice_kernels::Feedback;

/// Executes layers and measures the inputs of their matrices. Its results must not depend on time, threads or earlier runs.
pub trait Measure {
    /// The text.
    fn tokens(&self) -> &[u32];

    /// Takes the embeddings of the text, `[tokens, hidden]`.
    fn begin(&mut self, states: Vec<f32>);

    /// Takes the states through a layer; each layer comes once, in ascending order. `file` is a model file with only this layer, as
    /// layer 0, with an embedding and a head of one row. The last layer's inputs include those of the head.
    ///
    /// # Errors
    /// If the layer cannot be executed.
    fn layer(&mut self, layer: usize, file: &Path) -> Result<Arc<dyn Inputs>, Box<dyn Error + Send + Sync>>;

    /// Most bytes that [`Measure::keep`] returns.
    fn kept_bytes(&self) -> u64;

    /// Everything that is needed to continue before the next layer.
    ///
    /// # Errors
    /// If it cannot be kept.
    fn keep(&self) -> Result<Vec<u8>, Box<dyn Error + Send + Sync>>;

    /// Continues where a measurement on the same text and weights returned `kept`. If these are not such bytes, returns `false` and
    /// changes nothing.
    fn go_on(&mut self, kept: &[u8]) -> bool;
}

/// Statistics of the inputs of one layer's matrices.
pub trait Inputs: Send + Sync {
    /// Prepares what [`Inputs::guide`] needs for these matrices, on all threads.
    fn prepare(&self, keys: &[MatrixKey]);

    /// How a matrix should be rounded.
    fn guide(&self, key: &MatrixKey) -> Guide;
}

/// How a matrix should be rounded.
#[derive(Clone, Default)]
pub enum Guide {
    /// All columns are equally important.
    #[default]
    Nothing,
    /// The importance of each column.
    Columns(Vec<f32>),
    /// With error feedback.
    Feedback(Arc<Feedback>),
}

impl fmt::Debug for Guide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Guide::Nothing => "Nothing",
            Guide::Columns(_) => "Columns",
            Guide::Feedback(_) => "Feedback",
        })
    }
}
