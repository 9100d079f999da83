//! Routers without a choice: a table lists the experts of each token of the vocabulary.

use std::path::PathBuf;

use sluice_format::MoeSpec;

use super::ModelError;
use super::weights::{ExtentTensors, VectorRef};

/// The table of one layer, as a place in its router extent.
#[derive(Debug)]
pub(super) struct TokenTable {
    experts: VectorRef,
    rows: usize,
    top_k: usize,
    /// Experts of the layer.
    count: usize,
    path: PathBuf,
    extent: String,
}

impl TokenTable {
    /// `None` if scores decide.
    pub fn new(moe: &MoeSpec, router: &ExtentTensors<'_>) -> Result<Option<Self>, ModelError> {
        let Some(rows) = moe.router.token_table else { return Ok(None) };
        Ok(Some(TokenTable {
            experts: router.vector("token_experts")?,
            rows,
            top_k: moe.top_k,
            count: moe.experts,
            path: router.file.path().to_owned(),
            extent: sluice_format::extent_name(router.kind, router.layer, router.index),
        }))
    }

    /// Writes the experts of a token to `out`, in the order of the table. `extent`: the bytes of the router extent.
    ///
    /// # Errors
    /// [`ModelError::Token`] if the table does not have the token, [`ModelError::TokenTable`] if it lists a number that is no
    /// expert, or one twice.
    pub fn experts(&self, extent: &[u8], token: u32, out: &mut Vec<u32>) -> Result<(), ModelError> {
        let row = token as usize;
        if row >= self.rows {
            return Err(ModelError::Token { token, vocab: self.rows });
        }
        out.clear();
        for listed in self.experts.part(extent, row * self.top_k..(row + 1) * self.top_k) {
            let expert = listed as u32;
            if expert as f32 != listed || expert as usize >= self.count || out.contains(&expert) {
                return Err(ModelError::TokenTable {
                    path: self.path.clone(),
                    extent: self.extent.clone(),
                    token,
                    listed,
                    experts: self.count,
                });
            }
            out.push(expert);
        }
        Ok(())
    }
}
