//! Going on with an interrupted conversion: what an earlier run has left is kept only where it is proven to be what this run
//! would write.
//!
//! Two things are proven of each extent. Its bytes are in the partial file: they are read again and must have the journal's
//! checksum. And they were made of the bytes that the source holds now: where every file of the source has the identity that
//! the journal names, its bytes are the same, which a few samples confirm; where any differs (a download was mended, the folder
//! was copied, another checkpoint is converted to the same place, a file was touched), the source bytes of every extent are read
//! again and must have the journal's digest. Extents of which either is not true are made again.

use rayon::prelude::*;

use crate::contents::Contents;
use crate::error::ConvertError;
use crate::journal::{Content, Found, Identity, Journal};
use crate::pack::{Outcome, Packer};
use crate::partial::Partial;
use crate::plan::Plan;

/// Extents whose source is read again although no file has changed: images of file systems that were built to be reproducible
/// can give the same identity to files of two checkpoints.
const SAMPLES: usize = 16;

/// Where a conversion begins.
pub(crate) struct Start<'a> {
    pub(crate) journal: Journal,
    /// What is known of the source's bytes.
    pub(crate) contents: Contents<'a>,
    /// Extents that need not be made.
    pub(crate) done: Vec<Outcome>,
}

/// Sorts what an earlier run has left, and has the journal say what is kept of it. Runs on the current rayon pool.
pub(crate) fn start<'a>(
    plan: &'a Plan,
    partial: &Partial,
    identity: Identity,
    found: Found,
    note: &mut dyn FnMut(String),
) -> Result<Start<'a>, ConvertError> {
    let stamps = plan.checkpoint.stamps();
    let syncer = partial.writer.syncer();
    let create = |content: &Content| Journal::create(&partial.journal_path, identity, content, syncer);
    let Found::Same { journal, content } = found else {
        let contents = Contents::new(&plan.checkpoint, &[]);
        let journal = create(&Content { stamps, ..Content::default() })?;
        return Ok(Start { journal, contents, done: Vec::new() });
    };
    let all = content.outcomes.len();
    let mut done = keep(content.outcomes, |o| {
        let extent = &plan.layout.extents()[o.extent];
        partial.is_intact(extent, o.checksum)
    });
    let damaged = all - done.len();
    if damaged > 0 {
        let path = partial.path.display();
        note(format!(
            "{path}: {damaged} of {all} extents of an interrupted conversion are damaged; they are made again"
        ));
    }
    if stamps == content.stamps && samples_match(plan, &done) {
        let contents = Contents::new(&plan.checkpoint, &content.parts);
        let journal = if damaged == 0 {
            journal
        } else {
            // Records of extents that are made again must go: a number may come only once.
            create(&Content { stamps, outcomes: done.clone(), parts: content.parts })?
        };
        return Ok(Start { journal, contents, done });
    }
    let contents = Contents::new(&plan.checkpoint, &[]);
    let intact = done.len();
    if intact > 0 {
        note(
            "the checkpoint is not the one of the interrupted conversion, or its files were touched: it is compared"
                .into(),
        );
    }
    done = keep_with(done, || Packer::new(plan, &contents), |packer, o| has_same_source(packer, o));
    plan.checkpoint.check_unchanged()?;
    if done.len() < intact {
        let other = intact - done.len();
        note(format!(
            "{other} of {all} extents of an interrupted conversion were made of other weights; they are made again"
        ));
    }
    let parts = contents.take_news();
    let journal = create(&Content { stamps, outcomes: done.clone(), parts })?;
    Ok(Start { journal, contents, done })
}

/// Whether some extents, all over the file, were made of what the source holds now.
fn samples_match(plan: &Plan, done: &[Outcome]) -> bool {
    let contents = Contents::new(&plan.checkpoint, &[]);
    let step = done.len().div_ceil(SAMPLES).max(1);
    let samples: Vec<&Outcome> = done.iter().step_by(step).collect();
    let matches = |packer: &mut Packer<'_>, outcome: &Outcome| has_same_source(packer, outcome);
    samples.into_par_iter().map_init(|| Packer::new(plan, &contents), matches).all(|same| same)
}

/// Whether the source has the bytes that an extent was made of. What cannot be read it has not; making the extent says why.
fn has_same_source(packer: &mut Packer<'_>, outcome: &Outcome) -> bool {
    let now = packer.source_digest(outcome.extent).inspect_err(|_| packer.reset());
    now.is_ok_and(|now| now == (outcome.source_digest, outcome.source_bytes))
}

fn keep(outcomes: Vec<Outcome>, test: impl Fn(&Outcome) -> bool + Sync) -> Vec<Outcome> {
    keep_with(outcomes, || (), |(), outcome| test(outcome))
}

/// The outcomes that pass a test, in their order; each thread has a state of its own.
fn keep_with<S>(
    outcomes: Vec<Outcome>,
    state: impl Fn() -> S + Sync,
    test: impl Fn(&mut S, &Outcome) -> bool + Sync,
) -> Vec<Outcome> {
    let tested = outcomes.into_par_iter().map_init(&state, |state, outcome| test(state, &outcome).then_some(outcome));
    tested.collect::<Vec<_>>().into_iter().flatten().collect()
}
