//! What is measured of a model while it is converted.
//!
//! The inputs of a matrix say how its weights are best rounded, and to know the inputs, the model has to compute. So a text runs
//! through the model layer by layer: as soon as the weights of a layer can be read, a model file of this one layer is written
//! (`layer_file`), in types that hold them as they are; somebody who can execute it takes the states of the
//! text through, and says what met its matrices; then the layer is converted. So one pass over the checkpoint does both, and what
//! is kept is the states and the measurements of one layer.

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
}

/// What met the matrices of one layer.
pub trait Inputs: Send + Sync {
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
