//! The options for drafts: proposed tokens, which one step checks together.

use std::num::NonZeroUsize;

use clap::ValueEnum;
use serde::Serialize;
use sluice_format::ModelFile;
use sluice_generate::{Drafts, SchedulerOptions};
use sluice_model::EngineOptions;

use crate::size::parse_count;

/// Who proposes tokens, and how many.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Drafts")]
pub(crate) struct DraftArgs {
    /// Who proposes tokens, which one step checks together; the text is the same
    ///
    /// How many are proposed, often none, is learnt from the time that steps take and from how many proposals come true.
    #[arg(long, value_name = "WHO", default_value = "off")]
    drafts: DraftChoice,

    /// Propose always so many tokens, instead of as many as pay
    #[arg(long, value_name = "N", value_parser = parse_count, hide_short_help = true)]
    draft_tokens: Option<NonZeroUsize>,
}

/// Who proposes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DraftChoice {
    /// Nobody
    Off,
    /// The text itself, where its latest tokens occur earlier
    Lookup,
    /// The model's layer for multi-token prediction, which takes memory then
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

    /// Tokens that are always proposed, if they are.
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

/// What became of proposals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct DraftCounts {
    /// Tokens that were proposed and checked.
    pub(crate) proposed: u64,
    /// Of these, the ones that came true.
    pub(crate) accepted: u64,
}

impl DraftCounts {
    /// Rows of steps that gave no token.
    pub(crate) fn rejected(self) -> u64 {
        self.proposed - self.accepted
    }
}
