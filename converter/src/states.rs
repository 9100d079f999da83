//! What measuring goes on with after an interruption, beside the journal: `DST.partial.states`.
//!
//! One file: a header that names the plan and the tokens, a layer, and the source bytes of everything before that layer; what the measurement itself
//! has kept; a checksum of all of it. It is written once everything before its layer is journaled, and takes the place of the one before
//! it as a whole. Where anything of it is not as it should be, the model is measured from its first layer on: so the file saves time,
//! and nothing else depends on it.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::Path;

use sluice_checksum::xxh3_128;
use sluice_format::Syncer;

use crate::error::ConvertError;
use crate::measure::Measure;
use crate::own::{Own, make_room, new_of, open_own};
use crate::pack::Outcome;
use crate::plan::Plan;
use crate::steps;

/// What all versions begin with.
pub(crate) const FAMILY: &[u8; 6] = b"SLSTAT";
/// The last but one byte is the version.
const MAGIC: [u8; 8] = *b"SLSTAT\x01\n";
/// Magic, hash of plan and tokens, layer, digest of the source, length.
const HEADER: usize = 8 + 16 + 8 + 16 + 8;
const CHECKSUM: usize = 16;

/// The digest of the source bytes of everything that comes before a layer; `None` as long as not all of it is made.
fn made_of(plan: &Plan, layer: usize, outcomes: &[Option<Outcome>]) -> Option<u128> {
    let before = (0..outcomes.len()).filter(|&extent| steps::round_of(plan, extent) <= layer);
    let digests = before.map(|extent| outcomes[extent].as_ref().map(|o| o.source_digest.to_le_bytes()));
    Some(xxh3_128(&digests.collect::<Option<Vec<_>>>()?.concat()))
}

fn header(hash: u128, layer: usize, made_of: u128, len: usize) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.extend(hash.to_le_bytes());
    header.extend((layer as u64).to_le_bytes());
    header.extend(made_of.to_le_bytes());
    header.extend((len as u64).to_le_bytes());
    header
}

/// Keeps what a measurement goes on with before a layer. All extents before it have been journaled.
pub(crate) fn keep(
    plan: &Plan,
    path: &Path,
    layer: usize,
    outcomes: &[Option<Outcome>],
    measure: &dyn Measure,
    syncer: &Syncer,
) -> Result<(), ConvertError> {
    let made_of = made_of(plan, layer, outcomes).expect("everything before the layer is made");
    let kept = measure.keep().map_err(|source| ConvertError::Measure { layer, source })?;
    let mut bytes = header(plan.hash_with(Some(measure.tokens())), layer, made_of, kept.len());
    bytes.extend(kept);
    bytes.extend(xxh3_128(&bytes).to_le_bytes());
    let new = new_of(path);
    make_room(&new, Own::States)?;
    let file = File::options().write(true).create_new(true).open(&new);
    let mut file = file.map_err(ConvertError::io(&new, "create it"))?;
    file.write_all(&bytes).map_err(ConvertError::io(&new, "write it"))?;
    syncer.all(&file).map_err(ConvertError::io(&new, "sync it"))?;
    fs::rename(&new, path).map_err(ConvertError::io(&new, "rename it"))
}

/// Has the measurement go on with what an earlier run has kept, if that is of use for the extents that are still to be made. Returns the
/// layer that comes next.
pub(crate) fn go_on(
    plan: &Plan,
    path: &Path,
    outcomes: &[Option<Outcome>],
    measure: &mut dyn Measure,
    note: &dyn Fn(&str),
) -> Result<Option<usize>, ConvertError> {
    let todo = (0..outcomes.len()).filter(|&extent| outcomes[extent].is_none());
    let Some(first) = todo.map(|extent| steps::round_of(plan, extent)).filter(|&round| round > 0).min() else {
        return Ok(None);
    };
    let Some(file) = open_own(path, false)? else { return Ok(None) };
    let longest = (HEADER + CHECKSUM) as u64 + measure.kept_bytes();
    let mut bytes = Vec::new();
    file.take(longest).read_to_end(&mut bytes).map_err(ConvertError::io(path, "read it"))?;
    let hash = plan.hash_with(Some(measure.tokens()));
    let found = parse(plan, hash, &bytes, outcomes).filter(|&(layer, _)| layer < first);
    let found = found.filter(|(_, kept)| measure.go_on(kept)).map(|(layer, _)| layer);
    if found.is_none() {
        note(&format!(
            "{}: what was measured before the interruption is damaged or of other weights; the model is measured from its first layer on",
            path.display()
        ));
    }
    Ok(found)
}

/// Layer and content of a file that is whole, and was made by this plan of the bytes that the source has.
fn parse<'b>(plan: &Plan, hash: u128, bytes: &'b [u8], outcomes: &[Option<Outcome>]) -> Option<(usize, &'b [u8])> {
    let (body, checksum) = bytes.split_last_chunk::<CHECKSUM>()?;
    let (head, kept) = body.split_at_checked(HEADER)?;
    let layer = usize::try_from(u64::from_le_bytes(*head.get(24..)?.first_chunk()?)).ok()?;
    let whole = *checksum == xxh3_128(body).to_le_bytes() && layer < plan.spec.layers.len();
    let expected = || Some(header(hash, layer, made_of(plan, layer, outcomes)?, kept.len()));
    (whole && expected()? == head).then_some((layer, kept))
}
