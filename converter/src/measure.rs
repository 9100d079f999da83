//! What is measured of a model while it is converted.
//!
//! The inputs of a matrix say how its weights are best rounded, and to know the inputs, the model has to compute. So a text runs
//! through the model layer by layer: as soon as the weights of a layer can be read, a model file of this one layer is written
//! (`layer_file`), in types that hold them as they are; somebody who can execute it takes the states of the
//! text through, and says what met its matrices; then the layer is converted. So one pass over the checkpoint does both, and what
//! is kept is the states and the measurements of one layer. The states before a layer also lie beside the journal (`states`), so that an
//! interrupted conversion goes on in the layer where it was.

use std::error::Error;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use sluice_format::MatrixKey;
use sluice_kernels::Feedback;

/// Executes layers and measures what meets their matrices. Its results must not depend on time, threads or earlier runs.
pub trait Measure {
    /// The text.
    fn tokens(&self) -> &[u32];

    /// Takes the embeddings of the text, `[tokens, hidden]`.
    fn begin(&mut self, states: Vec<f32>);

    /// Takes the states through a layer; layers come in ascending order, each once. `file` is a model file of this layer alone, called
    /// layer 0 there, with an embedding and a head of one row. The last layer's inputs hold those of the head too.
    ///
    /// # Errors
    /// What keeps the layer from being executed.
    fn layer(&mut self, layer: usize, file: &Path) -> Result<Arc<dyn Inputs>, Box<dyn Error + Send + Sync>>;

    /// Most bytes that [`Measure::keep`] gives.
    fn kept_bytes(&self) -> u64;

    /// All that is needed to go on before the next layer.
    ///
    /// # Errors
    /// What keeps it from being kept.
    fn keep(&self) -> Result<Vec<u8>, Box<dyn Error + Send + Sync>>;

    /// Goes on where a measurement on the same text, of the same weights, gave `kept` away. `false`, and nothing has changed, if these are
    /// no such bytes.
    fn go_on(&mut self, kept: &[u8]) -> bool;
}

/// What met the matrices of one layer.
pub trait Inputs: Send + Sync {
    /// Does what [`Inputs::guide`] will need for these matrices, on all threads.
    fn prepare(&self, keys: &[MatrixKey]);

    /// How a matrix is to be rounded.
    fn guide(&self, key: &MatrixKey) -> Guide;
}

/// How a matrix is to be rounded.
#[derive(Clone, Default)]
pub enum Guide {
    /// All columns count alike.
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
