//! From a running model to JSON lines.

use std::io::{self, Write};

use serde::Serialize;

use super::{Choice, Header, Phase};

/// Writes a trace while a model runs.
///
/// A model computes many tokens of a prompt layer by layer, but a trace lists the layers within each token. So the writer keeps the
/// tokens that go through the layers together, and writes them when the next ones begin. [`TraceWriter::finish`] writes the last
/// ones; without it they are missing, and the file is still valid.
#[derive(Debug)]
pub struct TraceWriter<W: Write> {
    out: W,
    layers: usize,
    /// Position of the first token that is kept.
    position: usize,
    /// Number of tokens that are kept, and the experts of every layer for each.
    tokens: usize,
    kept: Vec<Vec<Choice>>,
    /// The layer that was recorded last.
    last: Option<usize>,
}

#[derive(Serialize)]
struct Line {
    tok: usize,
    phase: Phase,
    layers: Vec<Vec<u32>>,
    weights: Vec<Vec<f32>>,
}

impl<W: Write> TraceWriter<W> {
    /// Writes the header: `layers` counts all layers of the model, including those without routing.
    ///
    /// # Errors
    /// The errors of the output.
    pub fn new(mut out: W, layers: u32, experts: u32, top_k: u32, model: Option<&str>) -> io::Result<Self> {
        let header = Header {
            sluice_trace: Header::VERSION,
            layers: Some(layers),
            experts: Some(experts),
            top_k: Some(top_k),
            model: model.map(str::to_owned),
        };
        serde_json::to_writer(&mut out, &header)?;
        out.write_all(b"\n")?;
        Ok(TraceWriter { out, layers: layers as usize, position: 0, tokens: 0, kept: Vec::new(), last: None })
    }

    /// Records the routing of one layer for tokens that go through it together: `top_k` choices for each, the first one at
    /// `position` of its sequence. Layers come in ascending order; the first layer again, or other tokens, begin a new pass.
    ///
    /// # Errors
    /// The errors of the output, and [`io::ErrorKind::InvalidInput`] for a layer beyond the header's or choices that do not form
    /// whole tokens.
    pub fn record(
        &mut self,
        layer: usize,
        position: usize,
        top_k: usize,
        choices: impl ExactSizeIterator<Item = Choice>,
    ) -> io::Result<()> {
        let count = choices.len();
        if layer >= self.layers || top_k == 0 || !count.is_multiple_of(top_k) {
            let what = format!("layer {layer} of {}, {count} choices of {top_k} a token", self.layers);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let tokens = count / top_k;
        if self.last.is_none_or(|last| layer <= last) || position != self.position || tokens != self.tokens {
            self.flush_tokens()?;
            (self.position, self.tokens) = (position, tokens);
            self.kept.resize_with(self.kept.len().max(tokens * self.layers), Vec::new);
        }
        for (i, choice) in choices.enumerate() {
            self.kept[i / top_k * self.layers + layer].push(choice);
        }
        self.last = Some(layer);
        Ok(())
    }

    /// Writes the kept tokens and returns the output.
    ///
    /// # Errors
    /// The errors of the output.
    pub fn finish(mut self) -> io::Result<W> {
        self.flush_tokens()?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn flush_tokens(&mut self) -> io::Result<()> {
        let tokens = if self.last.take().is_some() { self.tokens } else { 0 };
        let phase = if tokens > 1 { Phase::Prefill } else { Phase::Decode };
        for t in 0..tokens {
            let mut line = Line { tok: self.position + t, phase, layers: Vec::new(), weights: Vec::new() };
            for kept in &mut self.kept[t * self.layers..][..self.layers] {
                kept.sort_unstable_by_key(|c| c.expert);
                line.layers.push(kept.iter().map(|c| c.expert).collect());
                // Five digits are enough for a router weight.
                line.weights.push(kept.iter().map(|c| (c.weight * 1e5).round() / 1e5).collect());
                kept.clear();
            }
            serde_json::to_writer(&mut self.out, &line)?;
            self.out.write_all(b"\n")?;
        }
        Ok(())
    }
}
