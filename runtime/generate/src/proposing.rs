//! Proposals to generations without a draft of their own: their source and their number.
//!
//! Proposals from the text itself cost nothing. So they are always compared with the next tokens, and are known to be right or
//! wrong before any has been checked in a step. Proposals of the prediction layer take time, and are made only if they are expected
//! to pay ([`Worth`]).

use std::time::Instant;

use sluice_model::Engine;

use super::predicted::{self, Asked, Predicted, Wanted};
use super::scheduler::{Running, Scheduler};
use super::worth::{DEEPEST, Offer, Source, Worth};
use super::{Draft, PromptLookup};

/// The source of proposed tokens, which a step checks together, for generations that have no draft of their own. The text is the
/// same for every source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Drafts {
    /// No proposals.
    #[default]
    Off,
    /// The text itself, if its latest tokens occur earlier ([`PromptLookup`]).
    Lookup,
    /// The model's layer for multi-token prediction, if it is open ([`EngineOptions::prediction`](sluice_model::EngineOptions)).
    Prediction,
    /// The text where it can, else the layer, if that costs no expert its place in memory.
    Auto,
}

impl Drafts {
    fn looks_up(self) -> bool {
        matches!(self, Drafts::Lookup | Drafts::Auto)
    }

    fn predicts(self) -> bool {
        matches!(self, Drafts::Prediction | Drafts::Auto)
    }

    /// Whether a model is to be opened with its prediction layer: where it is asked for, and by [`Auto`](Drafts::Auto) where all experts
    /// stay in memory beside it. `holds`: whether they do ([`EngineOptions::holds_prediction`](sluice_model::EngineOptions)).
    pub fn opens_prediction(self, holds: impl FnOnce() -> bool) -> bool {
        self == Drafts::Prediction || (self == Drafts::Auto && holds())
    }
}

/// The proposals to one generation.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// What the prediction layer remembers of it.
    predicted: Option<Predicted>,
    /// The last proposals, whether they were checked or not, and their source.
    proposals: Vec<u32>,
    source: Option<Source>,
    /// Tokens that its text had at that time.
    tokens: usize,
}

impl Ahead {
    /// Follows the sequence back to `position`.
    pub(super) fn go_back(&mut self, position: usize) {
        self.predicted.iter_mut().for_each(|predicted| predicted.go_back(position));
    }
}

/// Makes the proposals for a scheduler.
#[derive(Debug)]
pub(super) struct Proposer {
    drafts: Drafts,
    /// A fixed number of proposals, whether they pay or not.
    fixed: Option<usize>,
    worth: Worth,
    /// Whether the time of the next step says something about proposals.
    measures: bool,
    /// Seconds that proposals for the next step took.
    seconds: f64,
    /// The error of the prediction layer, which is not used again.
    failed: Option<String>,
}

impl Proposer {
    pub(super) fn new(drafts: Drafts, fixed: Option<usize>, engine: &Engine) -> Self {
        // A layer that is not open proposes nothing.
        let drafts = match drafts {
            Drafts::Auto if !engine.predicts() => Drafts::Lookup,
            Drafts::Prediction if !engine.predicts() => Drafts::Off,
            drafts => drafts,
        };
        Proposer { drafts, fixed, worth: Worth::new(), measures: false, seconds: 0.0, failed: None }
    }

    fn predicts(&self) -> bool {
        self.drafts.predicts() && self.failed.is_none()
    }

    /// Why the prediction layer makes no more proposals, if it has failed.
    pub(super) fn failure(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    /// The head inputs that the prediction layer needs of a step whose spans have these numbers of tokens.
    pub(super) fn wanted(&self, tokens: &[usize], engine: &Engine) -> Option<Wanted> {
        self.predicts().then(|| Wanted::new(tokens.iter().copied(), engine.spec().hidden_size))
    }

    /// Ignores the next step, because it says nothing about proposals.
    pub(super) fn pause(&mut self) {
        self.measures = false;
    }

    fn depth(&self, offers: &[Option<Offer>]) -> usize {
        match self.fixed {
            Some(depth) => depth,
            None => self.worth.depth(offers),
        }
    }

    /// Most proposals to one sequence.
    fn deepest(&self) -> usize {
        self.fixed.unwrap_or(DEEPEST)
    }
}

impl Scheduler {
    /// Proposes tokens to the generations that take part in the next step, at most `most` to each. While a prompt is being read
    /// there are no proposals: such a step takes long anyway, and would say nothing about their cost.
    pub(super) fn propose(&mut self, engine: &mut Engine, most: usize) {
        let Scheduler { running, proposer, .. } = self;
        if proposer.predicts() {
            let new = running.iter_mut().filter(|running| running.ahead.predicted.is_none());
            new.for_each(|running| running.ahead.predicted = Predicted::new(engine));
        }
        (proposer.measures, proposer.seconds) = (false, 0.0);
        let mut taking: Vec<&mut Running> =
            running.iter_mut().filter(|r| !r.is_over() && r.follows.is_none()).collect();
        let reads = |r: &&mut Running| r.generation.is_reading(r.sequence.position());
        if proposer.drafts == Drafts::Off || taking.iter().any(|r| reads(r) || r.generation.has_draft()) {
            return;
        }
        let offers: Vec<Option<Offer>> = taking.iter_mut().map(|r| r.offer(proposer, most)).collect();
        let depth = proposer.depth(&offers);
        let sequences = offers.len();
        let mut asked = Vec::new();
        for (running, offer) in taking.into_iter().zip(offers) {
            let Some(Offer { source, most, .. }) = offer.filter(|_| depth > 0) else { continue };
            let Running { generation, ahead, .. } = running;
            let most = most.min(depth);
            match (source, &mut ahead.predicted) {
                (Source::Lookup, _) => generation.check(&ahead.proposals[..most]),
                (Source::Prediction, Some(predicted)) => {
                    asked.push((generation, &mut ahead.proposals, predicted, most));
                }
                (Source::Prediction, None) => {}
            }
        }
        proposer.measures = true;
        if asked.is_empty() {
            return;
        }
        let waiting = asked.iter().map(|(_, _, predicted, _)| predicted.waiting()).max().unwrap_or(0);
        let deepest = asked.iter().map(|(.., most)| *most).max().unwrap_or(0);
        let started = Instant::now();
        let mut layers: Vec<Asked<'_>> = asked
            .iter_mut()
            .map(|(generation, _, predicted, most)| Asked {
                predicted,
                tokens: generation.tokens(),
                most: *most,
                proposals: Vec::new(),
            })
            .collect();
        let outcome = predicted::propose(engine, &mut layers);
        let proposals: Vec<Vec<u32>> = layers.into_iter().map(|asked| asked.proposals).collect();
        proposer.seconds = started.elapsed().as_secs_f64();
        proposer.worth.record_predicting(sequences, (waiting, deepest), proposer.seconds);
        for ((generation, ahead, ..), proposals) in asked.into_iter().zip(proposals) {
            generation.check(&proposals);
            *ahead = proposals;
        }
        if let Err(error) = outcome {
            // Its proposals change no text, so no generation has to end because of this error.
            proposer.failed = Some(error.to_string());
        }
    }

    /// Learns from a step that took this many `seconds`, with `rows` of each generation and `generated` tokens in total. `seen`:
    /// the head inputs of the step that the prediction layer needs.
    pub(super) fn learn(&mut self, rows: &[usize], seen: Option<Wanted>, seconds: f64, generated: u64) {
        let Scheduler { running, proposer, .. } = self;
        let taken = running.iter_mut().zip(rows).filter(|(_, rows)| **rows > 0).map(|(running, _)| running);
        let mut seen = seen.into_iter().flat_map(|seen| seen.kept);
        for running in taken {
            let Running { sequence, ahead, generation, .. } = running;
            if let (Some(predicted), Some(inputs)) = (&mut ahead.predicted, seen.next()) {
                predicted.take_behind(sequence.position(), &inputs);
            }
            let Some(source) = ahead.source.take() else { continue };
            // There are fewer if tokens were dropped because the context is full.
            let new = generation.tokens().get(ahead.tokens..).unwrap_or_default();
            let right = new.iter().zip(&ahead.proposals).take_while(|(new, proposed)| new == proposed).count();
            proposer.worth.judge(source, right, new.len().min(ahead.proposals.len()));
        }
        if proposer.measures {
            let sequences = rows.iter().filter(|rows| **rows > 0).count();
            let gained = (generated as usize).saturating_sub(sequences);
            proposer.worth.record(sequences, rows.iter().sum(), seconds, proposer.seconds, gained);
        }
    }
}

impl Running {
    /// The proposals that could be made to it.
    fn offer(&mut self, proposer: &Proposer, most: usize) -> Option<Offer> {
        let Running { generation, sequence, ahead, .. } = self;
        let most = generation.most_proposals(sequence.position(), most).min(proposer.deepest());
        if most == 0 {
            return None;
        }
        ahead.proposals.clear();
        ahead.tokens = generation.len();
        if proposer.drafts.looks_up() {
            PromptLookup { most, ..PromptLookup::default() }.propose(generation.tokens(), &mut ahead.proposals);
        }
        let is_ready = || ahead.predicted.as_ref().is_some_and(|predicted| predicted.is_ready(generation.len()));
        ahead.source = match ahead.proposals.len() {
            0 if proposer.predicts() && is_ready() => Some(Source::Prediction),
            0 => None,
            _ => Some(Source::Lookup),
        };
        let most = if ahead.source == Some(Source::Lookup) { ahead.proposals.len() } else { most };
        let waiting = ahead.predicted.as_ref().map_or(0, Predicted::waiting);
        let rereads = !sequence.gives_back();
        ahead.source.map(|source| Offer { source, most, waiting, rereads })
    }
}
