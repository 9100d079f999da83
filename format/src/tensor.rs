//! The tensor table: what lies at which offset inside the extents of a kind.

use crate::bytes::{array, get_u16, get_u32, get_u64, put, round_up};
use crate::extent::ExtentKind;
use crate::fields::{reserved_in_use, tensor as at};
use crate::sectors::Sectors;
use sluice_weights::{PLANE_ALIGN, WeightType};

/// `index` of a record that describes every extent of its kind and layer: the experts of a layer share one.
pub const ANY_INDEX: u32 = u32::MAX;

/// How the elements of a tensor are arranged. The discriminant is the code in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Layout {
    /// Row-major, no padding.
    Plain = 0,
    /// Row groups of 8 (`docs/LAYOUT.md`). Shape `[batch, rows, cols]`: `batch` matrices one after the other.
    Tiled = 1,
    /// As `Tiled`, but the row groups of two matrices of `rows` rows alternate: gate, up, gate, up, …
    TiledPair = 2,
    /// As `Tiled`, behind the order of the columns: [`order_len`] bytes.
    TiledOrdered = 3,
    /// As `TiledPair`, behind the order of the columns of both.
    TiledPairOrdered = 4,
    /// Row-major, in sectors of whole rows with a checksum each ([`crate::sectors`]).
    Sectors = 5,
}

/// Most columns of a matrix with an ordered layout: the numbers of columns have 16 bits.
pub const MAX_ORDERED_COLS: usize = 1 << 16;

/// Bytes before the matrices of an ordered layout: for each stored column the number of the input feature that it meets, u16,
/// and zeros up to a multiple of 64. `None`: there are more columns than numbers of 16 bits.
pub fn order_len(cols: usize) -> Option<usize> {
    (cols <= MAX_ORDERED_COLS).then(|| (2 * cols).next_multiple_of(PLANE_ALIGN))
}

impl Layout {
    /// Every layout of this format version.
    pub const ALL: [Layout; 6] = [
        Layout::Plain,
        Layout::Tiled,
        Layout::TiledPair,
        Layout::TiledOrdered,
        Layout::TiledPairOrdered,
        Layout::Sectors,
    ];

    /// The layout with this code in the file, if this version knows it.
    pub fn from_code(code: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|l| *l as u16 == code)
    }

    /// The name used in reports.
    pub fn name(self) -> &'static str {
        match self {
            Layout::Plain => "plain",
            Layout::Tiled => "tiled",
            Layout::TiledPair => "tiled-pair",
            Layout::TiledOrdered => "tiled-ordered",
            Layout::TiledPairOrdered => "tiled-pair-ordered",
            Layout::Sectors => "sectors",
        }
    }

    /// Whether two matrices alternate.
    pub fn is_pair(self) -> bool {
        matches!(self, Layout::TiledPair | Layout::TiledPairOrdered)
    }

    /// Whether the columns have an order of their own, which is stored before them.
    pub fn is_ordered(self) -> bool {
        self != self.unordered()
    }

    /// The same arrangement without an order of the columns.
    pub fn unordered(self) -> Layout {
        match self {
            Layout::TiledOrdered => Layout::Tiled,
            Layout::TiledPairOrdered => Layout::TiledPair,
            other => other,
        }
    }

    /// The same arrangement with an order of the columns; `None` for row-major arrangements, which need none.
    pub fn ordered(self) -> Option<Layout> {
        match self {
            Layout::Plain | Layout::Sectors => None,
            Layout::Tiled | Layout::TiledOrdered => Some(Layout::TiledOrdered),
            Layout::TiledPair | Layout::TiledPairOrdered => Some(Layout::TiledPairOrdered),
        }
    }
}

/// One tensor: name, type, shape and place inside its extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorRecord {
    /// Kind of the extents that hold the tensor.
    pub kind: ExtentKind,
    /// Stored type.
    pub weight_type: WeightType,
    /// Arrangement.
    pub layout: Layout,
    /// Layer of those extents, or [`crate::NO_LAYER`].
    pub layer: u32,
    /// Index of the extent; [`ANY_INDEX`] for experts, and only for them.
    pub index: u32,
    /// `[batch, rows, cols]`; vectors are `[1, 1, n]`, matrices `[1, rows, cols]`.
    pub shape: [u64; 3],
    /// Byte offset inside the extent, a multiple of 64.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Canonical name, such as `gate_up`.
    pub name: String,
}

/// Whether a record can carry this name.
pub(crate) fn is_tensor_name(name: &[u8]) -> bool {
    (1..=at::NAME_LEN).contains(&name.len()) && name.iter().all(u8::is_ascii_graphic)
}

/// Gives the tensors of one extent their lengths and offsets: in the given order, each at the next multiple of 64.
/// Returns the extent's logical length; `Err` names the tensor whose type or size is impossible.
pub fn pack_tensors(tensors: &mut [TensorRecord]) -> Result<u64, String> {
    let mut end = 0;
    for t in tensors {
        let place = next_tensor_offset(end).zip(t.expected_len());
        let placed = place.and_then(|(offset, len)| Some((offset, len, offset.checked_add(len)?)));
        (t.offset, t.len, end) = placed.ok_or_else(|| {
            format!("`{}` of shape {:?} cannot be stored as {} {}", t.name, t.shape, t.layout.name(), t.weight_type)
        })?;
    }
    Ok(end)
}

/// Where the next tensor begins after one that ends at `end`.
pub(crate) fn next_tensor_offset(end: u64) -> Option<u64> {
    round_up(end, PLANE_ALIGN as u64)
}

impl TensorRecord {
    /// Numbers in the tensor, those of both matrices of a pair.
    pub fn weights(&self) -> u64 {
        let pair = if self.layout.is_pair() { 2 } else { 1 };
        self.shape.iter().fold(pair, |product, &size| product.saturating_mul(size))
    }

    /// Bytes that shape, type and layout imply; `None` on overflow or for a type that the layout cannot hold.
    pub fn expected_len(&self) -> Option<u64> {
        let [batch, rows, cols] = self.shape.map(|d| usize::try_from(d).ok());
        let (batch, rows, cols) = (batch?, rows?, cols?);
        let one = match self.layout.unordered() {
            Layout::Plain => rows.checked_mul(cols)?.checked_mul(self.weight_type.plain_element_len()?)?,
            Layout::Sectors => {
                Sectors::of_rows(cols.checked_mul(self.weight_type.plain_element_len()?)?)?.bytes(rows)?
            }
            Layout::TiledPair => self.weight_type.matrix_len(rows, cols)?.checked_mul(2)?,
            _ => self.weight_type.matrix_len(rows, cols)?,
        };
        let order = if self.layout.is_ordered() { order_len(cols)? } else { 0 };
        u64::try_from(one.checked_mul(batch)?.checked_add(order)?).ok()
    }

    /// Serialises to the table's record. The name must fit [`at::NAME_LEN`] (the writer's plan checks it).
    pub fn to_bytes(&self) -> [u8; at::LEN] {
        let mut b = [0; at::LEN];
        put(&mut b, at::KIND, &(self.kind as u16).to_le_bytes());
        put(&mut b, at::WEIGHT_TYPE, &(self.weight_type.code()).to_le_bytes());
        put(&mut b, at::LAYOUT, &(self.layout as u16).to_le_bytes());
        put(&mut b, at::LAYER, &self.layer.to_le_bytes());
        put(&mut b, at::INDEX, &self.index.to_le_bytes());
        for (at, d) in [at::BATCH, at::ROWS, at::COLS].into_iter().zip(self.shape) {
            put(&mut b, at, &d.to_le_bytes());
        }
        put(&mut b, at::OFFSET, &self.offset.to_le_bytes());
        put(&mut b, at::BYTES, &self.len.to_le_bytes());
        put(&mut b, at::NAME, self.name.as_bytes());
        b
    }

    /// Parses one record; `Err` says what is wrong with it.
    pub(crate) fn parse(b: &[u8]) -> Result<Self, String> {
        let (kind, ty, layout) = (get_u16(b, at::KIND), get_u16(b, at::WEIGHT_TYPE), get_u16(b, at::LAYOUT));
        if reserved_in_use(&at::FIELDS, b) {
            return Err("its reserved bytes are in use".into());
        }
        let name: [u8; at::NAME_LEN] = array(b, at::NAME);
        let end = name.iter().position(|&c| c == 0).unwrap_or(at::NAME_LEN);
        if !is_tensor_name(&name[..end]) || name[end..].iter().any(|&c| c != 0) {
            return Err("its name is not printable ASCII".into());
        }
        Ok(TensorRecord {
            kind: ExtentKind::from_code(kind).ok_or_else(|| format!("its extent kind {kind} is unknown"))?,
            weight_type: WeightType::from_code(ty).ok_or_else(|| format!("its weight type {ty} is unknown"))?,
            layout: Layout::from_code(layout).ok_or_else(|| format!("its layout {layout} is unknown"))?,
            layer: get_u32(b, at::LAYER),
            index: get_u32(b, at::INDEX),
            shape: [get_u64(b, at::BATCH), get_u64(b, at::ROWS), get_u64(b, at::COLS)],
            offset: get_u64(b, at::OFFSET),
            len: get_u64(b, at::BYTES),
            name: name[..end].iter().map(|&c| c as char).collect(),
        })
    }
}
