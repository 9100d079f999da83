//! Sectors: how the rows of a table lie in the file, so that single rows can be read and verified.
//!
//! A table is far larger than memory, and a token needs a few rows of it. The checksum of an extent does not help a reader of one
//! row, so a table consists of sectors, each with whole rows and their checksum. A sector has whole pages of 4096 bytes, the least
//! that drives and direct I/O move.

use sluice_checksum::xxh3_64_with_seed;

/// The length of a sector is a multiple of this, and so is its offset, in a file of any page size.
pub const SECTOR_ALIGN: usize = 4096;

/// Bytes of a sector's checksum, at the end of the sector.
const CHECKSUM_LEN: usize = 8;

/// The sectors of a table whose rows have a certain length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sectors {
    /// Bytes of a row.
    pub row_len: usize,
    /// Rows of a sector; the last of an extent may have fewer.
    pub rows: usize,
    /// Bytes of a sector.
    pub len: usize,
}

/// Which sector of a model this is. A sector that was read from a wrong place has the checksum of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SectorId {
    /// Layer of the table.
    pub layer: u32,
    /// Index of the extent.
    pub part: u32,
    /// Number in the extent.
    pub sector: u32,
}

impl SectorId {
    /// The seed of its checksum: layers have 12 bits, parts and the sectors of an extent 21 each.
    fn seed(self) -> u64 {
        u64::from(self.layer) << 42 ^ u64::from(self.part) << 21 ^ u64::from(self.sector)
    }
}

impl Sectors {
    /// The sectors for rows of `row_len` bytes; `None` if that is 0, or more than memory can have.
    pub fn of_rows(row_len: usize) -> Option<Sectors> {
        if row_len == 0 {
            return None;
        }
        let len = row_len.checked_add(CHECKSUM_LEN)?.checked_next_multiple_of(SECTOR_ALIGN)?;
        Some(Sectors { row_len, rows: (len - CHECKSUM_LEN) / row_len, len })
    }

    /// Bytes of the sectors of an extent with `rows` rows; `None` for more than memory can have.
    pub fn bytes(self, rows: usize) -> Option<usize> {
        rows.div_ceil(self.rows).checked_mul(self.len)
    }

    /// The sector of a row of an extent, and the place of its first byte there.
    pub fn place(self, row: usize) -> (usize, usize) {
        (row / self.rows, row % self.rows * self.row_len)
    }

    /// Writes the rows of a sector, [`Sectors::rows`] at most, to their places, with zeros behind them, and the checksum.
    ///
    /// # Panics
    /// Unless `sector` has the length of one, and the rows fit.
    pub fn seal(self, id: SectorId, rows: &[u8], sector: &mut [u8]) {
        assert!(sector.len() == self.len && rows.len() <= self.rows * self.row_len, "rows of one sector");
        let (body, sum) = sector.split_at_mut(self.len - CHECKSUM_LEN);
        body[..rows.len()].copy_from_slice(rows);
        body[rows.len()..].fill(0);
        sum.copy_from_slice(&xxh3_64_with_seed(body, id.seed()).to_le_bytes());
    }

    /// Compares the checksum of a sector with its bytes.
    ///
    /// # Errors
    /// The checksum that it states, and the one that its bytes have.
    ///
    /// # Panics
    /// Unless `sector` has the length of one.
    pub fn check(self, id: SectorId, sector: &[u8]) -> Result<(), (u64, u64)> {
        assert_eq!(sector.len(), self.len, "one sector");
        let (body, sum) = sector.split_at(self.len - CHECKSUM_LEN);
        let stated = u64::from_le_bytes(sum.try_into().expect("eight bytes"));
        let found = xxh3_64_with_seed(body, id.seed());
        if stated == found { Ok(()) } else { Err((stated, found)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{MAX_EXTENT_BYTES, MAX_EXTENTS, MAX_LAYERS};

    #[test]
    fn rows_fill_whole_pages() {
        let shape = |row_len| Sectors::of_rows(row_len).map(|s| (s.rows, s.len));
        assert_eq!([1, 8, 320, 4088].map(shape), [(4088, 4096), (511, 4096), (12, 4096), (1, 4096)].map(Some));
        assert_eq!([4089, 8184, 8185].map(shape), [(2, 8192), (1, 8192), (1, 12288)].map(Some));
        assert_eq!([0, usize::MAX].map(shape), [None, None]);
        let sectors = Sectors::of_rows(320).unwrap();
        assert_eq!([0, 11, 12, 25].map(|row| sectors.place(row)), [(0, 0), (0, 3520), (1, 0), (2, 320)]);
        assert_eq!([0, 1, 12, 13].map(|rows| sectors.bytes(rows)), [0, 4096, 4096, 8192].map(Some));
    }

    #[test]
    fn ids_have_seeds_of_their_own() {
        const { assert!(MAX_LAYERS <= 1 << 12 && MAX_EXTENTS <= 1 << 21) };
        const { assert!(MAX_EXTENT_BYTES / SECTOR_ALIGN as u64 <= 1 << 21) };
        let id = |layer, part, sector| SectorId { layer, part, sector }.seed();
        assert_ne!(id(1, 0, 0), id(0, 1, 0));
        assert_ne!(id(0, 1, 0), id(0, 0, 1));
        assert_ne!(id(0, 0, (1 << 21) - 1), id(0, 1, (1 << 21) - 1));
    }

    #[test]
    fn a_changed_or_displaced_sector_is_noticed() {
        let sectors = Sectors::of_rows(100).unwrap();
        let id = SectorId { layer: 2, part: 1, sector: 7 };
        let mut sector = vec![0xff; sectors.len];
        sectors.seal(id, &[7; 250], &mut sector);
        assert_eq!(sector[..250], [7; 250]);
        assert_eq!(sector[250..sectors.len - 8], [0; 4096 - 258]);
        assert_eq!(sectors.check(id, &sector), Ok(()));
        for other in [SectorId { layer: 3, ..id }, SectorId { part: 0, ..id }, SectorId { sector: 8, ..id }] {
            assert!(sectors.check(other, &sector).is_err());
        }
        for byte in [0, 249, 300, sectors.len - 1] {
            let mut damaged = sector.clone();
            damaged[byte] ^= 1;
            assert!(sectors.check(id, &damaged).is_err(), "byte {byte}");
        }
    }
}
