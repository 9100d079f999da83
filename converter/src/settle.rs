//! Programs that were killed when their files were whole and had their names, but what lies beside them was not removed yet: the same
//! command finds that all is done.

use sluice_format::{ModelFile, Syncer};

use crate::error::ConvertError;
use crate::journal::{Content, Found, Identity, Journal, is_journal};
use crate::own::journal_path;
use crate::pack::Outcome;
use crate::plan::Plan;
use crate::resume::is_possible;
use crate::striping::Destination;
use crate::upgrade::is_same;

/// A conversion that was complete when it was killed.
pub(crate) struct Settled {
    pub(crate) model: ModelFile,
    /// By extent.
    pub(crate) outcomes: Vec<Outcome>,
    /// Digests of the parts of the source, if the journal has all of them.
    pub(crate) parts: Option<Vec<u128>>,
}

/// The model in these files, if they are the volumes of one and whole.
pub(crate) fn model_in(destination: Destination<'_>, count: usize) -> Option<ModelFile> {
    let targets = destination.targets(count);
    let model = ModelFile::open(targets.first()?).ok()?;
    let volumes = model.volumes();
    let is_it = volumes.len() == count && volumes.iter().zip(&targets).all(|(v, target)| is_same(v.path(), target));
    is_it.then_some(model)
}

/// What the conversion by this plan has ended in, if it was killed after its files had got their names. Its journal proves that: it is of
/// this plan and of the same source, and all extents of the model have its checksums.
pub(crate) fn settled(destination: Destination<'_>, plan: &Plan, identity: Identity) -> Option<Settled> {
    let journal = journal_path(destination.path);
    // The first file gets its name last.
    if !is_journal(&journal) || destination.partial(0).symlink_metadata().is_ok() {
        return None;
    }
    let model = (1..=plan.layout.ends().len()).find_map(|count| model_in(destination, count))?;
    let Ok(Found::Same { content, .. }) = Journal::open(&journal, identity) else { return None };
    let Content { stamps, mut outcomes, parts, .. } = content;
    outcomes.sort_unstable_by_key(|outcome| outcome.extent);
    let planned = plan.layout.extents();
    let is_of = |(number, outcome): (usize, &Outcome)| {
        let (record, planned) = (&model.extents()[number], &planned[number]);
        let written = outcome.written;
        outcome.extent == number
            && is_possible(plan, outcome)
            && (record.kind, record.layer, record.index) == (planned.kind, planned.layer, planned.index)
            && (record.codec, record.stored_len) == (written.codec, written.stored_len)
            && record.logical_checksum == written.logical_checksum
    };
    let counts = [outcomes.len(), model.extents().len()];
    let is_it = stamps == plan.checkpoint.stamps() && counts == [planned.len(); 2];
    if !is_it || !outcomes.iter().enumerate().all(is_of) {
        return None;
    }
    let mut digests = vec![None; plan.checkpoint.parts.len()];
    parts.into_iter().for_each(|(part, digest)| digests[part] = Some(digest));
    Some(Settled { model, outcomes, parts: digests.into_iter().collect() })
}

/// Makes the names of finished files durable.
pub(crate) fn sync_folders(destination: Destination<'_>) -> Result<(), ConvertError> {
    let syncer = Syncer::default();
    let sync = |folder| syncer.folder(folder).map_err(ConvertError::io(folder, "sync the folder"));
    destination.folders().into_iter().try_for_each(sync)
}
