//! A model that is opened before the length of its prompt is known.
//!
//! A prompt is counted in tokens, and a large tokenizer takes some tenths of a second to build. A drive reads a gigabyte meanwhile, of which
//! every token needs what it reads first. So the model is opened for the shortest prompt that there can be, and gets its context later.

use sluice_format::ModelFile;
use sluice_model::{Engine, EngineOptions};

use crate::drafts::Drafting;
use crate::engine_args::EngineArgs;
use crate::error::CliError;
use crate::progress::spinner;

/// A model whose context is yet to be decided.
pub(crate) enum Early {
    /// It reads already.
    Reading(Box<Engine>),
    /// The memory does not suffice for the shortest prompt. How much it takes is said once the prompt is known.
    Waiting(Box<ModelFile>),
}

impl Early {
    /// Opens a model with the context that its shortest prompt needs, and begins to read it. Prints nothing that would depend on the context.
    pub(crate) fn open(file: ModelFile, options: &EngineOptions) -> Result<Self, CliError> {
        if options.check_memory(&file).is_err() {
            return Ok(Early::Waiting(Box::new(file)));
        }
        let spinner = spinner("opening the model");
        let engine = Engine::of(file, options);
        spinner.finish_and_clear();
        Ok(Early::Reading(Box::new(engine?)))
    }

    /// The model's file.
    pub(crate) fn file(&self) -> &ModelFile {
        match self {
            Early::Reading(engine) => engine.file(),
            Early::Waiting(file) => file,
        }
    }

    /// The model with room for `context` tokens, with the memory plan that it would have if it were opened now. If what is being read
    /// already does not suit that plan, it is opened again.
    pub(crate) fn with_context(
        self,
        context: usize,
        args: &EngineArgs,
        drafting: Drafting,
    ) -> Result<Engine, CliError> {
        let options = args.options(context);
        let file = match self {
            Early::Waiting(file) => *file,
            Early::Reading(mut engine) => {
                // An error is that of opening it again, where it is said how much memory is missing.
                let fits = engine.set_context(context).unwrap_or(false);
                if fits && drafting.suits(&engine) {
                    args.say_how_it_was_opened(&engine, &options);
                    return Ok(*engine);
                }
                engine.into_file()
            }
        };
        let prediction = drafting.predicts(&file, &options);
        args.open_file(file, &EngineOptions { prediction, ..options })
    }
}
