//! Where every expert is in the files.

use std::sync::Arc;

use super::policy::{Key, Shape};
use super::{PoolError, SlotPlan};
use crate::io::{
    Check, Class, ExtentName, ExtentRead, PAGE_BYTES, PendingRead, ReadFailure, Scheduler, Slot, StripeRead,
};

/// Where an extent is, and the checksum of its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentLocation {
    /// Index of the file; of an extent with several stripes, of that of the first.
    pub file: u16,
    /// Byte offset in the file, a multiple of the page size.
    pub offset: u64,
    /// Stored bytes, a multiple of the page size.
    pub len: u64,
    /// xxh3-64 of the stored bytes; of a compressed extent with several stripes it does not matter.
    pub checksum: u64,
    /// The decompressed bytes, if they are compressed.
    pub packed: Option<Packed>,
    /// Its stripes, if it has several.
    pub stripes: Option<Arc<[StripeRead]>>,
}

/// The decompressed bytes of a compressed extent ([`sluice_format::planes`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Bytes that mean something.
    pub logical_len: u64,
    /// Bytes in memory: those, then zeros up to the end of the page.
    pub padded_len: u64,
    /// xxh3-64 of the bytes in memory.
    pub checksum: u64,
}

impl ExtentLocation {
    /// Queues its read into a slot.
    pub(super) fn submit(
        &self,
        io: &Scheduler,
        slot: Slot,
        class: Class,
        check: Check,
        name: ExtentName,
    ) -> Result<PendingRead, ReadFailure> {
        let len = usize::try_from(self.len).unwrap_or(usize::MAX);
        let read =
            ExtentRead { file: self.file, offset: self.offset, len, checksum: self.checksum, class, check, name };
        match &self.stripes {
            None => io.submit(slot, read),
            Some(stripes) => io.submit_stripes(slot, read, stripes),
        }
    }

    /// Bytes in memory.
    #[must_use]
    pub fn memory_len(&self) -> u64 {
        self.packed.map_or(self.len, |packed| packed.padded_len)
    }

    /// xxh3-64 of the bytes in memory.
    #[must_use]
    pub fn memory_checksum(&self) -> u64 {
        self.packed.map_or(self.checksum, |packed| packed.checksum)
    }
}

/// A dense extent: where it is, and its name in messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DenseLocation {
    /// Where it is.
    pub extent: ExtentLocation,
    /// What it is.
    pub name: ExtentName,
}

impl DenseLocation {
    /// Queues its read into a slot.
    pub(super) fn submit(
        &self,
        io: &Scheduler,
        slot: Slot,
        class: Class,
        check: Check,
    ) -> Result<PendingRead, ReadFailure> {
        self.extent.submit(io, slot, class, check, self.name)
    }
}

/// One routed expert of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExpertKey {
    /// The model's layer, counted from 0 over all layers.
    pub layer: u32,
    /// The expert within the layer.
    pub expert: u32,
}

/// The locations of all experts. An expert's index is its policy key: only routed layers are counted, and each has room
/// for as many experts as the largest.
#[derive(Debug)]
pub struct ExpertDirectory {
    shape: Shape,
    /// By index; `None` if a layer has fewer experts than the largest.
    locations: Vec<Option<ExtentLocation>>,
    /// By layer of the model: the number of the routed layer.
    routed: Vec<Option<u32>>,
    /// By routed layer: the layer of the model.
    layers: Vec<u32>,
    experts: u32,
    /// By routed layer: bytes of the largest expert in memory.
    layer_bytes: Vec<usize>,
    slot_bytes: usize,
    staging_bytes: usize,
}

impl ExpertDirectory {
    /// Takes the locations, by layer of the model; layers without experts are empty.
    ///
    /// # Errors
    /// [`PoolError::Directory`] if there are too many experts, or one is empty or not whole
    /// pages long.
    pub fn new(layers: &[Vec<ExtentLocation>]) -> Result<Self, PoolError> {
        let refuse = |rule| PoolError::Directory { rule };
        let routed_layers: Vec<u32> = (0u32..).zip(layers).filter(|(_, l)| !l.is_empty()).map(|(i, _)| i).collect();
        let widest = layers.iter().map(Vec::len).max().unwrap_or(0);
        let count = widest.checked_mul(routed_layers.len()).filter(|&n| u32::try_from(n).is_ok());
        let count = count.ok_or_else(|| refuse("at most 2^32 - 1 experts"))?;
        let mut directory = Self {
            shape: Shape { layers: routed_layers.len() as u32, experts: widest as u32 },
            locations: vec![None; count],
            routed: vec![None; layers.len()],
            layers: routed_layers,
            experts: layers.iter().map(|l| l.len() as u32).sum(),
            layer_bytes: Vec::with_capacity(layers.len()),
            slot_bytes: 0,
            staging_bytes: 0,
        };
        for (number, &layer) in (0u32..).zip(&directory.layers) {
            directory.routed[layer as usize] = Some(number);
            directory.layer_bytes.push(0);
            for (expert, location) in (0u32..).zip(&layers[layer as usize]) {
                let len = usize::try_from(location.len).unwrap_or(usize::MAX);
                if len == 0 || !len.is_multiple_of(PAGE_BYTES) {
                    return Err(refuse("an expert's length has to be a multiple of 4096"));
                }
                let in_memory = usize::try_from(location.memory_len()).unwrap_or(usize::MAX);
                if in_memory == 0 || !in_memory.is_multiple_of(PAGE_BYTES) {
                    return Err(refuse("an expert's length in memory has to be a multiple of 4096"));
                }
                let largest = &mut directory.layer_bytes[number as usize];
                *largest = in_memory.max(*largest);
                directory.slot_bytes = directory.slot_bytes.max(in_memory);
                if location.packed.is_some() {
                    directory.staging_bytes = directory.staging_bytes.max(len);
                }
                directory.locations[directory.shape.key(number, expert).index()] = Some(location.clone());
            }
        }
        Ok(directory)
    }

    /// Routed layers and experts, as policies count them.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Experts in the model.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.experts
    }

    /// True for a model without routed experts.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.experts == 0
    }

    /// Bytes of a staging slot: the largest compressed expert's; 0 if none is compressed.
    #[must_use]
    pub fn staging_bytes(&self) -> usize {
        self.staging_bytes
    }

    /// Bytes of the largest expert in memory, and so of a slot that holds any.
    #[must_use]
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Bytes of the largest expert of every routed layer in memory.
    pub fn layer_bytes(&self) -> impl Iterator<Item = usize> {
        self.layer_bytes.iter().copied()
    }

    /// Slots that hold any expert, at most one for each.
    #[must_use]
    pub fn uniform_slots(&self, slots: usize) -> SlotPlan {
        SlotPlan::uniform(self.slot_bytes as u64, slots, self.experts as usize)
    }

    /// The number of a routed layer, counting only those.
    ///
    /// # Panics
    /// If the layer does not exist or has no experts.
    #[must_use]
    pub fn routed_layer(&self, layer: u32) -> u32 {
        let routed = self.routed.get(layer as usize).copied().flatten();
        routed.unwrap_or_else(|| panic!("the model has no experts in layer {layer}"))
    }

    /// The index of an expert.
    ///
    /// # Panics
    /// If there is no such expert.
    #[must_use]
    pub fn index(&self, key: ExpertKey) -> Key {
        let index = self.shape.key(self.routed_layer(key.layer), key.expert);
        assert!(self.locations[index.index()].is_some(), "layer {} has no expert {}", key.layer, key.expert);
        index
    }

    /// The indices of the experts of a layer of the model, ascending.
    ///
    /// # Panics
    /// If the layer does not exist or has no experts.
    pub fn indices_of(&self, layer: u32) -> impl Iterator<Item = Key> {
        let routed = self.routed_layer(layer);
        (0..self.shape.experts).map(move |expert| self.shape.key(routed, expert)).filter(|&index| self.exists(index))
    }

    /// The expert with this index.
    #[must_use]
    pub fn key(&self, index: Key) -> ExpertKey {
        let (layer, expert) = self.shape.expert(index);
        ExpertKey { layer: self.layers[layer as usize], expert }
    }

    /// Whether there is an expert with this index: layers can have fewer than the largest.
    #[must_use]
    pub fn exists(&self, index: Key) -> bool {
        self.locations[index.index()].is_some()
    }

    /// Where the expert with this index is.
    ///
    /// # Panics
    /// If there is no such expert.
    #[must_use]
    pub fn location(&self, index: Key) -> &ExtentLocation {
        self.locations[index.index()].as_ref().expect("an index comes from an expert that exists")
    }

    /// Sets the same stored bytes for every expert, whatever the files say. `packed` describes the decompressed bytes, if they are
    /// compressed.
    ///
    /// # Errors
    /// [`PoolError::Directory`] if an expert has another length in memory.
    #[cfg(feature = "sim")]
    pub(super) fn hold(&mut self, contents: &[u8], packed: Option<Packed>) -> Result<(), PoolError> {
        let checksum = sluice_checksum::xxh3_64(contents);
        let len = contents.len() as u64;
        for location in self.locations.iter_mut().flatten() {
            let stripes = location.stripes.as_deref().map(|stripes| hold_striped(stripes, contents));
            let held = ExtentLocation { len, checksum, packed, stripes, ..*location };
            if location.memory_len() != held.memory_len() {
                return Err(PoolError::Directory { rule: "on a simulated drive, all experts have one length" });
            }
            *location = held;
        }
        self.staging_bytes = if packed.is_some() && !self.is_empty() { contents.len() } else { 0 };
        Ok(())
    }

    /// Where the experts are: index of the file and range of bytes, in no order.
    #[cfg(feature = "sim")]
    pub(super) fn places(&self) -> Vec<(u16, std::ops::Range<u64>)> {
        let mut places = Vec::with_capacity(self.locations.len());
        for location in self.locations.iter().flatten() {
            match location.stripes.as_deref() {
                None => places.push((location.file, location.offset..location.offset + location.len)),
                Some(stripes) => places.extend(stripes.iter().map(|s| (s.file, s.offset..s.offset + s.len as u64))),
            }
        }
        places
    }

    /// Whether experts have stripes in several files.
    #[cfg(feature = "sim")]
    pub(super) fn is_striped(&self) -> bool {
        self.locations.iter().flatten().any(|location| location.stripes.is_some())
    }
}

/// The stripes of an expert that has other stored bytes than the files say: the same parts of them.
#[cfg(feature = "sim")]
fn hold_striped(stripes: &[StripeRead], contents: &[u8]) -> Arc<[StripeRead]> {
    let before: usize = stripes.iter().map(|stripe| stripe.len).sum();
    let (mut of_before, mut start) = (0, 0);
    let mut held = Vec::with_capacity(stripes.len());
    for stripe in stripes {
        of_before += stripe.len;
        let pages = (contents.len() / PAGE_BYTES) as u128 * of_before as u128 / before.max(1) as u128;
        let end = pages as usize * PAGE_BYTES;
        if end > start {
            let bytes = &contents[start..end];
            held.push(StripeRead { len: bytes.len(), checksum: sluice_checksum::xxh3_64(bytes), ..*stripe });
            start = end;
        }
    }
    held.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn location(len: u64) -> ExtentLocation {
        ExtentLocation { file: 0, offset: 0, len, checksum: 0, packed: None, stripes: None }
    }

    #[test]
    fn indices_and_keys_are_inverse_also_around_layers_without_experts() {
        let layers = [vec![], vec![location(4096); 3], vec![], vec![location(8192); 2]];
        let directory = ExpertDirectory::new(&layers).expect("valid");
        assert_eq!((directory.len(), directory.shape()), (5, Shape { layers: 2, experts: 3 }));
        assert_eq!(directory.slot_bytes(), 8192);
        for index in (0..5).map(Key) {
            assert_eq!(directory.index(directory.key(index)), index);
        }
        assert_eq!(directory.key(Key(3)), ExpertKey { layer: 3, expert: 0 });
        assert_eq!(directory.indices_of(3).collect::<Vec<_>>(), [Key(3), Key(4)]);
    }

    #[test]
    fn impossible_lengths_are_refused() {
        for len in [0, 1, 4097] {
            assert!(ExpertDirectory::new(&[vec![location(len)]]).is_err());
        }
    }
}
