//! What a file consists of, for reports.

use std::collections::BTreeMap;

use crate::extent::{Codec, ExtentKind, ExtentRecord};
use crate::reader::ModelFile;
use sluice_weights::WeightType;

/// The extents of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KindSize {
    /// The kind.
    pub kind: ExtentKind,
    /// How many extents.
    pub extents: usize,
    /// Their stored bytes.
    pub bytes: u64,
}

/// The tensors of one weight type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TypeSize {
    /// The type.
    pub weight_type: WeightType,
    /// Bytes of the tensors, in all extents that hold them.
    pub bytes: u64,
}

impl ModelFile {
    /// Extents and bytes of every kind that occurs, in the order of [`ExtentKind::ALL`].
    pub fn bytes_by_kind(&self) -> Vec<KindSize> {
        let size = |kind| {
            let (extents, bytes) = self.of_kind(kind).fold((0, 0), |(n, sum), e| (n + 1, sum + e.stored_len));
            KindSize { kind, extents, bytes }
        };
        ExtentKind::ALL.into_iter().map(size).filter(|s| s.extents > 0).collect()
    }

    /// Weight types of the tensors in extents of `kind`, with their bytes, in the order of their codes.
    pub fn weight_types(&self, kind: ExtentKind) -> Vec<TypeSize> {
        let mut sizes: BTreeMap<u16, TypeSize> = BTreeMap::new();
        for t in self.of_kind(kind).flat_map(|e| self.tensors_in(e.kind, e.layer, e.index)) {
            let nothing = TypeSize { weight_type: t.weight_type, bytes: 0 };
            sizes.entry(t.weight_type.code()).or_insert(nothing).bytes += t.len;
        }
        sizes.into_values().filter(|s| s.bytes > 0).collect()
    }

    /// Bytes of the files of all volumes.
    pub fn file_bytes(&self) -> u64 {
        self.volumes().iter().map(|volume| volume.superblock().file_len).sum()
    }

    /// Extents that are compressed.
    pub fn compressed_extents(&self) -> usize {
        self.extents().iter().filter(|e| e.codec != Codec::Raw).count()
    }

    /// The part of the stored bytes of experts that lies in each volume.
    pub fn expert_shares(&self) -> Vec<f64> {
        let mut bytes = vec![0u64; self.volumes().len()];
        for stripe in self.of_kind(ExtentKind::Expert).flat_map(|e| self.stripes(e)) {
            bytes[usize::from(stripe.volume)] += stripe.len;
        }
        let all = bytes.iter().sum::<u64>().max(1);
        bytes.into_iter().map(|bytes| bytes as f64 / all as f64).collect()
    }

    /// How many volumes have a part of an expert: the fewest and the most of any. `None` without experts. A volume whose share of an expert
    /// is less than a page may have nothing of it.
    pub fn volumes_per_expert(&self) -> Option<(usize, usize)> {
        let counts = || self.of_kind(ExtentKind::Expert).map(|e| self.stripes(e).len());
        Some((counts().min()?, counts().max()?))
    }

    /// Stored bytes of all extents.
    pub fn extent_bytes(&self) -> u64 {
        self.extents().iter().map(|e| e.stored_len).sum()
    }

    /// Stored bytes of the experts that one token routes to: what a token reads from the drive when nothing is
    /// cached.
    pub fn token_cycle_bytes(&self) -> u64 {
        let layers = self.spec().layers.iter().enumerate();
        let routed = layers.filter_map(|(i, l)| {
            // The experts of a layer share their tensor records, so they are equally long.
            let expert = self.extent(ExtentKind::Expert, i as u32, 0)?;
            Some(expert.stored_len * l.ffn.moe.as_ref()?.top_k as u64)
        });
        routed.sum()
    }

    fn of_kind(&self, kind: ExtentKind) -> impl Iterator<Item = &ExtentRecord> {
        self.extents().iter().filter(move |e| e.kind == kind)
    }
}
