//! Carries codes and scales of rows into a weight type that holds both bit for bit.

use sluice_format::ROW_GROUP;
use sluice_kernels as kernels;
use sluice_weights::{Codes, GroupSize, Grouped, ScaleType, Scales, Zero};

use super::Groups;

/// A type for codes with scales per group, and how often each scale is repeated in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Carrier {
    pub(super) ty: Grouped,
    pub(super) repeat: usize,
}

impl Carrier {
    /// The type for groups of `group` of `cols` columns. If no type has groups of that size, scales are repeated.
    pub(super) fn new(codes: Codes, (group, cols): (usize, usize), scale: ScaleType, zero: Zero) -> Option<Self> {
        let columns = [128u8, 64, 32, 16].into_iter().find(|&c| group.is_multiple_of(usize::from(c)));
        let (columns, repeat) = match columns {
            Some(columns) if group < cols || group == usize::from(columns) => {
                (GroupSize::Columns(columns), group / usize::from(columns))
            }
            _ if group == cols => (GroupSize::Row, 1),
            _ => return None,
        };
        let ty = Grouped::new(codes, Scales::Groups { columns, scale, zero })?;
        Some(Carrier { ty, repeat })
    }
}

/// Rows in the form that [`kernels::pack_row_group_grouped`] takes.
#[derive(Debug, Default)]
pub(super) struct CodeRows {
    /// One code per byte, or two with the first in the low bits; row by row.
    pub(super) codes: Vec<u8>,
    /// Whether a byte has two codes.
    pub(super) nibbles: bool,
    /// Scale and zero or bias of each group, row by row.
    pub(super) scales: Vec<u8>,
    /// The factor of the scales, for types that have one.
    pub(super) factor: f32,
}

impl CodeRows {
    /// Appends the scale and the zero or bias of a group, as often as the type needs them.
    pub(super) fn add_group(&mut self, repeat: usize, scale: &[u8], beside: &[u8]) {
        for _ in 0..repeat {
            self.scales.extend_from_slice(scale);
            self.scales.extend_from_slice(beside);
        }
    }

    /// Packs all rows of `cols` columns.
    pub(super) fn pack(&self, ty: Grouped, cols: usize, groups: &mut Groups<'_>) {
        let scale_row = ty.scale_row(cols).expect("the plan has computed its length");
        let factors = [self.factor; ROW_GROUP];
        let scales = self.scales.chunks(ROW_GROUP * scale_row);
        let row = if self.nibbles { cols / 2 } else { cols };
        let pack = if self.nibbles { kernels::pack_row_group_nibbles } else { kernels::pack_row_group_grouped };
        for (g, (codes, scales)) in self.codes.chunks(ROW_GROUP * row).zip(scales).enumerate() {
            let n = codes.len() / row;
            let factors = if ty.has_row_factor() { &factors[..n] } else { &[] };
            pack(ty, codes, n, cols, scales, factors, groups.slot(g));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_any_size_that_types_can_make() {
        let of = |group, cols| {
            let carrier = Carrier::new(Codes::Uint(4), (group, cols), ScaleType::F16, Zero::Byte)?;
            let Scales::Groups { columns, .. } = carrier.ty.scales() else { return None };
            Some((columns, carrier.repeat))
        };
        assert_eq!(of(32, 64), Some((GroupSize::Columns(32), 1)));
        assert_eq!(of(256, 512), Some((GroupSize::Columns(128), 2)));
        assert_eq!(of(96, 192), Some((GroupSize::Columns(32), 3)));
        assert_eq!(of(512, 512), Some((GroupSize::Row, 1)));
        assert_eq!(of(128, 128), Some((GroupSize::Columns(128), 1)));
        assert_eq!(of(40, 40), Some((GroupSize::Row, 1)));
        assert_eq!(of(8, 64), None);
    }
}
