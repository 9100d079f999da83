//! The places of extents in the files of a model.

use crate::bytes::round_up;
use crate::catalog::Catalog;
use crate::error::{FormatError, Region};
use crate::extent::{Codec, ExtentKind, ExtentRecord, padded_len};
use crate::fields;
use crate::limits::{MAX_SPEC_BYTES, MAX_VOLUMES};
use crate::spec::ModelSpec;
use crate::stripes::{ExtentTable, Placed, Shares, Stripe};
use crate::superblock::PAGE_SIZES;
use crate::tensor::{TensorRecord, is_tensor_name};

/// An extent before it has a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedExtent {
    /// What it holds.
    pub kind: ExtentKind,
    /// Layer or [`crate::NO_LAYER`].
    pub layer: u32,
    /// Expert or part.
    pub index: u32,
    /// Bytes that mean something.
    pub logical_len: u64,
}

/// The place of every extent before compression: one after the other from the second page on, with the tables behind them, in one
/// file or in volumes of limited length.
#[derive(Clone, Debug)]
pub struct FileLayout {
    page_size: u32,
    extents: Vec<ExtentRecord>,
    /// Of each volume, where its last extent ends.
    ends: Vec<u64>,
    /// Most bytes of extents in a volume, and its superblock; none for one file.
    room: Option<u64>,
    /// How extents are striped over volumes, if they are.
    shares: Option<Shares>,
    /// If they are: where each extent begins in each volume.
    starts: Vec<Vec<u64>>,
}

impl FileLayout {
    /// Places the extents in the given order, which becomes file order, in one file.
    ///
    /// # Errors
    /// [`FormatError::Layout`] for a page size that the format does not allow, or more than 2^64 bytes.
    pub fn new(page_size: u32, planned: &[PlannedExtent]) -> Result<Self, FormatError> {
        if !PAGE_SIZES.contains(&page_size) {
            return Err(FormatError::Layout(format!("the page size must be one of {PAGE_SIZES:?}, not {page_size}")));
        }
        let mut extents = Vec::with_capacity(planned.len());
        for p in planned {
            let stored_len = padded_len(p.logical_len, page_size).ok_or_else(too_long)?;
            extents.push(ExtentRecord {
                kind: p.kind,
                codec: Codec::Raw,
                layer: p.layer,
                index: p.index,
                volume: 0,
                offset: 0,
                stored_len,
                logical_len: p.logical_len,
                checksum: 0,
                logical_checksum: 0,
                padded_len: stored_len,
            });
        }
        let ends = Vec::new();
        let mut layout = FileLayout { page_size, extents, ends, room: None, shares: None, starts: Vec::new() };
        layout.place()?;
        Ok(layout)
    }

    /// The same extents in volumes of at most `most` bytes, if the tables and metadata of each take at most `tables` bytes. A model
    /// that fits into one volume has one.
    ///
    /// # Errors
    /// [`FormatError::VolumeSize`] if an extent fits into no volume, or there would be more volumes than the format allows.
    pub fn split(mut self, most: u64, tables: u64) -> Result<Self, FormatError> {
        let room = most.saturating_sub(tables);
        let least = self.least_room()?;
        if room < least {
            let least = least.checked_add(tables).ok_or_else(too_long)?;
            return Err(FormatError::VolumeSize { most, least });
        }
        self.room = Some(room);
        self.place()?;
        Ok(self)
    }

    /// The same extents striped over volumes.
    ///
    /// # Errors
    /// [`FormatError::Layout`] for more than 2^64 bytes.
    pub fn stripe(mut self, shares: Shares) -> Result<Self, FormatError> {
        self.room = None;
        self.shares = Some(shares);
        self.place()?;
        Ok(self)
    }

    /// How extents are striped over volumes, if they are.
    pub fn shares(&self) -> Option<&Shares> {
        self.shares.as_ref()
    }

    /// The stripes of an extent before others are moved together: where an extent of `stored_len` bytes is first written. Their
    /// checksums are 0.
    pub fn stripes(&self, number: usize, stored_len: u64) -> Vec<Stripe> {
        let ExtentRecord { kind, index, volume, offset, .. } = self.extents[number];
        match &self.shares {
            None => vec![Stripe { volume, offset, len: stored_len, checksum: 0 }],
            Some(shares) => striped(&shares.lens(kind, index, stored_len, self.page_size), &self.starts[number]),
        }
    }

    /// The least room per volume with which every extent fits into a volume, and all extents fit into the largest number of volumes
    /// allowed. More room never needs more volumes, because they are filled in order.
    fn least_room(&self) -> Result<u64, FormatError> {
        let page = u64::from(self.page_size);
        let longest = self.extents.iter().map(|e| e.stored_len).max().unwrap_or(0);
        let end = self.ends.iter().try_fold(0u64, |sum, end| sum.checked_add(*end)).ok_or_else(too_long)?;
        let mut least = round_up(longest, page).and_then(|len| len.checked_add(page)).ok_or_else(too_long)?;
        let mut enough = end.max(least);
        while least < enough {
            let room = least + (enough - least) / 2;
            if self.volumes(room) <= MAX_VOLUMES { enough = room } else { least = room + 1 }
        }
        Ok(least)
    }

    /// Number of volumes with this much room that hold all extents; `None` if an extent is too long for one.
    fn volumes(&self, room: u64) -> usize {
        let page = u64::from(self.page_size);
        let (mut volumes, mut end) = (1, page);
        for e in &self.extents {
            end += e.stored_len;
            if end > room {
                volumes += 1;
                end = page + e.stored_len;
            }
        }
        volumes
    }

    fn place(&mut self) -> Result<(), FormatError> {
        let mut placer = self.placer();
        self.starts.clear();
        for e in &mut self.extents {
            if self.shares.is_some() {
                self.starts.push(placer.ends.clone());
            }
            let first = placer.next(e, e.stored_len)?[0];
            (e.volume, e.offset) = (first.volume, first.offset);
        }
        self.ends = placer.ends;
        Ok(())
    }

    /// Gives extents their places, from the first on.
    pub(crate) fn placer(&self) -> Placer {
        let volumes = self.shares.as_ref().map_or(1, Shares::volumes);
        let ends = vec![u64::from(self.page_size); volumes];
        Placer { ends, page_size: self.page_size, room: self.room, shares: self.shares.clone() }
    }

    /// Checks that extents, tensors and spec make a file that [`crate::ModelFile`] opens, before hours are spent on its bytes.
    ///
    /// # Errors
    /// [`FormatError::Layout`].
    pub fn check(&self, tensors: &[TensorRecord], spec: &ModelSpec) -> Result<(), FormatError> {
        let placed = |(number, record): (usize, &ExtentRecord)| {
            let stripes = self.stripes(number, record.stored_len);
            Placed { record: *record, stripes }
        };
        let table = ExtentTable::of_placed(self.extents.iter().enumerate().map(placed).collect());
        self.check_as(table, tensors, spec)
    }

    /// The same check for extents that have been written.
    pub(crate) fn check_as(
        &self,
        table: ExtentTable,
        tensors: &[TensorRecord],
        spec: &ModelSpec,
    ) -> Result<(), FormatError> {
        if let Some(t) = tensors.iter().find(|t| !is_tensor_name(t.name.as_bytes())) {
            return Err(FormatError::Layout(format!("the tensor name `{}` does not fit", t.name)));
        }
        spec.validate().map_err(|e| layout_error(Region::Metadata, &e))?;
        if spec.to_json().len() > MAX_SPEC_BYTES {
            return Err(layout_error(Region::Metadata, "its spec is too long"));
        }
        Catalog::new(self.page_size, table, tensors.to_vec(), spec.clone())
            .map(drop)
            .map_err(|(region, problem)| layout_error(region, &problem))
    }

    /// The extents with their places before compression; their checksums are still 0.
    pub fn extents(&self) -> &[ExtentRecord] {
        &self.extents
    }

    /// Page size in bytes.
    pub fn page_size(&self) -> u32 {
        self.page_size
    }

    /// Of each volume, where its last extent ends before compression; tables and metadata follow.
    pub fn ends(&self) -> &[u64] {
        &self.ends
    }

    /// Stored bytes of all extents before compression.
    pub fn extent_bytes(&self) -> u64 {
        self.extents.iter().map(|e| e.stored_len).sum()
    }

    /// Bytes of extent table and tensor table of a file with this many tensors.
    pub fn table_bytes(&self, tensors: usize) -> u64 {
        let page = self.page_size as usize;
        // Of a striped model, as many records as an extent can have stripes.
        let records = self.extents.len() * self.shares.as_ref().map_or(1, Shares::volumes);
        let tables = [records * fields::extent::LEN, tensors * fields::tensor::LEN];
        tables.iter().map(|len| len.max(&1).next_multiple_of(page) as u64).sum()
    }
}

/// Gives extents places, one after the other.
#[derive(Clone, Debug)]
pub(crate) struct Placer {
    /// Of each volume so far, where its last extent ends.
    pub(crate) ends: Vec<u64>,
    page_size: u32,
    room: Option<u64>,
    shares: Option<Shares>,
}

impl Placer {
    /// The stripes of an extent with this many stored bytes, without checksums; at least one.
    pub(crate) fn next(&mut self, extent: &ExtentRecord, stored_len: u64) -> Result<Vec<Stripe>, FormatError> {
        let Some(shares) = &self.shares else {
            let (volume, offset) = self.whole(extent, stored_len)?;
            return Ok(vec![Stripe { volume, offset, len: stored_len, checksum: 0 }]);
        };
        let lens = shares.lens(extent.kind, extent.index, stored_len, self.page_size);
        let stripes = striped(&lens, &self.ends);
        for (end, len) in self.ends.iter_mut().zip(lens) {
            *end = end.checked_add(len).ok_or_else(too_long)?;
        }
        Ok(stripes)
    }

    /// The volume and the offset of an extent that is not divided.
    fn whole(&mut self, extent: &ExtentRecord, stored_len: u64) -> Result<(u16, u64), FormatError> {
        let page = u64::from(self.page_size);
        let last = self.ends.len() - 1;
        let end = self.ends[last].checked_add(stored_len).ok_or_else(too_long)?;
        if self.room.is_none_or(|room| end <= room) {
            return Ok((last as u16, std::mem::replace(&mut self.ends[last], end)));
        }
        let first = round_up(stored_len, page).and_then(|len| len.checked_add(page)).ok_or_else(too_long)?;
        if self.room.is_some_and(|room| first > room) {
            let name = extent.name();
            return Err(FormatError::Layout(format!(
                "{name} has {stored_len} bytes, which do not fit into one volume: let volumes be longer"
            )));
        }
        if self.ends.len() == MAX_VOLUMES {
            return Err(FormatError::Layout(format!(
                "there would be more than {MAX_VOLUMES} volumes: let them be longer"
            )));
        }
        self.ends.push(first);
        Ok((last as u16 + 1, page))
    }
}

/// Stripes of these lengths at these offsets, by volume.
fn striped(lens: &[u64], offsets: &[u64]) -> Vec<Stripe> {
    let stripes = (0..).zip(lens.iter().zip(offsets));
    let stripe = |(volume, (&len, &offset))| (len > 0).then_some(Stripe { volume, offset, len, checksum: 0 });
    stripes.filter_map(stripe).collect()
}

pub(crate) fn too_long() -> FormatError {
    FormatError::Layout("the file would be longer than 2^64 bytes".into())
}

pub(crate) fn layout_error(region: Region, problem: &str) -> FormatError {
    FormatError::Layout(format!("the {region} is invalid: {problem}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::NO_LAYER;

    const PAGE: u64 = 4096;

    fn layout(pages: &[u64]) -> FileLayout {
        let planned = (0..).zip(pages).map(|(index, pages)| PlannedExtent {
            kind: ExtentKind::Head,
            layer: NO_LAYER,
            index,
            logical_len: pages * PAGE,
        });
        FileLayout::new(PAGE as u32, &planned.collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn the_least_volume_that_is_named_is_the_least_that_does() {
        let many = MAX_VOLUMES as u64;
        let mut mixed: Vec<u64> = (0..3 * many).map(|n| 1 + n * n % 7).collect();
        mixed[1000] = 31;
        for (pages, least) in [
            (vec![3, 7, 1], 8),
            (vec![1; MAX_VOLUMES], 2),
            // One volume more takes all but one of the others to have room for two.
            (vec![1; MAX_VOLUMES + 1], 3),
            (vec![1; 3 * MAX_VOLUMES], 4),
            (mixed, 32),
        ] {
            let refused = layout(&pages).split(0, 5 * PAGE).unwrap_err();
            let FormatError::VolumeSize { most: 0, least: named } = refused else { panic!("{refused}") };
            assert_eq!(named, (least + 5) * PAGE);
            let split = layout(&pages).split(named, 5 * PAGE).unwrap();
            assert!(split.ends().len() <= MAX_VOLUMES && split.ends().iter().all(|end| end + 5 * PAGE <= named));
            assert!(layout(&pages).split(named - 1, 5 * PAGE).is_err());
        }
    }
}
