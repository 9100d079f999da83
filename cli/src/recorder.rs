//! Records routing into a trace while a model runs.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use sluice_runtime::Engine;
use sluice_runtime::trace::TraceWriter;

use crate::error::CliError;

/// A trace that is being written.
pub(crate) struct Recorder {
    path: PathBuf,
    state: Rc<RefCell<State>>,
}

struct State {
    writer: Option<TraceWriter<BufWriter<File>>>,
    /// The first error: routing is observed where none can be reported.
    error: Option<io::Error>,
}

impl Recorder {
    /// Records everything that `engine` routes from now on.
    pub(crate) fn start(path: &Path, engine: &mut Engine) -> Result<Recorder, CliError> {
        let layers = &engine.spec().layers;
        let moe = || layers.iter().filter_map(|l| l.ffn.moe.as_ref());
        let experts = moe().map(|m| m.experts).max().unwrap_or(0) as u32;
        let top_k = moe().map(|m| m.top_k).max().unwrap_or(0) as u32;
        let (count, family) = (layers.len() as u32, engine.spec().family.clone());
        let writer = File::create(path)
            .and_then(|file| TraceWriter::new(BufWriter::new(file), count, experts, top_k, Some(&family)))
            .map_err(CliError::file(path, "write the trace"))?;
        let state = Rc::new(RefCell::new(State { writer: Some(writer), error: None }));
        let shared = Rc::clone(&state);
        engine.observe_routing(Box::new(move |layer, position, top_k, choices| {
            let State { writer, error } = &mut *shared.borrow_mut();
            if let Some(writer) = writer
                && error.is_none()
            {
                *error = writer.record(layer, position, top_k, choices.iter().copied()).err();
            }
        }));
        Ok(Recorder { path: path.to_owned(), state })
    }

    /// Writes what is left, and reports what went wrong on the way.
    pub(crate) fn finish(self) -> Result<(), CliError> {
        let mut state = self.state.borrow_mut();
        let finished = state.writer.take().map(|w| w.finish().map(drop)).unwrap_or(Ok(()));
        let outcome = state.error.take().map_or(finished, Err);
        outcome.map_err(CliError::file(&self.path, "write the trace"))
    }
}
