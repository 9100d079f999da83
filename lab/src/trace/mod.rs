//! Routing traces: which experts each token used, recorded, read, measured, and replayed against eviction policies.
//!
//! # The format
//! A text file of JSON objects, one a line, one line a token, in the order in which the model computed them:
//!
//! ```json
//! {"sluice_trace": 1, "layers": 4, "experts": 64, "top_k": 2, "model": "Example-MoE"}
//! {"tok": 0, "phase": "prefill", "layers": [[], [3, 17], [0, 63], [5, 9]], "weights": [[], [0.7, 0.3], [0.5, 0.5], [0.9, 0.1]]}
//! {"tok": 1, "phase": "decode", "layers": [[], [3, 20], [1, 63], [5, 8]], "weights": [[], [0.6, 0.4], [0.5, 0.5], [0.8, 0.2]]}
//! ```
//!
//! * The first line may be a header; it is told by its `sluice_trace`, the version of this format (1). `layers`: layers of
//!   the model; `experts`: routed experts per layer; `top_k`: experts per token and layer; `model`: a name. All but the
//!   version may be missing.
//! * `layers`: for every layer the ids of the experts that the token used, in any order, none twice. A layer without
//!   routing has an empty list; missing lists at the end count as empty. `weights`: router weights in the same order, if
//!   known. `phase`: `prefill` or `decode`, if known. `tok`: position in its sequence, if known.
//! * Other fields are ignored, empty lines too.
//!
//! Limits, beyond which a file is refused: [`MAX_LINE`] bytes a line, [`MAX_LAYERS`], [`MAX_EXPERTS`], [`MAX_USES`].

mod read;
mod replay;
mod stats;
mod write;

use serde::{Deserialize, Serialize};
use sluice_format::limits::MAX_EXTENTS;

pub use self::read::{Problem, TraceError};
pub use self::replay::{Replay, ReplayError, ReplayResult, Row};
pub use self::stats::{LayerStats, Stats};
pub use self::write::TraceWriter;
pub use sluice_storage::pool::policy::Choice;

/// Longest line, in bytes.
pub const MAX_LINE: usize = 16 << 20;
/// Most layers.
pub const MAX_LAYERS: usize = 4096;
/// Most experts per layer.
pub const MAX_EXPERTS: u32 = 1 << 16;
/// Most expert uses in a whole trace (tokens × layers × top-k).
pub const MAX_USES: usize = 1 << 28;

/// What a trace says of its model; the first line of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Version of the format.
    pub sluice_trace: u32,
    /// Layers of the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<u32>,
    /// Routed experts per layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<u32>,
    /// Experts per token and layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Name of the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

impl Header {
    /// The version that this program reads and writes.
    pub const VERSION: u32 = 1;
}

/// What a token was computed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// It is part of the prompt.
    Prefill,
    /// It was generated.
    Decode,
}

/// One token: a range of [`Trace::choices`] per layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Position in its sequence.
    pub tok: Option<u64>,
    /// Prompt or generated.
    pub phase: Option<Phase>,
    /// Start of its choices in every layer, and the end of the last ones.
    starts: Vec<usize>,
}

/// A trace in memory.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    header: Option<Header>,
    tokens: Vec<Token>,
    choices: Vec<Choice>,
    layers: usize,
    largest: Option<u32>,
    cut_short: bool,
}

impl Trace {
    /// Whether the last line is incomplete and was left out, because the writer was interrupted.
    pub fn is_cut_short(&self) -> bool {
        self.cut_short
    }

    /// The first line, if it is a header.
    pub fn header(&self) -> Option<&Header> {
        self.header.as_ref()
    }

    /// The tokens in order.
    pub fn tokens(&self) -> &[Token] {
        &self.tokens
    }

    /// The most layers that a token lists.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// The experts that `token` used in `layer`, ascending; none beyond its last layer.
    pub fn choices(&self, token: &Token, layer: usize) -> &[Choice] {
        match (token.starts.get(layer), token.starts.get(layer + 1)) {
            (Some(&start), Some(&end)) => &self.choices[start..end],
            _ => &[],
        }
    }

    /// Experts per layer: `experts` if given, otherwise the header's number, otherwise the largest id seen + 1, rounded up to a
    /// power of two (0 if there is none).
    ///
    /// # Errors
    /// [`ReplayError::Experts`] if that is not enough for the ids in the trace, or exceeds [`MAX_EXPERTS`].
    pub fn experts(&self, experts: Option<u32>) -> Result<u32, ReplayError> {
        let needed = self.largest.map_or(0, |id| id + 1);
        let said = experts.or(self.header.as_ref().and_then(|h| h.experts));
        match said {
            Some(said) if said < needed || said > MAX_EXPERTS => Err(ReplayError::Experts { said, needed }),
            Some(said) => Ok(said),
            None => Ok(if needed == 0 { 0 } else { needed.next_power_of_two() }),
        }
    }

    /// The layers that have routing, and their experts: see [`Trace::experts`].
    ///
    /// # Errors
    /// [`ReplayError`] if there are none, or more than a model can have.
    fn routing(&self, experts: Option<u32>) -> Result<(Vec<usize>, u32), ReplayError> {
        let experts = self.experts(experts)?;
        let layers = self.routed_layers();
        if layers.is_empty() {
            return Err(ReplayError::Empty);
        }
        if layers.len() * experts as usize > MAX_EXTENTS {
            return Err(ReplayError::Shape { layers: layers.len(), experts });
        }
        Ok((layers, experts))
    }

    /// The layers that have routing, ascending.
    pub fn routed_layers(&self) -> Vec<usize> {
        let routed = |&l: &usize| self.tokens.iter().any(|t| !self.choices(t, l).is_empty());
        (0..self.layers).filter(routed).collect()
    }
}

#[cfg(test)]
mod tests;
