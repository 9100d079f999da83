//! Records routing into a trace while a model runs.

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

use sluice_lab::trace::TraceWriter;
use sluice_model::Engine;
use sluice_model::router::Choice;

use crate::error::CliError;

/// A trace while it is written.
pub(crate) struct Recorder {
    path: PathBuf,
    writer: TraceWriter<BufWriter<File>>,
    /// The first error: routing is observed where errors cannot be reported.
    error: Option<io::Error>,
}

impl Recorder {
    /// Starts a trace of the routing of `engine`.
    pub(crate) fn start(path: &Path, engine: &Engine) -> Result<Recorder, CliError> {
        let layers = &engine.spec().layers;
        let moe = || layers.iter().filter_map(|l| l.ffn.moe.as_ref());
        let experts = moe().map(|m| m.experts).max().unwrap_or(0) as u32;
        let top_k = moe().map(|m| m.top_k).max().unwrap_or(0) as u32;
        let (count, family) = (layers.len() as u32, engine.spec().family.clone());
        let writer = File::create(path)
            .and_then(|file| TraceWriter::new(BufWriter::new(file), count, experts, top_k, Some(&family)))
            .map_err(CliError::file(path, "write the trace"))?;
        Ok(Recorder { path: path.to_owned(), writer, error: None })
    }

    /// Adds the routing of a layer for tokens from `position` on, `top_k` choices each.
    pub(crate) fn record(&mut self, layer: usize, position: usize, top_k: usize, choices: &[Choice]) {
        if self.error.is_none() {
            self.error = self.writer.record(layer, position, top_k, choices.iter().copied()).err();
        }
    }

    /// Writes the rest, and reports earlier errors.
    pub(crate) fn finish(self) -> Result<(), CliError> {
        let finished = self.writer.finish().map(drop);
        self.error.map_or(finished, Err).map_err(CliError::file(&self.path, "write the trace"))
    }
}
