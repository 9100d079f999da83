//! The tensor table: what lies at which offset inside the extents of a kind.

use crate::bytes::{array, get_u16, get_u32, get_u64, put};
use crate::extent::ExtentKind;
use crate::weight::WeightType;

/// Bytes of one record of the tensor table.
pub const TENSOR_RECORD_LEN: usize = 128;
/// Longest canonical tensor name, in bytes.
pub const MAX_TENSOR_NAME: usize = 48;
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
    /// Index of the extent, or [`ANY_INDEX`].
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

impl TensorRecord {
    /// Bytes that shape, type and layout imply; `None` on overflow or for a type that the layout cannot hold.
    pub fn expected_len(&self) -> Option<u64> {
        let [batch, rows, cols] = self.shape.map(|d| usize::try_from(d).ok());
        let (batch, rows, cols) = (batch?, rows?, cols?);
        let one = match self.layout {
            Layout::Plain => rows.checked_mul(cols)?.checked_mul(self.weight_type.plain_element_len()?)?,
            Layout::Tiled => self.weight_type.matrix_len(rows, cols)?,
            Layout::TiledPair => self.weight_type.matrix_len(rows, cols)?.checked_mul(2)?,
        };
        u64::try_from(one.checked_mul(batch)?).ok()
    }

    /// Serialises to the table's record. The name must fit [`MAX_TENSOR_NAME`] (the writer's plan checks it).
    pub fn to_bytes(&self) -> [u8; TENSOR_RECORD_LEN] {
        let mut b = [0; TENSOR_RECORD_LEN];
        put(&mut b, 0, &(self.kind as u16).to_le_bytes());
        put(&mut b, 2, &(self.weight_type as u16).to_le_bytes());
        put(&mut b, 4, &(self.layout as u16).to_le_bytes());
        put(&mut b, 8, &self.layer.to_le_bytes());
        put(&mut b, 12, &self.index.to_le_bytes());
        for (i, d) in self.shape.iter().enumerate() {
            put(&mut b, 16 + 8 * i, &d.to_le_bytes());
        }
        put(&mut b, 40, &self.offset.to_le_bytes());
        put(&mut b, 48, &self.len.to_le_bytes());
        put(&mut b, 64, self.name.as_bytes());
        b
    }

    /// Parses one record; `Err` says what is wrong with it.
    pub(crate) fn parse(b: &[u8]) -> Result<Self, String> {
        let (kind, ty, layout) = (get_u16(b, 0), get_u16(b, 2), get_u16(b, 4));
        if b[6..8].iter().chain(&b[56..64]).chain(&b[112..128]).any(|&x| x != 0) {
            return Err("its reserved bytes are in use".into());
        }
        let name: [u8; MAX_TENSOR_NAME] = array(b, 64);
        let end = name.iter().position(|&c| c == 0).unwrap_or(MAX_TENSOR_NAME);
        if end == 0 || !name[..end].iter().all(|c| c.is_ascii_graphic()) || name[end..].iter().any(|&c| c != 0) {
            return Err("its name is not printable ASCII".into());
        }
        Ok(TensorRecord {
            kind: ExtentKind::from_code(kind).ok_or_else(|| format!("its extent kind {kind} is unknown"))?,
            weight_type: WeightType::from_code(ty).ok_or_else(|| format!("its weight type {ty} is unknown"))?,
            layout: match layout {
                0 => Layout::Plain,
                1 => Layout::Tiled,
                2 => Layout::TiledPair,
                other => return Err(format!("its layout {other} is unknown")),
            },
            layer: get_u32(b, 8),
            index: get_u32(b, 12),
            shape: [get_u64(b, 16), get_u64(b, 24), get_u64(b, 32)],
            offset: get_u64(b, 40),
            len: get_u64(b, 48),
            name: name[..end].iter().map(|&c| c as char).collect(),
        })
    }
}
