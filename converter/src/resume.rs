//! Going on with an interrupted conversion: what an earlier run has left is kept only where it is proven to be what this run
//! would write.
//!
//! Two things are proven of each extent. Its bytes are in the partial file: they are read again and must have the journal's
//! checksum. And they were made of the bytes that the source holds now: where every file of the source has the identity that
//! the journal names, its bytes are the same, which a few samples confirm; where any differs (a download was mended, the folder
//! was copied, another checkpoint is converted to the same place, a file was touched), the source bytes of every extent are read
//! again and must have the journal's digest. Extents of which either is not true are made again; where the model is measured on the way,
//! so are those behind them, whose inputs they change.
//!
//! What is not proven are the errors of the quantisation: they can only be had by making the extent again. They are figures of the
//! provenance, which nothing computes with; a record whose figures are impossible is not believed at all.

use std::collections::HashMap;

use rayon::prelude::*;
use sluice_format::{BLOCK, Codec, ExtentRecord, FileWriter, Placed, Written};

use crate::contents::Contents;
use crate::error::ConvertError;
use crate::journal::{Content, Found, Identity, Journal};
use crate::pack::{ErrorSums, Outcome, Packer};
use crate::partial::Partial;
use crate::plan::Plan;
use crate::steps;

/// Extents whose source is read again although no file has changed: images of filesystems that were built to be reproducible
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
    note: &dyn Fn(String),
) -> Result<Start<'a>, ConvertError> {
    let stamps = plan.checkpoint.stamps();
    let syncer = partial.writer.syncer();
    let create = |content: Content| {
        let content = Content { elsewhere: partial.elsewhere.clone(), ..content };
        Journal::create(&partial.journal_path, identity, &content, syncer)
    };
    let Found::Same { journal, mut content } = found else {
        let contents = Contents::new(&plan.checkpoint, &[]);
        let journal = create(Content { stamps, ..Content::default() })?;
        return Ok(Start { journal, contents, done: Vec::new() });
    };
    let all = content.outcomes.len();
    let possible = keep(std::mem::take(&mut content.outcomes), |o| is_possible(plan, o));
    let mut done = intact(plan, partial, possible);
    let damaged = all - done.len();
    if damaged > 0 {
        let path = partial.path().display();
        note(format!(
            "{path}: {damaged} of {all} extents of an interrupted conversion are damaged; they are made again"
        ));
    }
    let same = stamps == content.stamps;
    if same && (plan.checkpoint.source().is_content_addressed() || samples_match(plan, &done, &content.parts)) {
        let contents = Contents::new(&plan.checkpoint, &content.parts);
        let journal = if damaged == 0 && content.elsewhere == partial.elsewhere {
            journal
        } else {
            // Records of extents that are made again must go: a number may come only once.
            create(Content { stamps, outcomes: done.clone(), parts: content.parts, ..Content::default() })?
        };
        return Ok(Start { journal, contents, done });
    }
    if plan.checkpoint.source().is_content_addressed() {
        return keep_of_same_files(plan, done, content, create, note);
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
    done = keep_of_same_inputs(plan, done, note);
    let parts = contents.take_news();
    let journal = create(Content { stamps, outcomes: done.clone(), parts, ..Content::default() })?;
    Ok(Start { journal, contents, done })
}

/// Those whose bytes are in the partial files: where they were written, or, once a compressed file is being drawn together, where they
/// will stay.
fn intact(plan: &Plan, partial: &Partial, possible: Vec<Outcome>) -> Vec<Outcome> {
    let is_written = |o: &Outcome| {
        let Written { stored_len, checksum, .. } = o.written;
        partial.is_intact(&plan.layout.stripes(o.extent, stored_len), checksum)
    };
    let is_drawn = |o: &Outcome, drawn: &[Placed]| {
        drawn.get(o.extent).is_some_and(|placed| partial.is_intact(&placed.stripes, o.written.checksum))
    };
    if plan.options.compress && possible.len() == plan.extents.len() {
        let mut written: Vec<(usize, Written)> = possible.iter().map(|o| (o.extent, o.written)).collect();
        written.sort_unstable_by_key(|(extent, _)| *extent);
        let written: Vec<Written> = written.into_iter().map(|(_, written)| written).collect();
        // What cannot have places is nowhere.
        let drawn = FileWriter::places(&plan.layout, &written).unwrap_or_default();
        let all = keep(possible.clone(), |o| is_written(o) || is_drawn(o, &drawn));
        if all.len() == possible.len() {
            return all;
        }
        // What is made again may be written over what has been drawn together.
    }
    keep(possible, is_written)
}

/// Whether an extent can have become this.
fn may_become(plan: &Plan, extent: &ExtentRecord, written: &Written) -> bool {
    let page = u64::from(plan.options.page_size);
    match written.codec {
        Codec::Raw => *written == Written::raw(extent, written.checksum),
        Codec::Planes => {
            let pages = written.stored_len > 0 && written.stored_len.is_multiple_of(page);
            plan.options.compress && pages && written.stored_len < extent.padded_len
        }
    }
}

/// Goes on where some files of a source are others than before, and stamps tell which without reading: only what was made of
/// the same files is kept.
fn keep_of_same_files<'a>(
    plan: &'a Plan,
    done: Vec<Outcome>,
    content: Content,
    create: impl Fn(Content) -> Result<Journal, ConvertError>,
    note: &dyn Fn(String),
) -> Result<Start<'a>, ConvertError> {
    let stamps = plan.checkpoint.stamps();
    let is_same = |file: usize| content.stamps.get(file) == stamps.get(file);
    let all = done.len();
    let done = keep(done, |o| plan.files_of(o.extent).into_iter().all(is_same));
    if done.len() < all {
        let other = all - done.len();
        note(format!(
            "{other} of {all} extents of an interrupted conversion were made of other files; they are made again"
        ));
    }
    let done = keep_of_same_inputs(plan, done, note);
    let mut parts = content.parts;
    parts.retain(|&(part, _)| is_same(plan.checkpoint.parts[part].file));
    let contents = Contents::new(&plan.checkpoint, &parts);
    let journal = create(Content { stamps, outcomes: done.clone(), parts, ..Content::default() })?;
    Ok(Start { journal, contents, done })
}

/// Where the model is measured, how an extent is rounded follows from its inputs, and so from all weights of its layer and of those
/// before it: where the source is not what it was, only those are kept before which, and beside which, everything has stayed. What meets
/// no input stays in any case.
fn keep_of_same_inputs(plan: &Plan, done: Vec<Outcome>, note: &dyn Fn(String)) -> Vec<Outcome> {
    if !plan.is_measured() {
        return done;
    }
    let mut is_done = vec![false; plan.extents.len()];
    done.iter().for_each(|o| is_done[o.extent] = true);
    let missing = (0..is_done.len()).filter(|&extent| !is_done[extent]).map(|extent| steps::round_of(plan, extent));
    let Some(first) = missing.min() else { return done };
    let all = done.len();
    let done = keep(done, |o| matches!(steps::round_of(plan, o.extent), round if round == 0 || round < first));
    if done.len() < all {
        let other = all - done.len();
        note(format!("{other} more were rounded by what the other weights gave; they are made again"));
    }
    done
}

/// Whether an extent can have become what is said of it, and whether the figures of its errors can be those of its tensors.
pub(crate) fn is_possible(plan: &Plan, outcome: &Outcome) -> bool {
    if !may_become(plan, &plan.layout.extents()[outcome.extent], &outcome.written) {
        return false;
    }
    let tensors = &plan.extents[outcome.extent];
    outcome.errors.iter().enumerate().all(|(i, sums)| {
        let Some(tensor) = tensors.get(i) else { return *sums == ErrorSums::default() };
        let [batch, rows, cols] = tensor.shape;
        let rows = batch * rows * tensor.sources.len();
        let largest = (rows * cols) as f64 * f64::from(f32::MAX).powi(2);
        // Every type has a zero, so no weight moves by more than its own magnitude; twice that leaves room for rounding.
        (0.0..=largest).contains(&sums.magnitude)
            && (0.0..=4.0 * sums.magnitude).contains(&sums.error)
            && sums.vanished <= (rows * cols.div_ceil(BLOCK)) as u64
    })
}

/// Whether some extents, all over the file, were made of what the source holds now, and the parts that these show have the
/// digests that the journal says.
fn samples_match(plan: &Plan, done: &[Outcome], parts: &[(usize, u128)]) -> bool {
    let contents = Contents::new(&plan.checkpoint, &[]);
    let step = done.len().div_ceil(SAMPLES).max(1);
    let samples: Vec<&Outcome> = done.iter().step_by(step).collect();
    let matches = |packer: &mut Packer<'_>, outcome: &Outcome| has_same_source(packer, outcome);
    if !samples.into_par_iter().map_init(|| Packer::new(plan, &contents), matches).all(|same| same) {
        return false;
    }
    let journaled: HashMap<usize, u128> = parts.iter().copied().collect();
    contents.take_news().iter().all(|(part, digest)| journaled.get(part).is_none_or(|journaled| journaled == digest))
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::options::Options;

    fn golden() -> Plan {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden/mixtral");
        crate::plan::plan(&folder, &Options::default()).unwrap()
    }

    fn outcome(extent: usize, errors: Vec<ErrorSums>) -> Outcome {
        let written = Written::raw(&golden().layout.extents()[extent], 0);
        Outcome { extent, written, source_digest: 0, source_bytes: 0, errors }
    }

    #[test]
    fn what_an_extent_cannot_have_become_is_not_believed() {
        let mut plan = golden();
        let possible = |plan: &Plan, codec, stored_len, checksum| {
            let mut outcome = outcome(0, Vec::new());
            outcome.written = Written { codec, stored_len, checksum, logical_checksum: 7 };
            is_possible(plan, &outcome)
        };
        plan.layout = wide(&plan);
        assert!(possible(&plan, Codec::Raw, 8192, 7));
        assert!(!possible(&plan, Codec::Raw, 8192, 8) && !possible(&plan, Codec::Raw, 4096, 7));
        assert!(!possible(&plan, Codec::Planes, 4096, 8), "nothing is compressed");
        plan.options.compress = true;
        assert!(possible(&plan, Codec::Planes, 4096, 8) && possible(&plan, Codec::Raw, 8192, 7));
        let others = [0, 4095, 8192, u64::MAX - 4095];
        assert!(others.into_iter().all(|len| !possible(&plan, Codec::Planes, len, 8)));
    }

    /// Its extents with two pages each.
    fn wide(plan: &Plan) -> sluice_format::FileLayout {
        let planned = plan.layout.extents().iter().map(|e| sluice_format::PlannedExtent {
            kind: e.kind,
            layer: e.layer,
            index: e.index,
            logical_len: 8192,
        });
        sluice_format::FileLayout::new(4096, &planned.collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn impossible_figures_are_not_believed() {
        let plan = golden();
        let most = plan.tensors_per_extent();
        let extent = plan.extents.iter().position(|tensors| tensors.len() < most).unwrap();
        let tensors = plan.extents[extent].len();
        let with = |place: usize, error: f64, magnitude: f64, vanished: u64| {
            let mut errors = vec![ErrorSums::default(); most];
            errors[place] = ErrorSums { error, magnitude, vanished };
            is_possible(&plan, &outcome(extent, errors))
        };
        assert!(with(0, 0.0, 0.0, 0) && with(0, 0.5, 0.5, 1) && with(tensors - 1, 1e-9, 1e9, 0));
        assert!(with(tensors, 0.0, 0.0, 0));
        assert!(!with(tensors, 0.0, 1.0, 0), "there is no such tensor");
        assert!(!with(0, f64::NAN, 1.0, 0) && !with(0, 0.0, f64::NAN, 0) && !with(0, 0.0, f64::INFINITY, 0));
        assert!(!with(0, -1.0, 1.0, 0) && !with(0, 0.0, -1.0, 0));
        assert!(!with(0, 1.0, 0.0, 0) && !with(0, f64::MAX, f64::MIN_POSITIVE, 0), "more error than weights");
        assert!(!with(0, 0.0, f64::MAX, 0) && !with(0, 0.0, 1.0, u64::MAX), "more than the tensor has");
    }

    #[test]
    fn samples_find_digests_that_are_not_the_source_s() {
        let plan = golden();
        let contents = Contents::new(&plan.checkpoint, &[]);
        let mut packer = Packer::new(&plan, &contents);
        let mut done = Vec::new();
        for extent in 0..plan.extents.len().min(SAMPLES) {
            let (source_digest, source_bytes) = packer.source_digest(extent).unwrap();
            done.push(Outcome { source_digest, source_bytes, ..outcome(extent, Vec::new()) });
        }
        let parts = contents.take_news();
        assert!(!parts.is_empty() && samples_match(&plan, &done, &parts) && samples_match(&plan, &done, &[]));
        for i in 0..parts.len() {
            let mut wrong = parts.clone();
            wrong[i].1 ^= 1;
            assert!(!samples_match(&plan, &done, &wrong), "part {i}");
        }
        done[3].source_digest ^= 1;
        assert!(!samples_match(&plan, &done, &parts));
    }
}
