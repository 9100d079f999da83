//! Entry points for the fuzzing targets (`fuzz/`), which must get past checksums and make checkpoints that fit a configuration.
//! Nothing in the program uses this module, and it has no stable interface.

use std::collections::BTreeMap;
use std::path::Path;

use sluice_format::ExtentKind;

use crate::family::{self, config::Config};
use crate::partial;
use crate::plan::{Plan, build};

/// Gives header and records of a journal the checksums that bind them to this plan's conversion. Incomplete records stay as they
/// are.
pub fn seal_journal(plan: &Plan, journal: &mut [u8]) {
    partial::identity(plan, plan.hash_with(None)).seal(journal);
}

/// Names and shapes of tensors for a checkpoint with this `config.json`, in the family's first spelling; `None` if the
/// configuration is refused, or there are more than `most` tensors.
pub fn tensors_of(config: &[u8], most: usize) -> Option<Vec<(String, Vec<usize>)>> {
    let config = Config::parse(Path::new("config.json"), config).ok()?;
    let family = family::find(&config).ok()?;
    let text = family::text(family, &config).ok()?;
    let spec = family::spec(family, text.as_ref().unwrap_or(&config)).ok()?;
    let names = family.names();
    let head = vec![spec.vocab_size, spec.hidden_size];
    let mut tensors = BTreeMap::from([(names.embedding(), head.clone()), (names.head.to_owned(), head)]);
    for tensor in spec.tensors(ExtentKind::FinalNorm, usize::MAX) {
        let views = family.final_origin(names, &spec, &tensor).into_iter().flatten();
        tensors.extend(views.map(|view| (view.tensor, view.source_shape)));
    }
    for place in build::places(&spec) {
        for tensor in spec.tensors(place.kind, place.layer) {
            let views = family.origin(names, &spec, place, &tensor).into_iter().next().unwrap_or_default();
            tensors.extend(views.into_iter().map(|view| (view.tensor, view.source_shape)));
        }
        if tensors.len() > most {
            return None;
        }
    }
    Some(tensors.into_iter().collect())
}
