//! Presents the tensors of a file as those of the original checkpoint.

use std::sync::Arc;

use super::arch::Arch;
use super::config::{Described, Ngrams};
use super::container::Tensor;
use super::metadata::Problem;
use super::names::{Change, rename};
use crate::error::ConvertError;
use crate::source::{Dtype, GgmlType, RowOrder, SourceTensor};
use sluice_kernels::{bf16_to_f32, f16_to_f32};

/// Most bytes of a vector that is read to be changed: enough for any width.
const MAX_VECTOR: u64 = 1 << 20;

/// Factors of LongRoPE, which become part of the configuration.
pub(super) const SHORT_FACTORS: &str = "rope_factors_short.weight";
pub(super) const LONG_FACTORS: &str = "rope_factors_long.weight";

/// Reads all bytes of a tensor.
pub(super) type ReadTensor<'a> = &'a dyn Fn(&Tensor) -> Result<Vec<u8>, ConvertError>;

/// The numbers of a vector in a type that vectors have; `None` for other types, and if it is too long.
pub(super) fn vector(tensor: &Tensor, read: ReadTensor<'_>) -> Result<Option<Vec<f32>>, ConvertError> {
    if tensor.len > MAX_VECTOR || !matches!(tensor.ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16) {
        return Ok(None);
    }
    let bytes = read(tensor)?;
    let halves = || bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b));
    Ok(Some(match tensor.ty {
        GgmlType::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        GgmlType::F16 => halves().map(f16_to_f32).collect(),
        _ => halves().map(bf16_to_f32).collect(),
    }))
}

/// The tensors made from one file.
pub(super) struct Table<'a> {
    pub(super) arch: Arch,
    pub(super) described: &'a Described,
    /// Index of the file.
    pub(super) file: usize,
    pub(super) read: ReadTensor<'a>,
}

impl Table<'_> {
    /// The checkpoint's tensors for `tensor`. One that llama.cpp's converter does not write keeps its name, and the plan refuses
    /// it.
    pub(super) fn entries(&self, tensor: &Tensor) -> Result<Vec<SourceTensor>, ConvertError> {
        match (tensor.name.as_str(), &self.described.ngrams) {
            (SHORT_FACTORS | LONG_FACTORS, _) if self.arch == Arch::PhiMoe => return Ok(Vec::new()),
            ("per_layer_token_embd.weight", Some(ngrams)) => return Ok(self.ngram_table(tensor, ngrams)),
            _ => {}
        }
        let Some(renamed) = rename(self.arch, &self.described.linear, &tensor.name) else {
            return Ok(vec![self.entry(tensor, tensor.name.clone())]);
        };
        let mut entry = self.entry(tensor, renamed.name);
        match (renamed.change, tensor.shape.as_slice()) {
            (Change::Queries | Change::Keys, _) if self.arch.interleaves() => {
                let of_queries = renamed.change == Change::Queries;
                self.interleave(tensor, &mut entry, of_queries)?;
            }
            (Change::Fused, _) => return self.split(tensor, entry),
            (Change::OneRow, &[n]) => entry.shape = vec![1, n],
            (Change::Flat, &[rows, cols]) => entry.shape = vec![rows.saturating_mul(cols)],
            (Change::Convolution, &[channels, width] | &[1, channels, 1, width]) => {
                entry.shape = vec![channels, 1, width];
            }
            (Change::Heads, &[rows, cols]) if rows.is_multiple_of(self.described.heads) => {
                entry.shape = vec![self.described.heads, rows / self.described.heads, cols];
            }
            (Change::NegativeExponential, _) => {
                if let Some(numbers) = vector(tensor, self.read)? {
                    derive(&mut entry, numbers.iter().map(|&a| (-a).ln()).collect());
                    if self.arch == Arch::KimiLinear {
                        entry.shape = vec![1, 1, numbers.len(), 1];
                    }
                }
            }
            _ => {}
        }
        Ok(vec![entry])
    }

    /// A table of n-grams, with the numbers that select its rows.
    fn ngram_table(&self, tensor: &Tensor, ngrams: &Ngrams) -> Vec<SourceTensor> {
        let name = |rest: &str| format!("model.layers.{}.ple.ple_embedding.{rest}", ngrams.layer);
        let mut entries = vec![self.entry(tensor, name("ngram_embedding.shard_0.weight"))];
        for (rest, numbers) in &ngrams.numbers {
            let bytes: Arc<[u8]> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
            entries.push(SourceTensor {
                dtype: Dtype::from_name("I64"),
                shape: vec![numbers.len()],
                len: bytes.len() as u64,
                start: 0,
                derived: Some(bytes),
                ..self.entry(tensor, name(rest))
            });
        }
        entries
    }

    fn entry(&self, tensor: &Tensor, name: String) -> SourceTensor {
        SourceTensor {
            name,
            file: self.file,
            dtype: Dtype::from_ggml(tensor.ty),
            shape: tensor.shape.clone(),
            len: tensor.len,
            indexed: true,
            start: tensor.start,
            order: RowOrder::AsStored,
            derived: None,
        }
    }

    /// Undoes the alternation of the halves of heads: for a matrix by the order of reading its rows, for a bias at once.
    fn interleave(&self, tensor: &Tensor, entry: &mut SourceTensor, of_queries: bool) -> Result<(), ConvertError> {
        let heads = if of_queries { self.described.heads } else { self.described.kv_heads };
        let rows = entry.shape[0];
        let head_rows = rows / heads;
        if !rows.is_multiple_of(heads) || !head_rows.is_multiple_of(2) || head_rows == 0 {
            // The plan refuses its shape.
            return Ok(());
        }
        let order = RowOrder::Interleaved { head_rows };
        match entry.shape.len() {
            1 => {
                let whole = vector(tensor, self.read)?;
                let first = ((entry.start - tensor.start) / tensor.ty.block_bytes() as u64) as usize;
                if let Some(part) = whole.as_deref().and_then(|all| all.get(first..first + rows)) {
                    derive(entry, (0..rows).map(|row| part[order.stored(row)]).collect());
                }
            }
            2 => entry.order = order,
            _ => {}
        }
        Ok(())
    }

    /// Separates queries, keys and values from one tensor: rows of a matrix, or elements of a bias, one after the other.
    fn split(&self, tensor: &Tensor, queries: SourceTensor) -> Result<Vec<SourceTensor>, ConvertError> {
        let rows = tensor.shape[0];
        // Layers that predict further tokens are as the last of the others, as far as that matters: they are left out.
        let kv_rows = &self.described.kv_rows;
        let layer = tensor.name.split('.').nth(1).and_then(|number| number.parse::<usize>().ok());
        let [of_keys, of_values] =
            layer.and_then(|layer| kv_rows.get(layer)).or(kv_rows.last()).copied().unwrap_or_default();
        let Some(of_queries) = rows.checked_sub(of_keys.saturating_add(of_values)).filter(|&n| n > 0) else {
            return Ok(vec![self.entry(tensor, tensor.name.clone())]);
        };
        let row_bytes = tensor.len / rows as u64;
        let mut parts = Vec::new();
        let mut first = 0;
        for (module, count) in [("q_proj", of_queries), ("k_proj", of_keys), ("v_proj", of_values)] {
            let mut shape = tensor.shape.clone();
            shape[0] = count;
            let mut part = SourceTensor {
                name: queries.name.replace("q_proj", module),
                start: tensor.start + first * row_bytes,
                len: count as u64 * row_bytes,
                shape,
                ..queries.clone()
            };
            first += count as u64;
            if self.arch.interleaves() && module != "v_proj" {
                self.interleave(tensor, &mut part, module == "q_proj")?;
            }
            parts.push(part);
        }
        Ok(parts)
    }
}

/// Gives a tensor numbers that are not in any file.
fn derive(entry: &mut SourceTensor, numbers: Vec<f32>) {
    let bytes: Arc<[u8]> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    entry.dtype = Dtype::F32;
    entry.shape = vec![numbers.len()];
    entry.len = bytes.len() as u64;
    entry.start = 0;
    entry.derived = Some(bytes);
}

/// Refuses two tensors that become the same one of the checkpoint. They are sorted by name.
pub(super) fn check_doubles(tensors: &[SourceTensor]) -> Result<(), Problem> {
    match tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
        None => Ok(()),
        Some(pair) => {
            Err(Problem::new(&pair[0].name, "is there twice, under different names of llama.cpp's or in two parts"))
        }
    }
}
