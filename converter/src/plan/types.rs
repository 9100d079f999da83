//! Which type a tensor is stored in.

use sluice_format::{ExtentKind, FP8_BLOCK, Layout, ROW_GROUP, WeightType};

use super::resolve::{SCALE_BLOCK, Source, Storage};
use crate::options::TypeChoice;

/// The type of a tensor, and whether it had to be widened although the choice was to carry it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    pub(crate) weight_type: WeightType,
    pub(crate) widened: bool,
}

/// Chooses the type of a tensor that comes from `sources`: several for a pair, and for the experts of a layer, which share
/// one description.
pub(crate) fn choose<'a>(
    kind: ExtentKind,
    layout: Layout,
    shape: [usize; 3],
    choice: TypeChoice,
    sources: impl Iterator<Item = &'a Source> + Clone,
) -> Chosen {
    let exact = |weight_type| Chosen { weight_type, widened: false };
    let stored = || carried(shape, sources.clone());
    match (kind, layout, choice) {
        // The embedding is looked up row by row: its layout knows no scales, so fp8 and q8 cannot apply.
        (ExtentKind::Embedding, ..) => match choice {
            TypeChoice::Type(ty @ (WeightType::F32 | WeightType::Bf16)) => exact(ty),
            _ => match stored() {
                Chosen { weight_type: WeightType::Fp8, .. } => Chosen { weight_type: WeightType::F32, widened: true },
                chosen => chosen,
            },
        },
        (_, Layout::Plain, _) => exact(WeightType::F32),
        // A router decides; its precision costs nothing.
        (ExtentKind::Router, _, TypeChoice::Type(WeightType::F32)) => exact(WeightType::F32),
        (ExtentKind::Router, ..) => match stored() {
            Chosen { weight_type: WeightType::Fp8, .. } => Chosen { weight_type: WeightType::F32, widened: true },
            chosen => chosen,
        },
        (.., TypeChoice::Keep) => stored(),
        (.., TypeChoice::Type(WeightType::Fp8)) => {
            let any_torn = sources.clone().any(|s| is_fp8(s) && !fits_tiles(s, shape));
            if any_torn { Chosen { weight_type: WeightType::F32, widened: true } } else { exact(WeightType::Fp8) }
        }
        (.., TypeChoice::Type(ty)) => exact(ty),
    }
}

/// The type that carries all sources bit for bit, or f32 where there is none: it holds all their values exactly.
fn carried<'a>(shape: [usize; 3], mut sources: impl Iterator<Item = &'a Source>) -> Chosen {
    let widened = Chosen { weight_type: WeightType::F32, widened: true };
    let one = |s: &Source| match s.storage {
        Storage::F32 => Some(WeightType::F32),
        Storage::F16 => Some(WeightType::F16),
        Storage::Bf16 => Some(WeightType::Bf16),
        Storage::Fp8 { .. } => fits_tiles(s, shape).then_some(WeightType::Fp8),
    };
    let Some(first) = sources.next().and_then(one) else { return widened };
    if sources.all(|s| one(s) == Some(first)) { Chosen { weight_type: first, widened: false } } else { widened }
}

fn is_fp8(s: &Source) -> bool {
    matches!(s.storage, Storage::Fp8 { .. })
}

/// Whether every tile of 8 rows and 128 columns, which has one scale here, lies in one block of the source, which has one
/// scale there.
pub(crate) fn fits_tiles(source: &Source, [batch, rows, cols]: [usize; 3]) -> bool {
    // The common case: 8 divides 128, so row groups that begin on multiples of 8 of untransposed rows never straddle.
    if !source.transposed && source.first_row.is_multiple_of(ROW_GROUP) && source.batch_stride.is_multiple_of(ROW_GROUP)
    {
        return true;
    }
    let block = |(row, col): (usize, usize)| (row / SCALE_BLOCK, col / SCALE_BLOCK);
    (0..batch).all(|b| {
        (0..rows).step_by(ROW_GROUP).all(|r| {
            let last_row = (r + ROW_GROUP).min(rows) - 1;
            (0..cols).step_by(FP8_BLOCK).all(|c| {
                let last_col = (c + FP8_BLOCK).min(cols) - 1;
                block(source.locate(b, r, c)) == block(source.locate(b, last_row, last_col))
            })
        })
    })
}

/// Whether values may change on the way from `storage` to `ty`. Carrying and widening do not change them.
pub(crate) fn is_lossy(storage: Storage, ty: WeightType) -> bool {
    !matches!(
        (storage, ty),
        (_, WeightType::F32)
            | (Storage::F16, WeightType::F16)
            | (Storage::Bf16, WeightType::Bf16)
            | (Storage::Fp8 { .. }, WeightType::Fp8)
    )
}
