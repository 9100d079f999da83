//! The options for drafts: proposed tokens, which one step checks together.

use std::num::NonZeroUsize;

use clap::ValueEnum;
use serde::Serialize;
use sluice_format::ModelFile;
use sluice_generate::{Drafts, SchedulerOptions};
use sluice_model::EngineOptions;

use crate::size::parse_count;

/// The source of proposed tokens, and their number.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Drafts")]
pub(crate) struct DraftArgs {
    /// Source of proposed tokens, which one step checks together; the text is the same
    ///
    /// How many are proposed, often none, is learned from the time of steps and from how many proposals come true.
    #[arg(long, value_name = "WHO", default_value = "off")]
    drafts: DraftChoice,

    /// Always propose this many tokens, instead of as many as pay
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
    pub(crate) fn drafts(&self) -> Drafts {
        match self.drafts {
            DraftChoice::Off => Drafts::Off,
            DraftChoice::Lookup => Drafts::Lookup,
            DraftChoice::Mtp => Drafts::Prediction,
            DraftChoice::Auto => Drafts::Auto,
        }
    }

    /// The fixed number of proposed tokens, if any.
    pub(crate) fn tokens(&self) -> Option<usize> {
        self.draft_tokens.map(NonZeroUsize::get)
    }

    /// Whether the prediction layer of a model is to be opened, which is opened with these options otherwise.
    pub(crate) fn predicts(&self, file: &ModelFile, options: &EngineOptions) -> bool {
        self.drafts().opens_prediction(|| options.holds_prediction(file))
    }

    /// For a scheduler.
    pub(crate) fn options(&self) -> SchedulerOptions {
        SchedulerOptions { drafts: self.drafts(), draft_tokens: self.tokens(), ..SchedulerOptions::default() }
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
