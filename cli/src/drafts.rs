//! The options for drafts: proposed tokens, which one step checks together.

use std::num::NonZeroUsize;

use clap::ValueEnum;
use serde::Serialize;
use sluice_format::ModelFile;
use sluice_generate::{Drafts, SchedulerOptions};
use sluice_model::{Engine, EngineOptions};

use crate::error::CliError;
use crate::size::parse_count;

/// The source of proposed tokens, and their number.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Drafts")]
pub(crate) struct DraftArgs {
    /// Source of proposed tokens, which one step checks together; the text is the same [default: lookup for run and chat, off for serve]
    ///
    /// How many are proposed, often none, is learned from the time of steps and from how many proposals come true. Nothing is proposed by
    /// default with --trace, which records the routing of every row, and with --expert-preference, where the text depends on the steps.
    #[arg(long, value_name = "WHO")]
    drafts: Option<DraftChoice>,

    /// Always propose this many tokens, instead of as many as pay; for --drafts
    #[arg(long, value_name = "N", value_parser = parse_count, hide_short_help = true)]
    draft_tokens: Option<NonZeroUsize>,
}

/// The source of proposals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DraftChoice {
    /// No proposals
    Off,
    /// The text itself, if its latest tokens occur earlier
    Lookup,
    /// The model's layer for multi-token prediction, which then takes memory
    Mtp,
    /// The text where it can, else the layer if the model has one and memory holds all experts beside it
    Auto,
}

impl DraftArgs {
    /// What was asked for; `usual` if nothing was.
    ///
    /// # Errors
    /// If a number of tokens was asked for that nobody proposes.
    pub(crate) fn or(&self, usual: Drafts) -> Result<Drafting, CliError> {
        let drafts = match self.drafts {
            None => usual,
            Some(DraftChoice::Off) => Drafts::Off,
            Some(DraftChoice::Lookup) => Drafts::Lookup,
            Some(DraftChoice::Mtp) => Drafts::Prediction,
            Some(DraftChoice::Auto) => Drafts::Auto,
        };
        match self.draft_tokens {
            Some(tokens) if drafts == Drafts::Off => Err(CliError::Usage(format!(
                "--draft-tokens {tokens} would change nothing, because no tokens are proposed. Add --drafts lookup or another source, or \
                 leave --draft-tokens out"
            ))),
            tokens => Ok(Drafting { drafts, tokens: tokens.map(NonZeroUsize::get) }),
        }
    }
}

/// Who proposes tokens, and how many.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drafting {
    pub(crate) drafts: Drafts,
    /// A fixed number, if one was asked for.
    pub(crate) tokens: Option<usize>,
}

impl Drafting {
    /// Whether the prediction layer of a model is to be opened, which is opened with these options otherwise.
    pub(crate) fn predicts(self, file: &ModelFile, options: &EngineOptions) -> bool {
        self.drafts.opens_prediction(|| options.holds_prediction(file))
    }

    /// Whether a model that is open can propose so: the prediction layer must not take memory from experts unless it was asked for by name.
    pub(crate) fn suits(self, engine: &Engine) -> bool {
        self.drafts != Drafts::Auto || !engine.predicts() || engine.memory().holds_all()
    }

    /// For a scheduler.
    pub(crate) fn options(self) -> SchedulerOptions {
        SchedulerOptions { drafts: self.drafts, draft_tokens: self.tokens, ..SchedulerOptions::default() }
    }
}

/// The outcome of proposals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct DraftCounts {
    /// Tokens that were proposed and checked.
    pub(crate) proposed: u64,
    /// Proposed tokens that came true.
    pub(crate) accepted: u64,
}

impl DraftCounts {
    /// Rows of steps that produced no token.
    pub(crate) fn rejected(self) -> u64 {
        self.proposed - self.accepted
    }
}
