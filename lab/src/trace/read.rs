//! From JSON lines to a [`Trace`].

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use serde::Deserialize;

use super::{Choice, Header, MAX_EXPERTS, MAX_LAYERS, MAX_LINE, MAX_USES, Phase, Token, Trace};

/// A trace cannot be used: the line, and the reason.
#[derive(Debug, thiserror::Error)]
#[error("{name}, line {line}: {problem}")]
pub struct TraceError {
    /// The file's name, as given.
    pub name: String,
    /// The line, from 1.
    pub line: usize,
    /// The reason.
    #[source]
    pub problem: Problem,
}

/// An error in a line.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// It is too long.
    #[error("longer than {MAX_LINE} bytes; is this a routing trace?")]
    Long,
    /// It is not JSON, or does not have these fields.
    #[error("not a token of a routing trace: {0}")]
    Json(#[from] serde_json::Error),
    /// The header has a version of the format that this program does not know.
    #[error("format version {0}; this program reads version {known}", known = Header::VERSION)]
    Version(u32),
    /// A header is not the first line.
    #[error("a header must be the first line; traces cannot be joined end to end")]
    Header,
    /// The header has numbers that no model has.
    #[error("the header's {field} is {value}; between 1 and {most} are possible")]
    HeaderValue {
        /// The field.
        field: &'static str,
        /// The number.
        value: u32,
        /// The most that is allowed.
        most: u32,
    },
    /// There are more layers than the header says, or than any model has.
    #[error("{layers} layers, at most {most} are possible")]
    Layers {
        /// Layers of the line.
        layers: usize,
        /// The most that is allowed.
        most: usize,
    },
    /// An id is beyond the number of experts.
    #[error("layer {layer} uses expert {expert}, there are at most {most}")]
    Expert {
        /// The layer.
        layer: usize,
        /// The id.
        expert: u32,
        /// Experts per layer.
        most: u32,
    },
    /// An expert occurs twice in a list.
    #[error("layer {layer} uses expert {expert} twice")]
    Twice {
        /// The layer.
        layer: usize,
        /// The id.
        expert: u32,
    },
    /// The weights do not belong to the experts.
    #[error("the weights of layer {layer} do not belong to its experts: {weights} weights, {experts} experts")]
    Weights {
        /// The layer.
        layer: usize,
        /// How many weights.
        weights: usize,
        /// How many experts.
        experts: usize,
    },
    /// The trace is larger than this program accepts.
    #[error("the trace has more than {MAX_USES} expert uses; cut it")]
    Large,
}

#[derive(Deserialize)]
struct Line {
    sluice_trace: Option<u32>,
    #[serde(default)]
    tok: Option<u64>,
    #[serde(default)]
    phase: Option<Phase>,
    layers: Vec<Vec<u32>>,
    #[serde(default)]
    weights: Option<Vec<Vec<f32>>>,
}

impl Trace {
    /// Reads a file.
    ///
    /// # Errors
    /// [`TraceError`]; line 0 if the file cannot be opened.
    pub fn open(path: &Path) -> Result<Trace, TraceError> {
        let name = path.display().to_string();
        match File::open(path) {
            Ok(file) => Trace::read(BufReader::new(file), &name),
            Err(e) => Err(TraceError { name, line: 0, problem: e.into() }),
        }
    }

    /// Reads lines; `name` is for messages. An incomplete last line is left out. Memory stays within a small multiple of the bytes
    /// read, line by line.
    ///
    /// # Errors
    /// [`TraceError`] for the first line that cannot be used.
    pub fn read(mut input: impl BufRead, name: &str) -> Result<Trace, TraceError> {
        let mut trace = Trace::default();
        let mut text = Vec::new();
        for line in 1.. {
            text.clear();
            let result = match input.by_ref().take(MAX_LINE as u64 + 1).read_until(b'\n', &mut text) {
                Ok(0) => break,
                Ok(_) if text.len() > MAX_LINE => Err(Problem::Long),
                Ok(_) => trace.line(text.trim_ascii(), line == 1),
                Err(e) => Err(Problem::Io(e)),
            };
            if let Err(Problem::Json(error)) = &result
                && error.is_eof()
                && !trace.tokens.is_empty()
                && !text.ends_with(b"\n")
            {
                trace.cut_short = true;
                break;
            }
            result.map_err(|problem| TraceError { name: name.to_owned(), line, problem })?;
        }
        Ok(trace)
    }

    fn line(&mut self, text: &[u8], first: bool) -> Result<(), Problem> {
        if text.is_empty() {
            return Ok(());
        }
        if text[0] != b'{' {
            // Serde would accept an array for a struct.
            serde_json::from_slice::<serde_json::Map<_, _>>(text)?;
        }
        // Only the first line is parsed twice: `layers` of a header is a number.
        if first && let Ok(header) = serde_json::from_slice::<Header>(text) {
            self.header = Some(header.check()?);
            return Ok(());
        }
        let line: Line = match serde_json::from_slice(text) {
            Ok(line) => line,
            Err(_) if !first && serde_json::from_slice::<Header>(text).is_ok() => return Err(Problem::Header),
            Err(e) => return Err(e.into()),
        };
        if line.sluice_trace.is_some() {
            return Err(Problem::Header);
        }
        self.push(line)
    }

    fn push(&mut self, line: Line) -> Result<(), Problem> {
        let header = self.header.as_ref();
        let most = header.and_then(|h| h.layers).map_or(MAX_LAYERS, |l| l as usize);
        if line.layers.len() > most {
            return Err(Problem::Layers { layers: line.layers.len(), most });
        }
        let experts = header.and_then(|h| h.experts).unwrap_or(MAX_EXPERTS);
        if let Some(weights) = &line.weights
            && weights.len() > line.layers.len()
        {
            return Err(Problem::Weights { layer: line.layers.len(), weights: weights.len(), experts: 0 });
        }
        let mut starts = Vec::with_capacity(line.layers.len() + 1);
        for (layer, ids) in line.layers.iter().enumerate() {
            let start = self.choices.len();
            starts.push(start);
            if ids.len() > MAX_USES - start {
                return Err(Problem::Large);
            }
            let weights = line.weights.as_ref().and_then(|w| w.get(layer)).filter(|w| !w.is_empty());
            if let Some(weights) = weights.filter(|w| w.len() != ids.len()) {
                return Err(Problem::Weights { layer, weights: weights.len(), experts: ids.len() });
            }
            for (i, &expert) in ids.iter().enumerate() {
                if expert >= experts {
                    return Err(Problem::Expert { layer, expert, most: experts });
                }
                self.largest = self.largest.max(Some(expert));
                self.choices.push(Choice { expert, weight: weights.map_or(f32::NAN, |w| w[i]) });
            }
            let uses = &mut self.choices[start..];
            uses.sort_unstable_by_key(|c| c.expert);
            if let Some(pair) = uses.windows(2).find(|w| w[0].expert == w[1].expert) {
                return Err(Problem::Twice { layer, expert: pair[0].expert });
            }
        }
        starts.push(self.choices.len());
        self.layers = self.layers.max(line.layers.len());
        self.tokens.push(Token { tok: line.tok, phase: line.phase, starts });
        Ok(())
    }
}

impl Header {
    fn check(self) -> Result<Self, Problem> {
        if self.sluice_trace != Header::VERSION {
            return Err(Problem::Version(self.sluice_trace));
        }
        let fields = [
            ("layers", self.layers, MAX_LAYERS as u32),
            ("experts", self.experts, MAX_EXPERTS),
            ("top_k", self.top_k, MAX_EXPERTS),
        ];
        for (field, value, most) in fields {
            if let Some(value) = value.filter(|v| !(1..=most).contains(v)) {
                return Err(Problem::HeaderValue { field, value, most });
            }
        }
        Ok(self)
    }
}
