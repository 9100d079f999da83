//! Chooses the type in which a tensor is stored.

use sluice_format::{ExtentKind, Layout, TensorShape, WeightType};
use sluice_weights::Codes;

use crate::encoding::Selection;
use crate::options::TypeChoice;

/// The type of a tensor, and whether it had to be widened although it should have been carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    pub(crate) weight_type: WeightType,
    /// Whether the order of the columns is stored.
    pub(crate) ordered: bool,
    pub(crate) widened: bool,
}

/// Chooses the type of a tensor from `sources`, those of each extent: two for a pair; several extents for the experts of a layer,
/// which share one description.
pub(crate) fn choose(kind: ExtentKind, tensor: &TensorShape, choice: TypeChoice, sources: &[Vec<Selection>]) -> Chosen {
    let TensorShape { layout, shape, .. } = *tensor;
    let exact = |weight_type| Chosen { weight_type, ordered: false, widened: false };
    let stored = || carried(shape, sources);
    match (kind, layout, choice) {
        // Rows that are looked up one by one cost no time, so the type is lossless unless the checkpoint has fewer bits.
        (ExtentKind::Embedding, ..) => match choice {
            TypeChoice::Type(ty @ (WeightType::F32 | WeightType::Bf16)) => exact(ty),
            _ => by_row(stored()),
        },
        // The same for a table; its rows must also be found.
        (_, Layout::Sectors, TypeChoice::Type(ty @ (WeightType::F32 | WeightType::Bf16))) => exact(ty),
        (_, Layout::Sectors, _) => floats_only(stored()),
        (_, Layout::Plain, _) => exact(WeightType::F32),
        // A router makes decisions, and its precision costs nothing.
        (.., TypeChoice::Type(WeightType::F32)) if tensor.decides(kind) => exact(WeightType::F32),
        _ if tensor.decides(kind) => floats_only(stored()),
        (.., TypeChoice::Keep) => stored(),
        (.., TypeChoice::Type(WeightType::Fp8)) => {
            let stored = stored();
            if is_e4m3(stored.weight_type) {
                stored
            } else if sources.iter().flatten().any(|s| is_torn_fp8(s, shape)) {
                WIDENED
            } else {
                exact(WeightType::Fp8)
            }
        }
        (.., TypeChoice::Type(ty)) => exact(ty),
    }
}

const WIDENED: Chosen = Chosen { weight_type: WeightType::F32, ordered: false, widened: true };

fn floats_only(chosen: Chosen) -> Chosen {
    match chosen.weight_type {
        WeightType::F32 | WeightType::F16 | WeightType::Bf16 => chosen,
        _ => WIDENED,
    }
}

/// Parts of the embedding can begin at any row group, even inside the 128 rows of a scale, and their rows are looked up as stored.
fn by_row(chosen: Chosen) -> Chosen {
    if chosen.weight_type == WeightType::Fp8 || chosen.ordered { WIDENED } else { chosen }
}

/// The type that carries all sources bit for bit, or f32, which holds all values exactly, if there is none.
fn carried(shape: [usize; 3], sources: &[Vec<Selection>]) -> Chosen {
    let mut all = sources.iter().flatten();
    let Some(first) = all.next().and_then(|s| s.carrier(shape)) else { return WIDENED };
    if !all.all(|s| s.carrier(shape) == Some(first)) {
        return WIDENED;
    }
    // The matrices of a pair have one input, so they share an order. Each extent has its own order.
    let alike = |sources: &Vec<Selection>| sources.iter().all(|s| s.order() == sources[0].order());
    if !sources.iter().all(alike) {
        return WIDENED;
    }
    let ordered = sources.iter().flatten().any(|s| s.order().is_some());
    Chosen { weight_type: first, ordered, widened: false }
}

/// Whether a source has fp8 codes that the file's type cannot hold: new codes made from them would lose more than the type does.
fn is_torn_fp8(source: &Selection, shape: [usize; 3]) -> bool {
    source.encoding.carried().is_some_and(is_e4m3) && source.carrier(shape) != Some(WeightType::Fp8)
}

/// Whether a type has e4m3 codes, with any scales.
fn is_e4m3(ty: WeightType) -> bool {
    match ty {
        WeightType::Grouped(grouped) => grouped.codes() == Codes::E4m3,
        other => other == WeightType::Fp8,
    }
}
