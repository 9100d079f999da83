//! Measures what meets the matrices of a model while it is converted, so that `q4`, `q3` and `q2` are rounded where it costs least.
//!
//! A text, [`TEXT`] unless there is a better one, runs through the model layer by layer ([`sluice_converter::measure`]). Of each
//! matrix the products of its inputs are summed ([`Moments`](sluice_kernels::Moments)), from which error feedback follows; of
//! experts, which see few of the tokens, the inputs themselves are kept until the layer is converted.

mod inputs;
mod observer;

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use sluice_checksum::Xxh3;
use sluice_converter::Plan;
use sluice_converter::measure::{Inputs, Measure};
use sluice_format::{ColumnMeans, Importance, MatrixKey, Metadata, TEXT_FILES};
use sluice_kernels::{IsaError, Kernels};
use sluice_model::{Control, Engine, EngineOptions, RuntimeError, Span, Want};
use sluice_text::{TextError, Tokenizer};

use observer::Observer;

/// The text that models are measured on unless there is a better one: prose, speech, many languages, code, mathematics, tables.
/// It was written for this purpose, and belongs to this project.
pub const TEXT: &str = include_str!("text.txt");

/// Tokens that remember each other.
const WINDOW: usize = 512;

/// Windows that go through a layer together.
const TOGETHER: usize = 8;

/// Raised whenever the same text can give another measurement.
const VERSION: u32 = 1;

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
    /// The instruction set that was asked for is not available.
    #[error(transparent)]
    Isa(#[from] IsaError),
    /// The text has no tokens.
    #[error("the text that the model is to be measured on has no tokens: give a longer one")]
    NoTokens,
    /// Activations that are no numbers.
    #[error("the model computes what is not a number on the text ({0}): its weights may be damaged")]
    NotANumber(String),
}

/// What identifies a measurement on a text, for [`sluice_converter::Options::measured`].
pub fn digest(text: &str) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&VERSION.to_le_bytes());
    hash.update(&(WINDOW as u64).to_le_bytes());
    hash.update(text.as_bytes());
    hash.digest()
}

/// A text on its way through a model.
pub struct Measurement {
    tokens: Vec<u32>,
    window: usize,
    /// Residual streams, and the numbers of all of them.
    streams: usize,
    width: usize,
    layers: usize,
    /// The residual, `[tokens, width]`, before the next layer.
    states: Vec<f32>,
    kernels: Kernels,
    /// Of all layers so far.
    means: BTreeMap<MatrixKey, ColumnMeans>,
}

impl Measurement {
    /// The beginning of a measurement of the model that a plan describes; `None` if it has no tokenizer.
    ///
    /// # Errors
    /// [`CalibrateError::Text`], [`CalibrateError::NoTokens`] and [`CalibrateError::Isa`].
    pub fn new(plan: &Plan, text: &str) -> Result<Option<Measurement>, CalibrateError> {
        let mut metadata = Metadata::default();
        for name in TEXT_FILES {
            if let Some(bytes) = plan.side_file(name) {
                metadata.insert(name, bytes.to_vec());
            }
        }
        let Some(tokenizer) = Tokenizer::of(&metadata)? else { return Ok(None) };
        let tokens = tokenizer.encode(text, true)?;
        if tokens.is_empty() {
            return Err(CalibrateError::NoTokens);
        }
        let spec = plan.spec();
        Ok(Some(Measurement {
            tokens,
            window: WINDOW.min(spec.max_positions.max(1)),
            streams: spec.residual_width() / spec.hidden_size,
            width: spec.residual_width(),
            layers: spec.layers.len(),
            states: Vec::new(),
            kernels: Kernels::detect()?,
            means: BTreeMap::new(),
        }))
    }

    /// The importance of the columns of all matrices that have been measured, for an importance file.
    ///
    /// # Errors
    /// [`CalibrateError::NotANumber`].
    pub fn importance(&self, plan: &Plan) -> Result<Importance, CalibrateError> {
        Importance::new(plan.spec(), self.tokens.len() as u64, self.means.clone()).map_err(CalibrateError::NotANumber)
    }

    /// Takes the states through the layer in `file`.
    fn run(&mut self, layer: usize, file: &Path) -> Result<Observer, CalibrateError> {
        let windows = self.tokens.len().div_ceil(self.window);
        let together = TOGETHER.min(windows);
        let options = EngineOptions {
            exact: true,
            no_calibration: true,
            forget: true,
            context: Some(self.window),
            sequences: Some(together),
            ..EngineOptions::default()
        };
        let mut engine = Engine::open(file, &options)?;
        let observer = Arc::new(Observer::new(self.kernels, engine.threads(), layer));
        // What the head meets is behind the last layer; its one row costs nothing.
        let want = if layer + 1 == self.layers { Want::All } else { Want::Nothing };
        let mut sequences: Vec<_> = (0..together).map(|_| engine.new_sequence()).collect();
        let rows = self.window * together;
        let mut behind = Vec::with_capacity(self.states.len());
        for (states, tokens) in self.states.chunks(rows * self.width).zip(self.tokens.chunks(rows)) {
            sequences.iter_mut().for_each(|sequence| sequence.clear());
            // Embeddings are not looked up: the states are given.
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
        drop((sequences, engine));
        self.states = behind;
        let observer = Arc::into_inner(observer).expect("the engine is closed");
        if self.states.iter().all(|x| x.is_finite()) {
            Ok(observer)
        } else {
            Err(CalibrateError::NotANumber(format!("behind layer {layer}")))
        }
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
            _ => states.chunks_exact(self.width / self.streams).flat_map(streams).collect(),
        };
    }

    fn layer(&mut self, layer: usize, file: &Path) -> Result<Arc<dyn Inputs>, Box<dyn Error + Send + Sync>> {
        let inputs = self.run(layer, file)?.finish();
        self.means.extend(inputs.means());
        Ok(Arc::new(inputs))
    }
}
