//! Where every expert is in the files.

use super::PoolError;
use super::policy::ExpertIndex;
use crate::io::{ExtentName, PAGE_BYTES};

/// Where an extent is, and what its bytes have to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentLocation {
    /// Index of the file.
    pub file: u16,
    /// Byte offset in the file, a multiple of the page size.
    pub offset: u64,
    /// Stored bytes, a multiple of the page size.
    pub len: u64,
    /// xxh3-64 of the stored bytes.
    pub checksum: u64,
}

/// A dense extent: where it is, and its name in messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DenseLocation {
    /// Where it is.
    pub extent: ExtentLocation,
    /// What it is.
    pub name: ExtentName,
}

/// One routed expert of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExpertKey {
    /// The model's layer, counted from 0 over all layers.
    pub layer: u32,
    /// The expert within the layer.
    pub expert: u32,
}

/// The locations of all experts, by layer and expert.
#[derive(Debug)]
pub struct ExpertDirectory {
    locations: Vec<ExtentLocation>,
    keys: Vec<ExpertKey>,
    /// `first[l]` is the index of layer l's first expert; one more entry than layers.
    first: Vec<ExpertIndex>,
    slot_bytes: usize,
}

impl ExpertDirectory {
    /// Takes the locations, by layer of the model; layers without experts are empty.
    ///
    /// # Errors
    /// [`PoolError::Directory`] if there are too many experts, or one is empty or not whole
    /// pages long.
    pub fn new(layers: &[Vec<ExtentLocation>]) -> Result<Self, PoolError> {
        let refuse = |rule| PoolError::Directory { rule };
        let count: usize = layers.iter().map(Vec::len).sum();
        if u32::try_from(count).is_err() || u32::try_from(layers.len()).is_err() {
            return Err(refuse("at most 2^32 - 1 experts"));
        }
        let mut directory = Self {
            locations: Vec::with_capacity(count),
            keys: Vec::with_capacity(count),
            first: vec![0],
            slot_bytes: 0,
        };
        for (layer, experts) in layers.iter().enumerate() {
            for (expert, location) in experts.iter().enumerate() {
                let len = usize::try_from(location.len).unwrap_or(usize::MAX);
                if len == 0 || !len.is_multiple_of(PAGE_BYTES) {
                    return Err(refuse("an expert's length has to be a multiple of 4096"));
                }
                directory.slot_bytes = directory.slot_bytes.max(len);
                directory.locations.push(*location);
                directory.keys.push(ExpertKey { layer: layer as u32, expert: expert as u32 });
            }
            directory.first.push(directory.locations.len() as u32);
        }
        Ok(directory)
    }

    /// Experts in the model.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.locations.len() as u32
    }

    /// True for a model without routed experts.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.locations.is_empty()
    }

    /// Layers, with and without experts.
    #[must_use]
    pub fn layers(&self) -> u32 {
        (self.first.len() - 1) as u32
    }

    /// Bytes of a slot: the largest expert's.
    #[must_use]
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// The number of an expert in the whole model.
    ///
    /// # Panics
    /// If there is no such expert.
    #[must_use]
    pub fn index(&self, key: ExpertKey) -> ExpertIndex {
        let ExpertKey { layer, expert } = key;
        assert!(layer < self.layers(), "the model has no layer {layer}");
        let (first, end) = (self.first[layer as usize], self.first[layer as usize + 1]);
        assert!(expert < end - first, "layer {layer} has no expert {expert}");
        first + expert
    }

    /// The expert with this number.
    #[must_use]
    pub fn key(&self, index: ExpertIndex) -> ExpertKey {
        self.keys[index as usize]
    }

    /// Where the expert with this number is.
    #[must_use]
    pub fn location(&self, index: ExpertIndex) -> ExtentLocation {
        self.locations[index as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn location(len: u64) -> ExtentLocation {
        ExtentLocation { file: 0, offset: 0, len, checksum: 0 }
    }

    #[test]
    fn indices_and_keys_are_inverse_also_around_layers_without_experts() {
        let layers = [vec![], vec![location(4096); 3], vec![], vec![location(8192); 2]];
        let directory = ExpertDirectory::new(&layers).expect("valid");
        assert_eq!((directory.len(), directory.layers()), (5, 4));
        assert_eq!(directory.slot_bytes(), 8192);
        for index in 0..5 {
            assert_eq!(directory.index(directory.key(index)), index);
        }
        assert_eq!(directory.key(3), ExpertKey { layer: 3, expert: 0 });
    }

    #[test]
    fn impossible_lengths_are_refused() {
        for len in [0, 1, 4097] {
            assert!(ExpertDirectory::new(&[vec![location(len)]]).is_err());
        }
    }
}
