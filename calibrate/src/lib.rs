//! Measures the inputs of a model's matrices while it is converted, so that `q4`, `q3` and `q2` can be rounded where it costs
//! least.
//!
//! A text, [`TEXT`] by default, runs through the model layer by layer ([`sluice_converter::measure`]). For each matrix, the
//! products of its inputs are summed ([`Moments`](sluice_kernels::Moments)), and error feedback is computed from the sums. Experts
//! see few of the tokens, so their inputs themselves are kept until the layer is converted.

mod effort;
mod inputs;
mod kept;
mod observer;

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use sluice_checksum::Xxh3;
use sluice_converter::Plan;
use sluice_converter::measure::{Inputs, Measure};
use sluice_format::{ColumnMeans, Importance, MatrixKey, Metadata, ModelSpec, TEXT_FILES};
use sluice_kernels::{IsaError, Kernels};
use sluice_model::{Control, Engine, EngineOptions, RuntimeError, Span, Want};
use sluice_text::{TextError, Tokenizer};

pub use effort::Effort;

use inputs::LayerInputs;
use observer::Observer;

/// The text on which models are measured by default: prose, speech, many languages, code, mathematics, tables. It was written for
/// this purpose, and belongs to this project.
pub const TEXT: &str = include_str!("text.txt");

/// Tokens that go through a layer together.
const TOGETHER: usize = 4096;

/// Raised whenever the same text could give a different measurement.
const VERSION: u32 = 2;

/// Why a model cannot be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CalibrateError {
    /// The tokenizer is not understood.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A layer cannot be executed.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The requested instruction set is not available.
    #[error(transparent)]
    Isa(#[from] IsaError),
    /// The text has no tokens.
    #[error("the text that the model is to be measured on has no tokens: give a longer one")]
    NoTokens,
    /// Some activations are not numbers.
    #[error("the model computes what is not a number on the text ({0}): its weights may be damaged")]
    NotANumber(String),
}

/// What identifies a measurement on a text, for [`sluice_converter::Options::measured`].
pub fn digest(text: &str, effort: Effort) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&VERSION.to_le_bytes());
    hash.update(effort.name().as_bytes());
    hash.update(text.as_bytes());
    hash.digest()
}

/// A text on its way through a model.
pub struct Measurement {
    tokens: Vec<u32>,
    window: usize,
    panel: usize,
    /// Residual streams.
    streams: usize,
    spec: ModelSpec,
    /// The residual, `[tokens, width]`, before the next layer.
    states: Vec<f32>,
    kernels: Kernels,
    /// The means of all layers so far, if requested.
    means: Option<BTreeMap<MatrixKey, ColumnMeans>>,
}

impl Measurement {
    /// Starts a measurement of the model that a plan describes; `None` if the model has no tokenizer.
    ///
    /// # Errors
    /// [`CalibrateError::Text`], [`CalibrateError::NoTokens`] and [`CalibrateError::Isa`].
    pub fn new(plan: &Plan, text: &str, effort: Effort) -> Result<Option<Measurement>, CalibrateError> {
        let mut metadata = Metadata::default();
        for name in TEXT_FILES {
            if let Some(bytes) = plan.side_file(name) {
                metadata.insert(name, bytes.to_vec());
            }
        }
        let Some(tokenizer) = Tokenizer::of(&metadata)? else { return Ok(None) };
        let spec = plan.spec();
        let window = effort.window().min(spec.max_positions.max(1));
        let tokens = effort::spread(&tokenizer.encode(text, true)?, window, effort.tokens(spec));
        if tokens.is_empty() {
            return Err(CalibrateError::NoTokens);
        }
        Ok(Some(Measurement {
            tokens,
            window,
            panel: effort.panel(),
            streams: spec.residual_width() / spec.hidden_size,
            spec: spec.clone(),
            states: Vec::new(),
            kernels: Kernels::detect()?,
            means: None,
        }))
    }

    /// Keeps the means of all matrices, for [`Measurement::importance`].
    #[must_use]
    pub fn keeping_means(self) -> Self {
        Measurement { means: Some(BTreeMap::new()), ..self }
    }

    /// The importance of the columns of all matrices that have been measured, for an importance file; empty unless their means are
    /// kept ([`Measurement::keeping_means`]).
    ///
    /// # Errors
    /// [`CalibrateError::NotANumber`].
    pub fn importance(&self) -> Result<Importance, CalibrateError> {
        let means = self.means.clone().unwrap_or_default();
        Importance::new(&self.spec, self.tokens.len() as u64, means).map_err(CalibrateError::NotANumber)
    }

    /// Takes the states through the layer in `file`.
    fn run(&mut self, layer: usize, file: &Path) -> Result<LayerInputs, CalibrateError> {
        let together = (TOGETHER / self.window).clamp(1, self.tokens.len().div_ceil(self.window));
        let options = EngineOptions {
            no_calibration: true,
            forget: true,
            context: Some(self.window),
            sequences: Some(together),
            ..EngineOptions::default()
        };
        let mut engine = Engine::open(file, &options)?;
        let observer = Observer::new(self.kernels, engine.threads(), layer, self.panel);
        let (seen, behind) = self.pass(&mut engine, layer, together, observer)?;
        let (seen, behind) = match seen {
            Some(seen) => (seen, behind),
            // No known model does this.
            None => {
                let alone = Observer::new(self.kernels, engine.threads(), layer, self.panel).without_sharing();
                let (seen, behind) = self.pass(&mut engine, layer, together, alone)?;
                (seen.expect("what is not shared does not part"), behind)
            }
        };
        self.states = behind;
        if self.states.iter().all(|x| x.is_finite()) {
            Ok(seen)
        } else {
            Err(CalibrateError::NotANumber(format!("after layer {layer}")))
        }
    }

    /// The observer's data, and the states after the layer.
    fn pass(
        &self,
        engine: &mut Engine,
        layer: usize,
        together: usize,
        observer: Observer,
    ) -> Result<(Option<LayerInputs>, Vec<f32>), CalibrateError> {
        let observer = Arc::new(observer);
        // The head's inputs come after the last layer; its one row costs nothing.
        let want = if layer + 1 == self.spec.layers.len() { Want::All } else { Want::Nothing };
        let mut sequences: Vec<_> = (0..together).map(|_| engine.new_sequence()).collect();
        let (rows, width) = (self.window * together, self.spec.residual_width());
        let mut behind = Vec::with_capacity(self.states.len());
        for (states, tokens) in self.states.chunks(rows * width).zip(self.tokens.chunks(rows)) {
            sequences.iter_mut().for_each(|sequence| sequence.clear());
            // Embeddings are not looked up, because the states are given.
            let spans = sequences.iter_mut().zip(tokens.chunks(self.window));
            let mut spans: Vec<_> = spans.map(|(sequence, tokens)| Span::prompt(sequence, tokens, want)).collect();
            let mut sink = |layers: usize, x: &[f32]| {
                if layers == 1 {
                    behind.extend_from_slice(x);
                }
            };
            let mut control = Control {
                states: Some(states),
                inputs: Some(observer.clone()),
                hidden: Some(&mut sink),
                ..Control::default()
            };
            engine.step(&mut spans, &mut control, &mut |_, _, _| ())?;
        }
        let observer = Arc::into_inner(observer).expect("a step that is over has forgotten its observer");
        Ok((observer.finish(), behind))
    }
}

impl Measure for Measurement {
    fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    fn begin(&mut self, states: Vec<f32>) {
        // All streams begin with the embedding.
        let streams = |embedding: &[f32]| embedding.repeat(self.streams);
        self.states = match self.streams {
            1 => states,
            _ => states.chunks_exact(self.spec.hidden_size).flat_map(streams).collect(),
        };
    }

    fn layer(&mut self, layer: usize, file: &Path) -> Result<Arc<dyn Inputs>, Box<dyn Error + Send + Sync>> {
        let inputs = self.run(layer, file)?;
        if let Some(means) = &mut self.means {
            means.extend(inputs.means());
        }
        Ok(Arc::new(inputs))
    }

    fn kept_bytes(&self) -> u64 {
        let means = if self.means.is_some() { Importance::longest(&self.spec) } else { 0 };
        (size_of::<u64>() + self.tokens.len() * self.spec.residual_width() * size_of::<f32>()) as u64 + means
    }

    fn keep(&self) -> Result<Vec<u8>, Box<dyn Error + Send + Sync>> {
        let means = self.means.as_ref().map(|_| self.importance()).transpose()?;
        Ok(kept::to_bytes(&self.states, means.as_ref()))
    }

    fn go_on(&mut self, kept: &[u8]) -> bool {
        let states = self.tokens.len() * self.spec.residual_width();
        match (kept::from_bytes(kept, states, &self.spec), &mut self.means) {
            (Some((states, Some(found))), Some(means)) => {
                (self.states, *means) = (states, found.matrices().clone());
                true
            }
            (Some((states, _)), None) => {
                self.states = states;
                true
            }
            // The means that are requested now were not kept then.
            _ => false,
        }
    }
}
